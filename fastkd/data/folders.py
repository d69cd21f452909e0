"""Open local folders of images, tars and WebDataset shards, and find their splits.

The layout is decided first, from names alone; then the splits are opened.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fastkd.data.classes import UNLABELLED, map_classes, number_classes
from fastkd.data.files import (
    LeftOut,
    image_endings,
    is_hidden,
    is_inside,
    list_folders,
    list_images,
    tell_left_out,
    warn,
)
from fastkd.data.readers import FileReader, ReadableImages
from fastkd.data.tars import TarImages, holds_samples
from fastkd.utils.io import printable, writable

VALIDATION_FOLDERS = ("val", "validation", "valid")
SPLITS = {"train": ("train", "training"), "validation": ("validation", "val", "valid", "test")}
MOST_SAMPLES = 10**12  # that a list of shards may state
SHARD_LISTS = ("_info.json", "info.json")  # beside WebDataset shards, as timm reads them
LISTS = (".txt", ".csv", ".tsv", ".json")  # beside images, may say what their classes are
UNFINISHED = ".fastkd-shard.json"  # beside shards that are still being written
# How a split's images are kept: files; one tar; tars that stand for folders; WebDataset shards.
IMAGES, TAR, TARS, SHARDS = "images", "tar", "tars", "shards"


class _Part(NamedTuple):
    """Where the images of one split are, and in which form."""

    place: Path  # folder or archive
    form: str  # IMAGES, TAR, TARS or SHARDS
    tars: tuple[Path, ...] = ()
    classes: int = 0  # named by a list of shards; 0: unknown
    target: str | None = None  # field of the shards' .json that holds labels; None: .cls does
    names: tuple[str, ...] = ()  # of the classes by label, where a list of shards has them
    samples: int | None = None  # as a list of shards says


def open_folder(folder: Path, need_train: bool, labels: bool) -> tuple[Any, Any]:
    """Open a folder's (train, val); train is None where it is not needed."""
    train, val = _layout(folder, need_train)
    if train is None or (not need_train and train.form == SHARDS):
        return None, _open(val, labels)
    training = _open(train, labels and need_train)
    if labels and need_train:
        refuse_empty_classes(training, train.place)
    # The training set's numbering, so that a class without validation images shifts no label.
    evaluation = _open(val, labels, training if training.labelled else None)
    # One folder is no classification.
    if not labels and training.labelled and len(training.reader.class_to_idx) == 1:
        training.labelled = evaluation.labelled = False
    return (training if need_train else None), evaluation


def open_tar(path: Path, need_train: bool, labels: bool) -> tuple[Any, Any]:
    """Open one tar as the evaluation set: (None, val)."""
    if need_train:
        raise ValueError(
            f"data: {path} is one tar; give the folder that holds train.tar and val.tar"
        )
    return None, _open(_archive(path), labels)


def _layout(folder: Path, need_train: bool) -> tuple[_Part | None, _Part]:
    """Find a folder's splits: (train, val); train may be None where it is not needed."""
    _refuse_unfinished(folder)
    listed = _listed_splits(folder)
    if listed is not None:
        return _chosen(folder, listed, need_train)
    train, val = _place(folder, ("train",)), _place(folder, VALIDATION_FOLDERS)
    if train is None and val is None and (tars := _tars(folder)):
        return _chosen(folder, _named_splits(folder, tars), need_train)
    if train is None and not need_train:
        return None, _part(val or folder)
    missing = [] if train else ["train"]
    if val is None:
        missing.append("val (or validation)")
    if train is None or val is None:
        raise ValueError(f"data: {folder} has no folder {' and no folder '.join(missing)}")
    return _part(train), _part(val)


def _refuse_unfinished(folder: Path) -> None:
    if (folder / UNFINISHED).exists():
        raise ValueError(f"data: {folder} is unfinished; run fastkd shard again")


def _place(folder: Path, names: Sequence[str]) -> Path | None:
    """Find a split's folder or else its tar, under any of its names."""
    folders = (path for name in names if (path := folder / name).is_dir())
    tars = (path for name in names if (path := folder / f"{name}.tar").is_file())
    return next(folders, None) or next(tars, None)


def _part(place: Path) -> _Part:
    """Find out how a split's folder or tar keeps images."""
    if place.is_file():
        return _archive(place)
    _refuse_unfinished(place)
    tars = _tars(place)
    if not tars:
        return _Part(place, IMAGES)
    return _Part(place, SHARDS if holds_samples(tars[0]) else TARS, tars)


def _archive(path: Path) -> _Part:
    return _Part(path, SHARDS if holds_samples(path) else TAR, (path,))


def _tars(folder: Path) -> tuple[Path, ...]:
    """List a folder's archives; raise if it has images, too, for either may be meant."""
    found = sorted(path for path in folder.glob("*.tar") if not is_hidden(path.name))
    tars = tuple(path for path in found if path.is_file() or not path.exists())
    images = list_images(folder) if tars else []
    if images:
        raise ValueError(
            f"data: {folder} has images, such as {Path(images[0]).relative_to(folder)}, and the "
            f"archive {tars[0].name}: take one of them away"
        )
    if tars:
        left_out = LeftOut()
        for path in set(found).difference(tars):
            left_out.add(LeftOut.IRREGULAR, str(path))
        tell_left_out(folder, left_out)
    return tars


def _listed_splits(folder: Path) -> dict[str, _Part] | None:
    """Read the splits that an ``_info.json`` lists; None without such a list."""
    path = next((folder / name for name in SHARD_LISTS if (folder / name).is_file()), None)
    if path is None:
        return None
    listed = parse_shard_list(path.read_bytes(), str(path))
    return {
        name: _Part(
            folder, SHARDS, tuple(folder / file for file in part.files), *part[2:], part.samples
        )
        for name, part in listed.items()
    } or None


class ListedSplit(NamedTuple):
    """A split in a list of WebDataset shards."""

    files: list[str]
    samples: int | None  # None: unknown
    classes: int  # 0: unknown
    target: str | None  # field of the shards' .json that holds labels; None: .cls does
    names: tuple[str, ...]  # of the classes by label; empty: unknown


def parse_shard_list(text: bytes, where: str) -> dict[str, ListedSplit]:
    """Read the text of an ``_info.json``; empty if it lists no splits."""
    try:
        info = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"data: {where} is no JSON: {error}") from error
    if not isinstance(info, dict) or "splits" not in info:
        return {}
    splits, classes = info["splits"], info.get("classes") or []
    if not isinstance(classes, list | dict):
        raise ValueError(f"data: {where}: classes must be a list, got {type(classes).__name__}")
    if not isinstance(splits, dict) or not splits:
        raise ValueError(f"data: {where}: splits must be named, got {splits!r}")
    return {name: _listed(where, name, split, classes) for name, split in splits.items()}


def _listed(where: str, name: str, split: Any, classes: Any) -> ListedSplit:
    split = split if isinstance(split, dict) else {}
    files, samples = split.get("filenames"), split.get("num_samples")
    if not isinstance(files, list) or not all(isinstance(file, str) for file in files):
        raise ValueError(
            f"data: {where}: split {name} must have a list of filenames, got {files!r}"
        )
    if not files:
        raise ValueError(f"data: {where}: split {name} lists no shards")
    for file in files:
        if os.path.isabs(file) or not is_inside(file, os.path.dirname(where) or "."):
            raise ValueError(
                f"data: {where}: split {name} lists {file!r}, which leaves the list's folder"
            )
    if len({*map(os.path.normpath, files)}) < len(files):
        raise ValueError(f"data: {where}: split {name} lists a shard twice")
    if not isinstance(samples, int | None) or not 0 <= (samples or 0) < MOST_SAMPLES:
        raise ValueError(
            f"data: {where}: num_samples of split {name} must be a number, got {samples!r:.50}"
        )
    target = split.get("alt_label") or None
    if not isinstance(target, str | None):
        raise ValueError(f"data: {where}: alt_label of split {name} must be a name, got {target!r}")
    # Labels of another field are not those that the list names.
    names = tuple(map(str, classes)) if isinstance(classes, list) and target is None else ()
    return ListedSplit(files, samples or None, len(classes), target, names)


def _named_splits(folder: Path, tars: Sequence[Path]) -> dict[str, _Part]:
    """Group shards by the split in their names."""
    words = {word for words in SPLITS.values() for word in words}
    splits: dict[str, list[Path]] = {}
    for path in tars:
        found = [word for word in re.split(r"[^a-z]+", path.name.lower()) if word in words]
        if found:
            splits.setdefault(found[0], []).append(path)
    splits = splits or {"(unnamed)": list(tars)}
    return {name: _Part(folder, SHARDS, tuple(paths)) for name, paths in splits.items()}


def _chosen(folder: Path, splits: dict[str, _Part], need_train: bool) -> tuple[_Part | None, _Part]:
    """Choose the splits for training and evaluation."""
    train, val = (
        next((splits[name] for name in SPLITS[part] if name in splits), None) for part in SPLITS
    )
    if not need_train:
        train = None
        if val is None and len(splits) == 1:
            val = next(iter(splits.values()))
    missing = ["train"] if need_train and train is None else []
    if val is None:
        missing.append("validation")
    if val is None or missing:
        raise ValueError(
            f"data: {folder} has no shards of {' and '.join(missing)}, but of: {', '.join(splits)}"
        )
    return train, val


def _open(part: _Part, labels: bool, like: ReadableImages | None = None) -> ReadableImages:
    """Open one split; with ``like``, a labelled set, by that one's class numbers."""
    if part.form == IMAGES:
        return _open_images(part.place, labels, like)
    return _open_tars(part, labels, like)


def _open_images(folder: Path, labels: bool, like: ReadableImages | None = None) -> ReadableImages:
    left_out = LeftOut()
    paths = list_images(folder, left_out)
    tell_left_out(folder, left_out)
    if not paths:
        raise ValueError(
            f"data: {folder} has no images ({', '.join(image_endings())}; hidden ones do not count)"
        )
    above = len(os.path.join(folder, ""))
    inner = [path[above:].split(os.sep) for path in paths]
    outside = next((path for path, parts in zip(paths, inner, strict=True) if len(parts) == 1), "")
    if outside and labels:
        raise ValueError(
            f"data: {folder} has images in no class's folder, such as {outside}; a recipe with "
            f"labels=false needs no classes"
        )
    names = ["" if outside else parts[0] for parts in inner]
    numbers = number_classes(set(names))
    samples = [(path, numbers[name]) for path, name in zip(paths, names, strict=True)]
    empty = sorted(set(list_folders(folder)) - set(names))
    dataset = ReadableImages(FileReader(str(folder), samples, numbers, empty), labelled=not outside)
    if dataset.labelled:
        _tell_depth(folder, len(numbers), len({os.path.dirname(path) for path in paths}))
        _number_like(dataset, like, folder, labels)
    return dataset


def refuse_empty_classes(dataset: ReadableImages, place: Path) -> None:
    """Raise if a labelled training split has class folders without images, as torchvision does."""
    if dataset.labelled and (empty := dataset.reader.empty):
        more = f" and {len(empty) - 3} more" if len(empty) > 3 else ""
        raise ValueError(
            f"data: {place} has class folders without images: {', '.join(empty[:3])}{more}; remove "
            f"them, or hide them (.name)"
        )


def _tell_depth(place: Path, classes: int, folders: int) -> None:
    """Say so where the folders that images are in are no classes, but folders above them are."""
    if folders > classes:
        warn(
            "data: %s: images are in %d folders, but the classes are the %d at the top",
            writable(place), folders, classes,
        )  # fmt: skip


def _number_like(
    dataset: ReadableImages, like: ReadableImages | None, place: Path, labels: bool
) -> None:
    """Give a validation split the class numbers of the training split, by name."""
    training = like.reader.class_to_idx if like is not None else {}
    if not training:
        return
    reader = dataset.reader
    name, *others = reader.class_to_idx
    without = [name for name in training if name not in reader.class_to_idx]
    if without:
        warn(
            "data: %s has no images of %d of the %d training classes: %s",
            writable(place), len(without), len(training), ", ".join(map(printable, without[:3])),
        )  # fmt: skip
    if not others and name not in training:
        dataset.labelled = labels
        if not labels:
            return
        lists = sorted(path.name for path in place.glob("*.*") if path.suffix in LISTS)
        beside = f" (and labels in {lists[0]}?)" if lists else ""
        raise ValueError(
            f"data: {place} has all images in one folder, {name!r}{beside}, which is no class of "
            f"the training set: move each image to a folder named as its class is in training"
        )
    if isinstance(reader, TarImages):
        reader.renumber(training)
        return
    numbers = map_classes(reader.class_to_idx, training, place)
    reader.samples = [(path, numbers[own]) for path, own in reader.samples]
    reader.class_to_idx = training


def _open_tars(part: _Part, labels: bool, like: ReadableImages | None) -> ReadableImages:
    reader = TarImages(part.tars, layout=part.form, target=part.target)
    if not len(reader):
        some = ", ".join(path.name for path in part.tars[:3])
        raise ValueError(f"data: {part.place} has no images in its archives ({some})")
    if part.samples not in (None, len(reader)):
        warn(
            "data: %s: the shards hold %d images, but their list says %d",
            writable(part.place), len(reader), part.samples,
        )  # fmt: skip
    without = (reader.targets == UNLABELLED).nonzero()[0]
    if len(without) and labels:
        raise ValueError(
            f"data: {len(without)} images have no label, such as "
            f"{reader.filename(without[0], absolute=True)}; a recipe with labels=false needs none"
        )
    dataset = ReadableImages(reader, labelled=len(without) == 0)
    if not dataset.labelled:
        return dataset
    if part.form != SHARDS:
        _tell_depth(part.place, len(reader.class_to_idx), reader.folders)
        _number_like(dataset, like, part.place, labels)
        return dataset
    _check_labels(reader, part.classes, "its list of shards")
    if like is not None:
        training = like.num_classes or len(like.reader.class_to_idx)
        _check_labels(reader, training, "the training set")
    dataset.num_classes = part.classes or 1 + int(reader.targets.max())
    dataset.classes = part.names
    return dataset


def _check_labels(reader: TarImages, classes: int, whose: str) -> None:
    """Raise if a label is beyond the number of classes, where that is known (not 0)."""
    highest = int(reader.targets.argmax())
    if classes and reader.targets[highest] >= classes:
        raise ValueError(
            f"data: {reader.filename(highest, absolute=True)} has the label "
            f"{reader.targets[highest]}, but {whose} has {classes} classes (0 to {classes - 1})"
        )
