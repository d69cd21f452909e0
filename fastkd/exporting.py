"""Export a trained student as a timm folder, as safetensors or as ONNX, and check its logits."""

from __future__ import annotations

import copy
import importlib.util
import inspect
import itertools
import json
import os
import textwrap
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import load_file, save_file
from timm.models import save_for_hf
from torch import nn

from fastkd.checkpoint import LAST
from fastkd.config import MODULE_PREFIX
from fastkd.inference.open_model import Model, Source, open_model
from fastkd.inference.preprocessing import change_input_size
from fastkd.models.factory import default_cfgs, rebuilt_by, registered_name
from fastkd.models.hub_download import is_hub_name
from fastkd.models.timm_models import LOCAL, fixed_input_size, is_export
from fastkd.models.weights import (
    CRC_KEY,
    NO_CRC,
    VERSION_KEY,
    short_misfit,
    verifying,
    write_crc,
)
from fastkd.ops.environment import version
from fastkd.utils.argument_checks import LARGEST_IMAGE, check_numbers, refuse_blank
from fastkd.utils.io import replacing_path
from fastkd.utils.random import preserved_rng

__all__ = ["FORMATS", "OPSET", "Exported", "export"]

_NAMES = {"timm": "student-timm", "safetensors": "student.safetensors", "onnx": "student.onnx"}
FORMATS = tuple(_NAMES)
OPSET = 18  # of ONNX: the one that torch's exporter writes without a conversion

_WEIGHTS = "model.safetensors"
# Of timm's published weights, not of the student.
_PUBLISHED = ("test_input_size", "test_crop_pct", "pool_size", "tag", "license", "origin_url")


@dataclass(frozen=True)
class Exported:
    """What `export` wrote."""

    path: Path  # file, or timm's folder
    format: str  # one of `FORMATS`
    architecture: str  # the student's name in timm, or ``module:ClassName``
    model_args: dict[str, Any]  # of timm.create_model, beside the name
    weights: str  # "raw" or "ema" of a run, else "as given"
    size: int  # bytes on disk
    difference: float  # largest absolute difference from the student's logits of random images
    load: str | None = None  # Python that loads it with timm; None where timm cannot

    def summary(self) -> str:
        """Format what was written, how it was checked, and how to load it."""
        arguments = ", ".join(f"{name}={value!r}" for name, value in self.model_args.items())
        lines = [
            f"student: {self.architecture}({arguments}), {self.weights} weights",
            f"written: {self.path} ({self.size / 1e6:.1f} MB)",
            f"checked: logits differ by at most {self.difference:.1e} on random images",
        ]
        if self.format == "onnx":
            lines.append(f"opset {OPSET}: images [batch, C, H, W] to logits [batch, classes]")
        return "\n".join(lines if self.load is None else [*lines, f"load: {self.load}"])


def export(
    model: Source,
    format: str = "timm",
    output: str | Path | None = None,
    *,
    checkpoint: str | Path | None = None,
    weights: str = "auto",
    img_size: int | None = None,
    overwrite: bool = False,
    verify: bool = True,
) -> Exported:
    """Write a trained student, without optimizer and projectors, for use elsewhere.

    The output is kept only if it computes the student's logits of random images.

    Args:
        model: any source that `fastkd.evaluate` takes; a module is copied.
        format: ``"timm"``, a folder for ``timm.create_model("local-dir:FOLDER", pretrained=True)``
            with input size, statistics and class names (Lift, WideLast and uniform students need
            ``import fastkd.models`` before); ``"safetensors"``, weights with the same in the
            metadata; ``"onnx"``, from ``images`` [batch, C, H, W], normalized with the ``mean`` and
            ``std`` of its metadata, to ``logits`` [batch, classes], for any batch size.
        output: file or folder; None: ``student-timm``, ``student.safetensors`` or ``student.onnx``
            beside the checkpoint, or in the working directory if there is none.
        checkpoint: weights for a timm name or a module; also a run whose student was given as a
            module, beside that module.
        weights: ``"raw"``, ``"ema"`` or ``"auto"`` (the better ones) of a run.
        img_size: input pixels a side; position embeddings are resampled. None: as trained.
        overwrite: replace an earlier export in this format, and nothing else.
        verify: refuse weights whose checksum is wrong or missing.

    Returns:
        What was written, and how it was checked.

    Raises:
        ValueError: options, a checkpoint or a student that do not fit.
        FileExistsError: ``output`` exists, and is no export that ``overwrite`` may replace.
        FileNotFoundError: the folder of ``output`` does not exist.
        ImportError: a package that ONNX needs is missing.
        RuntimeError: the written model computes something else.
    """
    if format not in FORMATS:
        raise ValueError(f"export: format must be one of {FORMATS}, got {format!r}")
    check_numbers("export", img_size=(img_size, 1, LARGEST_IMAGE))
    refuse_blank("export", model=model, checkpoint=checkpoint, output=output)
    if format == "onnx":
        needed = ("onnx", "onnxscript", "onnxruntime")
        missing = " ".join(name for name in needed if importlib.util.find_spec(name) is None)
        if missing:
            raise ImportError(f"export: the format onnx needs packages: pip install {missing}")
    source = model if checkpoint is None else checkpoint
    target = _default_output(source, format) if output is None else Path(output)
    _check_output(target, format, overwrite)
    with verifying(verify):
        student = _open_student(model, checkpoint, weights, img_size)
    with replacing_path(target, folder=format == "timm") as temporary:
        difference = _write(student, format, temporary)
        _check_output(target, format, overwrite)  # something may have appeared there meanwhile
    files = target.iterdir() if target.is_dir() else [target]
    return Exported(
        path=target,
        format=format,
        architecture=student.name,
        model_args=student.arguments,
        weights=student.weights,
        size=sum(file.stat().st_size for file in files),
        difference=difference,
        load=_loading_line(student, format, target),
    )


def _default_output(source: Source, format: str) -> Path:
    if isinstance(source, nn.Module) or is_hub_name(source):
        return Path(_NAMES[format])
    path = Path(str(source).removeprefix(LOCAL))
    return (path if (path / LAST).exists() else path.parent) / _NAMES[format]


def _check_output(target: Path, format: str, overwrite: bool) -> None:
    """Refuse an output that would replace anything but an earlier export."""
    suffix = Path(_NAMES[format]).suffix
    if not target.absolute().parent.is_dir():
        raise FileNotFoundError(f"export: there is no folder {str(target.parent)!r}")
    if suffix and target.suffix != suffix:
        raise ValueError(f"export: the output must end in {suffix}, got {str(target)!r}")
    empty = format == "timm" and target.is_dir() and not any(target.iterdir())
    if not os.path.lexists(target) or empty:
        return
    if not overwrite:
        reason = "choose another output, or set overwrite (--overwrite)"
        raise FileExistsError(f"export: {target} exists and is not replaced: {reason}")
    if format == "onnx":
        earlier = target.is_file() and VERSION_KEY.encode() in target.read_bytes()
    else:
        files = {entry.name for entry in target.iterdir()} if target.is_dir() else None
        whole = {"config.json", _WEIGHTS} if format == "timm" else None
        earlier = is_export(target) and files == whole
    if not earlier:
        reason = f"it is no {format} that fastkd exported"
        raise FileExistsError(f"export: {target} exists and is not replaced: {reason}")


def _open_student(
    model: Source, checkpoint: str | Path | None, weights: str, img_size: int | None
) -> Model:
    """Open a student with the name, arguments and input size by which timm builds it."""
    given = isinstance(model, nn.Module)
    opened = open_model(
        copy.deepcopy(model) if given else model,
        checkpoint=checkpoint,
        weights=weights,
        img_size=img_size,
        caller="export",
    )
    network: Any = opened.network.cpu().eval()
    size = getattr(getattr(network, "patch_embed", None), "img_size", None)
    if img_size is not None:
        change_input_size(network, (img_size, img_size))
        if size is not None and hasattr(network, "set_input_size"):  # also where any size runs
            network.set_input_size(img_size=img_size)
            size = network.patch_embed.img_size
    name, arguments = opened.name, dict(opened.arguments)
    if given:
        name = f"{MODULE_PREFIX}{type(network).__name__}"
        if (fields := rebuilt_by(network)) is not None:
            name, options = registered_name(fields["model"], fields["variant"], fields["width"])
            arguments |= options
    if size is None and "img_size" in inspect.signature(type(network)).parameters:
        size = arguments.get("img_size")
    for known in ("img_size", "num_classes", "in_chans"):  # `_timm_arguments` adds the others
        arguments.pop(known, None)
    if size is not None:
        arguments["img_size"] = [size] * 2 if isinstance(size, int) else list(size)
    spec = opened.trained_on or opened.preprocessing.input_spec(network, None)
    if img_size is not None:
        spec = replace(spec, size=(spec.size[0], img_size, img_size))
    classes = opened.classes if len(opened.classes or ()) == opened.num_classes else None
    return replace(opened, trained_on=spec, name=name, arguments=arguments, classes=classes)


def _loading_line(student: Model, format: str, target: Path) -> str | None:
    if format == "onnx" or not timm.is_model(student.name):
        return None
    packages = "fastkd.models, timm" if student.name in default_cfgs else "timm"
    call = f"import {packages}; timm.create_model"
    if format == "timm":
        return f"{call}({f'{LOCAL}{target}'!r}, pretrained=True)"
    arguments = "".join(f", {key}={value!r}" for key, value in _timm_arguments(student).items())
    return f"{call}({student.name!r}, checkpoint_path={str(target)!r}{arguments})"


def _timm_arguments(student: Model) -> dict[str, Any]:
    """Return all that `timm.create_model` needs beside the name."""
    channels = _data_config(student)["input_size"][0]
    return {"in_chans": channels, "num_classes": student.num_classes, **student.arguments}


def _write(student: Model, format: str, path: Path) -> float:
    """Write a student; return the largest difference of logits computed from what was written."""
    try:
        with preserved_rng():  # timm initializes a model before it loads weights
            compute = _WRITERS[format](student, path)
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
            apart = f"logits differ by {difference:.1e} from the student's on a batch of {batch}"
            raise RuntimeError(f"export: what was written computes something else: {apart}")
        largest = max(largest, difference)
    return largest


def _write_timm(student: Model, folder: Path) -> Any:
    if not timm.is_model(student.name):
        raise ValueError("timm knows no such model; safetensors and onnx need none")
    overlay = dict.fromkeys(_PUBLISHED) | _data_config(student)
    if hasattr(getattr(student.network, "patch_embed", None), "strict_img_size"):
        overlay["fixed_input_size"] = fixed_input_size(student.network) is not None
    arguments = _timm_arguments(student)
    model = timm.create_model(student.name, pretrained_cfg_overlay=overlay, **arguments)
    model.load_state_dict(student.network.state_dict())
    config = {"weights": student.weights, "label_names": student.classes}
    save_for_hf(model, str(folder), config, student.arguments, safe_serialization=True)
    _save_weights(student, folder / _WEIGHTS)  # again, with metadata
    return timm.create_model(f"local-dir:{folder}", pretrained=True).eval()


def _write_safetensors(student: Model, path: Path) -> Any:
    _save_weights(student, path)
    if timm.is_model(student.name):
        arguments = _timm_arguments(student)
        return timm.create_model(student.name, checkpoint_path=path, **arguments).eval()
    network = copy.deepcopy(student.network)
    network.load_state_dict(load_file(path))
    return network


def _save_weights(student: Model, path: Path) -> None:
    # safetensors refuses tensors that share memory or are channels_last.
    layout, state = torch.contiguous_format, student.network.state_dict()
    state = {name: tensor.clone(memory_format=layout) for name, tensor in state.items()}
    # Hugging Face's tools look for "pt".
    save_file(state, path, {"format": "pt", **_metadata(student), CRC_KEY: NO_CRC})
    write_crc(path)


def _write_onnx(student: Model, path: Path) -> Any:
    program: Any = torch.onnx.export(
        student.network,
        (torch.zeros(2, *_data_config(student)["input_size"]),),
        dynamo=True,
        input_names=["images"],
        output_names=["logits"],
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        opset_version=OPSET,
        verbose=False,
    )
    model = program.model_proto
    graph = model.graph
    parts = (graph.node, graph.value_info, graph.initializer, graph.input, graph.output)
    for part in (graph, *itertools.chain(*parts, model.functions)):
        part.ClearField("metadata_props")  # stack traces, with paths of this machine
    for key, value in _metadata(student).items():
        model.metadata_props.add(key=key, value=value)
    path.write_bytes(model.SerializeToString())
    onnxruntime: Any = importlib.import_module("onnxruntime")  # untyped, and optional
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])


_WRITERS = {"timm": _write_timm, "safetensors": _write_safetensors, "onnx": _write_onnx}


def _metadata(student: Model) -> dict[str, str]:
    """Describe a student in strings; other values become JSON."""
    described = {
        "architecture": student.name, "model_args": student.arguments,
        "num_classes": student.num_classes, "label_names": student.classes,
        "weights": student.weights, VERSION_KEY: version("fastkd"), **_data_config(student),
    }  # fmt: skip
    known = {name: value for name, value in described.items() if value is not None}
    return {n: v if isinstance(v, str) else json.dumps(v) for n, v in known.items()}


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
