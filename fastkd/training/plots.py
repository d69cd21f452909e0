"""Plot a run's losses, top-1, learning rate and throughput from the files in its folder."""

from __future__ import annotations

import importlib.metadata
import math
import textwrap
from collections.abc import Callable, Sequence
from itertools import cycle, dropwhile, takewhile
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastkd.config import Recipe
from fastkd.training.logging import LOG, PLOT, whole_records
from fastkd.utils.io import replacing

if TYPE_CHECKING:  # matplotlib is optional, and slow to import
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colors, which color-blind readers tell apart.
_TERMS = ("#000000", "#0072B2", "#E69F00", "#009E73", "#56B4E9")
_RAW, _EMA, _GRAY = "#D55E00", "#CC79A7", "#777777"

_MOST_MARKERS = 50  # points on a line, above which markers run into each other
_MANY_EPOCHS = 100  # enough for a curve, and smoother than intervals
_LOG_RATIO = 20  # largest to smallest loss, above which the axis is logarithmic

Records = Sequence[dict[str, Any]]


def plot_run(folder: Path, message: Callable[[str], None]) -> Path | None:
    """Write results.png from the files in a run's folder; a failure is a message."""
    try:
        figure = draw_run(folder)
        with replacing(folder / PLOT) as file:
            figure.savefig(file, format="png", dpi=150)
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        if isinstance(error, ModuleNotFoundError) and str(error.name).startswith("matplotlib"):
            reason = "pip install matplotlib"
        message(f"{PLOT} not drawn: {reason}")
        return None
    return folder / PLOT


def draw_run(folder: Path) -> Figure:
    from matplotlib.figure import Figure  # not pyplot, whose state and backend are the caller's

    recipe = Recipe.load(folder / "recipe.yaml")
    records = whole_records(folder / LOG)
    intervals, epochs, skipped = (
        [record for record in records if record.get("kind") == kind]
        for kind in ("interval", "epoch", "skipped")
    )
    steps = _steps(intervals, epochs)
    if not steps:
        raise ValueError(f"{LOG} has no interval and no epoch yet")
    # The logger writes the total, the other terms and the gradient norm next to each other.
    names = dropwhile(lambda name: name != "loss", steps[0])
    terms = list(takewhile(lambda name: name != "grad_norm", names))
    # Terms are evaluated only where the loss, and not top-1, picks the best epoch.
    by_loss = any(f"eval_{terms[-1]}" in record for record in epochs)
    best_by = "eval_loss" if by_loss else {"raw": "top1", "ema": "ema_top1"}[recipe.best]

    figure = Figure(figsize=(10, 7), layout="constrained")
    heading = _heading(recipe, folder.resolve().name, terms)
    figure.suptitle(heading, fontsize="medium", parse_math=False)
    (losses, top1), (rate, speed) = figure.subplots(2, 2)
    _draw_losses(losses, steps, terms)
    _draw_eval_losses(losses, epochs, "total" if by_loss else "ce")
    if skipped:
        losses.plot(
            [record["update"] for record in skipped], [0.02] * len(skipped), color=_GRAY,
            marker="x", markersize=5, linestyle="", label=f"skipped ({len(skipped)})",
            transform=losses.get_xaxis_transform(),
        )  # fmt: skip
    _draw_top1(top1, epochs, best_by)
    _line(rate, sorted([*intervals, *epochs], key=itemgetter("update")), "lr", _TERMS[1])
    rate.set_ylabel("learning rate")
    rate.ticklabel_format(axis="y", scilimits=(-2, 3))
    _draw_throughput(speed, steps)
    last = max(record["update"] for record in [*intervals, *epochs])
    for axes in (losses, rate, speed):
        axes.set_xlim(0, 1.02 * last)
        axes.set_xlabel("update")
        axes.xaxis.set_major_formatter("{x:,.0f}")
    for axes in (losses, top1, rate, speed):
        axes.locator_params(axis="x", nbins=5, integer=True)
        axes.grid(axis="y", color="#dddddd", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(
                loc="lower center", bbox_to_anchor=(0.5, 1), frameon=False, fontsize="small",
                ncols=4, columnspacing=1.2, handlelength=1.6,
            )  # fmt: skip
    return figure


def _steps(intervals: Records, epochs: Records) -> Records:
    """Choose the records for losses and throughput: intervals, or epochs where they are many."""
    if len(intervals) <= len(epochs) or len(epochs) >= _MANY_EPOCHS:
        return epochs
    # A run that goes on in a new folder left its early intervals in the old one.
    return [e for e in epochs if e["update"] < intervals[0]["update"]] + list(intervals)


def _heading(recipe: Recipe, run: str, terms: Sequence[str]) -> str:
    student = recipe.model or "student"
    if recipe.variant != "plain":
        student += f" ({recipe.variant}, width {recipe.width})"
    how = f"distilled from {recipe.teacher}" if recipe.teacher else "trained without a teacher"
    weights = {"ce": recipe.cross_entropy_weight, "feature": recipe.feature_weight}
    total = " + ".join(f"{weights.get(name, recipe.alpha):g} {name}" for name in terms[1:])
    distance = f" ({recipe.feature_loss})" if "feature" in terms else ""
    version = importlib.metadata.version("fastkd")
    lines = f"{student} {how}", f"run {run}, fastkd {version}, total = {total}{distance}"
    return "\n".join(textwrap.fill(line, width=110) for line in lines)


def _line(
    axes: Axes, records: Records, name: str, color: str, label: str = "", *, x: str = "update",
    marker: str = "o", linestyle: str = "-", linewidth: float = 1.5,
) -> None:  # fmt: skip
    """Plot the records that have a value; those not finite are counted and leave a gap."""
    points = [(record[x], record[name]) for record in records if name in record]
    values = [value if math.isfinite(value) else math.nan for _, value in points]
    broken = sum(map(math.isnan, values))
    crowded = len(points) > _MOST_MARKERS
    if points:
        axes.plot(
            [place for place, _ in points],
            values,
            color=color,
            label=f"{label} ({broken} not finite)" if broken else label,
            linestyle=linestyle,
            linewidth=linewidth,
            zorder=2 if linestyle else 1 if crowded else 3,  # many points would hide the lines
            marker="" if crowded and linestyle else marker,
            markersize=2 if crowded else 4,
        )


def _draw_losses(axes: Axes, steps: Records, terms: Sequence[str]) -> None:
    # Where every update was skipped, the logger's mean over none of them is 0.
    applied = [r for r in steps if not r.get("skipped_updates") or r["grad_norm"] != 0]
    for name, color in zip(terms, cycle(_TERMS), strict=False):
        # The total is wide: it is seen behind a term that is all of it.
        total = name == "loss"
        _line(axes, applied, name, color, "total" if total else name, linewidth=3 if total else 1.5)


def _draw_eval_losses(axes: Axes, epochs: Records, measure: str) -> None:
    """Draw points over the training losses, and choose the scale for all of them."""
    _line(axes, epochs, "eval_loss", _RAW, f"eval {measure}", linestyle="")
    _line(axes, epochs, "ema_loss", _EMA, "eval ce, EMA", linestyle="", marker="s")
    low, high = axes.dataLim.intervaly  # of what is finite
    if high > _LOG_RATIO * low > 0:
        axes.set_yscale("log")
    axes.set_ylabel("loss")


def _draw_top1(axes: Axes, epochs: Records, best_by: str) -> None:
    """Top-1, or the evaluation loss of data without labels; the epoch in best.pth is marked."""
    if any("top1" in record for record in epochs):
        axes.set_ylabel("top-1 (%)")
        _line(axes, epochs, "top1", _RAW, "raw weights", x="epoch")
        _line(axes, epochs, "ema_top1", _EMA, "EMA weights", x="epoch", marker="s", linestyle="--")
    else:
        axes.set_ylabel("evaluation objective")
        _line(axes, epochs, "eval_loss", _RAW, "raw weights", x="epoch")
    finite = [record for record in epochs if math.isfinite(record.get(best_by, math.nan))]
    if finite:  # the earliest of equals
        best = (min if best_by == "eval_loss" else max)(finite, key=itemgetter(best_by))
        unit = "" if best_by == "eval_loss" else " %"
        text = f"best: epoch {best['epoch']:g}, {best[best_by]:.4g}{unit}"
        axes.axvline(best["epoch"], color=_GRAY, linestyle=":", label=text)
    axes.set_xlabel("epoch")
    if epochs:
        axes.set_xlim(epochs[0]["epoch"] - 0.5, epochs[-1]["epoch"] + 0.5)


def _draw_throughput(axes: Axes, steps: Records) -> None:
    _line(axes, steps, "images_per_second", _TERMS[1])
    axes.set_ylabel("throughput (images/s)", color=_TERMS[1])
    axes.set_ylim(bottom=0)
    memory = max((record.get("gpu_memory", 0) for record in steps), default=0)
    if memory:
        axes.set_title(f"peak GPU memory {memory:.1f} GiB", fontsize="medium")
    wait = axes.twinx()
    _line(wait, steps, "data_wait", _TERMS[2], linestyle="--")
    wait.set_ylabel("data wait (% of the time)", color=_TERMS[2])
    wait.set_ylim(0, 100)
    wait.spines["top"].set_visible(False)
