"""The command line: flags become arguments of the public functions, their errors one line each."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import re
import select
import sys
from collections.abc import Iterable, Sequence
from importlib import metadata
from typing import Any, NoReturn

from fastkd.utils.hints import suggestion
from fastkd.utils.io import printable

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

# Errors whose text says it all; others are shown with their type, and a hint for a bug report.
SELF_EXPLAINED = (ValueError, OSError, RuntimeError, ImportError)
# Of wrong arguments; AssertionError is how timm's models refuse an image of another size.
USER_ERRORS = (*SELF_EXPLAINED, TypeError, ArithmeticError, AssertionError)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    command = arguments[0] if arguments and arguments[0] in COMMANDS else ""
    left = False
    try:
        try:
            return _run(command, arguments)
        finally:
            left = _reader_left()
    except KeyboardInterrupt:
        print(f"fastkd {command}: interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        if left and isinstance(error, BrokenPipeError):
            return 0
        if os.environ.get("FASTKD_DEBUG") == "1":
            raise
        named = " ".join(["fastkd", command]).strip()
        text = printable(_one_line(error).removeprefix(f"{command}: "))
        print(f"{named}: error: {text}", file=sys.stderr)
        return 2 if isinstance(error, USER_ERRORS) else 1


def _reader_left() -> bool:
    """Flush the output; whether who reads it has read enough, as ``head`` does."""
    if sys.stdout is None:  # closed from the start
        return False
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        # What is left in the buffer would be tried again, and complained about, at the exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return True
    pipe = select.poll()
    with contextlib.suppress(OSError, TypeError, ValueError):  # no file, as in a notebook
        pipe.register(sys.stdout, select.POLLERR)
    return bool(pipe.poll(0))  # without a buffer there was nothing to flush


def print_once(text: str) -> None:
    """Print on the main process of torchrun alone."""
    from fastkd.utils.distributed import is_main_process  # imports torch

    if is_main_process():
        print(printable(text, lines=True))


def _run(command: str, arguments: list[str]) -> int:
    if command == "demo":  # which has a parser of its own for everything after its name
        from fastkd.demo import main

        return main(arguments[1:])
    parser, commands = _parsers(command)
    _check_command(parser, commands, arguments)
    options, unknown = parser.parse_known_args(arguments)
    if unknown:
        commands[command].refuse(unknown[0])
    commands[command].refuse_blanks(vars(options))
    return options.run(options) or 0


def _one_line(error: Exception) -> str:
    text = str(error).strip()
    if "Original Traceback" in text:  # a loader's worker sends the traceback along
        text = text.splitlines()[-1]
    text = " ".join(text.split())
    if text and isinstance(error, SELF_EXPLAINED):
        return text
    named = ": ".join(filter(None, (type(error).__name__, text)))
    return f"{named} (FASTKD_DEBUG=1 shows where)"


class _Parser(argparse.ArgumentParser):
    """Errors in one line, like every other error of the command line."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        # What is taken for a value, not for a flag: --pairs -1:-1, --mean -0.5,0.5, --layers -2,-1.
        self._negative_number_matcher = re.compile(r"-\.?\d")

    def error(self, message: str) -> NoReturn:
        """Print the message and leave with status 2."""
        if message.endswith("expected one argument"):
            message += " (a value that begins with - is written --flag=VALUE)"
        self.exit(2, f"{self.prog}: error: {printable(message)}\n")

    def refuse(self, argument: str) -> NoReturn:
        """Leave because of an argument that is none of this parser's."""
        hint = suggestion(argument.split("=")[0], self._option_string_actions)
        self.error(f"unknown argument {argument}{hint}")

    def refuse_blanks(self, options: dict[str, Any]) -> None:
        """Leave because of an empty value: as a path it would be the current folder."""
        for name, value in options.items():
            for item in value if isinstance(value, list) else [value]:
                if isinstance(item, str) and not item.strip():
                    self.error(f"{name.replace('_', '-')} must not be empty, got {item!r}")


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
        hint = suggestion(command, commands) or f" (choose from {', '.join(commands)})"
        parser.error(f"invalid choice: {command!r}{hint}")


def _version() -> str:
    try:
        return metadata.version("fastkd")
    except metadata.PackageNotFoundError:
        return "(not installed)"
