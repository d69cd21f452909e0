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
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count, groupby
from typing import Any

from PIL import ExifTags, Image, ImageOps
from torch.utils.data import IterableDataset, get_worker_info

from fastkd.data.batches import Fault, Sample, SampleTransform
from fastkd.data.classes import LabelError, class_number
from fastkd.data.image_files import (
    LeftOut,
    is_hidden,
    is_inside,
    open_image,
    reason_of,
    warn_left_out,
)
from fastkd.data.samplers import Schedule
from fastkd.data.tars import SHARD_LISTS, SPLITS, parse_label, parse_shard_list, samples_of
from fastkd.utils.io import writable
from fastkd.utils.random import derive_seed, preserved_rng, seed_cpu

SHUFFLE_BUFFER = 4096  # encoded images that a loader process draws from; 110 kB each in ImageNet
NO_SAMPLE = -1  # the index of what a stream skips


class LostPart(Fault):
    """A part of a stream, with any number of samples, that cannot be read."""


Item = tuple[str, Callable[[], tuple[Any, Any]]]  # a name, and what opens (image, label)


@dataclass(eq=False)
class StreamSource:
    """A split of a dataset that is read from its beginning."""

    name: str
    split: str
    num_samples: int | None  # as the dataset states it
    num_classes: int | None  # as the dataset states it
    urls: Sequence[str] = ()  # of shards, if there are any
    classes: Sequence[str] = ()  # names by label, as far as the dataset states them

    def __len__(self) -> int:
        if self.num_samples is None:
            raise ValueError(
                f"data: {self} does not state how many samples it has: set train_samples"
            )
        return self.num_samples

    def __str__(self) -> str:
        return f"{self.name} (split {self.split})"

    def __getitem__(self, index: int) -> Any:
        raise ValueError(
            f"data: {self} streams its samples, but they are needed by number here: use a folder, "
            f"tars, shards on this machine or hfds/"
        )

    def items(self, rank: int, world_size: int, seed: int | None) -> Iterator[Item | Fault]:
        """Yield a loader process's share of a pass; in order, and disjoint, without a seed."""
        raise NotImplementedError

    def read(
        self, decode: Callable[[Any], Any], rank: int, world_size: int, seed: int | None = None
    ) -> Iterator[tuple[Any, Any] | Fault]:
        """Yield a loader process's share of a pass: (decoded image, label), or a fault."""
        for item in self.items(rank, world_size, seed):
            if isinstance(item, Fault):
                yield item
                continue
            name, load = item
            try:
                image, label = load()
                image = decode(image)
            except LabelError:
                raise
            except Exception as error:  # as in `ReadableImages`
                yield Fault(NO_SAMPLE, writable(name), reason_of(error))
            else:
                yield image, class_number(label, writable(name))


class ShardStream(StreamSource):
    """WebDataset shards at an address."""

    def __init__(self, name: str, root: str | None, part: str) -> None:
        address = (root or name.removeprefix("wds/")).rstrip("/")
        splits = _fetch_shard_list(name, address)
        split = _pick_split(name, part, splits)
        listed = splits[split]
        if address.startswith("pipe:"):  # a shell reads what follows
            for file in listed.files:
                if shlex.quote(file) != file:
                    raise ValueError(f"data: {name} lists {file!r}, which is no plain file name")
        shown = name if address in name else f"{name} at {address}"
        urls = [f"{address}/{file}" for file in listed.files]
        super().__init__(shown, split, listed.samples, listed.classes or None, urls, listed.names)
        self.warned = False  # of what is left out

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
        """Yield (name, image, label) encoded, None for what a sample lacks.

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
                        label = fields.get("cls")
                        if image or label:
                            yield f"{url}:{key}", members.get(image or ""), members.get(label or "")
            except Exception as error:  # of the fetching process, or a broken archive
                faults.append(LostPart(NO_SAMPLE, url, reason_of(error)))
            if str(left_out) and not self.warned:  # one line, not one for each shard
                self.warned = True
                warn_left_out(url, left_out)

    def _members(self, url: str, left_out: LeftOut) -> Iterator[tuple[str, bytes]]:
        import webdataset

        stream = webdataset.gopen(url)
        with tarfile.open(fileobj=stream, mode="r|*") as archive:
            for info in archive:
                archive.members = []  # type: ignore[attr-defined] # which grow with the archive
                if is_hidden(info.name) or info.isdir():
                    continue
                if info.isreg():
                    yield info.name, archive.extractfile(info).read()  # type: ignore[union-attr]
                else:
                    left_out.add(LeftOut.IRREGULAR, f"{url}:{info.name}")

    def _load(self, name: str, image: bytes | None, label: bytes | None) -> tuple[Any, Any]:
        if image is None or label is None:
            raise OSError("no image" if image is None else "no label")
        return open_image(image), parse_label(label, name, self.num_classes or 0)


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
                f"data: {name} has no column 'label', but {list(columns)}; streams must have labels"
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


def image_column(name: str, features: Mapping[str, Any]) -> str:
    """Return the column ``image`` of a hub's dataset, or else its first one of images."""
    columns = [column for column, kind in features.items() if type(kind).__name__ == "Image"]
    if not columns:
        raise ValueError(f"data: {name} has no column of images, but {list(features)}")
    return "image" if "image" in columns else columns[0]


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
    if found := [split for split in SPLITS[part] if split in splits]:
        return found[0]
    raise ValueError(f"data: {name} has no split {' or '.join(SPLITS[part])}, but {list(splits)}")


def loader_process() -> tuple[int, int]:
    """(number, count) of this loader process; the main process is one of one."""
    worker = get_worker_info()
    return (0, 1) if worker is None else (worker.id, worker.num_workers)


class TrainStream(Schedule, IterableDataset[Any]):
    """The samples of one rank's slices, which its loader processes take in turn.

    An epoch is as long as a pass over the data, but not a pass: in every epoch shards are dealt out
    anew, and each process draws as many samples as the others, of its shards once more if they are
    few. None stands for samples before the position.
    """

    def __init__(
        self,
        source: StreamSource,
        transform: SampleTransform,
        note: Callable[[int], None],  # is called with each sample before it is read
        **schedule: Any,  # of `Schedule`
    ) -> None:
        super().__init__(**schedule, of=f"an epoch of {source}")
        self.source, self.transform, self.note = source, transform, note

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
                self.note(index)
                image, label, faults = next(samples)
                where = self.epoch, self.rank, worker, next(position)
                if number < first:
                    yield None
                    continue
                with preserved_rng():
                    seed_cpu(derive_seed("stream", self.seed, *where))
                    sample = self.transform(image, label, index, faults)
                yield sample

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
    """One rank's share of a dataset, with a fault for every sample that cannot be read."""

    source: StreamSource
    transform: SampleTransform
    note: Callable[[int], None]  # is called with each sample before it is read
    rank: int
    world_size: int

    def name(self, sample: int) -> str:
        """Name a sample by its place among those of one loader process."""
        return f"the sample behind {sample} others that the process read of {self.source}"

    def __iter__(self) -> Iterator[Sample | Fault]:
        samples = self.source.read(self.transform.decode, self.rank, self.world_size)
        for position in count():
            self.note(position)
            read = next(samples, None)
            if read is None:
                return
            if isinstance(read, LostPart):  # of an unknown number of samples
                raise OSError(f"data: cannot read {read.name}: {read.reason}")
            yield read if isinstance(read, Fault) else self.transform(*read)
