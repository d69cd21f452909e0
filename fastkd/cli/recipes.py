"""``fastkd recipes``: what ships, by name, and the text of one."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from fastkd.training.recipe import Recipe


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
        print(f"{name:<26} {_title(Recipe.path(name))}")
    return 0


def _title(path: Path) -> str:
    return path.read_text(encoding="utf-8").splitlines()[0].lstrip("# ")
