"""``fastkd train``: every field of a recipe is a flag."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterator
from typing import Any

from fastkd.cli import print_once
from fastkd.cli.evaluate import add_verify_option
from fastkd.config import SECTIONS, Recipe, describe, parse_value


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``fastkd train``."""
    parser.usage = (
        "fastkd train [--recipe NAME] --data DIR --output DIR [--teacher NAME] "
        "[--any-recipe-field VALUE ...]"
    )
    parser.description = (
        "Train a student. Every field of the recipe is a flag; what is not given comes "
        "from --recipe, or from the defaults shown. Under torchrun the batch is shared."
    )
    parser.add_argument("--recipe", help="a shipped name (see: fastkd recipes) or a YAML file")
    parser.add_argument("--output", help="the run's folder; a run in it is continued")
    parser.add_argument(
        "--resume", default="auto", help="auto, never, or a checkpoint (default: auto)"
    )
    parser.add_argument("--device", help="cpu, cuda, cuda:1 (default: cuda where there is one)")
    add_verify_option(parser)
    parser.add_argument("--quiet", action="store_true", help="show no progress")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="check the run, print what it amounts to and its recipe, and stop",
    )
    add_recipe_fields(parser)
    parser.set_defaults(run=_run)


def add_recipe_fields(parser: argparse.ArgumentParser) -> None:
    """Make every field of the recipe a flag, under the heading of its group."""
    for heading, section in SECTIONS.items():
        group = parser.add_argument_group(heading)
        for name, field in section.model_fields.items():
            # A flag alone switches an option on; `--flag false` switches one of the recipe's off.
            bare: Any = {"nargs": "?", "const": "true"} if isinstance(field.default, bool) else {}
            expected = describe(name)
            choices = f" ({expected.removeprefix('one of ')})" if "one of" in expected else ""
            text = f"{field.description}{choices} [{_shown(field.default)}]"
            group.add_argument(
                "--" + name.replace("_", "-"),
                dest=name,
                default=argparse.SUPPRESS,
                metavar="VALUE",
                help=text.replace("%", "%%"),
                **bare,
            )


def given_fields(options: argparse.Namespace) -> dict[str, Any]:
    """The recipe fields that were asked for."""
    given, faults = parse_fields(options)
    if faults:
        raise ValueError("; ".join(faults))
    return given


def parse_fields(options: argparse.Namespace) -> tuple[dict[str, Any], list[str]]:
    """Read the recipe fields that were asked for; returns also a line for each that is none."""
    given: dict[str, Any] = {}
    faults = []
    for name in Recipe.model_fields:
        if hasattr(options, name):
            try:
                given[name] = parse_value(name, getattr(options, name))
            except ValueError as error:
                faults.append(str(error))
    return given, faults


@contextlib.contextmanager
def naming_flags(flags: str) -> Iterator[None]:
    """Say by which flags a run gets on where a teacher's weights cannot be downloaded."""
    from fastkd.models.pretrained import DownloadError

    try:
        yield
    except DownloadError as error:
        raise DownloadError(f"{error}; on the command line {flags}") from error


def _shown(value: Any) -> str:
    if isinstance(value, tuple):
        pairs = all(isinstance(item, tuple) for item in value)
        return ",".join(f"{item[0]}:{item[1]}" if pairs else f"{item:g}" for item in value)
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)


def _run(options: argparse.Namespace) -> int:
    from fastkd.training.build import FromRecipe
    from fastkd.training.trainer import train

    if options.dry_run:
        return _dry_run(options)
    given = given_fields(options)
    recipe = Recipe.load(options.recipe)
    teacher = given.pop("teacher", FromRecipe.TEACHER)
    if options.output is None:
        raise ValueError("--output is missing: the folder that the run is kept in")
    with naming_flags("--teacher-checkpoint PATH"):
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

    given, faults = parse_fields(options)
    with verifying(options.verify):
        resolved, values = dry_run(
            options.recipe,
            given.pop("teacher", FromRecipe.TEACHER),
            given,
            output=options.output,
            resume=options.resume,
            device=options.device,
            problems=faults,
        )
    lines = [f"{heading + ':':<16} {text}" for heading, text in values.items()]
    print_once("\n".join([*lines, "", resolved.to_yaml()]))
    return 0
