"""The trainer behind `train`; names are imported at first use, so that a recipe needs no torch."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastkd.checkpoint import CheckpointError, load_checkpoint
    from fastkd.config import Recipe
    from fastkd.data.shard_writer import shard
    from fastkd.exporting import export
    from fastkd.inference.evaluate import evaluate
    from fastkd.inference.loading import load_student
    from fastkd.inference.predict import Guess, Prediction, Predictions, predict
    from fastkd.training.engine import NonFiniteError
    from fastkd.training.logging import Result
    from fastkd.training.task import DistillationTask, build_task
    from fastkd.training.trainer import train

_HOMES = {
    "CheckpointError": "fastkd.checkpoint",
    "load_checkpoint": "fastkd.checkpoint",
    "NonFiniteError": "fastkd.training.engine",
    "evaluate": "fastkd.inference.evaluate",
    "export": "fastkd.exporting",
    "Guess": "fastkd.inference.predict",
    "Prediction": "fastkd.inference.predict",
    "Predictions": "fastkd.inference.predict",
    "predict": "fastkd.inference.predict",
    "Recipe": "fastkd.config",
    "Result": "fastkd.training.logging",
    "load_student": "fastkd.inference.loading",
    "shard": "fastkd.data.shard_writer",
    "DistillationTask": "fastkd.training.task",
    "build_task": "fastkd.training.task",
    "train": "fastkd.training.trainer",
}

__all__ = [
    "CheckpointError",
    "DistillationTask",
    "Guess",
    "NonFiniteError",
    "Prediction",
    "Predictions",
    "Recipe",
    "Result",
    "build_task",
    "evaluate",
    "export",
    "load_checkpoint",
    "load_student",
    "predict",
    "shard",
    "train",
]


if not TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(_HOMES[name]), name)
        globals()[name] = value
        return value
