"""What belongs to the data: image endings, hidden names, and the regular files below a folder."""

from __future__ import annotations

import logging
import os
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from timm.data.readers.img_extensions import get_img_extensions, is_img_extension
from timm.utils.misc import natural_key

from fastkd.utils.io import writable

logger = logging.getLogger("fastkd")

# In the order in which one is taken of a sample that has several, as in timm's reader of shards.
ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
NAMED = 3  # of what was left out
Folders = tuple[tuple[int, int], ...]  # device and inode of each


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
    """Return whether a path that somebody else wrote names something in a folder.

    Links are not followed: what they lead to is the user's own decision.
    """
    inner = os.path.relpath(os.path.join(folder, path), folder)
    return inner != os.curdir and inner.split(os.sep)[0] != os.pardir and "\0" not in path


class LeftOut:
    """Counts what lies among the data and is no part of them, for one line about it."""

    # One of a kind, and several.
    NO_IMAGE = "file that is no image", "files that are no images"
    IRREGULAR = "pipe, device or broken link", "pipes, devices or broken links"
    LOOP = "link to a folder that it is in", "links to a folder that they are in"
    ALONE = "member of no image's sample", "members of no image's sample"
    FIELD = "image beside its sample's own", "images beside their samples' own"

    def __init__(self) -> None:
        self._endings: dict[tuple[str, str], Counter[str]] = {}
        self._names: dict[tuple[str, str], list[str]] = {}

    def add(self, kind: tuple[str, str], name: str) -> None:
        """Count a file, link or member of an archive."""
        ending = os.path.splitext(name)[1].lower()
        if not re.fullmatch(r"\.\w{1,12}", ending, re.ASCII):
            ending = "others" if ending else "without ending"
        self._endings.setdefault(kind, Counter())[ending] += 1
        if len(names := self._names.setdefault(kind, [])) < NAMED:
            names.append(writable(name))

    def __str__(self) -> str:
        parts = []
        for kind, endings in sorted(self._endings.items()):
            shown = [f"{count:,} {ending}" for ending, count in endings.most_common()]
            if kind != self.NO_IMAGE:
                shown = self._names[kind] + ["..."] * (endings.total() > NAMED)
            count = endings.total()
            parts.append(f"{count:,} {kind[count > 1]}: {', '.join(shown)}")
        return "; ".join(parts)


def warn(text: str, *values: object) -> None:
    """Log a warning about the data, on the main process alone, as all of them read the same."""
    if os.environ.get("RANK", "0") == "0":
        logger.warning(text, *values)


def tell_left_out(place: str | os.PathLike[str], left_out: LeftOut | str) -> None:
    """Log one line about what was left out of the data, on the main process."""
    if str(left_out):
        warn("data: %s: left out %s", writable(place), left_out)


def find_files(
    folder: str | os.PathLike[str], left_out: LeftOut | None = None, above: Folders | None = None
) -> Iterator[str]:
    """Yield the regular files below a folder, but hidden ones.

    Links are followed, but not to a folder that they lie in (``above``); both kinds of what is
    passed over go to ``left_out``. Raise an OSError where a folder cannot be listed.
    """
    left_out = LeftOut() if left_out is None else left_out
    if above is None:
        above = tuple(map(_identity, Path(os.path.realpath(folder)).parents))
    above = (*above, _identity(folder))
    with os.scandir(folder) as entries:
        for entry in entries:
            if is_hidden(entry.name):
                continue
            path, link = entry.path, entry.is_symlink()  # asks the disk about links alone
            if os.path.isdir(path) if link else entry.is_dir():
                if link and _identity(path) in above:
                    left_out.add(LeftOut.LOOP, path)
                else:
                    yield from find_files(path, left_out, above)
            # A link to nothing is listed, and found unreadable later.
            elif os.path.isfile(path) or not os.path.exists(path) if link else entry.is_file():
                yield path
            else:  # a pipe would be waited for
                left_out.add(LeftOut.IRREGULAR, path)


def _identity(folder: str | os.PathLike[str]) -> tuple[int, int]:
    status = os.stat(folder)
    return status.st_dev, status.st_ino


def list_images(folder: str | os.PathLike[str], left_out: LeftOut | None = None) -> list[str]:
    """List the images below a folder in natural order; ``left_out`` counts the other files."""
    found = []
    for path in find_files(folder, left_out):
        if is_image(path):
            found.append(path)
        elif left_out is not None:
            left_out.add(LeftOut.NO_IMAGE, path)
    return sorted(found, key=lambda path: (natural_key(path), path))


def list_folders(folder: str | os.PathLike[str]) -> list[str]:
    """List the names of the folders that `find_files` enters first."""
    here = Path(os.path.realpath(folder))
    with os.scandir(folder) as entries:
        return [
            entry.name
            for entry in entries
            if not is_hidden(entry.name)
            and (
                os.path.isdir(entry.path) and not here.is_relative_to(os.path.realpath(entry.path))
                if entry.is_symlink()
                else entry.is_dir()  # does not ask the disk
            )
        ]
