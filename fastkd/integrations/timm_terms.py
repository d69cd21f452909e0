"""The terms of `FeatureMapDistillationTask`: described by a recipe, or ready modules."""

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
from fastkd.models.pretrained import fixed_input_size
from fastkd.training.task import build_feature_term, build_logit_term

BuiltTerms = tuple[LogitTerm | None, FeatureTerm | None, Taps | None]

# Arguments of timm's own tasks, as its train.py passes them -> what says the same here.
OF_TIMMS_TASKS = {
    "distill_loss_weight": "alpha weights the logit term, feature_weight the feature term",
    "student_feature_dim": "widths are found out",
    "teacher_feature_dim": "widths are found out",
    "temperature": "the temperature is tau",
    "loss_type": "the loss of logits is logit_loss",
}
_PREFIXES = ("student_prefix", "teacher_prefix")


class DescribedTerms:
    """Terms that a recipe describes, of which the group "distillation" is taken.

    Args:
        recipe: its name, file or object; None: the defaults.
        options: single fields of the group.
        task_loss_weight: takes the place of the recipe's ``ce_weight``, unless it is None.

    Attributes:
        compares_logits: whether the teacher needs a head of the student's classes.
        ce_weight: of the criterion; None: 1 - alpha.

    Raises:
        ValueError: an option of another group, or a value that the recipe refuses.
        TypeError: an argument of timm's own tasks.
    """

    def __init__(
        self,
        recipe: str | os.PathLike[str] | Recipe | None,
        options: Mapping[str, Any],
        task_loss_weight: float | None,
    ) -> None:
        known = _options()
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
        self._settings = Recipe(**chosen)  # what is no distillation keeps its default
        self.compares_logits = self._settings.alpha > 0
        self.ce_weight = self._settings.ce_weight

    def build(self, student: nn.Module, teacher: Teacher, device: torch.device) -> BuiltTerms:
        """Build both terms; the teacher taps from then on what they compare."""
        example = _example(student, device)
        taps, feature = build_feature_term(student, teacher, self._settings, example)
        return build_logit_term(self._settings), feature, taps


class ReadyTerms:
    """Terms that the caller has built.

    Args:
        logit: or None.
        feature: or None.
        recipe: must be None, because the terms say all.
        options: ``student_prefix`` and ``teacher_prefix``, of layers that ``feature`` names.
        task_loss_weight: as it is.

    Attributes:
        compares_logits: whether the teacher needs a head of the student's classes.
        ce_weight: of the criterion; None: 1 - alpha.

    Raises:
        ValueError: other options.
        TypeError: what is given is no term, or an argument of timm's own tasks.
    """

    def __init__(
        self,
        logit: LogitTerm | None,
        feature: FeatureTerm | None,
        recipe: Any,
        options: Mapping[str, Any],
        task_loss_weight: float | None,
    ) -> None:
        _check_kind("logit", logit, LogitTerm, "SoftKD(tau, alpha)")
        _check_kind("feature", feature, FeatureTerm, 'FeatureKD("mse", pairs)')
        _refuse_beside_terms(recipe, options, _PREFIXES if feature is not None else ())
        self._logit, self._feature = logit, feature
        self._prefixes = {name: options.get(name, 0) for name in _PREFIXES}
        self.compares_logits = logit is not None
        self.ce_weight = task_loss_weight

    def build(self, student: nn.Module, teacher: Teacher, device: torch.device) -> BuiltTerms:
        """Tap what the terms compare, and check that they can; otherwise as `DescribedTerms.build`.

        Channels of layers tapped by name are found out by running the models once, which needs a
        student that says its input size; without it, they are checked at the first step.
        """
        feature = self._feature
        if feature is None:
            return self._logit, None, None
        student_keys, teacher_keys = zip(*feature.pairs, strict=True)
        for name, keys in zip(_PREFIXES, (student_keys, teacher_keys), strict=True):
            _check_prefix(name, self._prefixes[name], keys)
        taps = Taps(student, student_keys, num_prefix=self._prefixes["student_prefix"])
        targets = teacher.tap(teacher_keys, num_prefix=self._prefixes["teacher_prefix"])
        _check_keys(student_keys, taps)
        _check_keys(teacher_keys, targets)
        _check_lift(feature, student)
        if isinstance(feature, FeatureKD):
            _check_widths_of(feature, student, taps, teacher, targets, device)
        return self._logit, feature, taps


def data_config(student: nn.Module) -> dict[str, Any]:
    """What timm's loaders do to images for a model by themselves."""
    cfg = getattr(student, "pretrained_cfg", None) or {}
    channels = {"in_chans": getattr(student, "in_chans", 3)}
    return dict(resolve_data_config(channels, pretrained_cfg=cfg))


def refuse_arguments_of_timm(options: Collection[str]) -> None:
    """Say what takes the place of an argument of timm's own tasks."""
    for name in options:
        if name in OF_TIMMS_TASKS:
            raise TypeError(
                f"FeatureMapDistillationTask: {name} is an argument of timm's tasks; leave it out: "
                f"here {OF_TIMMS_TASKS[name]}"
            )


def _options() -> list[str]:
    return list(DistillConfig.model_fields)


def _refuse_beside_terms(recipe: Any, options: Mapping[str, Any], taken: Collection[str]) -> None:
    given = [*(["recipe"] if recipe is not None else []), *(n for n in options if n not in taken)]
    if given:
        raise ValueError(
            f"FeatureMapDistillationTask: {', '.join(given)} describe terms, and ready ones are "
            "given with logit or feature; give one or the other"
        )


def _check_kind(argument: str, term: Any, kind: type, example: str) -> None:
    if term is not None and not isinstance(term, kind):
        raise TypeError(
            f"FeatureMapDistillationTask: {argument} must be a {kind.__name__} such as {example}, "
            f"got {term!r} (a loss is named with {argument}_loss=)"
        )


def _check_prefix(argument: str, prefix: int, keys: Sequence[Key]) -> None:
    if prefix and not all(isinstance(key, str) for key in keys):
        raise ValueError(
            f"FeatureMapDistillationTask: {argument} must be 0 where blocks are paired by number "
            f"(their prefix is known), got {prefix}"
        )


def _check_keys(keys: Sequence[Key], taps: Taps) -> None:
    if not set(keys) <= set(taps.indices):
        raise ValueError(
            "FeatureMapDistillationTask: pairs of a ready feature term must count blocks from "
            f"the front, got {keys}, which are {taps.indices}"
        )


def _check_lift(feature: FeatureTerm, student: nn.Module) -> None:
    if feature.lifts and not isinstance(student, LiftVisionTransformer):
        raise ValueError(
            "FeatureMapDistillationTask: the feature term compares lifted tokens, which a student "
            f"with variant='lift' has, and {type(student).__name__} has not"
        )


def _check_widths_of(
    feature: FeatureKD,
    student: nn.Module,
    taps: Taps,
    teacher: Teacher,
    targets: Taps,
    device: torch.device,
) -> None:
    """Refuse now what the first step would refuse."""
    by_name = any(isinstance(key, str) for pair in feature.pairs for key in pair)
    if by_name and _input_size(student) is None:
        return
    if by_name:
        example = _example(student, device)
        taps.probe(example)
        targets.probe(teacher.prepare(example))
    student_dims = taps.dims
    if feature.lifts and isinstance(student, LiftVisionTransformer):
        student_dims = dict.fromkeys(student_dims, student.num_features)
    for index, (pair, widths) in enumerate(
        zip(feature.pairs, feature.widths(student_dims, targets.dims), strict=True)
    ):
        distance = feature.distances[index if len(feature.distances) > 1 else 0]
        equal = getattr(distance, "equal_widths", False)
        check_widths(feature.projector, pair, *widths, equal_widths=equal)
        if feature.projectors:
            _check_linear(feature.projectors[index], pair, widths)


def _check_linear(layer: nn.Module, pair: tuple[Key, Key], widths: tuple[int, int]) -> None:
    """A projector that is one Linear says which widths it was made for."""
    weights = fused_weights(layer)
    if weights is None or tuple(weights[0].shape) == widths[::-1]:
        return
    made_for = tuple(weights[0].shape)[::-1]
    raise ValueError(
        f"FeatureMapDistillationTask: pair {pair[0]}:{pair[1]}: student has {widths[0]} channels, "
        f"teacher {widths[1]}; the feature term's projector was made for {made_for[0]} and "
        f"{made_for[1]} (student_dims, teacher_dims)"
    )


def _input_size(student: nn.Module) -> tuple[int, ...] | None:
    """(H, W) of the images that a model is built for, as far as it says so."""
    cfg = getattr(student, "pretrained_cfg", None) or {}
    if fixed_input_size(student) is None and "input_size" not in cfg:
        return None
    return fixed_input_size(student) or tuple(cfg["input_size"][-2:])


def _example(student: nn.Module, device: torch.device) -> Tensor:
    """One input of the student, on which the channels of layers tapped by name are found out."""
    size = _input_size(student) or data_config(student)["input_size"][-2:]
    dtype = next(student.parameters()).dtype
    return torch.zeros(1, getattr(student, "in_chans", 3), *size, device=device, dtype=dtype)
