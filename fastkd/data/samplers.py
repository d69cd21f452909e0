"""Which samples make up which update: exact, resumable, and the same for every number of ranks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from torch.utils.data import Sampler

from fastkd.config import Recipe
from fastkd.utils.random import derive_seed


class SampleKey(NamedTuple):
    """One augmented sample: all that its random transform depends on, beside the run's seed."""

    epoch: int
    sample: int
    copy: int


class Schedule:
    """The updates of an epoch, the same on every rank, and where the next iteration starts."""

    def __init__(
        self,
        num_samples: int,  # of an epoch over all ranks; those that fill no update are dropped
        batch_size: int,  # samples per rank and slice
        *,
        seed: int = 0,  # the run's
        accumulation: int = 1,  # slices per update
        rank: int = 0,
        world_size: int = 1,
        of: str = "the training set",  # in the error
    ) -> None:
        self.num_samples, self.batch_size = num_samples, batch_size
        self.seed, self.accumulation = seed, accumulation
        self.rank, self.world_size = rank, world_size
        self.epoch = self.update = 0
        per_update = world_size * batch_size * accumulation
        self.updates_per_epoch = num_samples // per_update
        if self.updates_per_epoch == 0:
            raise ValueError(
                f"batch_size: {per_update} images per update, but {of} has only {num_samples}"
            )

    def set_position(self, epoch: int, update: int = 0) -> None:
        """Let the next iteration start at an update of an epoch."""
        # Asked for from outside: loader processes run ahead of the training loop.
        self.epoch, self.update = epoch, update


class TrainBatchSampler(Schedule, Sampler[list[SampleKey]]):
    """Batches of one rank, in an order that depends on (seed, epoch) alone.

    An epoch is a permutation of the samples, each repeated ``repeats`` times in a row and the whole
    cut to one pass' length (DeiT's repeated augmentation, on any number of processes), then cut
    into updates of ``world_size * batch_size * accumulation`` samples; the rest is dropped. The
    samples of an update are the same however many ranks share them.
    """

    def __init__(
        self,
        num_samples: int,
        batch_size: int,
        *,
        repeats: int = 1,
        together: bool = False,  # a rank gets all copies of an image, to decode it once
        **schedule: Any,  # of `Schedule`
    ) -> None:
        super().__init__(num_samples, batch_size, **schedule)
        self.repeats, self.together = repeats, together

    def order(self, epoch: int) -> np.ndarray:
        """Return the epoch's samples over all ranks: [samples, 2], index and copy."""
        generator = np.random.default_rng(derive_seed("order", self.seed, epoch))
        used = self.updates_per_epoch * self.world_size * self.batch_size * self.accumulation
        indices = np.repeat(generator.permutation(self.num_samples), self.repeats)[:used]
        copies = np.tile(np.arange(self.repeats), self.num_samples)[:used]
        return np.stack([indices, copies], axis=1)

    def __iter__(self) -> Iterator[list[SampleKey]]:
        slice_size = self.world_size * self.batch_size
        order = self.order(self.epoch)[self.update * self.accumulation * slice_size :]
        mine = slice(self.rank, None, self.world_size)  # as DeiT's ranks take them
        if self.together:
            mine = slice(self.rank * self.batch_size, (self.rank + 1) * self.batch_size)
        for start in range(0, len(order), slice_size):
            rows = order[start : start + slice_size][mine].tolist()
            yield [SampleKey(self.epoch, sample, copy) for sample, copy in rows]

    def __len__(self) -> int:
        return (self.updates_per_epoch - self.update) * self.accumulation


def slice_size(recipe: Recipe, world_size: int) -> int:
    """Return how many images one rank sees in one slice of an update."""
    shares = world_size * recipe.accumulation
    if recipe.batch_size % shares:
        raise ValueError(
            f"batch_size: {recipe.batch_size} images cannot be shared by {world_size} processes x "
            f"{recipe.accumulation} slices"
        )
    size = recipe.batch_size // shares
    if recipe.mixes and size % 2:
        raise ValueError(f"batch_size: Mixup pairs images, but a slice holds {size}, an odd number")
    return size
