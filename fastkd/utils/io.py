"""Files that are whole or not there: written beside their place, then renamed into it."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

_TEMPORARY = re.compile(r"\..+\.\d+\.tmp")


def remove_leftovers(folder: str | os.PathLike[str]) -> None:
    """Remove what processes killed in the middle of `replacing` left in a folder."""
    for path in Path(folder).iterdir():
        if not _TEMPORARY.fullmatch(path.name):
            continue
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str], previous: int | None = None) -> Iterator[BinaryIO]:
    """Open a file that takes the place of ``path`` when the block ends without an error."""
    target = Path(path)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            # Without it a power cut may leave the new name on an empty file.
            os.fsync(file.fileno())
        if previous is not None:
            _shift(target, previous)
        os.replace(temporary, target)
    finally:
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()


@contextlib.contextmanager
def replacing_path(target: Path, folder: bool) -> Iterator[Path]:
    """Yield a path to write a file or folder to, which then takes the place of ``target``.

    Unlike that of `replacing`, a file has the name that it will have, for readers that go by it. Of
    a link the target is replaced.
    """
    target = Path(os.path.realpath(target))
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    aside = target.with_name(f".{target.name}.old")
    shutil.rmtree(temporary, ignore_errors=True)  # of a killed process that had this number
    temporary.mkdir()
    written = temporary if folder else temporary / target.name
    try:
        yield written
        for file in written.iterdir() if folder else [written]:
            with open(file, "rb+") as whole:
                os.fsync(whole.fileno())  # as in `replacing`
        # Folders cannot be exchanged in one step: a process that is killed in here leaves both.
        older = folder and target.exists()
        if older:
            shutil.rmtree(aside, ignore_errors=True)
            target.replace(aside)
        try:
            written.replace(target)
        except BaseException:
            if older:
                aside.replace(target)
            raise
        if older:
            shutil.rmtree(aside, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def earlier(path: str | os.PathLike[str], number: int) -> Path:
    """Where `replacing` keeps an earlier version of a file."""
    path = Path(path)
    return path if number == 0 else path.with_name(f"{path.stem}-{number}{path.suffix}")


def _shift(path: Path, previous: int) -> None:
    """Give every version its next number; ``path`` keeps its name, too, until it is replaced."""
    if not path.exists():
        return
    for number in range(previous, 1, -1):
        with contextlib.suppress(FileNotFoundError):
            os.replace(earlier(path, number - 1), earlier(path, number))
    number = previous + 1
    while earlier(path, number).exists():  # of a time when more were kept
        earlier(path, number).unlink()
        number += 1
    if previous > 0:
        earlier(path, 1).unlink(missing_ok=True)
        try:
            os.link(path, earlier(path, 1))
        except OSError:  # a file system without links
            shutil.copyfile(path, earlier(path, 1))


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a small text file atomically; bytes of names that are no UTF-8 become escapes."""
    with replacing(path) as file:
        file.write(text.encode(errors="backslashreplace"))


def writable(name: str | os.PathLike[str]) -> str:
    r"""A name as it can be printed and encoded, whatever bytes a file system has for it."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")
