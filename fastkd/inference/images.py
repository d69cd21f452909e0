"""Image files as batches; files that cannot be read are reported and left out."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError
from timm.data.readers.img_extensions import get_img_extensions
from timm.utils.misc import natural_key
from torch import nn
from torch.utils.data import DataLoader, Dataset

from fastkd.data.readers import PILLOW_ERRORS, open_image
from fastkd.data.samples import (
    Batch,
    Collate,
    Fault,
    Sample,
    SampleTransform,
    eval_sample_transform,
    loader_options,
)
from fastkd.inference.preprocessing import Preprocessing, input_spec
from fastkd.utils.distributed import ALONE, World
from fastkd.utils.io import writable

Images = str | os.PathLike[str] | Iterable[str | os.PathLike[str]]

# Formats that Pillow recognises, but reads with the help of other programs only.
_RECOGNISED_ONLY = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}


def find_images(images: Images) -> tuple[list[Path], list[Fault]]:
    """The files that a user names, one by one or by folders."""
    files: list[Path] = []
    faults = []
    for place in _places(images):
        found = _below(place) if place.is_dir() else [place]
        files += found
        if not found:
            faults.append(Fault(-1, writable(place), "a folder without images"))
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


def _below(folder: Path) -> list[Path]:
    endings = _endings()
    found = []
    for place, folders, names in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [
            os.path.join(place, name)
            for name in names
            if name.lower().endswith(endings) and not name.startswith(".")
        ]
    return [Path(path) for path in sorted(found, key=natural_key)]


def _endings() -> tuple[str, ...]:
    """Of the formats that Pillow reads, and what a user has added to timm's list."""
    registered = Image.registered_extensions()  # which loads all of Pillow's plugins
    opened = {*Image.OPEN, "MPO"} - _RECOGNISED_ONLY  # MPO: opened as a JPEG
    return (*get_img_extensions(), *(end for end, name in registered.items() if name in opened))


class ImageFiles(Dataset[Any]):
    """Image files as samples, or what is the matter with those that cannot be read.

    Args:
        paths: of the files.
        transform: what becomes of an image.
    """

    def __init__(self, paths: list[Path], transform: SampleTransform) -> None:
        self.paths = paths
        self.transform = transform

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Sample | Fault:
        """The sample, without a label; a fault where the file cannot be read."""
        path = self.paths[index]
        try:
            image = self._read(path)
        except PILLOW_ERRORS as error:
            return Fault(index, writable(path), _reason(error))
        return self.transform(image, sample=index)

    def _read(self, path: Path) -> Any:
        with warnings.catch_warnings(), open(path, "rb") as file:
            # Large pictures and odd palettes: Pillow reads them, and whoever named them meant them.
            warnings.filterwarnings("ignore", module=r"PIL\.")
            return self.transform.decode(open_image(file))


def _reason(error: Exception) -> str:
    """What a person calls it; our own errors are chained to Pillow's and the system's."""
    cause = error.__cause__ or error
    if isinstance(cause, UnidentifiedImageError):
        return "no image that Pillow can read"
    return getattr(cause, "strerror", None) or str(cause) or type(cause).__name__


def _stack(parts: list[Sample | Fault]) -> tuple[Batch | None, list[Fault]]:
    """What is stacked where some of it could not be read."""
    samples = [part for part in parts if isinstance(part, Sample)]
    faults = [part for part in parts if isinstance(part, Fault)]
    return (Collate()(samples) if samples else None), faults


def image_loader(
    files: list[Path],
    network: nn.Module,
    preprocessing: Preprocessing,
    *,
    batch_size: int,
    workers: int,
    peers: World = ALONE,
) -> DataLoader[Any]:
    """Batches as `evaluate` feeds them to a model, and what could not be read."""
    recipe = preprocessing.recipe
    spec = input_spec(network, recipe, None, use_test_size=preprocessing.use_test_size)
    share = range(peers.rank, len(files), peers.size)
    return DataLoader(
        ImageFiles(files, eval_sample_transform(recipe, spec, None)),
        batch_size,
        sampler=share,
        collate_fn=_stack,
        **loader_options(workers if len(share) > batch_size else 0, peers.device),
    )
