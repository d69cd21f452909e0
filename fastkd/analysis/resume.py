"""How an interrupted analysis goes on: the accumulators of every pass, in a file per process."""

from __future__ import annotations

import json
import pickle
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fastkd.utils.io import replacing

SAVE_EVERY_SECONDS = 60.0


class Resume:
    """Keeps the state of the passes over one model's images.

    Args:
        folder: where; None keeps nothing.
        name: of the model's files.
        rank: this process.
        size: number of processes.
        wanted: whether to go on with what is there; else every pass starts anew and writes over it.
    """

    def __init__(
        self, folder: Path | None, name: str, rank: int = 0, size: int = 1, wanted: bool = False
    ) -> None:
        self.folder = folder
        self.wanted = wanted
        self._suffix = f"-{rank}of{size}.pt"
        self._name = name
        self._size = size
        self._fingerprint = ""
        self._saved = time.monotonic()

    def open(self, fingerprint: dict[str, Any]) -> None:
        """Say what the passes depend on, before the first of them.

        Args:
            fingerprint: plain values; a state that was saved with other ones is refused.

        Raises:
            ValueError: the interrupted analysis ran on another number of processes.
        """
        self._fingerprint = plain_json(fingerprint)
        if self.folder is None or not self.wanted:
            return
        left = {path.name.rsplit("-", 1)[1] for path in self.folder.glob(f"{self._name}-*-*of*.pt")}
        others = {name.removesuffix(".pt").split("of")[1] for name in left} - {str(self._size)}
        if others:
            raise ValueError(
                f"analyze: {self.folder} was interrupted with {others.pop()} process(es); resume "
                f"with as many, got {self._size}, or remove it to start over"
            )

    def state(self, phase: str) -> dict[str, Any] | None:
        """What was saved of a pass.

        Args:
            phase: the pass.

        Returns:
            The state; None where there is nothing to go on from.

        Raises:
            ValueError: it belongs to another analysis, or the file is damaged.
        """
        if self.folder is None or not self.wanted or not self._path(phase).exists():
            return None
        path = self._path(phase)
        try:
            saved = torch.load(path, map_location="cpu", weights_only=True)
            before, state = saved["fingerprint"], saved["state"]
        except (RuntimeError, EOFError, KeyError, TypeError, pickle.UnpicklingError) as error:
            raise ValueError(
                f"analyze: {path} cannot be read ({type(error).__name__}); remove it to start over"
            ) from error
        if before != self._fingerprint:
            what = difference(before, self._fingerprint)
            raise ValueError(
                f"analyze: {path} belongs to another analysis ({what}); give the same arguments, "
                f"or remove {path.parent} to start over"
            )
        return state

    def save(self, phase: str, state: dict[str, Any]) -> None:
        """Keep the state of a pass.

        Args:
            phase: the pass.
            state: tensors, numbers, strings, and containers of them.
        """
        if self.folder is None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        with replacing(self._path(phase)) as file:
            torch.save({"fingerprint": self._fingerprint, "state": state}, file)
        self._saved = time.monotonic()

    def save_now_and_then(self, phase: str, make_state: Callable[[], dict[str, Any]]) -> None:
        """`save` if the last one is a minute ago."""
        if time.monotonic() - self._saved >= SAVE_EVERY_SECONDS:
            self.save(phase, make_state())

    def _path(self, phase: str) -> Path:
        assert self.folder is not None
        return self.folder / f"{self._name}-{phase}{self._suffix}"


def plain_json(fingerprint: dict[str, Any]) -> str:
    """A fingerprint as text, the same for equal ones."""
    return json.dumps(fingerprint, sort_keys=True, default=str)


def difference(before: str, now: str) -> str:
    """The first thing in which two fingerprints differ, in words.

    Args:
        before: `plain_json` of one.
        now: of the other.

    Returns:
        ``"its seed is 0, not 1"``.
    """
    old, new = _flat(json.loads(before)), _flat(json.loads(now))
    names = [name for name in {**old, **new} if old.get(name) != new.get(name)]
    name = names[0]
    return f"its {name} is {_short(old.get(name))}, not {_short(new.get(name))}"


def _flat(fingerprint: dict[str, Any]) -> dict[str, Any]:
    """Nested values by their own names: ``selection.images``; the plain ones first."""
    inner = [
        (f"{outer}.{name}", value)
        for outer, values in fingerprint.items()
        if isinstance(values, dict)
        for name, value in values.items()
    ]
    return {n: v for n, v in fingerprint.items() if not isinstance(v, dict)} | dict(inner)


def _short(value: Any, length: int = 60) -> str:
    text = str(value)
    return text if len(text) <= length else text[: length - 3] + "..."
