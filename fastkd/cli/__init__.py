"""The command line: flags become arguments of the public functions, their errors become one line.

Parses and prints, nothing else; each command is a module with `add`. Whatever imports torch is
imported inside a command's function, so that ``fastkd --help`` answers at once.
"""

from __future__ import annotations

import argparse
import difflib
import os
import sys
from collections.abc import Iterable, Sequence
from importlib import metadata
from typing import Any, NoReturn

from fastkd.cli import (
    analyze,
    bench_step,
    demo,
    evaluate,
    export,
    info,
    losses,
    predict,
    recipes,
    shard,
    train,
)

# In the order of ``fastkd --help``.
COMMANDS = (
    train,
    evaluate,
    predict,
    analyze,
    export,
    recipes,
    losses,
    shard,
    bench_step,
    info,
    demo,
)

# AssertionError: how timm's models refuse an image of another size.
USER_ERRORS = (
    *(ValueError, TypeError, OSError, RuntimeError, ArithmeticError, ImportError),
    AssertionError,
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: arguments; None takes the process'.

    Returns:
        The exit status: 0, 2 for a user's error, 130 for an interrupt.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ["demo"]:
        # The demo has a parser of its own, and every argument after its name is the demo's.
        return _guarded("demo", demo.run, arguments[1:])
    parser, commands = _parsers()
    _check_command(parser, commands, arguments)
    options, unknown = parser.parse_known_args(arguments)
    if unknown:
        commands[options.command].refuse(unknown[0])
    return _guarded(options.command, options.run, options)


def _guarded(command: str, run: Any, argument: Any) -> int:
    try:
        return run(argument) or 0
    except KeyboardInterrupt:
        print(f"fastkd {command}: interrupted", file=sys.stderr)
        return 130
    except USER_ERRORS as error:
        if os.environ.get("FASTKD_DEBUG") == "1":
            raise
        text = _one_line(error).removeprefix(f"{command}: ")
        print(f"fastkd {command}: error: {text}", file=sys.stderr)
        return 2


def _one_line(error: Exception) -> str:
    text = str(error).strip()
    if "Original Traceback" in text:  # a loader's worker sends the traceback along
        text = text.splitlines()[-1]
    return " ".join(text.split()) or type(error).__name__


class _Parser(argparse.ArgumentParser):
    """Errors in one line, like every other error of the command line."""

    def error(self, message: str) -> NoReturn:
        """Print the message and leave with status 2."""
        self.exit(2, f"{self.prog}: error: {message}\n")

    def refuse(self, argument: str) -> NoReturn:
        """Leave because of an argument that is none of this parser's."""
        hint = _hint(argument.split("=")[0], self._option_string_actions)
        self.error(f"unknown argument {argument}{hint}")


def _parsers() -> tuple[_Parser, dict[str, _Parser]]:
    """The parser, and those of the commands by name."""
    parser = _Parser(
        "fastkd", allow_abbrev=False, description="Feature distillation of Vision Transformers."
    )
    parser.add_argument("--version", action="version", version=f"fastkd {_version()}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    for command in COMMANDS:
        command.add(commands)
    return parser, commands.choices


def _check_command(parser: _Parser, commands: Iterable[str], arguments: list[str]) -> None:
    command = arguments[0] if arguments else "-"
    if not command.startswith("-") and command not in commands:
        hint = _hint(command, commands) or f" (choose from {', '.join(commands)})"
        parser.error(f"invalid choice: {command!r}{hint}")


def _hint(given: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(given, list(known), n=1)
    return f" (did you mean {close[0]}?)" if close else ""


def _version() -> str:
    try:
        return metadata.version("fastkd")
    except metadata.PackageNotFoundError:
        return "(not installed)"
