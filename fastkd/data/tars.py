"""Images in tar files, in any order: headers are listed once, samples are read by their place.

Knows archives and the two ways in which labels are kept in them; neither where a data set's
archives lie nor what images are for. Reads plain tars (labels are folders), tars of tars, and
WebDataset shards (labels are ``.cls`` files) with the standard library alone.
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
from timm.utils.misc import natural_key

from fastkd.utils.bar import Bar
from fastkd.utils.io import replacing

UNLABELLED = -1
_VERSION = 2  # of the listing kept beside the archives
_PEEKED = 64  # headers that tell a shard from another tar
_SLOW = 3.0  # seconds of listing after which a person wants to see that it goes on
_SHARD_IMAGES = (".jpg", ".jpeg", ".png", ".webp")  # as timm's reader of shards
_KEY = re.compile(r"((?:.*/)?[^./][^./]*)(\.[^/]*)")  # WebDataset: up to the name's first dot


class Member(NamedTuple):
    """A file in an archive.

    Attributes:
        name: its path there; of a tar in a tar, behind the inner archive's.
        offset: bytes before its content.
        size: bytes of its content.
    """

    name: str
    offset: int
    size: int


def list_members(path: str | os.PathLike[str]) -> list[Member]:
    """Read the headers of a tar and of the tars in it.

    Args:
        path: an uncompressed archive.

    Returns:
        Its regular files in order.

    Raises:
        OSError: it cannot be read, ends too early, or is no uncompressed tar.
    """
    with open(path, "rb") as file:
        return list(_members(file, os.fspath(path)))


def _members(file: BinaryIO, path: str, start: int = 0, prefix: str = "") -> Iterator[Member]:
    """Of the archive that starts at a byte of an open file."""
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
    """The files of one archive; a hard link is the file that it names, which lies before it."""
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
    """Zeros end a tar; without them some of it is missing, and what follows would go unseen."""
    file.seek(end)
    block = file.read(tarfile.BLOCKSIZE)
    if len(block) < tarfile.BLOCKSIZE or any(block):
        raise OSError(f"{path} is no whole tar: it is cut short or damaged at byte {end}")
    if not inner and any(file.read(tarfile.RECORDSIZE)):
        raise OSError(f"{path} goes on behind its end: tars that were joined are read one by one")


class Listing(NamedTuple):
    """Samples of one archive.

    Attributes:
        members: one image each.
        labels: of each: a class's name, a number, or None.
    """

    members: list[Member]
    labels: list[str | int | None]


def list_classes(path: Path, in_folder: bool) -> Listing:
    """Images of a plain tar, labelled by the folder they lie in.

    Args:
        path: the archive.
        in_folder: whether its own name stands for a folder: then an image that lies in none inside
            it belongs to the class named by the archive.

    Returns:
        Images and names of classes; None for images that lie in no folder.
    """
    extensions = get_img_extensions(as_set=True)
    above = f"{path.stem}/" if in_folder else ""
    members = [m for m in list_members(path) if PurePosixPath(m.name).suffix.lower() in extensions]
    return Listing(members, [PurePosixPath(above + m.name).parent.name or None for m in members])


def list_shard(path: Path, target: str | None = None) -> Listing:
    """Samples of a WebDataset shard: files that follow each other and share their key.

    Args:
        path: the shard.
        target: the field of a sample's ``.json`` that holds its label; None takes ``.cls``.

    Returns:
        Images and numbers; None for samples without a label, or with one below zero.

    Raises:
        OSError: a label that is no whole number.
    """
    images: dict[str, Member] = {}
    labels: dict[str, int | None] = {}
    kind = ".cls" if target is None else ".json"
    with open(path, "rb") as file:
        for member in _members(file, os.fspath(path)):
            match = _KEY.fullmatch(member.name)
            key, extension = match.groups() if match else (member.name, "")
            if extension.lower() in _SHARD_IMAGES:
                images.setdefault(key, member)
            elif extension.lower() == kind:
                labels[key] = _label(_read(file, member), target, f"{path}:{member.name}")
    return Listing(list(images.values()), [labels.get(key) for key in images])


def holds_samples(path: str | os.PathLike[str]) -> bool:
    """Whether an archive is a WebDataset shard.

    Args:
        path: the archive, of which the first headers are read.

    Returns:
        Whether there are labels (``.cls``), or images with descriptions (``.json``) beside them in
        no folder: a plain tar may hold descriptions of anything, too.

    Raises:
        OSError: it cannot be read, or is no uncompressed tar.
    """
    try:
        with tarfile.open(path, "r:") as archive:
            paths = [PurePosixPath(info.name) for info in islice(archive, _PEEKED)]
    except tarfile.TarError as error:
        raise OSError(f"{path} is no whole, uncompressed tar: {error}") from error
    if any(path.suffix.lower() == ".cls" for path in paths):
        return True
    images = {str(path.with_suffix("")) for path in paths if path.suffix.lower() in _SHARD_IMAGES}
    described = {str(path.with_suffix("")) for path in paths if path.suffix.lower() == ".json"}
    return any("/" not in key.removeprefix("./") for key in images & described)


def _read(file: BinaryIO, member: Member) -> bytes:
    file.seek(member.offset)
    return file.read(member.size)


def _label(content: bytes, target: str | None, name: str) -> int | None:
    try:
        label = int(content) if target is None else int(json.loads(content)[target])
    except (ValueError, KeyError, TypeError) as error:
        raise OSError(f"{name} holds no label: {error!r}") from error
    return label if label >= 0 else None


@dataclass(frozen=True)
class _Table:
    """What is known of all samples of some archives; arrays, which loader processes share.

    Attributes:
        tar: [samples] which archive.
        offset: [samples] of the image in it.
        size: [samples] bytes of the image.
        label: [samples] a class's number, `UNLABELLED` without one.
        names: the members' names, one behind the other; UTF-8, or whatever bytes they are.
        name_end: [samples] where each name ends.
        classes: the names of the classes in the order of their numbers; empty if they have none.
    """

    tar: np.ndarray
    offset: np.ndarray
    size: np.ndarray
    label: np.ndarray
    names: np.ndarray
    name_end: np.ndarray
    classes: list[str]

    def name(self, index: int) -> str:
        start = self.name_end[index - 1] if index else 0
        return self.names[start : self.name_end[index]].tobytes().decode(errors="surrogateescape")


class TarImages:
    """A reader of the images in tars as timm's readers are: by index, fit for any sampler.

    Holds no file open, so that it may be copied to any number of loader processes.

    Args:
        tars: the archives.
        layout: ``"shards"``: WebDataset's; ``"tar"``: folders are classes; ``"tars"``: the archives
            themselves stand for folders.
        class_to_idx: numbers of the classes by name; None numbers them in natural order.
        target: the field of a shard's ``.json`` files that holds labels; None takes ``.cls``.

    Raises:
        OSError: an archive cannot be read, is torn, or holds a label that is no number.
        ValueError: an archive has a class that ``class_to_idx`` lacks.

    Attributes:
        class_to_idx: numbers of the classes by name; empty where classes have none.
        targets: [samples] labels, -1 without one.
    """

    def __init__(
        self,
        tars: Sequence[Path],
        *,
        layout: str,
        class_to_idx: dict[str, int] | None = None,
        target: str | None = None,
    ) -> None:
        self.tars = list(tars)
        found = [path.stat() for path in self.tars]
        self.states = [_state(status) for status in found]
        self._table = _listed(self.tars, found, layout, target)
        self.targets = self._table.label
        self.class_to_idx = {name: number for number, name in enumerate(self._table.classes)}
        if class_to_idx is not None and layout != "shards":
            self._renumber(class_to_idx)

    def _renumber(self, class_to_idx: dict[str, int]) -> None:
        strangers = [name for name in self._table.classes if name not in class_to_idx]
        if strangers:
            raise ValueError(
                f"data: {self.tars[0].parent} has classes that the training set lacks: "
                f"{strangers[:5]}"
            )
        # The last entry is what -1 picks.
        numbers = [*(class_to_idx[name] for name in self._table.classes), UNLABELLED]
        self.targets = np.asarray(numbers)[self._table.label]
        self.class_to_idx = class_to_idx

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[BinaryIO, int | None]:
        """An image's content, and its label.

        Raises:
            OSError: the archive cannot be read, or is not what was listed.
        """
        tar = int(self._table.tar[index])
        with open(self.tars[tar], "rb", buffering=0) as file:
            if _state(os.fstat(file.fileno())) != self.states[tar]:
                raise OSError(f"{self.tars[tar]} has changed since its samples were listed")
            file.seek(int(self._table.offset[index]))
            content = file.read(int(self._table.size[index]))
        label = int(self.targets[index])
        return io.BytesIO(content), None if label == UNLABELLED else label

    def filename(self, index: int, basename: bool = False, absolute: bool = False) -> str:
        """An image's archive and its name there, as ``train-0000.tar:key.jpg``.

        Args:
            index: of the sample.
            basename: the name alone, without archive and folders.
            absolute: with the archive's whole path.
        """
        name = self._table.name(index)
        if basename:
            return name.rsplit("/", 1)[-1]
        path = self.tars[int(self._table.tar[index])]
        return f"{path if absolute else path.name}:{name}"


def _state(status: os.stat_result) -> tuple[int, int]:
    """What changes with an archive: its size and when it was written."""
    return status.st_size, status.st_mtime_ns


def _listed(
    tars: list[Path], found: list[os.stat_result], layout: str, target: str | None
) -> _Table:
    """The table kept beside the archives, if it is of these; else made, and kept if possible."""
    of = {
        "version": _VERSION,
        # ctime: whoever copies or unpacks archives may set the time at which they were written.
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
    shown = Bar(tars, desc="listing", unit="tar", leave=False, delay=_SLOW, disable=None)
    listings = [
        list_shard(path, target) if layout == "shards" else list_classes(path, layout == "tars")
        for path in shown
    ]
    members = [member for listing in listings for member in listing.members]
    labels = [label for listing in listings for label in listing.labels]
    classes = sorted({label for label in labels if isinstance(label, str)}, key=natural_key)
    numbers: dict[str | int | None, int] = {name: number for number, name in enumerate(classes)}
    names = [member.name.encode(errors="surrogateescape") for member in members]
    return _Table(
        tar=np.repeat(np.arange(len(tars)), [len(listing.members) for listing in listings]),
        offset=np.array([member.offset for member in members], np.int64),
        size=np.array([member.size for member in members], np.int64),
        label=np.array([_number(label, numbers) for label in labels], np.int64),
        names=np.frombuffer(b"".join(names), np.uint8),
        name_end=np.cumsum([len(name) for name in names], dtype=np.int64),
        classes=classes,
    )


def _number(label: str | int | None, numbers: dict[str | int | None, int]) -> int:
    if label is None:
        return UNLABELLED
    return label if isinstance(label, int) else numbers[label]


_ARRAYS = ("tar", "offset", "size", "label", "names", "name_end")


def _save(path: Path, of: dict[str, Any], table: _Table) -> None:
    header = json.dumps({"of": of, "classes": table.classes}).encode()
    arrays = {name: getattr(table, name) for name in _ARRAYS}
    with replacing(path) as file:
        np.savez(file, header=np.frombuffer(header, np.uint8), **arrays)


def _load(path: Path, of: dict[str, Any]) -> _Table | None:
    """The table in a file; None where there is none, it is broken, or it is of other archives."""
    try:
        with np.load(path, allow_pickle=False) as kept:
            header = json.loads(kept["header"].tobytes())
            if header["of"] != of:
                return None
            arrays = {name: kept[name] for name in _ARRAYS}
            return _Table(**arrays, classes=header["classes"])
    # RuntimeError: of a kind of archive that Python does not read.
    except (OSError, ValueError, KeyError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error):
        return None
