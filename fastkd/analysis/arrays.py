"""Folders of saved tokens, one .npy or .npz file per image, as a source of batches."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastkd.analysis.images import balanced_subset
from fastkd.analysis.study import Batch, Layer, Options, parse_layers
from fastkd.data.image_files import LeftOut, find_files, is_image, warn_left_out

SUFFIXES = (".npy", ".npz")


class ArrayError(ValueError):
    """A file without usable tokens."""


def is_array_folder(data: Any) -> bool:
    """Return whether data are a folder of saved tokens; raise if it holds images as well."""
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
    """Read the layers of one image, each [N, D] float16, float32 or float64, without unpickling.

    - .npy: [N, D] is one layer; [L, N, D], [L, 1, N, D] or [L, H, W, D] are layers of one shape.
    - .npz: one array per layer, in the order in which they were saved (``np.savez(path,
      *layers)``), each [N, D], [1, N, D], [H, W, D] or [1, H, W, D].
    """
    try:
        if Path(path).suffix.lower() == ".npz":
            with np.load(path, allow_pickle=False) as saved:
                arrays = [saved[name] for name in saved.files]
        else:
            # Mapped into memory: only the layers that are used are read.
            content = np.load(path, mmap_mode="r", allow_pickle=False)
            arrays = [content] if content.ndim == 2 else list(content)
    except OSError:
        raise
    except Exception as error:  # broken bytes may fail in any way
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ArrayError(f"cannot be read as saved tokens: {reason[:160]}") from error
    if not arrays:
        raise ArrayError("holds no layer, expected [N, D] or [L, N, D] with L of at least 1")
    return [_as_tokens(array) for array in arrays]


def _as_tokens(layer: np.ndarray) -> np.ndarray:
    """Flatten a batch of one and a grid to [N, D]."""
    if layer.dtype.kind != "f" or layer.dtype.itemsize > 8:
        raise ArrayError(f"holds {layer.dtype}, expected float16, float32 or float64")
    if layer.ndim not in (2, 3) and not (layer.ndim == 4 and layer.shape[0] == 1):
        raise ArrayError(
            f"holds a layer of {list(layer.shape)}, expected [N, D], [1, N, D] or [H, W, D]"
        )
    if layer.size == 0:
        raise ArrayError(f"holds a layer of {list(layer.shape)}, without a token")
    tokens = layer.reshape(-1, layer.shape[-1])
    # torch takes arrays of the native byte order alone.
    return tokens if layer.dtype.isnative else tokens.astype(layer.dtype.newbyteorder("="))


class ArraySource:
    """Tokens of a folder of .npy or .npz files, at any depth; inner folders count as classes.

    The first readable file sets the number of layers and their shapes. Files with others are
    skipped: ranks of images with different numbers of tokens cannot be compared.
    """

    weights = "saved tokens"
    architecture = ""
    parameters: int | None = None
    input_size: tuple[int, int] | None = None

    def __init__(
        self, folder: str | Path, options: Options, device: str | torch.device = "cpu"
    ) -> None:
        self.name = str(folder)
        self._folder = Path(folder)
        self._batch_size = options.batch_size
        self._device = torch.device(device)
        left_out = LeftOut()
        found = find_files(folder, left_out)
        files = sorted(Path(file) for file in found if file.lower().endswith(SUFFIXES))
        warn_left_out(folder, left_out)
        if not files:
            raise ValueError(f"data: {folder} holds no .npy or .npz file")
        self._shapes = _first_shapes(files)
        self._numbers = _chosen(parse_layers(options.layers), len(self._shapes))
        self.layers = [Layer(f"layer.{i}", i, self._shapes[i][1]) for i in self._numbers]
        classes = [str(file.parent) for file in files]
        chosen = balanced_subset(classes, len(files), options.images, options.seed)
        self._files = [files[index] for index in chosen]
        self.images = len(self._files)

    @cached_property
    def fingerprint(self) -> dict[str, Any]:
        """Names, sizes and ages of the files, and the layers; reads no file."""
        files = "\n".join(
            f"{self._file_name(file)} {file.stat().st_size} {file.stat().st_mtime_ns}"
            for file in self._files
        )
        return {
            "weights": self.weights,
            "layers": [layer.name for layer in self.layers],
            "shapes": [self._shapes[number] for number in self._numbers],
            "selection": {
                "folder": str(self._folder.resolve()),
                "images": self.images,
                "files": hashlib.sha256(files.encode()).hexdigest(),
            },
        }

    def batches(self, start: int = 0, stop: int | None = None) -> Iterator[Batch]:
        """Yield tokens of the files at places start..stop-1, in order."""
        end = self.images if stop is None else stop
        for first in range(start, end, self._batch_size):
            read: dict[int, list[np.ndarray]] = {}
            skipped = []
            for place in range(first, min(first + self._batch_size, end)):
                try:
                    read[place] = self._read(self._files[place])
                except (ArrayError, OSError) as error:
                    name = self._file_name(self._files[place])
                    skipped.append((place, name, " ".join(str(error).split())))
            layers = zip(*read.values(), strict=True)
            tokens = [torch.from_numpy(np.stack(layer)).to(self._device) for layer in layers]
            yield Batch(list(read), tokens, skipped)

    def _read(self, file: Path) -> list[np.ndarray]:
        layers = read_tokens(file)
        shapes = [list(layer.shape) for layer in layers]
        if shapes != self._shapes:
            raise ArrayError(
                f"holds {_described(shapes)}, the first file holds {_described(self._shapes)}"
            )
        return [layers[number] for number in self._numbers]

    def _file_name(self, file: Path) -> str:
        return file.relative_to(self._folder).as_posix()


def _first_shapes(files: list[Path]) -> list[list[int]]:
    first_error: Exception | None = None
    for file in files:
        try:
            return [list(layer.shape) for layer in read_tokens(file)]
        except (ArrayError, OSError) as error:
            first_error = first_error or error
    raise ValueError(
        f"data: none of {len(files)} .npy and .npz files can be read as tokens; {files[0].name} "
        f"{first_error}"
    ) from first_error


def _described(shapes: list[list[int]]) -> str:
    kinds = ", ".join(dict.fromkeys(map(str, shapes)))
    return f"{len(shapes)} layers of {kinds}"


def _chosen(layers: str | list[int | str], count: int) -> list[int]:
    if layers == "all":
        return list(range(count))
    names: dict[int | str, int] = {f"layer.{number}": number for number in range(count)}
    names |= {number: number % count for number in range(-count, count)}
    wanted = [-1] if isinstance(layers, str) else layers
    for layer in wanted:
        if layer not in names:
            raise ValueError(
                f"layers: {layer!r} does not exist: the saved tokens have {count} layers "
                f"(layer.0 .. layer.{count - 1})"
            )
    return sorted({names[layer] for layer in wanted})
