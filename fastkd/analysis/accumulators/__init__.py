"""Base class of the accumulators: sums that add up, and rows of values that line up by image."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastkd.ops import checks

# Its square still fits into float32; beyond it, one image would spoil the sums of all others.
LARGEST_NORM = 1e18


class Rows:
    """One row of values per image, keyed by place: the image's number in the selection.

    Rows stay on the device that they were measured on, so that adding them does not synchronize.
    """

    def __init__(self) -> None:
        self._places: list[Tensor] = []
        self._columns: dict[str, list[Tensor]] = {}

    def add(self, places: Tensor, **columns: Tensor) -> None:
        """Add a batch of images."""
        self._places.append(places)
        for name, values in columns.items():
            self._columns.setdefault(name, []).append(values)

    def merge(self, other: Rows) -> None:
        """Add the rows of another process."""
        for name, chunks in other._columns.items():
            self._columns.setdefault(name, []).extend(chunks)
        self._places.extend(other._places)

    def sorted(self) -> dict[str, np.ndarray]:
        """Return every column in the order of places; synchronizes."""
        if not self._places:
            return {}
        order = np.argsort(torch.cat([p.cpu() for p in self._places]).numpy(), kind="stable")
        return {name: _joined(chunks)[order] for name, chunks in self._columns.items()}

    def state(self) -> dict[str, Any]:
        """Return plain tensors on the CPU, for `of`."""
        self._places = _merged(self._places)
        self._columns = {name: _merged(chunks) for name, chunks in self._columns.items()}
        return {
            "places": [chunk.cpu() for chunk in self._places],
            "columns": {name: [c.cpu() for c in chunks] for name, chunks in self._columns.items()},
        }

    @classmethod
    def of(cls, state: dict[str, Any]) -> Rows:
        """Rebuild rows from `state`."""
        rows = cls()
        rows._places = list(state["places"])
        rows._columns = {name: list(chunks) for name, chunks in state["columns"].items()}
        return rows


class Accumulator:
    """Collect sums and per-image rows, so that all subclasses merge and save in the same way."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.rows = Rows()
        self.channels: int | None = None  # D of the tokens; None before the first batch
        self._seen = 0

    def update(self, tokens: Tensor, places: Sequence[int] | None = None) -> None:
        """Measure a batch; images with a NaN or an infinity are left out.

        Args:
            tokens: [B, N, D] in any float dtype, prefix tokens already dropped.
            places: numbers of the images, which order the result; None continues counting.

        Raises:
            ValueError: wrong shape, or another D than before.
            TypeError: tokens are not floating-point.
        """
        raise NotImplementedError

    def result(self) -> Any:
        """Summarize what was seen so far; synchronizes.

        Returns:
            The measurements.

        Raises:
            ValueError: nothing was seen.
        """
        raise NotImplementedError

    @property
    def tokens(self) -> int:
        """Number of measured tokens, where the subclass counts them; synchronizes."""
        return int(self.sums.get("tokens", 0))

    def merge(self, other: Accumulator) -> None:
        """Add what another accumulator of the same kind has seen."""
        if type(other) is not type(self) or self.options() != other.options():
            raise ValueError(
                f"{type(self).__name__}.merge: expected a {type(self).__name__} with "
                f"{self.options()}, got a {type(other).__name__} with {other.options()}"
            )
        if other.channels is not None:
            self._check_channels(other.channels)
        for name, value in other.sums.items():
            self._add(name, value)
        self.rows.merge(other.rows)
        self._seen += other._seen

    def options(self) -> dict[str, Any]:
        """Return the plain values that must be equal for a merge."""
        return {}

    def state(self) -> dict[str, Any]:
        """Return everything seen so far as plain tensors on the CPU, for `restore`."""
        return {
            "sums": {name: value.cpu() for name, value in self.sums.items()},
            "rows": self.rows.state(),
            "channels": self.channels,
            "seen": self._seen,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Replace everything seen so far by a `state`."""
        self.sums = dict(state["sums"])
        self.rows = Rows.of(state["rows"])
        self.channels = state["channels"]
        self._seen = state["seen"]

    def with_state(self, state: dict[str, Any]) -> Accumulator:
        """Return another accumulator with the same options and the given state."""
        other = copy.copy(self)  # shallow: `restore` replaces all that an accumulator changes
        other.restore(state)
        return other

    def _checked(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Check a batch; zero images with a NaN, an infinity or a norm above `LARGEST_NORM`."""
        caller, shape = type(self).__name__, list(tokens.shape)
        checks.check_tensor(caller, "tokens", tokens)
        if tokens.ndim != 3 or 0 in shape[1:]:
            hint = " (a batch dimension missing?)" if tokens.ndim == 2 else ""
            raise ValueError(
                f"{caller}: tokens must be [B, N, D] with at least one token and one channel, got "
                f"{shape}{hint}"
            )
        self._check_channels(shape[-1])
        tokens = tokens.detach()
        dtype = torch.promote_types(tokens.dtype, torch.float32)
        # A NaN compares as False, too.
        finite = torch.linalg.vector_norm(tokens, dim=(1, 2), dtype=dtype) <= LARGEST_NORM
        # On a GPU, asking whether all are finite would synchronize.
        if tokens.device.type == "cpu" and bool(finite.all()):
            return tokens, finite
        return only(finite, tokens), finite

    def _check_channels(self, channels: int) -> None:
        if self.channels not in (None, channels):
            raise ValueError(
                f"{type(self).__name__}: tokens must have {self.channels} channels as before, got "
                f"{channels}"
            )
        self.channels = channels

    def _add(self, name: str, value: Tensor) -> None:
        if name not in self.sums:
            self.sums[name] = value.clone()
            return
        known = self.sums[name].to(value.device)
        if known.shape != value.shape:  # curves over min(N, D) dimensions, of another N
            length = max(len(known), len(value))
            known, value = _extended(known, length), _extended(value, length)
        self.sums[name] = known + value

    def _places(self, places: Sequence[int] | None, tokens: Tensor) -> Tensor:
        if places is None:
            places = range(self._seen, self._seen + len(tokens))
        self._seen += len(tokens)
        return torch.tensor(list(places), dtype=torch.int64)


def only(images: Tensor, tokens: Tensor) -> Tensor:
    """Zero the tokens [B, N, D] of all images but those marked [B] bool."""
    return torch.where(images[:, None, None], tokens, 0.0)


def mean_and_std(total: Tensor, squares: Tensor, count: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Return mean and population standard deviation from float64 sums."""
    mean = total / count
    # Rounding may leave the variance of a constant below 0.
    return mean.cpu().numpy(), (squares / count - mean.square()).clamp_min(0).sqrt().cpu().numpy()


def _merged(chunks: list[Tensor]) -> list[Tensor]:
    # Many small tensors take more room on disk than their values.
    if len({(chunk.shape[1:], chunk.device) for chunk in chunks}) == 1:
        return [torch.cat(chunks)]
    return chunks


def _joined(chunks: list[Tensor]) -> np.ndarray:
    arrays = [chunk.cpu() for chunk in chunks]
    if arrays[0].ndim == 2:  # curves of images with fewer tokens are shorter
        width = max(array.shape[1] for array in arrays)
        arrays = [_extended(array, width) for array in arrays]
    return torch.cat(arrays).numpy()


def _extended(values: Tensor, length: int) -> Tensor:
    """Pad cumulated curves with their last value."""
    missing = length - values.shape[-1]
    return torch.cat([values, values[..., -1:].expand(*values.shape[:-1], missing)], dim=-1)
