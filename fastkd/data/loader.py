"""Dataloaders for training and evaluation; batches do not depend on the number of workers."""

from __future__ import annotations

import logging
from typing import Any

from PIL import Image
from torch.utils.data import DataLoader, Dataset, IterableDataset

from fastkd.config import DataConfig, Recipe
from fastkd.data.classes import UNLABELLED, LabelError, class_number
from fastkd.data.images import reason_of
from fastkd.data.readers import DataPair, Fault, StreamSource
from fastkd.data.samplers import (
    EvalSampler,
    SampleKey,
    Schedule,
    TrainBatchSampler,
    slice_size,
)
from fastkd.data.samples import (
    Collate,
    Sample,
    SampleTransform,
    WorkerNotes,
    collate,
    eval_sample_transform,
    label_bound,
    loader_options,
    train_sample_transform,
)
from fastkd.data.streaming import EvalStream, TrainStream
from fastkd.data.transforms import InputSpec
from fastkd.utils.distributed import ALONE, World
from fastkd.utils.io import writable
from fastkd.utils.random import derive_seed, preserved_rng, seed_cpu

# What a dataset may raise over an image that cannot be read; anything else is its own mistake.
UNREADABLE = (OSError, Image.DecompressionBombError)
REPLACEMENTS = 16  # images that are tried in the place of one that cannot be read
ENOUGH_SHARDS = 8  # for each process, so that their shares of a stream's epoch are about even
logger = logging.getLogger("fastkd")


class SampleDataset(Dataset[Any]):
    """A map-style dataset addressed by `SampleKey`; (seed, epoch, sample, copy) seed a sample.

    Generators are left as they were, so that loading in the main process (``workers=0``) and in
    workers are the same thing.
    """

    def __init__(
        self,
        dataset: Any,  # yields (image, label)
        transform: SampleTransform,
        seed: int | None = None,  # the run's; None where nothing is random
        *,
        replacing: int | None = None,  # seed of the images that replace unreadable ones
        decode_once: bool = False,  # a dataset that draws at random gives all copies the same
        notes: WorkerNotes | None = None,
        labels: bool = False,  # refuse what is no label; else it is -1
    ) -> None:
        self.dataset = dataset
        self.transform = transform
        self.seed = seed
        self.replacing = replacing
        self.decode_once = decode_once
        self.notes = notes
        self.labels = labels

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: SampleKey) -> tuple[Any, Any]:
        """One (image, label), as of any dataset."""
        sample = self.__getitems__([key])[0]
        if isinstance(sample, Fault):
            raise OSError(f"data: cannot read {sample.name}: {sample.reason}")
        return sample.image, sample.label

    def __getitems__(self, keys: list[SampleKey]) -> list[Sample | Fault]:
        """Fetch a batch, as torch's loader asks for it; faults unless they are replaced."""
        if self.seed is None:
            return [self._sample(key, {}) for key in keys]
        decoded: dict[int, tuple[Any, ...]] = {}
        with preserved_rng():
            return [self._sample(key, decoded) for key in keys]

    def name(self, index: int) -> str:
        """Name a sample by its file, or else its number."""
        filename = getattr(self.dataset, "filename", None)
        return f"sample {index}" if filename is None else writable(str(filename(index)))

    def _sample(self, key: SampleKey, decoded: dict[int, tuple[Any, ...]]) -> Sample | Fault:
        if self.notes is not None:
            self.notes.note(key.sample)
        self._seed(key)
        if key.sample in decoded:
            image, label, faults = decoded[key.sample]
        else:
            if self.replacing is None:
                try:
                    image, label = self._read(key.sample)
                except UNREADABLE as error:
                    return Fault(key.sample, self.name(key.sample), reason_of(error))
                faults = ()
            else:
                image, label, faults = self._read_or_replace(key, self.replacing)
            if self.decode_once:
                decoded[key.sample] = image, label, ()
                self._seed(key)  # what reading drew is not drawn for the other copies
        return self.transform(image, label, key.sample, faults)

    def _seed(self, key: SampleKey) -> None:
        if self.seed is not None:
            seed_cpu(derive_seed("sample", self.seed, *key))

    def _read_or_replace(
        self, key: SampleKey, replacing: int
    ) -> tuple[Any, Any, tuple[Fault, ...]]:
        """Image, label, and what could not be read; the same for all copies of a sample."""
        index = key.sample
        faults: list[Fault] = []
        for attempt in range(1, REPLACEMENTS + 2):
            try:
                return *self._read(index), tuple(faults)
            except UNREADABLE as error:
                faults.append(Fault(index, self.name(index), reason_of(error)))
            place = derive_seed("sample", replacing, key.epoch, key.sample, 0, attempt)
            index = place % len(self.dataset)
        raise OSError(
            f"data: cannot read {faults[0].name} (sample {key.sample}), nor any of {REPLACEMENTS} "
            f"images tried in its place: {faults[0].reason}"
        )

    def _read(self, index: int) -> tuple[Any, Any]:
        image, label = self.dataset[index]
        try:
            return self.transform.decode(image), self._number(label, index)
        except OSError as error:
            reason = error.__cause__ or error
            raise OSError(
                f"data: cannot decode {self.name(index)} (sample {index}): {reason}"
            ) from error

    def _number(self, label: Any, index: int) -> int | None:
        if type(label) is int and label >= 0:
            return label
        where = self.name(index)
        if not hasattr(self.dataset, "filename"):
            where += f" of {type(self.dataset).__name__}"
        try:
            return class_number(label, where)
        except LabelError:
            if self.labels:
                raise
        return UNLABELLED


def train_loader(
    data: DataPair,
    recipe: Recipe,
    spec: InputSpec,
    peers: World = ALONE,
) -> DataLoader[Any]:
    """Batches of one rank; the ``batch_sampler``, of a stream the ``dataset``, is a `Schedule`.

    What cannot be read is replaced, in a stream by what follows; a batch's ``faults`` list it.
    """
    share = slice_size(recipe, peers.size)
    transform = train_sample_transform(recipe, spec, data)
    notes = WorkerNotes(recipe.workers)
    schedule = {
        "num_samples": recipe.train_samples or len(data.train) if data.streams else len(data.train),
        "batch_size": share,
        "seed": recipe.seed,
        "accumulation": recipe.accumulation,
        "rank": peers.rank,
        "world_size": peers.size,
    }
    dataset: SampleDataset | TrainStream
    batching: dict[str, Any]
    if data.streams:
        _check_stream(data.train, recipe, peers)
        dataset = TrainStream(data.train, transform, notes, **schedule)
        batching = {"batch_size": share}
    else:
        at_once = recipe.augment == "gpu"  # copies of an image are decoded once
        dataset = SampleDataset(
            data.train,
            transform,
            None if recipe.augment == "none" else recipe.seed,
            replacing=recipe.seed,
            decode_once=at_once,
            notes=notes,
            labels=recipe.labels,
        )
        sampler = TrainBatchSampler(**schedule, repeats=recipe.repeated_aug, together=at_once)
        batching = {"batch_sampler": sampler}
    bound = label_bound(data, recipe.num_classes, recipe.labels)
    return _Loader(dataset, collate(data, spec, bound), recipe.workers, peers, **batching)


def eval_loader(
    data: DataPair,
    recipe: Recipe,
    spec: InputSpec,
    peers: World = ALONE,
) -> DataLoader[Any]:
    """This rank's share of the evaluation set, no sample twice.

    A batch's ``faults`` list what cannot be read, and is not in it.
    """
    notes = WorkerNotes(recipe.workers)
    dataset: SampleDataset | EvalStream
    if data.streams:
        transform = eval_sample_transform(recipe, spec, data)
        dataset, sampler = EvalStream(data.val, transform, notes, peers.rank, peers.size), None
    else:
        dataset = eval_samples(data, recipe, spec)
        dataset.notes, dataset.labels = notes, data.labelled_val
        sampler = EvalSampler(len(data.val), peers.rank, peers.size)
    bound = label_bound(data, recipe.num_classes, data.labelled_val)
    if data.numbers and bound is not None:
        bound = 1 + max(data.numbers)
    return _Loader(
        dataset,
        collate(data, spec, bound, data.numbers),
        recipe.workers,
        peers,
        sampler=sampler,
        batch_size=recipe.eval_batch_size,
    )


def eval_samples(
    data: DataPair, config: DataConfig, spec: InputSpec, seed: int | None = None
) -> SampleDataset:
    """The evaluation set as a model takes it in; float tensors are not normalized yet."""
    return SampleDataset(data.val, eval_sample_transform(config, spec, data), seed)


def schedule_of(loader: DataLoader[Any]) -> Schedule:
    """Return what holds an epoch's length and where the next iteration starts."""
    schedule: Any = loader.dataset if isinstance(loader.dataset, Schedule) else loader.batch_sampler
    return schedule


class _Loader(DataLoader[Any]):
    """A dataloader of both kinds; what a resumed stream has used already (None) is left out."""

    def __init__(
        self, dataset: Any, stack: Collate, workers: int, peers: World, **batching: Any
    ) -> None:
        options = loader_options(workers, peers.device)
        if isinstance(dataset, IterableDataset):
            options["persistent_workers"] = False  # a position reaches new processes only
        super().__init__(
            dataset,
            collate_fn=lambda samples: None if samples[0] is None else stack(samples),
            **options,
            **batching,
        )

    def __iter__(self) -> Any:
        return (batch for batch in super().__iter__() if batch is not None)


def _check_stream(source: StreamSource, recipe: Recipe, peers: World) -> None:
    """Refuse options without meaning on a stream; warn if an epoch is far from a pass."""
    if recipe.repeated_aug > 1:
        raise ValueError(
            f"repeated_aug: {recipe.repeated_aug} copies of a sample need data that are read by "
            f"number, but {source} streams: set repeated_aug=1, or use shards on this machine"
        )
    if recipe.augment == "dataset":
        raise ValueError(f"augment: 'dataset', but {source} augments nothing: cpu, gpu or none")
    shards, processes = len(source.urls), peers.size * max(recipe.workers, 1)
    if peers.is_main and shards % processes and shards < ENOUGH_SHARDS * processes:
        logger.warning(
            "data: %d processes share the %d shards of %s: in an epoch some samples are read "
            "twice and others not at all; use a number of processes (ranks x workers) that divides "
            "the shards, or at least %d shards for each",
            processes,
            shards,
            source,
            ENOUGH_SHARDS,
        )
