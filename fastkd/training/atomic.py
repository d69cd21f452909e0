"""Files that are whole or not there: written beside their place, then renamed into it."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

_TEMPORARY = re.compile(r"\..+\.\d+\.tmp")


def remove_leftovers(folder: str | os.PathLike[str]) -> None:
    """Remove what processes killed in the middle of `replacing` left in a folder.

    Args:
        folder: nobody else may be writing into it.
    """
    for path in Path(folder).iterdir():
        if _TEMPORARY.fullmatch(path.name):
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Open a file that takes the place of ``path`` when the block ends without an error.

    Args:
        path: the file; an older one survives any failure.

    Yields:
        The new file, open for writing.
    """
    target = Path(path)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            # Without it a power cut may leave the new name on an empty file.
            os.fsync(file.fileno())
        os.replace(temporary, target)
    finally:
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a small text file atomically.

    Args:
        path: the file.
        text: its content, written as UTF-8 with its newlines as they are.
    """
    with replacing(path) as file:
        file.write(text.encode())
