"""The trainer behind `train`, and what is done with a trained student."""

from __future__ import annotations

from fastkd.checkpoint import CheckpointError, load_checkpoint
from fastkd.config import Recipe
from fastkd.data.shard_writer import shard
from fastkd.exporting import export
from fastkd.inference.evaluate import evaluate
from fastkd.inference.open_model import load_student
from fastkd.inference.predict import Guess, Prediction, Predictions, predict
from fastkd.training.logging import Result
from fastkd.training.task import DistillationTask, build_task
from fastkd.training.trainer import train
from fastkd.training.updates import NonFiniteError

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
