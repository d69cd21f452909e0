"""Losses between logits: soft, hard, correlated (DIST) and decoupled (DKD, NKD) distillation."""

# The reduction is part of each definition, because published codes differ in it: DeiT's own trainer
# divides the summed KL by the number of elements, `SoftKD` by the number of images.

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from fastkd.losses.base import POSITIVE, LogitTerm, check_numbers, check_sides
from fastkd.ops.checks import at_least_float32, check_float
from fastkd.utils.argument_checks import describe


class SoftKD(LogitTerm):
    r"""Soft distillation: :math:`\tau^2 \, KL(p_t^\tau \| p_s^\tau)`, averaged over the batch.

    With :math:`p^\tau = softmax(logits / \tau)`, summed over classes. Source: Hinton, Vinyals, Dean
    2015 (arXiv 1503.02531).

    Args:
        tau: temperature, > 0.
        weight: factor of the loss.
    """

    name = "soft_kd"

    def __init__(self, tau: float = 1.0, weight: float = 1.0) -> None:
        super().__init__()
        check_numbers(self, tau=(tau, POSITIVE), weight=(weight, 0.0))
        self.tau = tau
        self.weight = weight

    def compare(self, student: Tensor, teacher: Tensor, target: Tensor | None = None) -> Tensor:
        check_logit_pair(self, student, teacher)
        return self.tau**2 * _mean_kl(
            _soften(student, self.tau), _soften(teacher.detach(), self.tau)
        )


class HardKD(LogitTerm):
    r"""Hard distillation: cross-entropy against the teacher's arg max, averaged over the batch.

    .. math:: L = -\frac{1}{B} \sum_i \log p_s[\arg\max p_t]

    Source: Touvron et al. 2021 (DeiT, arXiv 2012.12877), eq. 3, without a distillation token.

    Args:
        weight: factor of the loss.
    """

    name = "hard_kd"

    def __init__(self, weight: float = 1.0) -> None:
        super().__init__()
        check_numbers(self, weight=(weight, 0.0))
        self.weight = weight

    def compare(self, student: Tensor, teacher: Tensor, target: Tensor | None = None) -> Tensor:
        check_logit_pair(self, student, teacher)
        largest, choice = teacher.detach().max(dim=-1)
        total = F.cross_entropy(at_least_float32(student), choice, reduction="sum")
        # A row of NaN or of -inf alone has no largest class, though max() returns one.
        lost = torch.where((largest > -torch.inf).all(), 0.0, torch.nan)
        return _mean_of(total + lost, len(student))


class DIST(LogitTerm):
    r"""Correlation instead of equality: 1 - Pearson's, along classes and along the batch.

    .. math:: L = \tau^2 \Big[ e \, \Big(1 - \frac{1}{B} \sum_i \rho(P^s_{i:}, P^t_{i:})\Big)
                  + a \, \Big(1 - \frac{1}{C} \sum_c \rho(P^s_{:c}, P^t_{:c})\Big) \Big]

    with P = softmax(logits / tau), [B, C], e ``inter`` (between the classes of an image), a
    ``intra`` (between the images of a class), and rho = <x, y> / (|x| |y| + eps) of centered x, y.

    Source: Huang et al. 2022 (arXiv 2205.10536); their ImageNet code has no tau. ``intra`` is left
    out for a batch of one, where their code adds 1. Logits near zero get large gradients.

    Args:
        tau: temperature, > 0.
        inter: weight of the correlation between an image's classes, >= 0.
        intra: weight of the correlation between a class's images, >= 0.
        eps: added to the product of norms, > 0; the authors' 1e-8 lets the gradient of classes
            that hardly occur in the batch fade.
        weight: factor of the loss.
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
        check_numbers(self, tau=(tau, POSITIVE), eps=(eps, POSITIVE))
        check_numbers(self, inter=(inter, 0.0), intra=(intra, 0.0), weight=(weight, 0.0))
        self.tau = tau
        self.inter = inter
        self.intra = intra
        self.eps = eps
        self.weight = weight

    def compare(self, student: Tensor, teacher: Tensor, target: Tensor | None = None) -> Tensor:
        check_logit_pair(self, student, teacher, min_classes=2)
        of_student = _soften(student, self.tau).softmax(dim=-1)
        of_teacher = _soften(teacher.detach(), self.tau).softmax(dim=-1)
        between = (1 - _pearson(of_student, of_teacher, 1, self.eps)).sum()
        loss = self.inter * _mean_of(between, len(student))
        if len(student) > 1:  # one image has no spread within a class
            loss = loss + self.intra * (1 - _pearson(of_student, of_teacher, 0, self.eps).mean())
        return self.tau**2 * loss


class DKD(LogitTerm):
    r"""Decoupled distillation: the KL split into the target class and the others.

    .. math:: L = \tau^2 \, \frac{1}{B} \sum_i [a \, KL(b_t \| b_s) + o \, KL(q_t \| q_s)]

    with b = (p[y], 1 - p[y]), the softened probability of the target class y against all others, q
    the softmax over the others, a ``target_weight`` and o ``other_weight``. `SoftKD` is a = 1 with
    o = 1 - p_t[y] for each image.

    Source: Zhao et al. 2022 (arXiv 2203.08679), whose alpha and beta are a and o: tau 4 and (1, 8)
    on CIFAR-100; tau 1 and (1, 0.5), the defaults, for ResNet-34 to 18 on ImageNet. They add it to
    the whole cross-entropy, and ramp it up at first.

    Args:
        tau: temperature, > 0.
        target_weight: of the target class against the rest, >= 0.
        other_weight: of the other classes among each other, >= 0.
        weight: factor of the loss.
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
        check_numbers(self, tau=(tau, POSITIVE), weight=(weight, 0.0))
        check_numbers(self, target_weight=(target_weight, 0.0), other_weight=(other_weight, 0.0))
        self.tau = tau
        self.target_weight = target_weight
        self.other_weight = other_weight
        self.weight = weight

    def compare(self, student: Tensor, teacher: Tensor, target: Tensor | None = None) -> Tensor:
        label = _label(self, student, teacher, target)
        # From logarithms, where the authors' code takes those of probabilities: 0 does no harm.
        student_target, student_others = _split(_soften(student, self.tau), label)
        teacher_target, teacher_others = _split(_soften(teacher.detach(), self.tau), label)
        of_target = _mean_kl(
            _against_rest(student_target, student_others),
            _against_rest(teacher_target, teacher_others),
        )
        of_others = _mean_kl(student_others, teacher_others)
        total = self.target_weight * of_target + self.other_weight * of_others
        return self.tau**2 * total * _one(target)


class NKD(LogitTerm):
    r"""Normalized distillation: the target class as the teacher weighs it, and the others' shares.

    .. math:: L = -\frac{1}{B} \sum_i \Big[ p_t[y] \log p_s[y]
                  + \gamma \tau^2 \sum_{c \ne y} q_t[c] \log q_s[c] \Big]

    with p the class probabilities at temperature 1 and q the softmax of logits / tau over the
    classes other than the target y. Both parts are cross-entropies: not zero for equal logits.

    Source: Yang et al. 2023 (arXiv 2303.13005), following their code, where tau softens the others
    only. On ImageNet they take tau 1 and gamma 1.5 for ResNet-34 to 18, 1 for DeiT-Tiny, and add
    the loss to the whole cross-entropy.

    Args:
        tau: temperature of the others, > 0.
        gamma: weight of the others, >= 0.
        weight: factor of the loss.
    """

    name = "nkd"
    needs_target = True

    def __init__(self, tau: float = 1.0, gamma: float = 1.5, weight: float = 1.0) -> None:
        super().__init__()
        check_numbers(self, tau=(tau, POSITIVE), gamma=(gamma, 0.0), weight=(weight, 0.0))
        self.tau = tau
        self.gamma = gamma
        self.weight = weight

    def compare(self, student: Tensor, teacher: Tensor, target: Tensor | None = None) -> Tensor:
        label = _label(self, student, teacher, target)
        log_student, _ = _split(F.log_softmax(_soften(student), dim=-1), label)
        log_teacher, _ = _split(F.log_softmax(_soften(teacher.detach()), dim=-1), label)
        of_target = -expected(log_teacher.exp(), log_student)
        _, student_others = _split(_soften(student, self.tau), label)
        _, teacher_others = _split(_soften(teacher.detach(), self.tau), label)
        shares = teacher_others.softmax(dim=-1)
        of_others = -expected(shares, F.log_softmax(student_others, dim=-1))
        total = of_target + self.gamma * self.tau**2 * of_others
        return _mean_of(total, len(student)) * _one(target)


def expected(probabilities: Tensor, logarithms: Tensor) -> Tensor:
    """Sum p log q over all; a class of probability 0 (a masked one) counts 0, as 0 log 0 = 0."""
    absent = probabilities == 0
    # Masked on both sides of the product, because the gradient of 0 * inf is NaN.
    return (probabilities * logarithms.masked_fill(absent, 0)).sum()


def _mean_of(total: Tensor, images: int) -> Tensor:
    return total / max(1, images)  # an empty batch gives 0


def _soften(logits: Tensor, tau: float = 1.0) -> Tensor:
    return at_least_float32(logits) / tau


def _mean_kl(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(teacher || student) of the softmax of logits: the mean over images."""
    log_student, log_teacher = F.log_softmax(student, dim=-1), F.log_softmax(teacher, dim=-1)
    return _mean_of(expected(log_teacher.exp(), log_teacher - log_student), len(student))


def _pearson(x: Tensor, y: Tensor, dim: int, eps: float) -> Tensor:
    x, y = x - x.mean(dim, keepdim=True), y - y.mean(dim, keepdim=True)
    norms = torch.linalg.vector_norm(x, dim=dim) * torch.linalg.vector_norm(y, dim=dim)
    return (x * y).sum(dim) / (norms + eps)  # a vector without spread has rho = 0


def _split(logits: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
    """Take the target class's logits [B, 1] and, in their order, the others' [B, classes - 1]."""
    label = label.unsqueeze(1)
    places = torch.arange(logits.shape[1] - 1, device=logits.device)
    return logits.gather(1, label), logits.gather(1, places + (places >= label))


def _against_rest(target: Tensor, others: Tensor) -> Tensor:
    """Logits [B, 2] of the target class and of all others together."""
    return torch.cat([target, others.logsumexp(dim=-1, keepdim=True)], dim=-1)


def _label(term: LogitTerm, student: Tensor, teacher: Tensor, target: Tensor | None) -> Tensor:
    """Check all inputs and get the class indices [B]."""
    check_logit_pair(term, student, teacher, min_classes=2)
    name = type(term).__name__
    if target is None:
        raise ValueError(f"{name}: target must be given (the labels of the batch), got None")
    check_target(name, student, target)
    return target.argmax(dim=-1) if target.ndim == 2 else target.long()


def _one(target: Tensor | None) -> Tensor | float:
    """1, or NaN where soft targets of an image have no largest above 0, and so no class."""
    if target is None or target.ndim == 1:
        return 1.0
    return torch.where((target.amax(dim=-1) > 0).all(), 1.0, math.nan)


def check_logit_pair(
    term: LogitTerm, student: Tensor, teacher: Tensor, *, min_classes: int = 1
) -> None:
    """Raise unless both are [B, classes], of one shape and on one device."""
    name = type(term).__name__
    check_sides(name, ("student logits", "teacher logits"), student, teacher)
    check_logits(name, "student logits", student)
    if student.shape != teacher.shape:
        hint = ""
        if teacher.ndim == 2 and teacher.shape[1] != student.shape[1]:
            hint = " (a teacher of another data set? alpha=0 distills features only)"
        raise ValueError(
            f"{name}: teacher logits must be {list(student.shape)} like the student's, got "
            f"{list(teacher.shape)}{hint}"
        )
    if student.shape[1] < min_classes:
        raise ValueError(
            f"{name}: logits must have two classes at least, got {list(student.shape)} (the "
            "softmax of one class is always 1)"
        )


def check_logits(function: str, name: str, logits: Tensor) -> None:
    """Raise unless they are [B, classes]."""
    check_float(function, name, logits)
    if logits.ndim != 2:
        hint = " (one image? unsqueeze(0))" if logits.ndim == 1 else ""
        raise ValueError(f"{function}: {name} must be [B, classes], got {list(logits.shape)}{hint}")


def check_target(function: str, logits: Tensor, target: Tensor) -> None:
    """Raise unless they are class indices [B] or soft targets [B, classes] for the logits."""
    batch, classes = logits.shape
    wanted = f"class indices [{batch}] or soft targets [{batch}, {classes}]"
    if not isinstance(target, Tensor):
        raise TypeError(f"{function}: target must be {wanted}, got {describe(target)}")
    indices = target.shape == (batch,) and not target.is_floating_point()
    boolean = target.dtype == torch.bool  # as an index it would mean class 0 or 1
    if boolean or not (indices or target.shape == (batch, classes)):
        raise ValueError(f"{function}: target must be {wanted}, got {describe(target)}")
    if target.device != logits.device:
        raise ValueError(
            f"{function}: target must be on {logits.device} like the logits, got {target.device}"
        )
