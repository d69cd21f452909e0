"""The demo's two figures, drawn without pyplot, whose backend and state are the caller's."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from fastkd.demo.experiment import FeatureRanks, Findings, Scores, mean_and_spread
from fastkd.utils.io import replacing

_ALONE, _DISTILLED, _TEACHER = "#8a8f98", "#2a6f97", "#c1440e"
_OWN, _SHARED = "#2a6f97", "#e09f3e"
_RANK_LEVELS = (0.95, 0.99)


def save_accuracy(findings: Findings, path: Path) -> None:
    """Draw a dot per seed, the mean with its spread, and the teacher."""
    figure = Figure(figsize=(9, 4.6), layout="constrained")
    axes = figure.subplots()
    for row, scores in enumerate(findings.scores):
        _draw_student(axes, row, scores)
    axes.axvline(findings.teacher_top1, color=_TEACHER, linestyle="--", linewidth=1.2)
    axes.annotate(
        f"teacher {findings.teacher_top1:.1f} %",
        (findings.teacher_top1, 0),
        xycoords=("data", "axes fraction"),
        xytext=(-4, 5),
        textcoords="offset points",
        ha="right",
        color=_TEACHER,
    )
    names = [f"{s.contender.name}\n{s.parameters:,} parameters" for s in findings.scores]
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.set_xlabel(f"top-1 on {findings.held_out_images} held-out digits (%)")
    seeds = f"{findings.seeds} seed" + ("s: mean and standard deviation" * (findings.seeds > 1))
    figure.suptitle(
        f"Students trained on {findings.train_images:,} digits, with and without distillation\n"
        f"{seeds}",
        fontsize=11,
    )
    _clean(axes, grid="x")
    _save(figure, path)


def _draw_student(axes: Axes, row: int, scores: Scores) -> None:
    mean, spread = mean_and_spread(scores.top1)
    color = _ALONE if scores.contender.projector is None else _DISTILLED
    # Seeds side by side, so that equal accuracies do not hide each other.
    offsets = np.linspace(-0.12, 0.12, len(scores.top1)) if len(scores.top1) > 1 else [0.0]
    axes.scatter(scores.top1, row + np.asarray(offsets), s=28, color=color, alpha=0.6, linewidth=0)
    axes.errorbar(mean, row, xerr=spread, fmt="none", ecolor=color, elinewidth=2, capsize=5)
    axes.plot([mean, mean], [row - 0.28, row + 0.28], color=color, linewidth=3)
    axes.annotate(
        f"{mean:.1f}",
        (mean, row - 0.3),
        ha="center",
        va="bottom",
        color=color,
        fontsize=9,
        fontweight="bold",
    )


def save_ranks(findings: Findings, path: Path) -> None:
    """Draw how many dimensions the teacher's images need, each alone and all together."""
    teacher = findings.ranks[0]
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    panels = figure.subplots(1, len(_RANK_LEVELS), sharex=True, sharey=True)
    for axes, level in zip(panels, _RANK_LEVELS, strict=True):
        _draw_ranks(axes, teacher, level)
    panels[0].set_ylabel(f"images (of {findings.held_out_images})")
    panels[0].legend(frameon=False, loc="upper right", bbox_to_anchor=(0.97, 1))
    figure.suptitle(
        f"Teacher's {teacher.feature}: N = {teacher.tokens} tokens of D = {teacher.dim} channels "
        f"an image, {findings.held_out_images} held-out digits",
        fontsize=11,
    )
    _save(figure, path)


def _draw_ranks(axes: Axes, ranks: FeatureRanks, level: float) -> None:
    for own, color, label in (
        (ranks.image, _OWN, "in its own basis"),
        (ranks.dataset, _SHARED, "in the basis of all images"),
    ):
        counts = own.histogram(level)
        axes.bar(np.arange(len(counts)), counts, width=0.9, color=color, alpha=0.85, label=label)
    for limit, name, side in ((ranks.tokens, "N", "left"), (ranks.dim, "D", "right")):
        axes.axvline(limit + 0.5, color="#555555", linewidth=1, linestyle="--")
        axes.annotate(
            f"{name} = {limit}",
            (limit + 0.5, 0.62),
            xycoords=("data", "axes fraction"),
            xytext=(3 if side == "left" else -3, 0),
            textcoords="offset points",
            rotation=90,
            ha=side,
            color="#555555",
            fontsize=9,
        )
    axes.set_xlabel(f"dimensions that hold {100 * level:.0f} % of an image's energy")
    axes.set_title(
        f"median {ranks.image.distribution(level).median:.0f} of its own, "
        f"{ranks.dataset.distribution(level).median:.0f} shared",
        fontsize=10,
    )
    axes.set_xlim(0, ranks.dim + 1.5)
    _clean(axes, grid="y")


def _clean(axes: Axes, grid: Literal["x", "y"]) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis=grid, color="#dddddd", linewidth=0.8)
    axes.set_axisbelow(True)


def _save(figure: Figure, path: Path) -> None:
    image = io.BytesIO()
    FigureCanvasAgg(figure).print_png(image)
    with replacing(path) as file:
        file.write(image.getvalue())
