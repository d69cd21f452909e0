"""From a recipe, models and data to the engine that trains.

Decides how the parts fit together; what they do is theirs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3
from torch import nn

from fastkd.config import Recipe
from fastkd.data.gpu_augment import device_augment
from fastkd.data.transforms import InputSpec, create_mixup
from fastkd.inference.loading import names_a_file, open_model
from fastkd.models import Teacher, create_teacher
from fastkd.models.teacher import as_teacher
from fastkd.training.engine import Engine
from fastkd.training.task import DistillationTask, build_task
from fastkd.utils.distributed import World

_TEACHER_BY_NAME = "teacher_checkpoint: holds weights for a teacher given by its timm name"


def build_engine(
    student: nn.Module,
    teacher: Teacher | None,
    recipe: Recipe,
    spec: InputSpec,
    world: World,
    *,
    num_classes: int | None,
    updates_per_epoch: int,
) -> Engine:
    """Put task, optimiser, schedule, EMA and augmentation together.

    Args:
        student: on the world's device.
        teacher: moved to the device; None trains on labels alone.
        recipe: everything else.
        spec: the student's input.
        world: this process among its peers.
        num_classes: needed by Mixup alone.
        updates_per_epoch: length of an epoch.

    Returns:
        The engine, at the start of a run.

    Raises:
        ValueError: Mixup without a number of classes, or what `build_task` raises.
    """
    mixup = None
    if recipe.mixes:
        if num_classes is None:
            raise ValueError("num_classes: Mixup needs the number of classes, nobody says it")
        mixup = create_mixup(recipe, num_classes)
    # Before taps look at the student, so that the copy is of the bare model.
    ema = None
    if recipe.ema_decay is not None:
        ema = ModelEmaV3(student, decay=recipe.ema_decay, use_warmup=recipe.ema_warmup)
    if teacher is not None:
        teacher = teacher.to(world.device)
    task = build_task(student, teacher, recipe, torch.zeros(1, *spec.size, device=world.device))
    optimizer, scheduler = build_optimizer(task, recipe, updates_per_epoch)
    augment = device_augment(recipe, spec)
    return Engine(
        task,
        teacher if task.needs_logits or task.needs_tokens else None,
        optimizer,
        scheduler,
        recipe=recipe,
        world=world,
        ema=ema,
        augment=None if augment is None else augment.to(world.device),
        mixup=mixup,
    )


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


def resolve_teacher(teacher: Any, recipe: Recipe, spec: InputSpec) -> Teacher | None:
    """Load the teacher and tell it what the images are normalised with.

    Args:
        teacher: None, a `Teacher`, a module, or whatever `open_model` opens: a timm name or folder,
            a run's folder, a checkpoint, an exported student.
        recipe: its ``teacher_checkpoint`` holds local weights for a timm name, its
            ``teacher_img_size`` the size that images are resized to for the teacher.
        spec: the student's input.

    Returns:
        The frozen teacher on the CPU, or None.

    Raises:
        ValueError: weights for a module, a size for a `Teacher` or for a model that is fixed to
            another, or what `open_model` raises.
    """
    if teacher is None:
        return None
    size = recipe.teacher_img_size
    if isinstance(teacher, nn.Module):
        if recipe.teacher_checkpoint is not None:
            raise ValueError(_TEACHER_BY_NAME)
        resolved = _given_teacher(teacher, size)
    else:
        resolved = _opened_teacher(teacher, recipe.teacher_checkpoint, size)
    resolved.set_input_stats(spec.mean, spec.std)
    return resolved


def _given_teacher(teacher: nn.Module, size: int | None) -> Teacher:
    if not isinstance(teacher, Teacher):
        return create_teacher(teacher, input_size=size)
    if size is not None:
        raise ValueError("teacher_img_size: a Teacher has an input_size of its own")
    return teacher


def _opened_teacher(teacher: str | Path, checkpoint: str | None, size: int | None) -> Teacher:
    """What `evaluate` would open, fed what it was trained on."""
    if checkpoint is not None and names_a_file("train", teacher):
        raise ValueError(_TEACHER_BY_NAME)
    options = {} if size is None else {"img_size": size}
    opened = open_model("train", teacher, checkpoint, "auto", options)
    if opened.trained_on is None:
        return as_teacher(opened.network, built_for=size)
    # Without statistics it would take those of timm's configuration, but a run on tensors was fed
    # them as they came.
    fed = opened.trained_on
    return Teacher(opened.network, mean=fed.mean, std=fed.std, input_size=fed.size[-2:])
