"""`lift_kd` and `lift`: checks, autocast, and the choice of one-pass or recompute form."""

from __future__ import annotations

from typing import Literal, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from fastkd.ops import checks
from fastkd.ops.backend import Backend, check_backend
from fastkd.ops.feature_kd.reference import LOSSES, LossName
from fastkd.ops.lift_kd import op
from fastkd.ops.lift_kd.op import BACKENDS
from fastkd.ops.lift_kd.reference import LIFT_EPS
from fastkd.utils.arguments import check_number

__all__ = ["BACKENDS", "LIFT_EPS", "lift", "lift_kd"]


@overload
def lift_kd(
    student_tokens: Tensor,
    weight: Tensor,
    teacher_tokens: Tensor,
    bias: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    lift_eps: float = LIFT_EPS,
    loss: LossName = "mse",
    grid: tuple[int, int] | None = None,
    pool: Literal[False] = False,
    *,
    beta: float = 1.0,
    backend: Backend = "auto",
) -> Tensor: ...


@overload
def lift_kd(
    student_tokens: Tensor,
    weight: Tensor,
    teacher_tokens: Tensor,
    bias: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    lift_eps: float = LIFT_EPS,
    loss: LossName = "mse",
    grid: tuple[int, int] | None = None,
    *,
    pool: Literal[True],
    beta: float = 1.0,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]: ...


@overload
def lift_kd(
    student_tokens: Tensor,
    weight: Tensor,
    teacher_tokens: Tensor,
    bias: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    lift_eps: float = LIFT_EPS,
    loss: LossName = "mse",
    grid: tuple[int, int] | None = None,
    pool: bool = False,
    *,
    beta: float = 1.0,
    backend: Backend = "auto",
) -> Tensor | tuple[Tensor, Tensor]: ...


def lift_kd(
    student_tokens: Tensor,
    weight: Tensor,
    teacher_tokens: Tensor,
    bias: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    lift_eps: float = LIFT_EPS,
    loss: LossName = "mse",
    grid: tuple[int, int] | None = None,
    pool: bool = False,
    *,
    beta: float = 1.0,
    backend: Backend = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Distance between lifted student tokens and a frozen teacher's, and the lifted tokens' mean.

    With z = LayerNorm(student_tokens weight^T + bias): the distance of z to teacher_tokens as
    `fastkd.ops.feature_kd` defines it, and, with ``pool``, the mean of z over the tokens, which a
    Lift student classifies (arXiv 2511.15572). z [B, N, Dt] is never allocated.

    Without ``pool`` the gradients are made in the forward, in one walk over both maps, and the
    backward only scales them; where the gradient that arrives is 1, it looks and is done (a
    compiled or retained graph always multiplies). With it, and in float16, the backward computes z
    again, tile by tile. Second derivatives are refused; forward-mode differentiation and
    `torch.func` are not supported. Only the gradients that are required are
    computed, in a fixed order, so results are bitwise reproducible on one device. Nothing waits
    for the GPU, except the first call on a device model, dtypes and options, which checks the
    chosen kernel.

    Precision: products take their operands in autocast's dtype where autocast is on, else in
    that of ``student_tokens``; parameters may be kept in another (float32 master weights). The
    LayerNorm, the distance and all sums over tokens are in float32 (float64 if ``student_tokens``
    or a parameter is). The fused backends keep products in float32 as well; the PyTorch one takes
    them as `torch.nn.functional.linear` gives them.

    Args:
        student_tokens: [B, N, Ds] tokens or a [B, Ds, H, W] map, N >= 1; float16, bfloat16, float32
            or float64, any strides (a sliced-off class token costs no copy).
        weight: [Dt, Ds], of the linear layer.
        teacher_tokens: [B, N, Dt] or [B, Dt, H, W], same kind as ``student_tokens``, any float
            dtype. Gets no gradient.
        bias: [Dt], of the linear layer.
        norm_weight: [Dt], of the LayerNorm; None leaves the LayerNorm out.
        norm_bias: [Dt], of the LayerNorm.
        lift_eps: of the LayerNorm.
        loss: ``"mse"``, ``"spectral"``, ``"smooth_l1"`` or ``"cosine"``.
        grid: (H, W) with H * W = N, for ``"spectral"`` on [B, N, D] tokens; square if omitted.
        pool: also return the mean of the lifted tokens.
        beta: threshold of ``"smooth_l1"``, >= 0.
        backend: ``"auto"``, ``"cuda"``, ``"triton"`` or ``"torch"``; see `fastkd.ops.backends`.

    Returns:
        The scalar loss, float32 (float64 if ``student_tokens`` or a parameter is); 0 for B = 0.
        With ``pool`` the pair of it and [B, Dt]: in float32 after a LayerNorm under autocast (as
        CUDA's autocast has it, on every device), else in the dtype of the products.

    Raises:
        TypeError: an input is no floating-point tensor.
        ValueError: shapes, devices, grid or options do not fit, or ``teacher_tokens`` requires a
            gradient; the message names what was expected and what came.
        RuntimeError: ``backend`` names one that cannot run here, and why.
    """
    _check_tokens("lift_kd", "student_tokens", student_tokens)
    _check_projection("lift_kd", student_tokens, weight, bias, norm_weight, norm_bias, lift_eps)
    _check_teacher(student_tokens, weight, teacher_tokens)
    checks.check_choice("lift_kd", "loss", loss, LOSSES)
    check_number("lift_kd", "beta", beta, least=0)
    checks.check_flag("lift_kd", "pool", pool)
    check_backend("lift_kd", backend)
    size = checks.grid_of("lift_kd", student_tokens, grid, loss == "spectral")
    tokens, teacher = checks.as_map(student_tokens, size), checks.as_map(teacher_tokens, size)
    parameters = weight, bias, norm_weight, norm_bias
    compute = _compute_dtype(tokens, *parameters)
    inputs = tokens, *parameters, float(lift_eps), compute, teacher, loss, float(beta)
    needs = _needs(tokens, *parameters)
    # Loss scaling keeps float16 gradients from vanishing, but it arrives in the backward only.
    half = torch.float16 in (tokens.dtype, compute)
    if not pool and any(needs) and not half:
        value, *_ = op.one_pass(*inputs, needs, backend)
        return value
    value, pooled, _ = op.forward(*inputs, pool, backend)
    return (value, pooled.to(_output_dtype(tokens, norm_weight, compute))) if pool else value


def lift(
    tokens: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    lift_eps: float = LIFT_EPS,
    pool: bool = False,
    *,
    backend: Backend = "auto",
) -> Tensor:
    """Lift tokens: Linear, then LayerNorm where there is a ``norm_weight``; or only their mean.

    The companion of `lift_kd` where there is no teacher: inference, or training on labels. With
    ``pool`` the lifted map is never allocated, and the gradient computes it again. Without, it is
    the result; where a gradient is required, it is computed by torch's own layers.

    Args:
        tokens: [B, N, Ds] or [B, Ds, H, W], as for `lift_kd`.
        weight: [Dt, Ds].
        bias: [Dt] or None.
        norm_weight: [Dt], or None for no LayerNorm.
        norm_bias: [Dt] or None.
        lift_eps: of the LayerNorm.
        pool: return the mean over the tokens.
        backend: as for `lift_kd`.

    Returns:
        [B, N, Dt] or [B, Dt, H, W] as came in, or [B, Dt] with ``pool``; in float32 after a
        LayerNorm under autocast, else in the dtype of the products.

    Raises:
        TypeError: an input is no floating-point tensor.
        ValueError: shapes, devices or options do not fit.
        RuntimeError: ``backend`` names one that cannot run here, and why.
    """
    _check_tokens("lift", "tokens", tokens)
    _check_projection("lift", tokens, weight, bias, norm_weight, norm_bias, lift_eps)
    checks.check_flag("lift", "pool", pool)
    check_backend("lift", backend)
    view = checks.as_map(tokens, checks.grid_of("lift", tokens, None, rows=False))
    parameters = weight, bias, norm_weight, norm_bias
    compute = _compute_dtype(tokens, *parameters)
    out_dtype = _output_dtype(tokens, norm_weight, compute)
    inputs = view, *parameters, float(lift_eps), compute, None, "mse", 1.0
    if pool:
        _, pooled, _ = op.forward(*inputs, True, backend)
        return pooled.to(out_dtype)
    if any(_needs(view, *parameters)):
        if backend not in ("auto", "torch"):
            raise RuntimeError(
                f"lift: backend {backend!r} cannot run: lifted tokens that need a gradient are "
                "computed by torch's own layers; pool=True has a fused gradient"
            )
        lifted = _lift_by_layers(view, *parameters, lift_eps, compute, out_dtype)
    else:
        lifted = op.lift(*inputs, out_dtype, backend)
    return lifted.permute(0, 3, 1, 2) if tokens.ndim == 4 else lifted.flatten(1, 2)


def _lift_by_layers(
    tokens: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    lift_eps: float,
    compute: torch.dtype,
    out_dtype: torch.dtype,
) -> Tensor:
    bias = None if bias is None else bias.to(compute)
    lifted = F.linear(tokens.to(compute), weight.to(compute), bias).to(out_dtype)
    if norm_weight is None:
        return lifted
    norm_bias = None if norm_bias is None else norm_bias.to(out_dtype)
    return F.layer_norm(lifted, norm_weight.shape, norm_weight.to(out_dtype), norm_bias, lift_eps)


def _needs(*inputs: Tensor | None) -> list[bool]:
    grad = torch.is_grad_enabled()
    return [grad and x is not None and x.requires_grad for x in inputs]


def _compute_dtype(tokens: Tensor, *others: Tensor | None) -> torch.dtype:
    """In which dtype products take their operands: autocast's, else that of the tokens."""
    if torch.float64 in [x.dtype for x in (tokens, *others) if x is not None]:
        return torch.float64
    device = tokens.device.type
    return torch.get_autocast_dtype(device) if _autocasts(device) else tokens.dtype


def _output_dtype(tokens: Tensor, norm_weight: Tensor | None, compute: torch.dtype) -> torch.dtype:
    """What torch's own layers would return: under autocast a LayerNorm gives float32."""
    if norm_weight is not None and _autocasts(tokens.device.type):
        return torch.float64 if compute == torch.float64 else torch.float32
    return compute


def _autocasts(device: str) -> bool:
    return device != "meta" and torch.is_autocast_enabled(device)  # which meta refuses to answer


def _check_tokens(function: str, name: str, tokens: Tensor) -> None:
    checks.check_map(function, name, tokens)
    if 0 in tokens.shape[1:]:
        raise ValueError(
            f"{function}: only the batch of {name} may be empty, got {list(tokens.shape)}"
        )


def _check_projection(
    function: str,
    tokens: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    lift_eps: float,
) -> None:
    checks.check_tensor(function, "weight", weight)
    channels = tokens.shape[2 if tokens.ndim == 3 else 1]
    if weight.ndim != 2 or weight.shape[1] != channels or weight.shape[0] == 0:
        raise ValueError(
            f"{function}: weight must be [Dt, {channels}] for tokens of {list(tokens.shape)}, "
            f"got {list(weight.shape)}"
        )
    width = weight.shape[0]
    vectors = {"bias": bias, "norm_weight": norm_weight, "norm_bias": norm_bias}
    for name, vector in vectors.items():
        if vector is None:
            continue
        checks.check_tensor(function, name, vector)
        if vector.shape != (width,):
            raise ValueError(
                f"{function}: {name} must be [{width}] like weight's rows, got {list(vector.shape)}"
            )
    for name, parameter in {"weight": weight, **vectors}.items():
        if parameter is not None and parameter.device != tokens.device:
            raise ValueError(
                f"{function}: {name} must be on {tokens.device} like the tokens, "
                f"got {parameter.device}"
            )
    if norm_bias is not None and norm_weight is None:
        raise ValueError(f"{function}: norm_bias needs norm_weight (no norm_weight, no LayerNorm)")
    check_number(function, "lift_eps", lift_eps, least=0)


def _check_teacher(student: Tensor, weight: Tensor, teacher: Tensor) -> None:
    checks.check_map("lift_kd", "teacher_tokens", teacher)
    checks.check_pair("lift_kd", ("student_tokens", "teacher_tokens"), student, teacher)
    channels = 2 if student.ndim == 3 else 1
    wanted = list(student.shape)
    wanted[channels] = weight.shape[0]
    if list(teacher.shape) != wanted:
        surplus = student.shape[1] - teacher.shape[1] if student.ndim == 3 else 0
        hint = " (a CLS token left in?)" if surplus < 0 else ""
        hint = " (a CLS token left in student_tokens?)" if surplus > 0 else hint
        raise ValueError(
            f"lift_kd: teacher_tokens must be {wanted} like student_tokens and weight, "
            f"got {list(teacher.shape)}{hint}"
        )
    if teacher.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            "lift_kd: teacher_tokens requires a gradient, but the teacher is frozen here; detach "
            "it, or compare lifted tokens with feature_kd, which differentiates both sides"
        )
