"""The saved state of an interrupted analysis, and the check that it is of the same one."""

from __future__ import annotations

import json
import textwrap
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from fastkd.models.weights import UnreadableError, read_file
from fastkd.utils.io import replacing

SAVE_EVERY_SECONDS = 60.0


@dataclass
class Resume:
    """Save and load the state of the passes over one model's images."""

    folder: Path | None  # None saves nothing
    name: str  # of the model's files
    rank: int = 0
    size: int = 1  # number of processes
    wanted: bool = False  # continue from what is there; else overwrite it
    _fingerprint: str = field(default="", init=False)
    _saved: float = field(default_factory=time.monotonic, init=False)

    def open(self, fingerprint: str) -> None:
        """Set what the passes depend on; raise if another number of processes was interrupted."""
        self._fingerprint = fingerprint
        if self.folder is None or not self.wanted:
            return
        left = {path.stem.rsplit("of", 1)[1] for path in self.folder.glob(f"{self.name}-*of*.pt")}
        others = left - {str(self.size)}
        if others:
            raise ValueError(
                f"analyze: {self.folder} was interrupted with {others.pop()} process(es); resume "
                f"with as many, got {self.size}, or remove it to start over"
            )

    def state(self, phase: str) -> dict[str, Any] | None:
        """Load what was saved of a pass, if anything was."""
        path = self._path(phase)
        if path is None or not self.wanted or not path.exists():
            return None
        try:
            saved = read_file(path)
            before, state = saved["fingerprint"], saved["state"]
        except (UnreadableError, KeyError, TypeError) as error:
            raise ValueError(
                f"analyze: {path} cannot be read ({type(error).__name__}); remove it to start over"
            ) from error
        check_same_analysis(path, before, self._fingerprint)
        return state

    def save(self, phase: str, state: dict[str, Any]) -> None:
        """Save the state of a pass."""
        path = self._path(phase)
        if path is None:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as file:
            torch.save({"fingerprint": self._fingerprint, "state": state}, file)
        self._saved = time.monotonic()

    @property
    def is_due(self) -> bool:
        return time.monotonic() - self._saved >= SAVE_EVERY_SECONDS

    def _path(self, phase: str) -> Path | None:
        file = f"{self.name}-{phase}-{self.rank}of{self.size}.pt"
        return None if self.folder is None else self.folder / file


def check_same_analysis(path: Path, before: str, now: str) -> None:
    """Raise, naming the first difference, if a saved fingerprint is of another analysis."""
    if before == now:
        return
    what = _difference(json.loads(before), json.loads(now))
    raise ValueError(
        f"analyze: {path} belongs to another analysis (its {what}); give the same arguments, or "
        f"remove {path.parent} to start over"
    )


def _difference(old: dict[str, Any], new: dict[str, Any]) -> str:
    name = next(name for name in {**old, **new} if old.get(name) != new.get(name))
    was, is_now = old.get(name), new.get(name)
    if isinstance(was, dict) and isinstance(is_now, dict):
        return f"{name}.{_difference(was, is_now)}"
    shown = [textwrap.shorten(str(value), 60, placeholder="...") for value in (was, is_now)]
    return f"{name} is {shown[0]}, not {shown[1]}"
