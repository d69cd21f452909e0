"""Find and open images, and datasets of them on top of timm's readers: by index, or streamed."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

from PIL import Image
from timm.data import create_dataset
from timm.data.readers.img_extensions import is_img_extension
from timm.data.readers.reader_image_folder import ReaderImageFolder
from timm.utils.misc import natural_key
from torch.utils.data import Dataset, IterableDataset

from fastkd.data.classes import UNLABELLED
from fastkd.utils.io import writable

# What Pillow raises over broken files, and over images of too many pixels to be meant.
PILLOW_ERRORS = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)
# Grayscale of more than 8 bits, all of which Pillow's conversion cuts off above 255.
DEEP_MODES = ("I", "F", "I;16", "I;16L", "I;16B", "I;16N")


def is_image(path: str) -> bool:
    """Return whether a file name has an ending of timm's list, in any case."""
    return is_img_extension(os.path.splitext(path)[1].lower())


def is_hidden(name: str) -> bool:
    """Return whether a file or folder is hidden."""
    return name.startswith(".")


def find_files(
    folder: str | os.PathLike[str], above: tuple[tuple[int, int], ...] = ()
) -> Iterator[str]:
    """Yield the files below a folder, but hidden ones.

    Links are followed, but not to a folder that they lie in (``above``: its devices and inodes).
    Raise an OSError where a folder cannot be listed.
    """
    status = os.stat(folder)
    here = status.st_dev, status.st_ino
    if here in above:
        return
    with os.scandir(folder) as entries:
        for entry in entries:
            if is_hidden(entry.name):
                continue
            link = entry.is_symlink()  # one to nothing is listed, and found unreadable later
            if os.path.isdir(entry.path) if link else entry.is_dir():
                yield from find_files(entry.path, (*above, here))
            elif link or entry.is_file():  # no pipe, which would be waited for
                yield entry.path


def list_images(folder: str | os.PathLike[str]) -> list[str]:
    """List the images below a folder in natural order."""
    found = filter(is_image, find_files(folder))
    return sorted(found, key=lambda path: (natural_key(path), path))


class FileReader(ReaderImageFolder):
    """timm's reader of image folders, for (path, class number) that are listed already."""

    def __init__(
        self, root: str, samples: Sequence[tuple[str, Any]], class_to_idx: dict[str, int]
    ) -> None:
        self.root = root
        self.samples = samples
        self.class_to_idx = class_to_idx


def open_image(source: str | os.PathLike[str] | BinaryIO | bytes) -> Image.Image:
    """Open an image from a path, an open binary file or its bytes; ``load()`` decodes it."""
    return Image.open(io.BytesIO(source) if isinstance(source, bytes) else source)


def refuse_deep(image: Image.Image) -> None:
    """Raise an OSError for grayscale of more than 8 bits: no value in such a file means white."""
    if image.mode in DEEP_MODES:
        raise OSError(
            f"greyscale of more than 8 bits (mode {image.mode}), which has no fixed white: "
            "convert it to 8 bits"
        )


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

    def __len__(self) -> int:
        return len(self.reader)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        try:
            file, label, *_ = self.reader[index]
            with file:
                image = open_image(file)
                image.load()
        # AssertionError: timm's, for a row without an image.
        except (*PILLOW_ERRORS, AssertionError) as error:
            name = writable(self.filename(index))
            raise OSError(f"data: cannot read {name} (sample {index}): {error}") from error
        return image, label if self.labelled and label is not None else UNLABELLED

    def filename(self, index: int) -> str:
        """Return a sample's absolute path, ``ARCHIVE.tar:MEMBER``, or ``NAME[INDEX]``."""
        return self.reader.filename(index, absolute=True) or f"{self.name}[{index}]"


@dataclass(frozen=True)
class StreamSource(IterableDataset[tuple[Any, Any]]):
    """A dataset that one of timm's streaming readers reads from the beginning, in order."""

    name: str  # timm's, with its scheme
    root: str | None  # folder or address; None where the name has it
    split: str
    num_samples: int | None = None  # as the dataset states it
    num_classes: int | None = None  # as the dataset states it
    image_column: str | None = None  # of a hub's set, where timm's reader would take another

    def __len__(self) -> int:
        if self.num_samples is None:
            raise ValueError(
                f"data: {self} does not say how many samples it has: set train_samples"
            )
        return self.num_samples

    def __str__(self) -> str:
        address = "" if self.root is None or self.root in self.name else f" at {self.root}"
        return f"{self.name}{address} (split {self.split})"

    @property
    def passes_over(self) -> bool:
        """Whether its reader skips samples that it cannot read, instead of raising."""
        return self.name.startswith("wds/")

    def __iter__(self) -> Iterator[tuple[Image.Image, int]]:
        # Readers want a length, though none is needed to read all there is.
        return iter(self.reader(training=False, num_samples=self.num_samples or 1))

    def __getitem__(self, index: int) -> Any:
        raise ValueError(
            f"data: {self} streams its samples, but they are needed by number here: use a folder, "
            f"tars, shards on this machine or hfds/"
        )

    def reader(self, *, training: bool, num_samples: int | None = None, **options: Any) -> Any:
        """Open timm's reader: shuffled and without end for training, else in order and once.

        ``num_samples`` is the length of an epoch (None: as stated); ``options`` are the reader's.
        """
        if not self.name.startswith("tfds/"):  # always as long as the dataset states
            options["num_samples"] = num_samples
        if self.image_column is not None:
            options["input_key"] = self.image_column
        # timm's reader of wds finds the shards by root alone.
        name = "wds/" if self.name.startswith("wds/") else self.name
        return create_dataset(
            name, root=self.root, split=self.split, is_training=training, **options
        ).reader
