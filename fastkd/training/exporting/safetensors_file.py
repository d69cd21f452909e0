"""A student as one .safetensors file that says what it holds."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from fastkd.training.atomic import replacing
from fastkd.training.exporting.student import VERSION_KEY, Student


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


def is_safetensors_export(path: Path) -> bool:
    """Whether a file is one that `write_safetensors` wrote, by its metadata."""
    try:
        with safe_open(path, "pt") as file:
            return VERSION_KEY in (file.metadata() or {})
    except (SafetensorError, OSError):
        return False
