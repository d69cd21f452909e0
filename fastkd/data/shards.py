"""From a folder of images to WebDataset shards: smaller images, in few files, in mixed order.

Knows the order of the work, whose parts are in `fastkd.data.sharding`; neither models nor
batches, nor how an image is encoded. Images are converted by processes and written by one, in an
order that the seed fixes, so that interrupted work goes on behind its last whole shard and ends
with the same bytes.
"""

from __future__ import annotations

import io
import json
import os
import tarfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np

from fastkd.data.conversion import EXTENSIONS, Conversion, Converted, Converters
from fastkd.data.sharding.journal import INFO, Journal, Options, Plan, Shard, Split, locked
from fastkd.data.sharding.progress import Progress, shown
from fastkd.data.tars import list_members
from fastkd.utils.io import replacing, write_text

MB = 10**6

_Lost = list[tuple[int, str]]  # (number, reason) of images that cannot be read

UNREADABLE = "unreadable.txt"
SHARD_MB = 64  # small enough that a stream has several shards for each loader process
QUALITY = 90
SHORT_SIDE = 256
FEW_UNREADABLE = 20  # images that may be broken in any source
UNREADABLE_SHARE = 0.01  # of a large source


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
