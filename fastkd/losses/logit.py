"""Distillation of logits: soft (Hinton et al.) and hard (DeiT).

Knows nothing of tokens. The reduction is part of each definition, because the field's codes differ
in it: DeiT's own trainer divides the summed KL by the number of elements, this one by the batch.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from fastkd.ops.precision import at_least_float32


def _check_classes(term: str, student: Tensor, teacher: Tensor) -> None:
    if student.shape != teacher.shape:
        raise ValueError(
            f"{term}: teacher logits must be {list(student.shape)} like the student's, got "
            f"{list(teacher.shape)} (a teacher of another data set? alpha=0 distils features only)"
        )


class SoftKD(nn.Module):
    r"""Soft distillation: :math:`\tau^2 \, KL(p_t^\tau \| p_s^\tau)`, averaged over the batch.

    With :math:`p^\tau = softmax(logits / \tau)`; the sum runs over classes, the mean over images
    (``batchmean``), in float32 at least. Source: Hinton, Vinyals, Dean 2015 (arXiv 1503.02531).

    Args:
        tau: temperature, > 0.
        weight: what the caller multiplies the term with; kept here, not applied here.

    Raises:
        ValueError: ``tau`` is not positive.
    """

    name = "soft_kd"

    def __init__(self, tau: float = 1.0, weight: float = 1.0) -> None:
        super().__init__()
        if tau <= 0:
            raise ValueError(f"SoftKD: tau must be positive, got {tau}")
        self.tau = tau
        self.weight = weight

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Compare two batches of logits.

        Args:
            student: [B, classes]; receives the gradient.
            teacher: [B, classes]; receives none.

        Returns:
            Scalar, unweighted.

        Raises:
            ValueError: the shapes differ.
        """
        _check_classes("SoftKD", student, teacher)
        log_student = F.log_softmax(at_least_float32(student) / self.tau, dim=-1)
        log_teacher = F.log_softmax(at_least_float32(teacher.detach()) / self.tau, dim=-1)
        kl = F.kl_div(log_student, log_teacher, reduction="batchmean", log_target=True)
        return self.tau**2 * kl

    def extra_repr(self) -> str:
        """Options, for ``print``."""
        return f"tau={self.tau}, weight={self.weight}"


class HardKD(nn.Module):
    """Hard distillation: cross-entropy against the teacher's arg max, averaged over the batch.

    Source: Touvron et al. 2021 (DeiT, arXiv 2012.12877), eq. 3, without a distillation token.

    Args:
        weight: what the caller multiplies the term with; kept here, not applied here.
    """

    name = "hard_kd"

    def __init__(self, weight: float = 1.0) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Compare two batches of logits.

        Args:
            student: [B, classes]; receives the gradient.
            teacher: [B, classes]; receives none.

        Returns:
            Scalar, unweighted.

        Raises:
            ValueError: the shapes differ.
        """
        _check_classes("HardKD", student, teacher)
        return F.cross_entropy(at_least_float32(student), teacher.argmax(dim=-1))

    def extra_repr(self) -> str:
        """Options, for ``print``."""
        return f"weight={self.weight}"
