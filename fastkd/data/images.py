"""Open image files that may be anything, and bound what one of them can cost."""

from __future__ import annotations

import contextlib
import errno
import functools
import io
import os
import re
import stat
import warnings
from collections.abc import Iterator
from typing import Any, BinaryIO

from PIL import Image, UnidentifiedImageError

# Whatever a file is called, no other format is looked for: Pillow would start Ghostscript for
# PostScript. MPO, several JPEGs in a file, comes with JPEG.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "PPM", "TIFF", "JPEG2000", "AVIF")
# Whose message says what is wrong with a file.
PILLOW_ERRORS = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)
# A filter of warnings.
_PILLOW = ("ignore", None, Warning, re.compile(r"PIL\."), 0)
# Grayscale of more than 8 bits, all of which Pillow's conversion cuts off above 255.
DEEP_MODES = ("I", "F", "I;16", "I;16L", "I;16B", "I;16N")

# Pixels that are decoded, as a multiple of PIL.Image.MAX_IMAGE_PIXELS: 134 million by Pillow's
# default, enough for a camera of 100 megapixels. JPEGs of up to 179 million are read at half size;
# beyond that Pillow refuses itself.
MAX_PIXELS = 1.5
MAX_RESIZED_PIXELS = 2**26  # 67 million, 270 MB in Pillow
MAX_FILE = 2**30  # bytes; some formats are read whole
# Of a JPEG's EXIF, profiles and comments so many bytes are read: Pillow's time is quadratic.
JPEG_METADATA = 2**16
# Reads beyond one for so many bytes: files with a million tags or chunks would take seconds.
SMALL_READS = 5000
HEADER_READ, PIXEL_READ = 4096, 512  # bytes; libpng writes chunks of 8192, which take four reads


def open_file(path: str | os.PathLike[str], buffering: int = -1) -> BinaryIO:
    """Open a regular file; raise an OSError for a pipe, which would be waited for, or a device."""
    mode = os.stat(path).st_mode
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise OSError(errno.EINVAL, "no regular file", os.fspath(path))
    # Not even one that has taken the file's place since is waited for.
    return open(
        path, "rb", buffering, opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)
    )


def open_image(source: str | os.PathLike[str] | BinaryIO | bytes) -> Image.Image:
    """Open an image from a path, an open binary file or its bytes; ``load()`` decodes it.

    Raises an OSError, or anything else that Pillow raises, for what is no image or a bomb.
    """
    if isinstance(source, str | os.PathLike):
        with open_file(source) as opened:
            source = opened.read(MAX_FILE + 1)
    file = _Frugal(io.BytesIO(source) if isinstance(source, bytes) else source)
    with without_pillow_warnings():  # one for every odd tag; what is too large is decided below
        image = Image.open(file, formats=_formats())
    # A PNG has chunks behind its pixels, too. BMP and PPM are decoded by small reads.
    file.share, file.most = PIXEL_READ if image.format == "PNG" else None, None
    if image.format in ("JPEG", "MPO"):
        image.decodermaxblock = file.size  # else what its decoder does not take is copied again
    most = MAX_PIXELS * (Image.MAX_IMAGE_PIXELS or float("inf"))
    if image.width * image.height > most:
        image.draft(None, (image.width // 2, image.height // 2))  # changes JPEGs alone
    if image.width * image.height > most:
        raise Image.DecompressionBombError(
            f"{image.width:,} x {image.height:,} pixels, of which at most {most:,.0f} are decoded"
        )
    return image


@contextlib.contextmanager
def without_pillow_warnings() -> Iterator[None]:
    """Ignore Pillow's warnings.

    `warnings.catch_warnings` would make Python forget which others it has shown: they would come
    again for every image.
    """
    filters: Any = warnings.filters
    filters.insert(0, _PILLOW)
    try:
        yield
    finally:
        filters.remove(_PILLOW)


def load_rgb(path: str) -> Image.Image:
    """Decode an image file, as torchvision's folders do; whatever is wrong is an OSError."""
    try:
        image = open_image(path)
        image.load()
        refuse_deep(image)
        return image.convert("RGB")
    except Exception as error:
        raise OSError(f"data: cannot read {path}: {reason_of(error)}") from error


@functools.cache
def _formats() -> tuple[str, ...]:
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


class _Frugal:
    """An image file that refuses to be read in too many small steps, or again and again."""

    def __init__(self, file: BinaryIO) -> None:
        self.size = size = file.seek(0, os.SEEK_END)
        if size > MAX_FILE:
            raise Image.DecompressionBombError(f"a file of {size:,} bytes, more than {MAX_FILE:,}")
        self.file = _shortened(file)
        self.share: int | None = HEADER_READ
        self.most: int | None = 2 * size + 2**20  # bytes
        self.reads = self.bytes = 0

    def read(self, size: int = -1) -> bytes:
        content = self.file.read(size)
        self.reads += 1
        self.bytes += len(content)
        if self.share is not None and self.reads > SMALL_READS + self.bytes // self.share:
            raise Image.DecompressionBombError(
                f"more than {SMALL_READS:,} tags, chunks or segments"
            )
        if self.most is not None and self.bytes > self.most:
            raise Image.DecompressionBombError("tags that overlap, of more bytes than the file has")
        return content

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)


def _shortened(file: BinaryIO) -> BinaryIO:
    """Take all but the first metadata out of a JPEG that has more than are of use."""
    file.seek(0)
    if file.read(2) != b"\xff\xd8":
        return file
    kept, start, metadata = [], 0, 0  # (start, end) in the file, and bytes
    for _ in range(SMALL_READS):
        head = file.read(4)
        if len(head) < 4 or head[0] != 0xFF or head[1] == 0xDA:  # damage; the pixels begin
            break
        here, length = file.tell() - 4, 2 + int.from_bytes(head[2:], "big")
        end = here + length
        # COM and APP1 to APP15 but Adobe's APP14, which tells how colors are coded
        if head[1] == 0xFE or (0xE1 <= head[1] <= 0xEF and head[1] != 0xEE):
            metadata += length
            if metadata > JPEG_METADATA + 2:
                kept.append((start, here))
                start = end
        file.seek(end)
    file.seek(0)
    if not kept:
        return file
    parts = []
    for begin, end in kept:
        file.seek(begin)
        parts.append(file.read(end - begin))
    file.seek(start)
    return io.BytesIO(b"".join([*parts, file.read()]))


def refuse_deep(image: Image.Image) -> None:
    """Raise an OSError for grayscale of more than 8 bits: no value in such a file means white."""
    if image.mode in DEEP_MODES:
        raise OSError(
            f"greyscale of more than 8 bits (mode {image.mode}), which has no fixed white: "
            "convert it to 8 bits"
        )


def refuse_thin(image: Image.Image, height: int, width: int, fits: bool) -> None:
    """Raise an OSError if an image resized in proportion would have too many pixels, or none.

    It is resized to cover ``height`` x ``width``, or if ``fits`` to lie within them.
    """
    ratio = (max if fits else min)(image.height / height, image.width / width)
    tall, wide = image.height / ratio, image.width / ratio
    if tall * wide > MAX_RESIZED_PIXELS or round(min(tall, wide)) < 1:
        raise OSError(
            f"{image.width:,} x {image.height:,} pixels, resized {wide:,.0f} x {tall:,.0f}: "
            f"must be at most {MAX_RESIZED_PIXELS:,} pixels and at least one wide and high"
        )


def reason_of(error: BaseException) -> str:
    """Say in one line why an image cannot be read."""
    while error.__cause__ is not None and str(error).startswith("data: "):
        error = error.__cause__  # of Pillow or the system, which fastkd.data wraps
    if isinstance(error, UnidentifiedImageError):
        *formats, last = _formats()
        return f"no {', '.join(formats)} or {last}"  # Pillow's words name an address in memory
    text = " ".join(str(getattr(error, "strerror", None) or error).split())
    known = text and isinstance(error, PILLOW_ERRORS)
    return (text if known else f"{type(error).__name__}: {text or 'no message'}")[:200]
