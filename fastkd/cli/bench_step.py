"""``fastkd bench-step``: time each part of a training step, and measure its peak GPU memory."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import math
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from fastkd.cli import flags, print_once
from fastkd.config import Recipe

if TYPE_CHECKING:
    from fastkd.training.profile import Breakdown

DRAWN_IMAGES = 32  # the other files of the dataset are links to these
DRAWN_SIZE = (500, 375)
NOISE = 16.0  # of 255 levels: about 90 kB a file
MOST_FILES = 50_000  # unless one update needs more


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``fastkd bench-step``."""
    parser.usage = "fastkd bench-step [--recipe NAME] [--data DATA] [options]"
    parser.description = (
        "Time the parts of the training step that fastkd train would run, and measure the peak "
        "memory of a full step on a GPU. Without --data, JPEGs of 500 x 375 pixels are drawn and "
        "read from memory's file cache. Every field of a recipe is a flag."
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
    named = flags.naming_flags("--teacher-checkpoint PATH, or --untrained: its time is the same")
    with named, _data(given.pop("data", recipe.data), recipe.override(**given)) as data:
        breakdown = bench_step(
            recipe,
            data,
            teacher,
            untrained=options.untrained,
            steps=options.steps,
            device=options.device,
            on_part=_announce,
            **given,
        )
    print_once(_table(breakdown))
    if options.output is not None and is_main_process():
        _write(options, breakdown)
    return 0


def _announce(part: str) -> None:
    from fastkd.utils.distributed import is_main_process

    if is_main_process():
        print(f"timing: {part}", file=sys.stderr)


@contextlib.contextmanager
def _data(given: str | None, recipe: Recipe) -> Iterator[str]:
    """Yield the dataset that was given, or a temporary folder of drawn images."""
    if given is not None:
        yield given
        return
    with tempfile.TemporaryDirectory() as folder:
        files = max(recipe.batch_size, min(MOST_FILES, 50 * recipe.batch_size))
        _draw(Path(folder) / "val", 2, 2)
        _draw(Path(folder) / "train", DRAWN_IMAGES, files)
        yield folder


def _draw(folder: Path, drawn: int, files: int) -> None:
    """Write JPEGs of two classes, blurred colors under noise, and link them under more names."""
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(0)
    for index in range(drawn):
        path = folder / f"class{index % 2}" / f"{index:05}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        colors = Image.fromarray(rng.integers(0, 256, (9, 12, 3), np.uint8))
        smooth = np.asarray(colors.resize(DRAWN_SIZE, Image.Resampling.BICUBIC), np.float32)
        noisy = (smooth + rng.normal(0, NOISE, smooth.shape)).clip(0, 255).astype(np.uint8)
        Image.fromarray(noisy).save(path, quality=90)
        for copy in range(1, math.ceil(files / drawn)):
            os.link(path, path.with_name(f"{path.stem}-{copy}.jpg"))


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
