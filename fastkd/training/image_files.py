"""Image files as batches, with those that cannot be read told and left out.

Knows files and folders; neither models nor labels. What becomes of an image is what becomes of it
in an evaluation.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from PIL import UnidentifiedImageError
from timm.data.readers.img_extensions import get_img_extensions
from timm.utils.misc import natural_key
from torch import nn
from torch.utils.data import DataLoader, Dataset

from fastkd.training.batch import Batch, Fault
from fastkd.training.data import SampleDataset, eval_samples
from fastkd.training.datasets import DataPair
from fastkd.training.samplers import SampleKey
from fastkd.training.samples import Collate, Sample, collate
from fastkd.training.setup import Preprocessing
from fastkd.training.sources import ReadableImages
from fastkd.training.tars import UNLABELLED
from fastkd.training.workers import loader_options

Images = str | Path | Sequence[str | Path]


def find_images(images: Images) -> tuple[list[Path], list[Fault]]:
    """The files that a user names, one by one or by folders.

    Args:
        images: files and folders; of a folder, all images in it and below, but hidden ones.

    Returns:
        The files, whether they can be read or not; and the folders that hold none.

    Raises:
        ValueError: nothing was named.
    """
    files: list[Path] = []
    faults = []
    for place in [images] if isinstance(images, str | Path) else images:
        found = _below(Path(place)) if Path(place).is_dir() else [Path(place)]
        files += found
        if not found:
            faults.append(Fault(-1, str(place), "a folder without images"))
    if not files and not faults:
        raise ValueError("predict: no images were given")
    return files, faults


def _below(folder: Path) -> list[Path]:
    endings = tuple(get_img_extensions())
    found = []
    for place, folders, names in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [
            os.path.join(place, name)
            for name in names
            if name.lower().endswith(endings) and not name.startswith(".")
        ]
    return [Path(path) for path in sorted(found, key=natural_key)]


class _Files:
    """Image files as one of timm's readers gives them."""

    def __init__(self, paths: list[Path]) -> None:
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[BinaryIO, int]:
        return open(self.paths[index], "rb"), UNLABELLED

    def filename(self, index: int, basename: bool = False, absolute: bool = False) -> str:
        del basename, absolute
        return str(self.paths[index])


class _Tolerant(Dataset[Any]):
    """Samples, and what is the matter with those that cannot be read."""

    def __init__(self, samples: SampleDataset) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Sample | Fault:
        try:
            return self.samples.__getitems__([SampleKey(0, index, 0)])[0]
        except OSError as error:
            return Fault(index, self.samples.name(index), _reason(error))


def _reason(error: OSError) -> str:
    """What a person calls it; our own errors are chained to Pillow's and the system's."""
    cause = error.__cause__ or error
    if isinstance(cause, UnidentifiedImageError):
        return "no image that Pillow can read"
    return getattr(cause, "strerror", None) or str(cause) or type(cause).__name__


@dataclass(frozen=True)
class _Stack:
    """What is stacked where some of it could not be read."""

    stack: Collate

    def __call__(self, parts: list[Sample | Fault]) -> tuple[Batch | None, list[Fault]]:
        samples = [part for part in parts if isinstance(part, Sample)]
        faults = [part for part in parts if isinstance(part, Fault)]
        return (self.stack(samples) if samples else None), faults


def image_loader(
    files: list[Path],
    network: nn.Module,
    preprocessing: Preprocessing,
    *,
    batch_size: int,
    workers: int,
    device: torch.device,
) -> DataLoader[Any]:
    """Batches as `evaluate` feeds them to a model, and what could not be read.

    Args:
        files: any.
        network: which is asked what it takes in.
        preprocessing: how it sees its images.
        batch_size: files per batch.
        workers: loader processes, where there is more than one batch.
        device: pinned memory is used for an accelerator.

    Returns:
        A loader of (`Batch` or None, faults); both count ``files`` from 0.

    Raises:
        ValueError: the model takes no images of that size or number of channels.
    """
    readable = ReadableImages(_Files(files), labelled=False)
    data = DataPair(None, readable, None, False, None, labelled_val=False)
    spec = preprocessing.input_spec(network, data)
    return DataLoader(
        _Tolerant(eval_samples(data, preprocessing.recipe, spec)),
        batch_size,
        collate_fn=_Stack(collate(data, spec)),
        **loader_options(workers if len(files) > batch_size else 0, device),
    )
