"""lift_kd as torch sees it: schemas, fake functions, autograd, and the choice of a backend.

Inputs have been checked and are [B, H, W, D] views. Four operators: the forward (loss and pooled
tokens), its backward, both in one pass, and the lifted tokens themselves.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from fastkd.ops.backend import Implementation, Operator
from fastkd.ops.lift_kd import cuda, reference
from fastkd.ops.lift_kd.projection import Gradients, Projection
from fastkd.ops.lift_kd.scale import scaled
from fastkd.ops.lift_kd.self_check import self_check


@dataclass(frozen=True)
class LiftImplementation(Implementation):
    """lift_kd on one backend; signatures as in reference.py.

    Attributes:
        one_pass: loss and gradients together.
        lift: the lifted tokens.
        checked_widths: Ds and Dt of the self-check; by default multiples of no block.
        checked_in: entered for the self-check.
    """

    one_pass: Callable[..., tuple[Tensor, Gradients]] = reference.one_pass
    lift: Callable[..., Tensor] = reference.lift
    checked_widths: tuple[int, int] = (72, 136)
    checked_in: Callable[[], AbstractContextManager[None]] = nullcontext


def _select(
    backend: str, tokens: Tensor, projection: Projection, teacher: Tensor | None, loss: str
) -> LiftImplementation:
    tensors = tokens, projection.weight, teacher
    normed = projection.norm_weight is not None
    return OPERATOR.select(backend, tensors, loss, projection.compute, normed)


@torch.library.custom_op("fastkd::lift_kd", mutates_args=())
def forward(
    tokens: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    teacher: Tensor | None,
    eps: float,
    loss: str,
    beta: float,
    compute: torch.dtype,
    pool: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, pooled, statistics for the backward); see `reference.forward`."""
    projection = Projection(weight, bias, norm_weight, norm_bias, eps, compute)
    if tokens.shape[0] == 0:
        return _empty_results(tokens, projection, pool)
    with torch.autocast(tokens.device.type, enabled=False):
        chosen = _select(backend, tokens, projection, teacher, loss)
        return chosen.forward(tokens, projection, teacher, loss, beta, pool)


def _empty_results(
    tokens: Tensor, projection: Projection, pool: bool
) -> tuple[Tensor, Tensor, Tensor]:
    def zeros(*shape: int) -> Tensor:
        return tokens.new_zeros(shape, dtype=projection.accumulator)

    pooled = zeros(tokens.shape[0], projection.width if pool else 0)
    return zeros(), pooled, zeros(*reference.stats_shape(tokens))


@forward.register_fake
def _(
    tokens: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    teacher: Tensor | None,
    eps: float,
    loss: str,
    beta: float,
    compute: torch.dtype,
    pool: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    projection = Projection(weight, bias, norm_weight, norm_bias, eps, compute)
    return _empty_results(tokens, projection, pool)


@torch.library.custom_op("fastkd::lift_kd_backward", mutates_args=())
def backward(
    upstream: Tensor | None,
    pooled_upstream: Tensor | None,
    tokens: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    teacher: Tensor | None,
    stats: Tensor,
    eps: float,
    loss: str,
    beta: float,
    compute: torch.dtype,
    needs: Sequence[bool],
    backend: str,
) -> Gradients:
    """Gradients of tokens and parameters through loss and pooled tokens."""
    projection = Projection(weight, bias, norm_weight, norm_bias, eps, compute)
    if tokens.shape[0] == 0:
        return _zero_gradients(tokens, projection, needs)
    with torch.autocast(tokens.device.type, enabled=False):
        chosen = _select(backend, tokens, projection, teacher, loss)
        return chosen.backward(
            upstream, pooled_upstream, tokens, projection, teacher, stats, loss, beta, needs
        )


def _zero_gradients(tokens: Tensor, projection: Projection, needs: Sequence[bool]) -> Gradients:
    gradients = projection.empty_gradients(tokens, needs)
    for gradient in gradients:
        gradient.zero_()
    return gradients


@backward.register_fake
def _(
    upstream: Tensor | None,
    pooled_upstream: Tensor | None,
    tokens: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    teacher: Tensor | None,
    stats: Tensor,
    eps: float,
    loss: str,
    beta: float,
    compute: torch.dtype,
    needs: Sequence[bool],
    backend: str,
) -> Gradients:
    projection = Projection(weight, bias, norm_weight, norm_bias, eps, compute)
    return projection.empty_gradients(tokens, needs)


def _keep_inputs(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.eps, ctx.loss, ctx.beta, ctx.compute, ctx.pool, ctx.backend = inputs
    ctx.mark_non_differentiable(output[2])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, output[2])


def _recompute(
    ctx: Any, upstream: Tensor | None, pooled_upstream: Tensor | None, _: None
) -> tuple[Tensor | None, ...]:
    _refuse_second_derivatives()
    *tensors, stats = ctx.saved_tensors
    needs = list(ctx.needs_input_grad[:5])
    if tensors[5] is None:
        upstream = None  # without a teacher the loss is a constant
    if not ctx.pool:
        pooled_upstream = None
    gradients = backward(
        upstream, pooled_upstream, *tensors, stats,
        ctx.eps, ctx.loss, ctx.beta, ctx.compute, needs, ctx.backend,
    )  # fmt: skip
    wanted = [g if needed else None for g, needed in zip(gradients, needs, strict=True)]
    return *wanted, *[None] * 7


def _refuse_second_derivatives() -> None:
    if torch.is_grad_enabled():  # in a backward, this is create_graph=True
        raise RuntimeError(
            "lift_kd: its gradient cannot be differentiated again (create_graph=True); take "
            "torch's own layers and losses where second derivatives are needed"
        )


forward.register_autograd(_recompute, setup_context=_keep_inputs)


@torch.library.custom_op("fastkd::lift_kd_one_pass", mutates_args=())
def one_pass(
    tokens: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    teacher: Tensor,
    eps: float,
    loss: str,
    beta: float,
    compute: torch.dtype,
    needs: Sequence[bool],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Loss, and the gradients of tokens, weight, bias, norm weight and norm bias."""
    projection = Projection(
        weight, bias, norm_weight, norm_bias, eps, compute, exact_gradients=True
    )
    if tokens.shape[0] == 0:
        zero = tokens.new_zeros((), dtype=projection.accumulator)
        return zero, *_zero_gradients(tokens, projection, needs)
    with torch.autocast(tokens.device.type, enabled=False):
        chosen = _select(backend, tokens, projection, teacher, loss)
        value, gradients = chosen.one_pass(tokens, projection, teacher, loss, beta, needs)
    return value, *gradients


@one_pass.register_fake
def _(
    tokens: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    teacher: Tensor,
    eps: float,
    loss: str,
    beta: float,
    compute: torch.dtype,
    needs: Sequence[bool],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    projection = Projection(
        weight, bias, norm_weight, norm_bias, eps, compute, exact_gradients=True
    )
    value = tokens.new_empty((), dtype=projection.accumulator)
    return value, *projection.empty_gradients(tokens, needs)


def _keep_gradients(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *_, ctx.needs, ctx.backend = inputs
    ctx.dtypes = [x.dtype for x, needed in zip(inputs[:5], ctx.needs, strict=True) if needed]
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # or zeros of the gradients' sizes would be made for them
    ctx.save_for_backward(*output[1:])


def _scale_gradients(
    ctx: Any, upstream: Tensor | None, *_: Tensor | None
) -> tuple[Tensor | None, ...]:
    _refuse_second_derivatives()
    if upstream is None:
        return (None,) * 12
    kept = [g for g, needed in zip(ctx.saved_tensors, ctx.needs, strict=True) if needed]
    products = zip(scaled(kept, upstream, ctx.backend), ctx.dtypes, strict=True)
    gradients = (gradient.to(dtype) for gradient, dtype in products)
    return *[next(gradients) if needed else None for needed in ctx.needs], *[None] * 7


one_pass.register_autograd(_scale_gradients, setup_context=_keep_gradients)


@torch.library.custom_op("fastkd::lift", mutates_args=())
def lift(
    tokens: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    compute: torch.dtype,
    out_dtype: torch.dtype,
    backend: str,
) -> Tensor:
    """The lifted tokens, [B, H, W, Dt]."""
    projection = Projection(weight, bias, norm_weight, norm_bias, eps, compute)
    if tokens.shape[0] == 0:
        return tokens.new_empty((*tokens.shape[:3], projection.width), dtype=out_dtype)
    with torch.autocast(tokens.device.type, enabled=False):
        chosen = _select(backend, tokens, projection, None, "mse")
        return chosen.lift(tokens, projection, out_dtype)


@lift.register_fake
def _(
    tokens: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    compute: torch.dtype,
    out_dtype: torch.dtype,
    backend: str,
) -> Tensor:
    return tokens.new_empty((*tokens.shape[:3], weight.shape[0]), dtype=out_dtype)


def _product_flops(tokens_shape: Sequence[int], weight_shape: Sequence[int]) -> int:
    return 2 * math.prod(tokens_shape[:3]) * math.prod(weight_shape)


@register_flop_formula([torch.ops.fastkd.lift_kd, torch.ops.fastkd.lift])
def _(tokens_shape: Any, weight_shape: Any, *_: Any, **__: Any) -> int:
    """One product; what torch.utils.flop_counter counts of the layers, too."""
    return _product_flops(tokens_shape, weight_shape)


@register_flop_formula(torch.ops.fastkd.lift_kd_one_pass)
def _(tokens_shape: Any, weight_shape: Any, *_: Any, **__: Any) -> int:
    return 3 * _product_flops(tokens_shape, weight_shape)


@register_flop_formula(torch.ops.fastkd.lift_kd_backward)
def _(
    _upstream: Any, _pooled: Any, tokens_shape: Any, weight_shape: Any, *_: Any, **__: Any
) -> int:
    """Two products; the third, which computes the lifted tokens again, is overhead."""
    return 2 * _product_flops(tokens_shape, weight_shape)


def _implementations() -> dict[str, LiftImplementation]:
    implementations = {
        "torch": LiftImplementation(reference.forward, reference.backward),
        "cuda": LiftImplementation(
            cuda.forward,
            cuda.backward,
            cuda.refuses,
            proven=False,
            one_pass=cuda.one_pass,
            checked_widths=(192, 384),
            checked_in=cuda.few_blocks,
        ),
    }
    if importlib.util.find_spec("triton") is not None:
        from fastkd.ops.lift_kd import triton

        implementations["triton"] = LiftImplementation(
            triton.forward, triton.backward, triton.refuses, True, triton.one_pass, triton.lift
        )
    return implementations


OPERATOR = Operator(
    name="lift_kd",
    implementations=_implementations(),
    order=("triton", "cuda", "torch"),
    self_check=self_check,
)
