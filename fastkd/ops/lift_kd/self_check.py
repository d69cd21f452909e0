"""The comparison with the reference that a fused lift_kd must pass before it is used."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from fastkd.ops.lift_kd import reference
from fastkd.ops.lift_kd.projection import LIFT_EPS, Projection

CHECKED_SIZE = (3, 7, 6)  # [B, H, W] of the map: its rows fill no tile, its last tile is cut off
VALUE_TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
GRADIENT_TOLERANCE = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def self_check(
    implementation: Any,
    device: torch.device,
    dtypes: tuple[torch.dtype | None, ...],
    loss: str,
    compute: torch.dtype,
    normed: bool,
) -> tuple[float, float]:
    """Compare an implementation with the float64 reference on small seeded inputs; synchronises.

    Args:
        implementation: forward, backward, one_pass and lift to try, at its ``checked_widths``.
        device: where to run them.
        dtypes: of tokens, weight and teacher; no teacher is checked with one.
        loss: one of feature_kd's.
        compute: dtype of the products' operands.
        normed: with LayerNorm.

    Returns:
        The largest relative error of values and gradients, as a multiple of what is allowed; and 1,
        what is allowed.
    """
    token_dtype, weight_dtype, teacher_dtype = dtypes
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int, dtype: torch.dtype | None) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype or torch.float32)

    narrow, wide = implementation.checked_widths
    tokens = draw(*CHECKED_SIZE, narrow, dtype=token_dtype)
    teacher = draw(*CHECKED_SIZE, wide, dtype=teacher_dtype)
    weight = draw(wide, narrow, dtype=weight_dtype) * narrow**-0.5
    bias, norm_weight, norm_bias = (draw(wide, dtype=weight_dtype) for _ in range(3))
    if normed:
        projection = Projection(weight, bias, norm_weight, norm_bias, LIFT_EPS, compute)
    else:
        projection = Projection(weight, bias, None, None, LIFT_EPS, compute)
    upstreams = draw(dtype=torch.float32), draw(CHECKED_SIZE[0], wide, dtype=torch.float32)
    worst = 0.0
    with implementation.checked_in():
        for ours, truth, tolerance in _compared(
            implementation, tokens, projection, teacher, loss, upstreams
        ):
            error = (ours.double() - truth).norm() / truth.norm() / tolerance
            worst = max(worst, error.nan_to_num(nan=math.inf).item())
    return worst, 1.0


def _compared(
    implementation: Any,
    tokens: Tensor,
    projection: Projection,
    teacher: Tensor,
    loss: str,
    upstreams: tuple[Tensor, Tensor],
) -> Iterator[tuple[Tensor, Tensor, float]]:
    """Pairs of a result and the truth, with the relative error allowed."""
    value_tolerance = VALUE_TOLERANCE[projection.compute]
    gradient_tolerance = GRADIENT_TOLERANCE[projection.compute]
    normed = projection.norm_weight is not None
    needs = [True, True, True, normed, normed]
    exact = _in_float64(projection)
    exact_inputs = tokens.double(), exact, teacher.double()

    value, pooled, stats = implementation.forward(tokens, projection, teacher, loss, 1.0, True)
    true_value, true_pooled, _ = reference.forward(*exact_inputs, loss, 1.0, True)
    yield value, true_value, value_tolerance
    yield pooled, true_pooled, value_tolerance

    def in_backward(
        run: Any, upstreams: Sequence[Tensor], inputs: tuple[Any, ...]
    ) -> tuple[Tensor, ...]:
        return run(*upstreams, *inputs, stats, loss, 1.0, needs)

    gradients = in_backward(implementation.backward, upstreams, (tokens, projection, teacher))
    true_upstreams = [upstream.double() for upstream in upstreams]
    truths = in_backward(reference.backward, true_upstreams, exact_inputs)
    yield from _needed(gradients, truths, gradient_tolerance, needs)

    if projection.compute != torch.float16:  # which never takes this form, see lift_kd
        value, gradients = implementation.one_pass(tokens, projection, teacher, loss, 1.0, needs)
        _, truths = reference.one_pass(*exact_inputs, loss, 1.0, needs)
        yield value, true_value, value_tolerance
        yield from _needed(gradients, truths, gradient_tolerance, needs)

    lifted = implementation.lift(tokens, projection, torch.float32)
    yield lifted, reference.lift(exact_inputs[0], exact, torch.float64), gradient_tolerance


def _needed(
    gradients: tuple[Tensor, ...], truths: tuple[Tensor, ...], tolerance: float, needs: list[bool]
) -> Iterator[tuple[Tensor, Tensor, float]]:
    for gradient, truth, needed in zip(gradients, truths, needs, strict=True):
        if needed:
            yield gradient, truth, tolerance


def _in_float64(projection: Projection) -> Projection:
    bias, norm_weight, norm_bias = (
        None if x is None else x.double() for x in projection.parameters()[1:]
    )
    weight = projection.weight.double()
    return Projection(weight, bias, norm_weight, norm_bias, projection.eps, torch.float64)
