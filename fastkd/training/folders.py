"""Folders of images, tars and WebDataset shards on this machine, and which split is where.

Knows how people lay out files; neither hubs nor what images are for.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from timm.data import create_dataset

from fastkd.training.sources import ReadableImages
from fastkd.training.tars import UNLABELLED, TarImages, holds_samples

VALIDATION_FOLDERS = ("val", "validation")
SPLITS = {"train": ("train", "training"), "validation": ("validation", "val", "test")}
SHARD_LISTS = ("_info.json", "info.json")  # beside WebDataset shards, as timm reads them


def open_folder(folder: Path, need_train: bool, labels: bool) -> tuple[Any, Any]:
    """Open the splits of a folder, whichever way it is laid out.

    Args:
        folder: as `open_data` describes it.
        need_train: False opens the evaluation set alone.
        labels: whether images must have them.

    Returns:
        (train, val); train is None where it is not needed.

    Raises:
        ValueError: a split or labels are missing, or evaluation has classes that training lacks.
        OSError: an archive that is torn, or no tar.
    """
    train, val = _part(folder, ("train",)), _part(folder, VALIDATION_FOLDERS)
    in_parts = train is not None or val is not None
    if _shard_list(folder) is not None or (not in_parts and any(folder.glob("*.tar"))):
        return _open_shards(folder, need_train, labels)
    if not need_train and train is None:
        return None, _open_part(val or folder, labels)
    missing = [] if train else ["train"]
    if val is None:
        missing.append("val (or validation)")
    if train is None or val is None:
        raise ValueError(f"data: {folder} has no folder {' and no folder '.join(missing)}")
    training = _open_part(train, labels and need_train)
    # The training set's numbering, so that a class without validation images shifts no label.
    classes = training.reader.class_to_idx if training.labelled else None
    return (training if need_train else None), _open_part(val, labels, classes or None)


def _part(folder: Path, names: Sequence[str]) -> Path | None:
    """A split's folder or tar, whichever of its names it has."""
    folders = [folder / name for name in names]
    tars = [folder / f"{name}.tar" for name in names]
    found = [path for path in folders if path.is_dir()] + [path for path in tars if path.is_file()]
    return found[0] if found else None


def _open_part(part: Path, labels: bool, classes: dict[str, int] | None = None) -> ReadableImages:
    if part.is_file():
        return _open_tars([part], "shards" if holds_samples(part) else "tar", labels, classes)
    tars = sorted(part.glob("*.tar"))
    if tars:
        return _open_tars(tars, "shards" if holds_samples(tars[0]) else "tars", labels, classes)
    reader = _image_folder(part)
    outside = next((path for path, _ in reader.samples if Path(path).parent == part), None)
    if outside is not None:
        if labels:
            raise ValueError(
                f"data: {part} has images in no class's folder, such as {outside}; a recipe with "
                f"labels=false needs no classes"
            )
        return ReadableImages(reader, labelled=False)
    if classes is not None:
        _renumber(reader, part, classes)
    return ReadableImages(reader)


def _image_folder(folder: Path) -> Any:
    try:
        return create_dataset("", root=str(folder), search_split=False).reader
    except RuntimeError as error:
        raise ValueError(f"data: {error}") from error  # names folder and extensions


def _renumber(reader: Any, folder: Path, classes: dict[str, int]) -> None:
    """Give a reader of an image folder the numbers that another one gives its classes."""
    leaves = {
        path.name
        for path in folder.iterdir()
        if path.is_dir() and not any(inner.is_dir() for inner in path.iterdir())
    }
    strangers = sorted((leaves | set(reader.class_to_idx)) - set(classes))
    if strangers:
        raise ValueError(f"data: {folder} has classes that the training set lacks: {strangers[:5]}")
    numbers = {own: classes[name] for name, own in reader.class_to_idx.items()}
    reader.samples = [(path, numbers[own]) for path, own in reader.samples]
    reader.class_to_idx = classes


def open_tar(path: Path, need_train: bool, labels: bool) -> tuple[Any, Any]:
    """Open one tar as the evaluation set.

    Args:
        path: of the archive.
        need_train: refused, for there is but one set.
        labels: whether images must have them.

    Returns:
        (None, val).

    Raises:
        ValueError: training is asked for, or labels are missing.
        OSError: an archive that is torn, or no tar.
    """
    if need_train:
        raise ValueError(
            f"data: {path} is one tar; give the folder that holds train.tar and val.tar"
        )
    return None, _open_part(path, labels)


def _open_tars(
    tars: Sequence[Path],
    layout: str,
    labels: bool,
    classes: dict[str, int] | None = None,
    target: str | None = None,
) -> ReadableImages:
    reader = TarImages(tars, layout=layout, class_to_idx=classes, target=target)
    without = (reader.targets == UNLABELLED).nonzero()[0]
    if len(without) and labels:
        raise ValueError(
            f"data: {len(without)} images have no label, such as "
            f"{reader.filename(without[0], absolute=True)}; a recipe with labels=false needs none"
        )
    dataset = ReadableImages(reader, labelled=len(without) == 0)
    if layout == "shards" and dataset.labelled and len(reader):
        dataset.num_classes = 1 + int(reader.targets.max())
    return dataset


def _shard_list(folder: Path) -> dict[str, Any] | None:
    """What an ``_info.json`` says, if one is there and lists shards."""
    path = next((folder / name for name in SHARD_LISTS if (folder / name).is_file()), None)
    if path is None:
        return None
    try:
        info = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"data: {path} is no JSON: {error}") from error
    return info if isinstance(info, dict) and "splits" in info else None


def _open_shards(folder: Path, need_train: bool, labels: bool) -> tuple[Any, Any]:
    info = _shard_list(folder) or {"splits": _named_shards(folder)}
    splits = info["splits"]
    names = {part: next((n for n in SPLITS[part] if n in splits), None) for part in SPLITS}
    if not need_train:
        names["train"] = None
        if names["validation"] is None and len(splits) == 1:
            names["validation"] = next(iter(splits))
    missing = [part for part in names if names[part] is None and (need_train or part != "train")]
    if missing:
        raise ValueError(
            f"data: {folder} has no shards of {' and '.join(missing)}, but of: {', '.join(splits)}"
        )
    train, val = (
        None if name is None else _open_split(folder, splits[name], info.get("classes"), labels)
        for name in names.values()
    )
    return train, val


def _open_split(
    folder: Path, split: dict[str, Any], classes: list[str] | None, labels: bool
) -> ReadableImages:
    tars = [folder / name for name in split["filenames"]]
    dataset = _open_tars(tars, "shards", labels, target=split.get("alt_label") or None)
    if classes and dataset.labelled:
        dataset.num_classes = len(classes)
    return dataset


def _named_shards(folder: Path) -> dict[str, Any]:
    """Shards by the split that their names tell, in the form of an ``_info.json``."""
    splits: dict[str, Any] = {}
    words = {word for words in SPLITS.values() for word in words}
    tars = sorted(path.name for path in folder.glob("*.tar"))
    for name in tars:
        told = [word for word in re.split(r"[^a-z]+", name.lower()) if word in words]
        if told:
            splits.setdefault(told[0], {"filenames": []})["filenames"].append(name)
    return splits or {"(unnamed)": {"filenames": tars}}
