"""``fastkd demo``: the paper's comparison of students on digits, in minutes on a CPU."""

from __future__ import annotations

import argparse
import importlib
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fastkd.demo.experiment import Settings

# What `pip install "fastkd[demo]"` installs, by the name that it is imported by.
_EXTRAS = {"sklearn": "scikit-learn", "matplotlib": "matplotlib"}


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``fastkd demo``."""
    parser.usage = "fastkd demo [--quick] [options]"
    parser.description = (
        "Distill a small ViT into smaller ones on scikit-learn's digits, and compare plain, Lift "
        "and WideLast students. Finished runs are kept: the same command continues, or prints the "
        "results again."
    )
    parser.epilog = """examples:
  fastkd demo --quick
  fastkd demo --seeds 8 --output digits"""
    parser.add_argument("--quick", action="store_true", help="one seed, short runs: under a minute")
    parser.add_argument("--seeds", type=_positive, metavar="N", help="runs of every student")
    parser.add_argument(
        "--output", metavar="DIR", help="folder (default: fastkd-demo, or fastkd-demo-quick)"
    )
    parser.add_argument("--device", help="cpu (default) or cuda, which is not faster at this size")
    parser.set_defaults(run=_run)


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1, got {value}")
    return value


def _run(options: argparse.Namespace) -> int:
    require_extras()
    from fastkd.demo.experiment import FULL, QUICK

    settings = QUICK if options.quick else FULL
    settings = replace(settings, device=options.device or settings.device)
    output = options.output or ("fastkd-demo-quick" if options.quick else "fastkd-demo")
    run_demo(settings, options.seeds or settings.default_seeds, Path(output))
    return 0


def run_demo(settings: Settings, seeds: int, output: Path) -> None:
    """Train, measure, plot and report; finished runs in ``output`` are kept as they are."""
    from fastkd.demo import report
    from fastkd.demo.experiment import run_experiment
    from fastkd.utils.progress import Progress

    started = time.monotonic()
    with Progress(unit="run", lines=False) as progress:
        try:
            findings = run_experiment(settings, seeds, output, progress)
        except (KeyboardInterrupt, SystemExit):
            progress.write("stopped; the same command continues from here")
            raise
    report.save_accuracy(findings, output / report.ACCURACY)
    report.save_ranks(findings, output / report.RANKS)
    report.save(findings, output / report.RESULTS)
    print(report.text(findings, output, time.monotonic() - started))


def require_extras() -> None:
    """Raise ImportError if a package of the ``demo`` extra is missing."""
    missing = []
    for module, name in _EXTRAS.items():
        try:
            importlib.import_module(module)
        except ImportError:
            missing.append(name)
    if missing:
        raise ImportError(f'{" and ".join(missing)} not found: pip install "fastkd[demo]"')
