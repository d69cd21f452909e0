"""Export a trained student for timm, as safetensors or as ONNX."""

from __future__ import annotations

import copy
import inspect
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import timm
from torch import nn

from fastkd.checkpoint import LAST
from fastkd.config import MODULE_PREFIX
from fastkd.exporting.formats import (
    OPSET,
    is_earlier_export,
    require_onnx,
    timm_arguments,
    write,
)
from fastkd.inference.loading import Model, Source, open_model
from fastkd.inference.preprocessing import change_input_size
from fastkd.models.factory import default_cfgs, rebuilt_by, registered_name
from fastkd.models.hub import fetched, is_hub_name
from fastkd.models.pretrained import LOCAL
from fastkd.models.weights import FileKind, file_kind
from fastkd.utils.io import replacing_path

__all__ = ["FORMATS", "OPSET", "Exported", "export"]

_NAMES = {"timm": "student-timm", "safetensors": "student.safetensors", "onnx": "student.onnx"}
FORMATS = tuple(_NAMES)


@dataclass(frozen=True)
class Exported:
    """What `export` wrote.

    Attributes:
        path: file, or timm's folder.
        format: one of `FORMATS`.
        architecture: the student's name in timm, or ``module:ClassName``.
        model_args: what timm needs beside the name.
        weights: ``"raw"`` or ``"ema"`` of a run, else ``"released"`` or ``"as given"``.
        values: number of parameters and elements of buffers.
        size: bytes on disk.
        difference: largest absolute difference from the student's logits, on random images.
        opset: of an ONNX file.
        load: Python that loads it with timm; None where timm cannot.
    """

    path: Path
    format: str
    architecture: str
    model_args: dict[str, Any]
    weights: str
    values: int
    size: int
    difference: float
    opset: int | None
    load: str | None = None

    def summary(self) -> str:
        """Say in plain lines what was written, how it was checked, and how to load it."""
        arguments = ", ".join(f"{name}={value!r}" for name, value in self.model_args.items())
        lines = [
            f"student: {self.architecture}({arguments}), {self.weights} weights, "
            f"{self.values:,} values",
            f"written: {self.path} ({self.size / 1e6:.1f} MB)",
            f"checked: logits differ by {self.difference:.1e} at most, on random images",
        ]
        if self.opset is not None:
            lines.append(
                f"opset {self.opset}: images [batch, C, H, W], normalized by the metadata's mean "
                "and std, to logits [batch, classes]"
            )
        return "\n".join(lines if self.load is None else [*lines, f"load: {self.load}"])


def export(
    run: Source,
    format: str = "timm",
    output: str | Path | None = None,
    *,
    weights: str = "auto",
    img_size: int | None = None,
    model: Source | None = None,
    opset: int | None = None,
    overwrite: bool = False,
) -> Exported:
    """Write the student of a run, and nothing else of it, for use elsewhere.

    It replaces an earlier export once it computes the student's logits of random images; a failure
    leaves everything as it was.

    Args:
        run: folder or checkpoint of a run, or any other model that `fastkd.evaluate` takes.
        format: ``"timm"``, a folder for ``timm.create_model("local-dir:FOLDER", pretrained=True)``
            with input size, statistics and names of classes (Lift, WideLast and uniform students
            need ``import fastkd.models`` before); ``"safetensors"``, weights with the same in the
            metadata, for the line in `Exported.load`; ``"onnx"``, from ``images`` [batch, C, H, W],
            normalized with the ``mean`` and ``std`` of its metadata, to ``logits`` [batch, classes]
            for any batch size.
        output: file or folder; None puts ``student-timm``, ``student.safetensors`` or
            ``student.onnx`` beside the checkpoint, or here if there is none.
        weights: ``"raw"``, ``"ema"``, or ``"auto"``: those that the run measured to be better.
        img_size: pixels a side to change to (position embeddings are resampled).
        model: for a run whose student was a module: the module, which stays as it is, or a timm
            name.
        opset: of ONNX, from `OPSET`, the default, on.
        overwrite: replace an earlier export in this format, which its metadata shows.

    Raises:
        ValueError: an option, the checkpoint, or a student that the format cannot hold.
        FileExistsError: ``output`` exists, and is no export that ``overwrite`` may replace.
        FileNotFoundError: the folder of ``output`` does not exist.
        ImportError: a package that ONNX needs is missing.
        RuntimeError: the written model computes something else.
    """
    if format not in FORMATS:
        raise ValueError(f"export: format must be one of {FORMATS}, got {format!r}")
    if opset is not None and format != "onnx":
        raise ValueError(f"export: opset={opset} has no effect: format is {format!r}")
    if opset is not None and opset < OPSET:
        raise ValueError(f"export: opset must be at least {OPSET}, got {opset}")
    if format == "onnx":
        require_onnx()
        opset = opset or OPSET
    target = _default_output(run, format) if output is None else Path(output)
    _check_output(target, format, overwrite)
    student = _open_student(run, weights, img_size, model)
    with replacing_path(target, folder=format == "timm") as temporary:
        difference = write(student, format, temporary, opset or OPSET)
    files = target.iterdir() if target.is_dir() else [target]
    return Exported(
        path=target,
        format=format,
        architecture=student.name,
        model_args=student.arguments,
        weights=student.weights,
        values=sum(tensor.numel() for tensor in student.network.state_dict().values()),
        size=sum(file.stat().st_size for file in files),
        difference=difference,
        opset=opset,
        load=_loading_line(student, format, target),
    )


def _default_output(run: Source, format: str) -> Path:
    if isinstance(run, nn.Module) or is_hub_name(run):
        return Path(_NAMES[format])
    path = Path(str(run).removeprefix(LOCAL))
    return (path if (path / LAST).exists() else path.parent) / _NAMES[format]


def _check_output(target: Path, format: str, overwrite: bool) -> None:
    """Refuse an output that would replace anything but an earlier export."""
    suffix = Path(_NAMES[format]).suffix
    if not target.absolute().parent.is_dir():
        raise FileNotFoundError(f"export: there is no folder {str(target.parent)!r}")
    if suffix and target.suffix != suffix:
        raise ValueError(f"export: the output must end in {suffix}, got {str(target)!r}")
    if not os.path.lexists(target) or (overwrite and is_earlier_export(target, format)):
        return
    if format == "timm" and target.is_dir() and not any(target.iterdir()):
        return
    kind = f"it is no {format} that fastkd exported"
    reason = kind if overwrite else "choose another output, or set overwrite (--overwrite)"
    raise FileExistsError(f"export: {target} exists and is not replaced: {reason}")


def _open_student(
    source: Source, weights: str, img_size: int | None, model: Source | None
) -> Model:
    """Open a student with the name, arguments and input size by which timm builds it."""
    path = None if isinstance(source, nn.Module) else Path(fetched("export", source))
    released = path is not None and file_kind(path) is FileKind.WEIGHTS
    if model is not None and (path is None or released):
        raise ValueError(f"export: model has no effect: {source} is a model itself")
    opening: Any = source if model is None else model
    given = isinstance(opening, nn.Module)
    opened = open_model(
        copy.deepcopy(opening) if given else opening,
        checkpoint=None if model is None else path,
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
            name, known = registered_name(fields["model"], fields["variant"], fields["width"])
            arguments |= known
    built_for = arguments.pop("img_size", None)
    if size is None and "img_size" in inspect.signature(type(network)).parameters:
        size = built_for
    if size is not None:
        arguments["img_size"] = [size] * 2 if isinstance(size, int) else list(size)
    spec = opened.trained_on or opened.preprocessing.input_spec(network, None)
    if img_size is not None:
        spec = replace(spec, size=(spec.size[0], img_size, img_size))
    classes = opened.classes
    return replace(
        opened,
        name=name,
        # `timm_arguments` adds these two
        arguments={k: v for k, v in arguments.items() if k not in ("num_classes", "in_chans")},
        weights="released" if released else opened.weights,
        classes=None if classes is None or len(classes) != opened.num_classes else classes,
        trained_on=spec,
    )


def _loading_line(student: Model, format: str, target: Path) -> str | None:
    if format == "onnx" or not timm.is_model(student.name):
        return None
    packages = "fastkd.models, timm" if student.name in default_cfgs else "timm"
    call = f"import {packages}; timm.create_model"
    if format == "timm":
        return f"{call}({f'{LOCAL}{target}'!r}, pretrained=True)"
    arguments = "".join(f", {key}={value!r}" for key, value in timm_arguments(student).items())
    return f"{call}({student.name!r}, checkpoint_path={str(target)!r}{arguments})"
