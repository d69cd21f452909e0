"""`feature_kd`: checks, declaration to torch, autograd and the choice of implementation."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from fastkd.ops import checks
from fastkd.ops.backend import Backend, Backends, Implementation, check_backend
from fastkd.ops.feature_kd import reference
from fastkd.ops.feature_kd.reference import LOSSES, LossName
from fastkd.ops.operator import operator
from fastkd.ops.self_check import Draw
from fastkd.utils.argument_checks import check_number

POOLS = ("none", "student", "teacher")


def feature_kd(
    student: Tensor,
    teacher: Tensor,
    loss: LossName = "mse",
    grid: tuple[int, int] | None = None,
    pool: Literal["none", "student", "teacher"] = "none",
    *,
    beta: float = 1.0,
    eps: float = 1e-8,
    backend: Backend = "auto",
) -> Tensor:
    r"""Distance between student and teacher token maps, reduced to a scalar.

    With d = student - teacher:

    - ``"mse"``: mean of d^2 over all elements.
    - ``"smooth_l1"``: mean of d^2 / (2 beta) where \|d\| < beta, and of \|d\| - beta / 2 elsewhere.
    - ``"spectral"``: SpectralKD (arXiv 2412.19055, eq. 6), the MSE between the stacked real and
      imaginary parts of ``rfft2(x, norm="ortho")`` over the grid, evaluated without an FFT: by
      Parseval it is (sum d^2 + row terms) / (4 B D H (W // 2 + 1)), where the row terms are the
      squared sums of d over each grid row (over its even and its odd columns, if W is even),
      divided by the number of columns summed.
    - ``"cosine"``: mean over tokens of 1 - cos(student token, teacher token).

    The forward reads each input once and allocates nothing of size [B, N, D]; the backward
    allocates and writes the gradient once. Sums are in float32 (float64 for float64 inputs) in a
    fixed order, so results are bitwise reproducible on one device. Only the first call on a device
    model and dtypes waits for the GPU, to check the kernel (not with ``FASTKD_SELF_CHECK=0``).

    Args:
        student: [B, N, Ds] tokens or a [B, Ds, H, W] map; float16, bfloat16, float32 or float64,
            any strides (a sliced-off class token costs no copy). Receives the gradient.
        teacher: [B, N, Dt] or [B, Dt, H, W], same kind of shape; its dtype may differ. Receives a
            gradient only if it requires one.
        loss: ``"mse"``, ``"spectral"``, ``"smooth_l1"`` or ``"cosine"``.
        grid: (H, W) with H * W = N, for ``"spectral"`` on [B, N, D] tokens; square if omitted.
        pool: ``"none"`` for equal widths; ``"teacher"`` averages the teacher's channels down to Ds,
            ``"student"`` the student's down to Dt, with the windows of
            `torch.nn.functional.adaptive_avg_pool3d`. The pooled map is never written.
        beta: threshold of ``"smooth_l1"``, >= 0.
        eps: ``"cosine"`` takes tokens with a norm below this for directionless: they count with
            cosine 0 and receive no gradient.
        backend: ``"auto"``, ``"cuda"``, ``"triton"`` or ``"torch"``; see `fastkd.ops.backends`.

    Returns:
        Scalar on the inputs' device: float64 if an input is float64, else float32. 0 for B = 0.

    Raises:
        TypeError: an input is no floating-point tensor, or an option is of another type.
        ValueError: shapes, devices, grid, widths or options do not fit; the message names both.
        RuntimeError: ``backend`` names one that cannot run here, and why.
        NotImplementedError: an input comes from `torch.func` or carries a tangent.
    """
    checks.check_map("feature_kd", "student", student)
    checks.check_map("feature_kd", "teacher", teacher)
    checks.check_choice("feature_kd", "loss", loss, LOSSES)
    checks.check_choice("feature_kd", "pool", pool, POOLS)
    check_number("feature_kd", "beta", beta, least=0)
    check_number("feature_kd", "eps", eps, least=0)
    check_backend("feature_kd", backend)
    checks.check_pair("feature_kd", ("student", "teacher"), student, teacher)
    _check_widths(student, teacher, pool)
    size = checks.grid_of("feature_kd", student, grid, loss == "spectral")
    student_map, teacher_map = checks.as_map(student, size), checks.as_map(teacher, size)
    value, _ = _forward(student_map, teacher_map, loss, float(beta), float(eps), backend)
    return value


def _check_widths(student: Tensor, teacher: Tensor, pool: str) -> None:
    axis = 2 if student.ndim == 3 else 1
    widths = student.shape[axis], teacher.shape[axis]
    wanted = list(student.shape)
    if pool != "none":
        wanted[axis] = widths[1]
    if list(teacher.shape) != wanted:
        hint = ""
        if axis == 2 and student.shape[1] != teacher.shape[1]:
            hint = " (a CLS token left in?)"
        elif widths[0] != widths[1]:
            hint = " (widths differ: choose pool='teacher' or 'student', or project first)"
        raise ValueError(
            f"feature_kd: teacher must be {wanted} like student, got {list(teacher.shape)}{hint}"
        )
    narrow, wide = widths if pool == "teacher" else widths[::-1]
    if narrow > wide:
        raise ValueError(
            f"feature_kd: pool={pool!r} averages the {pool}'s channels down, "
            f"but it has {wide} and the other {narrow}"
        )


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


def _cuda_forward(
    student: Tensor, teacher: Tensor, loss: str, beta: float, eps: float
) -> tuple[Tensor, Tensor]:
    """As `reference.forward`; two launches, no synchronization."""
    result = student.new_empty((), dtype=torch.float32)
    stats = student.new_empty(reference.stats_shape(student, loss), dtype=torch.float32)
    scratch = student.new_empty(SCRATCH, dtype=torch.float32)
    torch.ops.fastkd._feature_kd_forward(
        student, teacher, LOSSES.index(loss), beta, eps, scratch, stats, result
    )
    return result, stats


def _cuda_backward(
    upstream: Tensor,
    student: Tensor,
    teacher: Tensor,
    stats: Tensor,
    loss: str,
    beta: float,
    eps: float,
    for_teacher: bool,
) -> Tensor:
    """As `reference.backward`; one launch, no synchronization."""
    gradient = torch.empty_like(teacher if for_teacher else student)
    torch.ops.fastkd._feature_kd_backward(
        upstream, student, teacher, stats, LOSSES.index(loss), beta, eps, for_teacher, gradient
    )
    return gradient


# [B, H, W, Ds] and Dt: packed channels and an even row; and nothing even, with overlapping windows.
EXAMPLE_SHAPES = (((2, 4, 6, 40), 40), ((2, 3, 5, 33), 57))


def _example(
    run: Implementation, draw: Draw, student: Tensor, teacher: Tensor, loss: str
) -> Iterator[Any]:
    for shape, channels in EXAMPLE_SHAPES:
        maps = draw(*shape, like=student), draw(*shape[:3], channels, like=teacher)
        value, stats = run.forward(*maps, loss, 1.0, 1e-8)
        yield "value", value
        for for_teacher in (False, True):
            upstream = torch.full_like(value, 0.5)
            yield "gradient", run.backward(upstream, *maps, stats, loss, 1.0, 1e-8, for_teacher)


def _implementations() -> dict[str, Implementation]:
    implementations = {
        "torch": Implementation(reference.forward, reference.backward),
        "cuda": Implementation(_cuda_forward, _cuda_backward),
    }
    if importlib.util.find_spec("triton") is not None:
        from fastkd.ops.feature_kd import triton

        implementations["triton"] = Implementation(triton.forward, triton.backward, triton.refuses)
    return implementations


BACKENDS = Backends(
    "feature_kd",
    _implementations(),
    ("triton", "cuda", "torch"),
    ("student", "teacher", "loss"),
    _example,
)


@operator("feature_kd_backward", BACKENDS, method="backward")
def _backward(
    upstream: Tensor,
    student: Tensor,
    teacher: Tensor,
    stats: Tensor,
    loss: str,
    beta: float,
    eps: float,
    for_teacher: bool,
) -> Tensor:
    return torch.empty_like(teacher if for_teacher else student)


def _gradients(
    needs: Sequence[bool], upstream: Tensor, student: Tensor, teacher: Tensor, *rest: Any
) -> list[Tensor | None]:
    *options, backend, stats = rest
    return [
        _backward(upstream, student, teacher, stats, *options, for_teacher, backend)
        if needs[side]
        else None
        for side, for_teacher in enumerate((False, True))
    ]


@operator("feature_kd", BACKENDS, gradient=_gradients, kept=(1,))
def _forward(
    student: Tensor, teacher: Tensor, loss: str, beta: float, eps: float
) -> tuple[Tensor, Tensor]:
    """Loss, and statistics for the backward, of [B, H, W, D] maps."""
    dtype = checks.wide_dtype(student, teacher)
    stats = student.new_empty(reference.stats_shape(student, loss), dtype=dtype)
    return student.new_empty((), dtype=dtype), stats
