"""What shards will hold: which images of a folder, under which labels, in which order.

Knows folders and options; neither archives nor what is finished.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fastkd.data.datasets import open_data
from fastkd.data.folders import VALIDATION_FOLDERS
from fastkd.data.readers import ReadableImages
from fastkd.data.sharding.progress import shown
from fastkd.data.tars import TarImages
from fastkd.utils.random import derive_seed


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
