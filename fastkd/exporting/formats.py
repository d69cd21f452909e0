"""Write a student as a timm folder, a safetensors file or an ONNX file, and check the logits."""

from __future__ import annotations

import copy
import importlib.util
import itertools
import json
import textwrap
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import load_file, save_file
from timm.models import save_for_hf

from fastkd.inference.loading import Model
from fastkd.models.pretrained import fixed_input_size, is_export
from fastkd.models.weights import VERSION_KEY, short_misfit
from fastkd.ops.environment import version
from fastkd.utils.random import preserved_rng

OPSET = 18  # the one that torch's exporter writes itself; it converts to later ones

_WEIGHTS = "model.safetensors"
# Of timm's published weights, not of the student.
_PUBLISHED = ("test_input_size", "test_crop_pct", "pool_size", "tag", "license", "origin_url")


def require_onnx() -> None:
    """Raise ImportError if a package that ONNX needs is missing."""
    needed = ("onnx", "onnxscript", "onnxruntime")
    missing = " ".join(name for name in needed if importlib.util.find_spec(name) is None)
    if missing:
        raise ImportError(f"export: the format onnx needs packages: pip install {missing}")


def is_earlier_export(path: Path, format: str) -> bool:
    """Whether a path holds what `write` wrote, and nothing else."""
    if format == "onnx":
        return path.is_file() and VERSION_KEY.encode() in path.read_bytes()
    files = {entry.name for entry in path.iterdir()} if path.is_dir() else None
    return is_export(path) and files == ({"config.json", _WEIGHTS} if format == "timm" else None)


def timm_arguments(student: Model) -> dict[str, Any]:
    """Return all that `timm.create_model` needs beside the name."""
    assert student.trained_on is not None
    own = {"in_chans": student.trained_on.size[0], "num_classes": student.num_classes}
    return own | student.arguments


def write(student: Model, format: str, path: Path, opset: int) -> float:
    """Write a student; return the largest difference of logits computed from what was written.

    A student that the format cannot hold is a ValueError, other logits are a RuntimeError.
    """
    try:
        with preserved_rng():  # timm initializes a model before it loads weights
            compute = _WRITERS[format](student, path, opset)
    except (RuntimeError, TypeError, ValueError, AssertionError) as error:
        reason = textwrap.shorten(short_misfit(error), 500, placeholder=" ...")
        raise ValueError(
            f"export: {student.name} cannot be exported to {format}: {reason}"
        ) from error
    generator, largest = torch.Generator().manual_seed(0), 0.0
    for batch in (2, 5):  # a batch size built into a graph would show
        images = torch.randn(batch, *_data_config(student)["input_size"], generator=generator)
        with torch.no_grad():
            expected = student.network(images)
            difference = (compute(images) - expected).abs().max().item()
        if not difference <= 1e-4 * max(1.0, expected.abs().max().item()):  # NaN fails, too
            raise RuntimeError(
                f"export: what was written computes something else: logits differ by "
                f"{difference:.1e} from the student's on a random batch of {batch}"
            )
        largest = max(largest, difference)
    return largest


def _write_timm(student: Model, folder: Path, _: int) -> Any:
    if not timm.is_model(student.name):
        raise ValueError("timm knows no such model; safetensors and onnx need none")
    overlay = dict.fromkeys(_PUBLISHED) | _data_config(student)
    if hasattr(getattr(student.network, "patch_embed", None), "strict_img_size"):
        overlay["fixed_input_size"] = fixed_input_size(student.network) is not None
    arguments = timm_arguments(student)
    model = timm.create_model(student.name, pretrained_cfg_overlay=overlay, **arguments)
    model.load_state_dict(student.network.state_dict())
    config = {"weights": student.weights, "label_names": student.classes}
    save_for_hf(model, str(folder), config, student.arguments, safe_serialization=True)
    _save_weights(student, folder / _WEIGHTS)  # again, with metadata
    return timm.create_model(f"local-dir:{folder}", pretrained=True).eval()


def _write_safetensors(student: Model, path: Path, _: int) -> Any:
    _save_weights(student, path)
    if timm.is_model(student.name):
        arguments = timm_arguments(student)
        return timm.create_model(student.name, checkpoint_path=path, **arguments).eval()
    network = copy.deepcopy(student.network)
    network.load_state_dict(load_file(path))
    return network


def _save_weights(student: Model, path: Path) -> None:
    state = {
        # safetensors refuses tensors that share memory or are channels_last
        name: tensor.clone(memory_format=torch.contiguous_format)
        for name, tensor in student.network.state_dict().items()
    }
    save_file(state, path, {"format": "pt", **_metadata(student)})  # "pt" for Hugging Face's tools


def _write_onnx(student: Model, path: Path, opset: int) -> Any:
    program: Any = torch.onnx.export(
        student.network,
        (torch.zeros(2, *_data_config(student)["input_size"]),),
        dynamo=True,
        input_names=["images"],
        output_names=["logits"],
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        opset_version=opset,
        verbose=False,
    )
    model = program.model_proto
    written = {entry.domain: entry.version for entry in model.opset_import}[""]
    if written != opset:
        raise ValueError(f"torch cannot write opset {opset}, only {written}")
    graph = model.graph
    parts = (graph.node, graph.value_info, graph.initializer, graph.input, graph.output)
    for part in (graph, *itertools.chain(*parts, model.functions)):
        part.ClearField("metadata_props")  # stack traces, with paths of this machine
    for key, value in _metadata(student).items():
        model.metadata_props.add(key=key, value=value)
    path.write_bytes(model.SerializeToString())
    onnxruntime: Any = importlib.import_module("onnxruntime")  # untyped, and not always there
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])


_WRITERS = {"timm": _write_timm, "safetensors": _write_safetensors, "onnx": _write_onnx}


def _metadata(student: Model) -> dict[str, str]:
    """Describe a student in text; what is no string is JSON."""
    described = {
        "architecture": student.name,
        "model_args": student.arguments,
        "num_classes": student.num_classes,
        "label_names": student.classes,
        "weights": student.weights,
        VERSION_KEY: version("fastkd"),
        **_data_config(student),
    }
    return {
        name: value if isinstance(value, str) else json.dumps(value)
        for name, value in described.items()
        if value is not None
    }


def _data_config(student: Model) -> dict[str, Any]:
    """Describe a student's input under timm's names."""
    recipe, spec = student.preprocessing.recipe, student.trained_on
    assert spec is not None
    return {
        "input_size": tuple(spec.size),
        "mean": tuple(spec.mean or (0.0,) * spec.size[0]),  # without statistics: fed unchanged
        "std": tuple(spec.std or (1.0,) * spec.size[0]),
        # "random" is of training crops; evaluation takes bilinear then.
        "interpolation": recipe.interpolation.replace("random", "bilinear"),
        "crop_pct": recipe.crop_pct,
        "crop_mode": recipe.crop_mode,
    }
