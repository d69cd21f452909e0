"""What a run comes down to, in words: before it starts, and instead of it (``--dry-run``).

Reads recipes, models and data; changes none of them.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from torch import nn

from fastkd.config import MODULE_PREFIX, Recipe, refuse_image_options
from fastkd.data.datasets import DataPair, open_data
from fastkd.data.samplers import TrainBatchSampler, slice_size
from fastkd.data.transforms import InputSpec
from fastkd.inference.loading import build_student
from fastkd.inference.preprocessing import Shape, input_spec, parameter_count, student_shape
from fastkd.losses.build import has_temperature
from fastkd.losses.registry import find_loss
from fastkd.models import Teacher
from fastkd.training.dry_run import cost_lines, sketch_teacher
from fastkd.training.options import FromRecipe, resolve_recipe


def effective_values(
    recipe: Recipe,
    student: nn.Module,
    data: DataPair | None,
    world_size: int = 1,
    teacher: Teacher | None = None,
    spec: InputSpec | None = None,
) -> dict[str, str]:
    """What a recipe comes down to on these data and processes, for people to read.

    Args:
        recipe: resolved.
        student: the student.
        data: None where there are none yet; then lengths are left out.
        world_size: number of processes.
        teacher: None where it is only known by its name; then it is built without weights.
        spec: the student's input; None leaves FLOPs and memory out.

    Returns:
        Text by heading, in order.

    Raises:
        ValueError: the batch cannot be shared out, or exceeds the data.
    """
    share = slice_size(recipe, world_size)
    values = {
        "student": f"{recipe.model} ({recipe.variant}), {parameter_count(student):,} parameters"
        if not (recipe.model or "").startswith(MODULE_PREFIX)
        else f"{type(student).__name__}, {parameter_count(student):,} parameters",
        "teacher": recipe.teacher or "none (no distillation)",
        "terms": _terms_text(recipe),
        "global batch": f"{recipe.batch_size} = {world_size} process(es) x {recipe.accumulation} "
        f"slice(s) x {share}",
        "learning rate": _schedule_text(recipe),
    }
    if data is not None:
        known = data.num_classes
        if known is not None and recipe.num_classes is not None and recipe.num_classes > known:
            values["classes"] = f"{recipe.num_classes} logits for data of {known} classes"
        samples = recipe.train_samples or len(data.train) if data.streams else len(data.train)
        sampler = TrainBatchSampler(
            samples, share, accumulation=recipe.accumulation, world_size=world_size
        )
        updates = sampler.updates_per_epoch
        copies = f", {recipe.repeated_aug} copies of each" if recipe.repeated_aug > 1 else ""
        values["training set"] = f"{samples:,} images"
        values["an epoch"] = f"{updates * recipe.batch_size:,} samples{copies}, {updates:,} updates"
        if not data.streams:
            values["evaluation set"] = f"{len(data.val):,} images"
        values["in all"] = f"{recipe.epochs} epochs, {recipe.epochs * updates:,} updates"
    if spec is not None:
        teacher = teacher or sketch_teacher(recipe, spec)
        values |= cost_lines(recipe, student, teacher, spec, world_size)
    return values


def dry_run(
    recipe: Recipe, teacher: str | FromRecipe | None, overrides: dict[str, Any]
) -> tuple[Recipe, dict[str, str]]:
    """What a run would be, without a teacher's weights, a device or an output.

    Args:
        recipe: the run's.
        teacher: its name, None, or `FromRecipe.TEACHER`.
        overrides: recipe fields.

    Returns:
        The resolved recipe, and `effective_values`.

    Raises:
        ValueError: the same that would stop the run at its start.
    """
    resolved = resolve_recipe(recipe, None, teacher, None, overrides)
    data = None
    if resolved.data is not None:
        data = open_data(resolved.data, resolved.data_root, labels=resolved.labels)
    if data is None:
        shape = Shape(resolved.num_classes, 3, resolved.img_size)
    else:
        if data.yields_tensors:
            refuse_image_options(overrides)
        shape = student_shape(resolved, data)
    student = build_student(resolved, shape)
    spec = input_spec(student, resolved, data)
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    return resolved, effective_values(resolved, student, data, world_size, spec=spec)


def _schedule_text(recipe: Recipe) -> str:
    scaled = f" = {recipe.lr:g} x {recipe.batch_size} / 512" if recipe.lr_scaling else ""
    warmup = f"from {recipe.warmup_lr:g} in {recipe.warmup_epochs} epochs to "
    return (
        f"{warmup if recipe.warmup_epochs else ''}{recipe.scaled_lr:g}{scaled}, by a cosine to "
        f"{recipe.min_lr:g}"
    )


def _terms_text(recipe: Recipe) -> str:
    if recipe.teacher is None:
        return f"CE (label smoothing {recipe.label_smoothing:g})"
    terms = [f"{recipe.cross_entropy_weight:g} CE"] if recipe.labels else []
    if recipe.alpha > 0:
        options = dict(recipe.logit_options or {})
        if has_temperature(find_loss(recipe.logit_loss)):
            options = {"tau": recipe.tau, **options}
        terms.append(f"{recipe.alpha:g} {recipe.logit_loss} logits{_in_brackets(options)}")
    if recipe.feature_weight > 0:
        pairs = ",".join(f"{s}:{t}" for s, t in recipe.pairs)
        chosen = _in_brackets(recipe.feature_options or {})
        terms.append(f"{recipe.feature_weight:g} {recipe.feature_loss}{chosen} on {pairs}")
    return " + ".join(terms)


def _in_brackets(options: Mapping[str, Any]) -> str:
    if not options:
        return ""
    told = [f"{name} {_number(value)}" for name, value in options.items()]
    return f" ({', '.join(told)})"


def _number(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
