"""``fastkd evaluate`` and ``fastkd predict``: run a model on labeled or on plain images."""

from __future__ import annotations

import argparse
import json
import math
import sys
from typing import TYPE_CHECKING, Any

from fastkd.cli import flags, print_once
from fastkd.utils.io import printable, write_text

if TYPE_CHECKING:
    from fastkd.inference.predict import Guess, Predictions

# Options of both commands that are arguments of both functions, under the same names.
SHARED = ("checkpoint", "device", "amp", "batch_size", "workers", "quiet", "verify")


def configure_evaluate(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``fastkd evaluate``."""
    parser.usage = "fastkd evaluate MODEL --data DATA [options]"
    parser.description = (
        "Measure top-1, top-5 and cross-entropy of a model on an evaluation set, every image once. "
        "Under torchrun the processes share the images."
    )
    parser.epilog = """examples:
  fastkd evaluate runs/lift --data imagenet
  fastkd evaluate deit_tiny_patch16_224 --data imagenet --output accuracy.json
  torchrun --nproc_per_node 4 -m fastkd evaluate runs/lift --data imagenet"""
    flags.add_model(parser)
    data = "folder with val/, folder of class folders, shards, or timm dataset name"
    flags.text(parser, "--data", "DATA", data, required=True)
    flags.text(parser, "--output", "FILE.json", "also write the results to a file")
    flags.shared(parser, "--data-root", "--quiet")
    model = parser.add_argument_group("model")
    flags.add_weights(model, default=None)
    by = "match the dataset's classes with the model's by name, or take labels by number"
    flags.choice(model, "--classes-by", ("name", "number"), by)
    flags.add_speed(parser.add_argument_group("speed"), batch_size=256)
    flags.add_image_fields(parser)
    parser.set_defaults(run=_evaluate)


def _evaluate(options: argparse.Namespace) -> int:
    from fastkd.inference.evaluate import check_output, evaluate
    from fastkd.inference.open_model import weights_to_choose
    from fastkd.models.weights import verifying
    from fastkd.utils.distributed import is_main_process

    check_output("evaluate", options.output, (".json",))
    results = []
    chosen: tuple[Any, ...] = (options.weights,)
    if options.weights is None:  # all that a run has
        with verifying(options.verify):
            chosen = weights_to_choose("evaluate", options.model, options.checkpoint) or ("auto",)
    for weights in chosen:
        given = {name: getattr(options, name) for name in (*SHARED, "classes_by")}
        given |= {"weights": weights, **flags.given_image_fields(options, "data_root")}
        measured = evaluate(options.model, options.data, **given)
        print_once(_accuracy_line(options.model, measured))
        results.append(measured)
    if options.output is not None and is_main_process():
        # JSON has no NaN, which the loss is where no logits are finite.
        finite = [m | {"loss": m["loss"] if math.isfinite(m["loss"]) else None} for m in results]
        asked = {name: getattr(options, name) for name in ("model", "checkpoint", "data")}
        write_text(options.output, json.dumps(asked | {"results": finite}, indent=2) + "\n")
    return 0


def _accuracy_line(model: str, measured: dict[str, Any]) -> str:
    top5 = "" if measured["top5"] is None else f", top-5 {measured['top5']:.2f} %"
    kinds = {"unreadable": "unreadable", "nonfinite": "without finite logits"}
    lost = "".join(f", {measured[key]:,} {kind}" for key, kind in kinds.items() if measured[key])
    return (
        f"top-1 {measured['top1']:.2f} %{top5}, cross-entropy {measured['loss']:.4f}, "
        f"{measured['count']:,} images{lost} ({model}, weights {measured['weights']})"
    )


def configure_predict(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``fastkd predict``."""
    parser.usage = "fastkd predict MODEL IMAGE [IMAGE ...] [options]"
    parser.description = (
        "Print the most probable classes of images. Images that cannot be read are listed on "
        "standard error, and the exit status is then 1. Grayscale of more than 8 bits cannot be "
        "read."
    )
    parser.epilog = """examples:
  fastkd predict runs/lift photos/ cat.jpg
  fastkd predict deit_tiny_patch16_224 photos/ --top 1 --output found.csv
  fastkd predict hf_hub:timm/vit_small_patch16_224.augreg_in1k cat.jpg"""
    flags.add_model(parser)
    flags.text(parser, "images", "IMAGE", "image file, or folder, which is searched", nargs="+")
    flags.number(parser, "--top", 5, "classes per image")
    flags.text(parser, "--output", "FILE", "also write the predictions to a .csv or .json file")
    flags.shared(parser, "--quiet")
    flags.add_weights(parser.add_argument_group("model"))
    flags.add_speed(parser.add_argument_group("speed"), batch_size=64)
    flags.add_image_fields(parser)
    parser.set_defaults(run=_predict)


def _predict(options: argparse.Namespace) -> int:
    from fastkd.inference.predict import predict
    from fastkd.utils.distributed import is_main_process

    given = {name: getattr(options, name) for name in (*SHARED, "weights", "top", "output")}
    predictions = predict(
        options.model, options.images, **given, **flags.given_image_fields(options)
    )
    if not is_main_process():
        return 0
    if predictions.images:
        print(_report(predictions, options.model, options.output))
    for fault in predictions.unreadable:
        line = f"skipped {printable(fault.name)}: {printable(fault.reason)}"
        print(f"fastkd predict: {line}", file=sys.stderr)
    return 1 if predictions.unreadable else 0


def _report(predictions: Predictions, model: str, output: str | None) -> str:
    """One line per image with one guess, else one per guess below the image's name."""
    images = predictions.images
    names = [printable(prediction.image) for prediction in images]
    single = all(len(prediction.guesses) == 1 for prediction in images)
    width = max(map(len, names)) if single else 0
    lines: list[str] = []
    for name, prediction in zip(names, images, strict=True):
        guesses = [_line(guess) for guess in prediction.guesses]
        lines += [f"{name:<{width}}{guesses[0]}"] if single else [name, *guesses, ""]
    count = f"{len(images):,} {'image' if len(images) == 1 else 'images'}"
    written = "" if output is None else f", written to {output}"
    last = printable(f"{count} ({model}, weights {predictions.weights}){written}")
    return "\n".join([*lines, last])


def _line(guess: Guess) -> str:
    number = f"class {guess.index}"
    named = number if guess.name == str(guess.index) else f"{printable(guess.name)} ({number})"
    return f"  {100 * guess.probability:6.2f} %  {named}"
