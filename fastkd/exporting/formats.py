"""Write a student as a folder in the layout of timm's models on the Hugging Face hub."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import timm
from safetensors.torch import save
from torch import nn

from fastkd.exporting.student import Student, largest_difference, replacing_file, replacing_folder
from fastkd.models.pretrained import fixed_input_size
from fastkd.models.weights import FileKind, file_kind, short_misfit
from fastkd.utils.io import replacing, write_text
from fastkd.utils.random import preserved_rng

CONFIG = "config.json"
WEIGHTS = "model.safetensors"


def write_timm_folder(student: Student, folder: Path) -> float:
    """Write ``config.json`` and ``model.safetensors``, atomically."""
    model = student.required_model("timm")
    if not timm.is_model(student.architecture):
        raise ValueError(
            f"export: timm knows no model {student.architecture!r}, so it could not load the "
            "folder: choose the format safetensors or onnx"
        )
    with replacing_folder(folder) as temporary:
        write_safetensors(student, temporary / WEIGHTS)
        write_text(temporary / CONFIG, json.dumps(_config(student, model), indent=2) + "\n")
        loaded = _load(student, temporary)
        return largest_difference(model, student.data_config["input_size"], loaded)


def is_timm_export(path: Path) -> bool:
    """Whether a folder holds what `write_timm_folder` wrote, and nothing else."""
    if not path.is_dir() or {entry.name for entry in path.iterdir()} != {CONFIG, WEIGHTS}:
        return False
    return is_safetensors_export(path / WEIGHTS)


def _load(student: Student, folder: Path) -> nn.Module:
    try:
        with preserved_rng():  # a model is initialised before it is loaded
            return timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    except (RuntimeError, TypeError, ValueError, AssertionError) as error:
        raise ValueError(
            f"export: timm's {student.architecture!r} is not this student: {short_misfit(error)}; "
            "choose the format safetensors or onnx"
        ) from error


def _config(student: Student, model: nn.Module) -> dict[str, Any]:
    published = getattr(model, "pretrained_cfg", None) or {}
    config: dict[str, Any] = {
        "architecture": student.architecture,
        "num_classes": student.num_classes,
        "num_features": getattr(model, "num_features", None),
        "model_args": student.model_args,
        "pretrained_cfg": {
            **student.data_config,
            "num_classes": student.num_classes,
            # By these timm finds what to change for other sizes, channels and classes.
            "fixed_input_size": _takes_one_size(model, published),
            "first_conv": published.get("first_conv"),
            "classifier": published.get("classifier"),
        },
    }
    if student.label_names is not None:
        config["label_names"] = student.label_names
    return config


def _takes_one_size(model: nn.Module, published: dict[str, Any]) -> bool:
    """A patch embedding says so of this very model; for others there is what timm published."""
    if hasattr(getattr(model, "patch_embed", None), "strict_img_size"):
        return fixed_input_size(model) is not None
    return bool(published.get("fixed_input_size"))


def write_safetensors(student: Student, path: Path) -> None:
    """Write weights and metadata, atomically."""
    # "format" is how Hugging Face's tools know whose tensors these are.
    content = save(student.state, {"format": "pt", **student.metadata()})
    with replacing(path) as file:
        file.write(content)


def write_checked_safetensors(student: Student, path: Path) -> float | None:
    """Write the file; it takes its place once timm computes from it what the student does."""
    with replacing_file(path) as temporary:
        write_safetensors(student, temporary)
        return difference_through_timm(student, temporary)


def difference_through_timm(student: Student, path: Path) -> float | None:
    """How far timm's model of the student's name is from it, with a file's weights."""
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
