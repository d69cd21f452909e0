"""What a checkpoint holds of a run, and how a run resumes from it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastkd.checkpoint import LAST, CheckpointError
from fastkd.config import Recipe
from fastkd.data.transforms import InputSpec
from fastkd.inference.loading import recipe_of
from fastkd.models.weights import better_weights, short_misfit
from fastkd.training.engine import Engine
from fastkd.utils.random import rng_state, set_rng_state


@dataclass
class Progress:
    """How far a run has come.

    Attributes:
        history: one record per finished epoch.
        best: the best epoch so far: ``epoch`` (from 1, 0: none yet), ``top1`` in % (-1: none), and
            ``loss`` where the run is ranked by that.
        unreadable: names of training images that could not be read.
    """

    history: list[dict[str, Any]] = field(default_factory=list)
    best: dict[str, Any] = field(default_factory=lambda: {"top1": -1.0, "epoch": 0})
    unreadable: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Identity:
    """What makes a checkpoint this run's, and its student rebuildable.

    Attributes:
        recipe: resolved.
        spec: the student's input.
        num_classes: None where nobody says.
        img_size: what the student was built for.
        classes: names by label; None where the data do not name them.
        train_images: samples of an epoch's one pass.
        stream: (processes, loader processes of each) that share a stream, whose order depends on
            them; None for data that are read by number.
    """

    recipe: Recipe
    spec: InputSpec
    num_classes: int | None
    img_size: int | tuple[int, int] | None
    classes: tuple[str, ...] | None
    train_images: int
    stream: tuple[int, int] | None = None


def student_state(
    student: nn.Module, engine: Engine, identity: Identity, progress: Progress
) -> dict[str, Any]:
    """What rebuilds the student, and where its weights come from."""
    ema, spec = engine.ema, identity.spec
    state = {
        "student": student.state_dict(),
        "ema": None if ema is None else ema.module.state_dict(),
        "recipe": identity.recipe.to_dict(),
        "num_classes": identity.num_classes,
        "img_size": identity.img_size,
        "classes": None if identity.classes is None else list(identity.classes),
        "input": {"size": spec.size, "mean": spec.mean, "std": spec.std},
        "position": vars(engine.position).copy(),
        "best": progress.best,
        "measured": _last_measurement(progress.history),
    }
    # The same tensors again, by the name under which timm's checkpoint_path= looks for them.
    return state | {"state_dict": state["ema" if better_weights(state) == "ema" else "student"]}


def _last_measurement(history: list[dict[str, Any]]) -> dict[str, float]:
    """Top-1 of the raw and EMA weights when they were evaluated last; empty before."""
    evaluated = [record for record in history if "top1" in record]
    last = evaluated[-1] if evaluated else {}
    return {name: last[name] for name in ("top1", "ema_top1") if name in last}


def run_state(
    student: nn.Module,
    engine: Engine,
    identity: Identity,
    progress: Progress,
    sums: list[float],
) -> dict[str, Any]:
    """Everything that the rest of the run depends on."""
    device = engine.world.device
    return student_state(student, engine, identity, progress) | {
        "terms": engine.task.terms.state_dict(),
        "optimizer": engine.optimizer.state_dict(),
        "scheduler": engine.scheduler.state_dict(),
        "scaler": engine.scaler.state_dict(),
        # Updates seed themselves; this is for what a user's modules draw outside of them.
        "rng": rng_state(device),
        "train_images": identity.train_images,
        "stream": identity.stream,
        "meter": {**engine.meter.state_dict(), "sums": torch.tensor(sums, dtype=torch.float64)},
        "history": progress.history,
        "unreadable": progress.unreadable,
    }


def restore(
    path: Path,
    state: dict[str, Any],
    student: nn.Module,
    engine: Engine,
    identity: Identity,
    progress: Progress,
) -> None:
    """Put a run where a checkpoint left it."""
    _check_same_run(path, state, identity)
    try:
        student.load_state_dict(state["student"])
        engine.task.terms.load_state_dict(state["terms"])
        engine.optimizer.load_state_dict(state["optimizer"])
        if engine.ema is not None:
            engine.ema.module.load_state_dict(state["ema"])
    except (RuntimeError, ValueError) as error:
        raise CheckpointError(
            f"resume: {path} does not fit this student: {short_misfit(error)}"
        ) from error
    engine.scheduler.load_state_dict(state["scheduler"])
    engine.scaler.load_state_dict(state["scaler"])
    engine.meter.load_state_dict(state["meter"])
    for name, value in state["position"].items():
        setattr(engine.position, name, value)
    progress.history, progress.best = state["history"], state["best"]
    progress.unreadable = state["unreadable"]
    set_rng_state(state["rng"], engine.world.device)


def _check_same_run(path: Path, state: dict[str, Any], identity: Identity) -> None:
    if "optimizer" not in state:
        raise CheckpointError(
            f"resume: {path} holds a student alone, no run to continue (take {LAST})"
        )
    if state["train_images"] != identity.train_images:
        raise CheckpointError(
            f"resume: {path} is of a run on {state['train_images']} training images, these "
            f"data have {identity.train_images}: its position has no meaning in them"
        )
    classes = None if identity.classes is None else list(identity.classes)
    if state["classes"] != classes:
        raise CheckpointError(
            f"resume: {path} is of a run on classes of other names or in another order than these "
            f"data's: its labels mean something else"
        )
    stream = state["stream"]
    if stream != identity.stream:
        raise CheckpointError(
            f"resume: {path} is of a stream shared by {stream} (processes, workers of "
            f"each), now by {identity.stream}: it would give other samples"
        )
    differences = recipe_of(path, state).differences(identity.recipe)
    if differences:
        fields = ", ".join(f"{n} {a!r} -> {b!r}" for n, (a, b) in differences.items())
        raise CheckpointError(
            f"resume: {path} is of a run with another recipe ({fields}); choose another "
            f"output, or resume='never' to start afresh and overwrite it"
        )
