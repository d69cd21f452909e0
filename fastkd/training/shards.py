"""From a folder of images to WebDataset shards: smaller images, in few files, in mixed order.

Knows folders, archives and what is finished; neither models nor batches, nor how an image is
encoded. Images are converted by processes and written by one, in an order that the seed fixes, so
that interrupted work goes on behind its last whole shard and ends with the same bytes.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import sys
import tarfile
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np

from fastkd.training.atomic import remove_leftovers, replacing, write_text
from fastkd.training.conversion import EXTENSIONS, Conversion, Converted, Converters
from fastkd.training.datasets import open_data
from fastkd.training.folders import VALIDATION_FOLDERS
from fastkd.training.progress import Bar
from fastkd.training.seeding import derive_seed
from fastkd.training.sources import ReadableImages
from fastkd.training.tars import TarImages, list_members

INFO = "_info.json"
UNREADABLE = "unreadable.txt"
JOURNAL = ".fastkd-shard.json"  # of unfinished work
MB = 10**6
SHARD_MB = 256
QUALITY = 90
SHORT_SIDE = 256
LINE_EVERY_SECONDS = 10.0
SLOW = 3.0  # seconds after which listing and verifying are shown
_Item = TypeVar("_Item")


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
        workers: processes that convert; None: one for each core.
        seed: of the order, so that every shard has images of many classes.
        quiet: show no progress.

    Returns:
        What was written.

    Raises:
        ValueError: an option out of range, no images in ``source``, or a ``destination`` with other
            content or of other options.
        RuntimeError: the shards do not hold what they should, or a process died.
        OSError: the disk.
    """
    options = _checked(short_side, quality, shard_size, samples_per_shard, seed)
    converters = Converters(Conversion(short_side, quality), workers)
    begun = time.monotonic()
    plan = _plan(Path(source), options, quiet)
    folder = Path(destination)
    journal = _Journal.opened(folder, plan)
    progress = _Progress(plan.images, journal.images, quiet)
    converted = plan.images - journal.images
    if not journal.finished:
        with progress, converters as pool:
            for split in plan.splits:
                _write_split(folder, split, plan, journal, pool, progress)
    unreadable = journal.unreadable(plan)
    _verify(folder, plan, journal, quiet)
    _finish(folder, plan, journal, unreadable)
    return ShardReport(
        folder,
        samples={name: sum(s.samples for s in done) for name, done in journal.shards.items()},
        shards={name: len(done) for name, done in journal.shards.items()},
        classes=len(plan.classes),
        size=sum(s.size for done in journal.shards.values() for s in done),
        unreadable=unreadable,
        seconds=max(time.monotonic() - begun, 1e-9),
        converted=converted,
    )


@dataclass(frozen=True)
class _Options:
    """What decides the bytes of the shards."""

    short_side: int | None
    quality: int
    shard_size: float | None
    samples_per_shard: int | None
    seed: int


def _checked(
    short_side: int | None,
    quality: int,
    shard_size: float,
    samples_per_shard: int | None,
    seed: int,
) -> _Options:
    for name, value, least in (
        ("short_side", short_side, 1),
        ("samples_per_shard", samples_per_shard, 1),
        ("seed", seed, 0),
    ):
        if value is not None and value < least:
            raise ValueError(f"shard: {name} must be at least {least}, got {value}")
    if not 1 <= quality <= 95:
        raise ValueError(f"shard: quality must be 1 to 95, got {quality}")
    if shard_size <= 0:
        raise ValueError(f"shard: shard_size must be above 0 MB, got {shard_size}")
    size = shard_size if samples_per_shard is None else None
    return _Options(short_side, quality, size, samples_per_shard, seed)


class _Split(NamedTuple):
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
class _Plan:
    """All that is decided before the first image is converted."""

    root: Path
    splits: list[_Split]
    classes: list[str]
    options: _Options
    fingerprint: str

    @property
    def images(self) -> int:
        return sum(len(split.files) for split in self.splits)

    def identity(self) -> dict[str, Any]:
        """Tells whether shards are of the same source and options."""
        return {"version": 1, "source": self.fingerprint, **asdict(self.options)}


def _plan(source: Path, options: _Options, quiet: bool) -> _Plan:
    if not source.is_dir():
        raise ValueError(f"shard: source: no folder {str(source)!r}")
    sets = _image_sets(source)
    classes: list[str] = []
    for dataset in sets.values():
        if dataset.labelled:
            numbers = dataset.reader.class_to_idx
            classes = sorted(numbers, key=numbers.__getitem__)
            break
    splits = []
    for number, (name, dataset) in enumerate(sets.items()):
        samples = dataset.reader.samples
        generator = np.random.default_rng(derive_seed("order", options.seed, number))
        splits.append(
            _Split(
                name,
                [os.path.relpath(path, source) for path, _ in samples],
                [label for _, label in samples] if dataset.labelled else None,
                generator.permutation(len(samples)),
            )
        )
    return _Plan(source, splits, classes, options, _fingerprint(source, splits, quiet))


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


def _fingerprint(source: Path, splits: Sequence[_Split], quiet: bool) -> str:
    """A hash of the files' names and sizes, and of their labels."""
    digest = hashlib.sha256()
    for split in splits:
        labels: Sequence[int | None] = split.labels or [None] * len(split.files)
        files = _shown(split.files, f"listing {split.name}", "file", quiet)
        for name, label in zip(files, labels, strict=True):
            size = (source / name).stat().st_size
            digest.update(f"{split.name}\0{name}\0{size}\0{label}\n".encode())
    return digest.hexdigest()


class _Shard(NamedTuple):
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
class _Journal:
    """Which shards are whole, kept beside them until all are."""

    folder: Path
    identity: dict[str, Any]
    shards: dict[str, list[_Shard]] = field(default_factory=dict)
    finished: bool = False

    @classmethod
    def opened(cls, folder: Path, plan: _Plan) -> _Journal:
        """The journal of a folder; a new one where the folder is empty.

        Raises:
            ValueError: the folder holds something else.
        """
        journal = cls(folder, plan.identity(), {split.name: [] for split in plan.splits})
        if not folder.exists() or not any(folder.iterdir()):
            folder.mkdir(parents=True, exist_ok=True)
            journal.write()
            return journal
        kept = _kept(folder)
        if kept is None:
            raise ValueError(
                f"shard: destination: {folder} holds something else than shards; name a new folder"
            )
        _refuse_another(folder, kept["identity"], journal.identity)
        remove_leftovers(folder)
        for name, shards in kept["shards"].items():
            journal.shards[name] = _whole(folder, [_Shard(*shard) for shard in shards])
        complete = all(journal.done(split.name) == len(split.files) for split in plan.splits)
        journal.finished = complete and (folder / INFO).exists()
        return journal

    @property
    def images(self) -> int:
        """Images that are done with, of all splits."""
        return sum(self.done(name) for name in self.shards)

    def done(self, split: str) -> int:
        """Places of a split's order that are done with."""
        return self.shards[split][-1].stop if self.shards[split] else 0

    def add(self, split: str, shard: _Shard) -> None:
        """Take note of a shard that is in its place."""
        self.shards[split].append(shard)
        self.write()

    def write(self) -> None:
        """Bring the file up to date."""
        write_text(self.folder / JOURNAL, json.dumps(self.content()))

    def content(self) -> dict[str, Any]:
        """What the file holds; afterwards, a part of ``_info.json``."""
        return {"identity": self.identity, "shards": self.shards}

    def unreadable(self, plan: _Plan) -> list[tuple[str, str]]:
        """(file, reason) of all images that could not be read, in the order of the source."""
        return [
            (split.files[number], reason)
            for split in plan.splits
            for number, reason in sorted(
                lost for shard in self.shards[split.name] for lost in shard.unreadable
            )
        ]


def _kept(folder: Path) -> Any:
    for name, inner in ((JOURNAL, None), (INFO, "fastkd")):
        try:
            content = json.loads((folder / name).read_text())
            kept = content if inner is None else content[inner]
            return kept if {"identity", "shards"} <= set(kept) else None
        except FileNotFoundError:
            continue
        except (ValueError, KeyError, TypeError):
            return None
    return None


def _refuse_another(folder: Path, kept: dict[str, Any], asked: dict[str, Any]) -> None:
    different = [name for name in asked if kept.get(name) != asked[name]]
    if not different:
        return
    told = ", ".join(
        "other images" if name == "source" else f"{name} {kept.get(name)}, not {asked[name]}"
        for name in different
    )
    raise ValueError(f"shard: destination: {folder} has shards of another run: {told}")


def _whole(folder: Path, shards: list[_Shard]) -> list[_Shard]:
    """Those before the first that is not there as it was written."""
    for number, shard in enumerate(shards):
        path = folder / shard.name
        if not path.is_file() or path.stat().st_size != shard.size:
            return shards[:number]
    return shards


def _write_split(
    folder: Path,
    split: _Split,
    plan: _Plan,
    journal: _Journal,
    pool: Converters,
    progress: _Progress,
) -> None:
    """Write the shards of a split that are not there yet."""
    start = journal.done(split.name)
    root = os.fspath(plan.root)
    converted = pool.convert(
        (int(number), os.path.join(root, split.files[number])) for number in split.order[start:]
    )
    while start < len(split.files):
        name = f"{split.name}-{len(journal.shards[split.name]):06d}.tar"
        shard = _write_shard(folder / name, split, plan, start, converted, progress)
        journal.add(split.name, shard)
        start = shard.stop


def _write_shard(
    path: Path,
    split: _Split,
    plan: _Plan,
    start: int,
    converted: Iterator[Converted],
    progress: _Progress,
) -> _Shard:
    """Write one shard, as long as the options say or until no image is left."""
    options = plan.options
    samples, stop = 0, start
    unreadable: list[tuple[int, str]] = []
    with replacing(path) as file:
        with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as archive:
            for image in converted:
                stop += 1
                progress.advance(image.reason is not None)
                if image.reason is not None:
                    unreadable.append((image.number, image.reason))
                    continue
                _write_sample(archive, split, image)
                samples += 1
                if _is_full(options, samples, archive.offset):
                    break
        size = file.tell()
    return _Shard(path.name, start, stop, samples, size, unreadable)


def _is_full(options: _Options, samples: int, size: int) -> bool:
    if options.samples_per_shard is not None:
        return samples >= options.samples_per_shard
    return options.shard_size is not None and size >= options.shard_size * MB


def _write_sample(archive: tarfile.TarFile, split: _Split, image: Converted) -> None:
    key = _key(image.number)
    _write_member(archive, f"{key}.{image.extension}", image.content)
    if split.labels is not None:
        _write_member(archive, f"{key}.cls", str(split.labels[image.number]).encode())
    source = json.dumps({"filename": split.files[image.number]})
    _write_member(archive, f"{key}.json", source.encode())


def _write_member(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)  # of no time and no owner: the same bytes whenever it is written
    info.size = len(content)
    archive.addfile(info, io.BytesIO(content))


def _key(number: int) -> str:
    return f"{number:08d}"


def _verify(folder: Path, plan: _Plan, journal: _Journal, quiet: bool) -> None:
    """Read the shards' headers: every image of the source is in one shard, or is unreadable.

    Raises:
        RuntimeError: one is missing, or there twice.
    """
    for split in plan.splits:
        seen = np.zeros(len(split.files), np.int64)
        shards = journal.shards[split.name]
        for shard in _shown(shards, f"verifying {split.name}", "shard", quiet):
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


def _finish(
    folder: Path, plan: _Plan, journal: _Journal, unreadable: list[tuple[str, str]]
) -> None:
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
    lines = [f"{name}\t{reason}\n" for name, reason in unreadable]
    if lines:
        write_text(folder / UNREADABLE, "".join(lines))
    info = {"splits": splits, "classes": plan.classes, "fastkd": journal.content()}
    write_text(folder / INFO, json.dumps(info, indent=1))
    (folder / JOURNAL).unlink(missing_ok=True)


def _shown(items: list[_Item], what: str, unit: str, quiet: bool) -> Iterable[_Item]:
    """The items, with a bar on a terminal where they take long."""
    disable = True if quiet else None  # None: where there is no terminal
    return Bar(items, desc=what, unit=unit, leave=False, delay=SLOW, disable=disable)


class _Progress:
    """A bar on a terminal, a line now and then elsewhere.

    Args:
        total: images.
        done: images that an earlier run converted.
        quiet: show nothing.
    """

    def __init__(self, total: int, done: int, quiet: bool) -> None:
        self.total = total
        self.done = done
        self.unreadable = 0
        self.shows = not quiet
        self._bar: Bar | None = None
        self._line_at = time.monotonic()

    def __enter__(self) -> _Progress:
        if self.shows and self.done:
            print(f"goes on behind {self.done:,} images", file=sys.stderr)
        if self.shows and sys.stderr.isatty():
            self._bar = Bar(
                total=self.total, initial=self.done, desc="shard", unit="image", leave=False,
                dynamic_ncols=True,
            )  # fmt: skip
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()
        if self.shows and error is not None:
            print(f"stopped at image {self.done:,}; the same command goes on", file=sys.stderr)

    def advance(self, unreadable: bool) -> None:
        """Count an image."""
        self.done += 1
        self.unreadable += unreadable
        if self._bar is not None:
            self._bar.update()
            if unreadable:
                self._bar.set_postfix_str(f"{self.unreadable} unreadable")
        elif self.shows and time.monotonic() - self._line_at >= LINE_EVERY_SECONDS:
            self._line_at = time.monotonic()
            lost = f", {self.unreadable} unreadable" if self.unreadable else ""
            print(f"shard: {self.done:,} of {self.total:,} images{lost}", file=sys.stderr)
