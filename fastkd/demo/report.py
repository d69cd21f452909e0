"""The demo's findings as tables for the terminal, two figures and results.json."""

from __future__ import annotations

import dataclasses
import json
import math
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure  # without pyplot, whose backend and state are the caller's

from fastkd.analysis import LEVELS, Ranks
from fastkd.demo.experiment import RUNS, FeatureRanks, Findings, Scores, mean_and_spread
from fastkd.ops.environment import version
from fastkd.utils.io import replacing, write_text

RESULTS = "results.json"
ACCURACY = "accuracy.png"
RANKS = "ranks.png"

_ALONE, _DISTILLED, _TEACHER, _LIMIT = "#8a8f98", "#2a6f97", "#c1440e", "#555555"
_OWN, _SHARED = "#2a6f97", "#e09f3e"
_RANK_LEVELS = (0.95, 0.99)


def text(findings: Findings, output: Path, seconds: float) -> str:
    """Format everything that is printed at the end."""
    kept = f", {findings.kept} of them kept from before" if findings.kept else ""
    runs = 1 + findings.seeds * len(findings.scores)
    sections = [
        _accuracy_table(findings),
        _rank_table(findings),
        _caveats(findings),
        f"{runs} runs{kept}, {seconds:.0f} s. Files in {output}: {RESULTS}, {ACCURACY}, "
        f"{RANKS}, {RUNS}/ (recipe, log and checkpoint of every run)",
    ]
    return "\n" + "\n\n".join(sections)


def _accuracy_table(findings: Findings) -> str:
    seeds = f"{findings.seeds} seed" + ("s" if findings.seeds > 1 else "")
    teacher = f"{findings.teacher_parameters:,}", f"{findings.teacher_top1:.1f}"
    rows = [
        ("student", "distillation", "parameters", f"top-1 %, {seeds}", "gain over its twin"),
        ("teacher", "-", *teacher, "-"),
    ]
    for scores in findings.scores:
        gains = "-" if scores.gains is None else _with_spread(scores.gains, sign="+")
        name = scores.contender.name.removesuffix(" + KD")
        measured = f"{scores.parameters:,}", _with_spread(scores.top1)
        rows.append((name, _distillation(findings, scores), *measured, gains))
    spread = " (mean ± standard deviation over seeds)" if findings.seeds > 1 else ""
    return (
        f"Top-1 on {findings.held_out_images} held-out digits, students trained on "
        f"{findings.train_images:,}{spread}\n{_aligned(rows)}\n"
        f"KD minimizes 0.1 CE + 0.9 soft KD + {findings.settings.feature_weight:g} feature loss "
        "(last block to last block), its twin CE alone"
    )


def _distillation(findings: Findings, scores: Scores) -> str:
    loss = findings.settings.feature_loss
    return {
        None: "none",
        "linear": f"soft KD + {loss}, projector dropped",
        "lift": f"soft KD + {loss} on lifted tokens",
        "none": f"soft KD + {loss}",
    }[scores.contender.projector]


def _rank_table(findings: Findings) -> str:
    """Two lines per model: ranks in each image's own basis and in the shared one."""
    rows = [("features", "N", "D", "basis", *(f"{100 * level:.0f} %" for level in LEVELS))]
    for name, feature, tokens, dim, image, dataset in findings.ranks:
        size = (str(tokens), str(dim))
        rows.append((f"{name}, {feature}", *size, "each image's own", *_rank_cells(image)))
        rows.append(("", "", "", "shared by all", *_rank_cells(dataset)))
    return (
        f"Dimensions that hold 80 .. 99 % of an image's energy: median (99th percentile) over "
        f"{findings.held_out_images} images; students of seed 0\n{_aligned(rows)}"
    )


def _rank_cells(ranks: Ranks) -> list[str]:
    cells = (ranks.distribution(level) for level in LEVELS)
    return [f"{s.median:.0f} ({s.percentile_99:.0f})" for s in cells]


def _caveats(findings: Findings) -> str:
    total = findings.train_images + findings.held_out_images
    accuracy = mean_and_spread([value for s in findings.scores for value in s.top1])[0] / 100
    error = 100 * math.sqrt(accuracy * (1 - accuracy) / findings.held_out_images)
    spreads = [spread for s in findings.scores if (spread := mean_and_spread(s.top1)[1])]
    if spreads:
        seeds = f"seeds differ by up to {max(spreads):.1f} points (standard deviation)"
    else:
        seeds = "one seed does not show how much seeds differ"
    shows = (
        "What this shows: the trainer, the losses and the three kinds of student on real images; "
        "and how many dimensions an image needs in its own basis and in that of all images."
    )
    cannot = (
        f"What it cannot show: which student is better in general. These are {total:,} images of "
        f"8 x 8 pixels and models of some ten thousand parameters; {seeds}, and "
        f"{findings.held_out_images} held-out images alone leave a standard error of about "
        f"{error:.1f} points. It is no evidence about ImageNet."
    )
    return "\n".join(textwrap.fill(paragraph, 100) for paragraph in (shows, cannot))


def save(findings: Findings, path: Path) -> None:
    """Write everything as JSON."""
    content = {
        "settings": dataclasses.asdict(findings.settings),
        "seeds": list(range(findings.seeds)),
        "train_images": findings.train_images,
        "held_out_images": findings.held_out_images,
        "versions": {name: version(name) for name in ("fastkd", "torch", "timm", "scikit-learn")},
        "teacher": {"parameters": findings.teacher_parameters, "top1": findings.teacher_top1},
        "students": [_student(findings, scores) for scores in findings.scores],
        "ranks": [
            {"model": name, "feature": feature, "tokens": tokens, "dim": dim}
            | {"per_image": _statistics(image), "dataset": _statistics(dataset)}
            for name, feature, tokens, dim, image, dataset in findings.ranks
        ],
    }
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def _student(findings: Findings, scores: Scores) -> dict[str, Any]:
    mean, spread = mean_and_spread(scores.top1)
    return {
        "student": scores.contender.key,
        "distillation": _distillation(findings, scores),
        "parameters": scores.parameters,
        "top1": scores.top1,
        "top1_mean": mean,
        "top1_std": spread,
        "gain": scores.gains,  # over the twin without distillation, by seed
    }


def _statistics(ranks: Ranks) -> dict[str, Any]:
    levels = {f"{q:g}": dataclasses.asdict(ranks.distribution(q)) for q in ranks.levels}
    return {"images": len(ranks.values), "statistics": levels}


def _with_spread(values: list[float], sign: str = "") -> str:
    mean, spread = mean_and_spread(values)
    return f"{mean:{sign}.1f}" + ("" if spread is None else f" ± {spread:.1f}")


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])


def save_accuracy(findings: Findings, path: Path) -> None:
    """Draw a dot per seed, the mean with its spread, and the teacher."""
    figure = Figure(figsize=(9, 4.6), layout="constrained")
    axes = figure.subplots()
    for row, scores in enumerate(findings.scores):
        _draw_student(axes, row, scores)
    axes.axvline(findings.teacher_top1, color=_TEACHER, linestyle="--", linewidth=1.2)
    label, x = f"teacher {findings.teacher_top1:.1f} % ", findings.teacher_top1
    axes.text(x, 0.01, label, transform=axes.get_xaxis_transform(), ha="right", color=_TEACHER)
    names = [f"{s.contender.name}\n{s.parameters:,} parameters" for s in findings.scores]
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.set_xlabel(f"top-1 on {findings.held_out_images} held-out digits (%)")
    seeds = f"{findings.seeds} seed" + ("s: mean and standard deviation" * (findings.seeds > 1))
    title = f"Students trained on {findings.train_images:,} digits, with and without distillation"
    figure.suptitle(f"{title}\n{seeds}", fontsize=11)
    _clean(axes, grid="x")
    _save(figure, path)


def _draw_student(axes: Axes, row: int, scores: Scores) -> None:
    mean, spread = mean_and_spread(scores.top1)
    color = _ALONE if scores.contender.projector is None else _DISTILLED
    # Seeds side by side, so that equal accuracies do not hide each other.
    offsets = np.linspace(-0.12, 0.12, len(scores.top1)) if len(scores.top1) > 1 else np.zeros(1)
    axes.scatter(scores.top1, row + offsets, s=28, color=color, alpha=0.6, linewidth=0)
    axes.errorbar(mean, row, xerr=spread, fmt="none", ecolor=color, elinewidth=2, capsize=5)
    axes.plot([mean, mean], [row - 0.28, row + 0.28], color=color, linewidth=3)
    axes.text(mean, row - 0.3, f"{mean:.1f}", ha="center", color=color, fontweight="bold")


def save_ranks(findings: Findings, path: Path) -> None:
    """Draw how many dimensions the teacher's images need, each alone and all together."""
    teacher = findings.ranks[0]
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    panels = figure.subplots(1, len(_RANK_LEVELS), sharex=True, sharey=True)
    for axes, level in zip(panels, _RANK_LEVELS, strict=True):
        _draw_ranks(axes, teacher, level)
    panels[0].set_ylabel(f"images (of {findings.held_out_images})")
    panels[0].legend(frameon=False, loc="upper right", bbox_to_anchor=(0.97, 1))
    size = f"N = {teacher.tokens} tokens of D = {teacher.dim} channels an image"
    title = f"Teacher's {teacher.feature}: {size}, {findings.held_out_images} held-out digits"
    figure.suptitle(title, fontsize=11)
    _save(figure, path)


def _draw_ranks(axes: Axes, ranks: FeatureRanks, level: float) -> None:
    for own, color, label in (
        (ranks.image, _OWN, "in its own basis"),
        (ranks.dataset, _SHARED, "in the basis of all images"),
    ):
        counts = own.histogram(level)
        axes.bar(np.arange(len(counts)), counts, width=0.9, color=color, alpha=0.85, label=label)
    heights = axes.get_xaxis_transform()
    for limit, name, side in ((ranks.tokens, "N", "left"), (ranks.dim, "D", "right")):
        x, label = limit + 0.5, f" {name} = {limit} "
        axes.axvline(x, color=_LIMIT, linewidth=1, linestyle="--")
        axes.text(x, 0.62, label, transform=heights, rotation=90, ha=side, color=_LIMIT)
    axes.set_xlabel(f"dimensions that hold {100 * level:.0f} % of an image's energy")
    alone, shared = (r.distribution(level).median for r in (ranks.image, ranks.dataset))
    axes.set_title(f"median {alone:.0f} of its own, {shared:.0f} shared", fontsize=10)
    axes.set_xlim(0, ranks.dim + 1.5)
    _clean(axes, grid="y")


def _clean(axes: Axes, grid: Literal["x", "y"]) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis=grid, color="#dddddd", linewidth=0.8)
    axes.set_axisbelow(True)


def _save(figure: Figure, path: Path) -> None:
    with replacing(path) as file:
        FigureCanvasAgg(figure).print_png(file)
