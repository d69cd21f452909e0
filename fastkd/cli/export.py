"""``fastkd export``: write a student for timm, as safetensors or as ONNX."""

from __future__ import annotations

import argparse

from fastkd.cli import flags, print_once


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``fastkd export``."""
    parser.usage = "fastkd export MODEL [--format FORMAT] [options]"
    parser.description = (
        "Write a trained student without optimizer and projectors. The written model must compute "
        "the student's logits of random images before it is kept."
    )
    parser.epilog = """examples:
  fastkd export runs/lift
  fastkd export runs/lift --format onnx --img-size 384 --output lift.onnx
  fastkd export runs/lift/best.pth --format safetensors --overwrite"""
    flags.add_model(parser)
    formats = (
        "timm: a folder for timm.create_model('local-dir:FOLDER'); safetensors: one file, for "
        "timm's checkpoint_path; onnx: one file, for any batch size"
    )
    flags.choice(parser, "--format", ("timm", "safetensors", "onnx"), formats)
    names = "student-timm, student.safetensors or student.onnx beside the checkpoint"
    flags.text(parser, "--output", "PATH", f"file or folder (default: {names})")
    flags.switch(parser, "--overwrite", "replace an earlier export")
    model = parser.add_argument_group("model")
    flags.add_weights(model)
    flags.number(model, "--img-size", None, "input pixels a side (default: as trained)")
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    from fastkd.exporting import export

    given = {name: value for name, value in vars(options).items() if name not in ("command", "run")}
    print_once(export(**given).summary())
    return 0
