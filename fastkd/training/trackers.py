"""Trackers: where else a run's metrics go, if it is installed and asked for.

Gets numbers and steps; knows neither models nor the run's own files.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from fastkd.utils.io import write_text

NAMES = {"tensorboard": ("tensorboard",), "wandb": ("wandb",), "both": ("tensorboard", "wandb")}
_MODULES = {"tensorboard": "torch.utils.tensorboard", "wandb": "wandb"}


class Tracker(Protocol):
    """Something that takes metrics."""

    def log(self, values: dict[str, float], step: int) -> None:
        """Take metrics by name at an update."""

    def close(self) -> None:
        """Write what is left."""


def check_trackers(track: str | None, output: Path | None) -> None:
    """Refuse a tracker that could not run, before the run begins.

    Args:
        track: a recipe's ``track``.
        output: the run's folder.

    Raises:
        ValueError: a tracker's package is not installed, or it has no folder to write to.
    """
    for name in NAMES.get(track or "", ()):
        if output is None:
            raise ValueError(f"track: {name} keeps its files in the run's folder: give an output")
        try:
            importlib.import_module(_MODULES[name])
        except ImportError as error:
            raise ValueError(
                f"track: {name} is asked for and cannot be imported ({error}); "
                f"pip install {name}, or track=None"
            ) from None


def open_trackers(
    track: str | None, output: Path, config: dict[str, Any], updates: int
) -> list[Tracker]:
    """Start or continue the trackers of a run.

    Args:
        track: a recipe's ``track``.
        output: the run's folder.
        config: the recipe's plain values.
        updates: finished updates; what an interrupted run logged after them is dropped where the
            tracker can.

    Returns:
        The trackers, in no order that matters.
    """
    kinds: dict[str, Callable[[Path, dict[str, Any], int], Tracker]] = {
        "tensorboard": _TensorBoard,
        "wandb": _WandB,
    }
    return [kinds[name](output, config, updates) for name in NAMES.get(track or "", ())]


class _TensorBoard:
    def __init__(self, output: Path, config: dict[str, Any], updates: int) -> None:
        writer: Any = importlib.import_module(_MODULES["tensorboard"]).SummaryWriter
        self.writer = writer(str(output / "tensorboard"), purge_step=updates + 1)

    def log(self, values: dict[str, float], step: int) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        self.writer.close()


class _WandB:
    """One run of Weights & Biases a folder: its id is kept there, so that it goes on."""

    def __init__(self, output: Path, config: dict[str, Any], updates: int) -> None:
        wandb = importlib.import_module(_MODULES["wandb"])
        file = output / "wandb_id.txt"
        resumed = updates > 0 and file.exists()
        known = file.read_text(encoding="utf-8").strip() if resumed else None
        self.run = wandb.init(
            project="fastkd",
            name=output.name,
            dir=str(output),
            config=config,
            id=known,
            resume="allow",
        )
        if known is None:
            write_text(file, f"{self.run.id}\n")

    def log(self, values: dict[str, float], step: int) -> None:
        self.run.log(values, step=step)

    def close(self) -> None:
        self.run.finish()
