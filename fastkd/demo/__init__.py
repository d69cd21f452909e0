"""``fastkd demo``: the paper's comparison on digits, in minutes on a CPU."""

from __future__ import annotations

import argparse
import importlib
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from fastkd.demo.experiment import Settings

# What `pip install "fastkd[demo]"` brings, by the name it is imported under.
_EXTRAS = {"sklearn": "scikit-learn", "matplotlib": "matplotlib"}


def main(argv: Sequence[str]) -> int:
    """Run the demo, or continue it."""
    options = _parse(argv)
    require_extras()
    from fastkd.demo.experiment import FULL, QUICK

    settings = QUICK if options.quick else FULL
    settings = replace(settings, device=options.device or settings.device)
    seeds = options.seeds or settings.default_seeds
    output = options.output or Path("fastkd-demo-quick" if options.quick else "fastkd-demo")
    run_demo(settings, seeds, output)
    return 0


def run_demo(settings: Settings, seeds: int, output: Path) -> None:
    """Train, measure, plot and report; finished runs in ``output`` are kept as they are."""
    from fastkd.demo import plots, report
    from fastkd.demo.experiment import run_experiment
    from fastkd.utils.progress import Progress

    started = time.monotonic()
    with Progress(unit="run", lines=False) as progress:
        try:
            findings = run_experiment(settings, seeds, output, progress)
        except (KeyboardInterrupt, SystemExit):
            progress.write("stopped; the same command continues from here")
            raise
    plots.save_accuracy(findings, output / report.ACCURACY)
    plots.save_ranks(findings, output / report.RANKS)
    report.save(findings, output / report.RESULTS)
    print(report.text(findings, output, time.monotonic() - started))


def require_extras() -> None:
    """Raise ImportError if a package of the ``demo`` extra is missing."""
    missing = [name for module, name in _EXTRAS.items() if not _imports(module)]
    if missing:
        raise ImportError(f'{" and ".join(missing)} not found: pip install "fastkd[demo]"')


def _imports(module: str) -> bool:
    try:
        importlib.import_module(module)
    except ImportError:
        return False
    return True


class _Parser(argparse.ArgumentParser):
    """Errors in one line, as in the rest of the command line."""

    def error(self, message: str) -> NoReturn:
        """Print the message and leave with status 2."""
        self.exit(2, f"{self.prog}: error: {message}\n")


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = _Parser(
        "fastkd demo",
        allow_abbrev=False,
        description="Distil a small ViT into smaller ones on scikit-learn's digits and compare "
        "plain, Lift and WideLast students. Run it again to continue or to look once more.",
    )
    parser.add_argument("--quick", action="store_true", help="one seed, short runs: under a minute")
    parser.add_argument("--seeds", type=_positive, help="runs of every student")
    parser.add_argument(
        "--output", type=_folder, help="folder (default: fastkd-demo, or fastkd-demo-quick)"
    )
    parser.add_argument("--device", help="cpu (default) or cuda, which gains nothing at this size")
    return parser.parse_args(list(argv))


def _folder(text: str) -> Path:
    if not text.strip():
        raise argparse.ArgumentTypeError("must not be empty")
    return Path(text)


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1, got {value}")
    return value
