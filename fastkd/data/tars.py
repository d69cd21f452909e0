"""List the images and labels of tars and WebDataset shards, and read shards' ``_info.json``."""

from __future__ import annotations

import json
import os
import posixpath
import tarfile
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from fastkd.data.classes import NO_LABEL, LabelError, class_number
from fastkd.data.image_files import (
    LeftOut,
    image_endings,
    is_hidden,
    is_image,
    is_inside,
    open_file,
)

SPLITS = {"train": ("train", "training"), "validation": ("validation", "val", "valid", "test")}
SHARD_LISTS = ("_info.json", "info.json")  # beside WebDataset shards, as timm reads them
MAX_CLASSES = 10**6  # where shards do not state their number of classes
_PEEKED = 64  # headers that tell a shard from another tar


class Member(NamedTuple):
    """A file in an archive."""

    name: str  # its path; in a tar of a tar, that of the inner archive comes first
    offset: int  # of its content
    size: int


class Listing(NamedTuple):
    """Images of one archive."""

    members: list[Member]
    labels: list[str | int | None]  # a class name, a number, or None
    empty: list[str]  # classes without images


def _members(
    file: BinaryIO, path: str, left_out: LeftOut, start: int = 0, prefix: str = ""
) -> Iterator[Member]:
    """List the archive that starts at a byte of a file; names of folders end in "/"."""
    file.seek(start)
    try:
        with tarfile.open(fileobj=file, mode="r:") as archive:
            found = [part for part in _files(archive, path, left_out) if not is_hidden(part.name)]
            end = archive.offset
    except tarfile.TarError as error:
        raise OSError(f"{path} is no whole, uncompressed tar: {error}") from error
    file.seek(end)
    block = file.read(tarfile.BLOCKSIZE)
    if len(block) < tarfile.BLOCKSIZE or any(block):  # two blocks of zeros end an archive
        raise OSError(f"{path} is no whole tar: it is cut short or damaged at byte {end}")
    if start == 0 and any(file.read(tarfile.RECORDSIZE)):
        raise OSError(f"{path} has data behind its end: tars that were joined are not read")
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
        if info.isdir():
            yield Member(f"{info.name}/", 0, 0)
        elif info.isreg() and not info.issparse():  # whose content is not in one piece
            found[info.name] = Member(info.name, info.offset_data, info.size)
            yield found[info.name]
        elif info.islnk() and info.linkname in found:
            found[info.name] = found[info.linkname]._replace(name=info.name)
            yield found[info.name]
        elif info.islnk():
            raise OSError(f"{path}: {info.name} links to {info.linkname}, which is not before it")
        else:
            links.append(info)
    targets = {posixpath.normpath(name): member for name, member in found.items() if links}
    for info in links:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(info.name), info.linkname))
        if info.issym() and target in targets:
            yield targets[target]._replace(name=info.name)
        elif not is_hidden(info.name):
            left_out.add(LeftOut.IRREGULAR, f"{path}:{info.name}")


def list_classes(path: Path, in_folder: bool, left_out: LeftOut) -> Listing:
    """List the images of a plain tar, labeled by the folders at its top.

    Folders that all images are in, such as ``train/``, do not count, unless they would be the only
    ones of an image. With ``in_folder`` the archive stands for a folder, which is the class.
    """
    images: list[Member] = []
    others: list[Member] = []
    with open_file(path) as file:
        for member in _members(file, os.fspath(path), left_out):
            (images if is_image(member.name) else others).append(member)
    for member in others:
        if member.name[-1] != "/":
            left_out.add(LeftOut.NO_IMAGE, f"{path}:{member.name}")
    if in_folder:
        return Listing(images, [path.stem] * len(images), [] if images else [path.stem])
    places = [_parts(member.name) for member in images]
    lead = list(os.path.commonprefix([place[:-2] for place in places]))  # noqa: RUF071 - of lists
    shared = len(lead)
    names: list[str | int | None] = [p[shared] if len(p) > shared + 1 else None for p in places]
    beside = (_parts(member.name) for member in others)
    classes = {part[shared] for part in beside if len(part) > shared + 1 and part[:shared] == lead}
    return Listing(images, names, sorted(classes - set(names)))


def _parts(name: str) -> list[str]:
    """Split a member's path; that of a folder ends in an empty part, for the files in it."""
    return [*filter(None, posixpath.normpath(name).split("/")), *[""] * name.endswith("/")]


def list_shard(path: Path, left_out: LeftOut | None = None) -> Listing:
    """List the images of a WebDataset shard with the labels of their ``.cls``; None without one."""
    images: list[Member] = []
    labels: list[str | int | None] = []
    left_out = LeftOut() if left_out is None else left_out
    with open_file(path) as file:
        found = _members(file, os.fspath(path), left_out)
        members = {member.name: member for member in found if member.name[-1] != "/"}
        for image, fields in samples_of(members, os.fspath(path), left_out).values():
            if image is None:
                continue
            images.append(members[image])
            labels.append(None)
            if label := members.get(fields.get("cls", "")):
                file.seek(label.offset)
                labels[-1] = parse_label(file.read(label.size), f"{path}:{label.name}")
    return Listing(images, labels, [])


def samples_of(
    names: Iterable[str], shard: str, left_out: LeftOut
) -> dict[str, tuple[str | None, dict[str, str]]]:
    """Group a shard's members by key of their sample: (image, members by field in lower case).

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
        samples[key] = image, members
        for name in members.values():
            if image is None:
                left_out.add(LeftOut.ALONE, f"{shard}:{name}")
            elif name != image and name in pictures:
                left_out.add(LeftOut.FIELD, f"{shard}:{name}")
    return samples


def is_shard(path: str | os.PathLike[str]) -> bool:
    """Return whether an archive is a WebDataset shard, by its first headers."""
    try:
        with open_file(path) as file, tarfile.open(fileobj=file, mode="r:") as archive:
            names = [info.name for info in islice(archive, _PEEKED) if not is_hidden(info.name)]
    except tarfile.TarError as error:
        raise OSError(f"{path} is no whole, uncompressed tar: {error}") from error
    parts = [os.path.splitext(name) for name in names]
    if any(ending.lower() == ".cls" for _, ending in parts):
        return True
    # Without labels: images with descriptions, in no folder. Plain tars may hold .json files, too.
    images = {key for key, ending in parts if is_image(f"a{ending}")}
    described = {key for key, ending in parts if ending.lower() == ".json"}
    return any("/" not in key.removeprefix("./") for key in images & described)


def parse_label(content: bytes, name: str, classes: int = 0) -> int | None:
    """Read the label in a shard's ``.cls``; None for -1."""
    try:
        label = class_number(int(content), name)
    except ValueError as error:
        text = f"data: {name} holds no label, a whole number: {error!r:.250}"
        raise LabelError(text) from error
    if label is not None and label >= (classes or MAX_CLASSES):
        known = f"there are {classes} classes" if classes else f"labels lie below {MAX_CLASSES}"
        raise LabelError(f"data: {name} holds the label {label}, but {known}")
    return None if label == NO_LABEL else label


class ShardSplit(NamedTuple):
    """A split in a list of WebDataset shards."""

    files: tuple[str, ...]
    samples: int | None = None  # None: unknown
    classes: int = 0  # 0: unknown
    names: tuple[str, ...] = ()  # of the classes by label; empty: unknown


def parse_shard_list(text: bytes, where: str) -> dict[str, ShardSplit]:
    """Read the text of an ``_info.json``; empty if it lists no splits."""
    try:
        info = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"data: {where} is no JSON: {error}") from error
    if not isinstance(info, dict) or "splits" not in info:
        return {}
    splits, classes = info["splits"], info.get("classes") or []
    if not isinstance(classes, list | dict):
        raise ValueError(f"data: {where}: classes must be a list, got {type(classes).__name__}")
    if not isinstance(splits, dict) or not splits:
        raise ValueError(f"data: {where}: splits must be named, got {splits!r}")
    return {name: _parse_split(where, name, split, classes) for name, split in splits.items()}


def _parse_split(where: str, name: str, split: Any, classes: Any) -> ShardSplit:
    folder, where = os.path.dirname(where) or ".", f"data: {where}: split {name}"
    split = split if isinstance(split, dict) else {}
    files, samples = split.get("filenames"), split.get("num_samples")
    if not isinstance(files, list) or not files or not all(isinstance(f, str) for f in files):
        raise ValueError(f"{where} must have a list of filenames, got {files!r:.50}")
    for file in files:
        if os.path.isabs(file) or not is_inside(file, folder):
            raise ValueError(f"{where} lists {file!r}, which leaves the list's folder")
    if len({*map(os.path.normpath, files)}) < len(files):
        raise ValueError(f"{where} lists a shard twice")
    if not isinstance(samples, int | None) or not 0 <= (samples or 0) < 2**63:
        raise ValueError(f"{where}: num_samples must be a number, got {samples!r:.50}")
    if field := split.get("alt_label"):  # of timm, in the samples' .json
        raise ValueError(f"{where}: alt_label must be empty, got {field!r}: labels are in .cls")
    names = tuple(map(str, classes)) if isinstance(classes, list) else ()
    return ShardSplit(tuple(files), samples or None, len(classes), names)
