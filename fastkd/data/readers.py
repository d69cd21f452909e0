"""The two forms that data sets read by timm's readers have here: by number, and from the beginning.

Knows readers; neither where data lie nor what images are for.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from PIL import Image
from timm.data import create_dataset
from torch.utils.data import Dataset, IterableDataset

from fastkd.data.tars import UNLABELLED

# What Pillow raises over files that it cannot read, or will not.
PILLOW_ERRORS = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)
# Greyscale of more than 8 bits, all of which Pillow's conversion cuts off above 255.
DEEP_MODES = ("I", "F", "I;16", "I;16L", "I;16B", "I;16N")


def is_missing(label: Any) -> bool:
    """Whether a label says that there is none: None, or -1 as hubs write it.

    Args:
        label: of a sample.
    """
    return label is None or (getattr(label, "ndim", 0) == 0 and bool(label == UNLABELLED))


def refuse_deep(image: Image.Image) -> None:
    """Refuse greyscale of more than 8 bits: nothing in such a file says which value is white.

    Args:
        image: of any mode.

    Raises:
        OSError: it is of such a mode.
    """
    if image.mode in DEEP_MODES:
        raise OSError(
            f"greyscale of more than 8 bits (mode {image.mode}), which has no fixed white: "
            "convert it to 8 bits"
        )


class ReadableImages(Dataset[tuple[Any, Any]]):
    """The images of a timm reader; one that cannot be read is an error.

    timm's own data set takes the next image in its place, with that one's label, and a warning: an
    accuracy would be counted on other images, and a batch would not be what its seed says.

    Args:
        reader: timm's or like it: gives (binary file, label) by index, and file names.
        name: of the data set, for samples that have no file.
        labelled: whether the reader's labels are any; without, all are -1.
    """

    def __init__(self, reader: Any, name: str = "data", labelled: bool = True) -> None:
        self.reader = reader
        self.name = name
        self.labelled = labelled
        self.num_classes: int | None = None  # where it is not what the reader's classes are

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
        # AssertionError: timm's, for a row without an image.
        except (*PILLOW_ERRORS, AssertionError) as error:
            name = self.filename(index)
            raise OSError(f"data: cannot read {name} (sample {index}): {error}") from error
        return image, label if self.labelled and label is not None else UNLABELLED

    def filename(self, index: int) -> str:
        """Whole path of a sample's file, ``ARCHIVE.tar:MEMBER``, or ``NAME[INDEX]``.

        Args:
            index: of the sample.
        """
        return self.reader.filename(index, absolute=True) or f"{self.name}[{index}]"


@dataclass(frozen=True)
class StreamSource(IterableDataset[tuple[Any, Any]]):
    """A data set that is read from its beginning only, by one of timm's streaming readers.

    Iterating gives every (PIL image, label) once, in order.

    Attributes:
        name: timm's, with its scheme.
        root: its folder or address; None where the name says all.
        split: as the data set calls it.
        num_samples: as the data set says; None where it does not.
        num_classes: likewise.
        image_column: of a hub's set, where it is not the one that timm's reader takes.
    """

    name: str
    root: str | None
    split: str
    num_samples: int | None = None
    num_classes: int | None = None
    image_column: str | None = None

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
        """Whether its reader goes on where it cannot read, instead of raising."""
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
        """Open timm's reader.

        Args:
            training: shuffled and without end, or in order and once.
            num_samples: an epoch's; None takes what the data set says.
            **options: of the reader: ``batch_size``, ``seed``.

        Returns:
            An object whose iteration gives (PIL image, label).
        """
        if not self.name.startswith("tfds/"):  # always as long as the data set says
            options["num_samples"] = num_samples
        if self.image_column is not None:
            options["input_key"] = self.image_column
        # wds: the rest of the name is no part of where timm's reader looks.
        name = "wds/" if self.name.startswith("wds/") else self.name
        return create_dataset(
            name, root=self.root, split=self.split, is_training=training, **options
        ).reader
