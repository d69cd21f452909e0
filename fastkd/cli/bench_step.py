"""``fastkd bench-step``: time each part of a training step, and measure its peak GPU memory."""

from __future__ import annotations

import argparse
import dataclasses
import io
import json
import os
import sys
from typing import TYPE_CHECKING, Any

from PIL import Image

from fastkd.cli import flags, print_once
from fastkd.config import Recipe

if TYPE_CHECKING:
    from fastkd.training.profile import Breakdown

DRAWN_IMAGES = 32  # more would not be slower to decode
DRAWN_SIZE = (500, 375)  # ImageNet's most common size
NOISE = 18.0  # of 255 levels: about 90 kB a file


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``fastkd bench-step``."""
    parser.usage = "fastkd bench-step [--recipe NAME] [--data DATA] [options]"
    parser.description = (
        "Time the parts of the training step that fastkd train would run, and measure the peak "
        "memory of a full step on a GPU. Without --data, drawn JPEGs of 500 x 375 pixels are "
        "decoded from memory. Every field of a recipe is a flag."
    )
    parser.epilog = """examples:
  fastkd bench-step --recipe lift_softkd_spectral --untrained
  fastkd bench-step --recipe lift_softkd --data imagenet --batch-size 64"""
    flags.shared(parser, "--recipe", "--device")
    flags.number(parser, "--steps", 20, "timed updates per part")
    flags.switch(parser, "--untrained", "build the teacher without its weights")
    flags.text(parser, "--output", "FILE.json", "also write the figures to a file")
    flags.add_recipe(parser)
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    from fastkd.inference.evaluate import check_output
    from fastkd.training.build import FromRecipe
    from fastkd.training.profile import bench_step
    from fastkd.utils.distributed import is_main_process

    check_output("bench-step", options.output)
    given = flags.given_fields(options)
    recipe = Recipe.load(options.recipe)
    teacher = given.pop("teacher", FromRecipe.TEACHER)
    data = given.pop("data", recipe.data)
    if data is None:
        drawn = _DrawnImages(50 * recipe.override(**given).batch_size)
        data = drawn, drawn
    with flags.naming_flags("--teacher-checkpoint PATH, or --untrained: its time is the same"):
        breakdown = bench_step(
            recipe,
            data,
            teacher,
            untrained=options.untrained,
            steps=options.steps,
            device=options.device,
            on_part=lambda part: print_once(f"timing: {part}", sys.stderr),
            **given,
        )
    print_once(_table(breakdown))
    if options.output is not None and is_main_process():
        _write(options, breakdown)
    return 0


class _DrawnImages:
    """JPEGs of two classes in memory, each under many numbers."""

    classes = ("0", "1")

    def __init__(self, count: int) -> None:
        self.count, self.files = count, [_draw() for _ in range(DRAWN_IMAGES)]

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Any, int]:
        from fastkd.data.image_files import open_image  # imports torch

        # Only opened: the dataloader decodes, as it does with files.
        return open_image(self.files[index % DRAWN_IMAGES]), index % 2


def _draw() -> bytes:
    """Draw one JPEG: a photograph's size, and noise for a photograph's number of bytes."""
    channels = [Image.effect_noise(DRAWN_SIZE, NOISE) for _ in range(3)]
    file = io.BytesIO()
    Image.merge("RGB", channels).save(file, "JPEG", quality=90)
    return file.getvalue()


def _table(breakdown: Breakdown) -> str:
    rows = [f"{'':28}{'ms':>10}{'quartiles':>21}{'images/s':>12}{'of the step':>13}"]
    for part in breakdown.parts.values():
        quartiles = f"{1e3 * part.lower_quartile:,.2f} - {1e3 * part.upper_quartile:,.2f}"
        rows.append(
            f"{part.name:28}{1e3 * part.seconds:>10,.2f}{quartiles:>21}"
            f"{part.images_per_second:>12,.0f}{100 * part.share:>11.0f} %"
        )
    rows.append(f"an update has {breakdown.images} images; parts overlap")
    if breakdown.peak_memory is not None:
        rows.append(f"a full step holds at most {breakdown.peak_memory / 2**30:.2f} GiB on the GPU")
    return "\n".join([*rows, breakdown.sentence()])


def _write(options: argparse.Namespace, breakdown: Breakdown) -> None:
    from fastkd.ops.environment import gpus, version
    from fastkd.utils.io import write_text

    record = {
        "recipe": options.recipe,
        "fields": flags.given_fields(options),
        "machine": {"cpus": os.cpu_count(), "gpus": gpus()},
        "versions": {name: version(name) for name in ("fastkd", "torch", "timm", "triton")},
        **dataclasses.asdict(breakdown),
        "sentence": breakdown.sentence(),
    }
    write_text(options.output, json.dumps(record, indent=1) + "\n")
