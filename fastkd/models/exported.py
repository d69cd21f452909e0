"""What a student that `fastkd export` wrote says of itself, and the module that it says it is.

Knows the metadata of such a .safetensors file; the trainer writes it, timm's names are used in it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastkd.models.weights import FASTKD_FORMAT, VERSION_KEY, metadata

# Metadata is text: these are JSON in it.
_JSON = ("model_args", "num_classes", "label_names", "input_size", "mean", "std", "crop_pct")
_CONFIG = ("input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode", "label_names")


@dataclass(frozen=True)
class Description:
    """How timm builds an exported student, and what it takes in.

    Attributes:
        architecture: timm's name, or ``module:ClassName`` where only its author can build it.
        arguments: that `timm.create_model` needs beside the name.
        config: for timm's ``pretrained_cfg``: statistics, size, crop and names of classes.
    """

    architecture: str
    arguments: dict[str, Any]
    config: dict[str, Any]


def read_description(path: str | Path) -> Description | None:
    """Read an exported file's metadata.

    Args:
        path: of a .safetensors file.

    Returns:
        The description; None of a file that `fastkd export` did not write.
    """
    said = metadata(path)
    if VERSION_KEY not in said:
        return None
    values: dict[str, Any] = {
        name: json.loads(text) if name in _JSON else text for name, text in said.items()
    }
    arguments = {"num_classes": values.get("num_classes"), **values["model_args"]}
    channels = values["input_size"][0]
    if channels != 3:
        arguments["in_chans"] = channels
    config = {name: _as_tuple(values[name]) for name in _CONFIG if name in values}
    # Of the architecture in general; this student was evaluated as it was trained.
    config |= {"test_input_size": None, "test_crop_pct": None}
    return Description(values["architecture"], arguments, config)


def run_statistics(content: Any) -> dict[str, Any]:
    """What the images of a fastkd run were normalised with, for timm's ``pretrained_cfg``.

    Args:
        content: of a file of weights.

    Returns:
        ``mean`` and ``std``; empty for what is no checkpoint of a run. Images that were fed as they
        came were normalised with 0 and 1.
    """
    if not isinstance(content, Mapping) or content.get("format") != FASTKD_FORMAT:
        return {}
    fed = content.get("input")
    if fed is None:
        return {}
    channels = fed["size"][0]
    mean, std = fed["mean"] or (0.0,) * channels, fed["std"] or (1.0,) * channels
    return {"mean": tuple(mean), "std": tuple(std)}


def _as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
