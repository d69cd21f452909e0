"""The Triton kernels of lift_kd; triton.py launches them. Formulas and symbols: reference.py.

Cut: a tile is BLOCK_M tokens (for spectral, whole grid rows among them); it walks the outputs in
chunks of BLOCK_O and never holds more of the lifted row than that. `forward` leaves loss, sums for
the pooled tokens and four numbers per token; `token_gradient` computes each chunk again, turns it
into the slope of the projection and accumulates the tokens' gradient; the slope goes, for a band of
tokens small enough for the L2 cache, to `weight_gradient`. Under a LayerNorm the weight's columns
are centered over the outputs first: LN(W x) is then RMSNorm(W_c x), without a mean, and dW is dW_c
minus its mean over the outputs.

Moves per tile: tokens once, teacher once (twice in the one-pass form, from the L2 cache the second
time), weight once per pass from the L2 cache. sm_90, bf16, [., 192] -> 384 with LayerNorm: forward
79 to 119 registers and 53 KB of shared memory, token_gradient 215 to 238 and 98 KB, weight_gradient
64 and 49 KB; nothing is spilled (gates of tests/ops/test_lift_kd_compiled.py).
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastkd.ops.feature_kd.triton import (
    COSINE,
    SMOOTH_L1,
    SPECTRAL,
    cosine_of_sums,
    needs_rescaling,
    rescaling,
)


@triton.jit
def _locate(position, tokens, width, batch_stride, row_stride, column_stride):
    """Offsets [BLOCK_M] of tokens that are counted over all images."""
    image = position // tokens
    token = position - image * tokens
    row = token // width
    column = token - row * width
    return (
        image.to(tl.int64) * batch_stride
        + row.to(tl.int64) * row_stride
        + column.to(tl.int64) * column_stride
    )


@triton.jit
def _token_block(
    tokens, offset, inside, first, channels, channel_stride,
    COMPUTE: tl.constexpr, BLOCK_I: tl.constexpr,
):  # fmt: skip
    """[BLOCK_M, BLOCK_I] of the tokens, as operands of products."""
    channel = first + tl.arange(0, BLOCK_I)
    pointer = tokens + offset[:, None] + channel[None, :] * channel_stride
    mask = inside[:, None] & (channel < channels)[None, :]
    return tl.load(pointer, mask=mask, other=0.0).to(COMPUTE)


@triton.jit
def _resident_tokens(
    tokens, offset, inside, channels, channel_stride,
    COMPUTE: tl.constexpr, RESIDENT: tl.constexpr, BLOCK_I: tl.constexpr,
):  # fmt: skip
    """The first RESIDENT blocks of the tokens, as a tuple."""
    blocks = ()
    for block in tl.static_range(RESIDENT):
        blocks = blocks + (
            _token_block(
                tokens, offset, inside, block * BLOCK_I, channels, channel_stride, COMPUTE, BLOCK_I
            ),
        )
    return blocks


@triton.jit
def _weight_block(
    weight, output, width, first, weight_row, TRANSPOSED: tl.constexpr, BLOCK_I: tl.constexpr
):
    """[BLOCK_O, BLOCK_I] of the weight, or its transpose; its rows are padded with zeros."""
    channel = first + tl.arange(0, BLOCK_I)
    if TRANSPOSED:
        pointer = weight + output[None, :] * weight_row + channel[:, None]
        mask = (channel < weight_row)[:, None] & (output < width)[None, :]
    else:
        pointer = weight + output[:, None] * weight_row + channel[None, :]
        mask = (output < width)[:, None] & (channel < weight_row)[None, :]
    return tl.load(pointer, mask=mask, other=0.0)


@triton.jit
def _project(
    tokens, resident, offset, inside, channels, channel_stride, weight, weight_row,
    bias, output, width,
    HAS_BIAS: tl.constexpr, COMPUTE: tl.constexpr, PRECISION: tl.constexpr,
    RESIDENT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr,
):  # fmt: skip
    """[BLOCK_M, BLOCK_O] fp32: a chunk of the projected tokens, before the norm."""
    y = tl.zeros([BLOCK_M, BLOCK_O], dtype=tl.float32)
    if RESIDENT > 0:
        for block in tl.static_range(RESIDENT):
            w = _weight_block(weight, output, width, block * BLOCK_I, weight_row, True, BLOCK_I)
            y = tl.dot(resident[block], w, y, input_precision=PRECISION)
    else:
        for first in range(0, channels, BLOCK_I):
            x = _token_block(
                tokens, offset, inside, first, channels, channel_stride, COMPUTE, BLOCK_I
            )
            w = _weight_block(weight, output, width, first, weight_row, True, BLOCK_I)
            y = tl.dot(x, w, y, input_precision=PRECISION)
    if HAS_BIAS:
        y += tl.load(bias + output, mask=output < width, other=0.0)[None, :]
    return y


@triton.jit
def _per_output(vector, output, width, GIVEN: tl.constexpr, MISSING: tl.constexpr):
    """[1, BLOCK_O] of a parameter vector, or a constant where there is none."""
    if GIVEN:
        value = tl.load(vector + output, mask=output < width, other=0.0).to(tl.float32)[None, :]
    else:
        value = tl.full([1, output.shape[0]], MISSING, dtype=tl.float32)
    return value


@triton.jit
def _same_half_row(position, inside, tokens, width, EVEN_ROWS: tl.constexpr):
    """[BLOCK_M, BLOCK_M]: whether two tokens lie in one half row (an odd row is one)."""
    group = position // width
    if EVEN_ROWS:
        group = group * 2 + (position - group * width) % 2
    return (group[:, None] == group[None, :]) & inside[:, None] & inside[None, :]


@triton.jit
def _half_row_sums(same, d, HALF_ROW: tl.constexpr):
    """[BLOCK_M, BLOCK_O]: every token's difference summed over its half row."""
    if HALF_ROW == "bf16":
        sums = tl.dot(same.to(tl.float32).to(tl.bfloat16), d.to(tl.bfloat16))
    else:
        sums = tl.dot(same.to(tl.float32), d, input_precision=HALF_ROW)
    return sums


@triton.jit(do_not_specialize=["first_tile"])  # one compilation for all bands
def forward(
    tokens, weight, bias, norm_weight, norm_bias, teacher, stats, partials, pooled, lifted,
    token_count, first_tile, tile_rows, image_tokens, grid_width, images,
    channels, width, weight_row, norm_eps, beta, cosine_eps, inverse_half_row,
    tokens_batch, tokens_row, tokens_column, tokens_channel,
    teacher_batch, teacher_row, teacher_column, teacher_channel,
    NORMED: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_NORM_BIAS: tl.constexpr,
    TEACHER: tl.constexpr, POOL: tl.constexpr, LIFT: tl.constexpr, STATS: tl.constexpr,
    LOSS: tl.constexpr, EVEN_ROWS: tl.constexpr, HALF_ROW: tl.constexpr,
    COMPUTE: tl.constexpr, PRECISION: tl.constexpr, RESIDENT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr,
):  # fmt: skip
    """Loss, statistics, per-tile sums over images, or the lifted tokens, of one tile."""
    tile = first_tile + tl.program_id(0)
    row = tl.arange(0, BLOCK_M)
    position = tile * tile_rows + row
    inside = (row < tile_rows) & (position < token_count)
    first_image = tile * tile_rows // image_tokens
    offset = _locate(position, image_tokens, grid_width, tokens_batch, tokens_row, tokens_column)
    teacher_offset = _locate(
        position, image_tokens, grid_width, teacher_batch, teacher_row, teacher_column
    )
    resident = _resident_tokens(
        tokens, offset, inside, channels, tokens_channel, COMPUTE, RESIDENT, BLOCK_I
    )
    rstd = tl.full([BLOCK_M], 1.0, dtype=tl.float32)
    if NORMED:
        square = tl.zeros([BLOCK_M], dtype=tl.float32)
        for first in range(0, width, BLOCK_O):
            output = first + tl.arange(0, BLOCK_O)
            y = _project(
                tokens, resident, offset, inside, channels, tokens_channel, weight, weight_row,
                bias, output, width,
                HAS_BIAS, COMPUTE, PRECISION, RESIDENT, BLOCK_M, BLOCK_O, BLOCK_I,
            )  # fmt: skip
            square += tl.sum(y * y, axis=1)
        rstd = 1.0 / tl.sqrt(square / width + norm_eps)
    same = _same_half_row(position, inside, image_tokens, grid_width, EVEN_ROWS)
    zero = tl.zeros([BLOCK_M], dtype=tl.float32)
    one = tl.full([BLOCK_M], 1.0, dtype=tl.float32)
    sums = (zero, zero, zero, zero, zero, zero)
    for first in range(0, width, BLOCK_O):
        output = first + tl.arange(0, BLOCK_O)
        y = _project(
            tokens, resident, offset, inside, channels, tokens_channel, weight, weight_row,
            bias, output, width, HAS_BIAS, COMPUTE, PRECISION, RESIDENT, BLOCK_M, BLOCK_O, BLOCK_I,
        )  # fmt: skip
        sums = _forward_chunk(
            y, first, sums, one, one, rstd, same, position, inside, first_image, tile,
            norm_weight, norm_bias, teacher, teacher_offset, teacher_channel, pooled, lifted,
            image_tokens, images, width, beta, inverse_half_row,
            NORMED, HAS_NORM_BIAS, TEACHER, POOL, LIFT, LOSS, HALF_ROW, BLOCK_O,
        )  # fmt: skip
    z_scale, t_scale = one, one
    if TEACHER and LOSS == COSINE:  # noqa: SIM102 - one is for the compiler
        if needs_rescaling(sums[2], sums[3], cosine_eps):
            z_scale, t_scale = rescaling(sums[2]), rescaling(sums[3])
            sums = (zero, zero, zero, zero, zero, zero)
            for first in range(0, width, BLOCK_O):
                output = first + tl.arange(0, BLOCK_O)
                y = _project(
                    tokens, resident, offset, inside, channels, tokens_channel, weight, weight_row,
                    bias, output, width,
                    HAS_BIAS, COMPUTE, PRECISION, RESIDENT, BLOCK_M, BLOCK_O, BLOCK_I,
                )  # fmt: skip
                sums = _forward_chunk(
                    y, first, sums, z_scale, t_scale, rstd, same, position, inside, first_image,
                    tile, norm_weight, norm_bias, teacher, teacher_offset, teacher_channel,
                    pooled, lifted, image_tokens, images, width, beta, inverse_half_row,
                    NORMED, HAS_NORM_BIAS, TEACHER, False, False, LOSS, HALF_ROW, BLOCK_O,
                )  # fmt: skip
    if TEACHER:
        value, projected, zz, tt, zt, across_projected = sums
        along = tl.zeros([BLOCK_M], dtype=tl.float32)
        across = tl.zeros([BLOCK_M], dtype=tl.float32)
        if LOSS == COSINE:
            cosine, z_inverse, t_inverse = cosine_of_sums(zt, zz, tt, z_scale, t_scale, cosine_eps)
            along = cosine * z_inverse * z_inverse
            across = z_inverse * t_inverse
            value = tl.where(inside, 1.0 - cosine, 0.0)
            # The sums are of scaled tokens; unit vectors first, as the inverses may underflow.
            of_units = cosine * (z_inverse / z_scale) * projected
            projected = z_inverse * (of_units - t_inverse / t_scale * across_projected)
        tl.store(partials + tile, tl.sum(value, axis=0))
        if STATS:
            stat = stats + position.to(tl.int64) * 4
            tl.store(stat + 1, projected / width, mask=inside)
            tl.store(stat + 2, along, mask=inside)
            tl.store(stat + 3, across, mask=inside)
    if STATS:
        tl.store(stats + position.to(tl.int64) * 4, rstd, mask=inside)


@triton.jit
def _forward_chunk(
    y, first, sums, z_scale, t_scale, rstd, same, position, inside, first_image, tile,
    norm_weight, norm_bias, teacher, teacher_offset, teacher_channel, pooled, lifted,
    image_tokens, images, width, beta, inverse_half_row,
    NORMED: tl.constexpr, HAS_NORM_BIAS: tl.constexpr, TEACHER: tl.constexpr, POOL: tl.constexpr,
    LIFT: tl.constexpr, LOSS: tl.constexpr, HALF_ROW: tl.constexpr, BLOCK_O: tl.constexpr,
):  # fmt: skip
    """What a chunk of lifted tokens adds to the sums over a row.

    ``sums`` are [BLOCK_M] each: the loss; sum of g slope x_hat, which LayerNorm's backward needs;
    and for cosine z z, t t and z t, where the second is kept for z and, as the sixth, for t, of
    tokens scaled by ``z_scale`` and ``t_scale``.
    """
    output = first + tl.arange(0, BLOCK_O)
    mask = inside[:, None] & (output < width)[None, :]
    scale = _per_output(norm_weight, output, width, NORMED, 1.0)
    normed = y * rstd[:, None]
    z = normed * scale + _per_output(norm_bias, output, width, HAS_NORM_BIAS, 0.0)
    if LIFT:
        target = lifted + position.to(tl.int64)[:, None] * width + output[None, :]
        tl.store(target, z.to(lifted.dtype.element_ty), mask=mask)
    if POOL:
        image = position // image_tokens - first_image
        slot = pooled + (tile * images).to(tl.int64) * width + output
        for i in range(0, images):
            total = tl.sum(tl.where(mask & (image == i)[:, None], z, 0.0), axis=0)
            tl.store(slot + i * width, total, mask=output < width)
    if TEACHER:
        value, projected, zz, tt, zt, across_projected = sums
        pointer = teacher + teacher_offset[:, None] + output[None, :] * teacher_channel
        t = tl.load(pointer, mask=mask, other=0.0).to(tl.float32)
        if LOSS == COSINE:
            z = tl.where(mask, z, 0.0) * z_scale[:, None]
            t *= t_scale[:, None]
            scaled = normed * scale
            zz += tl.sum(z * z, axis=1)
            tt += tl.sum(t * t, axis=1)
            zt += tl.sum(z * t, axis=1)
            if NORMED:
                projected += tl.sum(scaled * z, axis=1)
                across_projected += tl.sum(scaled * t, axis=1)
        else:
            d = tl.where(mask, z - t, 0.0)
            if LOSS == SMOOTH_L1:
                size = tl.abs(d)
                curve = tl.where(size < beta, 0.5 * d * d / beta, size - 0.5 * beta)
                value += tl.sum(tl.where(mask, curve, 0.0), axis=1)
            else:
                value += tl.sum(d * d, axis=1)
            slope = _slope(d, same, beta, inverse_half_row, LOSS, HALF_ROW)
            if LOSS == SPECTRAL:
                value += tl.sum(d * (0.5 * slope - d), axis=1)
            if NORMED:
                projected += tl.sum(slope * (normed * scale), axis=1)
        sums = (value, projected, zz, tt, zt, across_projected)
    return sums


@triton.jit
def _slope(d, same, beta, inverse_half_row, LOSS: tl.constexpr, HALF_ROW: tl.constexpr):
    """Derivative of the summed distance by the lifted tokens, for the losses of a difference."""
    slope = 2.0 * d
    if LOSS == SMOOTH_L1:
        line = tl.where(d > 0.0, 1.0, tl.where(d < 0.0, -1.0, d))
        slope = tl.where(tl.abs(d) < beta, d / beta, line)
    if LOSS == SPECTRAL:
        slope += 2.0 * inverse_half_row * _half_row_sums(same, d, HALF_ROW)
    return slope


@triton.jit(do_not_specialize=["first_tile"])
def token_gradient(
    upstream, pooled_upstream, pooled_projected, tokens, weight, bias, norm_weight, norm_bias,
    teacher, stats, gradient, slopes, columns,
    token_count, first_tile, tile_rows, image_tokens, grid_width,
    channels, width, weight_row, beta, scale, inverse_half_row,
    tokens_batch, tokens_row, tokens_column, tokens_channel,
    teacher_batch, teacher_row, teacher_column, teacher_channel,
    gradient_batch, gradient_row, gradient_column, gradient_channel,
    NORMED: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_NORM_BIAS: tl.constexpr,
    TEACHER: tl.constexpr, UPSTREAM: tl.constexpr, POOLED: tl.constexpr,
    ROWS: tl.constexpr, SLOPES: tl.constexpr, COLUMNS: tl.constexpr,
    LOSS: tl.constexpr, EVEN_ROWS: tl.constexpr, HALF_ROW: tl.constexpr,
    COMPUTE: tl.constexpr, PRECISION: tl.constexpr, RESIDENT: tl.constexpr, SLAB: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr,
):  # fmt: skip
    """Gradient of a tile of tokens (a slab of channels), slopes of its projection, column sums."""
    tile = first_tile + tl.program_id(0)
    slab = tl.program_id(1)
    row = tl.arange(0, BLOCK_M)
    position = tile * tile_rows + row
    inside = (row < tile_rows) & (position < token_count)
    image = position // image_tokens
    offset = _locate(position, image_tokens, grid_width, tokens_batch, tokens_row, tokens_column)
    teacher_offset = _locate(
        position, image_tokens, grid_width, teacher_batch, teacher_row, teacher_column
    )
    resident = _resident_tokens(
        tokens, offset, inside, channels, tokens_channel, COMPUTE, RESIDENT, BLOCK_I
    )
    same = _same_half_row(position, inside, image_tokens, grid_width, EVEN_ROWS)
    factor = scale
    if UPSTREAM:
        factor = tl.load(upstream).to(tl.float32) * scale
    stat = stats + position.to(tl.int64) * 4
    rstd = tl.full([BLOCK_M], 1.0, dtype=tl.float32)
    projected = tl.zeros([BLOCK_M], dtype=tl.float32)
    along = tl.zeros([BLOCK_M], dtype=tl.float32)
    across = tl.zeros([BLOCK_M], dtype=tl.float32)
    if NORMED:
        rstd = tl.load(stat, mask=inside, other=0.0)
    if TEACHER:
        if NORMED:
            projected = factor * tl.load(stat + 1, mask=inside, other=0.0)
        if LOSS == COSINE:
            along = tl.load(stat + 2, mask=inside, other=0.0)
            across = tl.load(stat + 3, mask=inside, other=0.0)
    if POOLED and NORMED:
        projected += _pooled_share(
            tokens, resident, offset, image, inside, channels, tokens_channel, pooled_projected,
            rstd, COMPUTE, RESIDENT, BLOCK_M, BLOCK_I,
        )  # fmt: skip
    accumulators = ()
    for _ in tl.static_range(SLAB):
        accumulators = accumulators + (tl.zeros([BLOCK_M, BLOCK_I], dtype=tl.float32),)
    for first in range(0, width, BLOCK_O):
        output = first + tl.arange(0, BLOCK_O)
        mask = inside[:, None] & (output < width)[None, :]
        y = _project(
            tokens, resident, offset, inside, channels, tokens_channel, weight, weight_row,
            bias, output, width, HAS_BIAS, COMPUTE, PRECISION, RESIDENT, BLOCK_M, BLOCK_O, BLOCK_I,
        )  # fmt: skip
        norm_scale = _per_output(norm_weight, output, width, NORMED, 1.0)
        normed = y * rstd[:, None]
        slope = tl.zeros([BLOCK_M, BLOCK_O], dtype=tl.float32)
        if TEACHER:
            pointer = teacher + teacher_offset[:, None] + output[None, :] * teacher_channel
            t = tl.load(pointer, mask=mask, other=0.0).to(tl.float32)
            z = normed * norm_scale + _per_output(norm_bias, output, width, HAS_NORM_BIAS, 0.0)
            if LOSS == COSINE:
                slope = factor * (z * along[:, None] - t * across[:, None])
            else:
                d = tl.where(mask, z - t, 0.0)
                slope = factor * _slope(d, same, beta, inverse_half_row, LOSS, HALF_ROW)
        if POOLED:
            pointer = pooled_upstream + image.to(tl.int64)[:, None] * width + output[None, :]
            slope += tl.load(pointer, mask=mask, other=0.0)
        slope = tl.where(mask, slope, 0.0)
        if COLUMNS and slab == 0:
            column = columns + tile.to(tl.int64) * 3 * width + output
            if NORMED:
                tl.store(column + width, tl.sum(slope * normed, axis=0), mask=output < width)
            tl.store(column + 2 * width, tl.sum(slope, axis=0), mask=output < width)
        if NORMED:
            slope = rstd[:, None] * (slope * norm_scale - normed * projected[:, None])
            slope = tl.where(mask, slope, 0.0)
        if COLUMNS and slab == 0:
            column = columns + tile.to(tl.int64) * 3 * width + output
            tl.store(column, tl.sum(slope, axis=0), mask=output < width)
        operand = slope.to(COMPUTE)
        if SLOPES and slab == 0:
            local = (position - first_tile * tile_rows).to(tl.int64)
            tl.store(slopes + local[:, None] * width + output[None, :], operand, mask=mask)
        if ROWS:
            summed = ()
            for block in tl.static_range(SLAB):
                w = _weight_block(
                    weight,
                    output,
                    width,
                    (slab * SLAB + block) * BLOCK_I,
                    weight_row,
                    False,
                    BLOCK_I,
                )
                summed = summed + (
                    tl.dot(operand, w, accumulators[block], input_precision=PRECISION),
                )
            accumulators = summed
    if ROWS:
        target = gradient + _locate(
            position, image_tokens, grid_width, gradient_batch, gradient_row, gradient_column
        )
        for block in tl.static_range(SLAB):
            channel = (slab * SLAB + block) * BLOCK_I + tl.arange(0, BLOCK_I)
            tl.store(
                target[:, None] + channel[None, :] * gradient_channel,
                accumulators[block].to(gradient.dtype.element_ty),
                mask=inside[:, None] & (channel < channels)[None, :],
            )


@triton.jit
def _pooled_share(
    tokens, resident, offset, image, inside, channels, channel_stride, pooled_projected, rstd,
    COMPUTE: tl.constexpr, RESIDENT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_I: tl.constexpr,
):  # fmt: skip
    """Mean over outputs of g upstream x_hat, for the part of the upstream that pooling shares out.

    All tokens of an image have the same upstream P, so sum_o g P y is the token times the vector
    W_c^T (g P), which `pooled_projection` has made: no walk over the outputs is needed.
    """
    base = pooled_projected + image.to(tl.int64) * (channels + 1)
    total = tl.load(base + channels, mask=inside, other=0.0)
    if RESIDENT > 0:
        for block in tl.static_range(RESIDENT):
            channel = block * BLOCK_I + tl.arange(0, BLOCK_I)
            mask = inside[:, None] & (channel < channels)[None, :]
            vector = tl.load(base[:, None] + channel[None, :], mask=mask, other=0.0)
            total += tl.sum(resident[block].to(tl.float32) * vector, axis=1)
    else:
        for first in range(0, channels, BLOCK_I):
            channel = first + tl.arange(0, BLOCK_I)
            mask = inside[:, None] & (channel < channels)[None, :]
            x = _token_block(
                tokens, offset, inside, first, channels, channel_stride, COMPUTE, BLOCK_I
            )
            vector = tl.load(base[:, None] + channel[None, :], mask=mask, other=0.0)
            total += tl.sum(x.to(tl.float32) * vector, axis=1)
    return rstd * total


@triton.jit
def pooled_projection(
    pooled_upstream, norm_weight, weight, bias, projected, images, channels, width, weight_row,
    HAS_BIAS: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr,
):  # fmt: skip
    """[images, channels + 1]: mean over outputs of g P W_c, and of g P b_c in the last column."""
    image = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    channel = tl.program_id(1) * BLOCK_I + tl.arange(0, BLOCK_I)
    total = tl.zeros([BLOCK_B, BLOCK_I], dtype=tl.float32)
    constant = tl.zeros([BLOCK_B], dtype=tl.float32)
    for first in range(0, width, BLOCK_O):
        output = first + tl.arange(0, BLOCK_O)
        mask = (image < images)[:, None] & (output < width)[None, :]
        pointer = pooled_upstream + image.to(tl.int64)[:, None] * width + output[None, :]
        scaled = tl.load(pointer, mask=mask, other=0.0)
        scaled *= _per_output(norm_weight, output, width, True, 1.0)
        w = _weight_block(
            weight, output, width, tl.program_id(1) * BLOCK_I, weight_row, False, BLOCK_I
        )
        total = tl.dot(scaled, w.to(tl.float32), total, input_precision="tf32x3")
        if HAS_BIAS:
            b = tl.load(bias + output, mask=output < width, other=0.0)
            constant += tl.sum(scaled * b[None, :], axis=1)
    target = projected + image.to(tl.int64) * (channels + 1)
    tl.store(
        target[:, None] + channel[None, :],
        total / width,
        mask=(image < images)[:, None] & (channel < channels)[None, :],
    )
    if tl.program_id(1) == 0:
        tl.store(target + channels, constant / width, mask=image < images)


@triton.jit(do_not_specialize=["first_position", "band_tokens"])
def weight_gradient(
    tokens, slopes, partials,
    first_position, band_tokens, split_tokens, image_tokens, grid_width, channels, width,
    tokens_batch, tokens_row, tokens_column, tokens_channel,
    ADD: tl.constexpr, COMPUTE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr,
):  # fmt: skip
    """[BLOCK_O, BLOCK_I] of slopes^T tokens over one split of a band of tokens."""
    output = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)
    channel = tl.program_id(1) * BLOCK_I + tl.arange(0, BLOCK_I)
    split = tl.program_id(2)
    start = split * split_tokens
    end = tl.minimum(start + split_tokens, band_tokens)
    target = partials + (split * width + output)[:, None].to(tl.int64) * channels + channel[None, :]
    mask = (output < width)[:, None] & (channel < channels)[None, :]
    total = tl.zeros([BLOCK_O, BLOCK_I], dtype=tl.float32)
    if ADD:
        total += tl.load(target, mask=mask, other=0.0)
    for first in range(start, end, BLOCK_M):
        local = first + tl.arange(0, BLOCK_M)
        inside = local < end
        offset = _locate(
            first_position + local, image_tokens, grid_width,
            tokens_batch, tokens_row, tokens_column,
        )  # fmt: skip
        x = _token_block(
            tokens, offset, inside, tl.program_id(1) * BLOCK_I, channels, tokens_channel,
            COMPUTE, BLOCK_I,
        )  # fmt: skip
        slope = tl.load(
            slopes + local.to(tl.int64)[None, :] * width + output[:, None],
            mask=(output < width)[:, None] & inside[None, :],
            other=0.0,
        )
        total = tl.dot(slope, x, total, input_precision=PRECISION)
    tl.store(target, total, mask=mask)


@triton.jit
def center_columns(
    source, target, rows, columns, target_row, parts, part_stride,
    CENTER: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Target [rows, columns] = sum of the parts of source, minus its mean over the rows.

    Its rows may be longer than the source's; the rest is filled with zeros.
    """
    column = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    mean = tl.zeros([BLOCK_C], dtype=tl.float32)
    if CENTER:
        for first in range(0, rows, BLOCK_R):
            mean += tl.sum(
                _summed_parts(source, first, column, rows, columns, parts, part_stride, BLOCK_R),
                axis=0,
            )
        mean = mean / rows
    first = tl.program_id(1) * BLOCK_R
    row = first + tl.arange(0, BLOCK_R)
    value = _summed_parts(source, first, column, rows, columns, parts, part_stride, BLOCK_R)
    tl.store(
        target + row[:, None].to(tl.int64) * target_row + column[None, :],
        (value - mean[None, :]).to(target.dtype.element_ty),
        mask=(row < rows)[:, None] & (column < target_row)[None, :],
    )


@triton.jit
def _summed_parts(source, first, column, rows, columns, parts, part_stride, BLOCK_R: tl.constexpr):
    row = first + tl.arange(0, BLOCK_R)
    pointer = source + row[:, None].to(tl.int64) * columns + column[None, :]
    mask = (row < rows)[:, None] & (column < columns)[None, :]
    value = tl.load(pointer, mask=mask, other=0.0).to(tl.float32)
    for part in range(1, parts):
        value += tl.load(pointer + part * part_stride, mask=mask, other=0.0).to(tl.float32)
    return value


@triton.jit
def finish_columns(columns, result, tiles, width, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    """[3, width]: sums over tiles of [tiles, 3, width]."""
    column = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = column < 3 * width
    total = tl.zeros([BLOCK_R, BLOCK_C], dtype=tl.float32)
    for first in range(0, tiles, BLOCK_R):
        tile = first + tl.arange(0, BLOCK_R)
        pointer = columns + tile[:, None].to(tl.int64) * 3 * width + column[None, :]
        total += tl.load(pointer, mask=(tile < tiles)[:, None] & mask[None, :], other=0.0)
    tl.store(result + column, tl.sum(total, axis=0), mask=mask)


@triton.jit
def finish_pool(partials, pooled, tile_rows, image_tokens, images, width, BLOCK_C: tl.constexpr):
    """[B, width]: means over images of the sums per tile and image, in the order of the tiles."""
    image = tl.program_id(0)
    column = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = column < width
    start = image.to(tl.int64) * image_tokens
    total = tl.zeros([BLOCK_C], dtype=tl.float32)
    last = (start + image_tokens - 1) // tile_rows
    for tile in range(start // tile_rows, last + 1):
        slot = image - tile * tile_rows // image_tokens
        total += tl.load(partials + (tile * images + slot) * width + column, mask=mask, other=0.0)
    target = pooled + image.to(tl.int64) * width + column
    tl.store(target, total / image_tokens, mask=mask)


@triton.jit
def scale_in_place(gradient, upstream, count, BLOCK: tl.constexpr):
    """Multiply in place; returns at once where there is nothing to do."""
    factor = tl.load(upstream).to(tl.float32)
    if factor != 1.0:
        place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        mask = place < count
        value = tl.load(gradient + place, mask=mask, other=0.0).to(tl.float32)
        tl.store(gradient + place, (value * factor).to(gradient.dtype.element_ty), mask=mask)
