"""The trainer: recipes, data, the loop, checkpoints and logs, behind `train` and `evaluate`.

Names are imported at first use, so that reading a recipe does not import torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastkd.training.checkpoint import CheckpointError, load_checkpoint
    from fastkd.training.engine import NonFiniteError
    from fastkd.training.evaluation import evaluate
    from fastkd.training.exporting import export
    from fastkd.training.prediction import Guess, Prediction, Predictions, predict
    from fastkd.training.recipe import Recipe
    from fastkd.training.result import Result
    from fastkd.training.setup import load_student
    from fastkd.training.shards import shard
    from fastkd.training.task import DistillationTask, build_task
    from fastkd.training.trainer import train

_HOMES = {
    "CheckpointError": "checkpoint",
    "load_checkpoint": "checkpoint",
    "NonFiniteError": "engine",
    "evaluate": "evaluation",
    "export": "exporting",
    "Guess": "prediction",
    "Prediction": "prediction",
    "Predictions": "prediction",
    "predict": "prediction",
    "Recipe": "recipe",
    "Result": "result",
    "load_student": "setup",
    "shard": "shards",
    "DistillationTask": "task",
    "build_task": "task",
    "train": "trainer",
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


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value
