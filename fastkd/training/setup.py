"""From a recipe and what the caller hands over to models, input and loaders that fit each other.

Decides what follows from what (classes, input size, statistics); the training itself is elsewhere.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from torch import nn

from fastkd.models import Teacher, create_student, create_teacher
from fastkd.training.augment import InputSpec
from fastkd.training.checkpoint import LAST, load_checkpoint
from fastkd.training.data import DataPair, open_data, slice_size
from fastkd.training.recipe import Recipe
from fastkd.training.samplers import TrainBatchSampler
from fastkd.training.task import DistillationTask

MODULE_PREFIX = "module:"
STUDENT_FIELDS = ("variant", "width", "drop_path")


def resolve_recipe(
    recipe: Any, student: Any, teacher: Any, data: Any, overrides: dict[str, Any]
) -> Recipe:
    """The recipe of a run as it is saved: with overrides, and with what the caller hands over.

    Args:
        recipe: anything `Recipe.load` takes.
        student: a timm name, a module, or None for the recipe's model.
        teacher: a name, a path, a module, or None for no distillation.
        data: what `open_data` takes, or None for the recipe's data.
        overrides: recipe fields.

    Returns:
        The resolved recipe; modules stand in it as ``module:ClassName``.

    Raises:
        ValueError: an override that could have no effect, or an unknown one.
        TypeError: a value of the wrong type.
    """
    resolved = Recipe.load(recipe).override(**overrides)
    if isinstance(student, nn.Module):
        for name in STUDENT_FIELDS:
            if name in overrides:
                raise ValueError(
                    f"train: {name}={overrides[name]!r} has no effect: the student is given as a "
                    f"module"
                )
    if teacher is None:  # and the record says so, whatever terms the recipe asks for
        resolved = resolved.override(alpha=0.0, feature_weight=0.0)
    if student is not None:
        resolved = resolved.override(model=_name(student))
    if isinstance(data, str | Path):
        resolved = resolved.override(data=str(data))
    return resolved.override(teacher=None if teacher is None else _name(teacher))


def _name(model: Any) -> str:
    if isinstance(model, Teacher):
        model = model.model
    return f"{MODULE_PREFIX}{type(model).__name__}" if isinstance(model, nn.Module) else str(model)


@dataclass(frozen=True)
class Shape:
    """What the student has to be built for.

    Attributes:
        num_classes: None where nobody says.
        channels: of the images.
        img_size: None for the model's own.
    """

    num_classes: int | None
    channels: int
    img_size: int | None


def build_student(recipe: Recipe, shape: Shape) -> nn.Module:
    """Create the student that a recipe names.

    Args:
        recipe: model, variant, width, drop_path.
        shape: classes and input.

    Returns:
        The student, on the CPU, initialised from torch's generator.

    Raises:
        ValueError: the recipe stands for a module that only its author has, or the number of
            classes is unknown.
    """
    if recipe.model is None or recipe.model.startswith(MODULE_PREFIX):
        raise ValueError(f"student: the recipe's model is {recipe.model}: hand the module over")
    if shape.num_classes is None:
        raise ValueError("num_classes: the data set does not say how many classes there are")
    options: dict[str, Any] = {"drop_path_rate": recipe.drop_path} if recipe.drop_path else {}
    if shape.channels != 3:
        options["in_chans"] = shape.channels
    return create_student(
        recipe.model,
        recipe.variant,  # type: ignore[arg-type]
        width=recipe.width,
        num_classes=shape.num_classes,
        img_size=shape.img_size,
        **options,
    )


def student_shape(recipe: Recipe, data: DataPair) -> Shape:
    """What a student needs to be built for these data.

    Args:
        recipe: its ``num_classes`` and ``img_size`` come first.
        data: the opened data.

    Returns:
        The shape.

    Raises:
        ValueError: the recipe has fewer classes than the data.
    """
    known = data.num_classes
    if recipe.num_classes is not None and known is not None and recipe.num_classes < known:
        raise ValueError(f"num_classes: {recipe.num_classes}, but the data have {known} classes")
    channels = data.image_size[0] if data.image_size else 3
    return Shape(recipe.num_classes or known, channels, recipe.img_size)


def class_count(student: nn.Module, shape: Shape) -> int | None:
    """Number of the student's logits, as far as anybody says.

    Args:
        student: any module; timm's say it.
        shape: what the recipe and the data say.

    Returns:
        The number of classes, or None.

    Raises:
        ValueError: the student has fewer logits than the data have classes.
    """
    own = getattr(student, "num_classes", None)
    if not isinstance(own, int):
        return shape.num_classes
    if shape.num_classes is not None and own < shape.num_classes:
        raise ValueError(
            f"student: {own} logits for data of {shape.num_classes} classes: create it with "
            f"num_classes={shape.num_classes}"
        )
    return own


def input_spec(student: nn.Module, recipe: Recipe, data: DataPair) -> InputSpec:
    """Size and statistics of the student's input.

    Args:
        student: timm's models carry both.
        recipe: its ``img_size``, ``mean`` and ``std`` come first.
        data: float tensors have a size already, and are fed as they are unless the recipe has
            statistics.

    Returns:
        The spec.
    """
    if data.image_size is not None:
        return InputSpec(data.image_size, recipe.mean, recipe.std)
    config = getattr(student, "pretrained_cfg", None) or {}
    channels, height, width = config.get("input_size", (3, 224, 224))
    fixed = getattr(getattr(student, "patch_embed", None), "img_size", None)
    if recipe.img_size is not None:
        height = width = recipe.img_size
    elif fixed is not None:
        height, width = fixed
    channels = getattr(getattr(student, "patch_embed", None), "in_chans", channels)
    return InputSpec(
        (channels, height, width),
        recipe.mean or tuple(config.get("mean", IMAGENET_DEFAULT_MEAN)),
        recipe.std or tuple(config.get("std", IMAGENET_DEFAULT_STD)),
    )


def resolve_teacher(teacher: Any, recipe: Recipe, spec: InputSpec) -> Teacher | None:
    """Load the teacher and tell it what the images are normalised with.

    Args:
        teacher: None, a `Teacher`, a module, a timm name, a run's folder or a fastkd checkpoint.
        recipe: its ``teacher_checkpoint`` holds local weights for a timm name.
        spec: the student's input.

    Returns:
        The frozen teacher on the CPU, or None.

    Raises:
        ValueError: weights for a module, or what `create_teacher` raises.
    """
    if teacher is None:
        return None
    by_name = not isinstance(teacher, nn.Module) and not Path(teacher).exists()
    if recipe.teacher_checkpoint is not None and not by_name:
        raise ValueError("teacher_checkpoint: holds weights for a teacher given by its timm name")
    if isinstance(teacher, Teacher):
        resolved = teacher
    elif isinstance(teacher, nn.Module):
        resolved = create_teacher(teacher)
    elif by_name:
        resolved = create_teacher(str(teacher), checkpoint=recipe.teacher_checkpoint)
    else:
        # Its own training's statistics: a fastkd student carries none in its configuration.
        loaded = load_student(teacher)
        resolved = create_teacher(loaded.model, mean=loaded.spec.mean, std=loaded.spec.std)
    resolved.set_input_stats(spec.mean, spec.std)
    return resolved


@dataclass(frozen=True)
class LoadedStudent:
    """A student rebuilt from a checkpoint.

    Attributes:
        model: in eval mode, on the CPU.
        spec: what it was trained on.
        recipe: its run's.
        weights: ``"raw"`` or ``"ema"``.
    """

    model: nn.Module
    spec: InputSpec
    recipe: Recipe
    weights: str


def load_student(
    checkpoint: str | Path, weights: str = "auto", model: nn.Module | None = None
) -> LoadedStudent:
    """Rebuild a student from a checkpoint of its run.

    Args:
        checkpoint: a checkpoint, or a run's folder, whose ``last.pth`` is taken.
        weights: ``"raw"``, ``"ema"``, or ``"auto"``: EMA where there is one.
        model: takes the weights; needed where the student was given as a module.

    Returns:
        The student, its input and its recipe.

    Raises:
        CheckpointError: the file cannot be used.
        ValueError: there are no EMA weights, or they do not fit ``model``.
    """
    if weights not in ("auto", "raw", "ema"):
        raise ValueError(f"weights: expected auto, raw or ema, got {weights!r}")
    state = load_checkpoint(checkpoint)
    if weights == "ema" and state["ema"] is None:
        raise ValueError(f"weights: {checkpoint} has no EMA weights (ema_decay was none)")
    recipe = Recipe.from_dict(state["recipe"])
    size, mean, std = (state["input"][name] for name in ("size", "mean", "std"))
    spec = InputSpec(tuple(size), mean and tuple(mean), std and tuple(std))
    if model is None:
        model = build_student(recipe, Shape(state["num_classes"], spec.size[0], recipe.img_size))
    used = "raw" if weights == "raw" or state["ema"] is None else "ema"
    try:
        model.load_state_dict(state["student" if used == "raw" else "ema"])
    except RuntimeError as error:
        raise ValueError(f"student: {checkpoint} does not fit the given model: {error}") from None
    return LoadedStudent(model.eval(), spec, recipe, used)


def build_optimizer(
    task: DistillationTask, recipe: Recipe, updates_per_epoch: int
) -> tuple[torch.optim.Optimizer, Any]:
    """Timm's AdamW groups and cosine schedule with warm-up, stepped per update.

    Args:
        task: decides which parameters are not decayed.
        recipe: the optimisation group.
        updates_per_epoch: length of an epoch.

    Returns:
        The optimiser and the scheduler.
    """
    optimizer = create_optimizer_v2(
        task,
        opt="adamw",
        lr=recipe.scaled_lr,
        weight_decay=recipe.weight_decay,
        eps=recipe.eps,
        fused=True,
    )
    scheduler, _ = create_scheduler_v2(
        optimizer,
        sched="cosine",
        num_epochs=recipe.epochs,
        warmup_epochs=recipe.warmup_epochs,
        min_lr=recipe.min_lr,
        warmup_lr=recipe.warmup_lr,
        step_on_epochs=False,
        updates_per_epoch=updates_per_epoch,
    )
    return optimizer, scheduler


def effective_values(
    recipe: Recipe, student: nn.Module, data: DataPair | None, world_size: int = 1
) -> dict[str, str]:
    """What a recipe comes down to on these data and processes, for people to read.

    Args:
        recipe: resolved.
        student: the student.
        data: None where there are none yet; then lengths are left out.
        world_size: number of processes.

    Returns:
        Text by heading, in order.

    Raises:
        ValueError: the batch cannot be shared out, or exceeds the data.
    """
    share = slice_size(recipe, world_size)
    scaled = f" = {recipe.lr:g} x {recipe.batch_size} / 512" if recipe.lr_scaling else ""
    values = {
        "student": f"{recipe.model} ({recipe.variant}), {parameter_count(student):,} parameters"
        if not (recipe.model or "").startswith(MODULE_PREFIX)
        else f"{type(student).__name__}, {parameter_count(student):,} parameters",
        "teacher": recipe.teacher or "none (no distillation)",
        "terms": _terms_text(recipe),
        "global batch": f"{recipe.batch_size} = {world_size} process(es) x {recipe.accumulation} "
        f"slice(s) x {share}",
        "learning rate": f"{recipe.scaled_lr:g}{scaled}",
    }
    if data is not None:
        sampler = TrainBatchSampler(
            len(data.train), share, accumulation=recipe.accumulation, world_size=world_size
        )
        updates = sampler.updates_per_epoch
        values["training set"] = f"{len(data.train):,} images, {updates:,} updates an epoch"
        values["evaluation set"] = f"{len(data.val):,} images"
        values["in all"] = f"{recipe.epochs} epochs, {recipe.epochs * updates:,} updates"
    return values


def dry_run(
    recipe: Recipe, teacher: str | None, overrides: dict[str, Any]
) -> tuple[Recipe, dict[str, str]]:
    """What a run would be, without a teacher's weights, a device or an output.

    Args:
        recipe: the run's.
        teacher: its name, or None.
        overrides: recipe fields.

    Returns:
        The resolved recipe, and `effective_values`.

    Raises:
        ValueError: the same that would stop the run at its start.
    """
    resolved = resolve_recipe(recipe, None, teacher, None, overrides)
    data = None if resolved.data is None else open_data(resolved.data, resolved.data_root)
    if data is None:
        shape = Shape(resolved.num_classes, 3, resolved.img_size)
    else:
        shape = student_shape(resolved, data)
    student = build_student(resolved, shape)
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    return resolved, effective_values(resolved, student, data, world_size)


def _terms_text(recipe: Recipe) -> str:
    if recipe.teacher is None:
        return f"CE (label smoothing {recipe.label_smoothing:g})"
    terms = [f"{1 - recipe.alpha:g} CE"]
    if recipe.alpha > 0:
        kind = "hard KD" if recipe.hard else f"soft KD (tau {recipe.tau:g})"
        terms.append(f"{recipe.alpha:g} {kind}")
    if recipe.feature_weight > 0:
        pairs = ",".join(f"{s}:{t}" for s, t in recipe.pairs)
        terms.append(f"{recipe.feature_weight:g} {recipe.feature_loss} on {pairs}")
    return " + ".join(terms)


def parameter_count(module: nn.Module) -> int:
    """Number of parameters.

    Args:
        module: any module.

    Returns:
        The count.
    """
    return sum(parameter.numel() for parameter in module.parameters())


def find_checkpoint(output: Path | None, resume: str) -> Path | None:
    """Where a run continues from.

    Args:
        output: the run's folder.
        resume: ``"auto"`` (its last checkpoint, if there is one), ``"never"``, or a path.

    Returns:
        The checkpoint, or None to start afresh.
    """
    if resume == "never":
        return None
    if resume != "auto":
        return Path(resume)
    last = None if output is None else output / LAST
    return last if last is not None and last.exists() else None
