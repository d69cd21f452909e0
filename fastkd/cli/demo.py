"""``fastkd demo``: handed on whole, because the demo parses its own arguments."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def add(commands: Any) -> None:
    """Add ``fastkd demo`` to the list of commands; `run` gets what follows it."""
    commands.add_parser("demo", help="distil digits on this machine, in minutes", add_help=False)


def run(arguments: Sequence[str]) -> int:
    """Run the demo.

    Args:
        arguments: those after ``fastkd demo``.

    Returns:
        The exit status.
    """
    from fastkd.demo import main

    return main(arguments)
