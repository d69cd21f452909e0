"""The ``fastkd`` command: flags become arguments of public functions, errors become one line."""

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

# In the order of ``fastkd --help``: the function that adds a command's options, and what it does.
# The module is imported for the chosen command only, so that ``fastkd --help`` loads no torch.
COMMANDS = {
    "train": ("cli.train:configure", "train a student, with or without a teacher"),
    "evaluate": ("cli.inference:configure_evaluate", "measure the accuracy of a model"),
    "predict": ("cli.inference:configure_predict", "classify images"),
    "analyze": ("cli.analyze:configure", "measure rank, frequency and rotation of features"),
    "export": ("cli.export:configure", "write a student as a timm folder, safetensors or ONNX"),
    "shard": ("cli.shard:configure", "write an image folder as WebDataset shards"),
    "bench-step": ("cli.bench_step:configure", "time the parts of a training step"),
    "recipes": ("cli.info:configure_recipes", "list recipes with published top-1, or show one"),
    "losses": ("cli.info:configure_losses", "list losses and projectors, or explain one"),
    "env": ("cli.info:configure_env", "print versions, GPUs and usable backends"),
    "completion": ("cli.info:configure_completion", "print a script for a shell's completion"),
    "demo": ("demo:configure", "distill digits on this machine, in minutes"),
}

# Errors whose text is enough; others are shown with their type, and a hint for a bug report.
SELF_EXPLAINED = (ValueError, OSError, RuntimeError, ImportError)
# Of wrong arguments; timm's models raise AssertionError for an image of another size.
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
        # As argparse: 2 for wrong arguments. 1 is for anything else.
        return 2 if isinstance(error, USER_ERRORS) else 1


def _reader_left() -> bool:
    """Flush the output, and return whether its reader has closed the pipe, as ``head`` does."""
    if sys.stdout is None:  # closed from the start
        return False
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        # Python would flush the buffer again at the exit, and print an error.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return True
    pipe = select.poll()
    with contextlib.suppress(OSError, TypeError, ValueError):  # no file, as in a notebook
        pipe.register(sys.stdout, select.POLLERR)
    return bool(pipe.poll(0))  # an unbuffered stdout had nothing to flush


def print_once(text: str, file: Any = None) -> None:
    """Print on the main process only."""
    from fastkd.utils.distributed import is_main_process  # imports torch

    if is_main_process():
        print(printable(text, lines=True), file=file)


def _run(command: str, arguments: list[str]) -> int:
    parser, commands = parsers([command])
    if not arguments:
        parser.print_help()
        return 0
    if not command and not arguments[0].startswith("-"):
        hint = suggestion(arguments[0], commands) or f" (choose from {', '.join(commands)})"
        parser.error(f"invalid choice: {arguments[0]!r}{hint}")
    options, unknown = parser.parse_known_args(arguments)
    if unknown:
        commands[command].refuse(unknown[0])
    commands[command].refuse_blanks(vars(options))
    return options.run(options) or 0


def _one_line(error: Exception) -> str:
    text = str(error).strip()
    if "Original Traceback" in text:  # a dataloader's worker sends the traceback along
        text = text.splitlines()[-1]
    text = " ".join(text.split())
    if text and isinstance(error, SELF_EXPLAINED):
        return text
    named = ": ".join(filter(None, (type(error).__name__, text)))
    return f"{named} (FASTKD_DEBUG=1 shows where)"


class _Help(argparse.HelpFormatter):
    """Keep the lines of the examples, which end a help text; wrap everything else."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        if text.startswith("examples:"):
            return text
        return super()._fill_text(text, width, indent)


class Parser(argparse.ArgumentParser):
    """Print errors in one line, like every other error of the command line."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        # An abbreviation would stop working with the next flag of the same beginning.
        self.formatter_class, self.allow_abbrev = _Help, False
        # Values, not flags: --pairs -1:-1, --mean -0.5,0.5, --layers -2,-1.
        self._negative_number_matcher = re.compile(r"-\.?\d")

    def error(self, message: str) -> NoReturn:
        """Print the message and leave with status 2."""
        if message.endswith("expected one argument"):
            message += " (a value that begins with - is written --flag=VALUE)"
        self.exit(2, f"{self.prog}: error: {printable(message)}\n")

    def refuse(self, argument: str) -> NoReturn:
        """Leave because of an unknown argument."""
        hint = suggestion(argument.split("=")[0], self._option_string_actions)
        self.error(f"unknown argument {argument}{hint}")

    def refuse_blanks(self, options: dict[str, Any]) -> None:
        """Leave because of an empty value: as a path it would be the current folder."""
        for name, value in options.items():
            for item in value if isinstance(value, list) else [value]:
                if isinstance(item, str) and not item.strip():
                    self.error(f"{name.replace('_', '-')} must not be empty, got {item!r}")


def parsers(chosen: Iterable[str] = COMMANDS) -> tuple[Parser, dict[str, Parser]]:
    """Return the main parser, and those of the commands by name; the chosen ones have options."""
    parser = Parser(
        "fastkd",
        usage="fastkd COMMAND [options]",
        description="Feature distillation of Vision Transformers.",
        epilog="examples:\n"
        "  fastkd demo --quick\n"
        "  fastkd train --recipe lift_softkd_spectral --data imagenet --output runs/lift\n"
        "  fastkd train --help",
    )
    parser.add_argument("--version", action="version", version=f"fastkd {_version()}")
    commands = parser.add_subparsers(
        title="commands", dest="command", required=True, metavar="COMMAND [...]", prog="fastkd"
    )
    for name, (home, text) in COMMANDS.items():
        sentence = f"{text[0].upper()}{text[1:]}."
        command = commands.add_parser(name, help=text, description=sentence)
        if name in chosen:
            module, _, function = home.partition(":")
            getattr(importlib.import_module(f"fastkd.{module}"), function)(command)
    return parser, commands.choices


def _version() -> str:
    try:
        return metadata.version("fastkd")
    except metadata.PackageNotFoundError:
        return "(not installed)"
