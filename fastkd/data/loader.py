"""Dataloaders for training and evaluation, and their processes."""

from __future__ import annotations

import logging
import os
import re
import signal
import time
from collections.abc import Callable, Sequence
from multiprocessing import popen_fork
from multiprocessing.context import ForkContext, ForkProcess
from typing import Any

import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info

from fastkd.config import DataConfig, Recipe
from fastkd.data.batches import (
    ANY_CLASS,
    Collate,
    Fault,
    Sample,
    SampleTransform,
    eval_sample_transform,
    train_sample_transform,
)
from fastkd.data.classes import NO_LABEL, LabelError, class_number
from fastkd.data.datasets import DataPair
from fastkd.data.image_files import reason_of
from fastkd.data.samplers import SampleKey, Schedule, TrainBatchSampler, slice_size
from fastkd.data.streaming import EvalStream, StreamSource, TrainStream
from fastkd.data.transforms import InputSpec
from fastkd.utils.distributed import ALONE, World
from fastkd.utils.io import writable
from fastkd.utils.random import derive_seed, preserved_rng, seed_cpu

# What a dataset may raise over an image that cannot be read; other errors stop the run.
UNREADABLE = (OSError, Image.DecompressionBombError)
REPLACEMENTS = 16  # images that are tried in the place of one that cannot be read
ENOUGH_SHARDS = 8  # for each process, so that their shares of a stream's epoch are about even

DEATHS = (RuntimeError, ConnectionError, EOFError)  # what a loader raises when a process died
TORCH_SECONDS = 2.0  # within which torch raises its own error of the death
SHOWN_PIDS = re.compile(r"DataLoader worker \(pid(?:\(s\))? ([\d, ]+)\)")
END, END_SECONDS = signal.SIGUSR2, 2.0  # ends a loader process that is not stuck

logger = logging.getLogger("fastkd")


class SampleDataset(Dataset[Any]):
    """A map-style dataset; its samples are seeded by (seed, epoch, sample, copy)."""

    def __init__(
        self,
        dataset: Any,  # yields (image, label)
        transform: SampleTransform,
        seed: int | None = None,  # the run's; None where nothing is random
        *,
        replacing: int | None = None,  # seed of the images that replace unreadable ones
        decode_once: bool = False,  # a dataset that draws at random gives all copies the same
        note: Callable[[int], None] | None = None,  # is called with each sample before it is read
        labels: bool = False,  # refuse what is no label; else it is -1
    ) -> None:
        self.dataset, self.transform, self.seed = dataset, transform, seed
        self.replacing, self.decode_once = replacing, decode_once
        self.note, self.labels = note, labels

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitems__(self, indices: Sequence[SampleKey | int]) -> list[Sample | Fault]:
        """Fetch a batch by keys, or by numbers of samples; faults unless they are replaced."""
        keys = [SampleKey(0, key, 0) if isinstance(key, int) else key for key in indices]
        if self.seed is None:
            return [self._sample(key, {}) for key in keys]
        decoded: dict[int, tuple[Any, ...]] = {}
        with preserved_rng():  # so that loading in the main process gives the same samples
            return [self._sample(key, decoded) for key in keys]

    def name(self, index: int) -> str:
        """Name a sample by its file, or else its number."""
        filename = getattr(self.dataset, "filename", None)
        return f"sample {index}" if filename is None else writable(str(filename(index)))

    def _sample(self, key: SampleKey, decoded: dict[int, tuple[Any, ...]]) -> Sample | Fault:
        if self.note is not None:
            self.note(key.sample)
        self._seed(key)
        if key.sample in decoded:
            image, label = decoded[key.sample]
            return self.transform(image, label, key.sample)
        image, label, faults = self._read_or_replace(key)
        if faults and self.replacing is None:
            return faults[0]
        if self.decode_once:
            decoded[key.sample] = image, label
            self._seed(key)  # what reading drew is not drawn for the other copies
        return self.transform(image, label, key.sample, faults)

    def _seed(self, key: SampleKey) -> None:
        if self.seed is not None:
            seed_cpu(derive_seed("sample", self.seed, *key))

    def _read_or_replace(self, key: SampleKey) -> tuple[Any, Any, tuple[Fault, ...]]:
        """Image, label, and what could not be read; the same for all copies of a sample."""
        index = key.sample
        faults: list[Fault] = []
        for attempt in range(1, REPLACEMENTS + 2):
            try:
                image, label = self.dataset[index]
                return self.transform.decode(image), self._number(label, index), tuple(faults)
            except UNREADABLE as error:
                faults.append(Fault(index, self.name(index), reason_of(error)))
            if self.replacing is None:
                return None, None, tuple(faults)
            place = derive_seed("sample", self.replacing, key.epoch, key.sample, 0, attempt)
            index = place % len(self.dataset)
        raise OSError(
            f"data: cannot read {faults[0].name} (sample {key.sample}), nor any of {REPLACEMENTS} "
            f"images tried in its place: {faults[0].reason}"
        )

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
        return NO_LABEL


def train_loader(
    data: DataPair, recipe: Recipe, spec: InputSpec, peers: World = ALONE
) -> DataLoader[Any]:
    """Create the loader of one rank's batches; what cannot be read is replaced.

    Its ``batch_sampler``, of a stream its ``dataset``, is a `Schedule`.
    """
    transform = train_sample_transform(recipe, spec, data)
    notes = WorkerNotes(recipe.workers)
    schedule = {
        "num_samples": recipe.train_samples or len(data.train) if data.streams else len(data.train),
        "batch_size": slice_size(recipe, peers.size),
        "seed": recipe.seed,
        "accumulation": recipe.accumulation,
        "rank": peers.rank,
        "world_size": peers.size,
    }
    dataset: SampleDataset | TrainStream
    batching: dict[str, Any]
    if data.streams:
        _check_stream(data.train, recipe, peers)
        dataset = TrainStream(data.train, transform, notes.note, **schedule)
        batching = {"batch_size": schedule["batch_size"]}
    else:
        at_once = recipe.augment == "gpu"  # copies of an image are decoded once
        dataset = SampleDataset(
            data.train,
            transform,
            None if recipe.augment == "none" else recipe.seed,
            replacing=recipe.seed,
            decode_once=at_once,
            note=notes.note,
            labels=recipe.labels,
        )
        sampler = TrainBatchSampler(**schedule, repeats=recipe.repeated_aug, together=at_once)
        batching = {"batch_sampler": sampler}
    bound = (recipe.num_classes or data.num_classes or ANY_CLASS) if recipe.labels else None
    stack = Collate(spec if data.yields_tensors else None, bound)
    return _Loader(dataset, stack, notes, peers, **batching)


def eval_loader(
    data: DataPair, recipe: Recipe, spec: InputSpec, peers: World = ALONE
) -> DataLoader[Any]:
    """Create the loader of this rank's share of the evaluation set, no sample twice.

    A batch's ``faults`` list what cannot be read, and is not in it.
    """
    notes = WorkerNotes(recipe.workers)
    dataset: SampleDataset | EvalStream
    if data.streams:
        transform = eval_sample_transform(recipe, spec, data)
        dataset = EvalStream(data.val, transform, notes.note, peers.rank, peers.size)
        sampler = None
    else:
        dataset = eval_samples(data, recipe, spec)
        dataset.note, dataset.labels = notes.note, data.labeled_val
        sampler = range(peers.rank, len(data.val), peers.size)
    bound = (recipe.num_classes or data.num_classes or ANY_CLASS) if data.labeled_val else None
    if data.numbers and bound is not None:
        bound = 1 + max(data.numbers)
    stack = Collate(spec if data.yields_tensors else None, bound, data.numbers)
    return _Loader(dataset, stack, notes, peers, sampler=sampler, batch_size=recipe.eval_batch_size)


def eval_samples(
    data: DataPair, config: DataConfig, spec: InputSpec, seed: int | None = None
) -> SampleDataset:
    """Return the evaluation set as a model takes it in; float tensors are not normalized yet."""
    return SampleDataset(data.val, eval_sample_transform(config, spec, data), seed)


def schedule_of(loader: DataLoader[Any]) -> Schedule:
    """Return what holds an epoch's length and where the next iteration starts."""
    schedule: Any = loader.dataset if isinstance(loader.dataset, Schedule) else loader.batch_sampler
    return schedule


class _Loader(DataLoader[Any]):
    """A dataloader of both kinds; it skips what a resumed stream has used already (None)."""

    def __init__(
        self, dataset: Any, stack: Collate, notes: WorkerNotes, peers: World, **batching: Any
    ) -> None:
        options = loader_options(len(notes.rows), peers.device)
        if isinstance(dataset, IterableDataset):
            options["persistent_workers"] = False  # a position reaches new processes only
        self.notes = notes
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
            *(processes, shards, source, ENOUGH_SHARDS),
        )


class WorkerNotes:
    """The sample that every loader process reads, in memory that outlives the process."""

    def __init__(self, workers: int) -> None:
        self.rows = torch.full((workers, 2), -1, dtype=torch.int64).share_memory_()  # (pid, sample)

    def note(self, sample: int) -> None:
        """Record, in a loader process, which sample is next; does nothing in the main process."""
        worker = get_worker_info()
        if worker is not None:
            self.rows[worker.id, 1] = sample
            self.rows[worker.id, 0] = os.getpid()


def describe_worker_death(loaders: Sequence[Any], error: BaseException) -> str | None:
    """Name the file that a loader process died over; None for another error."""
    if isinstance(error, (ConnectionError, EOFError)):
        # SIGCHLD reaches torch after the process's sockets were closed, and torch's handler raises
        # in the code that runs then: wait for it here.
        try:
            time.sleep(TORCH_SECONDS)
        except RuntimeError as late:
            error = late
    if (found := SHOWN_PIDS.search(str(error))) is None:
        return None
    pids = [int(pid) for pid in found.group(1).split(",")]
    deaths = [
        f"loader process {pid} died over {loader.dataset.name(sample)} (sample {sample})"
        for loader in loaders
        for pid, sample in loader.notes.rows.tolist()
        if pid in pids
    ]
    return f"data: {'; '.join(deaths)}" if deaths else None


def default_workers() -> int:
    """Up to four loader processes, as many as there are CPUs: torch warns of more."""
    return min(4, len(os.sched_getaffinity(0)))


def loader_options(workers: int, device: torch.device) -> dict[str, Any]:
    """Return the options of every `DataLoader`; an iteration draws from no global generator."""
    return {
        "num_workers": workers,
        "multiprocessing_context": _LoaderContext() if workers > 0 else None,
        "pin_memory": device.type == "cuda",
        "persistent_workers": workers > 0,
        "worker_init_fn": _ignore_signals,
        "generator": torch.Generator(),  # its own: the global one would be drawn from at the start
    }


def _ignore_signals(_: int) -> None:
    # torchrun, SLURM and a terminal's Ctrl-C signal all processes, but the main process needs its
    # loader to finish the update after which all ranks stop.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(END, lambda *_: os._exit(0))


class _Killable(popen_fork.Popen):
    def terminate(self) -> None:  # multiprocessing sends SIGTERM, which is ignored
        os.kill(self.pid, END)  # torch raises an error for a process that dies by a signal
        if self.wait(END_SECONDS) is None:
            self.kill()


class _LoaderProcess(ForkProcess):
    _Popen = staticmethod(_Killable)


class _LoaderContext(ForkContext):
    Process = _LoaderProcess
