"""``fastkd recipes``, ``fastkd losses`` and ``fastkd env``: what there is to choose from."""

from __future__ import annotations

import argparse
import inspect
import json
import re
from collections.abc import Sequence
from pathlib import Path

from fastkd.losses.registry import (
    FEATURE_LOSSES,
    LOGIT_LOSSES,
    PROJECTORS,
    Loss,
    Projector,
    find_loss,
    has_temperature,
    options_of,
)
from fastkd.utils.io import printable

_AIM = re.compile(r"# Aims at: (\d[\d.]* %)")  # in a recipe's head; some have none to aim at


def configure_recipes(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``fastkd recipes``."""
    parser.add_argument("name", nargs="?", help="a recipe to show")
    parser.add_argument(
        "--schema", action="store_true", help="print the JSON schema of a recipe, for editors"
    )
    parser.set_defaults(run=_recipes)


def configure_losses(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``fastkd losses``."""
    parser.add_argument("name", nargs="?", help="a loss or projector to explain")
    parser.set_defaults(run=_losses)


def configure_env(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``fastkd env``."""
    parser.set_defaults(run=_env)


def _env(_: argparse.Namespace) -> int:
    from fastkd.ops.environment import report

    print(report())
    return 0


def _recipes(options: argparse.Namespace) -> int:
    from fastkd.config import Recipe

    if options.schema:
        print(json.dumps(Recipe.json_schema(), indent=1))
    elif options.name is not None:
        text = Recipe.path(options.name).read_text(encoding="utf-8", errors="backslashreplace")
        print(printable(text, lines=True), end="")
    else:
        for name in Recipe.names():
            print(f"{name:<26} {_aim_and_title(Recipe.path(name))}")
    return 0


def _aim_and_title(path: Path) -> str:
    text = path.read_text(encoding="utf-8")
    aim = _AIM.search(text)
    return f"{aim[1] if aim else '-':>8}  {text.splitlines()[0].lstrip('# ')}"


def _losses(options: argparse.Namespace) -> int:
    projectors = {projector.name: projector for projector in PROJECTORS}
    if options.name is None:
        print(_listing())
    elif options.name in projectors:
        print(_line(_projector_row(projectors[options.name]), (0, 0)).strip())
    else:
        print(_explanation(find_loss(options.name)))
    return 0


def _listing() -> str:
    blocks = [
        ("logit losses, --logit-loss", [_row(loss) for loss in LOGIT_LOSSES]),
        ("feature losses, --feature-loss", [_row(loss) for loss in FEATURE_LOSSES]),
        ("projectors, --projector", [_projector_row(p) for p in PROJECTORS]),
    ]
    lines: list[str] = []
    for heading, block in blocks:
        widths = [max(len(row[column]) for row in block) for column in range(2)]
        lines += [heading, *(_line(row, widths) for row in block), ""]
    return "\n".join([*lines, "fastkd losses NAME explains one: formula, reduction, options."])


def _line(row: Sequence[str], widths: Sequence[int]) -> str:
    name, summary, source = row
    return f"  {name:<{widths[0]}}  {summary:<{widths[1]}}  {source}"


def _row(loss: Loss) -> tuple[str, str, str]:
    return loss.name, loss.summary, loss.source


def _projector_row(projector: Projector) -> tuple[str, str, str]:
    kept = "stays at inference" if projector.stays else "dropped at inference"
    if not projector.learned:
        kept = "nothing learned"
    return projector.name, f"{projector.summary} ({kept})", projector.source


def _explanation(loss: Loss) -> str:
    cls = loss.load()
    lines = [f"{loss.name}: {loss.summary} ({loss.source})"]
    lines.append(f"as a module: fastkd.losses.{cls.__name__}")
    flag = "--alpha" if loss in LOGIT_LOSSES else "--feature-weight, 0.2 if not given"
    lines.append(f"weight in its source: {loss.weight} ({flag})")
    chosen = ", ".join(f"{name}={value}" for name, value in options_of(loss).items())
    lines.append(f"options: {chosen or 'none'}")
    if loss in LOGIT_LOSSES and has_temperature(loss):
        lines.append("temperature: --tau, a field of its own")
    return "\n".join([*lines, "", inspect.cleandoc(cls.__doc__ or "")])
