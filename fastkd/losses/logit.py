"""Distillation of logits: soft, hard, correlated (DIST), and the decoupled two from next door.

Knows nothing of tokens. The reduction is part of each definition, because the field's codes differ
in it: DeiT's own trainer divides the summed KL by the number of elements, this one by the batch.
An empty batch costs 0, as it does in distances of tokens.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastkd.losses.base import LogitTerm, check_logits
from fastkd.losses.decoupled import DKD, NKD
from fastkd.losses.softening import (
    check_classes,
    check_not_negative,
    check_positive,
    frozen,
    mean_kl,
    mean_of,
    soften,
)
from fastkd.ops.precision import at_least_float32

__all__ = ["DIST", "DKD", "NKD", "HardKD", "SoftKD"]


class SoftKD(LogitTerm):
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
        check_positive(self, "tau", tau)
        self.tau = tau
        self.weight = weight

    def forward(self, student: Tensor, teacher: Tensor, target: Tensor | None = None) -> Tensor:
        """Compare two batches of logits.

        Args:
            student: [B, classes]; receives the gradient.
            teacher: [B, classes]; receives none.
            target: not looked at.

        Returns:
            Scalar, unweighted.

        Raises:
            ValueError: the shapes differ.
        """
        check_logits(self, student, teacher)
        return self.tau**2 * mean_kl(soften(student, self.tau), frozen(teacher, self.tau))

    def extra_repr(self) -> str:
        """Options, for ``print``."""
        return f"tau={self.tau}, weight={self.weight}"


class HardKD(LogitTerm):
    r"""Hard distillation: cross-entropy against the teacher's arg max, averaged over the batch.

    .. math:: L = -\frac{1}{B} \sum_i \log p_s[\arg\max p_t]

    Source: Touvron et al. 2021 (DeiT, arXiv 2012.12877), eq. 3, without a distillation token.

    Args:
        weight: what the caller multiplies the term with; kept here, not applied here.
    """

    name = "hard_kd"

    def __init__(self, weight: float = 1.0) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, student: Tensor, teacher: Tensor, target: Tensor | None = None) -> Tensor:
        """Compare two batches of logits.

        Args:
            student: [B, classes]; receives the gradient.
            teacher: [B, classes]; receives none.
            target: not looked at.

        Returns:
            Scalar, unweighted.

        Raises:
            ValueError: the shapes differ.
        """
        check_logits(self, student, teacher)
        choice = teacher.argmax(dim=-1)
        total = F.cross_entropy(at_least_float32(student), choice, reduction="sum")
        return mean_of(total, len(student))

    def extra_repr(self) -> str:
        """Options, for ``print``."""
        return f"weight={self.weight}"


class DIST(LogitTerm):
    r"""Correlation instead of equality: 1 - Pearson's, along classes and along the batch.

    .. math:: L = \tau^2 \Big[ e \, \Big(1 - \frac{1}{B} \sum_i \rho(P^s_{i:}, P^t_{i:})\Big)
                  + a \, \Big(1 - \frac{1}{C} \sum_c \rho(P^s_{:c}, P^t_{:c})\Big) \Big]

    with P = softmax(logits / tau), [B, C], e ``inter`` (between the classes of an image) and a
    ``intra`` (between the images of a class). With x and y centred, rho = <x, y> / (|x| |y| + eps).

    Source: Huang et al. 2022 (arXiv 2205.10536). Their eps, 1e-8, is no mere guard and is kept: a
    class that hardly occurs in the batch has products of norms of that order, and its share of the
    gradient fades. Their ImageNet code knows no tau, which is 1; tau^2 is the paper's for others.

    Where there is no spread there is no correlation: such a vector counts as rho = 0, as in their
    code. A batch of one has no spread at all, and ``intra`` is left out (their code adds a constant
    1). Correlation is blind to scale, so a student whose probabilities hardly differ (logits near
    zero) gets large gradients; of two classes it sees the order only.

    Args:
        tau: temperature, > 0.
        inter: weight of the correlation between an image's classes, >= 0.
        intra: weight of the correlation between a class's images, >= 0.
        eps: added to the product of norms, > 0.
        weight: what the caller multiplies the term with; kept here, not applied here.

    Raises:
        ValueError: ``tau`` or ``eps`` is not positive, or a weight is negative.
    """

    name = "dist"

    def __init__(
        self,
        tau: float = 1.0,
        inter: float = 1.0,
        intra: float = 1.0,
        eps: float = 1e-8,
        weight: float = 1.0,
    ) -> None:
        super().__init__()
        check_positive(self, "tau", tau)
        check_positive(self, "eps", eps)
        check_not_negative(self, "inter", inter)
        check_not_negative(self, "intra", intra)
        self.tau = tau
        self.inter = inter
        self.intra = intra
        self.eps = eps
        self.weight = weight

    def forward(self, student: Tensor, teacher: Tensor, target: Tensor | None = None) -> Tensor:
        """Compare two batches of logits.

        Args:
            student: [B, classes], two classes or more; receives the gradient.
            teacher: [B, classes]; receives none.
            target: not looked at.

        Returns:
            Scalar, unweighted.

        Raises:
            ValueError: the shapes differ, or there is one class only.
        """
        check_logits(self, student, teacher)
        check_classes(self, student)
        of_student = soften(student, self.tau).softmax(dim=-1)
        of_teacher = frozen(teacher, self.tau).softmax(dim=-1)
        between = (1 - _pearson(of_student, of_teacher, 1, self.eps)).sum()
        loss = self.inter * mean_of(between, len(student))
        if len(student) > 1:
            loss = loss + self.intra * (1 - _pearson(of_student, of_teacher, 0, self.eps).mean())
        return self.tau**2 * loss

    def extra_repr(self) -> str:
        """Options, for ``print``."""
        return (
            f"tau={self.tau}, inter={self.inter}, intra={self.intra}, eps={self.eps}, "
            f"weight={self.weight}"
        )


def _pearson(x: Tensor, y: Tensor, dim: int, eps: float) -> Tensor:
    """Correlations along a dimension; 0 where one side has no spread."""
    x, y = x - x.mean(dim, keepdim=True), y - y.mean(dim, keepdim=True)
    norms = torch.linalg.vector_norm(x, dim=dim) * torch.linalg.vector_norm(y, dim=dim)
    return (x * y).sum(dim) / (norms + eps)
