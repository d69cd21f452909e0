"""Open the ``data`` argument: a folder, tars, shards, a named dataset or a pair of datasets."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image
from timm.data import create_dataset
from torch import Tensor
from torch.utils.data import IterableDataset
from torchvision.datasets.folder import default_loader

from fastkd.data.classes import (
    NO_LABEL,
    Classes,
    LabelError,
    class_names,
    class_number,
    match_classes,
    number_classes,
)
from fastkd.data.datasets import DataPair, FileReader, ReadableImages, TarImages
from fastkd.data.image_files import (
    LeftOut,
    image_endings,
    is_hidden,
    list_folders,
    list_images,
    load_rgb,
    warn,
    warn_left_out,
)
from fastkd.data.streaming import HubStream, ShardStream, StreamSource, image_column
from fastkd.data.tars import SHARD_LISTS, SPLITS, ShardSplit, is_shard, parse_shard_list
from fastkd.utils.argument_checks import describe, refuse_blank
from fastkd.utils.io import printable, writable
from fastkd.utils.random import preserved_rng

# By the scheme of timm's dataset names: the module that reads it, which is its name for pip, too.
SCHEMES = {"hfds": "datasets", "hfids": "datasets", "wds": "webdataset", "torch": "torchvision"}
VALIDATION_FOLDERS = ("val", "validation", "valid")
LABEL_FILES = (".txt", ".csv", ".tsv", ".json")  # beside images, may hold their classes
UNFINISHED = ".fastkd-shard.json"  # beside shards that are still being written
# How a split's images are kept: files; one tar; tars that stand for folders; WebDataset shards.
IMAGES, TAR, TARS, SHARDS = "images", "tar", "tars", "shards"
PROBED = 8  # samples that are tried, to see what a dataset yields

Data = str | Path | Sequence[Any]


def open_data(
    data: Data, root: str | None = None, *, need_train: bool = True, labels: bool = True
) -> DataPair:
    """Open a training and an evaluation set.

    Classes are the folders at the top of a split, in natural order. Files that are left out are
    counted in one line. An index of tars (``.fastkd-*.npz``) is kept beside them if possible.

    Args:
        data: one of

            - a folder with ``train`` and ``val`` (or ``validation``, ``valid``): folders of images,
              one per class; tars, one per class; or ``train.tar`` and ``val.tar``;
            - a folder of WebDataset shards: with an ``_info.json`` (as ``fastkd shard`` and timm
              write), or named by their split (``train-0000.tar``, ``val-0000.tar``);
            - ``wds/FOLDER`` of the same, or streamed: ``wds/https://...``, ``wds/pipe:cat ...``;
            - ``hfds/...`` or ``torch/...``, as in timm; ``hfids/...`` is streamed;
            - (train, val) map-style datasets yielding (PIL image or float tensor, label).
        root: the folder of a named dataset.
        need_train: False opens the evaluation set alone; then ``data`` may also be one dataset, one
            tar, or a folder of class folders.
        labels: False allows samples without labels, which become -1. Streams always need labels.
    """
    refuse_blank("open_data", data=data)
    if isinstance(data, str | Path):
        train, val = _open_named(str(data), root, need_train, labels)
    elif isinstance(data, tuple | list) and len(data) == 2:
        train, val = (data[0] if need_train else None), data[1]
    elif not need_train and hasattr(data, "__getitem__") and hasattr(data, "__len__"):
        train, val = None, data
    else:
        raise ValueError(
            f"data: expected a folder, a timm dataset name or (train, val) datasets, got "
            f"{type(data).__name__}"
        )
    image, labeled_val = _inspect(val, "evaluation", labels)
    numbers, known, own = None, class_names(train), class_names(val)
    if train is not None:
        image, _ = _inspect(train, "training", labels)
        if labels and _num_classes(train) == 1:
            raise ValueError(
                f"data: the training set has one class, {known.get(0, 0)!r}, which teaches "
                "nothing; a recipe with labels=false needs no classes"
            )
    first = val if train is None else train
    if known and own and known != own and labeled_val:
        numbers = _numbers_by_name(own, known, "evaluation set")
    return DataPair(
        train=train,
        val=val,
        num_classes=_num_classes(first) or _num_classes(val),
        yields_tensors=isinstance(image, Tensor),
        image_size=tuple(image.shape) if isinstance(image, Tensor) else None,  # type: ignore[arg-type]
        labeled_val=labeled_val,
        streams=isinstance(first, StreamSource),
        numbers=numbers,
    )


def _inspect(dataset: Any, which: str, labels: bool) -> tuple[Any, bool]:
    """Return (image or None, whether there are labels); a user's own set is tried."""
    if isinstance(dataset, IterableDataset):
        raise ValueError(
            f"data: {type(dataset).__name__} streams its samples; expected a dataset with "
            "__getitem__ and __len__"
        )
    if isinstance(dataset, StreamSource):
        return None, True
    if len(dataset) == 0:
        raise ValueError(f"data: {type(dataset).__name__} is empty")
    if isinstance(dataset, ReadableImages):
        return None, dataset.labeled
    with preserved_rng():
        sample = _first_readable(dataset)
    if not isinstance(sample, tuple | list) or len(sample) != 2:
        raise ValueError(f"data: samples must be (image, label), got {type(sample).__name__}")
    image, label = sample
    is_tensor = isinstance(image, Tensor) and image.is_floating_point() and image.ndim == 3
    if not is_tensor and not isinstance(image, Image.Image):
        expected = "PIL images or float tensors [C, H, W]"
        raise ValueError(f"data: images must be {expected}, got {describe(image)}")
    try:
        number = class_number(label, f"the {which} set ({type(dataset).__name__})")
        labeled = number not in (None, NO_LABEL)
    except LabelError:
        if labels:
            raise
        labeled = False
    if labels and not labeled:
        raise ValueError(
            f"data: samples of the {which} set have no label; a student can be trained on its "
            f"teacher alone, with labels=False"
        )
    return image, labeled


def _first_readable(dataset: Any) -> Any:
    # One broken file is no reason to stop; several in a row may be a disk that is not there.
    last = min(len(dataset), PROBED) - 1
    for index in range(last):
        with contextlib.suppress(OSError):
            return dataset[index]
    return dataset[last]


def _num_classes(dataset: Any) -> int | None:
    if isinstance(dataset, ReadableImages) and not dataset.labeled:
        return None
    if getattr(dataset, "num_classes", None) is not None:
        return dataset.num_classes
    reader = getattr(dataset, "reader", None)
    for classes in (getattr(reader, "class_to_idx", None), getattr(dataset, "classes", None)):
        if classes:
            return len(classes)
    return None


def _numbers_by_name(own: dict[int, str], training: dict[int, str], what: str) -> dict[int, int]:
    """Map an evaluation set's labels to the training set's of the same name."""
    sides = [Classes({n: (name,) for n, name in names.items()}) for names in (own, training)]
    return match_classes(*sides, caller="data", of=(what, "training set")) or {}


def _open_named(data: str, root: str | None, need_train: bool, labels: bool) -> tuple[Any, Any]:
    path = Path(data)
    if path.is_dir():
        return _open_folder(path, need_train, labels)
    if path.is_file() and path.suffix == ".tar":
        if need_train:
            raise ValueError(f"data: {path} is one tar; give the folder of train.tar and val.tar")
        return None, _open_split(_inspect_place(path), labels)
    if path.exists():
        raise ValueError(f"data: {data!r} is neither a folder nor a tar")
    scheme, _, rest = data.partition("/")
    scheme = scheme.lower()
    if scheme not in SCHEMES:
        names = ", ".join(f"{name}/" for name in SCHEMES)
        raise ValueError(f"data: no folder {data!r}; names of datasets begin with {names}")
    if not (rest.strip("/ ") or (root or "").strip()):
        raise ValueError(f"data: {data!r} names no dataset after {scheme}/")
    remote = any("://" in place or place.startswith("pipe:") for place in (rest, root or ""))
    if scheme == "wds" and not remote:
        folders = [Path(root) / rest, Path(root)] if root else [Path(rest)]
        found = next((folder for folder in folders if folder.is_dir()), None)
        if found is None:
            raise ValueError(f"data: no folder {str(folders[0])!r} of shards")
        return _open_folder(found, need_train, labels)
    name = f"{scheme}/{rest}"
    if importlib.util.find_spec(SCHEMES[scheme]) is None:
        raise ImportError(
            f"data: {name!r} is read by {SCHEMES[scheme]}: pip install {SCHEMES[scheme]}"
        )
    try:
        train = _open_part(name, root, "train", labels) if need_train else None
        return train, _open_part(name, root, "validation", labels)
    except (ValueError, OSError, ImportError, RuntimeError, MemoryError):
        raise
    except Exception as error:  # of the package that reads it
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"data: {name} cannot be opened ({reason})") from error


def _open_part(name: str, root: str | None, part: str, labels: bool) -> Any:
    """Open the part "train" or "validation" of a dataset with a scheme of `SCHEMES`."""
    scheme = name.partition("/")[0]
    if scheme == "hfds":
        return _open_hub_set(name, root, part, labels)
    if scheme != "torch":
        return (HubStream if scheme == "hfids" else ShardStream)(name, root, part)
    dataset = create_dataset(name, root=root, split=part)
    if getattr(dataset, "loader", None) is default_loader:
        dataset.loader = load_rgb
    return dataset


def _open_hub_set(name: str, root: str | None, part: str, labels: bool) -> ReadableImages:
    """Open a set of Hugging Face's hub whose samples have indexes."""
    errors: list[Exception] = []
    for split in SPLITS[part]:
        try:
            reader = create_dataset(name, root, split).reader
            break
        except (RuntimeError, ValueError, KeyError) as error:
            errors.append(error)
    else:
        splits = " or ".join(SPLITS[part])
        raise ValueError(f"data: {name} has no split {splits}: {errors[0]}") from errors[0]
    # timm adds a column of nulls where the one it expects is missing.
    if reader.dataset.data.column(reader.image_key).null_count == len(reader):
        others = {k: kind for k, kind in reader.dataset.features.items() if k != reader.image_key}
        image = image_column(name, others)
        reader = create_dataset(name, root, split, input_key=image).reader
    columns = list(reader.dataset.features)
    reason = f"no column {reader.label_key!r}, but {columns}"
    if reader.label_key in columns:
        first = reader.dataset.select_columns([reader.label_key])[0] if len(reader) else {}
        if first.get(reader.label_key, 0) not in (None, NO_LABEL):
            return ReadableImages(reader, f"{name}/{split}")
        reason = f"no labels in its split {split}"
    if labels:
        raise ValueError(f"data: {name} has {reason}; a recipe with labels=false needs none")
    reader.label_key = reader.image_key  # any column that exists; its values are not used
    return ReadableImages(reader, f"{name}/{split}", labeled=False)


class _Split(NamedTuple):
    """Where the images of one split of a folder are, and in which form."""

    place: Path  # folder or archive
    form: str  # IMAGES, TAR, TARS or SHARDS
    tars: tuple[Path, ...] = ()
    listed: ShardSplit = ShardSplit(())  # what a list of shards states


def _open_folder(folder: Path, need_train: bool, labels: bool) -> tuple[Any, Any]:
    """Open a folder's (train, val); train is None where it is not needed."""
    train, val = _find_splits(folder, need_train)
    if train is None or (not need_train and train.form == SHARDS):
        return None, _open_split(val, labels)
    training = _open_split(train, labels and need_train)
    if labels and need_train:
        refuse_empty_classes(training, train.place)
    # The training set's numbering, so that a class without validation images shifts no label.
    evaluation = _open_split(val, labels, training if training.labeled else None)
    # One folder is no classification.
    if not labels and training.labeled and len(training.reader.class_to_idx) == 1:
        training.labeled = evaluation.labeled = False
    return (training if need_train else None), evaluation


def _find_splits(folder: Path, need_train: bool) -> tuple[_Split | None, _Split]:
    """Find a folder's splits by names alone; train may be None where it is not needed."""
    _refuse_unfinished(folder)
    path = next((folder / name for name in SHARD_LISTS if (folder / name).is_file()), None)
    if path is not None and (listed := parse_shard_list(path.read_bytes(), str(path))):
        splits = {
            name: _Split(folder, SHARDS, tuple(folder / file for file in split.files), split)
            for name, split in listed.items()
        }
        return _choose(folder, splits, need_train)
    train, val = _find_place(folder, ("train",)), _find_place(folder, VALIDATION_FOLDERS)
    if train is None and val is None and (tars := _tars(folder)):
        return _choose(folder, _splits_by_name(folder, tars), need_train)
    if train is None and not need_train:
        return None, _inspect_place(val or folder)
    if train is None or val is None:
        missing = "train" if train is None else "val (or validation)"
        raise ValueError(f"data: {folder} has no folder {missing}")
    return _inspect_place(train), _inspect_place(val)


def _refuse_unfinished(folder: Path) -> None:
    if (folder / UNFINISHED).exists():
        raise ValueError(f"data: {folder} is unfinished; run fastkd shard again")


def _find_place(folder: Path, names: Sequence[str]) -> Path | None:
    """Find a split's folder or else its tar, under any of its names."""
    folders = (path for name in names if (path := folder / name).is_dir())
    tars = (path for name in names if (path := folder / f"{name}.tar").is_file())
    return next(folders, None) or next(tars, None)


def _inspect_place(place: Path) -> _Split:
    """Find out how a split's folder or tar keeps images."""
    _refuse_unfinished(place)
    tars = (place,) if place.is_file() else _tars(place)
    if not tars:
        return _Split(place, IMAGES)
    plain = TAR if place.is_file() else TARS
    return _Split(place, SHARDS if is_shard(tars[0]) else plain, tars)


def _tars(folder: Path) -> tuple[Path, ...]:
    """List a folder's archives; raise if it has images, too, for either may be meant."""
    found = sorted(path for path in folder.glob("*.tar") if not is_hidden(path.name))
    tars = tuple(path for path in found if path.is_file() or not path.exists())
    if not tars:
        return ()
    if images := list_images(folder):
        raise ValueError(
            f"data: {folder} has images, such as {Path(images[0]).relative_to(folder)}, and the "
            f"archive {tars[0].name}: move one of them away"
        )
    left_out = LeftOut()
    for path in set(found).difference(tars):
        left_out.add(LeftOut.IRREGULAR, str(path))
    warn_left_out(folder, left_out)
    return tars


def _splits_by_name(folder: Path, tars: Sequence[Path]) -> dict[str, _Split]:
    """Group shards by the split in their names."""
    words = {word for names in SPLITS.values() for word in names}
    splits: dict[str, list[Path]] = {}
    for path in tars:
        found = [word for word in re.split(r"[^a-z]+", path.name.lower()) if word in words]
        if found:
            splits.setdefault(found[0], []).append(path)
    splits = splits or {"(unnamed)": list(tars)}
    return {name: _Split(folder, SHARDS, tuple(paths)) for name, paths in splits.items()}


def _choose(
    folder: Path, splits: dict[str, _Split], need_train: bool
) -> tuple[_Split | None, _Split]:
    """Choose the splits for training and evaluation."""
    train, val = (
        next((splits[name] for name in SPLITS[part] if name in splits), None) for part in SPLITS
    )
    if not need_train:
        train = None
        if val is None and len(splits) == 1:
            val = next(iter(splits.values()))
    if val is None or (need_train and train is None):
        missing = "validation" if val is None else "train"
        raise ValueError(f"data: {folder} has no shards of {missing}, but of: {', '.join(splits)}")
    return train, val


def _open_split(split: _Split, labels: bool, like: ReadableImages | None = None) -> ReadableImages:
    """Open one split; with ``like``, a labeled training set, by that one's class numbers."""
    dataset = (_open_images if split.form == IMAGES else _open_tars)(split, labels)
    if not dataset.labeled:
        return dataset
    if split.form == SHARDS:
        highest, listed = int(dataset.reader.targets.argmax()), split.listed
        most = int(dataset.reader.targets[highest])
        training = 0 if like is None else like.num_classes or len(like.reader.class_to_idx)
        for whose, classes in (("its list", listed.classes), ("the training set", training)):
            if classes and most >= classes:
                raise ValueError(
                    f"data: {dataset.filename(highest)} has the label {most}, but {whose} has "
                    f"{classes} classes (0 to {classes - 1})"
                )
        dataset.num_classes, dataset.classes = listed.classes or 1 + most, listed.names
        return dataset
    if like is not None and like.reader.class_to_idx:
        _number_like(dataset, like, split.place, labels)
    return dataset


def _open_images(split: _Split, labels: bool) -> ReadableImages:
    folder, left_out = split.place, LeftOut()
    paths = list_images(folder, left_out)
    warn_left_out(folder, left_out)
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
    if not outside and (inside := len({*map(os.path.dirname, paths)})) > len(numbers):
        warn(
            "data: %s: images are in %d folders, but the classes are the %d at the top",
            *(writable(folder), inside, len(numbers)),
        )
    reader = FileReader(str(folder), samples, numbers, empty)
    return ReadableImages(reader, labeled=not outside)


def _open_tars(split: _Split, labels: bool) -> ReadableImages:
    reader = TarImages(split.tars, split.form)
    if not len(reader):
        some = ", ".join(path.name for path in split.tars[:3])
        raise ValueError(f"data: {split.place} has no images in its archives ({some})")
    if split.listed.samples not in (None, len(reader)):
        warn(
            "data: %s: the shards hold %d images, but their list states %d",
            *(writable(split.place), len(reader), split.listed.samples),
        )
    without = (reader.targets == NO_LABEL).nonzero()[0]
    if len(without) and labels:
        raise ValueError(
            f"data: {len(without)} images have no label, such as "
            f"{reader.filename(without[0])}; a recipe with labels=false needs none"
        )
    return ReadableImages(reader, labeled=len(without) == 0)


def refuse_empty_classes(dataset: ReadableImages, place: Path) -> None:
    """Raise if a labeled training split has class folders without images, as torchvision does."""
    if dataset.labeled and (empty := dataset.reader.empty):
        more = f" and {len(empty) - 3} more" if len(empty) > 3 else ""
        raise ValueError(
            f"data: {place} has class folders without images: {', '.join(empty[:3])}{more}; remove "
            f"them, or hide them (.name)"
        )


def _number_like(dataset: ReadableImages, like: ReadableImages, place: Path, labels: bool) -> None:
    """Give a validation split the class numbers of the training split, by name."""
    reader, training = dataset.reader, like.reader.class_to_idx
    if without := [name for name in training if name not in reader.class_to_idx]:
        warn(
            "data: %s has no images of %d of the %d training classes: %s",
            *(writable(place), len(without), len(training)),
            ", ".join(map(printable, without[:3])),
        )
    name, *others = reader.class_to_idx
    if not others and name not in training:
        dataset.labeled = labels
        if not labels:
            return
        lists = sorted(path.name for path in place.glob("*.*") if path.suffix in LABEL_FILES)
        beside = f" (and labels in {lists[0]}?)" if lists else ""
        raise ValueError(
            f"data: {place} has all images in one folder, {name!r}{beside}, which is no class of "
            f"the training set: move each image to a folder named as its class is in training"
        )
    numbers = _numbers_by_name(class_names(dataset), class_names(like), f"evaluation set {place}")
    reader.renumber(numbers, training)
