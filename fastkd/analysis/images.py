"""Select the images of an analysis, and read them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor
from torch.utils.data import Subset, TensorDataset

from fastkd.config import DataConfig
from fastkd.data.datasets import DataPair, FileReader, ReadableImages, TarImages
from fastkd.data.image_files import reason_of
from fastkd.data.open_data import VALIDATION_FOLDERS, Data, open_data
from fastkd.data.transforms import InputSpec
from fastkd.inference.preprocessing import image_loader
from fastkd.utils.io import writable
from fastkd.utils.random import derive_seed, preserved_rng, seed_cpu


class ReadImages(NamedTuple):
    """Some images of a selection, in order."""

    places: list[int]  # of the images that were read
    images: Tensor | None  # [B, C, H, W], a model's input; None if none was read
    skipped: list[tuple[int, str]]  # (place, reason) of the others


@dataclass(frozen=True)
class ImageSelection:
    """Images of a dataset in random order: neighbors are unrelated."""

    data: DataPair  # its evaluation set is selected from
    indices: np.ndarray  # [images] int64, place in the selection -> index in the evaluation set
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
        names = "".join(f"{self.name(place)}\n" for place in range(len(self)))
        return {
            "images": len(self),
            "of": len(self.data.val),
            "names": hashlib.sha256(names.encode()).hexdigest(),
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
            except Exception as error:  # what datasets raise has no common base
                return reason_of(error)
        return hashlib.sha256(np.ascontiguousarray(pixels).tobytes()).hexdigest()

    def read(
        self,
        config: DataConfig,
        spec: InputSpec,
        places: range,
        **loading: Any,  # batch size, workers and device for `image_loader`
    ) -> Iterator[ReadImages]:
        """Read images as a model's input, each place in exactly one batch."""
        place_of = {int(self.indices[place]): place for place in places}
        indices = list(place_of)
        for batch in image_loader(self.data, config, spec, indices, seed=self.seed, **loading):
            skipped = [(place_of[fault.sample], fault.reason) for fault in batch.faults]
            read = [place_of[index] for index in batch.samples.tolist()]
            yield ReadImages(read, batch.images if read else None, skipped)


def open_images(
    data: Data, root: str | None = None, images: int | None = 1000, seed: int = 0
) -> ImageSelection:
    """Open data and select images, evenly from all classes if labels are known."""
    if isinstance(data, str | Path) and Path(data).is_file():
        raise ValueError(f"data: {data} is a file; give the folder that holds it")
    if isinstance(data, str | Path) and Path(data).is_dir():
        # Of a folder with train and val, only the latter is listed.
        inner = (Path(data) / name for name in VALIDATION_FOLDERS)
        data = next((path for path in inner if path.is_dir()), Path(data))
    try:
        opened = open_data(data, root, need_train=False, labels=False)
    except RuntimeError as error:  # timm's and torchvision's readers found nothing
        raise ValueError(f"data: {error}") from error
    labels = known_labels(opened.val)
    chosen = balanced_subset(labels, len(opened.val), images, seed)
    return ImageSelection(opened, chosen, seed)


def balanced_subset(
    labels: Sequence[Any] | None, count: int, images: int | None, seed: int
) -> np.ndarray:
    """Choose samples in random order; no class gives a second one before all have given one."""
    generator = np.random.default_rng(seed)
    order = generator.permutation(count)
    if labels is not None:
        classes = np.unique(np.asarray(labels), return_inverse=True)[1][order]
        # How many samples of the same class come before each; among equals, chance decides.
        by_class = np.argsort(classes, kind="stable")
        counts = np.bincount(classes)
        before = np.empty_like(by_class)
        before[by_class] = np.arange(count) - np.repeat(np.cumsum(counts) - counts, counts)
        order = order[np.lexsort((generator.permutation(count), before))]
    return generator.permutation(order[:images])


def known_labels(dataset: Any) -> list[Any] | None:
    """Return the labels of a dataset's samples; None if images would have to be decoded."""
    if isinstance(dataset, Subset):
        inner = known_labels(dataset.dataset)
        return None if inner is None else [inner[index] for index in dataset.indices]
    labels = _label_list(dataset)
    if labels is None or len(labels) != len(dataset):
        return None
    plain = [label.item() if hasattr(label, "item") else label for label in labels]
    return plain if all(isinstance(label, int | str) for label in plain) else None


def _reader(dataset: Any) -> Any:
    return dataset.reader if isinstance(dataset, ReadableImages) else None


def _label_list(dataset: Any) -> Any:
    """Find the list of labels that timm's, torchvision's and torch's datasets keep."""
    if isinstance(dataset, TensorDataset):
        return dataset.tensors[1]
    if isinstance(dataset, list | tuple):
        return [label for _, label in dataset]
    reader = _reader(dataset)
    for owner in (reader, dataset):
        for attribute in ("targets", "labels"):
            if getattr(owner, attribute, None) is not None:
                return getattr(owner, attribute)
    if hasattr(reader, "iter_targets"):  # Hugging Face's, column by column
        return list(reader.iter_targets())
    files = getattr(reader, "samples", None)
    return None if files is None else [label for _, label in files]
