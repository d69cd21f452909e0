"""Distillation of logits that treats the label's class and the others apart: DKD and NKD.

Knows logits and labels. What is softened here are the others among themselves, which a confident
teacher's probabilities would hide.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastkd.losses.base import LogitTerm, check_logits
from fastkd.losses.softening import (
    check_classes,
    check_not_negative,
    check_positive,
    frozen,
    mean_kl,
    mean_of,
    soften,
)


class DKD(LogitTerm):
    r"""Decoupled distillation: the KL taken apart into the target class and the others.

    .. math:: L = \tau^2 \, \frac{1}{B} \sum_i [a \, KL(b_t \| b_s) + o \, KL(q_t \| q_s)]

    with b = (p[y], 1 - p[y]), the softened probability of the target class y against all others
    together, and q the softmax over the others alone; a is ``target_weight`` and o
    ``other_weight``. Sums run over classes, the mean over images. `SoftKD` is the case a = 1 with
    o = 1 - p_t[y], of each image: what a confident teacher would hide, o brings out.

    Source: Zhao et al. 2022 (arXiv 2203.08679), who call the weights alpha and beta. On CIFAR-100
    they take tau 4 and (1, 8), on ImageNet tau 1 and (1, 0.5) for ResNet-34 to 18, (1, 2) for
    ResNet-50 to MobileNet. The defaults here are the first of ImageNet's, since ImageNet and tau 1
    are what this package's recipes are for. Two things differ from their code: all is computed from
    logarithms, so that no probability of zero is divided by or taken the logarithm of, and the term
    is not ramped up over the first epochs. They add it to the whole cross-entropy
    (`DistillationLoss` with ``ce_weight=1``).

    Args:
        tau: temperature, > 0.
        target_weight: of the target class against the rest, >= 0.
        other_weight: of the classes that are not the target, among each other, >= 0.
        weight: what the caller multiplies the term with; kept here, not applied here.

    Raises:
        ValueError: ``tau`` is not positive, or a weight is negative.
    """

    name = "dkd"
    needs_target = True

    def __init__(
        self,
        tau: float = 1.0,
        target_weight: float = 1.0,
        other_weight: float = 0.5,
        weight: float = 1.0,
    ) -> None:
        super().__init__()
        check_positive(self, "tau", tau)
        check_not_negative(self, "target_weight", target_weight)
        check_not_negative(self, "other_weight", other_weight)
        self.tau = tau
        self.target_weight = target_weight
        self.other_weight = other_weight
        self.weight = weight

    def forward(self, student: Tensor, teacher: Tensor, target: Tensor | None = None) -> Tensor:
        """Compare two batches of logits.

        Args:
            student: [B, classes], two classes or more; receives the gradient.
            teacher: [B, classes]; receives none.
            target: [B] class indices in [0, classes), none of them (-100, say) to be ignored; or
                [B, classes] soft targets (Mixup, CutMix, one-hot), of which the largest is the
                target class.

        Returns:
            Scalar, unweighted.

        Raises:
            ValueError: the shapes differ, there is one class only, no target, or a boolean one.
            RuntimeError: a class index out of range, told by a failed assertion on CUDA.
        """
        label = _label(self, student, teacher, target)
        student_target, student_others = _split(soften(student, self.tau), label)
        teacher_target, teacher_others = _split(frozen(teacher, self.tau), label)
        of_target = mean_kl(
            _against_rest(student_target, student_others),
            _against_rest(teacher_target, teacher_others),
        )
        of_others = mean_kl(student_others, teacher_others)
        return self.tau**2 * (self.target_weight * of_target + self.other_weight * of_others)

    def extra_repr(self) -> str:
        """Options, for ``print``."""
        return (
            f"tau={self.tau}, target_weight={self.target_weight}, "
            f"other_weight={self.other_weight}, weight={self.weight}"
        )


class NKD(LogitTerm):
    r"""Normalised distillation: the target class as the teacher weighs it, and the others' shares.

    .. math:: L = -\frac{1}{B} \sum_i \Big[ p_t[y] \log p_s[y]
                  + \gamma \tau^2 \sum_{c \ne y} q_t[c] \log q_s[c] \Big]

    with p the class probabilities, at temperature 1 whatever tau is, and q the softmax of
    logits / tau over the classes that are not the target y. Sums run over classes, the mean over
    images. Two cross-entropies: between equal logits it is the teacher's entropies, not zero.

    Source: Yang et al. 2023 (arXiv 2303.13005), as their code has it: there, too, tau softens the
    others only. On ImageNet they take tau 1 and gamma 1.5 for ResNet-34 to 18, 1 for DeiT-Tiny,
    and add the term to the whole cross-entropy (`DistillationLoss` with ``ce_weight=1``).

    Args:
        tau: temperature of the others, > 0.
        gamma: weight of the others, >= 0.
        weight: what the caller multiplies the term with; kept here, not applied here.

    Raises:
        ValueError: ``tau`` is not positive, or ``gamma`` is negative.
    """

    name = "nkd"
    needs_target = True

    def __init__(self, tau: float = 1.0, gamma: float = 1.5, weight: float = 1.0) -> None:
        super().__init__()
        check_positive(self, "tau", tau)
        check_not_negative(self, "gamma", gamma)
        self.tau = tau
        self.gamma = gamma
        self.weight = weight

    def forward(self, student: Tensor, teacher: Tensor, target: Tensor | None = None) -> Tensor:
        """Compare two batches of logits.

        Args:
            student: [B, classes], two classes or more; receives the gradient.
            teacher: [B, classes]; receives none.
            target: [B] class indices in [0, classes), none of them (-100, say) to be ignored; or
                [B, classes] soft targets (Mixup, CutMix, one-hot), of which the largest is the
                target class.

        Returns:
            Scalar, unweighted.

        Raises:
            ValueError: the shapes differ, there is one class only, no target, or a boolean one.
            RuntimeError: a class index out of range, told by a failed assertion on CUDA.
        """
        label = _label(self, student, teacher, target)
        log_student, _ = _split(F.log_softmax(soften(student), dim=-1), label)
        log_teacher, _ = _split(F.log_softmax(frozen(teacher), dim=-1), label)
        of_target = -(log_teacher.exp() * log_student).sum()
        _, student_others = _split(soften(student, self.tau), label)
        _, teacher_others = _split(frozen(teacher, self.tau), label)
        shares = teacher_others.softmax(dim=-1)
        of_others = F.cross_entropy(student_others, shares, reduction="sum")
        return mean_of(of_target + self.gamma * self.tau**2 * of_others, len(student))

    def extra_repr(self) -> str:
        """Options, for ``print``."""
        return f"tau={self.tau}, gamma={self.gamma}, weight={self.weight}"


def _split(logits: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
    """The target class's logits [B, 1], and those of the others [B, classes - 1] in their order."""
    label = label.unsqueeze(1)
    places = torch.arange(logits.shape[1] - 1, device=logits.device)
    return logits.gather(1, label), logits.gather(1, places + (places >= label))


def _against_rest(target: Tensor, others: Tensor) -> Tensor:
    """Logits [B, 2] of the target class and of all others together."""
    return torch.cat([target, others.logsumexp(dim=-1, keepdim=True)], dim=-1)


def _label(term: LogitTerm, student: Tensor, teacher: Tensor, target: Tensor | None) -> Tensor:
    """Class indices [B], once everything that came with them has been checked."""
    check_logits(term, student, teacher)
    check_classes(term, student)
    name, (batch, classes) = type(term).__name__, student.shape
    if target is None:
        raise ValueError(f"{name}: target must be given (the labels of the batch), got None")
    boolean = target.dtype == torch.bool  # as an index it would mean class 0 or 1
    if target.shape == (batch, classes) and not boolean:
        return target.argmax(dim=-1)
    if target.shape != (batch,) or target.is_floating_point() or boolean:
        raise ValueError(
            f"{name}: target must be class indices [{batch}] or soft targets [{batch}, {classes}], "
            f"got {list(target.shape)} of {target.dtype}"
        )
    return target.long()
