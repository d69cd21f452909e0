"""Which samples make up which step: exact, resumable, and the same for every number of ranks."""

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
    """The updates of an epoch, the same on every rank, and where the next iteration starts.

    Loader processes run ahead of the training loop: a checkpoint needs the loop's count of updates.
    An epoch that is shorter than one update is a ValueError.
    """

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
        self.num_samples = num_samples
        self.batch_size = batch_size
        self.seed = seed
        self.accumulation = accumulation
        self.rank = rank
        self.world_size = world_size
        self.epoch = 0
        self.update = 0
        per_update = world_size * batch_size * accumulation
        self.updates_per_epoch = num_samples // per_update
        if self.updates_per_epoch == 0:
            raise ValueError(
                f"batch_size: {per_update} images per update, but {of} has only {num_samples}"
            )

    def set_position(self, epoch: int, update: int = 0) -> None:
        """Let the next iteration start at an update of an epoch."""
        self.epoch = epoch
        self.update = update


class TrainBatchSampler(Schedule, Sampler[list[SampleKey]]):
    """Batches of one rank, in an order that depends on (seed, epoch) alone.

    An epoch is a permutation of the samples, each repeated ``repeats`` times in a row and the whole
    cut to one pass' length (DeiT's repeated augmentation, on any number of processes), then cut
    into updates of ``world_size * batch_size * accumulation`` samples; the rest is dropped. Within
    a slice of an update the ranks take every ``world_size``-th sample as DeiT's do, or, to decode
    an image once for its copies, one run of samples each: either way the update's samples are the
    same however many ranks share them.

    ``repeats`` copies of a sample follow each other; ``together`` gives a rank copies that do. The
    rest of the arguments are those of `Schedule`.
    """

    def __init__(
        self,
        num_samples: int,
        batch_size: int,
        *,
        repeats: int = 1,
        together: bool = False,
        **schedule: Any,
    ) -> None:
        super().__init__(num_samples, batch_size, **schedule)
        self.repeats = repeats
        self.together = together

    def order(self, epoch: int) -> np.ndarray:
        """The epoch's samples over all ranks."""
        generator = np.random.default_rng(derive_seed("order", self.seed, epoch))
        used = self.updates_per_epoch * self.world_size * self.batch_size * self.accumulation
        indices = np.repeat(generator.permutation(self.num_samples), self.repeats)[:used]
        copies = np.tile(np.arange(self.repeats), self.num_samples)[:used]
        return np.stack([indices, copies], axis=1)

    def __iter__(self) -> Iterator[list[SampleKey]]:
        slice_size = self.world_size * self.batch_size
        order = self.order(self.epoch)[self.update * self.accumulation * slice_size :]
        for start in range(0, len(order), slice_size):
            rows = self._share(order[start : start + slice_size]).tolist()
            yield [SampleKey(self.epoch, sample, copy) for sample, copy in rows]

    def _share(self, rows: np.ndarray) -> np.ndarray:
        """This rank's rows of a slice."""
        if self.together:
            return rows[self.rank * self.batch_size : (self.rank + 1) * self.batch_size]
        return rows[self.rank :: self.world_size]

    def __len__(self) -> int:
        return (self.updates_per_epoch - self.update) * self.accumulation


class EvalSampler(Sampler[SampleKey]):
    """Every sample exactly once over all ranks, in order; ranks may differ by one sample."""

    def __init__(self, num_samples: int, rank: int = 0, world_size: int = 1) -> None:
        self.indices = range(rank, num_samples, world_size)

    def __iter__(self) -> Iterator[SampleKey]:
        return (SampleKey(0, sample, 0) for sample in self.indices)

    def __len__(self) -> int:
        return len(self.indices)


def slice_size(recipe: Recipe, world_size: int) -> int:
    """Images that one rank sees in one slice of an update."""
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
