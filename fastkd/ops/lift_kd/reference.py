"""lift_kd in plain PyTorch: the definition, and the CPU path.

`definition` says what is computed: Linear, LayerNorm, distance, mean over tokens. It is the
specification that every other implementation is measured against, in float64. The functions below
compute the same a few thousand rows at a time, gradients included, so that the lifted map is never
there as a whole. They run anywhere, in any float dtype, for any widths.

All maps here are [B, H, W, D] views, with any strides.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fastkd.ops.feature_kd import reference as distance
from fastkd.ops.lift_kd.projection import Gradients, Projection

# Bytes of one temporary [rows, Dt]; about five of them are alive at a time.
CHUNK_BYTES = 1 << 20
ACCELERATOR_CHUNK_BYTES = 64 << 20

COSINE_EPS = 1e-8  # tokens with a smaller norm have no direction, see feature_kd

Block = tuple[slice, slice, slice]


def definition(
    tokens: Tensor, projection: Projection, teacher: Tensor | None, loss: str, beta: float = 1.0
) -> tuple[Tensor, Tensor]:
    """The operation as the paper writes it; differentiable by autograd.

    Args:
        tokens: [B, H, W, Ds].
        projection: Linear Ds -> Dt and, with a norm weight, LayerNorm.
        teacher: [B, H, W, Dt]; None leaves out the loss.
        loss: one of feature_kd's.
        beta: where smooth L1 turns from a parabola into a line.

    Returns:
        The scalar distance between lifted tokens and teacher (0 without one), as feature_kd defines
        it, and the lifted tokens' mean over the grid, [B, Dt]. Source: arXiv 2511.15572, "Lift".
    """
    lifted = F.linear(tokens, projection.weight, projection.bias)
    if projection.norm_weight is not None:
        width = (projection.width,)
        lifted = F.layer_norm(
            lifted, width, projection.norm_weight, projection.norm_bias, projection.eps
        )
    if teacher is None:
        value = lifted.new_zeros(())
    else:
        value = distance.definition(lifted, teacher, loss, beta, COSINE_EPS)
    return value, lifted.mean(dim=(1, 2))


def stats_shape(tokens: Tensor) -> tuple[int, ...]:
    """[B, H, W, 4]: what fused kernels keep of every token between forward and backward."""
    return (*tokens.shape[:3], 4)


def lift(tokens: Tensor, projection: Projection, out_dtype: torch.dtype) -> Tensor:
    """The lifted tokens themselves, [B, H, W, Dt]."""
    lifted = tokens.new_empty((*tokens.shape[:3], projection.width), dtype=out_dtype)
    lifter = _Lifter(projection)
    for block in _blocks(tokens, projection, "mse"):
        lifted[block] = lifter.lift(lifter.rows(tokens[block])).unflatten(
            0, lifted[block].shape[:3]
        )
    return lifted


def forward(
    tokens: Tensor,
    projection: Projection,
    teacher: Tensor | None,
    loss: str,
    beta: float,
    pool: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, pooled lifted tokens and statistics.

    Returns:
        The scalar loss (0 without a teacher); [B, Dt] means, or no elements without ``pool``, both
        in the accumulator's dtype; and `stats_shape` statistics, which are zeros here, because this
        path's backward needs none.
    """
    dtype = projection.accumulator
    stats = tokens.new_zeros(stats_shape(tokens), dtype=dtype)
    pooled = tokens.new_zeros((tokens.shape[0], projection.width if pool else 0), dtype=dtype)
    lifter = _Lifter(projection)
    # Added up as they come: torch's summed losses keep the memory of their whole input alive.
    value = tokens.new_zeros((), dtype=dtype)
    for block in _blocks(tokens, projection, loss):
        lifted = lifter.lift(lifter.rows(tokens[block])).unflatten(0, tokens[block].shape[:3])
        if pool:
            pooled[block[0]] += lifted.sum(dim=(1, 2))
        if teacher is not None:
            t = teacher[block].to(dtype)
            cosines = _cosines(lifted, t, loss)
            value += distance.distance_sum(lifted, t, cosines, loss, beta)
    if teacher is not None:
        value = value * distance.mean_scale(teacher, teacher, loss)
    return value, pooled.div_(tokens.shape[1:3].numel()), stats


def one_pass(
    tokens: Tensor,
    projection: Projection,
    teacher: Tensor,
    loss: str,
    beta: float,
    needs: Sequence[bool],
) -> tuple[Tensor, ...]:
    """The scalar loss and its gradients, from one walk over tokens and teacher.

    Args:
        tokens: [B, H, W, Ds].
        projection: as for `definition`.
        teacher: [B, H, W, Dt].
        loss: one of feature_kd's.
        beta: of smooth L1.
        needs: which of `DIFFERENTIABLE` to compute; the others come back without elements.

    Returns:
        Loss, gradients.
    """
    one = tokens.new_ones((), dtype=projection.accumulator)
    value, gradients = _differentiate(
        tokens, projection, teacher, loss, beta, one, None, needs, with_value=True
    )
    return value, *gradients


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
    """Gradients through loss and pooled tokens; the lifted tokens are computed again.

    Args:
        upstream: scalar, gradient of the loss; None for none.
        pooled_upstream: [B, Dt], gradient of the pooled tokens; None for none.
        tokens: as for `forward`, and so are the others.
        projection: likewise.
        teacher: likewise.
        stats: from `forward`.
        loss: likewise.
        beta: likewise.
        needs: which of `DIFFERENTIABLE` to compute.

    Returns:
        The gradients.
    """
    _, gradients = _differentiate(
        tokens, projection, teacher, loss, beta, upstream, pooled_upstream, needs, with_value=False
    )
    return gradients


class _Lifter:
    """The projector's forward and backward on rows [R, Ds], with the sums of its own gradients."""

    def __init__(self, projection: Projection, needs: Sequence[bool] = (False,) * 5) -> None:
        dtype = projection.accumulator
        _, self.need_weight, self.need_bias, self.need_norm_weight, self.need_norm_bias = needs
        self.need_rows = needs[0]
        self.weight = projection.weight.to(projection.compute)
        # CPUs multiply float16 slowly, and sum it up in float16.
        if projection.compute == torch.float16 and self.weight.device.type == "cpu":
            self.weight = self.weight.float()
        self.bias, self.norm_weight, self.norm_bias = (
            None if x is None else x.to(dtype) for x in projection.parameters()[1:]
        )
        self.eps = projection.eps
        self.compute = projection.compute
        self.dtype = dtype
        zeros = self.weight.new_zeros
        width = projection.width
        self.weight_gradient = zeros(self.weight.shape, dtype=dtype) if self.need_weight else None
        self.bias_gradient = zeros(width, dtype=dtype) if self.need_bias else None
        self.norm_weight_gradient = zeros(width, dtype=dtype) if self.need_norm_weight else None
        self.norm_bias_gradient = zeros(width, dtype=dtype) if self.need_norm_bias else None

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
        if self.norm_weight is not None:
            slope = self._norm_backward(slope)
        elif self.bias_gradient is not None:
            self.bias_gradient += slope.sum(dim=0)
        if not (self.need_rows or self.need_weight):
            return None
        slope = slope.to(self.weight.dtype)
        if self.weight_gradient is not None:
            if slope.dtype == self.dtype:
                self.weight_gradient.addmm_(slope.mT, rows)
            else:
                self.weight_gradient += slope.mT @ rows
        return slope @ self.weight if self.need_rows else None

    def _norm_backward(self, slope: Tensor) -> Tensor:
        need_projected = self.need_rows or self.need_weight or self.need_bias
        wanted = [need_projected, self.need_norm_weight, self.need_norm_bias]
        projected, norm_weight, norm_bias = torch.ops.aten.native_layer_norm_backward(
            slope,
            self.projected,
            self.norm_weight.shape,  # type: ignore[union-attr]
            self.mean,
            self.rstd,
            self.norm_weight,
            self.norm_bias,
            wanted,
        )
        if self.norm_weight_gradient is not None:
            self.norm_weight_gradient += norm_weight
        if self.norm_bias_gradient is not None:
            self.norm_bias_gradient += norm_bias
        if self.bias_gradient is not None:
            self.bias_gradient += projected.sum(dim=0)
        return projected

    def parameter_gradients(self) -> list[Tensor | None]:
        """Of weight, bias, norm weight, norm bias."""
        return [
            self.weight_gradient,
            self.bias_gradient,
            self.norm_weight_gradient,
            self.norm_bias_gradient,
        ]


def _differentiate(
    tokens: Tensor,
    projection: Projection,
    teacher: Tensor | None,
    loss: str,
    beta: float,
    upstream: Tensor | None,
    pooled_upstream: Tensor | None,
    needs: Sequence[bool],
    with_value: bool,
) -> tuple[Tensor, Gradients]:
    dtype = projection.accumulator
    gradients = projection.empty_gradients(tokens, needs)
    lifter = _Lifter(projection, needs)
    value = tokens.new_zeros((), dtype=dtype)
    if teacher is None:
        upstream = None
    if upstream is not None and teacher is not None:
        scale = distance.mean_scale(teacher, teacher, loss)
        factor = upstream.to(dtype) * scale
    if pooled_upstream is not None:
        share = pooled_upstream.to(dtype)[:, None, None] / tokens.shape[1:3].numel()
    for block in _blocks(tokens, projection, loss):
        rows = lifter.rows(tokens[block])
        lifted = lifter.lift(rows).unflatten(0, tokens[block].shape[:3])
        if upstream is not None and teacher is not None:
            t = teacher[block].to(dtype)
            cosines = _cosines(lifted, t, loss)
            if with_value:
                value += distance.distance_sum(lifted, t, cosines, loss, beta)
            # Without a norm the lifted rows are not needed again, with one they are no longer.
            slope = distance.distance_slope(lifted, t, cosines, loss, beta, factor, out=lifted)
            if pooled_upstream is not None:
                slope += share[block[0]]
        elif pooled_upstream is not None:
            slope = share[block[0]].expand_as(lifted)
        else:
            slope = torch.zeros_like(lifted)
        rows_gradient = lifter.backward(rows, slope.flatten(0, 2))
        if rows_gradient is not None:
            gradients[0][block] = rows_gradient.unflatten(0, tokens[block].shape[:3])
    for gradient, total in zip(gradients[1:], lifter.parameter_gradients(), strict=True):
        if total is not None:
            gradient.copy_(total)
    if with_value and teacher is not None:
        value = value * distance.mean_scale(teacher, teacher, loss)
    return value, gradients


def _cosines(lifted: Tensor, teacher: Tensor, loss: str) -> Tensor:
    if loss == "cosine":
        return distance.token_cosines(lifted, teacher, COSINE_EPS)
    return lifted.new_empty(0)


def _blocks(tokens: Tensor, projection: Projection, loss: str) -> Iterator[Block]:
    """Cuts a map into blocks of a few thousand tokens; a grid row stays whole for spectral."""
    batch, height, width = tokens.shape[:3]
    chunk = CHUNK_BYTES if tokens.device.type == "cpu" else ACCELERATOR_CHUNK_BYTES
    rows = max(1, chunk // (projection.width * projection.accumulator.itemsize))
    whole = slice(None)
    if rows >= height * width:
        step = rows // (height * width)
        for first in range(0, batch, step):
            yield slice(first, first + step), whole, whole
        return
    for image in range(batch):
        for row in range(0, height, max(1, rows // width)):
            band = slice(row, row + max(1, rows // width))
            if width <= rows or loss == "spectral":
                yield slice(image, image + 1), band, whole
                continue
            for column in range(0, width, rows):
                yield slice(image, image + 1), band, slice(column, column + rows)
