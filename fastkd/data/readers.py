"""Datasets of images on top of timm's readers: by index, or streamed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO, NamedTuple

from PIL import Image
from timm.data.readers.reader_image_folder import ReaderImageFolder
from torch.utils.data import Dataset

from fastkd.data.classes import UNLABELLED, LabelError, class_number
from fastkd.data.images import open_file, open_image, reason_of
from fastkd.utils.io import writable

NO_SAMPLE = -1  # the index of what a stream skips


class FileReader(ReaderImageFolder):
    """timm's reader of image folders, for (path, class number) that are listed already."""

    def __init__(
        self,
        root: str,
        samples: Sequence[tuple[str, Any]],
        class_to_idx: dict[str, int],
        empty: Sequence[str] = (),
    ) -> None:
        self.root = root
        self.samples = samples
        self.class_to_idx = class_to_idx
        self.empty = empty  # names of classes without images, which have no number

    def __getitem__(self, index: int) -> tuple[BinaryIO, Any]:
        path, label = self.samples[index]
        return open_file(path), label


class ReadableImages(Dataset[tuple[Any, Any]]):
    """The images of a timm reader; an image that cannot be read raises an OSError naming it.

    timm's own dataset takes the next image in its place, with that one's label, and a warning: an
    accuracy would be counted on other images, and a batch would not be what its seed says.
    """

    def __init__(self, reader: Any, name: str = "data", labelled: bool = True) -> None:
        self.reader = reader  # gives (binary file, label) by index, and file names
        self.name = name  # for samples that have no file
        self.labelled = labelled
        self.num_classes: int | None = None  # where it differs from the reader's class_to_idx
        self.classes: Sequence[str] = ()  # names by label, where the reader has no class_to_idx

    def __len__(self) -> int:
        return len(self.reader)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        try:
            file, label, *_ = self.reader[index]
            with file:
                image = open_image(file)
                image.load()
        except Exception as error:  # what Pillow, its plugins and readers raise has no common base
            name = writable(self.filename(index))
            reason = reason_of(error)
            raise OSError(f"data: cannot read {name} (sample {index}): {reason}") from error
        return image, label if self.labelled and label is not None else UNLABELLED

    def filename(self, index: int) -> str:
        """Return a sample's absolute path, ``ARCHIVE.tar:MEMBER``, or ``NAME[INDEX]``."""
        return self.reader.filename(index, absolute=True) or f"{self.name}[{index}]"


class Fault(NamedTuple):
    """A sample that could not be read, and was replaced."""

    sample: int  # its index in the dataset; -1 in a stream
    name: str  # its file, or whatever else the dataset calls it
    reason: str  # the reader's error


class LostPart(Fault):
    """A part of a stream, with any number of samples, that cannot be read."""


# (name, what opens it: (image, label), or None if it is not of this split)
Item = tuple[str, Callable[[], tuple[Any, Any] | None]]


@dataclass(eq=False)
class StreamSource:
    """A split of a dataset that is read from its beginning."""

    name: str
    split: str
    num_samples: int | None  # as the dataset states it
    num_classes: int | None  # as the dataset states it
    urls: Sequence[str] = ()  # of shards, if there are any
    classes: Sequence[str] = ()  # names by label, as far as the dataset states them

    def __len__(self) -> int:
        if self.num_samples is None:
            raise ValueError(
                f"data: {self} does not say how many samples it has: set train_samples"
            )
        return self.num_samples

    def __str__(self) -> str:
        return f"{self.name} (split {self.split})"

    def __getitem__(self, index: int) -> Any:
        raise ValueError(
            f"data: {self} streams its samples, but they are needed by number here: use a folder, "
            f"tars, shards on this machine or hfds/"
        )

    def items(self, rank: int, world_size: int, seed: int | None) -> Iterator[Item | Fault]:
        """Yield a loader process's share of a pass; in order, and disjoint, without a seed."""
        raise NotImplementedError

    def read(
        self, decode: Callable[[Any], Any], rank: int, world_size: int, seed: int | None = None
    ) -> Iterator[tuple[Any, Any] | Fault]:
        """Yield a loader process's share of a pass: (decoded image, label), or a fault."""
        for item in self.items(rank, world_size, seed):
            if isinstance(item, Fault):
                yield item
                continue
            name, load = item
            try:
                sample = load()
                sample = sample and (decode(sample[0]), sample[1])
            except LabelError:
                raise
            except Exception as error:  # as in `ReadableImages`
                yield Fault(NO_SAMPLE, writable(name), reason_of(error))
            else:
                if sample:
                    yield sample[0], class_number(sample[1], writable(name))


@dataclass(frozen=True)
class DataPair:
    """A training and an evaluation set of (image, label), map-style or `StreamSource`s."""

    train: Any  # None where only evaluation is asked for
    val: Any
    num_classes: int | None  # None: unknown
    yields_tensors: bool  # float tensors [C, H, W] instead of PIL images
    image_size: tuple[int, int, int] | None  # (C, H, W) of the first image, if it is a tensor
    labelled_val: bool = True
    streams: bool = False
    numbers: Mapping[int, int] | None = None  # evaluation labels -> the model's; None: the same


def image_column(name: str, features: Mapping[str, Any]) -> str:
    """Return the column ``image`` of a hub's dataset, or else its first one of images."""
    columns = [column for column, kind in features.items() if type(kind).__name__ == "Image"]
    if not columns:
        raise ValueError(f"data: {name} has no column of images, but {list(features)}")
    return "image" if "image" in columns else columns[0]
