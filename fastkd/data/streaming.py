"""Batches of datasets that can only be read from their beginning, by timm's streaming readers.

An epoch is as many samples as a pass over the data has, but not a pass: shards are dealt out anew
to the processes at every epoch, and each draws as many samples as the others. One with fewer
shards reads some of them again, one with more leaves some unread. A resumed run reads the used part
of its epoch again, and continues exactly with as many ranks and workers as it began with.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import count, islice
from typing import Any

import torch
from PIL import UnidentifiedImageError
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from fastkd.config import Recipe
from fastkd.data.datasets import DataPair
from fastkd.data.readers import StreamSource
from fastkd.data.samplers import Schedule, slice_size
from fastkd.data.samples import (
    Batch,
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
from fastkd.utils.random import derive_seed, preserved_rng, seed_cpu

Tell = Callable[[str, str], None]  # (name, reason)

logger = logging.getLogger("fastkd")
NO_SAMPLE = -1  # what was passed over has no position
ENOUGH_SHARDS = 8  # for each process, so that their shares of an epoch are about even
_Placed = tuple[int, tuple[Any, Any]]  # position in its process' part of the epoch, (image, label)


class TrainStream(Schedule, IterableDataset[Any]):
    """The slices of one rank's updates, shared out in turn to its loader processes.

    The position is where the *next* iteration starts. Processes before the one whose turn it is
    then yield None first, for a loader asks the first process first. What timm's reader of
    WebDataset passes over is told in the ``faults`` of the process' next batch.

    Args:
        source: the data set.
        transform: (image, label) -> `Sample`.
        stack: samples -> `Batch`.
        num_samples: of an epoch over all ranks, as far as they fill updates.
        batch_size: samples per rank and slice.
        accumulation: slices per update.
        seed: the run's seed.
        rank: this process.
        world_size: number of processes.
        notes: where loader processes note what they are working on; None for nowhere.

    Raises:
        ValueError: an epoch is shorter than one update, or timm's reader refuses the source.
    """

    def __init__(
        self,
        source: StreamSource,
        transform: SampleTransform,
        stack: Any,
        *,
        num_samples: int,
        batch_size: int,
        accumulation: int = 1,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        notes: WorkerNotes | None = None,
    ) -> None:
        super().__init__(
            num_samples,
            batch_size,
            seed=seed,
            accumulation=accumulation,
            rank=rank,
            world_size=world_size,
            of=f"an epoch of {source}",
        )
        self.source = source
        self.notes = notes
        self.transform = transform
        self.stack = stack
        self.reader = source.reader(
            training=True,
            num_samples=num_samples,
            batch_size=batch_size,
            seed=derive_seed("stream", seed),
        )
        _place(self.reader, rank, world_size)

    @property
    def origin(self) -> tuple[int, int, int]:
        """(seed, epoch, rank): what the next iteration's random numbers derive from."""
        return self.seed, self.epoch, self.rank

    def name(self, sample: int) -> str:
        """What a sample is called by its position in the epoch."""
        return f"position {sample} of an epoch of {self.source}"

    def __iter__(self) -> Iterator[Batch | None]:
        worker, workers = _worker()
        slices = self.updates_per_epoch * self.accumulation
        first = self.update * self.accumulation
        if worker < first % workers:
            yield None
        faults: list[Fault] = []
        samples = self._samples(worker, workers, faults)
        used = range(worker, first, workers)
        for number in used:
            for place in range(self.batch_size):
                self._fetch(samples, self._index(number, place))
        for number in range(worker + len(used) * workers, slices, workers):
            batch = self.stack(
                [
                    self._read(samples, self._index(number, place), worker)
                    for place in range(self.batch_size)
                ]
            )
            yield batch._replace(faults=(*batch.faults, *dict.fromkeys(faults)))
            faults.clear()

    def _index(self, number: int, place: int) -> int:
        """Position in the epoch of a sample of one of this rank's slices."""
        return (number * self.batch_size + place) * self.world_size + self.rank

    def _fetch(self, samples: Iterator[_Placed], index: int) -> _Placed:
        if self.notes is not None:
            self.notes.note(index)
        return next(samples)

    def _read(self, samples: Iterator[_Placed], index: int, worker: int) -> Sample:
        position, (image, label) = self._fetch(samples, index)
        with preserved_rng():
            seed_cpu(derive_seed("stream", *self.origin, worker, position))
            return self.transform(self.transform.decode(image), label, index)

    def _samples(self, worker: int, workers: int, faults: list[Fault]) -> Iterator[_Placed]:
        """Without end: the samples of one loader process; what is passed over joins the faults."""
        reader = self.reader
        # Its shuffling is of this epoch and process alone, whatever was read before.
        reader.ds = None
        reader.set_epoch(self.epoch)
        if get_worker_info() is None:
            reader.worker_seed = derive_seed("stream", *self.origin)
        if self.source.passes_over:
            tell_what_is_passed_over(
                reader, lambda name, reason: faults.append(Fault(NO_SAMPLE, name, reason))
            )
        position = 0
        while True:
            before = position
            for image, label in reader:
                yield position, (image, label)
                position += 1
            if position == before:
                told = f"; the last is {faults[-1].name}: {faults[-1].reason}" if faults else ""
                raise ValueError(
                    f"data: loader process {worker + 1} of {workers} on rank {self.rank} of "
                    f"{self.world_size} got no samples from {self.source}: too few shards for so "
                    f"many processes (set workers), or none of its samples can be read{told}"
                )


class EvalStream(IterableDataset[Any]):
    """One rank's share of a data set, every sample of which is in exactly one rank's share.

    A shard that cannot be fetched and an image that cannot be read are errors, which name it.

    Args:
        source: the data set.
        transform: (image, label) -> `Sample`.
        stack: samples -> `Batch`.
        batch_size: samples per batch; fewer in the last one of every loader process.
        rank: this process.
        world_size: number of processes.
        notes: where loader processes note what they are working on; None for nowhere.
    """

    def __init__(
        self,
        source: StreamSource,
        transform: SampleTransform,
        stack: Any,
        *,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        notes: WorkerNotes | None = None,
    ) -> None:
        self.notes = notes
        self.source = source
        self.transform = transform
        self.stack = stack
        self.batch_size = batch_size
        self.reader = source.reader(training=False, num_samples=source.num_samples or 1)
        self.first, self.step = _share_out(self.reader, source.name, rank, world_size)

    @property
    def origin(self) -> tuple[int, ...]:
        """Nothing here is random."""
        return ()

    def name(self, sample: int) -> str:
        """What a sample is called by its place among those of one loader process."""
        return f"the sample behind {sample} others that the process read of {self.source}"

    def __iter__(self) -> Iterator[Batch]:
        self.reader.ds = None
        if self.source.passes_over:
            tell_what_is_passed_over(self.reader, _refuse)
        samples = map(
            self._transformed, self._noted(islice(self.reader, self.first, None, self.step))
        )
        while chunk := list(islice(samples, self.batch_size)):
            yield self.stack(chunk)

    def _noted(self, share: Iterator[tuple[Any, Any]]) -> Iterator[tuple[Any, Any]]:
        for position in count():
            if self.notes is not None:
                self.notes.note(position)
            pair = next(share, None)
            if pair is None:
                return
            yield pair

    def _transformed(self, pair: tuple[Any, Any]) -> Sample:
        image, label = pair
        return self.transform(self.transform.decode(image), label)


def _refuse(name: str, reason: str) -> None:
    raise OSError(f"data: cannot read {name}: {reason}")


class StreamLoader(DataLoader[Any]):
    """Batches of a stream; its loader processes start anew at every iteration.

    So they know the position, and their readers' shuffling derives from it alone.

    Args:
        stream: yields batches; its position is where the next iteration starts.
        workers: loader processes; 0 reads in this one.
        device: pinned memory is used for an accelerator.

    Attributes:
        stream: as given.
        expected: samples of an evaluation on all ranks together, as the data set states it; None
            where it does not, and of training.
    """

    def __init__(
        self, stream: TrainStream | EvalStream, workers: int, device: torch.device
    ) -> None:
        options = loader_options(workers, device) | {"persistent_workers": False}
        super().__init__(stream, batch_size=None, collate_fn=_as_it_is, **options)
        self.stream = stream
        evaluates = isinstance(stream, EvalStream)
        self.expected = stream.source.num_samples if evaluates else None

    def __iter__(self) -> Any:
        # Loader processes are seeded from it, and timm's readers from them.
        self.generator.manual_seed(derive_seed("stream", *self.stream.origin))
        return (batch for batch in super().__iter__() if batch is not None)


def stream_train_loader(
    data: DataPair,
    recipe: Recipe,
    spec: InputSpec,
    peers: World = ALONE,
) -> StreamLoader:
    """Batches of one rank; its ``dataset`` is a `TrainStream`.

    Shards that cannot be fetched and images that cannot be read are passed over by timm's reader of
    WebDataset and told in the batches' ``faults``; the other readers raise. Warns on rank 0 where
    an epoch is far from a pass over the data.
    """
    if recipe.repeated_aug > 1:
        raise ValueError(
            f"repeated_aug: {recipe.repeated_aug} copies of a sample need data that are read by "
            f"number, but {data.train} streams: set repeated_aug=1, or use shards on this machine"
        )
    if recipe.augment == "dataset":
        raise ValueError(f"augment: 'dataset', but {data.train} augments nothing: cpu, gpu or none")
    stream = TrainStream(
        data.train,
        train_sample_transform(recipe, spec, data),
        collate(data, spec, label_bound(data, recipe.num_classes, recipe.labels)),
        num_samples=recipe.train_samples or len(data.train),
        batch_size=slice_size(recipe, peers.size),
        accumulation=recipe.accumulation,
        seed=recipe.seed,
        rank=peers.rank,
        world_size=peers.size,
        notes=WorkerNotes(recipe.workers),
    )
    if peers.is_main:
        _warn_of_uneven_shares(stream.reader, data.train, peers.size * max(recipe.workers, 1))
    return StreamLoader(stream, recipe.workers, peers.device)


def stream_eval_loader(
    data: DataPair,
    recipe: Recipe,
    spec: InputSpec,
    peers: World = ALONE,
) -> StreamLoader:
    """This rank's share of a streamed evaluation set, no sample twice.

    Ranks share out whole shards, or read everything and take what is theirs where there are fewer
    shards than ranks, or where timm's reader would fill up shares with samples of others.
    """
    stream = EvalStream(
        data.val,
        eval_sample_transform(recipe, spec, data),
        collate(data, spec, label_bound(data, recipe.num_classes, data.labelled_val)),
        batch_size=recipe.eval_batch_size,
        rank=peers.rank,
        world_size=peers.size,
        notes=WorkerNotes(recipe.workers),
    )
    return StreamLoader(stream, recipe.workers, peers.device)


def _warn_of_uneven_shares(reader: Any, source: StreamSource, processes: int) -> None:
    """Say that an epoch repeats and leaves out samples, where it is known to be many."""
    shards = len(getattr(getattr(reader, "split_info", None), "filenames", ()))
    if shards and shards % processes and shards < ENOUGH_SHARDS * processes:
        logger.warning(
            "data: %d processes share the %d shards of %s: in an epoch some samples are read "
            "twice and others not at all; use a number of processes (ranks x workers) that divides "
            "the shards, or at least %d shards for each",
            processes,
            shards,
            source,
            ENOUGH_SHARDS,
        )


def _place(reader: Any, rank: int, world_size: int) -> None:
    """Tell a timm reader which rank it reads for, whatever it found in torch.distributed."""
    reader.dist_rank = rank
    reader.dist_num_replicas = world_size


def _share_out(reader: Any, name: str, rank: int, world_size: int) -> tuple[int, int]:
    """Let a reader of evaluation read no more than needed: (first, step) of what is this rank's."""
    if name.startswith("hfids/"):
        _place(reader, rank, world_size)
        return 0, 1
    # timm's other readers would fill up the ranks' shares with samples that others have.
    _place(reader, 0, 1)
    if name.startswith("wds/") and len(reader.split_info.filenames) >= world_size:
        shards = reader.split_info.filenames[rank::world_size]
        reader.split_info = replace(reader.split_info, filenames=shards)
        return 0, 1
    return rank, world_size


def _worker() -> tuple[int, int]:
    """(number, count) of this loader process; the main process is one of one."""
    worker = get_worker_info()
    return (0, 1) if worker is None else (worker.id, worker.num_workers)


def _as_it_is(batch: Any) -> Any:
    return batch


def tell_what_is_passed_over(reader: Any, tell: Tell) -> None:
    """Let a reader tell of shards that it cannot fetch and samples that it cannot decode."""
    reader._lazy_init()
    handled = [stage for stage in reader.ds.pipeline if "handler" in getattr(stage, "kw", {})]
    if len(handled) != 2:
        raise RuntimeError("data: this timm reads WebDataset in stages that fastkd does not know")
    fetching, decoding = handled
    fetching.kw["handler"] = _Fetching(tell)
    decoding.kw["handler"] = _reraise
    decoding.args = (_Decoding(decoding.args[0], tell), *decoding.args[1:])


class _Fetching:
    """The handler of whatever goes wrong between an address and its samples."""

    def __init__(self, tell: Tell) -> None:
        self.tell = tell

    def __call__(self, error: Exception) -> bool:
        if isinstance(error, TypeError):  # a defect of the code, not of the data
            raise error
        # webdataset puts the address behind what the error says.
        said = [part for part in error.args if isinstance(part, str)]
        address = said.pop() if len(said) > 1 else "a shard"
        self.tell(address, " ".join(said) or type(error).__name__)
        return True


class _Decoding:
    """The decoder of samples; None, which the pipeline leaves out, for those that it cannot."""

    def __init__(self, decode: Callable[[dict[str, Any]], Any], tell: Tell) -> None:
        self.decode = decode
        self.tell = tell

    def __call__(self, sample: dict[str, Any]) -> Any:
        try:
            return self.decode(sample)
        except TypeError:
            raise
        except Exception as error:  # whatever decoders raise
            name = f"{sample.get('__url__')}:{sample.get('__key__')}"
            # Pillow's own words name an address in memory.
            unknown = isinstance(error, UnidentifiedImageError)
            self.tell(name, "no image" if unknown else f"{type(error).__name__}: {error}")
            return None


def _reraise(error: Exception) -> bool:
    raise error
