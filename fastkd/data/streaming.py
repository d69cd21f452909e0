"""Datasets that are read from their beginning: WebDataset shards at an address, hub streams.

Resuming a stream reads and decodes the used part of its epoch again. It then gives the samples of
an uninterrupted run, with as many processes and loader processes as before; else it is refused.
"""

from __future__ import annotations

import os
import random
import shlex
import tarfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count, groupby
from typing import Any

from PIL import ExifTags, Image, ImageOps
from torch.utils.data import IterableDataset, get_worker_info

from fastkd.data.files import LeftOut, is_hidden, is_inside, tell_left_out
from fastkd.data.folders import SHARD_LISTS, SPLITS, parse_shard_list
from fastkd.data.images import open_image, reason_of
from fastkd.data.readers import (
    NO_SAMPLE,
    Fault,
    Item,
    LostPart,
    StreamSource,
    image_column,
)
from fastkd.data.samplers import Schedule
from fastkd.data.samples import Sample, SampleTransform, WorkerNotes
from fastkd.data.tars import parse_label, samples_of
from fastkd.utils.random import derive_seed, preserved_rng, seed_cpu

SHUFFLE_BUFFER = 4096  # encoded images that a loader process draws from; 110 kB each in ImageNet


class ShardStream(StreamSource):
    """WebDataset shards at an address."""

    def __init__(self, name: str, root: str | None, part: str) -> None:
        address = (root or name.removeprefix("wds/")).rstrip("/")
        splits = _fetch_shard_list(name, address)
        split = _pick_split(name, part, splits)
        files, samples, classes, self.target, names = splits[split]
        shown = name if address in name else f"{name} at {address}"
        if address.startswith("pipe:"):  # a shell reads what follows
            for file in files:
                if shlex.quote(file) != file:
                    raise ValueError(f"data: {name} lists {file!r}, which is no plain file name")
        urls = [f"{address}/{file}" for file in files]
        super().__init__(shown, split, samples, classes or None, urls, names)
        self.told = False  # what is left out of it

    def items(self, rank: int, world_size: int, seed: int | None) -> Iterator[Item | Fault]:
        """Split by shard; evaluation on more ranks than shards by sample."""
        import webdataset

        worker, workers = loader_process()
        urls = list(self.urls)
        if seed is not None:
            random.Random(seed).shuffle(urls)
        by_sample = seed is None and len(urls) < world_size
        urls = (urls if by_sample else urls[rank::world_size])[worker::workers]
        if not urls:
            return
        faults: list[Fault] = []
        samples = self._samples(urls, faults)
        if seed is not None:
            rng = random.Random(derive_seed("stream", seed, rank, worker))
            shuffle = webdataset.shuffle(SHUFFLE_BUFFER, initial=SHUFFLE_BUFFER // 2, rng=rng)
            samples = shuffle(samples)
        for number, (name, image, label) in enumerate(samples):
            yield from faults
            faults.clear()
            if not by_sample or number % world_size == rank:
                yield name, partial(self._load, name, image, label)
        yield from faults

    def _samples(self, urls: Sequence[str], faults: list[Fault]) -> Iterator[tuple[Any, ...]]:
        """Yield (name, image, label) encoded, None for what a sample lacks, as `list_shard` does.

        Members of a sample are those in a row whose names are equal up to the first dot.
        """
        for url in urls:
            left_out = LeftOut()
            try:
                for _, group in groupby(self._members(url, left_out), _first_key):
                    members: dict[str, bytes] = {}
                    for name, content in group:
                        if name in members:
                            faults.append(Fault(NO_SAMPLE, f"{url}:{name}", "is there twice"))
                        members.setdefault(name, content)
                    for key, (image, fields) in samples_of(members, url, left_out).items():
                        label = fields.get("cls" if self.target is None else "json")
                        if image or label:
                            yield f"{url}:{key}", members.get(image or ""), members.get(label or "")
            except Exception as error:  # of the fetching process, or a broken archive
                faults.append(LostPart(NO_SAMPLE, url, reason_of(error)))
            if str(left_out) and not self.told:  # one line, not one for each shard
                self.told = True
                tell_left_out(url, left_out)

    def _members(self, url: str, left_out: LeftOut) -> Iterator[tuple[str, bytes]]:
        import webdataset

        stream = webdataset.gopen(url)
        with tarfile.open(fileobj=stream, mode="r|*") as archive:
            for info in archive:
                archive.members = []  # type: ignore[attr-defined] # which grow with the archive
                if info.isreg() and not is_hidden(info.name):
                    yield info.name, archive.extractfile(info).read()  # type: ignore[union-attr]
                elif not info.isreg() and not info.isdir() and not is_hidden(info.name):
                    left_out.add(LeftOut.IRREGULAR, f"{url}:{info.name}")

    def _load(self, name: str, image: bytes | None, label: bytes | None) -> tuple[Any, Any] | None:
        if image is None:
            raise OSError("no image")
        if label is None:
            raise OSError("no label")
        number = parse_label(label, self.target, name, self.num_classes or 0)
        # A target below zero marks images of other splits.
        if self.target is not None and number is None:
            return None
        return open_image(image), number


def _first_key(member: tuple[str, bytes]) -> str:
    folder, slash, file = member[0].rpartition("/")
    return folder + slash + file.partition(".")[0]


class HubStream(StreamSource):
    """A dataset of Hugging Face's hub."""

    def __init__(self, name: str, root: str | None, part: str) -> None:
        import datasets

        place = name.removeprefix("hfids/")
        splits = datasets.load_dataset(place, cache_dir=root, streaming=True)
        split = _pick_split(name, part, splits)
        stream = splits[split]
        columns = stream.features or {}
        if "label" not in columns:
            raise ValueError(
                f"data: {name} has no column 'label', but {list(columns)}; what streams must have "
                f"labels"
            )
        self.image = image_column(name, columns)
        # Of a data set on this machine; `datasets` names files behind links to it, or before them.
        self.folders = place, os.path.realpath(place)
        stated = (stream.info.splits or {}).get(split)
        classes = getattr(columns["label"], "num_classes", None)
        names = getattr(columns["label"], "names", None) or ()
        samples = getattr(stated, "num_examples", None) or None
        super().__init__(name, split, samples, classes, classes=names)
        # Decoded one by one, so that an image that cannot be read does not end the stream.
        encoded = datasets.Image(decode=False)
        self.stream = stream.select_columns([self.image, "label"]).cast_column(self.image, encoded)

    def items(self, rank: int, world_size: int, seed: int | None) -> Iterator[Item | Fault]:
        """Split by file, or by sample among ranks that do not divide the files."""
        from datasets.distributed import split_dataset_by_node

        stream = self.stream
        if seed is not None:
            stream = stream.shuffle(seed=seed, buffer_size=SHUFFLE_BUFFER)
        for row in split_dataset_by_node(stream, rank, world_size):
            image = row[self.image] or {}
            file = image.get("path") or "image"
            if image.get("bytes"):  # then the path need not be of one image alone
                file += f" {zlib.crc32(image['bytes']):08x}"
            yield f"{file} of {self}", partial(self._load, row)

    def _load(self, row: dict[str, Any]) -> tuple[Image.Image, Any]:
        from datasets.utils.file_utils import xopen

        found = row[self.image]
        if found is None:
            raise OSError("no image")
        content = found["bytes"]
        # In "zip://a.png::/data/b.zip" the last part is the file.
        file = str(found["path"]).split("::")[-1].removeprefix("file://")
        local = content is None and "://" not in file
        if local and not any(is_inside(file, folder) for folder in self.folders):
            raise OSError(f"{file} is outside the data set's folder")
        if content is None and "://" in found["path"]:
            with xopen(found["path"], "rb") as opened:
                content = opened.read()
        image = open_image(content or found["path"])
        if ExifTags.Base.Orientation in image.getexif():  # turned, as datasets does
            image = ImageOps.exif_transpose(image)
        return image, row["label"]


def _fetch_shard_list(name: str, address: str) -> dict[str, Any]:
    import webdataset

    errors = []
    for place in (f"{address}/{file}" for file in SHARD_LISTS):
        try:
            with webdataset.gopen(place) as stream:
                text = stream.read()
        except (OSError, ValueError) as error:
            errors.append(error)
        else:
            return parse_shard_list(text, place)
    raise ValueError(f"data: {name} has no {' or '.join(SHARD_LISTS)}: {errors[0]}") from errors[0]


def _pick_split(name: str, part: str, splits: Mapping[str, Any]) -> str:
    names = SPLITS[part]
    if found := [split for split in names if split in splits]:
        return found[0]
    raise ValueError(f"data: {name} has no split {' or '.join(names)}, but {list(splits)}")


def loader_process() -> tuple[int, int]:
    """(number, count) of this loader process; the main process is one of one."""
    worker = get_worker_info()
    return (0, 1) if worker is None else (worker.id, worker.num_workers)


class TrainStream(Schedule, IterableDataset[Any]):
    """The samples of one rank's slices, which its loader processes take in turn.

    An epoch is as long as a pass over the data, but not a pass: shards are dealt out anew to the
    processes in every epoch, and each draws as many samples as the others. A process with fewer
    shards goes on with a second pass; one with more leaves some unread. None stands for samples
    before the position. ``schedule`` are the arguments of `Schedule`.
    """

    def __init__(
        self, source: StreamSource, transform: SampleTransform, notes: WorkerNotes, **schedule: Any
    ) -> None:
        super().__init__(**schedule, of=f"an epoch of {source}")
        self.source = source
        self.transform = transform
        self.notes = notes

    def name(self, sample: int) -> str:
        """Name a sample by its position in the epoch."""
        return f"position {sample} of an epoch of {self.source}"

    def __iter__(self) -> Iterator[Sample | None]:
        worker, workers = loader_process()
        samples, position = self._samples(worker, workers), count()
        first = self.update * self.accumulation
        for number in range(worker, self.updates_per_epoch * self.accumulation, workers):
            for place in range(self.batch_size):
                index = (number * self.batch_size + place) * self.world_size + self.rank
                self.notes.note(index)
                read = next(samples)
                seed = (self.seed, self.epoch, self.rank, worker, next(position))
                yield None if number < first else self._transformed(index, read, seed)

    def _transformed(self, index: int, read: Any, seed: tuple[int, ...]) -> Sample:
        image, label, faults = read
        with preserved_rng():
            seed_cpu(derive_seed("stream", *seed))
            return self.transform(image, label, index, faults)

    def _samples(self, worker: int, workers: int) -> Iterator[tuple[Any, Any, tuple[Fault, ...]]]:
        """Yield decoded samples without end, each with what could not be read before it."""
        faults: list[Fault] = []
        for reading in count():
            empty = True
            seed = derive_seed("stream", self.seed, self.epoch, reading)
            for read in self.source.read(self.transform.decode, self.rank, self.world_size, seed):
                if isinstance(read, Fault):
                    faults.append(read)
                    continue
                empty = False
                yield *read, tuple(dict.fromkeys(faults))
                faults.clear()
            if empty:
                last = f"; the last is {faults[-1].name}: {faults[-1].reason}" if faults else ""
                raise ValueError(
                    f"data: loader process {worker + 1} of {workers} on rank {self.rank} of "
                    f"{self.world_size} got no samples from {self.source}: too few shards for so "
                    f"many processes (set workers), or none of its samples can be read{last}"
                )


@dataclass(eq=False)
class EvalStream(IterableDataset[Any]):
    """One rank's share of a dataset, with a fault for every sample that cannot be read.

    A part that cannot be read is an OSError: nobody knows how many samples are missing.
    """

    source: StreamSource
    transform: SampleTransform
    notes: WorkerNotes
    rank: int
    world_size: int

    def name(self, sample: int) -> str:
        """Name a sample by its place among those of one loader process."""
        return f"the sample behind {sample} others that the process read of {self.source}"

    def __iter__(self) -> Iterator[Sample | Fault]:
        samples = self.source.read(self.transform.decode, self.rank, self.world_size)
        for position in count():
            self.notes.note(position)
            read = next(samples, None)
            if read is None:
                return
            if isinstance(read, LostPart):
                raise OSError(f"data: cannot read {read.name}: {read.reason}")
            yield read if isinstance(read, Fault) else self.transform(*read)
