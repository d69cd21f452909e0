"""What logit terms share: softened logits, the KL between them, and checks of options.

Knows no term: which logits are compared, and how often, is theirs.
"""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor, nn

from fastkd.ops.checks import at_least_float32


def soften(logits: Tensor, tau: float = 1.0) -> Tensor:
    """Logits over the temperature, in float32 at least."""
    return at_least_float32(logits) / tau


def frozen(logits: Tensor, tau: float = 1.0) -> Tensor:
    """A teacher's logits, softened, that get no gradient."""
    return soften(logits.detach(), tau)


def mean_kl(student: Tensor, teacher: Tensor) -> Tensor:
    """KL divergence of the student's softmax from the teacher's: the mean over images."""
    log_student, log_teacher = F.log_softmax(student, dim=-1), F.log_softmax(teacher, dim=-1)
    kl = F.kl_div(log_student, log_teacher, reduction="sum", log_target=True)
    return mean_of(kl, len(student))


def mean_of(total: Tensor, images: int) -> Tensor:
    """A sum over images as their mean; 0 where there is no image."""
    return total / max(1, images)


def check_classes(term: nn.Module, logits: Tensor) -> None:
    """Refuse logits [B, classes] of fewer than two classes."""
    if logits.shape[1] < 2:
        raise ValueError(
            f"{type(term).__name__}: logits must have two classes at least, got "
            f"{list(logits.shape)} (the softmax of one class is 1, whatever its logit)"
        )


def check_positive(term: nn.Module, option: str, value: float) -> None:
    """Refuse an option that is not a positive number."""
    if not 0 < value < math.inf:
        raise ValueError(f"{type(term).__name__}: {option} must be positive, got {value}")


def check_not_negative(term: nn.Module, option: str, value: float) -> None:
    """Refuse an option that is negative, infinite or no number."""
    if not 0 <= value < math.inf:
        raise ValueError(f"{type(term).__name__}: {option} must be finite and >= 0, got {value}")
