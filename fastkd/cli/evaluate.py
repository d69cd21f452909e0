"""``fastkd evaluate``: the accuracy of a timm model, a checkpoint or a run."""

from __future__ import annotations

import argparse
from typing import Any

from fastkd.cli import print_once
from fastkd.config import IMAGE_OPTIONS, Recipe, parse_value


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``fastkd evaluate``."""
    parser.add_argument(
        "model", help="timm name, checkpoint, timm folder, folder of a run, or hf_hub:..."
    )
    parser.add_argument("--data", required=True, help="folder or timm data set name")
    parser.add_argument("--checkpoint", help="weights for a timm name: a file, or hf_hub:...")
    parser.add_argument(
        "--weights",
        choices=("auto", "raw", "ema"),
        help="of a run; auto: what the run measured to be better (default: raw and EMA, each)",
    )
    add_verify_option(parser)
    parser.add_argument("--device", help="cpu, cuda, cuda:1 (default: cuda where there is one)")
    parser.add_argument("--amp", default="none", choices=("none", "bf16", "fp16"))
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--workers", type=int, help="loader processes (default: up to 4)")
    parser.add_argument(
        "--classes-by",
        default="name",
        choices=("name", "number"),
        help="match labels with the model's classes by name, or take them as they are numbered",
    )
    add_image_options(parser, "data_root")
    parser.set_defaults(run=_run)


def add_verify_option(parser: argparse._ActionsContainer) -> None:
    """Add the flag that loads weights in spite of their checksum."""
    text = "load weights whose checksum is wrong or was left out, too"
    parser.add_argument("--no-verify", dest="verify", action="store_false", help=text)


def add_image_options(parser: argparse.ArgumentParser, *others: str) -> None:
    """Add the options that say how a model sees its images."""
    for name in (*IMAGE_OPTIONS, *others):
        parser.add_argument(
            "--" + name.replace("_", "-"),
            dest=name,
            default=argparse.SUPPRESS,
            metavar="VALUE",
            help=Recipe.model_fields[name].description,
        )


def given_image_options(options: argparse.Namespace, *others: str) -> dict[str, Any]:
    """What was given of the options of `add_image_options`, as Python values."""
    names = (*IMAGE_OPTIONS, *others)
    return {
        name: parse_value(name, getattr(options, name)) for name in names if hasattr(options, name)
    }


def _run(options: argparse.Namespace) -> int:
    from fastkd.inference.evaluate import evaluate

    weights: Any
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
            verify=options.verify,
            classes_by=options.classes_by,
            **given_image_options(options, "data_root"),
        )
        print_once(_accuracy_line(options.model, measured))
    return 0


def _asked_weights(options: argparse.Namespace) -> tuple[str, ...]:
    """All that a run has, unless one is asked for."""
    from fastkd.inference.loading import weights_to_choose
    from fastkd.models.weights import verifying

    if options.weights is not None:
        return (options.weights,)
    with verifying(options.verify):
        return weights_to_choose("evaluate", options.model, options.checkpoint) or ("auto",)


def _accuracy_line(model: str, measured: dict[str, Any]) -> str:
    top5 = "" if measured["top5"] is None else f", top-5 {measured['top5']:.2f} %"
    kinds = {"unreadable": "unreadable", "nonfinite": "without finite logits"}
    lost = "".join(f", {measured[key]:,} {kind}" for key, kind in kinds.items() if measured[key])
    return (
        f"top-1 {measured['top1']:.2f} %{top5}, cross-entropy {measured['loss']:.4f}, "
        f"{measured['count']:,} images{lost} ({model}, weights {measured['weights']})"
    )
