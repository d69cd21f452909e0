"""Random access to images in plain tars (labels are folders), tars of tars and WebDataset shards.

The headers are read once, and what they list is kept beside the archives.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import re
import tarfile
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from timm.data.readers.img_extensions import get_img_extensions

from fastkd.data.classes import UNLABELLED, map_classes, number_classes
from fastkd.data.files import is_hidden, is_image
from fastkd.utils.io import replacing
from fastkd.utils.progress import track

_VERSION = 3  # of the listing kept beside the archives
_PEEKED = 64  # headers that tell a shard from another tar
SHARD_IMAGES = (".jpg", ".jpeg", ".png", ".webp")  # as timm's reader of shards
_KEY = re.compile(r"((?:.*/)?[^./][^./]*)(\.[^/]*)")  # WebDataset: up to the name's first dot


class Member(NamedTuple):
    """A file in an archive."""

    name: str  # its path; in a tar of a tar, that of the inner archive comes first
    offset: int  # of its content
    size: int


def list_members(path: str | os.PathLike[str]) -> list[Member]:
    """List the regular files of a whole, uncompressed tar and of the tars in it, or raise."""
    with open(path, "rb") as file:
        return list(_members(file, os.fspath(path)))


def _members(file: BinaryIO, path: str, start: int = 0, prefix: str = "") -> Iterator[Member]:
    """List the archive that starts at a byte of an open file."""
    file.seek(start)
    try:
        with tarfile.open(fileobj=file, mode="r:") as archive:
            found = list(_files(archive, path))
            end = archive.offset
    except tarfile.TarError as error:
        raise OSError(f"{path} is no whole, uncompressed tar: {error}") from error
    _check_end(file, path, end, inner=start > 0)
    for member in found:
        if member.name.lower().endswith(".tar"):
            yield from _members(file, path, member.offset, f"{prefix}{member.name[:-4]}/")
        else:
            yield member._replace(name=prefix + member.name)


def _files(archive: tarfile.TarFile, path: str) -> Iterator[Member]:
    """List one archive's files; a hard link stands for the file that it names."""
    found: dict[str, Member] = {}
    for info in archive:
        if info.isreg():
            member = Member(info.name, info.offset_data, info.size)
        elif info.islnk() and info.linkname in found:
            member = found[info.linkname]._replace(name=info.name)
        elif info.islnk():
            raise OSError(f"{path}: {info.name} links to {info.linkname}, which is not before it")
        else:
            continue
        found[info.name] = member
        yield member


def _check_end(file: BinaryIO, path: str, end: int, inner: bool) -> None:
    """Raise if the end-of-archive blocks are missing (truncated) or data follow (joined tars)."""
    file.seek(end)
    block = file.read(tarfile.BLOCKSIZE)
    if len(block) < tarfile.BLOCKSIZE or any(block):
        raise OSError(f"{path} is no whole tar: it is cut short or damaged at byte {end}")
    if not inner and any(file.read(tarfile.RECORDSIZE)):
        raise OSError(f"{path} goes on behind its end: tars that were joined are read one by one")


class Listing(NamedTuple):
    """Samples of one archive."""

    members: list[Member]  # one image each
    labels: list[str | int | None]  # a class name, a number, or None


def list_classes(path: Path, in_folder: bool) -> Listing:
    """List the images of a plain tar, labelled by their folders; None without a folder.

    With ``in_folder`` the archive stands for a folder: images in none inside it have its name.
    """
    above = f"{path.stem}/" if in_folder else ""
    members = [
        member
        for member in list_members(path)
        if is_image(member.name) and not any(map(is_hidden, PurePosixPath(member.name).parts))
    ]
    return Listing(members, [PurePosixPath(above + m.name).parent.name or None for m in members])


def list_shard(path: Path, target: str | None = None) -> Listing:
    """List the images of a WebDataset shard with their labels; None without one, or below zero.

    Labels are in the field ``target`` of the samples' ``.json``, or in ``.cls`` without a target.
    """
    images: dict[str, Member] = {}
    labels: dict[str, int | None] = {}
    kind = ".cls" if target is None else ".json"
    with open(path, "rb") as file:
        for member in _members(file, os.fspath(path)):
            match = _KEY.fullmatch(member.name)
            key, extension = match.groups() if match else (member.name, "")
            if extension.lower() in SHARD_IMAGES:
                images.setdefault(key, member)
            elif extension.lower() == kind:
                file.seek(member.offset)
                labels[key] = parse_label(file.read(member.size), target, f"{path}:{member.name}")
    return Listing(list(images.values()), [labels.get(key) for key in images])


def holds_samples(path: str | os.PathLike[str]) -> bool:
    """Return whether an archive is a WebDataset shard, by its first headers.

    It has labels (``.cls``), or images with descriptions (``.json``) beside them and in no folder:
    a plain tar may hold descriptions of anything, too.
    """
    try:
        with tarfile.open(path, "r:") as archive:
            paths = [PurePosixPath(info.name) for info in islice(archive, _PEEKED)]
    except tarfile.TarError as error:
        raise OSError(f"{path} is no whole, uncompressed tar: {error}") from error
    if any(path.suffix.lower() == ".cls" for path in paths):
        return True
    images = {str(path.with_suffix("")) for path in paths if path.suffix.lower() in SHARD_IMAGES}
    described = {str(path.with_suffix("")) for path in paths if path.suffix.lower() == ".json"}
    return any("/" not in key.removeprefix("./") for key in images & described)


def parse_label(content: bytes, target: str | None, name: str) -> int | None:
    """Read the label in a shard's ``.cls``, or in a field of its ``.json``; None below zero."""
    try:
        label = int(content) if target is None else int(json.loads(content)[target])
    except (ValueError, KeyError, TypeError) as error:
        raise OSError(f"{name} holds no label: {error!r}") from error
    return label if label >= 0 else None


@dataclass(frozen=True)
class _Table:
    """All samples of some archives, in arrays, which loader processes share; each is [samples]."""

    tar: np.ndarray  # index of the archive
    offset: np.ndarray  # of the image in it
    size: np.ndarray  # bytes of the image
    label: np.ndarray  # class number, or `UNLABELLED`
    names: np.ndarray  # [bytes] the members' names, joined; UTF-8, or whatever bytes they are
    name_end: np.ndarray  # where each name ends
    classes: list[str]  # names by number; empty if classes have none

    def name(self, index: int) -> str:
        start = self.name_end[index - 1] if index else 0
        return self.names[start : self.name_end[index]].tobytes().decode(errors="surrogateescape")


class TarImages:
    """A reader of images in tars, by index, like timm's readers.

    Holds no file open, so that it may be copied to any number of loader processes.
    """

    def __init__(
        self,
        tars: Sequence[Path],
        *,
        layout: str,  # "shards": WebDataset's; "tar": folders are classes; "tars": archives are
        class_to_idx: dict[str, int] | None = None,  # of training; None: classes in natural order
        target: str | None = None,  # field of the shards' .json that holds labels; None: .cls does
    ) -> None:
        self.tars = list(tars)
        found = [path.stat() for path in self.tars]
        self.states = [_state(status) for status in found]
        self._table = _listed(self.tars, found, layout, target)
        self.targets = self._table.label  # [samples]
        self.class_to_idx = {name: number for number, name in enumerate(self._table.classes)}
        if class_to_idx is not None and layout != "shards":
            numbers = map_classes(self.class_to_idx, class_to_idx, self.tars[0].parent)
            # The last entry is what -1 picks.
            self.targets = np.array([*numbers.values(), UNLABELLED])[self._table.label]
            self.class_to_idx = class_to_idx

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[BinaryIO, int | None]:
        tar = int(self._table.tar[index])
        with open(self.tars[tar], "rb", buffering=0) as file:
            if _state(os.fstat(file.fileno())) != self.states[tar]:
                raise OSError(f"{self.tars[tar]} has changed since its samples were listed")
            file.seek(int(self._table.offset[index]))
            content = file.read(int(self._table.size[index]))
        label = int(self.targets[index])
        return io.BytesIO(content), None if label == UNLABELLED else label

    def filename(self, index: int, basename: bool = False, absolute: bool = False) -> str:
        """Return an image's archive and its name there, as ``train-0000.tar:key.jpg``."""
        name = self._table.name(index)
        if basename:
            return name.rsplit("/", 1)[-1]
        path = self.tars[int(self._table.tar[index])]
        return f"{path if absolute else path.name}:{name}"


def _state(status: os.stat_result) -> tuple[int, int]:
    return status.st_size, status.st_mtime_ns


def _listed(
    tars: list[Path], found: list[os.stat_result], layout: str, target: str | None
) -> _Table:
    """Load the table beside the archives, if it is of these; else make it, and keep it there."""
    of = {
        "version": _VERSION,
        # ctime, since copying or unpacking archives may set their mtime.
        "tars": [
            [path.name, *_state(status), status.st_ctime_ns]
            for path, status in zip(tars, found, strict=True)
        ],
        "extensions": sorted(get_img_extensions()),
        "layout": layout,
        "target": target,
    }
    names = hashlib.sha256(json.dumps([path.name for path in tars]).encode()).hexdigest()
    kept = tars[0].parent / f".fastkd-{names[:12]}.npz"
    table = _load(kept, of)
    if table is None:
        table = _make(tars, layout, target)
        with contextlib.suppress(OSError):  # read-only data are listed anew each time
            _save(kept, of, table)
    return table


def _make(tars: list[Path], layout: str, target: str | None) -> _Table:
    listings = [
        list_shard(path, target) if layout == "shards" else list_classes(path, layout == "tars")
        for path in track(tars, "listing", "tar")
    ]
    members = [member for listing in listings for member in listing.members]
    labels = [label for listing in listings for label in listing.labels]
    classes = number_classes({label for label in labels if isinstance(label, str)})
    numbers: dict[Any, int] = {None: UNLABELLED, **classes}
    names = [member.name.encode(errors="surrogateescape") for member in members]
    return _Table(
        tar=np.repeat(np.arange(len(tars)), [len(listing.members) for listing in listings]),
        offset=np.array([member.offset for member in members], np.int64),
        size=np.array([member.size for member in members], np.int64),
        label=np.array([numbers.get(label, label) for label in labels], np.int64),
        names=np.frombuffer(b"".join(names), np.uint8),
        name_end=np.cumsum([len(name) for name in names], dtype=np.int64),
        classes=list(classes),
    )


_ARRAYS = ("tar", "offset", "size", "label", "names", "name_end")


def _save(path: Path, of: dict[str, Any], table: _Table) -> None:
    header = json.dumps({"of": of, "classes": table.classes}).encode()
    arrays = {name: getattr(table, name) for name in _ARRAYS}
    with replacing(path) as file:
        np.savez(file, header=np.frombuffer(header, np.uint8), **arrays)


def _load(path: Path, of: dict[str, Any]) -> _Table | None:
    """Load a table; None where there is none, it is broken, or it is of other archives."""
    try:
        with np.load(path, allow_pickle=False) as kept:
            header = json.loads(kept["header"].tobytes())
            if header["of"] != of:
                return None
            arrays = {name: kept[name] for name in _ARRAYS}
            return _Table(**arrays, classes=header["classes"])
    # RuntimeError: compressed by a method that Python does not know.
    except (OSError, ValueError, KeyError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error):
        return None
