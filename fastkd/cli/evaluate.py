"""``fastkd evaluate``: the accuracy of a timm model, a checkpoint or a run."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from fastkd.cli.ranks import print_once
from fastkd.training.recipe import Recipe, parse_value


def add(commands: Any) -> None:
    """Add the sub-parser of ``fastkd evaluate``."""
    parser = commands.add_parser(
        "evaluate",
        allow_abbrev=False,
        help="measure the accuracy of a timm model, a checkpoint or a run",
    )
    parser.add_argument("model", help="timm name, checkpoint, or folder of a run")
    parser.add_argument("--data", required=True, help="folder or timm data set name")
    parser.add_argument("--checkpoint", help="local weights for a timm name")
    parser.add_argument(
        "--weights",
        choices=("auto", "raw", "ema"),
        help="of a run; auto: what the run measured to be better (default: raw and EMA, each)",
    )
    parser.add_argument("--device", help="cpu, cuda, cuda:1 (default: cuda where there is one)")
    parser.add_argument("--amp", default="none", choices=("none", "bf16", "fp16"))
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--workers", type=int, default=4)
    for name in ("img_size", "crop_pct", "crop_mode", "interpolation", "mean", "std", "data_root"):
        parser.add_argument(
            "--" + name.replace("_", "-"),
            dest=name,
            default=argparse.SUPPRESS,
            metavar="VALUE",
            help=Recipe.__dataclass_fields__[name].metadata["help"],
        )
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    from fastkd.training.evaluation import OPTIONS, evaluate

    given = {
        name: parse_value(name, getattr(options, name))
        for name in OPTIONS
        if hasattr(options, name)
    }
    for weights in _asked_weights(options):
        measured = evaluate(
            options.model,
            options.data,
            checkpoint=options.checkpoint,
            weights=weights,
            device=options.device,
            amp=options.amp,
            batch_size=options.batch_size,
            workers=options.workers,
            **given,
        )
        print_once(_accuracy_line(options.model, measured))
    return 0


def _asked_weights(options: argparse.Namespace) -> tuple[str, ...]:
    """All that a run has, unless one is asked for."""
    from fastkd.training.setup import weights_in

    if options.weights is not None:
        return (options.weights,)
    return weights_in(options.model) if Path(options.model).exists() else ("auto",)


def _accuracy_line(model: str, measured: dict[str, Any]) -> str:
    top5 = "" if measured["top5"] is None else f", top-5 {measured['top5']:.2f} %"
    return (
        f"top-1 {measured['top1']:.2f} %{top5}, cross-entropy {measured['loss']:.4f}, "
        f"{measured['count']:,} images ({model}, weights {measured['weights']})"
    )
