"""Save, load, verify and rotate checkpoint files."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.serialization import get_crc32_options, set_crc32_options

from fastkd.models.weights import FASTKD_FORMAT as FORMAT
from fastkd.models.weights import LOADS_ANYWAY, UnreadableError, UnsafeError, read_file
from fastkd.utils.io import earlier, replacing

VERSION = 2
LAST = "last.pth"
BEST = "best.pth"


class CheckpointError(ValueError):
    """A checkpoint that cannot be used."""


class TornCheckpointError(CheckpointError):
    """A file that is not a whole checkpoint of fastkd; an earlier one can be used instead."""


def save_checkpoint(
    state: dict[str, Any], path: str | os.PathLike[str], keep: int | None = None
) -> None:
    """Write a checkpoint atomically; ``keep`` files stay (last.pth, last-1.pth, ...)."""
    try:
        with replacing(path, None if keep is None else keep - 1) as file, _with_crc():
            torch.save({"format": FORMAT, "version": VERSION, **state}, file)
    except (RuntimeError, OSError) as error:  # torch's writer turns a full disk into the former
        raise OSError(
            f"checkpoint: cannot write {path} ({error}); an older one there is kept"
        ) from error


@contextmanager
def _with_crc() -> Iterator[None]:
    """Let torch write checksums, even if the process has switched them off for other files."""
    chosen = get_crc32_options()
    set_crc32_options(True)
    try:
        yield
    finally:
        set_crc32_options(chosen)


def load_latest(folder: Path, on_torn: Callable[[str], None]) -> tuple[dict[str, Any], Path] | None:
    """Read a run's last checkpoint, or the latest before it that is whole."""
    first_error: TornCheckpointError | None = None
    for path in _versions(folder / LAST):
        try:
            if path.is_dir():
                raise TornCheckpointError(f"checkpoint: {path} is a folder")
            state = load_checkpoint(path)
        except TornCheckpointError as error:
            reason = str(error).removesuffix(f"; {LOADS_ANYWAY}")  # a run does not
            first_error = first_error or TornCheckpointError(reason)
            on_torn(reason)
        else:
            return state, path
    if first_error is not None:
        raise first_error
    return None


def remove_checkpoints(folder: Path) -> None:
    for path in [*_versions(folder / LAST), folder / BEST]:
        path.unlink(missing_ok=True)


def _versions(path: Path) -> list[Path]:
    """List a file and its earlier versions that exist, the latest first."""
    numbers = [0]
    for found in path.parent.glob(f"{path.stem}-*{path.suffix}"):
        number = found.stem.removeprefix(f"{path.stem}-")
        if number.isdecimal():
            numbers.append(int(number))
    return [p for p in (earlier(path, number) for number in sorted(numbers)) if p.exists()]


def load_checkpoint(
    path: str | os.PathLike[str], device: str | torch.device = "cpu"
) -> dict[str, Any]:
    """Read a checkpoint that `save_checkpoint` wrote, with ``weights_only=True``.

    Args:
        path: a checkpoint, or the folder of a run, whose ``last.pth`` is taken.
        device: where its tensors go.

    Returns:
        The state.

    Raises:
        TornCheckpointError: torn, or not fastkd's.
        CheckpointError: not there, of another version, or holding more than plain state.
        PermissionError: this user may not read it.
    """
    path = Path(path)
    if path.is_dir():
        path = path / LAST
    try:
        state = read_file(path, device)
    except FileNotFoundError:
        raise CheckpointError(f"checkpoint: there is no {path}") from None
    except UnsafeError as error:
        raise CheckpointError(f"checkpoint: {error}") from error
    except UnreadableError as error:
        raise TornCheckpointError(f"checkpoint: {error}") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise TornCheckpointError(f"checkpoint: {path} was not written by fastkd's trainer")
    if state.get("version") != VERSION:
        raise CheckpointError(
            f"checkpoint: {path} has version {state.get('version')}, this fastkd reads {VERSION}"
        )
    return state


def move_best(resumed: Path | None, output: Path, best: dict[str, Any]) -> None:
    """Copy the best checkpoint of a run that continues in another folder."""
    target = output / BEST
    source = None if resumed is None else resumed.parent / BEST
    if source is not None and source.resolve() == target.resolve():
        return
    if source is not None and is_best(source, best):
        save_checkpoint(load_checkpoint(source), target)
    else:
        target.unlink(missing_ok=True)


def is_best(path: Path, best: dict[str, Any]) -> bool:
    """Check whether a file is the checkpoint of a run's best epoch."""
    try:
        return load_checkpoint(path).get("best") == best
    except (CheckpointError, OSError):  # not there, torn, or not to be read
        return False
