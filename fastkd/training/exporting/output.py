"""Where an export goes: nothing is overwritten unasked, and nothing is ever there in part.

Knows paths; not what is written to them.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

CONFIG = "config.json"
WEIGHTS = "model.safetensors"

_NAMES = {"timm": "student-timm", "safetensors": "student.safetensors", "onnx": "student.onnx"}


def default_output(run: Path, format: str) -> Path:
    """A place beside the checkpoint.

    Args:
        run: a run's folder, or a checkpoint.
        format: one of the formats.

    Returns:
        The path, in the folder that holds the checkpoint.
    """
    return (run if run.is_dir() else run.parent) / _NAMES[format]


def refuse_existing(target: Path, overwrite: bool, *, folder: bool) -> None:
    """Refuse an output that would replace something which was not meant.

    Args:
        target: the output.
        overwrite: whether an earlier export may be replaced.
        folder: whether the output is to be a folder.

    Raises:
        FileExistsError: something is there, and ``overwrite`` is not set, or it is no export of
            this kind.
        FileNotFoundError: the folder that the output goes into is not there.
    """
    if not target.absolute().parent.is_dir():
        raise FileNotFoundError(f"export: there is no folder {str(target.parent)!r}")
    if not target.exists() or (folder and _holds_only(target, set())):
        return
    if not overwrite:
        raise FileExistsError(
            f"export: {target} exists: choose another output, or set overwrite (--overwrite)"
        )
    if folder and not _holds_only(target, {CONFIG, WEIGHTS}):
        raise FileExistsError(
            f"export: {target} is not replaced: it is no folder of {CONFIG} and {WEIGHTS} alone"
        )
    if not folder and target.is_dir():
        raise FileExistsError(f"export: {target} is a folder, and the output is to be a file")


def _holds_only(path: Path, names: set[str]) -> bool:
    return path.is_dir() and {entry.name for entry in path.iterdir()} <= names


@contextlib.contextmanager
def replacing_folder(target: Path) -> Iterator[Path]:
    """Make a folder that takes the place of ``target`` when the block ends without an error.

    Args:
        target: the folder; an older one survives any failure inside the block.

    Yields:
        The new folder, empty, beside ``target``.
    """
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)  # of a process of this number, killed in here
    temporary.mkdir()
    try:
        yield temporary
        # A folder with something in it cannot be renamed over.
        if target.exists():
            shutil.rmtree(target)
        temporary.rename(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
