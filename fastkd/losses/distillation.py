"""The weighted sum of cross-entropy, logit distillation and feature distillation."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastkd.losses.base import FeatureTerm, Key, LogitTerm, check_numbers
from fastkd.losses.logit import check_logits, check_target, expected
from fastkd.losses.projectors import undecayed
from fastkd.ops.checks import at_least_float32
from fastkd.tokens import Tokens
from fastkd.utils.argument_checks import describe


class DistillationLoss(nn.Module):
    r"""Cross-entropy, logit and feature distillation in one sum.

    .. math:: L = c \, CE + \alpha \, KD + w \, L_{feature}, \quad c = 1 - \alpha \text{ by default}

    as in arXiv 2511.15572. The authors of DKD, NKD and DIST take c = 1.

    Args:
        logit: a logit loss, such as `SoftKD`, whose ``weight`` is :math:`\alpha`, or None.
        feature: a feature loss, such as `FeatureKD`, whose ``weight`` is w, or None.
        label_smoothing: in [0, 1), for class indices; soft targets (Mixup) are used as they are.
        cross_entropy: False leaves the cross-entropy out (training without labels).
        ce_weight: c; None is :math:`1 - \alpha`.

    Raises:
        ValueError: :math:`\alpha` above 1 without ``ce_weight``, ``ce_weight`` without
            ``cross_entropy``, or no loss at all.
    """

    def __init__(
        self,
        logit: LogitTerm | None = None,
        feature: FeatureTerm | None = None,
        label_smoothing: float = 0.0,
        cross_entropy: bool = True,
        ce_weight: float | None = None,
    ) -> None:
        super().__init__()
        _check_term("logit", logit, LogitTerm, "SoftKD(weight=0.5)")
        _check_term("feature", feature, FeatureTerm, 'FeatureKD("mse", [(11, 23)])')
        alpha = 0.0 if logit is None else logit.weight
        feature_weight = 0.0 if feature is None else feature.weight
        check_numbers(self, alpha=(alpha, 0.0), feature_weight=(feature_weight, 0.0))
        check_numbers(self, label_smoothing=(label_smoothing, 0.0))
        if ce_weight is not None:
            check_numbers(self, ce_weight=(ce_weight, 0.0))
        if label_smoothing >= 1:
            raise ValueError(
                f"DistillationLoss: label_smoothing must be below 1, got {label_smoothing}"
            )
        if alpha > 1 and cross_entropy and ce_weight is None:
            raise ValueError(
                f"DistillationLoss: alpha must lie in [0, 1] without ce_weight, got {alpha}"
            )
        if ce_weight is not None and not cross_entropy:
            raise ValueError(
                f"DistillationLoss: ce_weight needs cross_entropy, got ce_weight={ce_weight} with "
                "cross_entropy=False"
            )
        if not cross_entropy and logit is None and feature is None:
            raise ValueError("DistillationLoss: without cross_entropy it needs logit or feature")
        self.logit = logit
        self.feature = feature
        self.label_smoothing = label_smoothing
        self.cross_entropy = cross_entropy
        self._ce_weight = ce_weight

    @property
    def ce_weight(self) -> float:
        """Weight of the cross-entropy."""
        if self._ce_weight is not None:
            return self._ce_weight
        return 1 - (0.0 if self.logit is None else self.logit.weight)

    @property
    def names(self) -> tuple[str, ...]:
        """Keys of the dict that `forward` returns, ``"loss"`` first."""
        terms = [term.name for term in (self.logit, self.feature) if term is not None]
        return ("loss", *(("ce",) if self.cross_entropy else ()), *terms)

    def forward(
        self,
        logits: Tensor,
        target: Tensor,
        teacher_logits: Tensor | None = None,
        student_tokens: Mapping[Key, Tokens] | None = None,
        teacher_tokens: Mapping[Key, Tokens] | None = None,
    ) -> dict[str, Tensor]:
        """Compute the total and every part.

        Args:
            logits: [B, classes], the student's.
            target: [B] class indices, or [B, classes] soft targets; read if a part needs it.
            teacher_logits: [B, classes]; needed with a logit loss.
            student_tokens: by tap key; needed with a feature loss.
            teacher_tokens: by tap key; needed with a feature loss.

        Returns:
            Scalars: ``"loss"`` (the total), and each part of `names` unweighted.

        Raises:
            ValueError: what a part needs is missing.
        """
        distance = None
        if self.feature is not None:
            if student_tokens is None or teacher_tokens is None:
                raise ValueError("DistillationLoss: feature needs student_tokens, teacher_tokens")
            distance = self.feature.compare(student_tokens, teacher_tokens)
        return self.combine(logits, target, teacher_logits, distance)

    def combine(
        self,
        logits: Tensor,
        target: Tensor,
        teacher_logits: Tensor | None = None,
        distance: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Compute what `forward` does, with a feature distance that the caller has.

        Args:
            logits: [B, classes], the student's.
            target: [B] class indices, or [B, classes] soft targets.
            teacher_logits: [B, classes]; needed with a logit loss.
            distance: scalar, the unweighted feature loss; needed with one.

        Returns:
            The scalars that `forward` returns.

        Raises:
            ValueError: what a part needs is missing.
        """
        parts, weighted = {}, []
        if self.cross_entropy:
            parts["ce"] = self._cross_entropy(logits, target)
            weighted.append(self.ce_weight * parts["ce"])
        if self.logit is not None:
            if teacher_logits is None:
                raise ValueError(f"DistillationLoss: {self.logit.name} needs teacher_logits")
            labels = target if self.logit.needs_target else None
            parts[self.logit.name] = self.logit.compare(logits, teacher_logits, labels)
            weighted.append(self.logit.weight * parts[self.logit.name])
        if self.feature is not None:
            if distance is None:
                raise ValueError("DistillationLoss: the feature term needs its distance")
            parts[self.feature.name] = distance
            weighted.append(self.feature.weight * distance)
        total = weighted[0]
        for term in weighted[1:]:
            total = total + term
        return {"loss": total, **parts}

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """List the parameters of more than one dimension that timm must not decay."""
        return undecayed(self)

    def _cross_entropy(self, logits: Tensor, target: Tensor) -> Tensor:
        check_logits("DistillationLoss", "logits", logits)
        check_target("DistillationLoss", logits, target)
        logits = at_least_float32(logits)
        if len(logits) == 0:
            return logits.sum()  # 0, where the mean over no image is NaN
        if target.ndim == 2:
            return -expected(target, F.log_softmax(logits, dim=-1)) / len(logits)
        return F.cross_entropy(logits, target, label_smoothing=self.label_smoothing)


def _check_term(argument: str, term: object, kind: type, example: str) -> None:
    if term is not None and not isinstance(term, kind):
        raise TypeError(
            f"DistillationLoss: {argument} must be a {kind.__name__}, such as {example}, got "
            f"{describe(term)}"
        )
