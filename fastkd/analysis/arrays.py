"""Folders of saved tokens, a .npy or .npz file for each image, as a source of batches."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastkd.analysis.images import balanced_subset
from fastkd.analysis.tokens import (
    Batch,
    Layer,
    LayerChoice,
    check_batch_size,
    checked_places,
    parse_layers,
)
from fastkd.data.image_files import LeftOut, find_files, is_image, warn_left_out

SUFFIXES = (".npy", ".npz")
Shape = tuple[int, int]


class ArrayError(ValueError):
    """A file that holds no tokens; the message says what it holds instead."""


def is_array_folder(data: Any) -> bool:
    """Whether data are a folder of saved tokens; a ValueError if it holds images as well."""
    if not isinstance(data, str | Path) or not Path(data).is_dir():
        return False
    tokens = images = False
    for path in find_files(data):
        tokens |= path.lower().endswith(SUFFIXES)
        images |= is_image(path)
        if tokens and images:
            raise ValueError(
                f"data: {data} holds both images and saved tokens (.npy, .npz); give a folder of "
                f"one kind"
            )
    return tokens


def read_tokens(path: str | Path) -> list[np.ndarray]:
    """Read the layers of one saved image, float16, float32 or float64 of any byte order.

    - .npy: [N, D] is one layer; [L, N, D], [L, 1, N, D] or [L, H, W, D] are layers of one shape.
    - .npz: one array for each layer, in the order in which they were saved (``np.savez(path,
      *layers)``), with a shape each: [N, D], [1, N, D], [H, W, D] or [1, H, W, D].

    Nothing is unpickled: object arrays are refused.

    Args:
        path: a .npy or .npz file.

    Returns:
        Per layer [N, D] in the native byte order. Those of a .npy file are mapped into memory,
        read when they are used.

    Raises:
        ArrayError: it holds something else, or is cut short.
        OSError: it cannot be read.
    """
    try:
        if Path(path).suffix.lower() == ".npz":
            with np.load(path, allow_pickle=False) as saved:
                return _layers([saved[name] for name in saved.files])
        content = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ArrayError, OSError):
        raise
    except Exception as error:  # broken bytes may fail in any way
        reason = " ".join(str(error).split()) or type(error).__name__
        if "Object arrays" in reason or "Python objects" in reason:  # of .npz, of .npy
            raise ArrayError(
                "holds an object array, which is not loaded for safety; expected [N, D] or "
                "[L, N, D] of floats, or an .npz with an array for each layer"
            ) from error
        raise ArrayError(f"cannot be read as saved tokens: {reason[:160]}") from error
    if content.ndim not in (2, 3, 4):
        raise ArrayError(f"holds {list(content.shape)}, expected [N, D] or [L, N, D]")
    return _layers([content] if content.ndim == 2 else list(content))


def _layers(arrays: list[np.ndarray]) -> list[np.ndarray]:
    if not arrays:
        raise ArrayError("holds no layer, expected [N, D] or [L, N, D] with L of at least 1")
    return [_as_tokens(array) for array in arrays]


class ArraySource:
    """Tokens of a folder of .npy or .npz files, one for each image, at any depth.

    The first readable file in the order of names says how many layers there are and of which shape;
    a file with others is skipped and reported, because ranks of images with different numbers of
    tokens cannot be compared. Folders inside the folder count as classes in the selection.

    Args:
        folder: holds the files; `read_tokens` says what may be in them.
        layers: ``"all"``, ``"last"``, or some by number (negative from the end) or name
            (``"layer.3"``), of which the order is that of depth.
        images: how many files; None, or more than there are: all.
        seed: of the choice and its order.
        batch_size: images per batch.
        device: where tokens are put.

    Raises:
        ValueError: no file, none that can be read, or a layer that is not there.
    """

    weights = "saved tokens"
    architecture = ""
    parameters: int | None = None
    input_size: tuple[int, int] | None = None

    def __init__(
        self,
        folder: str | Path,
        *,
        layers: LayerChoice = "all",
        images: int | None = 1000,
        seed: int = 0,
        batch_size: int = 64,
        device: str | torch.device = "cpu",
    ) -> None:
        check_batch_size(batch_size)
        if images is not None and images < 1:
            raise ValueError(f"ArraySource: images must be at least 1, or None, got {images}")
        self.name = str(folder)
        self._folder = Path(folder)
        self._batch_size = batch_size
        self._device = torch.device(device)
        files = _files(self._folder)
        if not files:
            raise ValueError(f"data: {folder} holds no .npy or .npz file")
        self._shapes = _first_shapes(files)
        self._numbers = _chosen(parse_layers(layers), len(self._shapes))
        self.layers = [Layer(f"layer.{i}", i, self._shapes[i][1]) for i in self._numbers]
        classes = [str(file.parent) for file in files]
        chosen = balanced_subset(classes, len(files), images, seed)
        self._files = [files[index] for index in chosen]
        self.images = len(self._files)

    @cached_property
    def fingerprint(self) -> dict[str, Any]:
        """Place, names, sizes and ages of the files, and the layers; no file is read."""
        files = "\n".join(
            f"{self._file_name(file)} {file.stat().st_size} {file.stat().st_mtime_ns}"
            for file in self._files
        )
        return {
            "weights": self.weights,
            "layers": [layer.name for layer in self.layers],
            "shapes": [list(self._shapes[number]) for number in self._numbers],
            "selection": {
                "folder": str(self._folder.resolve()),
                "images": self.images,
                "files": hashlib.sha256(files.encode()).hexdigest(),
            },
        }

    def batches(self, start: int = 0, stop: int | None = None) -> Iterator[Batch]:
        """As `TokenSource.batches`."""
        places = checked_places(start, stop, self.images)
        for first in range(places.start, places.stop, self._batch_size):
            yield self._batch(range(first, min(first + self._batch_size, places.stop)))

    def _batch(self, places: range) -> Batch:
        read: dict[int, list[np.ndarray]] = {}
        skipped = []
        for place in places:
            try:
                read[place] = self._read(self._files[place])
            except (ArrayError, OSError) as error:
                name = self._file_name(self._files[place])
                skipped.append((place, name, " ".join(str(error).split())))
        layers = zip(*read.values(), strict=True)
        return Batch(list(read), [self._stack(layer) for layer in layers], skipped)

    def _read(self, file: Path) -> list[np.ndarray]:
        layers = read_tokens(file)
        shapes = _shapes(layers)
        if shapes != self._shapes:
            raise ArrayError(
                f"holds {_described(shapes)}, the first file holds {_described(self._shapes)}"
            )
        return [layers[number] for number in self._numbers]

    def _stack(self, layer: tuple[np.ndarray, ...]) -> Tensor:
        return torch.from_numpy(np.stack(layer)).to(self._device)

    def _file_name(self, file: Path) -> str:
        return file.relative_to(self._folder).as_posix()


def _files(folder: Path) -> list[Path]:
    left_out = LeftOut()
    found = [file for file in find_files(folder, left_out) if file.lower().endswith(SUFFIXES)]
    warn_left_out(folder, left_out)
    return sorted(map(Path, found))


def _first_shapes(files: list[Path]) -> list[Shape]:
    first_error: Exception | None = None
    for file in files:
        try:
            return _shapes(read_tokens(file))
        except (ArrayError, OSError) as error:
            first_error = first_error or error
    raise ValueError(
        f"data: none of {len(files)} .npy and .npz files can be read as tokens; {files[0].name} "
        f"{first_error}"
    ) from first_error


def _shapes(layers: list[np.ndarray]) -> list[Shape]:
    return [(layer.shape[0], layer.shape[1]) for layer in layers]


def _described(shapes: list[Shape]) -> str:
    kinds = ", ".join(str(list(shape)) for shape in dict.fromkeys(shapes))
    return f"{len(shapes)} layers of {kinds}"


def _chosen(layers: str | list[int | str], count: int) -> list[int]:
    if layers == "all":
        return list(range(count))
    if layers == "last":
        return [count - 1]
    names = {f"layer.{number}": number for number in range(count)}
    names |= {str(number): number % count for number in range(-count, count)}
    for layer in layers:
        if str(layer) not in names:
            raise ValueError(
                f"layers: {layer!r} is not there: the saved tokens have {count} layers "
                f"(layer.0 .. layer.{count - 1})"
            )
    return sorted({names[str(layer)] for layer in layers})


def _as_tokens(layer: np.ndarray) -> np.ndarray:
    """[N, D] of a layer: a batch of one and a grid are flattened."""
    if layer.dtype.kind != "f" or layer.dtype.itemsize > 8:
        raise ArrayError(f"holds {layer.dtype}, expected float16, float32 or float64")
    if layer.ndim not in (2, 3) and not (layer.ndim == 4 and layer.shape[0] == 1):
        raise ArrayError(
            f"holds a layer of {list(layer.shape)}, expected [N, D], [1, N, D] or [H, W, D]"
        )
    if layer.size == 0:
        raise ArrayError(f"holds a layer of {list(layer.shape)}, without a token")
    tokens = layer.reshape(-1, layer.shape[-1])
    return tokens if layer.dtype.isnative else tokens.astype(layer.dtype.newbyteorder("="))
