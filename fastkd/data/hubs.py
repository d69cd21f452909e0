"""Data sets that others keep, by timm's names for them: hubs, torchvision, and whatever streams.

Knows timm's readers and what can be asked of them before a sample is read; neither folders nor
what images are for.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

from PIL import Image
from timm.data import create_dataset

from fastkd.data.folders import SHARD_LISTS, SPLITS
from fastkd.data.readers import ReadableImages, StreamSource, is_missing

# Of timm's data set names: the package that reads each, and how pip calls it.
SCHEMES = {
    "hfds": ("datasets", "datasets"),
    "hfids": ("datasets", "datasets"),
    "wds": ("webdataset", "webdataset"),
    "tfds": ("tensorflow_datasets", "tensorflow tensorflow-datasets"),
    "torch": ("torchvision", "torchvision"),
}
STREAMED = ("wds", "hfids", "tfds")  # wds: at an address; on this machine it is read by number


def open_hub(name: str, root: str | None, part: str, labels: bool) -> Any:
    """Open one part of a data set.

    Args:
        name: timm's, whose scheme is one of `SCHEMES`.
        root: where it keeps its files, or its address.
        part: ``"train"`` or ``"validation"``.
        labels: whether samples must have them.

    Returns:
        A map-style set, or a `StreamSource`.

    Raises:
        ValueError: it has no such part, no images, or no labels where they are needed.
        ImportError: the package that reads it is missing.
    """
    scheme = name.partition("/")[0]
    module, package = SCHEMES[scheme]
    if importlib.util.find_spec(module) is None:
        raise ImportError(f"data: {name!r} is read by {module}: pip install {package}")
    if scheme == "torch":
        return create_dataset(name, root=root, split=part)
    if scheme == "hfds":
        return _open_listed(name, root, part, labels)
    if scheme == "hfids":
        return _open_hub_stream(name, root, part)
    return _open_stream(name, root, part)


def _open_listed(name: str, root: str | None, part: str, labels: bool) -> ReadableImages:
    """A set of Hugging Face's hub, whose samples are there by number."""
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
    reader.label_key = reader.image_key  # any column that is there; its values are not used
    return ReadableImages(reader, f"{name}/{split}", labelled=False)


def _reader_of_images(reader: Any, name: str, root: str | None, split: str) -> Any:
    """The reader of a hub's set; another one, where images are in a column that it did not take."""
    # A column that is not there, timm has made of nothing.
    if reader.dataset.data.column(reader.image_key).null_count < len(reader):
        return reader
    kinds = {column: type(kind).__name__ for column, kind in reader.dataset.features.items()}
    del kinds[reader.image_key]
    return create_dataset(name, root, split, input_key=_image_column(name, kinds)).reader


def _open_hub_stream(name: str, root: str | None, part: str) -> StreamSource:
    """A set of Hugging Face's hub, read from its beginning."""

    def opens(split: str) -> Any:
        # It may not say how long it is, which timm's reader would not have.
        reader = StreamSource(name, root, split).reader(training=False, num_samples=1)
        # What timm's reader does later, and where a split that is not there is found.
        return reader, reader.builder.as_streaming_dataset(split=split)

    split, (reader, stream) = _first_split(name, part, opens)
    kinds = _columns(stream)
    if reader.target_key not in kinds:
        raise ValueError(
            f"data: {name} has no column {reader.target_key!r}, but {list(kinds)}; what streams "
            f"must have labels"
        )
    image = None if kinds.get(reader.input_key) == "Image" else _image_column(name, kinds)
    stated = (reader.builder.info.splits or {}).get(split)
    classes = len(reader.class_to_idx) or None
    return StreamSource(name, root, split, getattr(stated, "num_examples", None), classes, image)


def _columns(stream: Any) -> dict[str, str]:
    """Kinds of a stream's columns by name; of its first row, where it does not say them."""
    if stream.features is not None:
        return {column: type(kind).__name__ for column, kind in stream.features.items()}
    first: dict[str, Any] = next(iter(stream), {})
    return {
        column: "Image" if isinstance(value, Image.Image) else type(value).__name__
        for column, value in first.items()
    }


def _image_column(name: str, kinds: dict[str, str]) -> str:
    column = next((column for column, kind in kinds.items() if kind == "Image"), None)
    if column is None:
        raise ValueError(f"data: {name} has no column of images, but {list(kinds)}")
    return column


def _open_stream(name: str, root: str | None, part: str) -> StreamSource:
    """WebDataset shards at an address, or a set of TensorFlow's."""
    if name.startswith("wds/") and root is None:
        root = name.removeprefix("wds/")
    split, reader = _first_split(
        name, part, lambda split: StreamSource(name, root, split).reader(training=False)
    )
    stated = reader.split_info
    samples = getattr(stated, "num_samples", None) or getattr(stated, "num_examples", None)
    classes = reader.class_to_idx or getattr(reader, "info", {}).get("classes")
    return StreamSource(name, root, split, samples, len(classes) if classes else None)


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
