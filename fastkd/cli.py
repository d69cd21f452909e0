"""The command line: flags become arguments of the public functions, their errors become one line.

Parses and prints, nothing else. Whatever imports torch is imported inside a command, so that
``fastkd --help`` answers at once.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import os
import shlex
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NoReturn

from fastkd.training.recipe import Recipe, fields_by_group, parse_value

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
        return _guarded("demo", _demo, arguments[1:])
    parser = _parser()
    options, unknown = parser.parse_known_args(arguments)
    if unknown:
        _refuse(options.command, unknown[0])
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


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        "fastkd", allow_abbrev=False, description="Feature distillation of Vision Transformers."
    )
    parser.add_argument("--version", action="version", version=f"fastkd {_version()}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    _add_train(commands)
    _add_evaluate(commands)
    _add_analyze(commands)
    _add_recipes(commands)
    environment = commands.add_parser("env", help="print what a bug report needs")
    environment.set_defaults(run=_env)
    commands.add_parser("demo", help="distil digits on this machine, in minutes", add_help=False)
    return parser


class _Parser(argparse.ArgumentParser):
    """Errors in one line, like every other error of the command line."""

    def error(self, message: str) -> NoReturn:
        """Print the message and leave with status 2."""
        self.exit(2, f"{self.prog}: error: {message}\n")


def _refuse(command: str, argument: str) -> NoReturn:
    flags = ["--" + field.name.replace("_", "-") for field in dataclasses.fields(Recipe)]
    close = difflib.get_close_matches(argument.split("=")[0], flags, n=1)
    hint = f" (did you mean {close[0]}?)" if command == "train" and close else ""
    print(f"fastkd {command}: error: unknown argument {argument}{hint}", file=sys.stderr)
    raise SystemExit(2)


def _version() -> str:
    try:
        return metadata.version("fastkd")
    except metadata.PackageNotFoundError:
        return "(not installed)"


def _add_train(commands: Any) -> None:
    parser = commands.add_parser(
        "train",
        allow_abbrev=False,
        usage="fastkd train [--recipe NAME] --data DIR --output DIR [--teacher NAME] "
        "[--any-recipe-field VALUE ...]",
        help="train a student, by a teacher or without one",
        description="Train a student. Every field of the recipe is a flag; what is not given comes "
        "from --recipe, or from the defaults shown. Under torchrun the batch is shared.",
    )
    parser.add_argument("--recipe", help="a shipped name (see: fastkd recipes) or a YAML file")
    parser.add_argument("--output", help="the run's folder; a run in it is continued")
    parser.add_argument(
        "--resume", default="auto", help="auto, never, or a checkpoint (default: auto)"
    )
    parser.add_argument("--device", help="cpu, cuda, cuda:1 (default: cuda where there is one)")
    parser.add_argument("--quiet", action="store_true", help="show no progress")
    parser.add_argument(
        "--dry-run", action="store_true", help="print the recipe and its effective values, and stop"
    )
    for group, fields in fields_by_group().items():
        section = parser.add_argument_group(group)
        for field in fields:
            _add_field(section, field)
    parser.set_defaults(run=_train)


def _add_field(section: Any, field: dataclasses.Field[Any]) -> None:
    choices = field.metadata["choices"]
    text = field.metadata["help"] + (f" ({', '.join(choices)})" if choices else "")
    # A flag alone switches an option on; `--flag false` switches one of the recipe's off.
    bare = {"nargs": "?", "const": "true"} if isinstance(field.default, bool) else {}
    section.add_argument(
        "--" + field.name.replace("_", "-"),
        dest=field.name,
        default=argparse.SUPPRESS,
        metavar="VALUE",
        help=f"{text} [{_shown(field.default)}]".replace("%", "%%"),
        **bare,
    )


def _shown(value: Any) -> str:
    if isinstance(value, tuple):
        pairs = all(isinstance(item, tuple) for item in value)
        return ",".join(f"{item[0]}:{item[1]}" if pairs else f"{item:g}" for item in value)
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)


def _train(options: argparse.Namespace) -> int:
    from fastkd.training.options import FromRecipe
    from fastkd.training.trainer import train

    given = {
        field.name: parse_value(field.name, getattr(options, field.name))
        for field in dataclasses.fields(Recipe)
        if hasattr(options, field.name)
    }
    recipe = Recipe.load(options.recipe)
    teacher = given.pop("teacher", FromRecipe.TEACHER)
    if options.dry_run:
        return _dry_run(recipe, teacher, given)
    if options.output is None:
        raise ValueError("--output is missing: the folder that the run is kept in")
    result = train(
        None,
        teacher,
        given.pop("data", None),
        options.output,
        recipe,
        resume=options.resume,
        device=options.device,
        quiet=options.quiet,
        **given,
    )
    if _is_main_process():
        print(result.summary())
    return 0


def _is_main_process() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _dry_run(recipe: Recipe, teacher: Any, given: dict[str, Any]) -> int:
    import yaml

    from fastkd.training.setup import dry_run

    resolved, values = dry_run(recipe, teacher, given)
    print(yaml.safe_dump(resolved.to_dict(), sort_keys=False), end="")
    print()
    for heading, text in values.items():
        print(f"{heading + ':':<16} {text}")
    return 0


def _add_evaluate(commands: Any) -> None:
    parser = commands.add_parser(
        "evaluate",
        allow_abbrev=False,
        help="measure the accuracy of a timm model, a checkpoint or a run",
    )
    parser.add_argument("model", help="timm name, checkpoint, or folder of a run")
    parser.add_argument("--data", required=True, help="folder or timm data set name")
    parser.add_argument("--checkpoint", help="local weights for a timm name")
    parser.add_argument(
        "--weights",
        choices=("auto", "raw", "ema"),
        help="of a run; auto: what the run measured to be better (default: raw and EMA, each)",
    )
    parser.add_argument("--device", help="cpu, cuda, cuda:1 (default: cuda where there is one)")
    parser.add_argument("--amp", default="none", choices=("none", "bf16", "fp16"))
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--workers", type=int, default=4)
    for name in ("img_size", "crop_pct", "crop_mode", "interpolation", "mean", "std", "data_root"):
        parser.add_argument(
            "--" + name.replace("_", "-"),
            dest=name,
            default=argparse.SUPPRESS,
            metavar="VALUE",
            help=Recipe.__dataclass_fields__[name].metadata["help"],
        )
    parser.set_defaults(run=_evaluate)


def _evaluate(options: argparse.Namespace) -> int:
    from fastkd.training.evaluation import OPTIONS, evaluate

    given = {
        name: parse_value(name, getattr(options, name))
        for name in OPTIONS
        if hasattr(options, name)
    }
    for weights in _asked_weights(options):
        measured = evaluate(
            options.model,
            options.data,
            checkpoint=options.checkpoint,
            weights=weights,
            device=options.device,
            amp=options.amp,
            batch_size=options.batch_size,
            workers=options.workers,
            **given,
        )
        if _is_main_process():
            print(_accuracy_line(options.model, measured))
    return 0


def _asked_weights(options: argparse.Namespace) -> tuple[str, ...]:
    """All that a run has, unless one is asked for."""
    from fastkd.training.setup import weights_in

    if options.weights is not None:
        return (options.weights,)
    return weights_in(options.model) if Path(options.model).exists() else ("auto",)


def _accuracy_line(model: str, measured: dict[str, Any]) -> str:
    top5 = "" if measured["top5"] is None else f", top-5 {measured['top5']:.2f} %"
    return (
        f"top-1 {measured['top1']:.2f} %{top5}, cross-entropy {measured['loss']:.4f}, "
        f"{measured['count']:,} images ({model}, weights {measured['weights']})"
    )


def _add_analyze(commands: Any) -> None:
    parser = commands.add_parser(
        "analyze",
        allow_abbrev=False,
        usage="fastkd analyze MODEL [MODEL ...] --data PATH [--output DIR] [options]",
        help="measure what the features of models look like: ranks, SEP, rotation",
        description="Measure the features of one or more models on images: per-image rank, "
        "data-set rank, rotation and frequency pattern (SEP) of every layer, in one streamed run. "
        "Under torchrun the images are shared.",
    )
    parser.add_argument(
        "model",
        nargs="+",
        metavar="MODEL",
        help="timm name, checkpoint, folder of a run, or folder of a saved report; with saved "
        "tokens as data, a label",
    )
    data = parser.add_argument_group("data")
    data.add_argument(
        "--data", help="image folder, timm data set name, or folder of saved tokens (.npy)"
    )
    data.add_argument("--data-root", help="where a named data set keeps its files")
    data.add_argument(
        "--images", type=_count_or_all, default=1000, help="how many, or all (default: 1000)"
    )
    data.add_argument("--seed", type=int, default=0, help="of images and permutations (default: 0)")
    data.add_argument(
        "--max-unreadable", type=float, default=0.05, metavar="PART",
        help="part of the images that may be unreadable (default: 0.05)",
    )  # fmt: skip
    models = parser.add_argument_group("models")
    models.add_argument(
        "--compare", nargs="+", default=[], metavar="MODEL", help="more models, beside the first"
    )
    models.add_argument("--checkpoint", help="local weights for the timm name")
    models.add_argument(
        "--untrained", action="store_true", help="random weights instead of published ones"
    )
    models.add_argument(
        "--weights", choices=("auto", "raw", "ema"), default="auto", help="of a fastkd run"
    )
    models.add_argument(
        "--layers", default="all", help="all, last, or numbers and names: 0,5,final (default: all)"
    )
    models.add_argument(
        "--num-prefix",
        type=int,
        default=0,
        help="class and register tokens of layers given by module name",
    )
    models.add_argument("--img-size", type=int, help="pixels a side (default: each model's own)")
    measures = parser.add_argument_group("measurements")
    measures.add_argument(
        "--levels",
        type=_numbers(float),
        metavar="Q,Q,...",
        help="parts of the energy (default: 0.8,0.9,0.95,0.99)",
    )
    measures.add_argument(
        "--sep", choices=("full", "folded", "none"), default="full",
        help="bins of the frequency pattern (default: full, as in the paper)",
    )  # fmt: skip
    measures.add_argument(
        "--permutations",
        type=int,
        default=100,
        help="channel permutations of SEP's test (default: 100)",
    )
    measures.add_argument(
        "--subspaces",
        type=_numbers(int),
        metavar="K,K,...",
        help="sizes k of the subspaces compared (default: 1,4,16,64)",
    )
    measures.add_argument(
        "--shared", choices=("last", "all", "none"), default="last",
        help="layers seen in the data set's basis too (default: last)",
    )  # fmt: skip
    measures.add_argument(
        "--centred", action="store_true", help="subtract the mean token in the shared basis"
    )
    measures.add_argument(
        "--compare-paper", action="store_true", help="put the published numbers beside ours"
    )
    run = parser.add_argument_group("run")
    run.add_argument("--output", help="folder for report, tables, figures and arrays")
    run.add_argument("--resume", action="store_true", help="go on with an interrupted analysis")
    run.add_argument("--no-figures", action="store_true", help="draw none (no matplotlib needed)")
    run.add_argument("--device", help="cpu, cuda, cuda:1 (default: cuda where there is one)")
    run.add_argument("--amp", default="none", choices=("none", "bf16", "fp16"))
    run.add_argument("--batch-size", type=int, default=16)
    run.add_argument("--workers", type=int, help="processes that read images (default: up to 4)")
    run.add_argument(
        "--memory", type=float, default=0.5, metavar="GB",
        help="for tokens kept between the passes (default: 0.5)",
    )  # fmt: skip
    run.add_argument("--quiet", action="store_true", help="show no progress")
    parser.set_defaults(run=_analyze)


def _numbers(kind: Any) -> Any:
    def parse(text: str) -> tuple[Any, ...]:
        return tuple(kind(part) for part in text.split(","))

    parse.__name__ = f"{kind.__name__}s with commas between"  # argparse names it in its error
    return parse


def _count_or_all(text: str) -> int | None:
    return None if text == "all" else int(text)


def _analyze(options: argparse.Namespace) -> int:
    from fastkd.analysis import LEVELS, analyze
    from fastkd.analysis.shared import SUBSPACES

    given = vars(options)
    taken = ("command", "run", "model", "data", "output", "levels", "subspaces", "no_figures")
    report = analyze(
        options.model,
        options.data,
        options.output,
        levels=options.levels or LEVELS,
        subspaces=options.subspaces or SUBSPACES,
        figures=not options.no_figures,
        command=shlex.join(["fastkd", *sys.argv[1:]]),
        **{name: value for name, value in given.items() if name not in taken},
    )
    if _is_main_process():
        print(report.summary())
        if options.output is not None:
            print(f"report: {Path(options.output) / 'report.md'}")
    return 0


def _add_recipes(commands: Any) -> None:
    parser = commands.add_parser("recipes", help="list the shipped recipes, or show one")
    parser.add_argument("name", nargs="?", help="a recipe to show")
    parser.set_defaults(run=_recipes)


def _recipes(options: argparse.Namespace) -> int:
    if options.name is not None:
        print(Recipe.path(options.name).read_text(encoding="utf-8"), end="")
        return 0
    for name in Recipe.names():
        print(f"{name:<26} {_title(Recipe.path(name))}")
    return 0


def _title(path: Path) -> str:
    return path.read_text(encoding="utf-8").splitlines()[0].lstrip("# ")


def _env(_: argparse.Namespace) -> int:
    from fastkd.environment import report

    print(report())
    return 0


def _demo(argv: list[str]) -> int:
    from fastkd.demo import main as demo

    return demo(argv)
