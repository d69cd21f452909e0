"""A student as one .safetensors file that says what it holds.

Knows what timm's ``checkpoint_path=`` takes: a file of weights under a model's own names.
"""

from __future__ import annotations

from pathlib import Path

import timm
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from fastkd.training.atomic import replacing
from fastkd.training.exporting.check import largest_difference
from fastkd.training.exporting.student import VERSION_KEY, Student
from fastkd.training.seeding import preserved_rng


def write_safetensors(student: Student, path: Path) -> None:
    """Write weights and metadata, atomically.

    Args:
        student: its weights, under the names that its module has for them.
        path: the file; an older one survives any failure.
    """
    # "format" is how Hugging Face's tools know whose tensors these are.
    content = save(student.state, {"format": "pt", **student.metadata()})
    with replacing(path) as file:
        file.write(content)


def difference_through_timm(student: Student, path: Path) -> float | None:
    """How far timm's model of the student's name is from it, with a file's weights.

    Args:
        student: with a model or without.
        path: what `write_safetensors` wrote.

    Returns:
        The largest difference of logits; None where timm knows no model that takes these weights
        and computes what the student does, as of a module that only its author has.
    """
    if student.model is None or not timm.is_model(student.architecture):
        return None
    try:
        with preserved_rng():  # a model is initialised before it is loaded
            loaded = timm.create_model(
                student.architecture, checkpoint_path=str(path), **student.timm_arguments()
            ).eval()
        return largest_difference(student.model, student.data_config["input_size"], loaded)
    except (RuntimeError, TypeError, ValueError, AssertionError):
        return None


def is_safetensors_export(path: Path) -> bool:
    """Whether a file is one that `write_safetensors` wrote, by its metadata."""
    try:
        with safe_open(path, "pt") as file:
            return VERSION_KEY in (file.metadata() or {})
    except (SafetensorError, OSError):
        return False
