"""A student as one .safetensors file that says what it holds.

Knows what timm's ``checkpoint_path=`` takes: a file of weights under a model's own names.
"""

from __future__ import annotations

from pathlib import Path

import timm
from safetensors.torch import save
from torch import nn

from fastkd.exporting.check import largest_difference
from fastkd.exporting.output import replacing_file
from fastkd.exporting.student import Student
from fastkd.models.weights import FileKind, file_kind
from fastkd.utils.io import replacing
from fastkd.utils.random import preserved_rng


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


def write_checked_safetensors(student: Student, path: Path) -> float | None:
    """Write the file, and let it take its place once timm computes from it what the student does.

    Args:
        student: with a model or without.
        path: the file; an older one survives any failure.

    Returns:
        The largest difference of logits; None where timm knows no model that takes these weights
        and computes what the student does, as of a module that only its author has.

    Raises:
        RuntimeError: timm's model computes something else.
    """
    with replacing_file(path) as temporary:
        write_safetensors(student, temporary)
        return difference_through_timm(student, temporary)


def difference_through_timm(student: Student, path: Path) -> float | None:
    """How far timm's model of the student's name is from it, with a file's weights.

    Args:
        student: with a model or without.
        path: what `write_safetensors` wrote.

    Returns:
        As `write_checked_safetensors`.

    Raises:
        RuntimeError: timm's model computes something else, and the student is no module of its
            author's, whose name in timm promises nothing.
    """
    loaded = _through_timm(student, path)
    if student.model is None or loaded is None:
        return None
    try:
        return largest_difference(student.model, student.data_config["input_size"], loaded)
    except RuntimeError:
        if student.handed_over:
            return None
        raise


def _through_timm(student: Student, path: Path) -> nn.Module | None:
    """The module that `Exported.load` builds, if timm can."""
    if student.model is None or not timm.is_model(student.architecture):
        return None
    arguments = student.timm_arguments()
    try:
        with preserved_rng():  # a model is initialised before it is loaded
            return timm.create_model(
                student.architecture, checkpoint_path=str(path), **arguments
            ).eval()
    except (RuntimeError, TypeError, ValueError, AssertionError):
        return None


def is_safetensors_export(path: Path) -> bool:
    """Whether a file is one that `write_safetensors` wrote, by its metadata."""
    return file_kind(path) is FileKind.EXPORT
