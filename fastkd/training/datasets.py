"""From what a user calls data to data sets: folders, archives, named sets, pairs of the user's own.

Knows where samples lie and what they look like; neither transforms nor batches.
"""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from timm.data import create_dataset
from torch import Tensor
from torch.utils.data import IterableDataset

from fastkd.training.folders import SHARD_LISTS, SPLITS, open_folder, open_tar
from fastkd.training.seeding import preserved_rng
from fastkd.training.sources import ReadableImages, StreamSource
from fastkd.training.tars import UNLABELLED

PROBED = 8  # samples that are tried, to see what a data set yields
# Of timm's data set names: the package that reads each, and how pip calls it.
SCHEMES = {
    "hfds": ("datasets", "datasets"),
    "hfids": ("datasets", "datasets"),
    "wds": ("webdataset", "webdataset"),
    "tfds": ("tensorflow_datasets", "tensorflow tensorflow-datasets"),
    "torch": ("torchvision", "torchvision"),
}
STREAMED = ("wds", "hfids", "tfds")  # wds: at an address; on this machine it is read by number
Data = str | Path | Sequence[Any]


@dataclass(frozen=True)
class DataPair:
    """A training and an evaluation set of (image, label).

    Attributes:
        train: map-style, or a `StreamSource`; None where only evaluation is asked for.
        val: the evaluation set, likewise.
        num_classes: None where the data do not say.
        yields_tensors: whether images are float tensors [C, H, W] instead of PIL images.
        image_size: (C, H, W) of the first image that can be read, where it is a tensor.
        labelled_val: whether the evaluation set has labels.
        streams: whether the sets are `StreamSource`s.
    """

    train: Any
    val: Any
    num_classes: int | None
    yields_tensors: bool
    image_size: tuple[int, int, int] | None
    labelled_val: bool = True
    streams: bool = False


def open_data(
    data: Data, root: str | None = None, *, need_train: bool = True, labels: bool = True
) -> DataPair:
    """Open a folder, archives, a timm data set name, or a pair of data sets.

    Args:
        data: one of

            - a folder with ``train`` and ``val`` (or ``validation``): folders of images, one in
              each class's folder; folders of tars; or ``train.tar`` and ``val.tar``;
            - a folder of WebDataset shards: with an ``_info.json`` (as ``fastkd shard`` and timm
              write), or named by their split (``train-0000.tar``, ``val-0000.tar``);
            - ``wds/FOLDER`` of the same, or streamed: ``wds/https://...``, ``wds/pipe:cat ...``;
            - a timm data set name with its scheme (``hfds/...``, ``torch/cifar100``; ``hfids/...``
              and ``tfds/...`` are streamed), which is evaluated on its split validation, val or
              test, the first of these that it has;
            - (train, val) map-style data sets yielding (PIL image or float tensor, label).
        root: where a named data set keeps its files.
        need_train: False opens the evaluation set alone; then ``data`` may also be one data set,
            one tar, or a folder that holds the classes' folders itself.
        labels: False: images may lie outside classes' folders, and samples may have no ``.cls``
            and no column of labels; where there are none, labels are -1. (What streams always has
            labels, for timm's readers want them.)

    Returns:
        Both sets and what they say of themselves. A map-style set that is not the user's own has
        ``filename(index)``, and raises an OSError with that name for a sample it cannot read.

    Raises:
        ValueError: nothing there, no labels where they are needed, or samples of another form.
        OSError: an archive that is torn, or no tar.
        ImportError: the package that reads the data is missing.
    """
    if isinstance(data, str | Path):
        train, val = _open_named(str(data), root, need_train, labels)
    else:
        train, val = _open_given(data, need_train)
    for dataset in (train, val):
        _check_usable(dataset)
    first = val if train is None else train
    # What reads image files is known to yield PIL images, even where the first file is broken.
    known = isinstance(first, ReadableImages | StreamSource)
    probe, label = (None, None) if known else _probe(first)
    if not known and labels and label is None:
        raise ValueError(
            "data: samples have no label; a student can be trained on its teacher alone, with "
            "labels=False"
        )
    return DataPair(
        train=train,
        val=val,
        num_classes=_num_classes(first),
        yields_tensors=isinstance(probe, Tensor),
        image_size=tuple(probe.shape) if isinstance(probe, Tensor) else None,  # type: ignore[arg-type]
        labelled_val=_is_labelled(val, labels),
        streams=isinstance(first, StreamSource),
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
        raise ValueError(f"data: no folder {data!r}; names of data sets begin with {names}")
    folder = _local_shards(rest, root) if scheme == "wds" else None
    if folder is not None:
        return open_folder(folder, need_train, labels)
    _require_package(scheme, data)
    name = f"{scheme}/{rest}"

    def opens(part: str) -> Any:
        if scheme in STREAMED:
            return _open_stream(name, root, part)
        return _open_listed(name, root, part, labels)

    return (opens("train") if need_train else None), opens("validation")


def _require_package(scheme: str, data: str) -> None:
    module, package = SCHEMES[scheme]
    if importlib.util.find_spec(module) is None:
        raise ImportError(f"data: {data!r} is read by {module}: pip install {package}")


def _local_shards(name: str, root: str | None) -> Path | None:
    """The folder that ``wds/NAME`` means; None where it is an address."""
    if any("://" in place or place.startswith("pipe:") for place in (name, root or "")):
        return None
    folders = [Path(root) / name, Path(root)] if root else [Path(name)]
    found = next((folder for folder in folders if folder.is_dir()), None)
    if found is None:
        raise ValueError(f"data: no folder {str(folders[0])!r} of shards")
    return found


def _open_listed(name: str, root: str | None, part: str, labels: bool) -> Any:
    """A set of a hub or of torchvision, whose samples are there by number."""
    if name.startswith("torch/"):
        return create_dataset(name, root=root, split=part)
    split, reader = _first_split(name, part, lambda split: create_dataset(name, root, split).reader)
    reader = _reader_of_images(reader, name, root, split)
    if reader.label_key in reader.dataset.features:
        return ReadableImages(reader, f"{name}/{split}")
    if labels:
        raise ValueError(
            f"data: {name} has no column {reader.label_key!r}, but {list(reader.dataset.features)}"
        )
    reader.label_key = reader.image_key  # any column that is there; its values are not used
    return ReadableImages(reader, f"{name}/{split}", labelled=False)


def _reader_of_images(reader: Any, name: str, root: str | None, split: str) -> Any:
    """The reader of a hub's set; another one, where images are in a column that it did not take."""
    # A column that is not there, timm has made of nothing.
    if reader.dataset.data.column(reader.image_key).null_count < len(reader):
        return reader
    kinds = {column: type(kind).__name__ for column, kind in reader.dataset.features.items()}
    del kinds[reader.image_key]
    column = next((column for column, kind in kinds.items() if kind == "Image"), None)
    if column is None:
        raise ValueError(f"data: {name} has no column of images, but {list(kinds)}")
    return create_dataset(name, root, split, input_key=column).reader


def _open_stream(name: str, root: str | None, part: str) -> StreamSource:
    if name.startswith("wds/") and root is None:
        root = name.removeprefix("wds/")

    def opens(split: str) -> Any:
        # Hugging Face's may not say how long it is, which timm's reader would not have.
        length = 1 if name.startswith("hfids/") else None
        reader = StreamSource(name, root, split).reader(training=False, num_samples=length)
        if name.startswith("hfids/"):
            reader.builder.as_streaming_dataset(split=split)  # which timm's reader does later
        return reader

    split, reader = _first_split(name, part, opens)
    stated = getattr(reader, "split_info", None) or _hub_splits(reader).get(split)
    samples = getattr(stated, "num_samples", None) or getattr(stated, "num_examples", None)
    classes = reader.class_to_idx or getattr(reader, "info", {}).get("classes")
    return StreamSource(name, root, split, samples, len(classes) if classes else None)


def _hub_splits(reader: Any) -> dict[str, Any]:
    builder = getattr(reader, "builder", None)
    return dict(getattr(getattr(builder, "info", None), "splits", None) or {})


def _first_split(name: str, part: str, opens: Callable[[str], Any]) -> tuple[str, Any]:
    """The first of a part's names that a set has: (name, what was opened)."""
    errors = []
    for split in SPLITS[part]:
        try:
            return split, opens(split)
        except (RuntimeError, ValueError, KeyError) as error:
            errors.append(error)
    listed = f" (is there an {' or '.join(SHARD_LISTS)}?)" if name.startswith("wds/") else ""
    raise ValueError(
        f"data: {name} has no split {' or '.join(SPLITS[part])}{listed}: {errors[0]}"
    ) from errors[0]


def _open_given(data: Any, need_train: bool) -> tuple[Any, Any]:
    if isinstance(data, tuple | list) and len(data) == 2:
        return (data[0] if need_train else None), data[1]
    if not need_train and hasattr(data, "__getitem__") and hasattr(data, "__len__"):
        return None, data
    raise ValueError(
        f"data: expected a folder, a timm data set name or (train, val) data sets, got "
        f"{type(data).__name__}"
    )


def _check_usable(dataset: Any) -> None:
    if dataset is None or isinstance(dataset, StreamSource):
        return
    if isinstance(dataset, IterableDataset):
        raise ValueError(
            f"data: {type(dataset).__name__} streams its samples; exact resume and sharding need a "
            f"data set with __getitem__ and __len__"
        )
    if len(dataset) == 0:
        raise ValueError(f"data: {type(dataset).__name__} is empty")


def _probe(dataset: Any) -> tuple[Any, Any]:
    """The first sample that can be read, without leaving a trace in the random generators."""
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
    """One broken file says nothing of the data set; a few in a row, that it is not there."""
    for index in range(min(len(dataset), PROBED) - 1):
        with contextlib.suppress(OSError):
            return dataset[index]
    return dataset[min(len(dataset), PROBED) - 1]


def _is_labelled(dataset: Any, labels: bool) -> bool:
    if isinstance(dataset, ReadableImages):
        return dataset.labelled
    if labels or isinstance(dataset, StreamSource):
        return True  # whoever reads a label that is none will say so
    label = _probe(dataset)[1]
    return label is not None and int(label) != UNLABELLED


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
