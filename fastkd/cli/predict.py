"""``fastkd predict``: what a model takes pictures for."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from fastkd.cli.evaluate import add_image_options, add_verify_option, given_image_options
from fastkd.utils.io import printable

if TYPE_CHECKING:
    from fastkd.inference.predict import Guess, Prediction, Predictions


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``fastkd predict``."""
    parser.description = (
        "Say what images show. They reach the model as in fastkd evaluate. What cannot "
        "be read, which grayscale of more than 8 bits counts as, is named and passed over, as is "
        "what the model has no finite logits for; the exit status is then 1."
    )
    parser.add_argument(
        "images",
        nargs="+",
        metavar="IMAGE",
        help="image file, or folder with images in it and below",
    )
    parser.add_argument(
        "--checkpoint",
        metavar="MODEL",
        help="folder or checkpoint of a run, timm folder, released checkpoint, hf_hub:..., or timm "
        "name; beside --model, weights for it",
    )
    parser.add_argument(
        "--model", metavar="NAME", help="timm name, pretrained or with the weights of --checkpoint"
    )
    parser.add_argument(
        "--top", type=int, default=5, metavar="N", help="classes for each image (default: 5)"
    )
    parser.add_argument(
        "--output", metavar="FILE", help="also write the predictions, to a .csv or .json file"
    )
    parser.add_argument(
        "--weights",
        choices=("auto", "raw", "ema"),
        default="auto",
        help="of a run; auto: what the run measured to be better (default: auto)",
    )
    add_verify_option(parser)
    parser.add_argument("--device", help="cpu, cuda, cuda:1 (default: cuda where there is one)")
    parser.add_argument("--amp", default="none", choices=("none", "bf16", "fp16"))
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--workers", type=int, help="for more than one batch (default: up to 4)")
    parser.add_argument("--quiet", action="store_true", help="show no progress")
    add_image_options(parser)
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    from fastkd.inference.predict import predict
    from fastkd.utils.distributed import is_main_process

    model, checkpoint = options.model, options.checkpoint
    if model is None:
        model, checkpoint = checkpoint, None
    if model is None:
        raise ValueError("predict: which model? give --checkpoint or --model")
    predictions = predict(
        options.images,
        model,
        checkpoint=checkpoint,
        weights=options.weights,
        top=options.top,
        output=options.output,
        device=options.device,
        amp=options.amp,
        batch_size=options.batch_size,
        workers=options.workers,
        quiet=options.quiet,
        verify=options.verify,
        **given_image_options(options),
    )
    if not is_main_process():
        return 0
    print(_report(predictions, model, options.output))
    for fault in predictions.unreadable:
        print(
            f"fastkd predict: passed over {printable(fault.name)}: {printable(fault.reason)}",
            file=sys.stderr,
        )
    return 1 if predictions.unreadable else 0


def _report(predictions: Predictions, model: str, output: str | None) -> str:
    count = len(predictions.images)
    told = (
        f"{count:,} {'image' if count == 1 else 'images'} ({model}, weights {predictions.weights})"
    )
    if output is not None:
        told += f", written to {output}"
    return "\n".join([*_table(predictions.images), printable(told)])


def _table(images: tuple[Prediction, ...]) -> list[str]:
    """A line for an image with one guess, else one for every guess below the image's name."""
    names = [printable(prediction.image) for prediction in images]
    if all(len(prediction.guesses) == 1 for prediction in images):
        width = max(map(len, names), default=0)
        pairs = zip(names, images, strict=True)
        return [f"{name:<{width}}{_line(p.guesses[0])}" for name, p in pairs]
    lines = []
    for name, prediction in zip(names, images, strict=True):
        lines += [name, *map(_line, prediction.guesses), ""]
    return lines


def _line(guess: Guess) -> str:
    number = f"class {guess.index}"
    called = number if guess.name == str(guess.index) else f"{printable(guess.name)} ({number})"
    return f"  {100 * guess.probability:6.2f} %  {called}"
