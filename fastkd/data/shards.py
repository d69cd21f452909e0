"""Write a folder of images as WebDataset shards, in worker processes, and resume that.

Images are written in an order that the seed fixes. A journal beside the shards lists those that are
finished, so that interrupted work continues after the last of them and ends with the same bytes.
"""

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
from fastkd.data.folders import SHARD_LISTS, UNFINISHED, VALIDATION_FOLDERS
from fastkd.data.readers import PILLOW_ERRORS, ReadableImages, open_image, refuse_deep
from fastkd.data.tars import TarImages, list_members
from fastkd.utils.io import remove_leftovers, replacing, write_text
from fastkd.utils.progress import Progress, track
from fastkd.utils.random import derive_seed

MB = 10**6
INFO = SHARD_LISTS[0]
UNREADABLE = "unreadable.txt"
SHARD_MB = 64  # small enough that a stream has several shards for each loader process
QUALITY = 90
SHORT_SIDE = 256
FEW_UNREADABLE = 20  # images that may be broken in any source
UNREADABLE_SHARE = 0.01  # of a large source
LOCK_SECONDS = 3.0  # workers of a killed process hold its lock a moment longer
CHUNK = 16  # images that a process converts at a time
# By Pillow's name of the format; MPO is a JPEG followed by other images.
EXTENSIONS = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}


@dataclass(frozen=True)
class ShardReport:
    """What `shard` wrote.

    Attributes:
        folder: of the shards.
        samples: images in shards, by split.
        shards: number of shards, by split.
        classes: number of classes; 0 without labels.
        size: bytes of all shards.
        unreadable: (file, reason) of images that are in no shard.
        seconds: duration of this run.
        converted: images that this run converted.
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
        """Summarize the report in one line."""
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

    A shard holds ``KEY.jpg`` (or png, webp), ``KEY.cls`` (the class number, where images have one)
    and ``KEY.json`` (the original file name); KEY is the image's number in the sorted source.
    ``_info.json`` lists shards, their lengths and the class names. Images larger than
    ``short_side`` are resized (bicubic) and stored as JPEG, gray or RGB, with their orientation
    tag. All others are copied byte for byte. Every image is decoded once; those that cannot be are
    listed in ``unreadable.txt``. At the end the shards are verified from their headers.

    After an interruption the same call continues after the last finished shard; the bytes are those
    of an uninterrupted run.

    Args:
        source: a folder with ``train`` and ``val`` (or ``validation``), or of class folders, or of
            images alone.
        destination: a new or empty folder, or one of the same work interrupted.
        short_side: maximum length of the shorter side in pixels; None copies every image.
        quality: JPEG quality, 1 to 95.
        shard_size: size in MB (10^6 bytes) at which a shard is closed.
        samples_per_shard: images per shard, instead of ``shard_size``.
        max_unreadable: broken images that are skipped before the work stops; None: 1 % of all, at
            least 20.
        workers: number of processes that convert; None: one per core.
        seed: of the order, which puts images of many classes into every shard.
        quiet: show no progress.

    Returns:
        What was written.

    Raises:
        ValueError: an option out of range, no images in ``source``, none that can be read in one
            of its splits, or a ``destination`` with other content or of other options.
        RuntimeError: verification failed, a worker died, or another process is writing there.
        OSError: the source or the destination cannot be read or written (the same call continues),
            or more than ``max_unreadable`` images are broken.
    """
    size = shard_size if samples_per_shard is None else None
    options = Options(short_side, quality, size, samples_per_shard, seed)
    if max_unreadable is not None and max_unreadable < 0:
        raise ValueError(f"shard: max_unreadable must be at least 0, got {max_unreadable}")
    converters = Converters(options, workers)
    begun = time.monotonic()
    plan = Plan.of(Path(source), options, quiet)
    if max_unreadable is None:
        max_unreadable = max(FEW_UNREADABLE, int(UNREADABLE_SHARE * plan.images))
    folder = Path(destination)
    with locked(folder):
        journal = Journal.open(folder, plan)
        converted = plan.images - journal.images
        if not journal.finished:
            progress = Progress("shard", plan.images, initial=journal.images, shows=not quiet)
            if journal.images:
                progress.write(f"continues after {journal.images:,} images")
            with progress, converters as pool:
                writer = Writer(plan, journal, pool, progress, max_unreadable)
                try:
                    for split in plan.splits:
                        writer.write(split)
                except BaseException:
                    progress.write(f"stopped at image {progress.done:,}; the same call continues")
                    raise
        _verify(plan, journal, quiet)
        _finish(plan, journal)
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


def _verify(plan: Plan, journal: Journal, quiet: bool) -> None:
    """Check from the headers that every image is in exactly one shard, or listed as unreadable."""
    for split in plan.splits:
        seen = np.zeros(len(split.files), np.int64)
        for shard in track(
            journal.shards[split.name], f"verifying {split.name}", "shard", not quiet
        ):
            for member in list_members(journal.folder / shard.name):
                key, _, extension = member.name.partition(".")
                if extension in EXTENSIONS.values():
                    seen[int(key)] += 1
            for number, _ in shard.unreadable:
                seen[number] += 1
        wrong = np.flatnonzero(seen != 1)
        if len(wrong):
            first = wrong[0]
            raise RuntimeError(
                f"shard: {journal.folder} is not what it should be: {len(wrong)} images of "
                f"{split.name} are not in exactly one shard; {split.files[first]} is in "
                f"{seen[first]}"
            )


def _finish(plan: Plan, journal: Journal) -> None:
    """Write ``_info.json`` and ``unreadable.txt``, and remove the journal."""
    splits = {
        name: {
            "name": name,
            "num_samples": sum(shard.samples for shard in shards),
            "filenames": [shard.name for shard in shards],
            "shard_lengths": [shard.samples for shard in shards],
        }
        for name, shards in journal.shards.items()
    }
    lines = "".join(f"{name}\t{reason}\n" for name, reason in journal.unreadable(plan))
    if lines:
        with replacing(journal.folder / UNREADABLE) as file:
            file.write(lines.encode(errors="surrogateescape"))
    else:  # there may be one of an earlier run, in which images could not be read
        (journal.folder / UNREADABLE).unlink(missing_ok=True)
    info = {"splits": splits, "classes": plan.classes, "fastkd": journal.content()}
    write_text(journal.folder / INFO, json.dumps(info, indent=1))
    (journal.folder / UNFINISHED).unlink(missing_ok=True)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Create a folder and lock it against other runs, where its file system has locks."""
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        _lock(descriptor, folder)
        yield
    finally:
        with contextlib.suppress(OSError):  # forked processes would keep what is only closed
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


@dataclass(frozen=True)
class Options:
    """The arguments of `shard` that decide the bytes of the shards."""

    short_side: int | None = SHORT_SIDE
    quality: int = QUALITY
    shard_size: float | None = SHARD_MB
    samples_per_shard: int | None = None
    seed: int = 0

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
    """The images of one split and the order in which they are written."""

    name: str  # "train" or "validation"
    files: list[str]  # sorted, relative to the source; an image's index is its key
    labels: list[int] | None
    order: np.ndarray


@dataclass(frozen=True)
class Plan:
    """All that is decided before the first image is converted."""

    root: Path
    splits: list[Split]
    classes: list[str]  # names by number; empty without labels
    options: Options
    fingerprint: str  # a hash of file names, their sizes and labels

    @classmethod
    def of(cls, source: Path, options: Options, quiet: bool) -> Plan:
        """List a source's images and fix their order."""
        if not source.is_dir():
            raise ValueError(f"shard: source: no folder {str(source)!r}")
        sets = _image_sets(source)
        splits = [
            _split(source, name, dataset, derive_seed("order", options.seed, number))
            for number, (name, dataset) in enumerate(sets.items())
        ]
        labelled = next((dataset for dataset in sets.values() if dataset.labelled), None)
        numbers = {} if labelled is None else labelled.reader.class_to_idx
        classes = sorted(numbers, key=numbers.__getitem__)
        return cls(source, splits, classes, options, _fingerprint(source, splits, quiet))

    @property
    def images(self) -> int:
        """Number of images in all splits."""
        return sum(len(split.files) for split in self.splits)

    def identity(self) -> dict[str, Any]:
        """Return what must not differ when interrupted work is continued."""
        return {"version": 1, "source": self.fingerprint, **asdict(self.options)}


def _image_sets(source: Path) -> dict[str, ReadableImages]:
    """Open the splits of a folder, by name; a folder without splits is one."""
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


def _fingerprint(source: Path, splits: Sequence[Split], quiet: bool) -> str:
    digest = hashlib.sha256()
    for split in splits:
        labels: Sequence[int | None] = split.labels or [None] * len(split.files)
        files = track(split.files, f"listing {split.name}", "file", not quiet)
        for name, label in zip(files, labels, strict=True):
            size = (source / name).stat().st_size
            # File names are any bytes, which Python keeps as surrogates.
            line = f"{split.name}\0{name}\0{size}\0{label}\n"
            digest.update(line.encode(errors="surrogateescape"))
    return digest.hexdigest()


class Shard(NamedTuple):
    """One finished shard."""

    name: str  # of the file
    start: int  # its images are order[start:stop] of the split
    stop: int
    samples: int
    size: int  # bytes
    unreadable: list[tuple[int, str]]  # (number, reason) of those images that are not in it


@dataclass
class Journal:
    """The finished shards of a plan, kept in a file beside them."""

    folder: Path
    identity: dict[str, Any]  # of the plan
    shards: dict[str, list[Shard]] = field(default_factory=dict)  # by split
    finished: bool = False  # all shards are there, and _info.json too

    @classmethod
    def open(cls, folder: Path, plan: Plan) -> Journal:
        """Read a folder's journal, or begin one where the folder is empty."""
        journal = cls(folder, plan.identity(), {split.name: [] for split in plan.splits})
        kept = _read_journal(folder)
        if kept is None:
            # Left by a process that was killed in its first `write`.
            first_write = f".{UNFINISHED}.*.tmp"
            if not all(path.match(first_write) for path in folder.iterdir()):
                raise ValueError(
                    f"shard: destination: {folder} holds something else than shards; name a new "
                    f"folder"
                )
            remove_leftovers(folder)
            journal.write()
            return journal
        _check_identity(folder, kept["identity"], journal.identity)
        remove_leftovers(folder)
        for name, shards in kept["shards"].items():
            journal.shards[name] = _intact(folder, [Shard(*shard) for shard in shards])
        complete = all(journal.done(split.name) == len(split.files) for split in plan.splits)
        journal.finished = complete and (folder / INFO).exists()
        return journal

    @property
    def images(self) -> int:
        """Number of images that are done with, in all splits."""
        return sum(self.done(name) for name in self.shards)

    def done(self, split: str) -> int:
        """Return how many images of a split's order are done with."""
        return self.shards[split][-1].stop if self.shards[split] else 0

    def add(self, split: str, shard: Shard) -> None:
        """Record the next shard of a split."""
        self.shards[split].append(shard)
        self.write()

    def extend(self, split: str, unreadable: list[tuple[int, str]]) -> None:
        """Record unreadable images that no readable one follows with the split's last shard."""
        last = self.shards[split][-1]
        self.shards[split][-1] = last._replace(
            stop=last.stop + len(unreadable), unreadable=[*last.unreadable, *unreadable]
        )
        self.write()

    def write(self) -> None:
        """Update the file."""
        write_text(self.folder / UNFINISHED, json.dumps(self.content()))

    def content(self) -> dict[str, Any]:
        """Return the file's content, which becomes a part of ``_info.json``."""
        return {"identity": self.identity, "shards": self.shards}

    def unreadable(self, plan: Plan) -> list[tuple[str, str]]:
        """List (file, reason) of all unreadable images in the order of the source."""
        return [
            (split.files[number], reason)
            for split in plan.splits
            for number, reason in sorted(
                (number, reason)
                for shard in self.shards[split.name]
                for number, reason in shard.unreadable
            )
        ]


def _read_journal(folder: Path) -> Any:
    """Return the content of a journal, of finished work from ``_info.json``; None without."""
    for name, key in ((UNFINISHED, None), (INFO, "fastkd")):
        try:
            content = json.loads((folder / name).read_text())
            kept = content if key is None else content[key]
            return kept if {"identity", "shards"} <= set(kept) else None
        except FileNotFoundError:
            continue
        except (ValueError, KeyError, TypeError):
            return None
    return None


def _check_identity(folder: Path, kept: dict[str, Any], asked: dict[str, Any]) -> None:
    different = ", ".join(
        "other images" if name == "source" else f"{name} {kept.get(name)}, not {value}"
        for name, value in asked.items()
        if kept.get(name) != value
    )
    if different:
        raise ValueError(f"shard: destination: {folder} has shards of another run: {different}")


def _intact(folder: Path, shards: list[Shard]) -> list[Shard]:
    """Return the shards before the first that is missing or of another size."""
    for number, shard in enumerate(shards):
        path = folder / shard.name
        if not path.is_file() or path.stat().st_size != shard.size:
            return shards[:number]
    return shards


@dataclass
class Writer:
    """Writes the shards of a plan that its journal lacks."""

    plan: Plan
    journal: Journal
    pool: Converters
    progress: Progress
    max_unreadable: int

    def __post_init__(self) -> None:
        self.unreadable = len(self.journal.unreadable(self.plan))

    def write(self, split: Split) -> None:
        """Write the missing shards of a split."""
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
        """Convert and count the images of a split that are not done with."""
        start = self.journal.done(split.name)
        root = os.fspath(self.plan.root)
        files = ((int(n), os.path.join(root, split.files[n])) for n in split.order[start:])
        for image in self.pool.convert(files):
            self.progress.advance(lost=int(image.reason is not None))
            if image.reason is not None:
                self.unreadable += 1
                if self.unreadable > self.max_unreadable:
                    raise OSError(
                        f"shard: source: {self.unreadable} of {self.plan.images} images cannot be "
                        f"read, more than max_unreadable ({self.max_unreadable}); the last is "
                        f"{split.files[image.number]}: {image.reason}"
                    )
            yield image

    def _write_shard(
        self, split: Split, lost: list[tuple[int, str]], images: Iterator[Converted]
    ) -> Shard:
        """Write images to one shard until it is full."""
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


def _first_readable(
    images: Iterator[Converted],
) -> tuple[list[tuple[int, str]], Converted | None]:
    """Return the next readable image and the unreadable ones before it: no shard is left empty."""
    lost: list[tuple[int, str]] = []
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
    source = json.dumps({"filename": split.files[image.number]})
    members = {image.extension: image.content}
    if split.labels is not None:
        members["cls"] = str(split.labels[image.number]).encode()
    for extension, content in (members | {"json": source.encode()}).items():
        # Without time and owner, the bytes are the same in every run.
        info = tarfile.TarInfo(f"{image.number:08d}.{extension}")
        info.size = len(content)
        archive.addfile(info, io.BytesIO(content))


class Converted(NamedTuple):
    """One image as it is stored, or the reason why it cannot be read."""

    number: int
    content: bytes
    extension: str
    reason: str | None = None


def convert(number: int, path: str, options: Options) -> Converted:
    """Read one image file and shrink it if it is too large.

    The content is the file's own where it is small enough and of a format in `EXTENSIONS`, else a
    JPEG. Raise an OSError if the file cannot be fetched, which says nothing about the image.
    """
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        reason = error.strerror or error
        raise OSError(
            f"shard: source: cannot read {path}: {reason}; the same command goes on"
        ) from error
    try:
        with open_image(content) as image:
            image.load()  # truncated files are found here, copied or not
            refuse_deep(image)
            extension = EXTENSIONS.get(image.format or "")
            fits = options.short_side is None or min(image.size) <= options.short_side
            if fits and extension is not None:
                return Converted(number, content, extension)
            return Converted(number, _encode(image, options), "jpg")
    except UnidentifiedImageError:
        return Converted(number, b"", "", "no image")
    except PILLOW_ERRORS as error:
        return Converted(number, b"", "", " ".join(str(error).split()) or type(error).__name__)


def _encode(image: Image.Image, options: Options) -> bytes:
    """Encode an image as JPEG, gray or RGB, with its orientation tag and no other."""
    exif = Image.Exif()
    orientation = image.getexif().get(ExifTags.Base.Orientation)
    if orientation is not None:
        exif[ExifTags.Base.Orientation] = orientation
    # As the loaders do, so that alpha and palettes give the same image from shards.
    image = image if image.mode in ("L", "RGB") else image.convert("RGB")
    short = min(image.size)
    if options.short_side is not None and short > options.short_side:
        width, height = (round(side * options.short_side / short) for side in image.size)
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=options.quality, exif=exif)
    return buffer.getvalue()


class Converters:
    """A pool of processes that convert images; results come in the order of the input."""

    def __init__(self, options: Options, workers: int | None = None) -> None:
        if workers is not None and workers < 1:
            raise ValueError(f"shard: workers must be at least 1, got {workers}")
        self.options = options
        if hasattr(os, "sched_getaffinity"):  # the cores that this process may run on
            self.workers = workers or len(os.sched_getaffinity(0))
        else:
            self.workers = workers or os.cpu_count() or 1

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
        """Convert images given as (number, path)."""
        images = iter(images)
        # As many as keep every process busy, and no more: results wait in memory.
        pending: deque[Future[list[Converted]]] = deque()
        while chunk := list(islice(images, CHUNK)):
            pending.append(self._pool.submit(_convert_all, chunk, self.options))
            if len(pending) > 2 * self.workers:
                yield from _result(pending.popleft())
        while pending:
            yield from _result(pending.popleft())


def _convert_all(images: list[tuple[int, str]], options: Options) -> list[Converted]:
    return [convert(number, path, options) for number, path in images]


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
