"""Images into tars, one process writing what many convert, and a last look at what was written.

Knows archives and their members; neither folders' layouts nor how an image is encoded.
"""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np

from fastkd.data.conversion import EXTENSIONS, Converted, Converters
from fastkd.data.sharding.journal import Journal, Options, Plan, Shard, Split
from fastkd.data.sharding.progress import Progress, shown
from fastkd.data.tars import list_members
from fastkd.utils.io import replacing

MB = 10**6
_Lost = list[tuple[int, str]]  # (number, reason) of images that cannot be read


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
