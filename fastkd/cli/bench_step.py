"""``fastkd bench-step``: time of each part of a training step, and its peak GPU memory."""

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

from fastkd.cli import print_once
from fastkd.cli.train import add_recipe_fields, given_fields, naming_flags
from fastkd.config import Recipe

if TYPE_CHECKING:
    from fastkd.training.profile import Breakdown

MADE_IMAGES = 32  # drawn; the rest of the made data set are further names of the same files
MADE_SIZE = (500, 375)
NOISE = 16.0  # of 255 levels: about 90 kB a file
MOST_MADE = 50_000  # unless one update needs more


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``fastkd bench-step``."""
    parser.usage = (
        "fastkd bench-step [--recipe NAME] [--data DIR] [--steps N] [--untrained] "
        "[--any-recipe-field VALUE ...]"
    )
    parser.description = (
        "Build what fastkd train would train with, time the parts of its step, and measure the "
        "peak memory of a full step on a GPU. "
        "Without --data, JPEGs of 500 x 375 pixels are made and read from memory's file cache. "
        "Every field of the recipe is a flag."
    )
    parser.add_argument("--recipe", help="a shipped name (see: fastkd recipes) or a YAML file")
    parser.add_argument(
        "--steps", type=int, default=20, help="updates timed, of each part (default: 20)"
    )
    parser.add_argument(
        "--untrained", action="store_true", help="build a teacher of timm's without its weights"
    )
    parser.add_argument("--device", help="cpu, cuda, cuda:1 (default: cuda where there is one)")
    parser.add_argument("--output", help="write the figures as JSON here")
    add_recipe_fields(parser)
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    from fastkd.training.build import FromRecipe
    from fastkd.training.profile import bench_step
    from fastkd.utils.distributed import is_main_process

    given = given_fields(options)
    recipe = Recipe.load(options.recipe)
    teacher = given.pop("teacher", FromRecipe.TEACHER)
    flags = naming_flags("--teacher-checkpoint PATH, or --untrained: its time is the same")
    with flags, _data(given.pop("data", recipe.data), recipe.override(**given)) as data:
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
    """The data that were asked for, or made ones for as long as they are needed."""
    if given is not None:
        yield given
        return
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        _draw(root / "val", 2)
        _draw(root / "train", MADE_IMAGES)
        _multiply(root / "train", max(recipe.batch_size, min(MOST_MADE, 50 * recipe.batch_size)))
        yield str(root)


def _draw(folder: Path, count: int) -> None:
    """Write JPEGs of two classes: blurred colors under noise, as large as ImageNet's."""
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(0)
    for number in range(count):
        path = folder / f"class{number % 2}" / f"{number:05}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        colors = Image.fromarray(rng.integers(0, 256, (9, 12, 3), np.uint8))
        smooth = np.asarray(colors.resize(MADE_SIZE, Image.Resampling.BICUBIC), np.float32)
        noisy = (smooth + rng.normal(0, NOISE, smooth.shape)).clip(0, 255).astype(np.uint8)
        Image.fromarray(noisy).save(path, quality=90)


def _multiply(folder: Path, count: int) -> None:
    """Give every image further names, until there are as many as wanted."""
    files = sorted(folder.glob("*/*.jpg"))
    for copy in range(1, math.ceil(count / len(files))):
        for file in files:
            os.link(file, file.with_name(f"{file.stem}-{copy}.jpg"))


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
        "fields": given_fields(options),
        "machine": {"cpus": os.cpu_count(), "gpus": gpus()},
        "versions": {name: version(name) for name in ("fastkd", "torch", "timm", "triton")},
        **dataclasses.asdict(breakdown),
        "sentence": breakdown.sentence(),
    }
    write_text(options.output, json.dumps(record, indent=1) + "\n")
