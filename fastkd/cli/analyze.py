"""``fastkd analyze``: rank, frequency pattern and rotation of features, and their report."""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path
from typing import Any

from fastkd.cli import flags, print_once


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``fastkd analyze``."""
    parser.usage = "fastkd analyze MODEL [MODEL ...] --data DATA [--output DIR] [options]"
    parser.description = (
        "Measure the features of models on images: rank per image and over the dataset, rotation, "
        "and frequency pattern (SEP) of every layer, in one pass. Under torchrun the processes "
        "share the images."
    )
    parser.epilog = """examples:
  fastkd analyze cait_s24_224 --data imagenet --output report --compare-paper
  fastkd analyze cait_s24_224 runs/a runs/b --data imagenet --output compared
  fastkd analyze mine --data saved-tokens    # .npy files, [L, N, D] per image"""
    saved = "; also the folder of a saved report, or any label if --data has saved tokens"
    flags.add_model(parser, saved, nargs="+")
    data = "image folder, timm dataset name, or folder of saved tokens (.npy, .npz)"
    flags.text(parser, "--data", "DATA", data)
    flags.text(parser, "--output", "DIR", "folder for report, tables and figures")
    flags.text(parser, "--compare", "MODEL", "more models, after the first", nargs="+", default=[])
    images = "number of images, or all (default: 1000)"
    flags.text(parser, "--images", "N", images, type=_count_or_all, default=1000)
    layers = "all, last, or numbers and module names: 0,5,final (default: all)"
    flags.text(parser, "--layers", "LAYERS", layers, default="all")
    flags.switch(parser, "--compare-paper", "show the published numbers beside ours")
    flags.switch(parser, "--resume", "continue an interrupted analysis")
    flags.shared(parser, "--quiet")
    model = parser.add_argument_group("model")
    flags.add_weights(model)
    flags.switch(model, "--untrained", "random weights for timm names, instead of published ones")
    flags.number(model, "--img-size", None, "pixels a side (default: each model's own)")
    flags.number(model, "--num-prefix", 0, "class and register tokens of layers given by name")
    group = parser.add_argument_group("measurements")
    levels = "shares of the energy that define the ranks (default: 0.8,0.9,0.95,0.99)"
    flags.text(group, "--levels", "Q,Q,...", levels, type=_numbers(float))
    bins = "bins of the frequency pattern; the paper has full"
    flags.choice(group, "--sep", ("full", "folded", "none"), bins)
    flags.number(group, "--permutations", 100, "channel permutations in the test of SEP")
    dimensions = "dimensions of the subspaces that are compared (default: 1,4,16,64)"
    flags.text(group, "--subspaces", "K,K,...", dimensions, type=_numbers(int))
    shared = "layers measured in the basis of the dataset, too"
    flags.choice(group, "--shared", ("last", "all", "none"), shared)
    flags.switch(group, "--centered", "subtract the mean token in the shared basis")
    run = parser.add_argument_group("dataset and speed")
    flags.shared(run, "--data-root")
    flags.number(run, "--seed", 0, "seed of images and permutations")
    flags.number(run, "--max-unreadable", 0.05, "share of images that may be unreadable", "SHARE")
    flags.add_speed(run, batch_size=16)
    flags.number(run, "--memory", 0.5, "tokens kept for the second pass", "GB")
    flags.switch(run, "--no-figures", "draw none (needs no matplotlib)")
    parser.set_defaults(run=_run)


def _numbers(kind: Any) -> Any:
    def parse(text: str) -> tuple[Any, ...]:
        return tuple(kind(part) for part in text.split(","))

    parse.__name__ = f"{kind.__name__}s with commas between"  # shown in argparse's error
    return parse


def _count_or_all(text: str) -> int | None:
    return None if text == "all" else int(text)


def _run(options: argparse.Namespace) -> int:
    from fastkd.analysis import analyze

    given = {
        name: value
        for name, value in vars(options).items()
        if name not in ("command", "run", "no_figures")
        and not (name in ("levels", "subspaces") and value is None)
    }
    # Recorded in the report, so that it can be made again.
    command = shlex.join(["fastkd", *sys.argv[1:]])
    report = analyze(**given, figures=not options.no_figures, command=command)
    print_once(report.summary())
    if options.output is not None:
        print_once(f"report: {Path(options.output) / 'report.md'}")
    return 0
