"""Where an export goes: nothing is overwritten unasked, and nothing is ever there in part.

Knows paths; not what is written to them.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path


def check_output(
    target: Path, default: str, overwrite: bool, is_export: Callable[[Path], bool]
) -> None:
    """Refuse an output that would replace something which was not meant.

    Args:
        target: the output.
        default: what it would be called by itself; a file has to end like it, a folder has no end.
        overwrite: whether an earlier export may be replaced.
        is_export: whether what is there was written by fastkd in this format.

    Raises:
        FileExistsError: something is there, and ``overwrite`` is not set, or it is no export of
            this format.
        FileNotFoundError: the folder that the output goes into is not there.
        ValueError: the name of a new file ends otherwise.
    """
    if not target.absolute().parent.is_dir():
        raise FileNotFoundError(f"export: there is no folder {str(target.parent)!r}")
    suffix = Path(default).suffix
    fits = not suffix or target.suffix == suffix
    if not os.path.lexists(target):
        if not fits:
            raise ValueError(f"export: the output must end in {suffix}, got {str(target)!r}")
        return
    if not suffix and target.is_dir() and not any(target.iterdir()):
        return
    if not overwrite:
        raise FileExistsError(
            f"export: {target} exists: choose another output, or set overwrite (--overwrite)"
        )
    if not (fits and is_export(target)):
        kind = f"{suffix} file" if suffix else "folder"
        raise FileExistsError(
            f"export: {target} is not replaced: it is no {kind} that fastkd exported"
        )


@contextlib.contextmanager
def replacing_file(target: Path) -> Iterator[Path]:
    """Make a file that takes the place of ``target`` when the block ends without an error.

    Unlike `fastkd.utils.io.replacing`, the new file can be read by its name before: it has
    the ending that readers go by.

    Args:
        target: the file; an older one survives any failure.

    Yields:
        Where to write, in a folder of its own beside ``target``.
    """
    folder = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    shutil.rmtree(folder, ignore_errors=True)  # of a process of this number, killed in here
    folder.mkdir()
    try:
        yield folder / target.name
        os.replace(folder / target.name, target)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def replacing_folder(target: Path) -> Iterator[Path]:
    """Make a folder that takes the place of ``target`` when the block ends without an error.

    Folders cannot be exchanged in one step: the older one is set aside as ``.NAME.old``, the new
    one is renamed, and the older one removed. A process that is killed in between leaves both.

    Args:
        target: the folder; an older one survives any failure.

    Yields:
        The new folder, empty, beside ``target``.
    """
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    aside = target.with_name(f".{target.name}.old")
    shutil.rmtree(temporary, ignore_errors=True)  # of a process of this number, killed in here
    temporary.mkdir()
    try:
        yield temporary
        with _set_aside(target, aside):
            temporary.rename(target)
        shutil.rmtree(aside, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def _set_aside(target: Path, aside: Path) -> Iterator[None]:
    """Free the name of a folder, which gets it back where the block fails."""
    if not target.exists():
        yield
        return
    shutil.rmtree(aside, ignore_errors=True)  # older still, of a process that was killed
    target.rename(aside)
    try:
        yield
    except BaseException:
        aside.rename(target)
        raise
