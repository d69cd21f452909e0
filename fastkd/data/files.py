"""What belongs to the data: image endings, hidden names, and the files below a folder."""

from __future__ import annotations

import os
from collections.abc import Iterator

from timm.data.readers.img_extensions import is_img_extension
from timm.utils.misc import natural_key


def is_image(path: str) -> bool:
    """Return whether a file name has an ending of timm's list, in any case."""
    return is_img_extension(os.path.splitext(path)[1].lower())


def is_hidden(name: str) -> bool:
    """Return whether a file or folder is hidden."""
    return name.startswith(".")


def find_files(
    folder: str | os.PathLike[str], above: tuple[tuple[int, int], ...] = ()
) -> Iterator[str]:
    """Yield the files below a folder, but hidden ones.

    Links are followed, but not to a folder that they lie in (``above``: its devices and inodes).
    Raise an OSError where a folder cannot be listed.
    """
    status = os.stat(folder)
    here = status.st_dev, status.st_ino
    if here in above:
        return
    with os.scandir(folder) as entries:
        for entry in entries:
            if is_hidden(entry.name):
                continue
            link = entry.is_symlink()  # one to nothing is listed, and found unreadable later
            if os.path.isdir(entry.path) if link else entry.is_dir():
                yield from find_files(entry.path, (*above, here))
            elif link or entry.is_file():  # no pipe, which would be waited for
                yield entry.path


def list_images(folder: str | os.PathLike[str]) -> list[str]:
    """List the images below a folder in natural order."""
    found = filter(is_image, find_files(folder))
    return sorted(found, key=lambda path: (natural_key(path), path))
