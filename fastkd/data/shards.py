"""Write a folder of images as WebDataset shards, in worker processes, and resume that."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import io
import json
import multiprocessing
import os
import signal
import tarfile
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from fastkd.data.datasets import open_data
from fastkd.data.folders import UNFINISHED, VALIDATION_FOLDERS
from fastkd.data.readers import PILLOW_ERRORS, ReadableImages, refuse_deep
from fastkd.data.sharding.progress import Progress, shown
from fastkd.data.tars import TarImages, list_members
from fastkd.utils.io import remove_leftovers, replacing, write_text
from fastkd.utils.random import derive_seed

MB = 10**6

_Lost = list[tuple[int, str]]  # (number, reason) of images that cannot be read

UNREADABLE = "unreadable.txt"
SHARD_MB = 64  # small enough that a stream has several shards for each loader process
QUALITY = 90
SHORT_SIDE = 256
FEW_UNREADABLE = 20  # images that may be broken in any source
UNREADABLE_SHARE = 0.01  # of a large source
INFO = "_info.json"
LOCK_SECONDS = 3.0  # processes that convert hold the lock a moment longer than one that was killed
CHUNK = 16  # images that a process converts at a time
# What readers of shards decode, by Pillow's name of the format. MPO: a JPEG and more behind it.
EXTENSIONS = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}


@dataclass(frozen=True)
class ShardReport:
    """What was written.

    Attributes:
        folder: the shards'.
        samples: images in shards, by split.
        shards: number of shards, by split.
        classes: number of classes; 0 without labels.
        size: bytes of all shards.
        unreadable: (file, reason) of images that are in no shard.
        seconds: of this run.
        converted: images of this run.
    """

    folder: Path
    samples: dict[str, int]
    shards: dict[str, int]
    classes: int
    size: int
    unreadable: list[tuple[str, str]]
    seconds: float
    converted: int

    def summary(self) -> str:
        """What a person wants to know, in one line."""
        parts = ", ".join(
            f"{split} {self.samples[split]:,} in {count:,}" for split, count in self.shards.items()
        )
        labels = f" of {self.classes:,} classes" if self.classes else ", unlabelled"
        lost = f"; {len(self.unreadable)} unreadable, see {UNREADABLE}" if self.unreadable else ""
        speed = f"; {self.converted / self.seconds:,.0f} images/s" if self.converted else ""
        return (
            f"{self.folder}: {sum(self.samples.values()):,} images{labels} in "
            f"{sum(self.shards.values()):,} shards ({parts}), {self.size / MB:,.1f} MB, "
            f"verified{lost}{speed}"
        )


def shard(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    *,
    short_side: int | None = SHORT_SIDE,
    quality: int = QUALITY,
    shard_size: float = SHARD_MB,
    samples_per_shard: int | None = None,
    max_unreadable: int | None = None,
    workers: int | None = None,
    seed: int = 0,
    quiet: bool = False,
) -> ShardReport:
    """Write a folder's images as WebDataset shards, which `open_data` and timm read.

    A shard holds ``KEY.jpg`` (or png, webp), ``KEY.cls`` (the class's number, where images have
    one) and ``KEY.json`` (the file it came from); KEY is the image's number in the sorted source.
    ``_info.json`` lists shards, their lengths and the classes' names. Images larger than
    ``short_side`` are resized (bicubic) and stored as JPEG, gray or RGB; their orientation tag is
    kept, so that they look as before to whoever obeys it, and to whoever does not. All others are
    copied byte for byte. Every image is decoded once; those that cannot be are listed in
    ``unreadable.txt``. At the end the shards' headers are read again and counted.

    Started again after an interruption, with the same source and options, it goes on behind the
    last whole shard; the bytes are those of work that was never interrupted.

    Args:
        source: a folder with ``train`` and ``val`` (or ``validation``), or one that holds folders
            of classes, or images alone.
        destination: a folder that is empty or not there, or of the same work interrupted.
        short_side: pixels that the shorter side has at most; None copies every image.
        quality: of the JPEGs, 1 to 95.
        shard_size: in MB (10^6 bytes), a shard is closed when it has as many.
        samples_per_shard: instead of ``shard_size``.
        max_unreadable: broken images that are left out before the work stops; None: 1 % of all,
            at least 20.
        workers: processes that convert; None: one for each core.
        seed: of the order, so that every shard has images of many classes.
        quiet: show no progress.

    Returns:
        What was written.

    Raises:
        ValueError: an option out of range, no images in ``source``, none that can be read in one
            of its splits, or a ``destination`` with other content or of other options.
        RuntimeError: the shards do not hold what they should, a process died, or another one is
            writing there.
        OSError: a disk, the source's or the destination's (the same call goes on), or more than
            ``max_unreadable`` images are broken.
    """
    size = shard_size if samples_per_shard is None else None
    options = Options(short_side, quality, size, samples_per_shard, seed)
    if max_unreadable is not None and max_unreadable < 0:
        raise ValueError(f"shard: max_unreadable must be at least 0, got {max_unreadable}")
    converters = Converters(Conversion(short_side, quality), workers)
    begun = time.monotonic()
    plan = Plan.of(Path(source), options, quiet)
    if max_unreadable is None:
        max_unreadable = max(FEW_UNREADABLE, int(UNREADABLE_SHARE * plan.images))
    folder = Path(destination)
    with locked(folder):
        journal = Journal.opened(folder, plan)
        converted = plan.images - journal.images
        if not journal.finished:
            _write(plan, journal, converters, max_unreadable, quiet)
        verify(folder, plan, journal, quiet)
        _finish(folder, plan, journal)
    return ShardReport(
        folder,
        samples={name: sum(s.samples for s in done) for name, done in journal.shards.items()},
        shards={name: len(done) for name, done in journal.shards.items()},
        classes=len(plan.classes),
        size=sum(s.size for done in journal.shards.values() for s in done),
        unreadable=journal.unreadable(plan),
        seconds=max(time.monotonic() - begun, 1e-9),
        converted=converted,
    )


def _write(
    plan: Plan, journal: Journal, converters: Converters, max_unreadable: int, quiet: bool
) -> None:
    with Progress(plan.images, journal.images, quiet) as progress, converters as pool:
        writer = Writer(plan, journal, pool, progress, max_unreadable)
        for split in plan.splits:
            writer.write(split)


def _finish(folder: Path, plan: Plan, journal: Journal) -> None:
    """Write what readers want to know, and take the journal away."""
    splits = {
        name: {
            "name": name,
            "num_samples": sum(shard.samples for shard in shards),
            "filenames": [shard.name for shard in shards],
            "shard_lengths": [shard.samples for shard in shards],
        }
        for name, shards in journal.shards.items()
    }
    _write_unreadable(folder / UNREADABLE, journal.unreadable(plan))
    info = {"splits": splits, "classes": plan.classes, "fastkd": journal.content()}
    write_text(folder / INFO, json.dumps(info, indent=1))
    journal.close()


def _write_unreadable(path: Path, unreadable: list[tuple[str, str]]) -> None:
    if not unreadable:
        path.unlink(missing_ok=True)  # of an earlier run, when they could not be read
        return
    lines = "".join(f"{name}\t{reason}\n" for name, reason in unreadable)
    with replacing(path) as file:
        file.write(lines.encode(errors="surrogateescape"))


@dataclass
class Writer:
    """Writes what a plan has and a journal has not.

    Attributes:
        plan: what is to be written.
        journal: takes note of every finished shard.
        pool: converts images.
        progress: told of every image.
        max_unreadable: images that may be left out.
    """

    plan: Plan
    journal: Journal
    pool: Converters
    progress: Progress
    max_unreadable: int

    def __post_init__(self) -> None:
        self.unreadable = len(self.journal.unreadable(self.plan))

    def write(self, split: Split) -> None:
        """Write the shards of a split that are not there yet.

        Args:
            split: of the plan.

        Raises:
            OSError: the source or the destination cannot be read or written, or more images than
                ``max_unreadable`` are broken.
            ValueError: none of the split's images can be read.
        """
        images = self._converted(split)
        while self.journal.done(split.name) < len(split.files):
            lost, first = _first_readable(images)
            if first is not None:
                shard = self._write_shard(split, lost, chain([first], images))
                self.journal.add(split.name, shard)
            elif self.journal.shards[split.name]:
                self.journal.extend(split.name, lost)
            else:
                number, reason = lost[0]
                raise ValueError(
                    f"shard: source: none of the {len(lost)} images of {split.name} can be read, "
                    f"such as {split.files[number]}: {reason}"
                )

    def _converted(self, split: Split) -> Iterator[Converted]:
        """The split's images from the first that is not done with, counted."""
        start = self.journal.done(split.name)
        root = os.fspath(self.plan.root)
        files = ((int(n), os.path.join(root, split.files[n])) for n in split.order[start:])
        for image in self.pool.convert(files):
            self.progress.advance(image.reason is not None)
            if image.reason is not None:
                self._count_unreadable(split.files[image.number], image.reason)
            yield image

    def _count_unreadable(self, file: str, reason: str) -> None:
        self.unreadable += 1
        if self.unreadable > self.max_unreadable:
            raise OSError(
                f"shard: source: {self.unreadable} of {self.plan.images} images cannot be read, "
                f"more than max_unreadable ({self.max_unreadable}); the last is {file}: {reason}"
            )

    def _write_shard(self, split: Split, lost: _Lost, images: Iterator[Converted]) -> Shard:
        """Write one shard, as long as the options say or until no image is left."""
        name = f"{split.name}-{len(self.journal.shards[split.name]):06d}.tar"
        samples, lost = 0, list(lost)
        with replacing(self.journal.folder / name) as file:
            with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as archive:
                for image in images:
                    if image.reason is not None:
                        lost.append((image.number, image.reason))
                        continue
                    _write_sample(archive, split, image)
                    samples += 1
                    if _is_full(self.plan.options, samples, archive.offset):
                        break
            size = file.tell()
        start = self.journal.done(split.name)
        return Shard(name, start, start + samples + len(lost), samples, size, lost)


def _first_readable(images: Iterator[Converted]) -> tuple[_Lost, Converted | None]:
    """The next image that can be read, and those before it: no shard is begun without one."""
    lost: _Lost = []
    for image in images:
        if image.reason is None:
            return lost, image
        lost.append((image.number, image.reason))
    return lost, None


def _is_full(options: Options, samples: int, size: int) -> bool:
    if options.samples_per_shard is not None:
        return samples >= options.samples_per_shard
    return options.shard_size is not None and size >= options.shard_size * MB


def _write_sample(archive: tarfile.TarFile, split: Split, image: Converted) -> None:
    key = f"{image.number:08d}"
    _write_member(archive, f"{key}.{image.extension}", image.content)
    if split.labels is not None:
        _write_member(archive, f"{key}.cls", str(split.labels[image.number]).encode())
    source = json.dumps({"filename": split.files[image.number]})
    _write_member(archive, f"{key}.json", source.encode())


def _write_member(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)  # of no time and no owner: the same bytes whenever it is written
    info.size = len(content)
    archive.addfile(info, io.BytesIO(content))


def verify(folder: Path, plan: Plan, journal: Journal, quiet: bool) -> None:
    """Read the shards' headers: every image of the source is in one shard, or is unreadable.

    Args:
        folder: the shards'.
        plan: what should be in them.
        journal: which shards there are.
        quiet: show no progress.

    Raises:
        RuntimeError: an image is missing, or there twice.
    """
    for split in plan.splits:
        seen = np.zeros(len(split.files), np.int64)
        shards = journal.shards[split.name]
        for shard in shown(shards, f"verifying {split.name}", "shard", quiet):
            for member in list_members(folder / shard.name):
                key, _, extension = member.name.partition(".")
                if extension in EXTENSIONS.values():
                    seen[int(key)] += 1
            for number, _ in shard.unreadable:
                seen[number] += 1
        wrong = np.flatnonzero(seen != 1)
        if len(wrong):
            first = wrong[0]
            raise RuntimeError(
                f"shard: {folder} is not what it should be: {len(wrong)} images of {split.name} "
                f"are not in exactly one shard; {split.files[first]} is in {seen[first]}"
            )


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


@dataclass(frozen=True)
class Conversion:
    """What becomes of an image.

    Attributes:
        short_side: pixels that the shorter side has at most; None copies every image.
        quality: of the JPEGs, 1 to 95.
    """

    short_side: int | None
    quality: int


class Converted(NamedTuple):
    """One image, ready to be written.

    Attributes:
        number: as it was given.
        content: the encoded image; empty where it could not be read.
        extension: of a file with this content.
        reason: why it could not be read; None where it could.
    """

    number: int
    content: bytes
    extension: str
    reason: str | None = None


def convert(number: int, path: str, conversion: Conversion) -> Converted:
    """Read one image file, and shrink it if it is too large.

    Args:
        number: given back.
        path: of the file.
        conversion: what becomes of it.

    Returns:
        The file's own bytes where it is small enough and of a format that readers of shards know;
        else a JPEG, gray or RGB, with the orientation tag of the original.

    Raises:
        OSError: the file cannot be fetched, which says nothing of the image.
    """
    content = _fetched(path)
    try:
        with Image.open(io.BytesIO(content)) as image:
            image.load()  # what is cut short is found here, copied or not
            refuse_deep(image)
            extension = EXTENSIONS.get(image.format or "")
            fits = conversion.short_side is None or min(image.size) <= conversion.short_side
            if fits and extension is not None:
                return Converted(number, content, extension)
            return Converted(number, _encoded(image, conversion), "jpg")
    except UnidentifiedImageError:
        return Converted(number, b"", "", "no image")
    # Pillow's, for broken files, and for too many pixels to be meant.
    except PILLOW_ERRORS as error:
        return Converted(number, b"", "", " ".join(str(error).split()) or type(error).__name__)


def _fetched(path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        reason = error.strerror or error
        raise OSError(
            f"shard: source: cannot read {path}: {reason}; the same command goes on"
        ) from error


def _encoded(image: Image.Image, conversion: Conversion) -> bytes:
    orientation = image.getexif().get(ExifTags.Base.Orientation)
    # As a trainer does: alpha and palettes mean in shards what they mean in the source.
    shown = image if image.mode in ("L", "RGB") else image.convert("RGB")
    short = min(shown.size)
    if conversion.short_side is not None and short > conversion.short_side:
        width, height = (round(side * conversion.short_side / short) for side in shown.size)
        shown = shown.resize((width, height), Image.Resampling.BICUBIC)
    exif = Image.Exif()
    if orientation is not None:
        exif[ExifTags.Base.Orientation] = orientation
    buffer = io.BytesIO()
    shown.save(buffer, "JPEG", quality=conversion.quality, exif=exif)
    return buffer.getvalue()


class Converters:
    """Processes that convert images; results come in the order that was asked for.

    Args:
        conversion: what becomes of an image.
        workers: how many processes; None: one for each core.

    Raises:
        ValueError: fewer than one process.
    """

    def __init__(self, conversion: Conversion, workers: int | None = None) -> None:
        if workers is not None and workers < 1:
            raise ValueError(f"shard: workers must be at least 1, got {workers}")
        self.conversion = conversion
        self.workers = workers or _cores()

    def __enter__(self) -> Converters:
        # Forked, so that scripts need no guard around their main part and nothing is imported anew.
        context = multiprocessing.get_context("fork")
        # An interrupt between fork and the first line of a new process would be lost in both.
        signals = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            self._pool = ProcessPoolExecutor(self.workers, context, initializer=_begin_process)
            self._pool.submit(os.getpid).result()  # starts them
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, signals)
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def convert(self, images: Iterable[tuple[int, str]]) -> Iterator[Converted]:
        """Convert images.

        Args:
            images: (number, path of the file).

        Yields:
            One `Converted` for each, in order.

        Raises:
            OSError: a file cannot be fetched.
            RuntimeError: a process died.
        """
        images = iter(images)
        # As many as keep every process busy, and no more: results wait in memory.
        pending: deque[Future[list[Converted]]] = deque()
        while chunk := list(islice(images, CHUNK)):
            pending.append(self._pool.submit(_convert_all, chunk, self.conversion))
            if len(pending) > 2 * self.workers:
                yield from _result(pending.popleft())
        while pending:
            yield from _result(pending.popleft())


def _cores() -> int:
    """Those that this process may run on, where the system tells."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _convert_all(images: list[tuple[int, str]], conversion: Conversion) -> list[Converted]:
    return [convert(number, path, conversion) for number, path in images]


def _result(future: Future[list[Converted]]) -> list[Converted]:
    try:
        return future.result()
    except BrokenProcessPool as error:
        raise RuntimeError(
            "shard: a process that converts images died (is there enough memory?); the same "
            "command goes on"
        ) from error


def _begin_process() -> None:
    """Leave interrupts to the main process, but end with it when it is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()

    def end_with_parent() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()
