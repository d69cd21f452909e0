"""feature_kd through the compiled library: schemas of its raw operators, and their buffers.

The kernels and the binding are csrc/feature_kd.cu and csrc/feature_kd.cpp, which register
implementations for what is declared here.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastkd.ops.feature_kd.reference import LOSSES, stats_shape

SCRATCH = 4096  # floats: one per block, csrc/feature_kd.cu's kMaxBlocks

torch.library.define(
    "fastkd::_feature_kd_forward",
    "(Tensor student, Tensor teacher, int loss, float beta, float eps, "
    "Tensor(a!) scratch, Tensor(b!) stats, Tensor(c!) result) -> ()",
)
torch.library.define(
    "fastkd::_feature_kd_backward",
    "(Tensor upstream, Tensor student, Tensor teacher, Tensor stats, int loss, float beta, "
    "float eps, bool for_teacher, Tensor(a!) gradient) -> ()",
)


def forward(
    student: Tensor, teacher: Tensor, loss: str, beta: float, eps: float
) -> tuple[Tensor, Tensor]:
    """As `reference.forward`; two launches, no synchronisation."""
    result = student.new_empty((), dtype=torch.float32)
    stats = student.new_empty(stats_shape(student, loss), dtype=torch.float32)
    scratch = student.new_empty(SCRATCH, dtype=torch.float32)
    torch.ops.fastkd._feature_kd_forward(
        student, teacher, LOSSES.index(loss), beta, eps, scratch, stats, result
    )
    return result, stats


def backward(
    upstream: Tensor,
    student: Tensor,
    teacher: Tensor,
    stats: Tensor,
    loss: str,
    beta: float,
    eps: float,
    for_teacher: bool,
) -> Tensor:
    """As `reference.backward`; one launch, no synchronisation."""
    gradient = torch.empty_like(teacher if for_teacher else student)
    torch.ops.fastkd._feature_kd_backward(
        upstream, student, teacher, stats, LOSSES.index(loss), beta, eps, for_teacher, gradient
    )
    return gradient
