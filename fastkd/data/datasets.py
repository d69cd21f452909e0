"""Open the ``data`` argument: folders, archives, timm's named datasets, or pairs of datasets."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from timm.data import create_dataset
from torch import Tensor
from torch.utils.data import IterableDataset
from torchvision.datasets.folder import default_loader

from fastkd.data.classes import LabelError, class_names, class_number, is_missing, map_classes
from fastkd.data.folders import SPLITS, open_folder, open_tar
from fastkd.data.images import load_rgb
from fastkd.data.readers import DataPair, ReadableImages, StreamSource, image_column
from fastkd.data.streaming import HubStream, ShardStream
from fastkd.utils.arguments import refuse_blank
from fastkd.utils.io import printable
from fastkd.utils.random import preserved_rng

# By the scheme of timm's dataset names: the module that reads it, and its packages for pip.
SCHEMES = {
    "hfds": ("datasets", "datasets"),
    "hfids": ("datasets", "datasets"),
    "wds": ("webdataset", "webdataset"),
    "torch": ("torchvision", "torchvision"),
}

PROBED = 8  # samples that are tried, to see what a dataset yields
Data = str | Path | Sequence[Any]


def open_data(
    data: Data, root: str | None = None, *, need_train: bool = True, labels: bool = True
) -> DataPair:
    """Open the training and the evaluation set that ``data`` means.

    Classes are the folders at the top of a split, as for torchvision's ImageFolder, in natural
    order; images are those of `fastkd.data.files.ENDINGS` in them and below. Hidden names
    (``.name``, ``__MACOSX``), files that are not regular and links to a folder that they are in are
    left out; one line counts what is. Samples of tars are listed once: an index
    (``.fastkd-*.npz``) is kept beside them if possible. Datasets opened by name or path have
    ``filename(index)``, and raise an OSError with it for a sample that they cannot read.

    Args:
        data: one of

            - a folder with ``train`` and ``val`` (or ``validation``, ``valid``): folders of images,
              one per class; tars, one per class; or ``train.tar`` and ``val.tar``, in which folders
              that all images are in do not count;
            - a folder of WebDataset shards: with an ``_info.json`` (as ``fastkd shard`` and timm
              write), or named by their split (``train-0000.tar``, ``val-0000.tar``);
            - ``wds/FOLDER`` of the same, or streamed: ``wds/https://...``, ``wds/pipe:cat ...``;
            - a timm dataset name with its scheme (``hfds/...``, ``torch/cifar100``; ``hfids/...``
              is streamed); it is evaluated on the first of its splits validation, val, valid and
              test;
            - (train, val) map-style datasets yielding (PIL image or float tensor, label).
        root: the folder of a named dataset.
        need_train: False opens the evaluation set alone; then ``data`` may also be one dataset, one
            tar, or a folder of class folders.
        labels: False allows samples without labels, which become -1: images outside class folders,
            shards without ``.cls``, hubs without a label column. Streams always need labels.

    Raises:
        ValueError: data or labels are missing, a label is out of range, samples are of another
            form, shards are unfinished, or tars lie beside images. With labels: a class folder of
            the training set has no images, it has only one class, or validation classes that it
            lacks.
        OSError: an archive is truncated, or no tar.
        ImportError: the package that reads the data is missing.
    """
    refuse_blank("open_data", data=data)
    if isinstance(data, str | Path):
        train, val = _open_named(str(data), root, need_train, labels)
    else:
        train, val = _open_given(data, need_train)
    for dataset in (train, val):
        _check_usable(dataset)
    image, labelled_val = _look(val, "evaluation", labels)
    if train is not None:
        image, _ = _look(train, "training", labels)
        if labels and _num_classes(train) == 1:
            names = getattr(getattr(train, "reader", train), "class_to_idx", None) or [0]
            shown = ", ".join(printable(str(name)) for name in names)
            raise ValueError(
                f"data: the training set has one class ({shown}), which teaches nothing; a recipe "
                f"with labels=false needs no classes"
            )
    first = val if train is None else train
    numbers, names = None, (class_names(train), class_names(val))
    if all(names) and names[0] != names[1] and labelled_val:
        known, own = ({name: label for label, name in side.items()} for side in names)
        numbers = map_classes(own, known, "the evaluation set")
    return DataPair(
        train=train,
        val=val,
        num_classes=_num_classes(first) or _num_classes(val),
        yields_tensors=isinstance(image, Tensor),
        image_size=tuple(image.shape) if isinstance(image, Tensor) else None,  # type: ignore[arg-type]
        labelled_val=labelled_val,
        streams=isinstance(first, StreamSource),
        numbers=numbers,
    )


def _open_named(data: str, root: str | None, need_train: bool, labels: bool) -> tuple[Any, Any]:
    path = Path(data)
    if path.is_dir():
        return open_folder(path, need_train, labels)
    if path.is_file() and path.suffix == ".tar":
        return open_tar(path, need_train, labels)
    scheme, _, rest = data.partition("/")
    scheme = scheme.lower()
    if path.exists():
        raise ValueError(f"data: {data!r} is neither a folder nor a tar")
    if scheme not in SCHEMES:
        names = ", ".join(f"{name}/" for name in SCHEMES)
        raise ValueError(f"data: no folder {data!r}; names of datasets begin with {names}")
    if not (rest.strip("/ ") or (root or "").strip()):
        raise ValueError(f"data: {data!r} names no dataset after {scheme}/")
    folder = _local_shards(rest, root) if scheme == "wds" else None
    if folder is not None:
        return open_folder(folder, need_train, labels)
    name = f"{scheme}/{rest}"
    try:
        train = open_hub(name, root, "train", labels) if need_train else None
        return train, open_hub(name, root, "validation", labels)
    except (ValueError, OSError, ImportError, RuntimeError, MemoryError):
        raise
    except Exception as error:  # of the package that reads it
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"data: {name} cannot be opened ({reason})") from error


def _local_shards(name: str, root: str | None) -> Path | None:
    """Find the folder of ``wds/NAME``; None where it is an address."""
    if any("://" in place or place.startswith("pipe:") for place in (name, root or "")):
        return None
    folders = [Path(root) / name, Path(root)] if root else [Path(name)]
    found = next((folder for folder in folders if folder.is_dir()), None)
    if found is None:
        raise ValueError(f"data: no folder {str(folders[0])!r} of shards")
    return found


def _open_given(data: Any, need_train: bool) -> tuple[Any, Any]:
    if isinstance(data, tuple | list) and len(data) == 2:
        return (data[0] if need_train else None), data[1]
    if not need_train and hasattr(data, "__getitem__") and hasattr(data, "__len__"):
        return None, data
    raise ValueError(
        f"data: expected a folder, a timm dataset name or (train, val) datasets, got "
        f"{type(data).__name__}"
    )


def _check_usable(dataset: Any) -> None:
    if dataset is None or isinstance(dataset, StreamSource):
        return
    if isinstance(dataset, IterableDataset):
        raise ValueError(
            f"data: {type(dataset).__name__} streams its samples; exact resume and sharding need a "
            f"dataset with __getitem__ and __len__"
        )
    if len(dataset) == 0:
        raise ValueError(f"data: {type(dataset).__name__} is empty")


def _look(dataset: Any, which: str, labels: bool) -> tuple[Any, bool]:
    """Return (image or None, whether there are labels); only a user's own set has to be tried."""
    if isinstance(dataset, ReadableImages):
        return None, dataset.labelled
    if isinstance(dataset, StreamSource):
        return None, True
    image, label = _probe(dataset)
    labelled = not is_missing(label)
    try:
        class_number(label, f"the {which} set ({type(dataset).__name__})")
    except LabelError:
        if labels:
            raise
        labelled = False
    if labels and not labelled:
        raise ValueError(
            f"data: samples of the {which} set have no label; a student can be trained on its "
            f"teacher alone, with labels=False"
        )
    return image, labelled


def _probe(dataset: Any) -> tuple[Any, Any]:
    """Return the first sample that can be read, and leave the random generators as they were."""
    with preserved_rng():
        sample = _first_readable(dataset)
    if not isinstance(sample, tuple | list) or len(sample) != 2:
        raise ValueError(f"data: samples must be (image, label), got {type(sample).__name__}")
    image, label = sample
    if isinstance(image, Image.Image):
        return image, label
    if isinstance(image, Tensor) and image.is_floating_point() and image.ndim == 3:
        return image, label
    got = f"{image.dtype} {list(image.shape)}" if isinstance(image, Tensor) else type(image)
    raise ValueError(f"data: images must be PIL images or float tensors [C, H, W], got {got}")


def _first_readable(dataset: Any) -> Any:
    # One broken file is no reason to stop; with several in a row the dataset is not there.
    for index in range(min(len(dataset), PROBED) - 1):
        with contextlib.suppress(OSError):
            return dataset[index]
    return dataset[min(len(dataset), PROBED) - 1]


def _num_classes(dataset: Any) -> int | None:
    if isinstance(dataset, ReadableImages) and not dataset.labelled:
        return None
    if getattr(dataset, "num_classes", None) is not None:
        return dataset.num_classes
    reader = getattr(dataset, "reader", None)
    for classes in (getattr(reader, "class_to_idx", None), getattr(dataset, "classes", None)):
        if classes:
            return len(classes)
    return None


def open_hub(name: str, root: str | None, part: str, labels: bool) -> Any:
    """Open the part ``"train"`` or ``"validation"`` of a dataset with a scheme of `SCHEMES`."""
    scheme = name.partition("/")[0]
    module, package = SCHEMES[scheme]
    if importlib.util.find_spec(module) is None:
        raise ImportError(f"data: {name!r} is read by {module}: pip install {package}")
    if scheme == "torch":
        dataset = create_dataset(name, root=root, split=part)
        if getattr(dataset, "loader", None) is default_loader:
            dataset.loader = load_rgb
        return dataset
    if scheme == "hfds":
        return _open_listed(name, root, part, labels)
    return (HubStream if scheme == "hfids" else ShardStream)(name, root, part)


def _open_listed(name: str, root: str | None, part: str, labels: bool) -> ReadableImages:
    """Open a set of Hugging Face's hub whose samples have indexes."""
    split, reader = _first_split(name, part, lambda split: create_dataset(name, root, split).reader)
    reader = _reader_of_images(reader, name, root, split)
    columns = list(reader.dataset.features)
    if reader.label_key in columns:
        first = reader.dataset.select_columns([reader.label_key])[0] if len(reader) else {}
        if not is_missing(first.get(reader.label_key, 0)):
            return ReadableImages(reader, f"{name}/{split}")
        reason = f"no labels in its split {split}"
    else:
        reason = f"no column {reader.label_key!r}, but {columns}"
    if labels:
        raise ValueError(f"data: {name} has {reason}; a recipe with labels=false needs none")
    reader.label_key = reader.image_key  # any column that exists; its values are not used
    return ReadableImages(reader, f"{name}/{split}", labelled=False)


def _reader_of_images(reader: Any, name: str, root: str | None, split: str) -> Any:
    """Return a hub set's reader, or one of its image column where this one took another."""
    # timm adds a column of nulls where the one it expects is missing.
    if reader.dataset.data.column(reader.image_key).null_count < len(reader):
        return reader
    columns = dict(reader.dataset.features)
    del columns[reader.image_key]
    return create_dataset(name, root, split, input_key=image_column(name, columns)).reader


def _first_split(name: str, part: str, opens: Callable[[str], Any]) -> tuple[str, Any]:
    """Open a part under the first of its names that a set has: (name, what was opened)."""
    errors = []
    for split in SPLITS[part]:
        try:
            return split, opens(split)
        except (RuntimeError, ValueError, KeyError) as error:
            errors.append(error)
    raise ValueError(
        f"data: {name} has no split {' or '.join(SPLITS[part])}: {errors[0]}"
    ) from errors[0]
