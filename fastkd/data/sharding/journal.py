"""Which shards are whole: kept beside them while they are written, and found again afterwards.

Knows a folder and what was told of it; neither images nor archives' content.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fastkd.data.datasets import open_data
from fastkd.data.folders import UNFINISHED, VALIDATION_FOLDERS
from fastkd.data.readers import ReadableImages
from fastkd.data.sharding.progress import shown
from fastkd.data.tars import TarImages
from fastkd.utils.io import remove_leftovers, write_text
from fastkd.utils.random import derive_seed

INFO = "_info.json"
LOCK_SECONDS = 3.0  # processes that convert hold the lock a moment longer than one that was killed


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other processes of the same kind out of a folder, where its file system can.

    Args:
        folder: made if it is not there.

    Raises:
        RuntimeError: another process is in it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        _lock(descriptor, folder)
        yield
    finally:
        with contextlib.suppress(OSError):  # for forked processes, too, which closing is not
            fcntl.flock(descriptor, fcntl.LOCK_UN)
        os.close(descriptor)


def _lock(descriptor: int, folder: Path) -> None:
    deadline = time.monotonic() + LOCK_SECONDS
    while True:
        try:
            return fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            if time.monotonic() > deadline:
                raise RuntimeError(
                    f"shard: destination: another process is writing shards to {folder}"
                ) from error
            time.sleep(0.1)
        except OSError:  # a file system without locks
            return None


class Shard(NamedTuple):
    """One finished shard.

    Attributes:
        name: its file's.
        start: first place of its images in the split's order.
        stop: the place behind the last.
        samples: images in it.
        size: bytes.
        unreadable: (number, reason) of images between its places that are not in it.
    """

    name: str
    start: int
    stop: int
    samples: int
    size: int
    unreadable: list[tuple[int, str]]


@dataclass
class Journal:
    """What is done of a plan.

    Attributes:
        folder: the shards'.
        identity: of the plan.
        shards: those that are whole, by split.
        finished: whether all are, and ``_info.json`` says so.
    """

    folder: Path
    identity: dict[str, Any]
    shards: dict[str, list[Shard]] = field(default_factory=dict)
    finished: bool = False

    @classmethod
    def opened(cls, folder: Path, plan: Plan) -> Journal:
        """The journal of a folder; a new one where the folder is empty.

        Args:
            folder: is there; nobody else writes into it.
            plan: what is to be in it.

        Raises:
            ValueError: the folder holds something else.
        """
        journal = cls(folder, plan.identity(), {split.name: [] for split in plan.splits})
        kept = _kept(folder)
        if kept is None:
            if not all(_is_first_write(path) for path in folder.iterdir()):
                raise ValueError(
                    f"shard: destination: {folder} holds something else than shards; name a new "
                    f"folder"
                )
            remove_leftovers(folder)
            journal.write()
            return journal
        _refuse_another(folder, kept["identity"], journal.identity)
        remove_leftovers(folder)
        for name, shards in kept["shards"].items():
            journal.shards[name] = _whole(folder, [Shard(*shard) for shard in shards])
        complete = all(journal.done(split.name) == len(split.files) for split in plan.splits)
        journal.finished = complete and (folder / INFO).exists()
        return journal

    @property
    def images(self) -> int:
        """Images that are done with, of all splits."""
        return sum(self.done(name) for name in self.shards)

    def done(self, split: str) -> int:
        """Places of a split's order that are done with.

        Args:
            split: its name.
        """
        return self.shards[split][-1].stop if self.shards[split] else 0

    def add(self, split: str, shard: Shard) -> None:
        """Take note of a shard that is in its place.

        Args:
            split: its name.
            shard: the next of it.
        """
        self.shards[split].append(shard)
        self.write()

    def extend(self, split: str, unreadable: list[tuple[int, str]]) -> None:
        """Take note of images behind the last shard, none of which can be read.

        Args:
            split: its name; it has a shard.
            unreadable: (number, reason) of each.
        """
        last = self.shards[split][-1]
        self.shards[split][-1] = last._replace(
            stop=last.stop + len(unreadable), unreadable=[*last.unreadable, *unreadable]
        )
        self.write()

    def write(self) -> None:
        """Bring the file up to date."""
        write_text(self.folder / UNFINISHED, json.dumps(self.content()))

    def close(self) -> None:
        """Take the file away: all shards are whole."""
        (self.folder / UNFINISHED).unlink(missing_ok=True)

    def content(self) -> dict[str, Any]:
        """What the file holds; afterwards, a part of ``_info.json``."""
        return {"identity": self.identity, "shards": self.shards}

    def unreadable(self, plan: Plan) -> list[tuple[str, str]]:
        """(file, reason) of all images that could not be read, in the order of the source.

        Args:
            plan: of which this is the journal.
        """
        return [
            (split.files[number], reason)
            for split in plan.splits
            for number, reason in sorted(
                (number, reason)
                for shard in self.shards[split.name]
                for number, reason in shard.unreadable
            )
        ]


def _kept(folder: Path) -> Any:
    for name, inner in ((UNFINISHED, None), (INFO, "fastkd")):
        try:
            content = json.loads((folder / name).read_text())
            kept = content if inner is None else content[inner]
            return kept if {"identity", "shards"} <= set(kept) else None
        except FileNotFoundError:
            continue
        except (ValueError, KeyError, TypeError):
            return None
    return None


def _is_first_write(path: Path) -> bool:
    """Whether a file is what a process killed in writing the first journal has left."""
    return path.name.startswith(f".{UNFINISHED}.") and path.suffix == ".tmp"


def _refuse_another(folder: Path, kept: dict[str, Any], asked: dict[str, Any]) -> None:
    different = [name for name in asked if kept.get(name) != asked[name]]
    if not different:
        return
    told = ", ".join(
        "other images" if name == "source" else f"{name} {kept.get(name)}, not {asked[name]}"
        for name in different
    )
    raise ValueError(f"shard: destination: {folder} has shards of another run: {told}")


def _whole(folder: Path, shards: list[Shard]) -> list[Shard]:
    """Those before the first that is not there as it was written."""
    for number, shard in enumerate(shards):
        path = folder / shard.name
        if not path.is_file() or path.stat().st_size != shard.size:
            return shards[:number]
    return shards


@dataclass(frozen=True)
class Options:
    """What decides the bytes of the shards; as `fastkd.data.shards.shard` describes it.

    Raises:
        ValueError: a value out of range.
    """

    short_side: int | None
    quality: int
    shard_size: float | None
    samples_per_shard: int | None
    seed: int

    def __post_init__(self) -> None:
        for name, least in (("short_side", 1), ("samples_per_shard", 1), ("seed", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"shard: {name} must be at least {least}, got {value}")
        if not 1 <= self.quality <= 95:
            raise ValueError(f"shard: quality must be 1 to 95, got {self.quality}")
        if self.shard_size is not None and self.shard_size <= 0:
            raise ValueError(f"shard: shard_size must be above 0 MB, got {self.shard_size}")


class Split(NamedTuple):
    """Images of one split.

    Attributes:
        name: ``"train"`` or ``"validation"``.
        files: sorted; an image's number in this list is its key.
        labels: of each; None without.
        order: in which they are written.
    """

    name: str
    files: list[str]
    labels: list[int] | None
    order: np.ndarray


@dataclass(frozen=True)
class Plan:
    """All that is decided before the first image is converted.

    Attributes:
        root: the source.
        splits: of the source.
        classes: their names by number; empty without labels.
        options: of the shards.
        fingerprint: a hash of the files' names and sizes, and of their labels.
    """

    root: Path
    splits: list[Split]
    classes: list[str]
    options: Options
    fingerprint: str

    @classmethod
    def of(cls, source: Path, options: Options, quiet: bool) -> Plan:
        """Look at a source.

        Args:
            source: folder of images.
            options: of the shards.
            quiet: show no progress.

        Raises:
            ValueError: no such folder, or no images in it.
        """
        if not source.is_dir():
            raise ValueError(f"shard: source: no folder {str(source)!r}")
        sets = _image_sets(source)
        splits = [
            _split(source, name, dataset, derive_seed("order", options.seed, number))
            for number, (name, dataset) in enumerate(sets.items())
        ]
        fingerprint = _fingerprint(source, splits, quiet)
        return cls(source, splits, _classes(sets), options, fingerprint)

    @property
    def images(self) -> int:
        """Images of all splits."""
        return sum(len(split.files) for split in self.splits)

    def identity(self) -> dict[str, Any]:
        """Tells whether shards are of the same source and options."""
        return {"version": 1, "source": self.fingerprint, **asdict(self.options)}


def _image_sets(source: Path) -> dict[str, ReadableImages]:
    """The splits of a folder, by name; a folder that has none is one."""
    in_parts = (source / "train").is_dir()
    pair = open_data(source, need_train=in_parts, labels=False)
    val_only = any((source / name).is_dir() for name in VALIDATION_FOLDERS)
    evaluates = in_parts or val_only or source.resolve().name in VALIDATION_FOLDERS
    sets = {"train": pair.train, "validation" if evaluates else "train": pair.val}
    found = {name: dataset for name, dataset in sets.items() if dataset is not None}
    if any(isinstance(dataset.reader, TarImages) for dataset in found.values()):
        raise ValueError(f"shard: source: {source} holds tars, not image files")
    return found


def _split(source: Path, name: str, dataset: ReadableImages, seed: int) -> Split:
    samples = dataset.reader.samples
    return Split(
        name,
        [os.path.relpath(path, source) for path, _ in samples],
        [label for _, label in samples] if dataset.labelled else None,
        np.random.default_rng(seed).permutation(len(samples)),
    )


def _classes(sets: dict[str, ReadableImages]) -> list[str]:
    for dataset in sets.values():
        if dataset.labelled:
            numbers = dataset.reader.class_to_idx
            return sorted(numbers, key=numbers.__getitem__)
    return []


def _fingerprint(source: Path, splits: Sequence[Split], quiet: bool) -> str:
    digest = hashlib.sha256()
    for split in splits:
        labels: Sequence[int | None] = split.labels or [None] * len(split.files)
        files = shown(split.files, f"listing {split.name}", "file", quiet)
        for name, label in zip(files, labels, strict=True):
            size = (source / name).stat().st_size
            # Names of files are any bytes, which Python keeps as surrogates.
            line = f"{split.name}\0{name}\0{size}\0{label}\n"
            digest.update(line.encode(errors="surrogateescape"))
    return digest.hexdigest()
