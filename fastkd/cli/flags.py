"""Options that several commands share."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

from fastkd.config import IMAGE_OPTIONS, SECTIONS, Recipe, describe, parse_value

Options = argparse._ActionsContainer  # a parser, or a group of its options

MOST_USED = ("data", "teacher", "model", "variant", "epochs", "batch_size", "lr")

# Options of several commands that are the same everywhere.
_SHARED: dict[str, dict[str, Any]] = {
    "--recipe": {"help": "shipped recipe (see: fastkd recipes), or a YAML file", "metavar": "NAME"},
    "--device": {"help": "cpu, cuda or cuda:1 (default: cuda if there is one)"},
    "--data-root": {"help": "files of a timm dataset given by name", "metavar": "DIR"},
    "--quiet": {"help": "show no progress", "action": "store_true"},
    "--no-verify": {
        "help": "load weights even if their checksum is wrong or missing",
        "dest": "verify",
        "action": "store_false",
    },
}


def shared(parser: Options, *names: str) -> None:
    """Add options of `_SHARED`."""
    for name in names:
        parser.add_argument(name, **_SHARED[name])


def text(parser: Options, name: str, metavar: str, help: str, **options: Any) -> None:
    """Add an option that takes a text."""
    parser.add_argument(name, metavar=metavar, help=help, **options)


def number(
    parser: Options, name: str, default: float | None, help: str, metavar: str = "N"
) -> None:
    """Add an option that takes a number, of the type of its default; None: an integer."""
    kind = int if default is None else type(default)
    shown = "" if default is None else f" (default: {default})"
    parser.add_argument(name, type=kind, default=default, metavar=metavar, help=help + shown)


def choice(parser: Options, name: str, choices: Sequence[str], help: str) -> None:
    """Add an option that takes one of some words, by default the first."""
    shown = f"{help} (default: {choices[0]})"
    parser.add_argument(name, choices=choices, default=choices[0], help=shown)


def switch(parser: Options, name: str, help: str) -> None:
    """Add an option without a value."""
    parser.add_argument(name, help=help, action="store_true")


def add_model(parser: Options, more: str = "", **options: Any) -> None:
    """Add the argument MODEL, which takes whatever `open_model` takes."""
    known = "timm name, run folder, checkpoint, exported folder or file, local-dir:FOLDER, or "
    text(parser, "model", "MODEL", f"{known}hf_hub:OWNER/NAME[/FILE]{more}", **options)


def add_weights(parser: Options, default: str | None = "auto") -> None:
    """Add the choice of weights: a file for MODEL, raw or EMA of a run, checksums."""
    file = "weights for MODEL where that is a timm name: a file, run folder or hf_hub:..."
    text(parser, "--checkpoint", "FILE", file)
    shown = "auto" if default else "raw and EMA, one after the other"
    kind = f"weights of a run; auto: the better ones in its last evaluation (default: {shown})"
    parser.add_argument("--weights", choices=("auto", "raw", "ema"), default=default, help=kind)
    shared(parser, "--no-verify")


def add_speed(parser: Options, batch_size: int) -> None:
    """Add device, precision, batch size and workers of a forward pass over images."""
    shared(parser, "--device")
    choice(parser, "--amp", ("none", "bf16", "fp16"), "autocast type")
    number(parser, "--batch-size", batch_size, "images per forward pass and process")
    number(parser, "--workers", None, "dataloader processes (default: up to 4)")


def add_recipe(parser: argparse.ArgumentParser) -> None:
    """Add every field of a recipe as a flag; those not given are not among the parsed options."""
    groups = {"most used fields of the recipe": MOST_USED} | {
        heading: [name for name in section.model_fields if name not in MOST_USED]
        for heading, section in SECTIONS.items()
    }
    for heading, names in groups.items():
        group = parser.add_argument_group(heading)
        for name in names:
            field = Recipe.model_fields[name]
            # A flag alone switches an option on; `--flag false` switches one of the recipe's off.
            bare: Any = {"nargs": "?", "const": "true"} if isinstance(field.default, bool) else {}
            group.add_argument(
                "--" + name.replace("_", "-"),
                dest=name,
                default=argparse.SUPPRESS,  # so that only given fields override a recipe
                metavar="VALUE",
                # argparse formats help texts with %.
                help=_help(name, field.description, field.default).replace("%", "%%"),
                **bare,
            )


def add_image_fields(parser: argparse.ArgumentParser) -> None:
    """Add what overrides how a model's images are resized, cropped and normalized."""
    group = parser.add_argument_group(
        "images", "By default as the run evaluated its student, or as timm evaluates the model."
    )
    for name in IMAGE_OPTIONS:
        text = Recipe.model_fields[name].description
        group.add_argument("--" + name.replace("_", "-"), metavar="VALUE", help=text)


def choices_of(name: str) -> list[str]:
    """The values of a field that allows a few words; empty for others."""
    expected = describe(name).split(";")[0].replace(" or ", ", ")
    return expected.removeprefix("one of ").split(", ") if expected.startswith("one of") else []


def given_fields(options: argparse.Namespace, keep_wrong: bool = False) -> dict[str, Any]:
    """Read the recipe fields that were given; wrong values are raised, or kept as text."""
    given: dict[str, Any] = {}
    faults = []
    for name in Recipe.model_fields:
        if hasattr(options, name):
            try:
                given[name] = parse_value(name, getattr(options, name))
            except ValueError as error:
                faults.append(str(error))
                given[name] = getattr(options, name)
    if faults and not keep_wrong:
        raise ValueError("; ".join(faults))
    return given


def given_image_fields(options: argparse.Namespace, *others: str) -> dict[str, Any]:
    """The fields of `add_image_fields`, and others, that were given, as Python values."""
    given = {name: value for name, value in vars(options).items() if value is not None}
    names = (*IMAGE_OPTIONS, *others)
    return {name: parse_value(name, given[name]) for name in names if name in given}


@contextlib.contextmanager
def naming_flags(flags: str) -> Iterator[None]:
    """Add the flags that help to the error of a teacher whose weights cannot be downloaded."""
    from fastkd.models.timm_models import DownloadError

    try:
        yield
    except DownloadError as error:
        raise DownloadError(f"{error}; on the command line {flags}") from error


def _help(name: str, text: str | None, default: Any) -> str:
    expected = describe(name)
    choices = f" ({expected.removeprefix('one of ')})" if "one of" in expected else ""
    if isinstance(default, tuple):  # as it is written on the command line
        items = (":".join(map(str, x)) if isinstance(x, tuple) else f"{x:g}" for x in default)
        return f"{text}{choices} [{','.join(items)}]"
    plain = default is None or isinstance(default, bool)
    return f"{text}{choices} [{str(default).lower() if plain else default}]"
