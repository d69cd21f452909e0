"""The command line: flags become arguments of the public functions, their errors one line each."""

from __future__ import annotations

import argparse
import difflib
import importlib
import os
import sys
from collections.abc import Iterable, Sequence
from importlib import metadata
from typing import Any, NoReturn

# By name, in the order of ``fastkd --help``: what adds its options, imported for that
# command alone, and what it does.
COMMANDS = {
    "train": ("train:configure", "train a student, by a teacher or without one"),
    "evaluate": (
        "evaluate:configure",
        "measure the accuracy of a timm model, a checkpoint or a run",
    ),
    "predict": (
        "predict:configure",
        "say what images show, with a run, a checkpoint or a timm model",
    ),
    "analyze": (
        "analyze:configure",
        "measure what the features of models look like: ranks, SEP, rotation",
    ),
    "export": ("export:configure", "write the student of a run for timm, safetensors or ONNX"),
    "recipes": ("info:configure_recipes", "list the shipped recipes, or show one"),
    "losses": ("info:configure_losses", "list losses and projectors, or explain one"),
    "shard": (
        "shard:configure",
        "write a folder of images as WebDataset shards, smaller and in few files",
    ),
    "bench-step": (
        "bench_step:configure",
        "time loader, teacher, student and optimizer of a training step",
    ),
    "env": ("info:configure_env", "print what a bug report needs"),
    "demo": ("", "distil digits on this machine, in minutes"),
}

# AssertionError: how timm's models refuse an image of another size.
USER_ERRORS = (
    *(ValueError, TypeError, OSError, RuntimeError, ArithmeticError, ImportError),
    AssertionError,
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ["demo"]:
        return _guarded("demo", _demo, arguments[1:])
    parser, commands = _parsers(arguments[0] if arguments else "")
    _check_command(parser, commands, arguments)
    options, unknown = parser.parse_known_args(arguments)
    if unknown:
        commands[options.command].refuse(unknown[0])
    return _guarded(options.command, options.run, options)


def print_once(text: str) -> None:
    """Print on the main process of torchrun alone."""
    if os.environ.get("RANK", "0") == "0":
        print(text)


def _demo(arguments: Sequence[str]) -> int:
    """Run the demo, which has a parser of its own for everything after its name."""
    from fastkd.demo import main

    return main(arguments)


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
        if message.endswith("expected one argument"):
            message += " (a value that begins with - is written --flag=VALUE)"
        self.exit(2, f"{self.prog}: error: {message}\n")

    def refuse(self, argument: str) -> NoReturn:
        """Leave because of an argument that is none of this parser's."""
        hint = _hint(argument.split("=")[0], self._option_string_actions)
        self.error(f"unknown argument {argument}{hint}")


def _parsers(chosen: str) -> tuple[_Parser, dict[str, _Parser]]:
    """The parser, and those of the commands by name; only the chosen one has its options."""
    parser = _Parser(
        "fastkd", allow_abbrev=False, description="Feature distillation of Vision Transformers."
    )
    parser.add_argument("--version", action="version", version=f"fastkd {_version()}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    for name, (home, text) in COMMANDS.items():
        command = commands.add_parser(name, allow_abbrev=False, help=text)
        if name == chosen:
            module, _, function = home.partition(":")
            getattr(importlib.import_module(f"fastkd.cli.{module}"), function)(command)
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
