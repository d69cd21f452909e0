"""Tokens whose spectra, rotation and bandwidths are known, and a source that gives them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from fastkd.analysis.study import Batch, Layer


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def deficient(batch: int, tokens: int, dim: int, rank: int = 3) -> Tensor:
    return normal(batch, tokens, rank) @ normal(batch, rank, dim, seed=1)


def in_plane(axes: Sequence[int], tokens: int = 16, dim: int = 32, scale: float = 1.0) -> Tensor:
    """Tokens of equal energy along some channels: rank@q is ceil(q * len(axes))."""
    x = torch.zeros(tokens, dim)
    for row in range(tokens):
        x[row, axes[row % len(axes)]] = scale
    return x


def waves(frequency: int, tokens: int = 16, dim: int = 32) -> Tensor:
    """Tokens that are cosines of one frequency along the channels, at different phases."""
    channel = torch.arange(dim)
    phase = torch.arange(tokens).unsqueeze(-1)
    return torch.cos(2 * torch.pi * frequency * channel / dim + phase)


class Interrupted(Exception):
    """A crash in the middle of a pass."""


class TensorSource:
    """A source of given tokens.

    Args:
        layers: per layer [images, N, D].
        unreadable: places without an image.
        batch_size: images per batch.
        crashes: numbers of batches, counted from the first one asked for, at which it crashes.
    """

    name, weights, architecture = "made", "saved tokens", ""
    parameters, input_size = None, None

    def __init__(
        self,
        *layers: Tensor,
        unreadable: Sequence[int] = (),
        batch_size: int = 4,
        crashes: Sequence[int] = (),
    ) -> None:
        self.data = layers
        self.images = len(layers[0])
        self.unreadable = unreadable
        self.batch_size = batch_size
        self.crashes = list(crashes)
        self.asked: list[int] = []
        self.layers = [Layer(f"layer.{i}", i, x.shape[-1]) for i, x in enumerate(layers)]

    @property
    def fingerprint(self) -> dict[str, Any]:
        return {"sum": [float(x.nan_to_num().sum()) for x in self.data]}

    def batches(self, start: int = 0, stop: int | None = None) -> Iterator[Batch]:
        stop = self.images if stop is None else stop
        for begin in range(start, stop, self.batch_size):
            if len(self.asked) in self.crashes:
                self.asked.append(-1)
                raise Interrupted
            self.asked.append(begin)
            places = range(begin, min(begin + self.batch_size, stop))
            read = [place for place in places if place not in self.unreadable]
            skipped = [(p, f"{p}.jpg", "cut short") for p in places if p in self.unreadable]
            yield Batch(read, [x[read] for x in self.data] if read else [], skipped)
