"""Draws results as figures: time and peak memory of every provider, a panel a case.

python bench/plot.py bench/results/*.json --output bench/results
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

OURS, THEIRS = "#c8553d", "#8a9ba8"


def draw(record: dict[str, Any], path: Path) -> None:
    """One figure for one results file."""
    cases = list(dict.fromkeys(row["case"] for row in record["rows"]))
    figure = Figure(figsize=(11, 0.4 + 1.35 * len(cases)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(cases), 2, squeeze=False)
    for case, (left, right) in zip(cases, axes, strict=True):
        rows = [row for row in record["rows"] if row["case"] == case][::-1]
        _bars(left, rows, "milliseconds", "ms")
        _bars(right, rows, "peak_megabytes", "MB")
        right.set_yticklabels([])
        left.set_title(case, loc="left", fontsize=9)
    axes[-1][0].set_xlabel("forward + backward, median time (ms)")
    axes[-1][1].set_xlabel("peak extra memory (MB)")
    versions = record["versions"]
    figure.suptitle(
        f"{record['benchmark']}: {record['machine']}, torch {versions['torch']}, "
        f"fastkd {versions['fastkd']}",
        fontsize=10,
    )
    figure.savefig(path, dpi=110)
    print(f"wrote {path}")


def _bars(axis: Any, rows: list[dict[str, Any]], key: str, unit: str) -> None:
    values = [row[key] for row in rows]
    names = [row["provider"] for row in rows]
    colors = [OURS if name.startswith("fastkd") else THEIRS for name in names]
    bars = axis.barh(names, values, color=colors)
    axis.bar_label(bars, [f" {value:.1f} {unit}" for value in values], fontsize=8)
    axis.set_xlim(0, max(values) * 1.2 or 1)
    axis.tick_params(labelsize=8)
    axis.spines[["top", "right"]].set_visible(False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", nargs="+", type=Path, help="JSON files of benchmarks")
    parser.add_argument("--output", type=Path, required=True, help="folder for the figures")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    for path in options.results:
        draw(json.loads(path.read_text()), options.output / f"{path.stem}.png")


if __name__ == "__main__":
    main()
