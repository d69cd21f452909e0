"""`lift_kd` and `lift`: the distance of lifted student tokens to a teacher's, and the tokens."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, Literal, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from fastkd.ops import checks
from fastkd.ops.backend import Backend, Backends, Implementation, check_backend
from fastkd.ops.feature_kd.reference import LOSSES, LossName
from fastkd.ops.lift_kd import cuda, reference
from fastkd.ops.lift_kd.reference import LIFT_EPS, Gradients, Inputs
from fastkd.ops.operator import SCALES, operator
from fastkd.ops.self_check import Draw
from fastkd.utils.argument_checks import check_number

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
    *args: Any,
    pool: Literal[True],
    loss: LossName = "mse",
    backend: Backend = "auto",
    **kwargs: Any,
) -> tuple[Tensor, Tensor]: ...
@overload
def lift_kd(
    *args: Any, pool: bool, loss: LossName = "mse", backend: Backend = "auto", **kwargs: Any
) -> Tensor | tuple[Tensor, Tensor]: ...


# The overloads with a pool take any other arguments, which the first overload spells out.
def lift_kd(  # type: ignore[misc]
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
    r"""Distance between lifted student tokens and the teacher's, and the lifted tokens' mean.

    With z = LayerNorm(student_tokens weight^T + bias): the distance of z to teacher_tokens as
    `fastkd.ops.feature_kd` defines it, and, with ``pool``, the mean of z over the tokens, which a
    Lift student classifies (arXiv 2511.15572). z [B, N, Dt] is never allocated.

    Without ``pool`` the gradients are computed in the forward, in one walk over both maps, and the
    backward scales them (not where it gets a 1). With it, and in float16, the backward computes z
    again, tile by tile. Only the required gradients are computed, in a fixed order: bitwise
    reproducible on one device. Second derivatives, forward mode and `torch.func` are refused. Only
    the first call with a device model, dtypes and options waits for the GPU, to check the kernel.

    Precision: products take their operands in autocast's dtype where it is on, else in that of
    ``student_tokens``; parameters may be kept in another (float32 master weights). The LayerNorm,
    the distance and all sums over tokens are in float32 (float64 if ``student_tokens`` or a
    parameter is). The fused backends keep products in float32 as well; PyTorch's are those of
    `torch.nn.functional.linear`.

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
        ValueError: shapes, devices, grid or options do not fit, or the teacher requires a gradient.
        RuntimeError: ``backend`` names one that cannot run here, and why.
    """
    _check_projection(
        "lift_kd", "student_tokens", student_tokens, weight, bias, norm_weight, norm_bias, lift_eps
    )
    _check_teacher(student_tokens, weight, teacher_tokens)
    checks.check_choice("lift_kd", "loss", loss, LOSSES)
    check_number("lift_kd", "beta", beta, least=0)
    checks.check_flag("lift_kd", "pool", pool)
    check_backend("lift_kd", backend)
    size = checks.grid_of("lift_kd", student_tokens, grid, loss == "spectral")
    leaves = checks.as_map(student_tokens, size), weight, bias, norm_weight, norm_bias
    compute, out_dtype = _dtypes(*leaves)
    teacher = checks.as_map(teacher_tokens, size)
    inputs = *leaves, float(lift_eps), compute, teacher, loss, float(beta)
    needs = _needs(*leaves)
    # Loss scaling keeps float16 gradients from vanishing, but it arrives in the backward only.
    half = torch.float16 in (student_tokens.dtype, compute)
    if not pool and any(needs) and not half:
        value, *_ = _one_pass(*inputs, needs, backend)
        return value
    value, pooled, _ = _forward(*inputs, pool, backend)
    return (value, pooled.to(out_dtype)) if pool else value


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
    """Lifted tokens, LayerNorm(x W^T + b), or their mean; no LayerNorm without ``norm_weight``.

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
    _check_projection("lift", "tokens", tokens, weight, bias, norm_weight, norm_bias, lift_eps)
    checks.check_flag("lift", "pool", pool)
    check_backend("lift", backend)
    view = checks.as_map(tokens, checks.grid_of("lift", tokens, None, rows=False))
    leaves = view, weight, bias, norm_weight, norm_bias
    compute, out_dtype = _dtypes(*leaves)
    inputs = *leaves, float(lift_eps), compute, None, "mse", 1.0
    if pool:
        _, pooled, _ = _forward(*inputs, True, backend)
        return pooled.to(out_dtype)
    if any(_needs(*leaves)):
        if backend not in ("auto", "torch"):
            raise RuntimeError(
                f"lift: backend {backend!r} cannot run: lifted tokens that need a gradient are "
                "computed by torch's own layers; pool=True has a fused gradient"
            )
        bias = None if bias is None else bias.to(compute)
        lifted = F.linear(view.to(compute), weight.to(compute), bias).to(out_dtype)
        if norm_weight is not None:
            norm_bias = None if norm_bias is None else norm_bias.to(out_dtype)
            norm_weight = norm_weight.to(out_dtype)
            lifted = F.layer_norm(lifted, norm_weight.shape, norm_weight, norm_bias, lift_eps)
    else:
        lifted = _lift(*inputs, out_dtype, backend)
    return lifted.permute(0, 3, 1, 2) if tokens.ndim == 4 else lifted.flatten(1, 2)


def _needs(*inputs: Tensor | None) -> list[bool]:
    grad = torch.is_grad_enabled()
    return [grad and x is not None and x.requires_grad for x in inputs]


def _dtypes(
    tokens: Tensor, weight: Tensor, bias: Tensor | None, norm_weight: Tensor | None, *rest: Any
) -> tuple[torch.dtype, torch.dtype]:
    """The dtype of the products' operands, and of what torch's own layers would return."""
    inputs = tokens, weight, bias, norm_weight, *rest
    device = tokens.device.type
    autocast = device != "meta" and torch.is_autocast_enabled(device)  # meta refuses the question
    if torch.float64 in [x.dtype for x in inputs if x is not None]:
        compute = torch.float64
    else:
        compute = torch.get_autocast_dtype(device) if autocast else tokens.dtype
    # Under autocast a LayerNorm gives float32.
    widened = autocast and norm_weight is not None and compute != torch.float64
    return compute, torch.float32 if widened else compute


def _check_projection(
    function: str,
    name: str,
    tokens: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    lift_eps: float,
) -> None:
    checks.check_map(function, name, tokens)
    if 0 in tokens.shape[1:]:
        raise ValueError(
            f"{function}: only the batch of {name} may be empty, got {list(tokens.shape)}"
        )
    checks.check_tensor(function, "weight", weight)
    channels = tokens.shape[2 if tokens.ndim == 3 else 1]
    if weight.ndim != 2 or weight.shape[1] != channels or weight.shape[0] == 0:
        raise ValueError(
            f"{function}: weight must be [Dt, {channels}] for tokens of {list(tokens.shape)}, "
            f"got {list(weight.shape)}"
        )
    width = weight.shape[0]
    vectors = {"bias": bias, "norm_weight": norm_weight, "norm_bias": norm_bias}
    for name, parameter in {"weight": weight, **vectors}.items():
        if parameter is None:
            continue
        checks.check_tensor(function, name, parameter)
        if name != "weight" and parameter.shape != (width,):
            got = list(parameter.shape)
            raise ValueError(f"{function}: {name} must be [{width}] like weight's rows, got {got}")
        if parameter.device != tokens.device:
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
        if abs(surplus) > 2:  # DeiT has a class and a distillation token
            hint = " (another grid? fastkd.tokens.match_grids resamples the teacher's)"
        raise ValueError(
            f"lift_kd: teacher_tokens must be {wanted} like student_tokens and weight, "
            f"got {list(teacher.shape)}{hint}"
        )
    if teacher.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            "lift_kd: teacher_tokens requires a gradient, but the teacher is frozen here; detach "
            "it, or compare lifted tokens with feature_kd, which differentiates both sides"
        )


@dataclass(frozen=True)
class LiftImplementation(Implementation):
    """lift_kd on one backend; signatures as in reference.py."""

    one_pass: Callable[..., tuple[Tensor, ...]] = reference.one_pass
    lift: Callable[..., Tensor] = reference.lift


def _example(run: LiftImplementation, draw: Draw, inputs: Inputs) -> Iterator[Any]:
    on_cuda = draw.backend == "cuda"
    size = 3, 7, 6  # [B, H, W]: rows that fill no tile, and a last tile that is cut off
    narrow, wide = (192, 384) if on_cuda else (72, 136)  # else no whole blocks
    kind = inputs.weight
    tokens = draw(*size, narrow, like=inputs.tokens)
    teacher = draw(*size, wide, like=inputs.teacher)
    noise = draw(wide, narrow, like=None).float()
    weight = draw.rounded(noise * narrow**-0.5, kind.dtype)
    bias, norm_weight, norm_bias = (draw(wide, like=kind) for _ in range(3))
    options = LIFT_EPS, draw.compute(inputs.compute), teacher, inputs.loss, 1.0
    example = Inputs(tokens, weight, bias, norm_weight, norm_bias, *options)
    if not inputs.normed:
        example = replace(example, norm_weight=None, norm_bias=None)
    upstream, pooled_upstream = draw(like=None), draw(size[0], wide, like=None)
    needs = [True, True, True, inputs.normed, inputs.normed]
    with cuda.few_blocks() if on_cuda else nullcontext():  # so that it takes every loop twice
        value, pooled, stats = run.forward(example, True)
        yield from (("value", value), ("value", pooled))
        gradients = run.backward(upstream, pooled_upstream, example, stats, needs)
        if inputs.compute != torch.float16:  # which never takes one pass, see lift_kd
            value, *others = run.one_pass(example, needs)
            yield "value", value
            gradients, needs = (*gradients, *others), 2 * needs
        yield from (("gradient", g) for g, needed in zip(gradients, needs, strict=True) if needed)
        yield "gradient", run.lift(example, value.dtype)


def _implementations() -> dict[str, LiftImplementation]:
    implementations = {
        "torch": LiftImplementation(reference.forward, reference.backward),
        "cuda": LiftImplementation(
            cuda.forward, cuda.backward, cuda.refuses, proven=False, one_pass=cuda.one_pass
        ),
    }
    if importlib.util.find_spec("triton") is not None:
        from fastkd.ops.lift_kd import triton

        implementations["triton"] = LiftImplementation(
            triton.forward, triton.backward, triton.refuses, True, triton.one_pass, triton.lift
        )
        SCALES.implementations["triton"] = Implementation(triton.scale)
    return implementations


BACKENDS = Backends(
    "lift_kd", _implementations(), ("triton", "cuda", "torch"), ("inputs",), _example
)


def _product_flops(tokens: Sequence[int], weight: Sequence[int], *_: Any) -> int:
    return 2 * math.prod(tokens[:3]) * math.prod(weight)


def _backward_flops(_upstream: Any, _pooled: Any, *shapes: Any) -> int:
    return 2 * _product_flops(*shapes)  # a third product, the lifted tokens again, is overhead


@operator("lift_kd_backward", BACKENDS, method="backward", flops=_backward_flops)
def _backward(
    upstream: Tensor | None,
    pooled_upstream: Tensor | None,
    inputs: Inputs,
    stats: Tensor,
    needs: Sequence[bool],
) -> Gradients:
    return inputs.empty_gradients(needs, exact=False)


def _recompute(
    needs: Sequence[bool], upstream: Tensor | None, pooled_upstream: Tensor | None, *arguments: Any
) -> Gradients:
    *inputs, pool, backend, stats = arguments
    upstreams = upstream, pooled_upstream if pool else None
    return _backward(*upstreams, *inputs, stats, list(needs[:5]), backend)


@operator(
    "lift_kd", BACKENDS, gradient=_recompute, differentiable=2, kept=(2,), flops=_product_flops
)
def _forward(inputs: Inputs, pool: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, pooled tokens, statistics for the backward."""
    shapes = (), (inputs.tokens.shape[0], inputs.width if pool else 0), inputs.stats_shape
    value, pooled, stats = (
        inputs.tokens.new_empty(shape, dtype=inputs.accumulator) for shape in shapes
    )
    return value, pooled, stats


@operator(
    "lift_kd_one_pass",
    BACKENDS,
    method="one_pass",
    scales=5,
    flops=lambda *shapes: 3 * _product_flops(*shapes),
)
def _one_pass(
    inputs: Inputs, needs: Sequence[bool]
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Loss, and the gradients of the first five inputs."""
    value = inputs.tokens.new_empty((), dtype=inputs.accumulator)
    return value, *inputs.empty_gradients(needs, exact=True)


@operator("lift", BACKENDS, method="lift", flops=_product_flops)
def _lift(inputs: Inputs, out_dtype: torch.dtype) -> Tensor:
    """The lifted tokens, [B, H, W, Dt]."""
    tokens = inputs.tokens
    return tokens.new_empty((*tokens.shape[:3], inputs.width), dtype=out_dtype)
