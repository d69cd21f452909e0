"""lift_kd's operators: loss and pooled tokens, their gradients, both in one pass, and the tokens.

Inputs have been checked and are [B, H, W, D] views.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastkd.ops.backend import Backends, Implementation
from fastkd.ops.lift_kd import cuda, reference
from fastkd.ops.lift_kd.projection import LIFT_EPS, Gradients, Projection
from fastkd.ops.operator import SCALES, operator
from fastkd.ops.self_check import Draw


@dataclass(frozen=True)
class LiftImplementation(Implementation):
    """lift_kd on one backend; signatures as in reference.py."""

    one_pass: Callable[..., tuple[Tensor, ...]] = reference.one_pass
    lift: Callable[..., Tensor] = reference.lift


def _example(
    run: LiftImplementation,
    draw: Draw,
    tokens: Tensor,
    projection: Projection,
    teacher: Tensor | None,
    loss: str | None,
) -> Iterator[Any]:
    on_cuda = draw.backend == "cuda"
    size = 3, 7, 6  # [B, H, W]: rows that fill no tile, and a last tile that is cut off
    narrow, wide = (192, 384) if on_cuda else (72, 136)  # else no whole blocks
    kind, loss = projection.weight, loss or "mse"
    drawn, taught = draw(*size, narrow, like=tokens), draw(*size, wide, like=teacher)
    noise = draw(wide, narrow, like=None).float()
    weight = draw.rounded(noise * narrow**-0.5, kind.dtype)
    bias, *norm = (draw(wide, like=kind) for _ in range(3))
    normed = projection.norm_weight is not None
    norm_weight, norm_bias = norm if normed else (None, None)
    compute = draw.compute(projection.compute)
    upstream, pooled_upstream = draw(like=None), draw(size[0], wide, like=None)
    needs = [True, True, True, normed, normed]

    def lifter(exact_gradients: bool) -> Projection:
        return Projection(weight, bias, norm_weight, norm_bias, LIFT_EPS, compute, exact_gradients)

    with cuda.few_blocks() if on_cuda else nullcontext():  # so that it takes every loop twice
        inputs = drawn, lifter(False), taught
        value, pooled, stats = run.forward(*inputs, loss, 1.0, True)
        yield from (("value", value), ("value", pooled))
        gradients = run.backward(upstream, pooled_upstream, *inputs, stats, loss, 1.0, needs)
        yield from (("gradient", g) for g, needed in zip(gradients, needs, strict=True) if needed)
        if projection.compute != torch.float16:  # which never takes this form, see lift_kd
            value, *gradients = run.one_pass(drawn, lifter(True), taught, loss, 1.0, needs)
            yield "value", value
            yield from (("gradient", g) for g, n in zip(gradients, needs, strict=True) if n)
        yield "gradient", run.lift(drawn, lifter(False), value.dtype)


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
    "lift_kd",
    _implementations(),
    ("triton", "cuda", "torch"),
    ("tokens", "projection", "teacher", "loss"),
    _example,
)


def _product_flops(tokens: Sequence[int], weight: Sequence[int], *_: Any) -> int:
    return 2 * math.prod(tokens[:3]) * math.prod(weight)


def _backward_flops(_upstream: Any, _pooled: Any, *shapes: Any) -> int:
    return 2 * _product_flops(*shapes)  # a third product, the lifted tokens again, is overhead


@operator("lift_kd_backward", BACKENDS, method="backward", flops=_backward_flops)
def backward(
    upstream: Tensor | None,
    pooled_upstream: Tensor | None,
    tokens: Tensor,
    projection: Projection,
    teacher: Tensor | None,
    stats: Tensor,
    loss: str,
    beta: float,
    needs: Sequence[bool],
) -> Gradients:
    return projection.empty_gradients(tokens, needs)


def _recompute(
    needs: Sequence[bool], upstream: Tensor | None, pooled_upstream: Tensor | None, *arguments: Any
) -> Gradients:
    *lifted, teacher, loss, beta, pool, backend, stats = arguments
    upstream = None if teacher is None else upstream  # without one the loss is a constant
    upstreams = upstream, pooled_upstream if pool else None
    return backward(*upstreams, *lifted, teacher, stats, loss, beta, list(needs[:5]), backend)


@operator(
    "lift_kd", BACKENDS, gradient=_recompute, differentiable=2, kept=(2,), flops=_product_flops
)
def forward(
    tokens: Tensor,
    projection: Projection,
    teacher: Tensor | None,
    loss: str,
    beta: float,
    pool: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, pooled tokens, statistics for the backward."""
    dtype = projection.accumulator
    width = projection.width if pool else 0
    shapes = (), (tokens.shape[0], width), reference.stats_shape(tokens)
    value, pooled, stats = (tokens.new_empty(shape, dtype=dtype) for shape in shapes)
    return value, pooled, stats


@operator(
    "lift_kd_one_pass",
    BACKENDS,
    method="one_pass",
    scales=5,
    flops=lambda *shapes: 3 * _product_flops(*shapes),
)
def one_pass(
    tokens: Tensor,
    projection: Projection,
    teacher: Tensor,
    loss: str,
    beta: float,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Loss, and the gradients of tokens, weight, bias, norm weight and norm bias."""
    value = tokens.new_empty((), dtype=projection.accumulator)
    return value, *projection.empty_gradients(tokens, needs)


@operator("lift", BACKENDS, method="lift", flops=_product_flops)
def lift(tokens: Tensor, projection: Projection, out_dtype: torch.dtype) -> Tensor:
    """The lifted tokens, [B, H, W, Dt]."""
    return tokens.new_empty((*tokens.shape[:3], projection.width), dtype=out_dtype)
