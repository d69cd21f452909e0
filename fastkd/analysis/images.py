"""Select the images of an analysis, and read them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Subset, TensorDataset

from fastkd.config import DataConfig
from fastkd.data.datasets import VALIDATION_FOLDERS, Data, open_data
from fastkd.data.image_files import reason_of
from fastkd.data.readers import DataPair, FileReader, ReadableImages, TarImages
from fastkd.data.transforms import InputSpec
from fastkd.inference.images import image_loader
from fastkd.utils.io import writable
from fastkd.utils.random import derive_seed, preserved_rng, seed_cpu


class ReadImages(NamedTuple):
    """Some images of a selection, in order.

    Attributes:
        places: of the images that were read.
        images: [B, C, H, W], a model's input; None where none was read.
        skipped: (place, reason) of the others.
    """

    places: list[int]
    images: Tensor | None
    skipped: list[tuple[int, str]]


@dataclass(frozen=True)
class ImageSelection:
    """Images of a dataset, in random order: neighbors are unrelated.

    Attributes:
        data: the opened data; its evaluation set is selected from.
        indices: [images] int64, place in the selection -> index in the evaluation set.
        seed: what the selection was drawn with.
    """

    data: DataPair
    indices: np.ndarray
    seed: int

    def __len__(self) -> int:
        return len(self.indices)

    def name(self, place: int) -> str:
        """Return an image's path in its folder or tar, else its number."""
        index = int(self.indices[place])
        reader = _reader(self.data.val)
        if isinstance(reader, FileReader | TarImages):
            return writable(reader.filename(index))
        if hasattr(self.data.val, "samples"):  # torchvision's folders
            return writable(str(self.data.val.samples[index][0]))
        return f"sample {index}"

    @property
    def fingerprint(self) -> dict[str, Any]:
        """Plain values that differ for another selection; reads two images."""
        names = hashlib.sha256()
        for place in range(len(self)):
            names.update(f"{self.name(place)}\n".encode())
        return {
            "images": len(self),
            "of": len(self.data.val),
            "names": names.hexdigest(),
            # Other images may have the same names, or no names at all.
            "ends": [self._content(place) for place in sorted({0, len(self) - 1})],
        }

    def _content(self, place: int) -> str:
        """Hash an image as it is read, or the reason why it cannot be."""
        with preserved_rng():
            seed_cpu(derive_seed("fingerprint", self.seed, place))
            try:
                image = self.data.val[int(self.indices[place])][0]
                pixels = image.numpy() if isinstance(image, Tensor) else np.asarray(image)
            except Exception as error:  # whatever a data set raises, as where it is read
                return reason_of(error)
        return hashlib.sha256(np.ascontiguousarray(pixels).tobytes()).hexdigest()

    def read(
        self,
        config: DataConfig,
        spec: InputSpec,
        places: range,
        *,
        batch_size: int,
        workers: int,
        device: torch.device,
    ) -> Iterator[ReadImages]:
        """Read images as a model's input, each place in exactly one batch."""
        place_of = {int(self.indices[place]): place for place in places}
        loader = image_loader(
            self.data,
            config,
            spec,
            list(place_of),
            batch_size=batch_size,
            workers=workers,
            device=device,
            seed=self.seed,
        )
        for batch, faults in loader:
            skipped = [(place_of[fault.sample], fault.reason) for fault in faults]
            if batch is None:
                yield ReadImages([], None, skipped)
            else:
                read = [place_of[index] for index in batch.samples.tolist()]
                yield ReadImages(read, batch.images, skipped)


def open_images(
    data: Data, root: str | None = None, images: int | None = 1000, seed: int = 0
) -> ImageSelection:
    """Select images: as many of every class where labels are known, at random otherwise.

    No class gives a second image before all have given one. Labels are taken from lists that
    readers and data sets have; no image is decoded for its label.
    """
    if images is not None and images < 1:
        raise ValueError(f"open_images: images must be at least 1, or None for all, got {images}")
    opened = _open(data, root)
    count = len(opened.val)
    labels = known_labels(opened.val)
    return ImageSelection(opened, balanced_subset(labels, count, images, seed), seed)


def balanced_subset(
    labels: Sequence[Any] | None, count: int, images: int | None, seed: int
) -> np.ndarray:
    """Choose samples evenly from all classes, in random order."""
    generator = np.random.default_rng(seed)
    order = generator.permutation(count)
    if labels is not None:
        # Every class' first ones before any second ones; among equals, chance decides.
        rounds = _occurrence(np.unique(np.asarray(labels), return_inverse=True)[1][order])
        order = order[np.lexsort((generator.permutation(count), rounds))]
    return generator.permutation(order[:images])


def known_labels(dataset: Any) -> list[Any] | None:
    """Return the labels of a dataset's samples; None where images would have to be decoded."""
    if isinstance(dataset, Subset):
        inner = known_labels(dataset.dataset)
        return None if inner is None else [inner[index] for index in dataset.indices]
    labels = _label_list(dataset)
    if labels is None or len(labels) != len(dataset):
        return None
    plain = [label.item() if hasattr(label, "item") else label for label in labels]
    return plain if all(isinstance(label, int | str) for label in plain) else None


def _open(data: Data, root: str | None) -> DataPair:
    if isinstance(data, str | Path) and Path(data).is_file():
        raise ValueError(f"data: {data} is a file; give the folder that holds it")
    if isinstance(data, str | Path) and Path(data).is_dir():
        folder = Path(data)
        # Of a folder with train and val the latter alone is listed: no label's number matters here.
        inner = (folder / name for name in VALIDATION_FOLDERS)
        data = next((path for path in inner if path.is_dir()), folder)
    try:
        return open_data(data, root, need_train=False, labels=False)
    except RuntimeError as error:  # of timm's and torchvision's readers: nothing found
        raise ValueError(f"data: {error}") from error


def _reader(dataset: Any) -> Any:
    return dataset.reader if isinstance(dataset, ReadableImages) else None


def _label_list(dataset: Any) -> Any:
    """Find the list of labels that timm's, torchvision's and torch's datasets keep."""
    if isinstance(dataset, TensorDataset):
        return dataset.tensors[1]
    if isinstance(dataset, list | tuple):
        return [label for _, label in dataset]
    for owner in (_reader(dataset), dataset):
        for attribute in ("targets", "labels"):
            if getattr(owner, attribute, None) is not None:
                return getattr(owner, attribute)
    reader = _reader(dataset)
    if hasattr(reader, "iter_targets"):  # Hugging Face's, column by column
        return list(reader.iter_targets())
    files = getattr(reader, "samples", None)
    return None if files is None else [label for _, label in files]


def _occurrence(classes: np.ndarray) -> np.ndarray:
    """Count the samples of the same class before each: [samples] int64."""
    by_class = np.argsort(classes, kind="stable")
    counts = np.bincount(classes)
    first = np.repeat(np.cumsum(counts) - counts, counts)
    occurrence = np.empty_like(by_class)
    occurrence[by_class] = np.arange(len(classes)) - first
    return occurrence
