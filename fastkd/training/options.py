"""From what a caller asks for to the recipe of a run; what could have no effect is refused.

Knows recipes and names; neither builds models nor opens data.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from fastkd.config import MODULE_PREFIX, Recipe, _refuse, fields_by_group
from fastkd.losses.build import check_options, has_temperature
from fastkd.losses.registry import find_loss
from fastkd.models import Teacher

STUDENT_FIELDS = ("variant", "width", "drop_path")
TEACHER_FIELDS = ("teacher_checkpoint", "teacher_img_size")
RANDOM_FIELDS = ("scale", "ratio", "hflip", "color_jitter", "auto_augment", "reprob")
FEATURE_FIELDS = (
    *("feature_loss", "feature_options", "pairs", "projector", "resample"),
    *("student_prefix", "teacher_prefix"),
)
LOGIT_FIELDS = ("tau", "logit_loss", "logit_options")
# Given as 0, they say what a run without a teacher does anyway.
WEIGHT_FIELDS = ("alpha", "feature_weight")


class FromRecipe(enum.Enum):
    """Default of an argument that stands for what the recipe says; None means none."""

    TEACHER = "the recipe's teacher"

    def __repr__(self) -> str:
        return f"<{self.value}>"


def chosen_teacher(recipe: Recipe, teacher: Any) -> Any:
    """The teacher of a run.

    Args:
        recipe: asked where the caller leaves the choice to it.
        teacher: a name, a path, a module, None, or `FromRecipe.TEACHER`.

    Returns:
        The teacher, or None.

    Raises:
        ValueError: the recipe's teacher is a module that only its author has.
    """
    if teacher is not FromRecipe.TEACHER:
        return teacher
    if recipe.teacher is not None and recipe.teacher.startswith(MODULE_PREFIX):
        raise ValueError(
            f"teacher: the recipe's teacher is {recipe.teacher}: hand the module over, or None to "
            f"train without one"
        )
    return recipe.teacher


def resolve_recipe(
    recipe: Any, student: Any, teacher: Any, data: Any, overrides: dict[str, Any]
) -> Recipe:
    """The recipe of a run as it is saved: with overrides, and with what the caller hands over.

    Args:
        recipe: anything `Recipe.load` takes.
        student: a timm name, a module, or None for the recipe's model.
        teacher: a name, a path, a module, None for no distillation, or `FromRecipe.TEACHER`.
        data: what `open_data` takes, or None for the recipe's data.
        overrides: recipe fields.

    Returns:
        The resolved recipe; modules stand in it as ``module:ClassName``.

    Raises:
        ValueError: an override that could have no effect, an unknown one, or a learning rate that
            would rise where it should fall.
        TypeError: a value of the wrong type.
    """
    loaded = Recipe.load(recipe)
    resolved = loaded.override(**overrides)
    if resolved.variant != loaded.variant and "width" not in overrides:
        resolved = resolved.override(width=None)  # it was the other variant's
    for loss in ("logit", "feature"):  # so were the options of another loss
        changed = getattr(resolved, f"{loss}_loss") != getattr(loaded, f"{loss}_loss")
        if changed and f"{loss}_options" not in overrides:
            resolved = resolved.override(**{f"{loss}_options": None})
    teacher = chosen_teacher(loaded, teacher)
    _refuse_without_effect(resolved, student, teacher, overrides)
    if teacher is None:  # and the record says so, whatever terms the recipe asks for
        resolved = resolved.override(**dict.fromkeys(WEIGHT_FIELDS, 0.0))
        resolved = resolved.override(**dict.fromkeys((*TEACHER_FIELDS, "ce_weight")))
    if student is not None:
        resolved = resolved.override(model=_name(student))
    if isinstance(data, str | Path):
        resolved = resolved.override(data=str(data))
    if not resolved.labels:
        _check_unlabelled(resolved, teacher, overrides)
    _check_schedule(resolved)
    _check_loss_options(resolved)
    return resolved.override(teacher=None if teacher is None else _name(teacher))


def _name(model: Any) -> str:
    if isinstance(model, Teacher):
        model = model.model
    return f"{MODULE_PREFIX}{type(model).__name__}" if isinstance(model, nn.Module) else str(model)


def _refuse_without_effect(
    resolved: Recipe, student: Any, teacher: Any, overrides: Mapping[str, Any]
) -> None:
    """Only what was asked for in so many words: a recipe may hold more than a run needs."""
    if isinstance(student, nn.Module):
        _refuse(overrides, STUDENT_FIELDS, "the student is given as a module")
    elif resolved.variant == "plain" and overrides.get("width") is not None:
        _refuse(overrides, ("width",), "variant='plain' has no width to choose")
    if teacher is None:
        _refuse_terms(overrides)
    elif resolved.alpha == 0 and resolved.feature_weight == 0:
        raise ValueError("teacher: with alpha=0 and feature_weight=0 it teaches nothing")
    for idle, names, reason in _idle(resolved):
        if idle:
            _refuse(_changed(overrides), names, reason)
    if resolved.augment not in ("cpu", "gpu"):
        reason = f"augment={resolved.augment!r} leaves timm's random transforms out"
        _refuse(overrides, RANDOM_FIELDS, reason)
    if resolved.augment == "none":
        _refuse(overrides, ("repeated_aug",), "with augment='none' all copies would be equal")


def _idle(recipe: Recipe) -> list[tuple[bool, tuple[str, ...], str]]:
    """(condition, fields, reason): where the condition holds, the fields do nothing."""
    return [
        (recipe.alpha == 0, LOGIT_FIELDS, "alpha is 0"),
        (not _has_temperature(recipe), ("tau",), f"{recipe.logit_loss!r} has no temperature"),
        (recipe.feature_weight == 0, FEATURE_FIELDS, "feature_weight is 0"),
        (not recipe.mixes, ("mixup_prob", "mixup_switch_prob"), "Mixup and CutMix are off"),
        (recipe.ema_decay is None, ("ema_warmup",), "there is no EMA"),
        (recipe.warmup_epochs == 0, ("warmup_lr",), "there is no warm-up"),
        (recipe.auto_augment is not None, ("color_jitter",), "auto_augment takes its place"),
    ]


def _changed(overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Overrides that differ from what a recipe has by itself; the others ask for nothing."""
    defaults = Recipe()
    return {name: v for name, v in overrides.items() if v != getattr(defaults, name, None)}


def _refuse_terms(overrides: Mapping[str, Any]) -> None:
    fields = [field.name for field in fields_by_group()["distillation"]]
    for name in (*TEACHER_FIELDS, *fields):
        value = overrides.get(name)
        if name in overrides and value is not None and not (name in WEIGHT_FIELDS and value == 0):
            raise ValueError(f"{name}: needs a teacher, and there is none (got {value!r})")


def _check_unlabelled(recipe: Recipe, teacher: Any, overrides: Mapping[str, Any]) -> None:
    """What would have needed labels."""
    if teacher is None:
        raise ValueError(
            "labels: without labels a student learns from a teacher, and there is none"
        )
    if recipe.mixes:
        raise ValueError("labels: Mixup and CutMix mix labels; set mixup=0 and cutmix=0")
    fields = ("label_smoothing", "ce_weight")
    _refuse(overrides, fields, "with labels=False there is no cross-entropy")
    if recipe.alpha > 0 and find_loss(recipe.logit_loss).load().needs_target:
        raise ValueError(f"labels: logit_loss={recipe.logit_loss!r} looks at them")


def _has_temperature(recipe: Recipe) -> bool:
    return has_temperature(find_loss(recipe.logit_loss))


def _check_loss_options(recipe: Recipe) -> None:
    """Options of the losses that the run uses."""
    if recipe.alpha > 0:
        check_options(find_loss(recipe.logit_loss), recipe.logit_options, "logit_options")
    if recipe.feature_weight > 0:
        check_options(find_loss(recipe.feature_loss), recipe.feature_options, "feature_options")


def _check_schedule(recipe: Recipe) -> None:
    """A cosine that ends above its peak, or a warm-up from above it, runs the wrong way."""
    peak = f"the learning rate {recipe.scaled_lr:g}"
    if recipe.lr_scaling:
        peak += f" (= lr {recipe.lr:g} x batch_size {recipe.batch_size} / 512)"
    if recipe.scaled_lr <= recipe.min_lr:
        raise ValueError(
            f"min_lr: {recipe.min_lr:g} is not below {peak}, so the cosine would not fall: raise "
            f"lr or batch_size, set lr_scaling=False, or lower min_lr"
        )
    if recipe.warmup_epochs > 0 and recipe.warmup_lr > recipe.scaled_lr:
        raise ValueError(
            f"warmup_lr: {recipe.warmup_lr:g} is above {peak}, so the warm-up would fall: lower "
            f"warmup_lr, or raise lr"
        )
