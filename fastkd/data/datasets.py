"""Datasets of images by index, from files or tars, and the pair that `open_data` returns."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image
from timm.data.readers.reader_image_folder import ReaderImageFolder
from torch.utils.data import Dataset

from fastkd.data.classes import NO_LABEL, number_classes
from fastkd.data.image_files import (
    LeftOut,
    image_endings,
    open_file,
    open_image,
    reason_of,
    warn_left_out,
)
from fastkd.data.tars import list_classes, list_shard
from fastkd.utils.io import replacing, writable
from fastkd.utils.progress import track

_VERSION = 7  # of the index kept beside the archives


@dataclass(frozen=True)
class DataPair:
    """A training and an evaluation set of (image, label), by index or `StreamSource`s."""

    train: Any  # None where only evaluation is asked for
    val: Any
    num_classes: int | None  # None: unknown
    yields_tensors: bool  # float tensors [C, H, W] instead of PIL images
    image_size: tuple[int, int, int] | None  # (C, H, W) of the first image, if it is a tensor
    labeled_val: bool = True
    streams: bool = False
    numbers: Mapping[int, int] | None = None  # evaluation labels -> the model's; None: the same


class ReadableImages(Dataset[tuple[Any, Any]]):
    """The images of a timm reader; an image that cannot be read raises an OSError naming it."""

    # timm's own dataset takes the next image in its place: an accuracy would be of other images.

    def __init__(self, reader: Any, name: str = "data", labeled: bool = True) -> None:
        self.reader = reader  # gives (binary file, label) by index, and file names
        self.name = name  # for samples that have no file
        self.labeled = labeled
        self.num_classes: int | None = None  # where it differs from the reader's class_to_idx
        self.classes: Sequence[str] = ()  # names by label, where the reader has no class_to_idx

    def __len__(self) -> int:
        return len(self.reader)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        try:
            file, label, *_ = self.reader[index]
            with file:
                image = open_image(file)
                image.load()
        except Exception as error:  # what Pillow, its plugins and readers raise has no common base
            name = writable(self.filename(index))
            reason = reason_of(error)
            raise OSError(f"data: cannot read {name} (sample {index}): {reason}") from error
        return image, label if self.labeled and label is not None else NO_LABEL

    def filename(self, index: int) -> str:
        """Return a sample's absolute path, ``ARCHIVE.tar:MEMBER``, or ``NAME[INDEX]``."""
        return self.reader.filename(index, absolute=True) or f"{self.name}[{index}]"


class FileReader(ReaderImageFolder):
    """timm's reader of image folders, for (path, class number) that are listed already."""

    def __init__(
        self,
        root: str,
        samples: Sequence[tuple[str, Any]],
        class_to_idx: dict[str, int],
        empty: Sequence[str] = (),  # names of classes without images, which have no number
    ) -> None:
        self.root, self.samples = root, samples
        self.class_to_idx, self.empty = class_to_idx, empty

    def __getitem__(self, index: int) -> tuple[BinaryIO, Any]:
        path, label = self.samples[index]
        return open_file(path), label

    def renumber(self, numbers: Mapping[int, int], class_to_idx: dict[str, int]) -> None:
        """Take the class numbers of a training set; ``numbers`` maps this set's to those."""
        self.samples = [(path, numbers[label]) for path, label in self.samples]
        self.class_to_idx = class_to_idx


class TarImages:
    """A reader of images in tars, like timm's readers; open files do not outlive a call."""

    def __init__(self, tars: Sequence[Path], layout: str) -> None:
        # Layouts: "shards" of WebDataset; a "tar" with a folder per class; "tars", one per class.
        self.tars = list(tars)
        found = [path.stat() for path in self.tars]
        self.states = [_state(status) for status in found]
        about, self._index = _open_index(self.tars, found, layout)
        self.targets = self._index["label"]  # [samples]
        self.class_to_idx = {name: number for number, name in enumerate(about["classes"])}
        self.empty = about["empty"]
        several = layout == "shards" or len(self.tars) > 1
        warn_left_out(self.tars[0].parent if several else self.tars[0], about["left_out"])

    def renumber(self, numbers: Mapping[int, int], class_to_idx: dict[str, int]) -> None:
        """Take the class numbers of a training set; ``numbers`` maps this set's to those."""
        new = [numbers[number] for number in self.class_to_idx.values()]
        self.targets = np.array([*new, NO_LABEL])[self._index["label"]]  # -1 picks the last
        self.class_to_idx = class_to_idx

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[BinaryIO, int | None]:
        tar, offset, size = (int(self._index[name][index]) for name in ("tar", "offset", "size"))
        with open_file(self.tars[tar], buffering=0) as file:
            if _state(os.fstat(file.fileno())) != self.states[tar]:
                raise OSError(f"{self.tars[tar]} has changed since its samples were listed")
            file.seek(offset)
            content = file.read(size)
        label = int(self.targets[index])
        return io.BytesIO(content), None if label == NO_LABEL else label

    def filename(self, index: int, absolute: bool = True) -> str:  # arguments as in timm's readers
        """Return an image's archive and its name there, as ``/shards/train-0000.tar:key.jpg``."""
        start = self._index["name_end"][index - 1] if index else 0
        encoded = self._index["names"][start : self._index["name_end"][index]].tobytes()
        name = encoded.decode(errors="surrogateescape")
        return f"{self.tars[int(self._index['tar'][index])]}:{name}"


def _state(status: os.stat_result) -> tuple[int, int]:
    return status.st_size, status.st_mtime_ns


def _open_index(
    tars: list[Path], found: list[os.stat_result], layout: str
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Load the index beside the archives, if it is of these; else list them, and keep it there."""
    # ctime, since copying or unpacking archives may set their mtime.
    states = [[path.name, *_state(s), s.st_ctime_ns] for path, s in zip(tars, found, strict=True)]
    of = [_VERSION, states, [*image_endings()], layout]
    digest = hashlib.sha256(json.dumps([path.name for path in tars]).encode()).hexdigest()
    kept = tars[0].parent / f".fastkd-{digest[:12]}.npz"
    with (
        contextlib.suppress(Exception),  # of a broken file, or of another program's
        open_file(kept) as opened,
        np.load(opened, allow_pickle=False) as loaded,
    ):
        about = json.loads(loaded["about"].tobytes())
        if about["of"] == of:
            return about, {name: loaded[name] for name in loaded if name != "about"}
    about, arrays = _list_tars(tars, layout)
    text = json.dumps({"of": of, **about}).encode()
    with contextlib.suppress(OSError), replacing(kept) as file:  # read-only data have no index
        np.savez(file, about=np.frombuffer(text, np.uint8), **arrays)
    return about, arrays


def _list_tars(tars: list[Path], layout: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """List all samples, in arrays, which loader processes share without a copy."""
    left_out = LeftOut()
    listings = [
        list_shard(path, left_out)
        if layout == "shards"
        else list_classes(path, layout == "tars", left_out)
        for path in track(tars, "listing", "tar")
    ]
    members = [member for listing in listings for member in listing.members]
    labels = [label for listing in listings for label in listing.labels]
    classes = number_classes({label for label in labels if isinstance(label, str)})
    numbers: dict[Any, int] = {None: NO_LABEL, **classes}
    names = [member.name.encode(errors="surrogateescape") for member in members]
    arrays: dict[str, Any] = {
        "tar": np.repeat(np.arange(len(tars)), [len(listing.members) for listing in listings]),
        "offset": np.array([member.offset for member in members], np.int64),  # of the image
        "size": np.array([member.size for member in members], np.int64),  # bytes
        "label": np.array([numbers.get(label, label) for label in labels], np.int64),
        "names": np.frombuffer(b"".join(names), np.uint8),  # joined
        "name_end": np.cumsum([len(name) for name in names], dtype=np.int64),
    }
    about: dict[str, Any] = {
        "classes": list(classes),  # empty if labels are numbers
        "empty": [name for listing in listings for name in listing.empty],
        "left_out": str(left_out),
    }
    return about, arrays
