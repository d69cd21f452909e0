"""`DistillationTask`: student and terms in one module that DDP wraps, without the teacher."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor, nn

from fastkd.config import DistillConfig, Recipe
from fastkd.losses import (
    DistillationLoss,
    FeatureKD,
    FeatureTerm,
    LogitTerm,
    create_feature_loss,
    create_logit_loss,
)
from fastkd.losses.projectors import undecayed
from fastkd.losses.registry import find_loss
from fastkd.models import LiftVisionTransformer, TapOutput, Taps, Teacher
from fastkd.models.taps import evaluating
from fastkd.recipe_fields import Key
from fastkd.tokens import Tokens

logger = logging.getLogger("fastkd")


class DistillationTask(nn.Module):
    """A student with its terms; learnable projectors are the terms' and are dropped at inference.

    Args:
        student: any timm model, or a module whose taps are named.
        terms: what is minimized.
        taps: the student's taps; None where no term compares features.

    Raises:
        ValueError: a term compares features and there are no taps.
    """

    def __init__(
        self, student: nn.Module, terms: DistillationLoss, taps: Taps | None = None
    ) -> None:
        super().__init__()
        if terms.feature is not None and taps is None:
            raise ValueError("DistillationTask: the feature term needs the student's taps")
        self.student = student
        self.terms = terms
        self.taps = taps
        self.decay_embeddings = False

    @property
    def needs_logits(self) -> bool:
        """Whether a term compares logits with a teacher's."""
        return self.terms.logit is not None

    @property
    def needs_tokens(self) -> bool:
        """Whether a term compares token maps with a teacher's."""
        return self.terms.feature is not None

    def forward(
        self, images: Tensor, target: Tensor, teacher_output: TapOutput | None = None
    ) -> dict[str, Tensor]:
        """One forward pass of the student and of every term.

        Args:
            images: [B, C, H, W], normalized for the student.
            target: [B] class indices or [B, classes] soft targets.
            teacher_output: the teacher's logits and tokens for the same images, where needed.

        Returns:
            ``"loss"`` (the total), ``"output"`` ([B, classes], the student's logits) and every
            unweighted term under its name.

        Raises:
            ValueError: a term needs the teacher's output and it is missing.
        """
        if (self.needs_logits or self.needs_tokens) and teacher_output is None:
            raise ValueError("DistillationTask: the terms need teacher_output, got None")
        logits, distance = self._run_student(images, teacher_output)
        teacher_logits = None if teacher_output is None else teacher_output.logits
        losses = self.terms.combine(logits, target, teacher_logits, distance)
        return {**losses, "output": logits}

    def _run_student(
        self, images: Tensor, teacher_output: TapOutput | None
    ) -> tuple[Tensor, Tensor | None]:
        """Return logits, and the distance to the teacher's tokens where a term compares them."""
        feature, taps = self.terms.feature, self.taps
        if feature is None or taps is None or teacher_output is None:
            return self.student(images), None
        if feature.lifts:
            return self._run_lifting_student(images, taps, feature, teacher_output.tokens)
        output = taps(images)
        return output.logits, feature.compare(output.tokens, teacher_output.tokens)

    def _run_lifting_student(
        self, images: Tensor, taps: Taps, feature: FeatureTerm, teacher: dict[Key, Tokens]
    ) -> tuple[Tensor, Tensor]:
        """Return logits and distance in one fused pass, or from written lifted tokens."""
        key = feature.pairs[0][0]
        options = feature.operator_options if isinstance(feature, FeatureKD) else None
        student = self.student
        lifts = isinstance(student, LiftVisionTransformer) and student.fuses_lift(images)
        if lifts and options is not None:
            tokens, target = feature.matched({key: taps.last_block(images)}, teacher)
            fused: Any = student.forward_head_kd
            return fused(tokens.data, target.data, grid=tokens.grid, **options)
        output = taps(images)
        if output.final is None:
            raise ValueError(
                "DistillationTask: projector='lift' needs a student with lifted tokens, such as "
                "variant='lift'"
            )
        return output.logits, feature.compare({key: output.final}, teacher)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Parameters that timm's optimizer factory must not decay, beside the 1-d ones."""
        listed = getattr(self.student, "no_weight_decay", None)
        embeddings = set() if self.decay_embeddings or listed is None else listed()
        return {
            *(f"student.{name}" for name in embeddings),
            *(f"terms.{name}" for name in undecayed(self.terms)),
        }


def build_task(
    student: nn.Module, teacher: Teacher | None, recipe: Recipe, example: Tensor
) -> DistillationTask:
    """Put a student and the terms of a recipe together, and let the teacher tap what they compare.

    Args:
        student: the module to train.
        teacher: None trains on labels alone, the matched run without distillation.
        recipe: its distillation group, labels, label smoothing.
        example: [1, C, H, W], an input of the student on the models' device; layers that are tapped
            by name are run once on it, to learn their channels.

    Returns:
        The task; learnable projectors are on the example's device.

    Raises:
        ValueError: widths that the projector cannot bring together, blocks that do not exist, or no
            term at all without labels.
    """
    logit, feature, taps = None, None, None
    if teacher is not None:
        logit = build_logit_term(recipe, recipe.labels)
        taps, feature = build_feature_term(student, teacher, recipe, example)
        if feature is not None and recipe.feature_loss == "crd" and recipe.repeated_aug > 1:
            logger.warning(
                "feature_loss='crd' takes the %d copies of an image in a batch for different "
                "images and pushes them apart; repeated_aug=1 avoids that",
                recipe.repeated_aug,
            )
    terms = DistillationLoss(
        logit,
        feature,
        recipe.label_smoothing,
        cross_entropy=recipe.labels,
        ce_weight=recipe.ce_weight if recipe.labels else None,
    ).to(example.device)
    task = DistillationTask(student, terms, taps)
    task.decay_embeddings = recipe.decay_pos_embed
    if not (recipe.labels or task.needs_logits):
        _freeze_unreached(task, teacher, example)
    return task


def _freeze_unreached(task: DistillationTask, teacher: Teacher | None, example: Tensor) -> None:
    """Freeze what a distance of features cannot train: the head, blocks behind the last tap."""
    # DDP waits for the gradient of every parameter that requires one.
    target = torch.zeros(len(example), dtype=torch.long, device=example.device)
    with evaluating(task):  # one image must not move running statistics
        output = task(example, target, None if teacher is None else teacher(example))
        output["loss"].backward()
    unreached = [p for p in task.parameters() if p.requires_grad and p.grad is None]
    for parameter in unreached:
        parameter.requires_grad_(False)
    task.zero_grad(set_to_none=True)
    if unreached:
        count = sum(parameter.numel() for parameter in unreached)
        logger.info("%d parameters of the student get no gradient from features: frozen", count)


def build_logit_term(config: DistillConfig, labels: bool = True) -> LogitTerm | None:
    """Build the logit loss of a recipe; None where its weight alpha is 0."""
    if config.alpha == 0:
        return None
    if labels and config.cross_entropy_weight == 0 and find_loss(config.logit_loss).whole_ce:
        logger.warning(
            "alpha=1 leaves nothing of the cross-entropy, to which logit_loss=%r is added by its "
            "authors: set ce_weight=1",
            config.logit_loss,
        )
    return create_logit_loss(
        config.logit_loss, weight=config.alpha, tau=config.tau, options=config.logit_options
    )


def build_feature_term(
    student: nn.Module, teacher: Teacher, config: DistillConfig, example: Tensor
) -> tuple[Taps, FeatureTerm] | tuple[None, None]:
    """Build the feature loss of a recipe and its taps; None twice where its weight is 0."""
    if config.feature_weight == 0:
        return None, None
    # One layer at a time, because taps merge what resolves to the same layer (-1 and 11).
    pairs = tuple(
        (Taps(student, [s]).indices[0], Taps(teacher.model, [t]).indices[0])
        for s, t in config.pairs
    )
    # Each side's layers, every one once.
    student_keys, teacher_keys = (list(dict.fromkeys(keys)) for keys in zip(*pairs, strict=True))
    taps = Taps(student, student_keys, num_prefix=config.student_prefix)
    teacher_taps = teacher.tap(teacher_keys, num_prefix=config.teacher_prefix)
    if config.projector != "lift":
        student_dims = _dims(taps, example)
    elif isinstance(student, LiftVisionTransformer):
        student_dims = dict.fromkeys(student_keys, student.num_features)
    else:
        raise ValueError(
            f"projector: 'lift' compares the lifted tokens of a student with variant='lift', "
            f"{type(student).__name__} has none"
        )
    if config.projector != "lift" and isinstance(student, LiftVisionTransformer):
        logger.warning(
            "projector=%r compares the tokens of the student's last block, before the lift; the "
            "paper's Lift takes projector='lift'",
            config.projector,
        )
    term = create_feature_loss(
        config.feature_loss,
        pairs,
        weight=config.feature_weight,
        projector=config.projector,
        student_dims=student_dims,
        teacher_dims=_dims(teacher_taps, teacher.prepare(example)),
        resample=config.resample,
        options=config.feature_options,
    )
    return taps, term


def _dims(taps: Taps, example: Tensor) -> dict[Key, int]:
    by_name = any(isinstance(key, str) for key in taps.indices)
    return taps.probe(example) if by_name else taps.dims
