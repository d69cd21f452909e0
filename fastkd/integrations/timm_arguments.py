"""The terms of `FeatureMapDistillationTask`: described by a recipe, or built by the caller."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from timm.data import resolve_data_config
from torch import Tensor, nn

from fastkd.config import DistillConfig, Recipe
from fastkd.losses import FeatureKD
from fastkd.losses.base import FeatureTerm, Key, LogitTerm
from fastkd.losses.projectors import check_widths, fused_weights
from fastkd.models import LiftVisionTransformer, Taps, Teacher
from fastkd.models.timm_models import fixed_input_size

# Arguments of timm's own tasks, as its train.py passes them -> what takes their place here.
OF_TIMMS_TASKS = {
    "distill_loss_weight": "alpha weights the logit term, feature_weight the feature term",
    "student_feature_dim": "widths are found out",
    "teacher_feature_dim": "widths are found out",
    "temperature": "the temperature is tau",
    "loss_type": "the loss of logits is logit_loss",
}
_PREFIXES = ("student_prefix", "teacher_prefix")


def refuse_arguments_of_timm(options: Collection[str]) -> None:
    """Refuse an argument of timm's own tasks, and name what takes its place."""
    for name in options:
        if name in OF_TIMMS_TASKS:
            raise TypeError(
                f"FeatureMapDistillationTask: {name} is an argument of timm's tasks; leave it out: "
                f"here {OF_TIMMS_TASKS[name]}"
            )


def described_terms(
    recipe: str | os.PathLike[str] | Recipe | None,
    options: Mapping[str, Any],
    task_loss_weight: float | None,
) -> Recipe:
    """Take the group "distillation" of a recipe, with ``options`` and the criterion's weight."""
    known = list(DistillConfig.model_fields)
    for name in options:
        if name not in known or name == "ce_weight":
            raise ValueError(
                f"FeatureMapDistillationTask: {name!r} is none of the options of distillation, "
                f"which are {', '.join(n for n in known if n != 'ce_weight')}; the criterion's "
                "weight is task_loss_weight"
            )
    source = Recipe.load(recipe)
    chosen = {name: getattr(source, name) for name in known} | dict(options)
    if task_loss_weight is not None:
        chosen["ce_weight"] = task_loss_weight
    return Recipe(**chosen)  # the other groups keep their defaults


def check_ready_terms(
    logit: LogitTerm | None, feature: FeatureTerm | None, recipe: Any, options: Mapping[str, Any]
) -> None:
    """Refuse what is no term, and a description beside ready terms."""
    kinds = (LogitTerm, "SoftKD(tau, alpha)"), (FeatureTerm, 'FeatureKD("mse", pairs)')
    for name, term, (kind, example) in zip(
        ("logit", "feature"), (logit, feature), kinds, strict=True
    ):
        if term is not None and not isinstance(term, kind):
            raise TypeError(
                f"FeatureMapDistillationTask: {name} must be a {kind.__name__} such as {example}, "
                f"got {term!r} (a loss is named with {name}_loss=)"
            )
    taken = () if feature is None else _PREFIXES
    given = [*(["recipe"] if recipe is not None else []), *(n for n in options if n not in taken)]
    if given:
        raise ValueError(
            f"FeatureMapDistillationTask: {', '.join(given)} describe terms, and ready ones are "
            "given with logit or feature; give one or the other"
        )


def tap_ready_term(
    feature: FeatureTerm,
    student: nn.Module,
    teacher: Teacher,
    options: Mapping[str, Any],
    device: torch.device,
) -> Taps:
    """Tap what a ready term compares, and refuse now what the first step would refuse.

    Channels of layers tapped by name are found by running the models once, which needs the
    student's input size; without it, they are checked at the first step.
    """
    student_keys, teacher_keys = zip(*feature.pairs, strict=True)
    prefixes = [options.get(name, 0) for name in _PREFIXES]  # class and register tokens
    for name, prefix, keys in zip(_PREFIXES, prefixes, (student_keys, teacher_keys), strict=True):
        if prefix and not all(isinstance(key, str) for key in keys):
            raise ValueError(
                f"FeatureMapDistillationTask: {name} must be 0 where blocks are paired by number "
                f"(their prefix is known), got {prefix}"
            )
    taps = Taps(student, student_keys, num_prefix=prefixes[0])
    targets = teacher.tap(teacher_keys, num_prefix=prefixes[1])
    for keys, tapped in ((student_keys, taps), (teacher_keys, targets)):
        if not set(keys) <= set(tapped.indices):
            raise ValueError(
                "FeatureMapDistillationTask: pairs of a ready feature term must count blocks from "
                f"the front, got {keys}, which are {tapped.indices}"
            )
    if feature.lifts and not isinstance(student, LiftVisionTransformer):
        raise ValueError(
            "FeatureMapDistillationTask: the feature term compares lifted tokens, which a student "
            f"with variant='lift' has, and {type(student).__name__} has not"
        )
    by_name = any(isinstance(key, str) for key in (*student_keys, *teacher_keys))
    if isinstance(feature, FeatureKD) and not (by_name and _input_size(student) is None):
        if by_name:  # a block's width is known, a named layer's is not
            example = example_input(student, device)
            taps.probe(example)
            targets.probe(teacher.prepare(example))
        _check_widths(feature, student, taps, targets)
    return taps


def _check_widths(feature: FeatureKD, student: nn.Module, taps: Taps, targets: Taps) -> None:
    student_dims = taps.dims
    if feature.lifts and isinstance(student, LiftVisionTransformer):
        # Lifted tokens are as wide as the input of the student's head.
        student_dims = dict.fromkeys(student_dims, student.num_features)
    all_widths = feature.widths(student_dims, targets.dims)
    for index, (pair, widths) in enumerate(zip(feature.pairs, all_widths, strict=True)):
        distance = feature.distances[index if len(feature.distances) > 1 else 0]
        equal = getattr(distance, "equal_widths", False)
        check_widths(feature.projector, pair, *widths, equal_widths=equal)
        # A projector that is one Linear has the widths that it was made for.
        weights = fused_weights(feature.projectors[index]) if feature.projectors else None
        if weights is not None and tuple(weights[0].shape) != widths[::-1]:
            _refuse_widths(pair, widths, tuple(weights[0].shape)[::-1])


def _refuse_widths(pair: tuple[Key, Key], widths: Sequence[int], made_for: Sequence[int]) -> None:
    raise ValueError(
        f"FeatureMapDistillationTask: pair {pair[0]}:{pair[1]}: student has {widths[0]} channels, "
        f"teacher {widths[1]}; the feature term's projector was made for {made_for[0]} and "
        f"{made_for[1]} (student_dims, teacher_dims)"
    )


def data_config(student: nn.Module) -> dict[str, Any]:
    """How timm's loaders prepare images for a model by default."""
    cfg = getattr(student, "pretrained_cfg", None) or {}
    channels = {"in_chans": getattr(student, "in_chans", 3)}
    return dict(resolve_data_config(channels, pretrained_cfg=cfg))


def example_input(student: nn.Module, device: torch.device) -> Tensor:
    """One input of the student, to find the channels of layers tapped by name."""
    size = _input_size(student) or data_config(student)["input_size"][-2:]
    dtype = next(student.parameters()).dtype
    return torch.zeros(1, getattr(student, "in_chans", 3), *size, device=device, dtype=dtype)


def _input_size(student: nn.Module) -> tuple[int, ...] | None:
    """(H, W) of the images that a model is built for, as far as it is known."""
    cfg = getattr(student, "pretrained_cfg", None) or {}
    fixed = fixed_input_size(student)
    return fixed or (tuple(cfg["input_size"][-2:]) if "input_size" in cfg else None)
