"""Random access to images in plain tars (labels are folders), tars of tars and WebDataset shards.

The headers are read once, and what they list is kept beside the archives.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import posixpath
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from fastkd.data.classes import (
    UNLABELLED,
    LabelError,
    class_number,
    map_classes,
    number_classes,
)
from fastkd.data.files import (
    LeftOut,
    image_endings,
    is_hidden,
    is_image,
    tell_left_out,
)
from fastkd.data.images import open_file
from fastkd.utils.io import replacing
from fastkd.utils.progress import track

_VERSION = 5  # of the listing kept beside the archives
_PEEKED = 64  # headers that tell a shard from another tar
MOST_CLASSES = 10**6  # labels of shards lie below it, where their number of classes is not known


class Member(NamedTuple):
    """A file in an archive."""

    name: str  # its path; in a tar of a tar, that of the inner archive comes first
    offset: int  # of its content
    size: int


def list_members(path: str | os.PathLike[str]) -> list[Member]:
    """List the regular files of a whole, uncompressed tar and of the tars in it, or raise."""
    with open_file(path) as file:
        return [member for member in _members(file, os.fspath(path)) if member.name[-1] != "/"]


def _members(
    file: BinaryIO, path: str, left_out: LeftOut | None = None, start: int = 0, prefix: str = ""
) -> Iterator[Member]:
    """List the archive that starts at a byte of an open file; the names of folders end in "/"."""
    file.seek(start)
    left_out = LeftOut() if left_out is None else left_out
    try:
        with tarfile.open(fileobj=file, mode="r:") as archive:
            found = [
                member for member in _files(archive, path, left_out) if not is_hidden(member.name)
            ]
            end = archive.offset
    except tarfile.TarError as error:
        raise OSError(f"{path} is no whole, uncompressed tar: {error}") from error
    _check_end(file, path, end, inner=start > 0)
    seen: set[str] = set()
    for member in found:
        name = posixpath.normpath(member.name)
        if name.split("/")[0] == "..":
            raise OSError(f"{path}: {member.name} leaves the archive")
        if member.name[-1] != "/" and name in seen:
            raise OSError(f"{path} has two members with the name {name}")
        seen.add(name)
    for member in found:
        if member.name.lower().endswith(".tar"):
            inner = f"{prefix}{member.name[:-4]}/"
            yield from _members(file, path, left_out, member.offset, inner)
        else:
            yield member._replace(name=prefix + member.name)


def _files(archive: tarfile.TarFile, path: str, left_out: LeftOut) -> Iterator[Member]:
    """List one archive's files and folders; a link stands for the file that it names."""
    found: dict[str, Member] = {}
    links: list[tarfile.TarInfo] = []
    for info in archive:
        if info.isreg() and not info.issparse():  # whose content is not in one piece
            member = Member(info.name, info.offset_data, info.size)
        elif info.islnk() and info.linkname in found:
            member = found[info.linkname]._replace(name=info.name)
        elif info.islnk():
            raise OSError(f"{path}: {info.name} links to {info.linkname}, which is not before it")
        elif info.isdir():
            yield Member(f"{info.name}/", 0, 0)
            continue
        else:
            links.append(info)
            continue
        found[info.name] = member
        yield member
    targets = {posixpath.normpath(name): member for name, member in found.items() if links}
    for info in links:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(info.name), info.linkname))
        if info.issym() and target in targets:
            yield targets[target]._replace(name=info.name)
        elif not is_hidden(info.name):
            left_out.add(LeftOut.IRREGULAR, f"{path}:{info.name}")


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
    empty: list[str]  # classes without images
    folders: int = 0  # that the images are in


def list_classes(path: Path, in_folder: bool, left_out: LeftOut | None = None) -> Listing:
    """List the images of a plain tar, labelled by the folders at its top; None without a folder.

    Folders that all images are in, such as ``train/``, do not count, unless they would be the only
    ones of an image. With ``in_folder`` the archive stands for a folder, which is the class.
    """
    images: list[Member] = []
    others: list[Member] = []
    with open_file(path) as file:
        for member in _members(file, os.fspath(path), left_out):
            (images if is_image(member.name) else others).append(member)
    if left_out is not None:
        for member in others:
            if member.name[-1] != "/":
                left_out.add(LeftOut.NO_IMAGE, f"{path}:{member.name}")
    within = len({posixpath.dirname(member.name) for member in images})
    if in_folder:
        return Listing(images, [path.stem] * len(images), [] if images else [path.stem], within)
    places = [_parts(member.name) for member in images]
    shared = 0
    while places and all(
        len(place) > shared + 2 and place[shared] == places[0][shared] for place in places
    ):
        shared += 1
    names: list[str | int | None] = [p[shared] if len(p) > shared + 1 else None for p in places]
    other = (_parts(member.name) for member in others)
    lead = places[0][:shared] if places else []
    folders = {part[shared] for part in other if len(part) > shared + 1 and part[:shared] == lead}
    return Listing(images, names, sorted(folders - set(names)), within)


def _parts(name: str) -> list[str]:
    """Split a member's path; that of a folder ends in an empty part, for the files in it."""
    return [*filter(None, posixpath.normpath(name).split("/")), *[""] * name.endswith("/")]


def list_shard(path: Path, target: str | None = None, left_out: LeftOut | None = None) -> Listing:
    """List the images of a WebDataset shard with their labels; None without one, or below zero.

    Labels are in the field ``target`` of the samples' ``.json``, or in ``.cls`` without a target.
    """
    images: list[Member] = []
    labels: list[str | int | None] = []
    left_out = LeftOut() if left_out is None else left_out
    with open_file(path) as file:
        members: dict[str, Member] = {}
        for member in _members(file, os.fspath(path), left_out):
            if member.name[-1] != "/":
                members[member.name] = member
        for image, fields in samples_of(members, os.fspath(path), left_out).values():
            if image is None:
                continue
            images.append(members[image])
            labels.append(None)
            if label := members.get(fields.get("cls" if target is None else "json", "")):
                file.seek(label.offset)
                name = f"{path}:{label.name}"
                try:
                    labels[-1] = parse_label(file.read(label.size), target, name)
                except LabelError as error:
                    raise OSError(str(error)) from error
    return Listing(images, labels, [])


class Fields(NamedTuple):
    """Members of one sample of a shard."""

    image: str | None
    members: dict[str, str]  # by field, in lower case


def samples_of(names: Iterable[str], shard: str, left_out: LeftOut) -> dict[str, Fields]:
    """Group the members of a shard by the key of their sample.

    WebDataset's keys end at the first dot of a file's name, but c.v2.jpg is an image of its own
    where there is no c.jpg, or where there is a c.v2.cls, too.
    """
    roots = {name: os.path.splitext(name)[0] for name in names}
    pictures = {name for name in roots if is_image(name)}
    images = {root for name, root in roots.items() if name in pictures}
    described = {root for name, root in roots.items() if name not in pictures}
    grouped: dict[str, dict[str, str]] = {}
    for name, key in roots.items():
        folder, slash, file = name.rpartition("/")
        parts = file.split(".")
        if len(parts) > 2:
            keys = [f"{folder}{slash}{'.'.join(parts[:n])}" for n in range(1, len(parts))]
            with_image = [key for key in keys if key in images]
            own = [key for key in with_image if key in described or key == with_image[0]]
            key = own[-1] if own else keys[0]
        members, field = grouped.setdefault(key, {}), name[len(key) + 1 :].lower()
        members[name if field in members else field] = name
    kinds = [ending[1:] for ending in image_endings()]
    samples = {}
    for key, members in grouped.items():
        image = next((members[kind] for kind in kinds if kind in members), None)
        samples[key] = Fields(image, members)
        for name in members.values():
            if image is None:
                left_out.add(LeftOut.ALONE, f"{shard}:{name}")
            elif name != image and name in pictures:
                left_out.add(LeftOut.FIELD, f"{shard}:{name}")
    return samples


def holds_samples(path: str | os.PathLike[str]) -> bool:
    """Return whether an archive is a WebDataset shard, by its first headers.

    It has labels (``.cls``), or images with descriptions (``.json``) beside them and in no folder:
    a plain tar may hold descriptions of anything, too.
    """
    try:
        with open_file(path) as file, tarfile.open(fileobj=file, mode="r:") as archive:
            names = [info.name for info in islice(archive, _PEEKED) if not is_hidden(info.name)]
    except tarfile.TarError as error:
        raise OSError(f"{path} is no whole, uncompressed tar: {error}") from error
    parts = [os.path.splitext(name) for name in names]
    if any(ending.lower() == ".cls" for _, ending in parts):
        return True
    images = {key for key, ending in parts if is_image(f"a{ending}")}
    described = {key for key, ending in parts if ending.lower() == ".json"}
    return any("/" not in key.removeprefix("./") for key in images & described)


def parse_label(content: bytes, target: str | None, name: str, classes: int = 0) -> int | None:
    """Read the label in a shard's ``.cls``, or in a field of its ``.json``; None below zero.

    Raise a LabelError for what is no whole number, or one beyond the classes.
    """
    try:
        value = int(content) if target is None else json.loads(content)[target]
        if target is not None and type(value) is int and value < 0:
            return None  # of another split, as timm reads it
        label = class_number(value, name)
        if label is None:
            raise ValueError("null")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise LabelError(
            f"{name} holds no label, which is a whole number: {error!r:.250}"
        ) from error
    if label >= (classes or MOST_CLASSES):
        known = f"there are {classes} classes" if classes else f"labels lie below {MOST_CLASSES}"
        raise LabelError(f"{name} holds the label {label}, but {known}")
    return None if label == UNLABELLED else label


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
    empty: list[str]  # names of classes without images
    folders: int  # that the images are in
    left_out: str  # what is no part of the data

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
        self.empty, self.folders = self._table.empty, self._table.folders
        several = layout == "shards" or len(self.tars) > 1
        tell_left_out(self.tars[0].parent if several else self.tars[0], self._table.left_out)
        if class_to_idx is not None and layout != "shards":
            self.renumber(class_to_idx)

    def renumber(self, class_to_idx: dict[str, int]) -> None:
        """Take the class numbers of a training set."""
        numbers = map_classes(self.class_to_idx, class_to_idx, self.tars[0].parent)
        # The last entry is what -1 picks.
        self.targets = np.array([*numbers.values(), UNLABELLED])[self._table.label]
        self.class_to_idx = class_to_idx

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[BinaryIO, int | None]:
        tar = int(self._table.tar[index])
        with open_file(self.tars[tar], buffering=0) as file:
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
        "extensions": [*image_endings()],
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
    left_out = LeftOut()
    listings = [
        list_shard(path, target, left_out)
        if layout == "shards"
        else list_classes(path, layout == "tars", left_out)
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
        empty=[name for listing in listings for name in listing.empty],
        folders=sum(listing.folders for listing in listings),
        left_out=str(left_out),
    )


_ARRAYS = ("tar", "offset", "size", "label", "names", "name_end")


def _save(path: Path, of: dict[str, Any], table: _Table) -> None:
    plain = {name: getattr(table, name) for name in ("classes", "empty", "folders", "left_out")}
    header = json.dumps({"of": of, **plain}).encode()
    arrays = {name: getattr(table, name) for name in _ARRAYS}
    with replacing(path) as file:
        np.savez(file, header=np.frombuffer(header, np.uint8), **arrays)


def _load(path: Path, of: dict[str, Any]) -> _Table | None:
    """Load a table; None where there is none, it is broken, or it is of other archives."""
    try:
        with open_file(path) as file, np.load(file, allow_pickle=False) as kept:
            header = json.loads(kept["header"].tobytes())
            if header.pop("of") != of:
                return None
            arrays = {name: kept[name] for name in _ARRAYS}
            return _Table(**arrays, **header)
    except Exception:  # no listing of ours, or a broken one, of which anything may come
        return None
