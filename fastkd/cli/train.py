"""``fastkd train``: every field of a recipe is a flag."""

from __future__ import annotations

import argparse

from fastkd.cli import flags, print_once
from fastkd.config import Recipe


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``fastkd train``."""
    parser.usage = "fastkd train [--recipe NAME] --data DATA --output DIR [options]"
    parser.description = (
        "Train a student. Every field of a recipe is a flag; a field that is not given comes from "
        "--recipe, or has the default in brackets. Under torchrun the processes share the batch."
    )
    parser.epilog = """examples:
  fastkd train --recipe lift_softkd_spectral --data imagenet --output runs/lift
  fastkd train --model vit_tiny_patch16_224 --data photos --output runs/vit
  fastkd train --recipe lift_softkd_spectral --data imagenet --dry-run"""
    flags.shared(parser, "--recipe")
    flags.text(parser, "--output", "DIR", "folder of the run; an interrupted run in it is resumed")
    resume = "auto, never, or a checkpoint file (default: auto)"
    flags.text(parser, "--resume", "CHECKPOINT", resume, default="auto")
    flags.switch(
        parser, "--dry-run", "check the run, print what it amounts to and its recipe, and stop"
    )
    flags.shared(parser, "--device", "--no-verify", "--quiet")
    flags.add_recipe(parser)
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    from fastkd.training.build import FromRecipe
    from fastkd.training.trainer import train

    if options.dry_run:
        return _dry_run(options)
    given = flags.given_fields(options)
    recipe = Recipe.load(options.recipe)
    # `teacher=None` would mean none: the recipe's is another value.
    teacher = given.pop("teacher", FromRecipe.TEACHER)
    if options.output is None:
        raise ValueError("--output is missing: the folder of the run")
    with flags.naming_flags("--teacher-checkpoint PATH"):
        result = train(
            None,
            teacher,
            given.pop("data", None),
            options.output,
            recipe,
            resume=options.resume,
            device=options.device,
            quiet=options.quiet,
            verify=options.verify,
            **given,
        )
    print_once(result.summary())
    return 0


def _dry_run(options: argparse.Namespace) -> int:
    from fastkd.models.weights import verifying
    from fastkd.training.build import FromRecipe
    from fastkd.training.dry_run import dry_run

    given = flags.given_fields(options, keep_wrong=True)  # to be listed with other problems
    with verifying(options.verify):
        resolved, values = dry_run(
            options.recipe,
            given.pop("teacher", FromRecipe.TEACHER),
            given,
            output=options.output,
            resume=options.resume,
            device=options.device,
        )
    lines = [f"{heading + ':':<16} {text}" for heading, text in values.items()]
    print_once("\n".join([*lines, "", resolved.to_yaml()]))
    return 0
