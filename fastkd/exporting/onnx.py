"""Write a student as an ONNX file and check it with onnxruntime; both are imported only then."""

from __future__ import annotations

import importlib
import importlib.util
import itertools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastkd.exporting.student import BATCHES, Student, largest_difference
from fastkd.models.weights import VERSION_KEY
from fastkd.utils.io import replacing

OPSET = 18  # what torch's exporter translates to itself; others are converted from it
INPUT, OUTPUT = "images", "logits"

_PACKAGES = ("onnx", "onnxscript", "onnxruntime")


def require_packages() -> None:
    """Refuse to begin without what torch's exporter and the check need."""
    missing = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(
            f"export: the format onnx needs {' and '.join(missing)}, not found: "
            f"pip install {' '.join(missing)}"
        )


def write_onnx(student: Student, path: Path, opset: int) -> float:
    """Write the graph with weights and metadata in one file, atomically."""
    model = student.required_model("onnx")
    graph = _graph(student, model, opset)
    for name, value in student.metadata().items():
        graph.metadata_props.add(key=name, value=value)
    content = graph.SerializeToString()
    difference = largest_difference(model, student.data_config["input_size"], _Session(content))
    with replacing(path) as file:
        file.write(content)
    return difference


def is_onnx_export(path: Path) -> bool:
    """Whether a file is one that `write_onnx` wrote, by its metadata; needs the packages."""
    onnx: Any = importlib.import_module("onnx")  # untyped, and not always there
    try:
        graph = onnx.load(path, load_external_data=False)
    except Exception:  # a parser's own errors, of another package from version to version
        return False
    return any(entry.key == VERSION_KEY for entry in graph.metadata_props)


def _graph(student: Student, model: nn.Module, opset: int) -> Any:
    """ONNX's ModelProto, of any batch size."""
    example = torch.zeros(BATCHES[0], *student.data_config["input_size"])
    try:
        program: Any = torch.onnx.export(
            model,
            (example,),
            dynamo=True,
            input_names=[INPUT],
            output_names=[OUTPUT],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            opset_version=opset,
            verbose=False,
        )
    except torch.onnx.errors.OnnxExporterError as error:
        first = str(error).strip().splitlines()[0]
        raise ValueError(
            f"export: torch cannot export {student.architecture} to ONNX: {first}"
        ) from error
    graph = program.model_proto
    written = {entry.domain: entry.version for entry in graph.opset_import}[""]
    if written != opset:
        raise ValueError(f"export: torch cannot write opset {opset}, only {written}")
    _forget_origin(graph)
    return graph


def _forget_origin(graph: Any) -> None:
    """Drop torch's notes on every part: stack traces, with the paths of this machine."""
    body = graph.graph
    parts = (body.node, body.value_info, body.initializer, body.input, body.output)
    for part in (body, *itertools.chain(*parts, graph.functions)):
        part.ClearField("metadata_props")


class _Session:
    """An ONNX model as a function of tensors, run on the CPU."""

    def __init__(self, content: bytes) -> None:
        onnxruntime: Any = importlib.import_module("onnxruntime")  # untyped, and not always there

        self.session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])

    def __call__(self, images: Tensor) -> Tensor:
        (logits,) = self.session.run([OUTPUT], {INPUT: images.numpy()})
        return torch.from_numpy(logits)
