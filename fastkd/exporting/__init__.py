"""Export a trained student for timm, as safetensors or as ONNX."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from fastkd.checkpoint import LAST
from fastkd.exporting.onnx import (
    OPSET,
    is_onnx_export,
    require_packages,
    write_onnx,
)
from fastkd.exporting.student import Student, check_output, open_student
from fastkd.exporting.timm import (
    is_safetensors_export,
    is_timm_export,
    write_checked_safetensors,
    write_timm_folder,
)
from fastkd.inference.loading import Source
from fastkd.models.factory import default_cfgs
from fastkd.models.hub import is_hub_name
from fastkd.models.pretrained import LOCAL

__all__ = ["FORMATS", "OPSET", "Exported", "export"]

FORMATS = ("timm", "safetensors", "onnx")

# Beside the checkpoint, unless another output is given.
_NAMES = {"timm": "student-timm", "safetensors": "student.safetensors", "onnx": "student.onnx"}
_IS_EXPORT = {
    "timm": is_timm_export,
    "safetensors": is_safetensors_export,
    "onnx": is_onnx_export,
}


@dataclass(frozen=True)
class Exported:
    """What `export` wrote.

    Attributes:
        path: the file, or timm's folder.
        format: one of `FORMATS`.
        architecture: timm's name of the student, or ``module:ClassName`` where it has none.
        model_args: what timm needs beside the name.
        weights: ``"raw"``, ``"ema"`` or ``"released"``.
        values: numbers written, parameters and buffers.
        size: bytes on disk.
        difference: largest absolute difference between the logits of the student and of what was
            written, on random images; None where only the student's author can build it.
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
    difference: float | None
    opset: int | None
    load: str | None = None

    def summary(self) -> str:
        """Say in plain lines what was written, how it was checked, and how to load it."""
        arguments = ", ".join(f"{name}={value!r}" for name, value in self.model_args.items())
        lines = [
            f"student: {self.architecture}({arguments}), {self.weights} weights, "
            f"{self.values:,} values",
            f"written: {self.path} ({self.size / 1e6:.1f} MB)",
        ]
        if self.difference is not None:
            lines.append(
                f"checked: logits differ by {self.difference:.1e} at most, on random images"
            )
        if self.opset is not None:
            lines.append(
                f"opset {self.opset}: images [batch, C, H, W], normalised by the metadata's mean "
                "and std, to logits [batch, classes]"
            )
        if self.load is not None:
            lines.append(f"load: {self.load}")
        return "\n".join(lines)


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

    ===========  ==============================================================================
    format       what is written
    ===========  ==============================================================================
    timm         a folder with ``config.json`` and ``model.safetensors``, as on the Hugging Face
                 hub: ``timm.create_model("local-dir:FOLDER", pretrained=True)`` builds the student,
                 with its input size, statistics, classes and, where the run knows them, their
                 names. Students of the paper (`lift`, `widelast`, `uniform`) need
                 ``import fastkd.models`` before; plain ones do not.
    safetensors  one file of weights, with architecture, input and version as its metadata; for
                 ``timm.create_model(NAME, checkpoint_path=FILE, ...)`` as `Exported.load` says.
    onnx         one file: normalised ``images`` [batch, C, H, W] to ``logits`` [batch, classes],
                 of any batch size. What to normalise with is in its metadata properties (``mean``,
                 ``std``, of values in [0, 1]; ``input_size``, ``crop_pct``, ``interpolation``).
    ===========  ==============================================================================

    What timm or onnxruntime computes from the written files is compared with the student on random
    images before they take their place; a failure leaves nothing behind, and an older export as it
    was.

    Args:
        run: folder of a run (its ``last.pth``), one of its checkpoints, or any other model that
            `fastkd.evaluate` takes: a checkpoint that the authors of arXiv 2511.15572 released, an
            earlier export, a timm name (pretrained), ``local-dir:``, ``hf_hub:``, or a module.
        format: one of `FORMATS`.
        output: the file, ending in ``.safetensors`` or ``.onnx``, or the folder; None puts
            ``student-timm``, ``student.safetensors`` or ``student.onnx`` into the run's folder or
            beside the file; of a name, of the hub or a module, here.
        weights: ``"raw"``, ``"ema"``, or ``"auto"``: the EMA where the run measured it to be the
            better one. A released checkpoint has one kind of weights: ``"auto"``.
        img_size: input pixels a side to change to (position embeddings are resampled); None keeps
            what the student was trained on.
        model: the module that a run was given in place of a name, which takes the weights (a copy
            of it does with ``img_size``), or a timm name that builds it. Without it such a run
            exports to safetensors alone.
        opset: of ONNX, from `OPSET`, the default, on.
        overwrite: replace an earlier export of the same format, which is known by its metadata.

    Returns:
        What was written.

    Raises:
        ValueError: an unknown format or option, a checkpoint that cannot be used, a student that
            the format cannot express.
        FileExistsError: ``output`` is there, and ``overwrite`` is not set or would remove what
            `export` did not write in this format.
        FileNotFoundError: the folder that ``output`` goes into is not there.
        ImportError: a package that ONNX needs is missing; it is named.
        RuntimeError: the written model computes something else.
    """
    if format not in FORMATS:
        raise ValueError(f"export: format must be one of {FORMATS}, got {format!r}")
    if opset is not None and format != "onnx":
        raise ValueError(f"export: opset={opset} has no effect: format is {format!r}")
    if opset is not None and opset < OPSET:
        raise ValueError(f"export: opset must be at least {OPSET}, got {opset}")
    if format == "onnx":
        require_packages()
    target = _default_output(run, format) if output is None else Path(output)
    check_output(target, _NAMES[format], overwrite, _IS_EXPORT[format])
    student = open_student(run, weights, img_size, model)
    opset = opset or OPSET
    difference = _write(student, format, target, opset)
    return Exported(
        path=target,
        format=format,
        architecture=student.architecture,
        model_args=student.model_args,
        weights=student.weights,
        values=sum(tensor.numel() for tensor in student.state.values()),
        size=_bytes(target),
        difference=difference,
        opset=opset if format == "onnx" else None,
        load=None if difference is None else _loading_line(student, format, target),
    )


def _default_output(run: Source, format: str) -> Path:
    here = Path(_NAMES[format])
    if isinstance(run, nn.Module) or is_hub_name(run):  # not into the hub's cache
        return here
    path = Path(str(run).removeprefix(LOCAL))
    if path.is_dir():
        return (path if (path / LAST).exists() else path.parent) / here
    return path.parent / here


def _write(student: Student, format: str, target: Path, opset: int) -> float | None:
    """Write and check; the largest difference seen."""
    if format == "timm":
        return write_timm_folder(student, target)
    if format == "onnx":
        return write_onnx(student, target, opset)
    return write_checked_safetensors(student, target)


def _loading_line(student: Student, format: str, target: Path) -> str | None:
    if format == "onnx":
        return None
    packages = "fastkd.models, timm" if student.architecture in default_cfgs else "timm"
    call = f"import {packages}; timm.create_model"
    if format == "timm":
        folder = f"local-dir:{target}"
        return f"{call}({folder!r}, pretrained=True)"
    arguments = "".join(f", {name}={value!r}" for name, value in student.timm_arguments().items())
    return f"{call}({student.architecture!r}, checkpoint_path={str(target)!r}{arguments})"


def _bytes(path: Path) -> int:
    files = path.iterdir() if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files)
