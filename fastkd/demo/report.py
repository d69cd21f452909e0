"""The demo's findings as tables for the terminal and as results.json."""

from __future__ import annotations

import dataclasses
import json
import math
import platform
import textwrap
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import sklearn
import timm
import torch

from fastkd.analysis import LEVELS, Ranks
from fastkd.demo.experiment import RUNS, Findings, Scores, mean_and_spread
from fastkd.utils.io import write_text

RESULTS = "results.json"
ACCURACY = "accuracy.png"
RANKS = "ranks.png"


def text(findings: Findings, output: Path, seconds: float) -> str:
    """Format everything that is printed at the end."""
    kept = f", {findings.kept} of them kept from before" if findings.kept else ""
    sections = [
        accuracy_table(findings),
        rank_table(findings),
        caveats(findings),
        f"{findings.runs} runs{kept}, {seconds:.0f} s. Files in {output}: {RESULTS}, {ACCURACY}, "
        f"{RANKS}, {RUNS}/ (recipe, log and checkpoint of every run)",
    ]
    return "\n" + "\n\n".join(sections)


def accuracy_table(findings: Findings) -> str:
    """Format one line a student."""
    seeds = f"{findings.seeds} seed" + ("s" if findings.seeds > 1 else "")
    rows: list[tuple[str, ...]] = [
        ("student", "distillation", "parameters", f"top-1 %, {seeds}", "gain over its twin")
    ]
    rows.append(
        ("teacher", "-", f"{findings.teacher_parameters:,}", f"{findings.teacher_top1:.1f}", "-")
    )
    rows += [_accuracy_row(findings, scores) for scores in findings.scores]
    spread = " (mean ± standard deviation over seeds)" if findings.seeds > 1 else ""
    title = (
        f"Top-1 on {findings.held_out_images} held-out digits, students trained on "
        f"{findings.train_images:,}{spread}"
    )
    weights = (
        f"KD minimizes 0.1 CE + 0.9 soft KD + {findings.settings.feature_weight:g} feature loss"
    )
    return f"{title}\n{_aligned(rows)}\n{weights} (last block to last block), its twin CE alone"


def _accuracy_row(findings: Findings, scores: Scores) -> tuple[str, ...]:
    gains = findings.gains(scores)
    return (
        scores.contender.name.removesuffix(" + KD"),
        distillation(findings, scores),
        f"{scores.parameters:,}",
        _with_spread(scores.top1),
        "-" if gains is None else _with_spread(gains, sign="+"),
    )


def distillation(findings: Findings, scores: Scores) -> str:
    """Name a student's losses."""
    loss = findings.settings.feature_loss
    return {
        None: "none",
        "linear": f"soft KD + {loss}, projector dropped",
        "lift": f"soft KD + {loss} on lifted tokens",
        "none": f"soft KD + {loss}",
    }[scores.contender.projector]


def rank_table(findings: Findings) -> str:
    """Format two lines a model: ranks in each image's own basis and in the shared one."""
    rows = [("features", "N", "D", "basis", *(f"{100 * level:.0f} %" for level in LEVELS))]
    for ranks in findings.ranks:
        name = f"{ranks.name}, {ranks.feature}"
        size = (str(ranks.tokens), str(ranks.dim))
        rows.append((name, *size, "each image's own", *_rank_cells(ranks.image)))
        rows.append(("", "", "", "shared by all", *_rank_cells(ranks.dataset)))
    title = (
        f"Dimensions that hold 80 .. 99 % of an image's energy: median (99th percentile) over "
        f"{findings.held_out_images} images; students of seed 0"
    )
    return f"{title}\n{_aligned(rows)}"


def _rank_cells(ranks: Ranks) -> list[str]:
    cells = (ranks.distribution(level) for level in LEVELS)
    return [f"{s.median:.0f} ({s.percentile_99:.0f})" for s in cells]


def caveats(findings: Findings) -> str:
    """Explain what the demo can and cannot show."""
    total = findings.train_images + findings.held_out_images
    shows = (
        "What this shows: the trainer, the losses and the three kinds of student at work on real "
        "images; and how many dimensions an image of the teacher needs in its own basis and in the "
        "one that all images share."
    )
    cannot = (
        f"What it cannot show: which student is better in general. These are {total:,} images of "
        f"8 x 8 pixels and models of some ten thousand parameters; {_noise(findings)} It is no "
        f"evidence about ImageNet."
    )
    return "\n".join(textwrap.fill(paragraph, 100) for paragraph in (shows, cannot))


def _noise(findings: Findings) -> str:
    accuracy = mean_and_spread([value for s in findings.scores for value in s.top1])[0] / 100
    sampling = 100 * math.sqrt(accuracy * (1 - accuracy) / findings.held_out_images)
    of_images = (
        f"{findings.held_out_images} held-out images alone leave an uncertainty of about "
        f"{sampling:.1f} points (one standard error)"
    )
    spreads = [spread for s in findings.scores if (spread := mean_and_spread(s.top1)[1])]
    if not spreads:
        return f"a single seed says nothing of the spread between seeds, and {of_images}."
    return f"seeds differ by up to {max(spreads):.1f} points (std), and {of_images}."


def save(findings: Findings, path: Path) -> None:
    """Write everything as JSON."""
    write_text(path, json.dumps(as_dict(findings), indent=2, ensure_ascii=False) + "\n")


def as_dict(findings: Findings) -> dict[str, Any]:
    """Return everything that was measured as plain values."""
    return {
        "settings": dataclasses.asdict(findings.settings),
        "seeds": list(range(findings.seeds)),
        "data": {
            "name": "scikit-learn digits, 8 x 8 pixels",
            "train_images": findings.train_images,
            "held_out_images": findings.held_out_images,
        },
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "timm": timm.__version__,
            "scikit-learn": sklearn.__version__,
        },
        "teacher": {"parameters": findings.teacher_parameters, "top1": findings.teacher_top1},
        "students": [_student_dict(findings, scores) for scores in findings.scores],
        "ranks": [
            {
                "model": ranks.name,
                "feature": ranks.feature,
                "tokens": ranks.tokens,
                "dim": ranks.dim,
                "per_image": _ranks_dict(ranks.image),
                "dataset": _ranks_dict(ranks.dataset),
            }
            for ranks in findings.ranks
        ],
    }


def _ranks_dict(ranks: Ranks) -> dict[str, Any]:
    return {
        "images": len(ranks.values),
        "largest_possible": ranks.largest,
        "statistics": {f"{q:g}": asdict(ranks.distribution(q)) for q in ranks.levels},
        "histograms": {f"{q:g}": ranks.histogram(q).tolist() for q in ranks.levels},
    }


def _student_dict(findings: Findings, scores: Scores) -> dict[str, Any]:
    mean, spread = mean_and_spread(scores.top1)
    gains = findings.gains(scores)
    return {
        "student": scores.contender.key,
        "variant": scores.contender.variant,
        "distillation": distillation(findings, scores),
        "parameters": scores.parameters,
        "top1": scores.top1,
        "top1_mean": mean,
        "top1_std": spread,
        "twin": scores.contender.twin,
        "gain": gains,
        "gain_mean": None if gains is None else mean_and_spread(gains)[0],
        "gain_std": None if gains is None else mean_and_spread(gains)[1],
    }


def _with_spread(values: list[float], sign: str = "") -> str:
    mean, spread = mean_and_spread(values)
    return f"{mean:{sign}.1f}" + ("" if spread is None else f" ± {spread:.1f}")


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)
