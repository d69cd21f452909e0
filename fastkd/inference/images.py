"""Find image files, and load images in batches that report what cannot be read."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from fastkd.config import DataConfig
from fastkd.data.batches import Batch, Collate, Fault, Sample
from fastkd.data.image_files import (
    LeftOut,
    image_endings,
    list_images,
    reason_of,
    warn_left_out,
    without_pillow_warnings,
)
from fastkd.data.loader import SampleDataset, eval_samples, loader_options
from fastkd.data.readers import DataPair, FileReader, ReadableImages
from fastkd.data.samplers import SampleKey
from fastkd.data.transforms import InputSpec
from fastkd.utils.io import writable

Images = str | os.PathLike[str] | Iterable[str | os.PathLike[str]]


def find_images(images: Images) -> tuple[list[str], list[Fault]]:
    """Find the files that a user names, one by one or by folders."""
    files: list[str] = []
    faults = []
    for place in _places(images):
        left_out = LeftOut()
        found = list_images(place, left_out) if place.is_dir() else [str(place)]
        warn_left_out(place, left_out)
        files += found
        if not found:
            reason = f"a folder without images ({', '.join(image_endings())})"
            faults.append(Fault(-1, writable(place), reason))
    if not files and not faults:
        raise ValueError("predict: no images were given")
    return files, faults


def _places(images: Images) -> list[Path]:
    if isinstance(images, str | os.PathLike):
        return [Path(images)]
    if isinstance(images, bytes) or not isinstance(images, Iterable):
        raise TypeError(f"predict: images must be a path or several, got a {type(images).__name__}")
    places = list(images)
    for place in places:
        if not isinstance(place, str | os.PathLike):
            raise TypeError(f"predict: images must be paths, got a {type(place).__name__}")
    return [Path(place) for place in places]


def open_files(files: Sequence[str]) -> DataPair:
    """Open image files as an evaluation set without labels."""
    reader = FileReader("", [(file, None) for file in files], {})
    return DataPair(
        train=None,
        val=ReadableImages(reader, labeled=False),
        num_classes=None,
        yields_tensors=False,
        image_size=None,
        labeled_val=False,
    )


class SamplesAndFaults(Dataset[Sample | Fault]):
    """The samples of an evaluation set, and faults in the place of those that cannot be read."""

    def __init__(self, samples: SampleDataset, size: tuple[int, int, int]) -> None:
        self.samples = samples
        self.size = size

    def __getitem__(self, index: int) -> Sample | Fault:
        try:
            # Pillow reads large pictures and odd palettes, and the user meant them.
            with without_pillow_warnings():
                (sample,) = self.samples.__getitems__([SampleKey(0, index, 0)])
        except Exception as error:  # what datasets raise has no common base
            return Fault(index, self.samples.name(index), reason_of(error))
        if isinstance(sample, Fault):
            return sample
        shape = tuple(sample.image.shape)
        if shape != self.size:
            reason = f"is {list(shape)}, expected {list(self.size)}"
            return Fault(index, self.samples.name(index), reason)
        return sample._replace(label=None)


def image_loader(
    data: DataPair,
    config: DataConfig,
    spec: InputSpec,
    samples: Sequence[int],
    *,
    batch_size: int,
    workers: int,
    device: torch.device,
    seed: int | None = None,
) -> DataLoader[Any]:
    """Load samples of an evaluation set, by index: (Batch, or None where none is read; faults)."""
    return DataLoader(
        SamplesAndFaults(eval_samples(data, config, spec, seed), spec.size),
        batch_size,
        sampler=samples,
        collate_fn=partial(_stack, Collate(spec if data.yields_tensors else None)),
        **loader_options(workers if len(samples) > batch_size else 0, device),
    )


def _stack(stack: Collate, parts: list[Sample | Fault]) -> tuple[Batch | None, list[Fault]]:
    samples = [part for part in parts if isinstance(part, Sample)]
    faults = [part for part in parts if isinstance(part, Fault)]
    return (stack(samples) if samples else None), faults
