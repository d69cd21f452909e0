"""Images on their way into shards: read, resized where too large, and encoded, by processes.

Knows files and Pillow; neither archives nor data sets.
"""

from __future__ import annotations

import io
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from PIL import ExifTags, Image, UnidentifiedImageError

from fastkd.data.readers import PILLOW_ERRORS, refuse_deep

CHUNK = 16  # images that a process converts at a time
# What readers of shards decode, by Pillow's name of the format. MPO: a JPEG and more behind it.
EXTENSIONS = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}


@dataclass(frozen=True)
class Conversion:
    """What becomes of an image.

    Attributes:
        short_side: pixels that the shorter side has at most; None copies every image.
        quality: of the JPEGs, 1 to 95.
    """

    short_side: int | None
    quality: int


class Converted(NamedTuple):
    """One image, ready to be written.

    Attributes:
        number: as it was given.
        content: the encoded image; empty where it could not be read.
        extension: of a file with this content.
        reason: why it could not be read; None where it could.
    """

    number: int
    content: bytes
    extension: str
    reason: str | None = None


def convert(number: int, path: str, conversion: Conversion) -> Converted:
    """Read one image file, and shrink it if it is too large.

    Args:
        number: given back.
        path: of the file.
        conversion: what becomes of it.

    Returns:
        The file's own bytes where it is small enough and of a format that readers of shards know;
        else a JPEG, gray or RGB, with the orientation tag of the original.

    Raises:
        OSError: the file cannot be fetched, which says nothing of the image.
    """
    content = _fetched(path)
    try:
        with Image.open(io.BytesIO(content)) as image:
            image.load()  # what is cut short is found here, copied or not
            refuse_deep(image)
            extension = EXTENSIONS.get(image.format or "")
            fits = conversion.short_side is None or min(image.size) <= conversion.short_side
            if fits and extension is not None:
                return Converted(number, content, extension)
            return Converted(number, _encoded(image, conversion), "jpg")
    except UnidentifiedImageError:
        return Converted(number, b"", "", "no image")
    # Pillow's, for broken files, and for too many pixels to be meant.
    except PILLOW_ERRORS as error:
        return Converted(number, b"", "", " ".join(str(error).split()) or type(error).__name__)


def _fetched(path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        reason = error.strerror or error
        raise OSError(
            f"shard: source: cannot read {path}: {reason}; the same command goes on"
        ) from error


def _encoded(image: Image.Image, conversion: Conversion) -> bytes:
    orientation = image.getexif().get(ExifTags.Base.Orientation)
    # As a trainer does: alpha and palettes mean in shards what they mean in the source.
    shown = image if image.mode in ("L", "RGB") else image.convert("RGB")
    short = min(shown.size)
    if conversion.short_side is not None and short > conversion.short_side:
        width, height = (round(side * conversion.short_side / short) for side in shown.size)
        shown = shown.resize((width, height), Image.Resampling.BICUBIC)
    exif = Image.Exif()
    if orientation is not None:
        exif[ExifTags.Base.Orientation] = orientation
    buffer = io.BytesIO()
    shown.save(buffer, "JPEG", quality=conversion.quality, exif=exif)
    return buffer.getvalue()


class Converters:
    """Processes that convert images; results come in the order that was asked for.

    Args:
        conversion: what becomes of an image.
        workers: how many processes; None: one for each core.

    Raises:
        ValueError: fewer than one process.
    """

    def __init__(self, conversion: Conversion, workers: int | None = None) -> None:
        if workers is not None and workers < 1:
            raise ValueError(f"shard: workers must be at least 1, got {workers}")
        self.conversion = conversion
        self.workers = workers or _cores()

    def __enter__(self) -> Converters:
        # Forked, so that scripts need no guard around their main part and nothing is imported anew.
        context = multiprocessing.get_context("fork")
        # An interrupt between fork and the first line of a new process would be lost in both.
        signals = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            self._pool = ProcessPoolExecutor(self.workers, context, initializer=_begin_process)
            self._pool.submit(os.getpid).result()  # starts them
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, signals)
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def convert(self, images: Iterable[tuple[int, str]]) -> Iterator[Converted]:
        """Convert images.

        Args:
            images: (number, path of the file).

        Yields:
            One `Converted` for each, in order.

        Raises:
            OSError: a file cannot be fetched.
            RuntimeError: a process died.
        """
        images = iter(images)
        # As many as keep every process busy, and no more: results wait in memory.
        pending: deque[Future[list[Converted]]] = deque()
        while chunk := list(islice(images, CHUNK)):
            pending.append(self._pool.submit(_convert_all, chunk, self.conversion))
            if len(pending) > 2 * self.workers:
                yield from _result(pending.popleft())
        while pending:
            yield from _result(pending.popleft())


def _cores() -> int:
    """Those that this process may run on, where the system tells."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _convert_all(images: list[tuple[int, str]], conversion: Conversion) -> list[Converted]:
    return [convert(number, path, conversion) for number, path in images]


def _result(future: Future[list[Converted]]) -> list[Converted]:
    try:
        return future.result()
    except BrokenProcessPool as error:
        raise RuntimeError(
            "shard: a process that converts images died (is there enough memory?); the same "
            "command goes on"
        ) from error


def _begin_process() -> None:
    """Leave interrupts to the main process, but end with it when it is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()

    def end_with_parent() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()
