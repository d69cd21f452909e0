"""``fastkd recipes``: what ships, by name, with the number it aims at, and the text of one."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

from fastkd.config import Recipe

_AIM = re.compile(r"# Aims at: (\d[\d.]* %)")  # in a recipe's head; some have none to aim at


def add(commands: Any) -> None:
    """Add the sub-parser of ``fastkd recipes``."""
    parser = commands.add_parser("recipes", help="list the shipped recipes, or show one")
    parser.add_argument("name", nargs="?", help="a recipe to show")
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    if options.name is not None:
        print(Recipe.path(options.name).read_text(encoding="utf-8"), end="")
        return 0
    for name in Recipe.names():
        print(f"{name:<26} {_aim_and_title(Recipe.path(name))}")
    return 0


def _aim_and_title(path: Path) -> str:
    text = path.read_text(encoding="utf-8")
    aim = _AIM.search(text)
    return f"{aim[1] if aim else '-':>8}  {text.splitlines()[0].lstrip('# ')}"
