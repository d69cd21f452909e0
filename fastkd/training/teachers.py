"""The teacher of a run: from whatever a user calls one to a frozen model that is fed rightly.

Knows where models come from, through `fastkd.inference.loading`; not what they are compared by.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from fastkd.config import Recipe
from fastkd.data.transforms import InputSpec
from fastkd.inference.loading import names_a_file, open_model
from fastkd.models import Teacher, create_teacher
from fastkd.models.teacher import as_teacher

_TEACHER_BY_NAME = "teacher_checkpoint: holds weights for a teacher given by its timm name"


def resolve_teacher(teacher: Any, recipe: Recipe, spec: InputSpec) -> Teacher | None:
    """Load the teacher and tell it what the images are normalised with.

    Args:
        teacher: None, a `Teacher`, a module, or whatever `open_model` opens: a timm name or folder,
            a run's folder, a checkpoint, an exported student.
        recipe: its ``teacher_checkpoint`` holds local weights for a timm name, its
            ``teacher_img_size`` the size that images are resized to for the teacher.
        spec: the student's input.

    Returns:
        The frozen teacher on the CPU, or None.

    Raises:
        ValueError: weights for a module, a size for a `Teacher` or for a model that is fixed to
            another, or what `open_model` raises.
    """
    if teacher is None:
        return None
    size = recipe.teacher_img_size
    if isinstance(teacher, nn.Module):
        if recipe.teacher_checkpoint is not None:
            raise ValueError(_TEACHER_BY_NAME)
        resolved = _given_teacher(teacher, size)
    else:
        resolved = _opened_teacher(teacher, recipe.teacher_checkpoint, size)
    resolved.set_input_stats(spec.mean, spec.std)
    return resolved


def _given_teacher(teacher: nn.Module, size: int | None) -> Teacher:
    if not isinstance(teacher, Teacher):
        return create_teacher(teacher, input_size=size)
    if size is not None:
        raise ValueError("teacher_img_size: a Teacher has an input_size of its own")
    return teacher


def _opened_teacher(teacher: str | Path, checkpoint: str | None, size: int | None) -> Teacher:
    """What `evaluate` would open, fed what it was trained on."""
    if checkpoint is not None and names_a_file("train", teacher):
        raise ValueError(_TEACHER_BY_NAME)
    options = {} if size is None else {"img_size": size}
    opened = open_model("train", teacher, checkpoint, "auto", options)
    if opened.trained_on is None:
        return as_teacher(opened.network, built_for=size)
    # Without statistics it would take those of timm's configuration, but a run on tensors was fed
    # them as they came.
    fed = opened.trained_on
    return Teacher(opened.network, mean=fed.mean, std=fed.std, input_size=fed.size[-2:])
