"""``fastkd export``: the student alone, for timm, safetensors or ONNX."""

from __future__ import annotations

import argparse

from fastkd.cli import print_once
from fastkd.cli.evaluate import add_verify_option


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``fastkd export``."""
    parser.description = (
        "Write the student of a run, and nothing else of it. The written model is "
        "compared with the student on random images before it takes its place."
    )
    parser.add_argument(
        "source",
        metavar="RUN",
        help="a run's folder, one of its checkpoints, or one that the paper's authors released (a "
        "file, or hf_hub:OWNER/NAME/FILE)",
    )
    parser.add_argument(
        "--format",
        choices=("timm", "safetensors", "onnx"),
        default="timm",
        help="timm: a folder that timm.create_model loads as local-dir:FOLDER; safetensors: one "
        "file of weights, for timm's checkpoint_path; onnx: one file, of any batch size (default: "
        "timm)",
    )
    parser.add_argument(
        "--output",
        metavar="PATH",
        help="file or folder (default: student-timm, student.safetensors or student.onnx beside "
        "the checkpoint)",
    )
    parser.add_argument(
        "--weights",
        choices=("auto", "raw", "ema"),
        default="auto",
        help="auto: what the run measured to be better (default: auto)",
    )
    parser.add_argument(
        "--img-size", type=int, metavar="N", help="pixels a side to change to (default: as trained)"
    )
    add_verify_option(parser)
    parser.add_argument("--opset", type=int, metavar="N", help="of ONNX, 18 (default) or later")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier export")
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    from fastkd.exporting import export

    exported = export(
        options.source,
        options.format,
        options.output,
        weights=options.weights,
        img_size=options.img_size,
        opset=options.opset,
        overwrite=options.overwrite,
        verify=options.verify,
    )
    print_once(exported.summary())
    return 0
