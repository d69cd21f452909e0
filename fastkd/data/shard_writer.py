"""Write a folder of images as WebDataset shards in worker processes; interrupted work continues."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import random
import signal
import threading
from collections.abc import Generator, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import chain, groupby, islice
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Any, NamedTuple

from PIL import ExifTags, Image

from fastkd.data.datasets import TarImages
from fastkd.data.image_files import MAX_FILE, open_file, open_image, reason_of, refuse_deep
from fastkd.data.open_data import UNFINISHED, VALIDATION_FOLDERS, open_data, refuse_empty_classes
from fastkd.data.tars import SHARD_LISTS, list_shard
from fastkd.utils.argument_checks import MOST_WORKERS, check_numbers, refuse_blank
from fastkd.utils.io import remove_leftovers, replacing, write_text
from fastkd.utils.lock import NAME, holding
from fastkd.utils.progress import Progress, track

CHUNK = 16  # images that a worker converts at a time
EXTENSIONS = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}  # MPO: several JPEGs


class ShardReport(NamedTuple):
    """What `shard` wrote."""

    folder: Path
    samples: dict[str, int]  # images in shards, by split
    shards: dict[str, int]  # number of shards, by split
    classes: int  # 0 without labels
    size: int  # bytes of all shards
    unreadable: list[tuple[str, str]]  # (file, reason) of images that are in no shard
    converted: int  # images that this run converted

    def summary(self) -> str:
        """Summarize the report in one line."""
        splits = ", ".join(f"{k} {self.samples[k]:,} in {n:,}" for k, n in self.shards.items())
        labels = f" of {self.classes:,} classes" if self.classes else ", unlabeled"
        lost = f"; {len(self.unreadable)} unreadable, see unreadable.txt" if self.unreadable else ""
        total = f"{sum(self.samples.values()):,} images{labels} in {sum(self.shards.values()):,}"
        total += f" shards ({splits}), {self.size / 1e6:,.1f} MB, verified"
        return f"{self.folder}: {total}{lost}"


def shard(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    *,
    short_side: int | None = 256,
    quality: int = 90,
    shard_size: float = 64,
    samples_per_shard: int | None = None,
    max_unreadable: int | None = None,
    workers: int | None = None,
    seed: int = 0,
    quiet: bool = False,
) -> ShardReport:
    """Write a folder's images as WebDataset shards, which `open_data` and timm read.

    A sample is ``KEY.jpg`` (or png, webp), ``KEY.cls`` (class number, if any) and ``KEY.json``
    (file name). ``_info.json`` lists shards and class names, ``unreadable.txt`` images left out.
    Images larger than ``short_side`` are resized (bicubic) and stored as JPEG; others are copied.
    The same call continues interrupted work, and ends with the bytes of uninterrupted work.

    Args:
        source: folder with ``train`` and ``val`` (or ``validation``), of classes, or of images.
        destination: a new or empty folder, or one of the same work interrupted.
        short_side: maximum length of the shorter side in pixels; None copies every image.
        quality: JPEG quality, 1 to 95.
        shard_size: size in MB (10^6 bytes) at which a shard is closed.
        samples_per_shard: images per shard, instead of ``shard_size``.
        max_unreadable: broken images skipped before the work stops; None: 1 % of all, at least 20.
        workers: number of processes that convert; None: one per core.
        seed: of the order, which puts images of many classes into every shard.
        quiet: show no progress.

    Returns:
        What was written.

    Raises:
        ValueError: an option out of range, no readable images, a ``destination`` of other content.
        RuntimeError: verification failed, a worker died, or another process is writing there.
        OSError: a file cannot be read or written, or too many images are broken.
    """
    try:
        from webdataset import TarWriter
    except ImportError as error:
        raise ImportError(f"shard: {error}: pip install webdataset") from error
    check_numbers(
        "shard",
        short_side=(short_side, 1),
        quality=(quality, 1, 95),
        samples_per_shard=(samples_per_shard, 1),
        shard_size=(shard_size, 1e-6),
        max_unreadable=(max_unreadable, 0),
        workers=(workers, 1, MOST_WORKERS),
        seed=(seed, 0),
    )
    refuse_blank("shard", source=source, destination=destination)
    options: dict[str, Any] = {"short_side": short_side, "quality": quality, "seed": seed}
    options |= {"samples_per_shard": samples_per_shard, "shard_size": shard_size}
    work = _Work(Path(source), Path(destination), options, quiet)
    most = max(20, len(work.images) // 100) if max_unreadable is None else max_unreadable
    with holding(work.folder, "shard: destination"):
        work.resume()
        if left := len(work.left):
            with contextlib.closing(work.samples(workers, most)) as images:
                work.write(images, TarWriter)
            work.scan()
        work.finish()
    samples = {split: sum(done.values()) for split, done in work.shards.items()}
    shards = {split: len(done) for split, done in work.shards.items()}
    size = sum(path.stat().st_size for path in work.folder.glob("*.tar"))
    lost = sorted(work.unreadable.items())
    return ShardReport(work.folder, samples, shards, len(work.classes), size, lost, left)


class _Work:
    """What the shards are to hold, and which of them are written."""

    def __init__(self, source: Path, folder: Path, options: dict[str, Any], quiet: bool) -> None:
        if not source.is_dir():
            raise ValueError(f"shard: source: no folder {str(source)!r}")
        self.source, self.folder, self.options, self.quiet = source, folder, options, quiet
        self.images: list[Any] = []  # (split, key, file, label, whether a dead link) in order
        self.left: list[Any] = []  # in no shard, and not known as unreadable
        self.shards: dict[str, dict[str, int]] = {}  # number of samples by split and file name
        self.unreadable: dict[str, str] = {}  # reasons by file
        self.classes: list[str] = []  # names by number; empty without labels
        parted = (source / "train").is_dir()
        names = {source.resolve().name, *os.listdir(source)}
        second = "validation" if parted or names & set(VALIDATION_FOLDERS) else "train"
        pair = open_data(source, need_train=parted, labels=False)
        digest = hashlib.sha256()
        for split, data in (("train", pair.train), (second, pair.val))[0 if parted else 1 :]:
            if isinstance(data.reader, TarImages):
                raise ValueError(f"shard: source: {source} holds tars, not image files")
            if split == "train":
                refuse_empty_classes(data, source)
            if data.labeled:
                self.classes = sorted(data.reader.class_to_idx, key=data.reader.class_to_idx.get)
            images: list[Any] = []
            for path, label in track(data.reader.samples, f"listing {split}", "file", not quiet):
                file, key = os.path.relpath(path, source), f"{len(images):08d}"
                dead = os.path.islink(path) and not os.path.exists(path)
                images.append((split, key, file, label if data.labeled else None, dead))
                size = None if dead else os.path.getsize(path)
                digest.update(os.fsencode(f"{images[-1]} {size}\n"))
            random.Random(f"{options['seed']} {split}").shuffle(images)
            self.images, self.shards[split] = self.images + images, {}
        self.identity = {"source": digest.hexdigest(), **options}

    def resume(self) -> None:
        """Take over the shards of an earlier run; refuse a folder of anything else."""
        kept: dict[str, Any] = {}
        for name in (SHARD_LISTS[0], UNFINISHED):  # the second, if there, is newer
            with contextlib.suppress(FileNotFoundError, ValueError, KeyError, TypeError):
                found = json.loads((self.folder / name).read_text())["fastkd"]
                kept = {part: dict(found[part]) for part in ("identity", "unreadable")}
        where = f"shard: destination: {self.folder}"
        remove_leftovers(self.folder)  # of a process killed in its first write
        if not kept and any(path.name != NAME for path in self.folder.iterdir()):
            raise ValueError(f"{where} holds something other than shards; name a new folder")
        for name, value in self.identity.items():
            if kept and (other := kept["identity"].get(name)) != value:
                raise ValueError(f"{where} has shards of another run: {name} {other}, not {value}")
        if any(self.folder.glob("*.tar")):  # else all images are read anew
            self.unreadable = kept["unreadable"]
        self.scan()

    def scan(self) -> None:
        """Count the samples of all shards; raise if they are not what should be in them."""
        self.left = []
        for split, shards in self.shards.items():
            readable = (i for i in self.images if i[0] == split and i[2] not in self.unreadable)
            shards.clear()
            found = sorted(self.folder.glob(f"{split}-*.tar"))
            for path in track(found, f"verifying {split}", "shard", not self.quiet):
                if path.name != f"{split}-{len(shards):06d}.tar":
                    break  # one is missing
                keys = [member.name.partition(".")[0] for member in list_shard(path).members]
                if keys != [key for _, key, *_ in islice(readable, len(keys))]:
                    raise RuntimeError(f"shard: {path} does not hold what was written to it")
                shards[path.name] = len(keys)
            self.left += readable

    def samples(self, workers: int | None, most: int) -> Generator[tuple[str, Any]]:
        """Yield (split, sample) of what is left; stop at more than ``most`` unreadable images."""
        workers = workers or len(os.sched_getaffinity(0))
        total, window = len(self.images), 2 * CHUNK * workers
        change = partial(convert, **{k: self.options[k] for k in ("short_side", "quality")})
        pool = ProcessPoolExecutor(workers, get_context("fork"), _begin_worker)
        bar = Progress("shard", total, initial=total - len(self.left), shows=not self.quiet)
        ahead: Iterator[Any] = iter(())
        with bar as progress, contextlib.ExitStack() as stack:
            stack.callback(pool.shutdown, cancel_futures=True)
            for start in range(0, len(self.left) + window, window):
                images = self.left[start : start + window]
                # A link that dies later is no broken image: the disk of its file may come back.
                files = (None if i[4] else os.path.join(self.source, i[2]) for i in images)
                results = pool.map(change, files, chunksize=CHUNK)
                ready, ahead = ahead, zip(images, results, strict=True)
                for (split, key, file, label, _), content in ready:
                    progress.advance(lost=int(isinstance(content, str)))
                    if isinstance(content, dict):
                        members = {"json": json.dumps({"filename": file}).encode(), **content}
                        members |= {} if label is None else {"cls": str(label).encode()}
                        yield split, {"__key__": key, **members}
                        continue
                    self.unreadable[file] = content
                    if (n := len(self.unreadable)) > most:
                        why = f"{n} of {total} images cannot be read, more than max_unreadable"
                        raise OSError(f"shard: source: {why} ({most}); the last: {file}: {content}")

    def write(self, samples: Iterator[tuple[str, Any]], writer: Any) -> None:
        """Write samples, given split by split, to shards."""
        count, size = self.options["samples_per_shard"], self.options["shard_size"]
        self.save()
        for split, group in groupby(samples, lambda sample: sample[0]):
            for first in group:
                path = self.folder / f"{split}-{len(self.shards[split]):06d}.tar"
                with replacing(path) as file, writer(file, encoder=False, mtime=0) as tar:
                    for length, (_, sample) in enumerate(chain([first], group), start=1):
                        tar.write(sample)
                        if length == count or (count is None and file.tell() >= size * 1e6):
                            break
                    self.save()  # what this shard lacks is known before it has its name
                self.shards[split][path.name] = length

    def save(self, **info: Any) -> None:
        """Record, beside what is in ``info``, which images are unreadable."""
        info["fastkd"] = {"identity": self.identity, "unreadable": self.unreadable}
        write_text(self.folder / UNFINISHED, json.dumps(info))

    def finish(self) -> None:
        """Write ``_info.json`` and ``unreadable.txt``."""
        if self.left:
            raise RuntimeError(f"shard: {len(self.left)} images are in no shard of {self.folder}")
        lines = [f"{file}\t{reason}\n" for file, reason in sorted(self.unreadable.items())]
        path = self.folder / "unreadable.txt"
        path.unlink(missing_ok=True)
        if lines:
            path.write_bytes(os.fsencode("".join(lines)))
        splits: dict[str, Any] = {}
        for split, shards in self.shards.items():
            if not shards:
                raise ValueError(f"shard: source: no image of {split} can be read; see {path}")
            splits[split] = {"name": split, "num_samples": sum(shards.values())}
            splits[split] |= {"filenames": [*shards], "shard_lengths": [*shards.values()]}
        self.save(splits=splits, classes=self.classes)
        os.replace(self.folder / UNFINISHED, self.folder / SHARD_LISTS[0])


def _begin_worker() -> None:
    """Leave interrupts to the main process, and end with it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent: Any = parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def convert(path: str | None, short_side: int | None, quality: int) -> dict[str, bytes] | str:
    """Return {extension: content} of an image as it is stored, or the reason why it cannot be."""
    if path is None:
        return "link to a missing file"
    with open_file(path) as file:  # an error here is the disk's, not the image's
        content = file.read(MAX_FILE + 1)
    try:
        with open_image(content) as image:
            image.load()  # truncated files are found here, copied or not
            refuse_deep(image)
            fits = short_side is None or min(image.size) <= short_side
            if fits and image.format in EXTENSIONS:
                return {EXTENSIONS[image.format]: content}
            exif = Image.Exif()
            if orientation := image.getexif().get(ExifTags.Base.Orientation):
                exif[ExifTags.Base.Orientation] = orientation
            stored = image if image.mode in ("L", "RGB") else image.convert("RGB")  # as loaders do
            if short_side is not None and not fits:
                width, height = (round(n * short_side / min(image.size)) for n in image.size)
                stored = stored.resize((width, height), Image.Resampling.BICUBIC)
            buffer = io.BytesIO()
            stored.save(buffer, "JPEG", quality=quality, exif=exif)
            return {"jpg": buffer.getvalue()}
    except Exception as error:  # what Pillow and its plugins raise has no common base
        return reason_of(error)
