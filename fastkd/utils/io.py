"""Write files atomically, beside their place and then renamed; escape names for output."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

_TEMPORARY = re.compile(r"\..+\.\d+\.tmp")
# C0 and C1, line and paragraph separators, and changes of the direction of writing.
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")
_LONE = re.compile("[\ud800-\udc7f\udd00-\udfff]")  # surrogates that stand for no byte
_FORMULA = re.compile("[=+@\uff1d\uff0b\uff0d\uff20-]")  # starts a formula, also in full width
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?|-?(inf|nan)", re.IGNORECASE)


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
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def replacing_path(target: Path, folder: bool) -> Iterator[Path]:
    """Yield a path to write a file or folder to, which then takes the place of ``target``.

    Unlike that of `replacing`, a file has its final name, which some writers store.
    """
    target = Path(os.path.realpath(target))  # of a link the target is replaced
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
    """Return where `replacing` keeps an earlier version of a file."""
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
    """Write a small text file atomically; names that are not UTF-8 are escaped."""
    with replacing(path) as file:
        file.write(text.encode(errors="backslashreplace"))


def read_json(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a mapping from a JSON file; raise a ValueError naming the file for anything else."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no mapping, but a {type(content).__name__}")
    return content


def writable(name: str | os.PathLike[str]) -> str:
    r"""Return a name that can be encoded, whatever bytes a file system or JSON file has for it."""
    text = _LONE.sub(lambda found: f"\\u{ord(found[0]):x}", os.fsdecode(name))
    return os.fsencode(text).decode("utf-8", "backslashreplace")


def printable(name: str | os.PathLike[str], *, lines: bool = False) -> str:
    r"""Escape control characters of a name or text, but with ``lines`` line breaks and tabs."""
    text = writable(name)
    kept = "\n\t" if lines else ""
    return _CONTROL.sub(lambda c: c[0] if c[0] in kept else repr(c[0])[1:-1], text)


def csv_text(rows: Iterable[Iterable[Any]]) -> str:
    """Format comma-separated values, none of which a spreadsheet takes for a formula."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([map(_cell, row) for row in rows])
    return text.getvalue()


def _cell(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    text = printable(value)
    return f"'{text}" if _FORMULA.match(text) and not _NUMBER.fullmatch(text) else text
