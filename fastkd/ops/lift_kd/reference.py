"""lift_kd in plain PyTorch: the definition, and the CPU path, a few thousand rows at a time.

All maps here are [B, H, W, D] views, with any strides.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fastkd.ops.feature_kd import reference as distance

Gradients = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
Block = tuple[slice, slice, slice]

# Of the LayerNorm, as in the paper's released code; the other norms of a timm ViT have 1e-6.
LIFT_EPS = 1e-5
COSINE_EPS = 1e-8  # tokens with a smaller norm have no direction, see feature_kd

# Bytes of one temporary [rows, Dt]; about five of them are alive at a time.
CHUNK_BYTES = 1 << 20
ACCELERATOR_CHUNK_BYTES = 64 << 20


@dataclass(frozen=True)
class Inputs:
    """What every implementation gets; the first five can have a gradient."""

    tokens: Tensor  # [B, H, W, Ds]
    weight: Tensor  # [Dt, Ds]
    bias: Tensor | None  # [Dt]
    norm_weight: Tensor | None  # [Dt], or None for no LayerNorm
    norm_bias: Tensor | None  # [Dt]
    eps: float  # of the LayerNorm
    compute: torch.dtype  # of the operands of matrix products; sums are in `accumulator`
    teacher: Tensor | None  # [B, H, W, Dt], or None for no loss
    loss: str  # one of feature_kd's
    beta: float  # of smooth L1

    @property
    def width(self) -> int:
        return self.weight.shape[0]

    @property
    def normed(self) -> bool:
        return self.norm_weight is not None

    @property
    def accumulator(self) -> torch.dtype:
        return torch.float64 if self.compute == torch.float64 else torch.float32

    @property
    def vectors(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        return self.bias, self.norm_weight, self.norm_bias

    @property
    def stats_shape(self) -> tuple[int, ...]:
        """[B, H, W, 4]: what fused kernels keep of every token between forward and backward."""
        return (*self.tokens.shape[:3], 4)

    def empty_gradients(self, needs: Sequence[bool], exact: bool) -> Gradients:
        """Allocate gradients like their inputs, without elements where they are not needed.

        ``exact``: the parameters' in the accumulator's dtype, because they will be scaled before
        they are rounded to the parameters' own.
        """
        dtype = self.accumulator if exact else None
        tokens = self.tokens
        gradients = [torch.empty_like(tokens) if needs[0] else tokens.new_empty(0)]
        for parameter, needed in zip((self.weight, *self.vectors), needs[1:], strict=True):
            if parameter is None or not needed:
                gradients.append(tokens.new_empty(0))
                continue
            # Contiguous, because kernels write row by row, however the parameter lies in memory.
            gradients.append(
                torch.empty_like(parameter, dtype=dtype, memory_format=torch.contiguous_format)
            )
        return tuple(gradients)  # type: ignore[return-value]


def definition(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """The operation as the paper writes it (arXiv 2511.15572, "Lift"); differentiable by autograd.

    Returns the scalar distance between lifted tokens and teacher, as feature_kd defines it (0
    without a teacher), and the lifted tokens' mean over the grid, [B, Dt].
    """
    lifted = F.linear(inputs.tokens, inputs.weight, inputs.bias)
    if inputs.norm_weight is not None:
        norm = inputs.norm_weight, inputs.norm_bias
        lifted = F.layer_norm(lifted, (inputs.width,), *norm, inputs.eps)
    if inputs.teacher is None:
        value = lifted.new_zeros(())
    else:
        value = distance.definition(lifted, inputs.teacher, inputs.loss, inputs.beta, COSINE_EPS)
    return value, lifted.mean(dim=(1, 2))


def lift(inputs: Inputs, out_dtype: torch.dtype) -> Tensor:
    """The lifted tokens themselves, [B, H, W, Dt]."""
    tokens = inputs.tokens
    lifted = tokens.new_empty((*tokens.shape[:3], inputs.width), dtype=out_dtype)
    lifter = _Lifter(inputs)
    for block in _blocks(inputs):
        lifted[block] = lifter.lift(lifter.rows(tokens[block])).unflatten(
            0, lifted[block].shape[:3]
        )
    return lifted


def forward(inputs: Inputs, pool: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The loss (0 without a teacher), [B, Dt] means, and statistics for the backward.

    All are in the accumulator's dtype. Without ``pool`` the means have no elements; the statistics
    are zeros here, because this path's backward needs none.
    """
    tokens, dtype = inputs.tokens, inputs.accumulator
    stats = tokens.new_zeros(inputs.stats_shape, dtype=dtype)
    pooled = tokens.new_zeros((tokens.shape[0], inputs.width if pool else 0), dtype=dtype)
    lifter = _Lifter(inputs)
    # Added up as they come: torch's summed losses keep the memory of their whole input alive.
    value = tokens.new_zeros((), dtype=dtype)
    for block in _blocks(inputs):
        lifted = lifter.lift(lifter.rows(tokens[block])).unflatten(0, tokens[block].shape[:3])
        if pool:
            pooled[block[0]] += lifted.sum(dim=(1, 2))
        if inputs.teacher is not None:
            t = inputs.teacher[block].to(dtype)
            cosines = _cosines(lifted, t, inputs.loss)
            value += distance.distance_sum(lifted, t, cosines, inputs.loss, inputs.beta)
    if inputs.teacher is not None:
        value = value * distance.mean_scale(inputs.teacher, inputs.teacher, inputs.loss)
    return value, pooled.div_(tokens.shape[1:3].numel()), stats


def one_pass(inputs: Inputs, needs: Sequence[bool]) -> tuple[Tensor, ...]:
    """The scalar loss and the needed gradients, from one walk over tokens and teacher."""
    one = inputs.tokens.new_ones((), dtype=inputs.accumulator)
    value, gradients = _differentiate(inputs, one, None, needs, one_pass=True)
    return value, *gradients


def backward(
    upstream: Tensor | None,
    pooled_upstream: Tensor | None,
    inputs: Inputs,
    stats: Tensor,
    needs: Sequence[bool],
) -> Gradients:
    """The needed gradients through the loss (a scalar arrives) and the pooled tokens ([B, Dt])."""
    return _differentiate(inputs, upstream, pooled_upstream, needs, one_pass=False)[1]


class _Lifter:
    """The projector's forward and backward on rows [R, Ds], with the sums of its own gradients."""

    def __init__(self, inputs: Inputs, needs: Sequence[bool] = (False,) * 5) -> None:
        self.dtype, self.compute, self.eps = inputs.accumulator, inputs.compute, inputs.eps
        self.weight = inputs.weight.to(self.compute)
        # CPUs multiply float16 slowly, and sum it up in float16.
        if self.compute == torch.float16 and self.weight.device.type == "cpu":
            self.weight = self.weight.float()
        self.bias, self.norm_weight, self.norm_bias = (
            None if x is None else x.to(self.dtype) for x in inputs.vectors
        )
        self.need_rows = needs[0]
        width = inputs.width
        shapes = self.weight.shape, (width,), (width,), (width,)
        self.sums = [
            self.weight.new_zeros(shape, dtype=self.dtype) if needed else None
            for shape, needed in zip(shapes, needs[1:], strict=True)
        ]

    def rows(self, tokens: Tensor) -> Tensor:
        """[b, h, w, Ds] -> [R, Ds], rounded to the dtype of the products."""
        rows = tokens.reshape(-1, tokens.shape[-1]).to(self.compute)
        return rows.to(self.weight.dtype)

    def lift(self, rows: Tensor) -> Tensor:
        """[R, Ds] -> [R, Dt]; keeps what `backward` needs until the next call."""
        if self.weight.dtype == self.dtype:
            self.projected = F.linear(rows, self.weight, self.bias)
        else:
            self.projected = F.linear(rows, self.weight).to(self.dtype)
            if self.bias is not None:
                self.projected += self.bias
        if self.norm_weight is None:
            return self.projected
        lifted, self.mean, self.rstd = torch.native_layer_norm(
            self.projected, self.norm_weight.shape, self.norm_weight, self.norm_bias, self.eps
        )
        return lifted

    def backward(self, rows: Tensor, slope: Tensor) -> Tensor | None:
        """Add what [R, Dt] ``slope`` gives the parameters; return the rows' gradient if needed."""
        weight_sum, bias_sum, *_ = self.sums
        if self.norm_weight is not None:
            slope = self._norm_backward(slope)
        elif bias_sum is not None:
            bias_sum += slope.sum(dim=0)
        if not self.need_rows and weight_sum is None:
            return None
        slope = slope.to(self.weight.dtype)
        if weight_sum is not None:
            if slope.dtype == self.dtype:
                weight_sum.addmm_(slope.mT, rows)
            else:
                weight_sum += slope.mT @ rows
        return slope @ self.weight if self.need_rows else None

    def _norm_backward(self, slope: Tensor) -> Tensor:
        assert self.norm_weight is not None
        weight_sum, bias_sum, norm_weight_sum, norm_bias_sum = self.sums
        need_projected = self.need_rows or weight_sum is not None or bias_sum is not None
        wanted = [need_projected, norm_weight_sum is not None, norm_bias_sum is not None]
        projected, norm_weight, norm_bias = torch.ops.aten.native_layer_norm_backward(
            slope,
            self.projected,
            self.norm_weight.shape,
            self.mean,
            self.rstd,
            self.norm_weight,
            self.norm_bias,
            wanted,
        )
        if norm_weight_sum is not None:
            norm_weight_sum += norm_weight
        if norm_bias_sum is not None:
            norm_bias_sum += norm_bias
        if bias_sum is not None:
            bias_sum += projected.sum(dim=0)
        return projected


def _differentiate(
    inputs: Inputs,
    upstream: Tensor | None,
    pooled_upstream: Tensor | None,
    needs: Sequence[bool],
    one_pass: bool,
) -> tuple[Tensor, Gradients]:
    tokens, teacher, loss, dtype = inputs.tokens, inputs.teacher, inputs.loss, inputs.accumulator
    gradients = inputs.empty_gradients(needs, exact=one_pass)
    lifter = _Lifter(inputs, needs)
    value = tokens.new_zeros((), dtype=dtype)
    if upstream is not None and teacher is not None:
        scale = distance.mean_scale(teacher, teacher, loss)
        factor = upstream.to(dtype) * scale
    if pooled_upstream is not None:
        share = pooled_upstream.to(dtype)[:, None, None] / tokens.shape[1:3].numel()
    for block in _blocks(inputs):
        rows = lifter.rows(tokens[block])
        lifted = lifter.lift(rows).unflatten(0, tokens[block].shape[:3])
        if upstream is not None and teacher is not None:
            t = teacher[block].to(dtype)
            cosines = _cosines(lifted, t, loss)
            if one_pass:
                value += distance.distance_sum(lifted, t, cosines, loss, inputs.beta)
            # Without a norm the lifted rows are not needed again, with one they are no longer.
            slope = distance.distance_slope(
                lifted, t, cosines, loss, inputs.beta, factor, out=lifted
            )
            if pooled_upstream is not None:
                slope += share[block[0]]
        elif pooled_upstream is not None:
            slope = share[block[0]].expand_as(lifted)
        else:
            slope = torch.zeros_like(lifted)
        rows_gradient = lifter.backward(rows, slope.flatten(0, 2))
        if rows_gradient is not None:
            gradients[0][block] = rows_gradient.unflatten(0, tokens[block].shape[:3])
    for gradient, total in zip(gradients[1:], lifter.sums, strict=True):
        if total is not None:
            gradient.copy_(total)
    return value * scale if one_pass else value, gradients


def _cosines(lifted: Tensor, teacher: Tensor, loss: str) -> Tensor:
    if loss == "cosine":
        return distance.token_cosines(lifted, teacher, COSINE_EPS)
    return lifted.new_empty(0)


def _blocks(inputs: Inputs) -> Iterator[Block]:
    """Cut a map into blocks of a few thousand tokens; a grid row stays whole for spectral."""
    batch, height, width = inputs.tokens.shape[:3]
    chunk = CHUNK_BYTES if inputs.tokens.device.type == "cpu" else ACCELERATOR_CHUNK_BYTES
    rows = max(1, chunk // (inputs.width * inputs.accumulator.itemsize))
    whole = slice(None)
    if rows >= height * width:
        step = rows // (height * width)
        for first in range(0, batch, step):
            yield slice(first, first + step), whole, whole
        return
    for image in range(batch):
        for row in range(0, height, max(1, rows // width)):
            band = slice(row, row + max(1, rows // width))
            if width <= rows or inputs.loss == "spectral":
                yield slice(image, image + 1), band, whole
                continue
            for column in range(0, width, rows):
                yield slice(image, image + 1), band, slice(column, column + rows)
