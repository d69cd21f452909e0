"""``fastkd analyze``: ranks, patterns and rotation of features, and their report."""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path
from typing import Any

from fastkd.cli import print_once
from fastkd.cli.evaluate import add_verify_option


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``fastkd analyze``."""
    parser.usage = "fastkd analyze MODEL [MODEL ...] --data PATH [--output DIR] [options]"
    parser.description = (
        "Measure the features of one or more models on images: per-image rank, "
        "data-set rank, rotation and frequency pattern (SEP) of every layer, in one streamed run. "
        "Under torchrun the images are shared."
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
        "--data", help="image folder, timm data set name, or folder of saved tokens (.npy, .npz)"
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
    add_verify_option(models)
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
    parser.set_defaults(run=_run)


def _numbers(kind: Any) -> Any:
    def parse(text: str) -> tuple[Any, ...]:
        return tuple(kind(part) for part in text.split(","))

    parse.__name__ = f"{kind.__name__}s with commas between"  # argparse names it in its error
    return parse


def _count_or_all(text: str) -> int | None:
    return None if text == "all" else int(text)


def _run(options: argparse.Namespace) -> int:
    from fastkd.analysis import LEVELS, analyze
    from fastkd.analysis.accumulators.shared_basis import SUBSPACES

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
    print_once(report.summary())
    if options.output is not None:
        print_once(f"report: {Path(options.output) / 'report.md'}")
    return 0
