"""Find image files in folders, and decode images within bounds on what one of them can cost."""

from __future__ import annotations

import contextlib
import errno
import functools
import io
import logging
import os
import re
import stat
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from PIL import Image, UnidentifiedImageError
from timm.data.readers.img_extensions import get_img_extensions, is_img_extension
from timm.utils.misc import natural_key

from fastkd.utils.distributed import is_main_process
from fastkd.utils.io import writable

logger = logging.getLogger("fastkd")

# In the order in which one is taken of a sample that has several, as in timm's reader of shards.
ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
# No other format is read, whatever its ending: Pillow would start Ghostscript for PostScript.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "PPM", "TIFF", "JPEG2000", "AVIF")  # MPO is JPEG
PILLOW_ERRORS = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)
# Grayscale of more than 8 bits, all of which Pillow's conversion cuts off above 255.
DEEP_MODES = ("I", "F", "I;16", "I;16L", "I;16B", "I;16N")

# Pixels that are decoded, as a multiple of PIL.Image.MAX_IMAGE_PIXELS: 134 million by Pillow's
# default, enough for a camera of 100 megapixels. JPEGs of up to 179 million are read at half size;
# beyond that Pillow refuses itself.
MAX_PIXELS = 1.5
MAX_RESIZED_PIXELS = 2**26  # 67 million, 270 MB in Pillow
MAX_FILE = 2**30  # bytes; some formats are read whole
JPEG_METADATA = 2**16  # bytes read of EXIF, profiles and comments: Pillow's time is quadratic
# Reads beyond one for so many bytes: files with a million tags or chunks would take seconds.
SMALL_READS = 5000
HEADER_READ, PIXEL_READ = 4096, 512  # bytes; libpng writes chunks of 8192, which take four reads


def image_endings() -> tuple[str, ...]:
    """List the endings of images: `ENDINGS`, and what was added to timm's list."""
    return (*ENDINGS, *(ending for ending in get_img_extensions() if ending not in ENDINGS))


def is_image(path: str) -> bool:
    """Return whether a file name has an ending of `image_endings`, in any case."""
    ending = os.path.splitext(path)[1].lower()
    return ending in ENDINGS or is_img_extension(ending)


def is_hidden(path: str) -> bool:
    """Return whether a name, or a part of a path inside an archive, is hidden."""
    return any(
        (part.startswith(".") and part.strip(".") != "") or part == "__MACOSX"
        for part in path.split("/")
    )


def is_inside(path: str, folder: str | os.PathLike[str]) -> bool:
    """Return whether a path from a list or a hub names something in a folder.

    Links are not followed: the user has put them there.
    """
    inner = os.path.relpath(os.path.join(folder, path), folder)
    return inner != os.curdir and inner.split(os.sep)[0] != os.pardir and "\0" not in path


class LeftOut:
    """Counts files that are not part of the data, for one line about them."""

    # One of a kind, and several.
    NO_IMAGE = "file that is no image", "files that are no images"
    IRREGULAR = "pipe, device or broken link", "pipes, devices or broken links"
    LOOP = "link to a folder that it is in", "links to a folder that they are in"
    ALONE = "member of no image's sample", "members of no image's sample"
    FIELD = "image beside its sample's own", "images beside their samples' own"
    NAMED = 3  # of every kind, but files that are counted by ending

    def __init__(self) -> None:
        self._endings = defaultdict[tuple[str, str], Counter[str]](Counter)
        self._names = defaultdict[tuple[str, str], list[str]](list)  # the first ones

    def add(self, kind: tuple[str, str], name: str) -> None:
        """Count a file, link or member of an archive."""
        ending = os.path.splitext(name)[1].lower()
        if not re.fullmatch(r"\.\w{1,12}", ending, re.ASCII):
            ending = "others" if ending else "without ending"
        self._endings[kind][ending] += 1
        if len(self._names[kind]) < self.NAMED:
            self._names[kind].append(writable(name))

    def __str__(self) -> str:
        parts = []
        for kind, endings in sorted(self._endings.items()):
            count = endings.total()
            shown = [f"{n:,} {ending}" for ending, n in endings.most_common()]
            if kind != self.NO_IMAGE:
                shown = self._names[kind] + ["..."] * (count > self.NAMED)
            parts.append(f"{count:,} {kind[count > 1]}: {', '.join(shown)}")
        return "; ".join(parts)


def warn(text: str, *values: object) -> None:
    """Log a warning about the data on the main process alone, as all processes read the same."""
    if is_main_process():
        logger.warning(text, *values)


def warn_left_out(place: str | os.PathLike[str], left_out: LeftOut | str) -> None:
    """Log one line about what was left out of the data, if anything was."""
    if str(left_out):
        warn("data: %s: left out %s", writable(place), left_out)


def find_files(
    folder: str | os.PathLike[str],
    left_out: LeftOut | None = None,
    above: tuple[tuple[int, int], ...] | None = None,  # identities of the folders around it
) -> Iterator[str]:
    """Yield the regular files below a folder, but hidden ones; count what else is left out.

    Links are followed, but not to a folder that they lie in. Raise an OSError where a folder cannot
    be listed.
    """
    left_out = LeftOut() if left_out is None else left_out
    if above is None:
        above = tuple(map(_identity, Path(os.path.realpath(folder)).parents))
    above = (*above, _identity(folder))
    with os.scandir(folder) as entries:
        for entry in entries:
            path, link = entry.path, entry.is_symlink()
            if is_hidden(entry.name):
                continue
            if _is_folder(entry):
                if link and _identity(path) in above:
                    left_out.add(LeftOut.LOOP, path)
                else:
                    yield from find_files(path, left_out, above)
            # A link to nothing is listed, and found unreadable later.
            elif os.path.isfile(path) or not os.path.exists(path) if link else entry.is_file():
                yield path
            else:
                left_out.add(LeftOut.IRREGULAR, path)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    # Only links cost a call to the file system, and a loop of links is no error.
    return os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir()


def _identity(folder: str | os.PathLike[str]) -> tuple[int, int]:
    status = os.stat(folder)
    return status.st_dev, status.st_ino


def list_images(folder: str | os.PathLike[str], left_out: LeftOut | None = None) -> list[str]:
    """List the images below a folder in natural order."""
    found = []
    for path in find_files(folder, left_out):
        if is_image(path):
            found.append(path)
        elif left_out is not None:
            left_out.add(LeftOut.NO_IMAGE, path)
    return sorted(found, key=lambda path: (natural_key(path), path))


def list_folders(folder: str | os.PathLike[str]) -> list[str]:
    """List the names of the folders in a folder that `find_files` enters."""
    here = Path(os.path.realpath(folder))
    with os.scandir(folder) as entries:
        return [
            entry.name
            for entry in entries
            if not is_hidden(entry.name)
            and _is_folder(entry)
            and not (entry.is_symlink() and here.is_relative_to(os.path.realpath(entry.path)))
        ]


def open_file(path: str | os.PathLike[str], buffering: int = -1) -> BinaryIO:
    """Open a regular file; raise an OSError for a pipe, which would block, or a device."""
    mode = os.stat(path).st_mode
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise OSError(errno.EINVAL, "no regular file", os.fspath(path))
    # Without blocking, in case a pipe has taken the file's place since.
    return open(
        path, "rb", buffering, opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)
    )


def open_image(source: str | os.PathLike[str] | BinaryIO | bytes) -> Image.Image:
    """Open an image from a path, an open binary file or its bytes; ``load()`` decodes it.

    Raises an OSError, or anything else that Pillow raises, for other files and for bombs.
    """
    if isinstance(source, str | os.PathLike):
        with open_file(source) as opened:
            source = opened.read(MAX_FILE + 1)
    file = _BoundedFile(io.BytesIO(source) if isinstance(source, bytes) else source)
    with without_pillow_warnings():  # one for every odd tag; the size is checked below
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
    """Ignore Pillow's warnings."""
    # warnings.catch_warnings would bring every other warning back with each image.
    filters: Any = warnings.filters
    ignored = ("ignore", None, Warning, re.compile(r"PIL\."), 0)
    filters.insert(0, ignored)
    try:
        yield
    finally:
        filters.remove(ignored)


def load_rgb(path: str) -> Image.Image:
    """Decode an image file, as torchvision's folders do; any failure is an OSError."""
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


class _BoundedFile:
    """An image file that refuses to be read in too many small steps, or again and again."""

    def __init__(self, file: BinaryIO) -> None:
        self.size = size = file.seek(0, os.SEEK_END)
        if size > MAX_FILE:
            raise Image.DecompressionBombError(f"a file of {size:,} bytes, more than {MAX_FILE:,}")
        self.file = _without_late_metadata(file)
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


def _without_late_metadata(file: BinaryIO) -> BinaryIO:
    """Remove the metadata of a JPEG beyond its first `JPEG_METADATA` bytes."""
    file.seek(0)
    if file.read(2) != b"\xff\xd8":
        return file
    content = b"\xff\xd8" + file.read()
    kept, start, position, metadata = [], 0, 2, 0
    for _ in range(SMALL_READS):
        head = content[position : position + 4]
        if len(head) < 4 or head[0] != 0xFF or head[1] == 0xDA:  # damage; the pixels begin
            break
        end = position + 2 + int.from_bytes(head[2:], "big")
        # COM, and APP1 to APP15 but Adobe's APP14, which holds how colors are coded.
        if head[1] == 0xFE or (0xE1 <= head[1] <= 0xEF and head[1] != 0xEE):
            metadata += end - position
            if metadata > JPEG_METADATA + 2:
                kept.append(content[start:position])
                start = end
        position = end
    return io.BytesIO(b"".join([*kept, content[start:]]) if kept else content)


def refuse_deep(image: Image.Image) -> None:
    """Raise an OSError for grayscale of more than 8 bits: such files do not define white."""
    if image.mode in DEEP_MODES:
        raise OSError(
            f"grayscale of more than 8 bits (mode {image.mode}), which has no fixed white: "
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
    """Return in one line why an image cannot be read."""
    while error.__cause__ is not None and str(error).startswith("data: "):
        error = error.__cause__  # of Pillow or the system, which fastkd.data wraps
    if isinstance(error, UnidentifiedImageError):
        *formats, last = _formats()
        return f"no {', '.join(formats)} or {last}"  # Pillow's message holds an address in memory
    text = " ".join(str(getattr(error, "strerror", None) or error).split())
    known = text and isinstance(error, PILLOW_ERRORS)
    return (text if known else f"{type(error).__name__}: {text or 'no message'}")[:200]
