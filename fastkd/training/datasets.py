"""From what a user calls data to data sets: folders, archives, named sets, pairs of the user's own.

Knows where samples lie and what they look like; neither transforms nor batches.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from timm.data import ImageDataset, create_dataset
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

from fastkd.training.seeding import preserved_rng

VALIDATION_FOLDERS = ("val", "validation")
PROBED = 8  # samples that are tried, to see what a data set yields
Data = str | Path | Sequence[Any]


@dataclass(frozen=True)
class DataPair:
    """A training and an evaluation set, both map-style and yielding (image, label).

    Attributes:
        train: None where only evaluation is asked for.
        val: the evaluation set.
        num_classes: None where the data do not say.
        yields_tensors: whether images are float tensors [C, H, W] instead of PIL images.
        image_size: (C, H, W) of the first image that can be read, where it is a tensor.
    """

    train: Any
    val: Any
    num_classes: int | None
    yields_tensors: bool
    image_size: tuple[int, int, int] | None


def open_data(data: Data, root: str | None = None, *, need_train: bool = True) -> DataPair:
    """Open a folder, a timm data set name, or a pair of data sets.

    Args:
        data: a folder with ``train`` and ``val`` (or ``validation``) image folders, a timm data set
            name with its scheme (``"hfds/..."``, ``"torch/cifar100"``), or (train, val) map-style
            data sets yielding (PIL image or float tensor, label).
        root: where a named data set keeps its files.
        need_train: False opens the evaluation set alone; then ``data`` may also be one data set,
            or a folder that holds the classes' folders itself.

    Returns:
        Both sets and what they say of themselves.

    Raises:
        ValueError: nothing there, a streaming data set, or samples of another form.
    """
    if isinstance(data, str | Path):
        train, val = _open_named(str(data), root, need_train)
    else:
        train, val = _open_given(data, need_train)
    for dataset in (train, val):
        _check_map_style(dataset)
    first = val if train is None else train
    # What reads image files is known to yield PIL images, even where the first file is broken.
    probe = None if isinstance(first, ReadableImages) else _probe(first)
    return DataPair(
        train=train,
        val=val,
        num_classes=_num_classes(first),
        yields_tensors=isinstance(probe, Tensor),
        image_size=tuple(probe.shape) if isinstance(probe, Tensor) else None,  # type: ignore[arg-type]
    )


def _open_named(data: str, root: str | None, need_train: bool) -> tuple[Any, Any]:
    folder = Path(data)
    if folder.is_dir():
        return _open_folder(folder, need_train)
    if "/" not in data or folder.is_absolute() or data.startswith("."):
        raise ValueError(f"data: no folder {data!r}, and a timm data set name has a scheme: hfds/x")
    train = _opened(data, root=root, split="train") if need_train else None
    return train, _opened(data, root=root, split="validation")


def _open_folder(folder: Path, need_train: bool) -> tuple[Any, Any]:
    val_folder = next((folder / n for n in VALIDATION_FOLDERS if (folder / n).is_dir()), None)
    if not need_train and not (folder / "train").is_dir():
        return None, _opened("", root=str(val_folder or folder), search_split=False)
    missing = [] if (folder / "train").is_dir() else ["train"]
    if val_folder is None:
        missing.append("val (or validation)")
    if missing:
        raise ValueError(f"data: {folder} has no folder {' and no folder '.join(missing)}")
    train = _opened("", root=str(folder / "train"), search_split=False)
    classes = train.reader.class_to_idx
    strangers = sorted({p.name for p in val_folder.iterdir() if p.is_dir()} - set(classes))  # type: ignore[union-attr]
    if strangers:
        raise ValueError(
            f"data: {val_folder} has classes that {folder / 'train'} lacks: {strangers[:5]}"
        )
    # The training set's numbering, so that a class without validation images shifts no label.
    val = _opened("", root=str(val_folder), search_split=False, class_map=classes)
    return (train if need_train else None), val


def _opened(name: str, **options: Any) -> Any:
    """Timm's data set; one that reads image files stops at those it cannot read."""
    dataset = create_dataset(name, **options)
    return ReadableImages(dataset.reader) if type(dataset) is ImageDataset else dataset


class ReadableImages(Dataset):
    """The images of a timm reader; one that cannot be read is an error.

    timm's own data set takes the next image in its place, with that one's label, and a warning: an
    accuracy would be counted on other images, and a batch would not be what its seed says.

    Args:
        reader: timm's: gives (binary file, label) by index, and file names.
    """

    def __init__(self, reader: Any) -> None:
        self.reader = reader

    def __len__(self) -> int:
        return len(self.reader)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        """Image and label; -1 where there is none.

        Raises:
            OSError: naming the file, which is missing, cut short or no image.
        """
        try:
            file, label, *_ = self.reader[index]
            with file:
                image = Image.open(file)
                image.load()
        except (OSError, SyntaxError, ValueError) as error:  # Pillow's, for broken files
            name = self.reader.filename(index, absolute=True)
            raise OSError(f"data: cannot read {name} (sample {index}): {error}") from error
        return image, -1 if label is None else label


def _open_given(data: Any, need_train: bool) -> tuple[Any, Any]:
    if isinstance(data, tuple | list) and len(data) == 2:
        return (data[0] if need_train else None), data[1]
    if not need_train and hasattr(data, "__getitem__") and hasattr(data, "__len__"):
        return None, data
    raise ValueError(
        f"data: expected a folder, a timm data set name or (train, val) data sets, got "
        f"{type(data).__name__}"
    )


def _check_map_style(dataset: Any) -> None:
    if isinstance(dataset, IterableDataset):
        raise ValueError(
            f"data: {type(dataset).__name__} streams its samples; exact resume and sharding need a "
            f"data set with __getitem__ and __len__"
        )
    if dataset is not None and len(dataset) == 0:
        raise ValueError(f"data: {type(dataset).__name__} is empty")


def _probe(dataset: Any) -> Any:
    """The first image that can be read, without leaving a trace in the random generators."""
    with preserved_rng():
        sample = _first_readable(dataset)
    if not isinstance(sample, tuple | list) or len(sample) != 2:
        raise ValueError(f"data: samples must be (image, label), got {type(sample).__name__}")
    image = sample[0]
    if isinstance(image, Image.Image):
        return image
    if isinstance(image, Tensor) and image.is_floating_point() and image.ndim == 3:
        return image
    got = f"{image.dtype} {list(image.shape)}" if isinstance(image, Tensor) else type(image)
    raise ValueError(f"data: images must be PIL images or float tensors [C, H, W], got {got}")


def _first_readable(dataset: Any) -> Any:
    """One broken file says nothing of the data set; a few in a row, that it is not there."""
    for index in range(min(len(dataset), PROBED) - 1):
        with contextlib.suppress(OSError):
            return dataset[index]
    return dataset[min(len(dataset), PROBED) - 1]


def _num_classes(dataset: Any) -> int | None:
    reader = getattr(dataset, "reader", None)
    for classes in (getattr(reader, "class_to_idx", None), getattr(dataset, "classes", None)):
        if classes:
            return len(classes)
    return None
