"""lift_kd's operators: loss and pooled tokens, their gradients, both at once, lifted tokens."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fastkd.ops.backend import Backends, Implementation
from fastkd.ops.lift_kd import cuda, reference
from fastkd.ops.lift_kd.reference import LIFT_EPS, Gradients, Inputs
from fastkd.ops.operator import SCALES, operator
from fastkd.ops.self_check import Draw


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
def backward(
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
    return backward(*upstreams, *inputs, stats, list(needs[:5]), backend)


@operator(
    "lift_kd", BACKENDS, gradient=_recompute, differentiable=2, kept=(2,), flops=_product_flops
)
def forward(inputs: Inputs, pool: bool) -> tuple[Tensor, Tensor, Tensor]:
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
def one_pass(
    inputs: Inputs, needs: Sequence[bool]
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Loss, and the gradients of the first five inputs."""
    value = inputs.tokens.new_empty((), dtype=inputs.accumulator)
    return value, *inputs.empty_gradients(needs, exact=True)


@operator("lift", BACKENDS, method="lift", flops=_product_flops)
def lift(inputs: Inputs, out_dtype: torch.dtype) -> Tensor:
    """The lifted tokens, [B, H, W, Dt]."""
    tokens = inputs.tokens
    return tokens.new_empty((*tokens.shape[:3], inputs.width), dtype=out_dtype)
