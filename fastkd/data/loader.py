"""Dataloaders for training and evaluation.

Every sample's random numbers are seeded by what the sample is, so that batches do not depend on the
number of workers.
"""

from __future__ import annotations

from typing import Any

import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, IterableDataset

from fastkd.config import DataConfig, Recipe
from fastkd.data.datasets import DataPair
from fastkd.data.samplers import (
    EvalSampler,
    SampleKey,
    Schedule,
    TrainBatchSampler,
    slice_size,
)
from fastkd.data.samples import (
    Collate,
    Fault,
    Sample,
    SampleTransform,
    WorkerNotes,
    collate,
    eval_sample_transform,
    label_bound,
    loader_options,
    train_sample_transform,
)
from fastkd.data.transforms import InputSpec
from fastkd.utils.distributed import ALONE, World
from fastkd.utils.io import writable
from fastkd.utils.random import derive_seed, preserved_rng, seed_cpu

REPLACEMENTS = 16  # images that are tried in the place of one that cannot be read


class SampleDataset(Dataset[Any]):
    """A data set addressed by `SampleKey`, its randomness seeded by (seed, epoch, sample, copy).

    The process' own generators are left as they were, so that loading in the main process
    (``workers=0``) and in workers are the same thing.

    Args:
        dataset: map-style, yielding (image, label).
        transform: (image, label) -> `Sample`.
        seed: the run's seed; None where nothing is random, which saves seeding every sample.
        replacing: the run's seed, from which the images derive that take the place of those that
            cannot be read; None lets their errors through.
        decode_once: read an image once for its copies in a batch. A data set that itself draws at
            random then gives all of them the same.
        notes: where loader processes note what they are working on; None for nowhere.
    """

    def __init__(
        self,
        dataset: Any,
        transform: SampleTransform,
        seed: int | None = None,
        *,
        replacing: int | None = None,
        decode_once: bool = False,
        notes: WorkerNotes | None = None,
    ) -> None:
        self.dataset = dataset
        self.transform = transform
        self.seed = seed
        self.replacing = replacing
        self.decode_once = decode_once
        self.notes = notes

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: SampleKey) -> tuple[Any, Any]:
        """One (image, label), as of any data set."""
        sample = self.__getitems__([key])[0]
        return sample.image, sample.label

    def __getitems__(self, keys: list[SampleKey]) -> list[Sample]:
        """Fetch a batch, as torch's loader asks for it."""
        if self.seed is None:
            return [self._sample(key, {}) for key in keys]
        decoded: dict[int, tuple[Any, ...]] = {}
        with preserved_rng():
            return [self._sample(key, decoded) for key in keys]

    def name(self, index: int) -> str:
        """What the data set calls a sample: its file, or its number."""
        filename = getattr(self.dataset, "filename", None)
        return f"sample {index}" if filename is None else writable(str(filename(index)))

    def _sample(self, key: SampleKey, decoded: dict[int, tuple[Any, ...]]) -> Sample:
        if self.notes is not None:
            self.notes.note(key.sample)
        self._seed(key)
        if key.sample in decoded:
            image, label, faults = decoded[key.sample]
        else:
            image, label, faults = self._read_or_replace(key)
            if self.decode_once:
                decoded[key.sample] = image, label, ()
                self._seed(key)  # what reading drew is not drawn for the other copies
        return self.transform(image, label, key.sample, faults)

    def _seed(self, key: SampleKey) -> None:
        if self.seed is not None:
            seed_cpu(derive_seed("sample", self.seed, *key))

    def _read_or_replace(self, key: SampleKey) -> tuple[Any, Any, tuple[Fault, ...]]:
        """Image, label, and what could not be read; the same for all copies of a sample."""
        if self.replacing is None:
            return *self._read(key.sample), ()
        index = key.sample
        faults: list[Fault] = []
        for attempt in range(1, REPLACEMENTS + 2):
            try:
                return *self._read(index), tuple(faults)
            except (OSError, Image.DecompressionBombError) as error:
                faults.append(Fault(index, self.name(index), str(error)))
            place = derive_seed("sample", self.replacing, key.epoch, key.sample, 0, attempt)
            index = place % len(self.dataset)
        raise OSError(
            f"data: cannot read {faults[0].name} (sample {key.sample}), nor any of {REPLACEMENTS} "
            f"images tried in its place: {faults[0].reason}"
        )

    def _read(self, index: int) -> tuple[Any, Any]:
        image, label = self.dataset[index]
        try:
            return self.transform.decode(image), label
        except OSError as error:
            reason = error.__cause__ or error
            raise OSError(
                f"data: cannot decode {self.name(index)} (sample {index}): {reason}"
            ) from error


def train_loader(
    data: DataPair,
    recipe: Recipe,
    spec: InputSpec,
    peers: World = ALONE,
) -> DataLoader[Any]:
    """Batches of one rank; its ``batch_sampler`` is a `TrainBatchSampler`.

    An image that cannot be read is replaced by another one and told in the batch's ``faults``.
    """
    if isinstance(data.train, IterableDataset):
        from fastkd.data.streaming import stream_train_loader

        return stream_train_loader(data, recipe, spec, peers)
    sampler = TrainBatchSampler(
        len(data.train),
        slice_size(recipe, peers.size),
        seed=recipe.seed,
        accumulation=recipe.accumulation,
        repeats=recipe.repeated_aug,
        rank=peers.rank,
        world_size=peers.size,
        together=recipe.augment == "gpu",
    )
    dataset = SampleDataset(
        data.train,
        train_sample_transform(recipe, spec, data),
        None if recipe.augment == "none" else recipe.seed,
        replacing=recipe.seed,
        decode_once=recipe.augment == "gpu",
        notes=WorkerNotes(recipe.workers),
    )
    stack = collate(data, spec, label_bound(data, recipe.num_classes, recipe.labels))
    return _loader(dataset, stack, recipe.workers, peers.device, batch_sampler=sampler)


def eval_loader(
    data: DataPair,
    recipe: Recipe,
    spec: InputSpec,
    peers: World = ALONE,
) -> DataLoader[Any]:
    """This rank's share of the evaluation set, no sample twice."""
    if isinstance(data.val, IterableDataset):
        from fastkd.data.streaming import stream_eval_loader

        return stream_eval_loader(data, recipe, spec, peers)
    dataset = eval_samples(data, recipe, spec)
    dataset.notes = WorkerNotes(recipe.workers)
    sampler = EvalSampler(len(data.val), peers.rank, peers.size)
    return _loader(
        dataset,
        collate(data, spec, label_bound(data, recipe.num_classes, data.labelled_val)),
        recipe.workers,
        peers.device,
        sampler=sampler,
        batch_size=recipe.eval_batch_size,
    )


def eval_samples(
    data: DataPair, config: DataConfig, spec: InputSpec, seed: int | None = None
) -> SampleDataset:
    """The evaluation set as a model takes it in; float tensors are not normalised yet."""
    return SampleDataset(data.val, eval_sample_transform(config, spec, data), seed)


def _loader(
    dataset: SampleDataset,
    stack: Collate,
    workers: int,
    device: torch.device,
    **batching: Any,
) -> DataLoader[Any]:
    return DataLoader(
        dataset,
        collate_fn=stack,
        **loader_options(workers, device),
        **batching,
    )


def schedule_of(loader: DataLoader[Any]) -> Schedule:
    """Return what holds an epoch's length and where the next iteration starts."""
    schedule: Any = loader.dataset if isinstance(loader.dataset, Schedule) else loader.batch_sampler
    return schedule
