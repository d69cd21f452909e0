"""What all accumulators are made of: sums that add up, and rows that line up by image.

Because nothing else is ever kept, merging two accumulators, gathering those of several processes
and storing one for a later run are the same few lines for all of them.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastkd.ops import checks

# Its square still fits into float32. A NaN is not below it either.
LARGEST_NORM = 1e18


class Rows:
    """Values of images, a row each, in whatever order they come.

    A row belongs to a place: the image's number in the selection. They are kept on the device that
    they were measured on, so that adding them waits for nothing.
    """

    def __init__(self) -> None:
        self._places: list[Tensor] = []
        self._columns: dict[str, list[Tensor]] = {}

    def add(self, places: Tensor, **columns: Tensor) -> None:
        """Add images."""
        self._places.append(places)
        for name, values in columns.items():
            self._columns.setdefault(name, []).append(values)

    def merge(self, other: Rows) -> None:
        """Add another's rows."""
        for name, chunks in other._columns.items():
            self._columns.setdefault(name, []).extend(chunks)
        self._places.extend(other._places)

    def sorted(self) -> dict[str, np.ndarray]:
        """Every column, its images in the order of their places; waits for the device.

        Columns of images with different numbers of entries are filled up with their last one.
        """
        if not self._places:
            return {}
        order = np.argsort(torch.cat([p.cpu() for p in self._places]).numpy(), kind="stable")
        return {name: _joined(chunks)[order] for name, chunks in self._columns.items()}

    def state(self) -> dict[str, Any]:
        """Plain tensors on the CPU; `of` takes them."""
        self._places = _merged(self._places)
        self._columns = {name: _merged(chunks) for name, chunks in self._columns.items()}
        return {
            "places": [chunk.cpu() for chunk in self._places],
            "columns": {name: [c.cpu() for c in chunks] for name, chunks in self._columns.items()},
        }

    @classmethod
    def of(cls, state: dict[str, Any]) -> Rows:
        """The rows that `state` was taken from."""
        rows = cls()
        rows._places = list(state["places"])
        rows._columns = {name: list(chunks) for name, chunks in state["columns"].items()}
        return rows


class Accumulator:
    """Base of the accumulators: ``update`` and ``result`` are the subclasses'.

    Attributes:
        sums: by name; what several accumulators have is added up when they meet.
        rows: per-image values.
        channels: D of the tokens; None before the first batch.
    """

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.rows = Rows()
        self.channels: int | None = None
        self._seen = 0

    def merge(self, other: Accumulator) -> None:
        """Add what another accumulator of the same kind has seen."""
        if type(other) is not type(self) or self.options() != other.options():
            raise ValueError(
                f"{type(self).__name__}.merge: other must be a {type(self).__name__} with "
                f"{self.options()}, got a {type(other).__name__} with {other.options()}"
            )
        if other.channels is not None:
            self._check_channels(other.channels)
        for name, value in other.sums.items():
            self._add(name, value)
        self.rows.merge(other.rows)
        self._seen += other._seen

    def options(self) -> dict[str, Any]:
        """What two accumulators must have in common to be merged; plain values."""
        return {}

    def state(self) -> dict[str, Any]:
        """Everything seen so far as plain tensors on the CPU; `restore` takes it."""
        return {
            "sums": {name: value.cpu() for name, value in self.sums.items()},
            "rows": self.rows.state(),
            "channels": self.channels,
            "seen": self._seen,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Become what `state` was taken from."""
        self.sums = dict(state["sums"])
        self.rows = Rows.of(state["rows"])
        self.channels = state["channels"]
        self._seen = state["seen"]

    def with_state(self, state: dict[str, Any]) -> Accumulator:
        """Another accumulator with the same options and the given state."""
        other = copy.copy(self)  # `restore` replaces all that an accumulator changes
        other.restore(state)
        return other

    def _checked(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """`finite_images` of a batch whose tokens are as wide as those before."""
        tokens, finite = finite_images(type(self).__name__, tokens)
        self._check_channels(tokens.shape[-1])
        return tokens, finite

    def _check_channels(self, channels: int) -> None:
        if self.channels not in (None, channels):
            raise ValueError(
                f"{type(self).__name__}: tokens must have {self.channels} channels as before, got "
                f"{channels}"
            )
        self.channels = channels

    def _add(self, name: str, value: Tensor) -> None:
        """Add to a sum, where the new value is; a shorter curve goes on at its end value."""
        if name not in self.sums:
            self.sums[name] = value.clone()
            return
        known = self.sums[name].to(value.device)
        if known.shape != value.shape:  # curves over min(N, D) dimensions, of another N
            length = max(len(known), len(value))
            known, value = _extended(known, length), _extended(value, length)
        self.sums[name] = known + value

    def _places(self, places: Sequence[int] | None, tokens: Tensor) -> Tensor:
        """The images' places; without any, they are counted."""
        if places is None:
            places = range(self._seen, self._seen + len(tokens))
        self._seen += len(tokens)
        return torch.tensor(list(places), dtype=torch.int64)


class TokenAccumulator(Accumulator):
    """Base of those that count the tokens they measure, in ``sums["tokens"]``."""

    @property
    def tokens(self) -> int:
        """How many were measured so far; waits for the device."""
        return int(self.sums.get("tokens", 0))

    @property
    def is_empty(self) -> bool:
        """Whether none was, so that there is no result."""
        return self.tokens == 0


def finite_images(caller: str, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Check a batch, and put zeros in place of images that cannot be measured.

    Those with a NaN, an infinity, or a norm beyond `LARGEST_NORM`, whose energy float32 could not
    hold and which would spoil the sums of all others.
    """
    checks.check_tensor(caller, "tokens", tokens)
    if tokens.ndim != 3 or 0 in tokens.shape[1:]:
        raise ValueError(
            f"{caller}: tokens must be [B, N, D] with at least one token and one channel, got "
            f"{list(tokens.shape)}" + (" (a batch dimension missing?)" if tokens.ndim == 2 else "")
        )
    tokens = tokens.detach()
    dtype = torch.promote_types(tokens.dtype, torch.float32)
    finite = torch.linalg.vector_norm(tokens, dim=(1, 2), dtype=dtype) <= LARGEST_NORM
    if tokens.device.type == "cpu" and bool(finite.all()):
        return tokens, finite
    return only(finite, tokens), finite


def only(images: Tensor, tokens: Tensor) -> Tensor:
    """Tokens [B, N, D] of some images [B] bool, zeros in place of the others."""
    return torch.where(images[:, None, None], tokens, 0.0)


def mean_and_std(total: Tensor, squares: Tensor, count: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Mean and population standard deviation from float64 sums."""
    mean = total / count
    return mean.cpu().numpy(), (squares / count - mean.square()).clamp_min(0).sqrt().cpu().numpy()


def _merged(chunks: list[Tensor]) -> list[Tensor]:
    """As few tensors as possible: small ones take more room than what is in them."""
    if len({(chunk.shape[1:], chunk.device) for chunk in chunks}) == 1:
        return [torch.cat(chunks)]
    return chunks


def _joined(chunks: list[Tensor]) -> np.ndarray:
    arrays = [chunk.cpu() for chunk in chunks]
    if arrays[0].ndim == 2:
        width = max(array.shape[1] for array in arrays)
        arrays = [_extended(array, width) for array in arrays]
    return torch.cat(arrays).numpy()


def _extended(values: Tensor, length: int) -> Tensor:
    missing = length - values.shape[-1]
    return torch.cat([values, values[..., -1:].expand(*values.shape[:-1], missing)], dim=-1)
