"""second_moment in Triton. Formulas: reference.py.

Cut: the upper triangle of [D, D] in square tiles, times splits of up to SPLIT_ROWS tokens; one
program sums its tokens' products in float32 registers and writes one tile. A last kernel adds the
splits in float64, in order, and mirrors the triangle. Tokens are taken in bands of a few splits,
so that the partial sums stay small however many tokens and channels there are. For row_norm a first
kernel leaves two numbers per token: a power of two that brings its norm near 1, and the inverse of
its squared norm after that; made in the tiles, they would need whole tokens in each.

Moves: the tokens (row_norm: twice), and again for every tile, from the L2 cache; half of 4 D^2
bytes per split, twice. Half-precision tokens are exact operands; divided by a squared norm they are
two, the rounded value and what rounding left over, so that products are as exact as float32's
(with norms near 1 all operands are about D^-1/2, and float16 still holds what is left over).
sm_90, bf16, D = 384: 103 registers (row_norm 129) and 98 KB (64 KB) of shared memory; nothing is
spilled on sm_80, sm_90, sm_100 (gates of tests/ops/test_second_moment_compiled.py).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastkd.ops.operator import KernelLaunch

WEIGHT_ROWS, WEIGHT_CHANNELS = 8, 256  # tile of row_weights
FINISH_BLOCK = 32
# Tensor cores round what they add up towards zero: the diagonal, a sum of squares, falls short by
# about 3e-6 over so many tokens on an H100 (6e-6 on an A100), and in proportion over more.
SPLIT_ROWS = 1024
SHORTEST_SPLIT = 256  # below, writing the partial sums costs more than it gains
MAX_SPLITS = 32
PARTIAL_BYTES = 2**27  # of the partial sums, where one split does not take more
MAX_ROWS = 2**31 - 2**18  # positions are int32; the last band's blocks may run past the tokens
MAX_CHANNELS = 2**15


@triton.jit
def _locate(position, image_tokens, image_stride, token_stride):
    """Offsets of tokens that are counted over all images."""
    image = position // image_tokens
    token = position - image * image_tokens
    return image.to(tl.int64) * image_stride + token.to(tl.int64) * token_stride


@triton.jit
def _token_tile(pointers, inside, channel, channels):
    """[BLOCK_R, BLOCK_C] of the tokens; zeros outside."""
    mask = inside[:, None] & (channel < channels)[None, :]
    return tl.load(pointers + channel[None, :], mask=mask, other=0.0)


@triton.jit
def _power_of_two(biased_exponent):
    return (biased_exponent << 23).to(tl.float32, bitcast=True)


@triton.jit
def row_weights(
    tokens, weights,
    rows, channels, image_tokens, image_stride, token_stride,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Two numbers per token, [2, rows]: a power of two a, and 1 / ||a x||^2 (0 for zeros).

    a brings the norm into [1/2, 1], or as near as it can be held and be finite.
    """
    position = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    inside = position < rows
    pointers = tokens + _locate(position, image_tokens, image_stride, token_stride)[:, None]
    largest = tl.zeros([BLOCK_R], dtype=tl.int32)
    for first in range(0, channels, BLOCK_C):
        x = _token_tile(pointers, inside, first + tl.arange(0, BLOCK_C), channels).to(tl.float32)
        # As integers, sizes of floats are in the same order, and NaN is the largest.
        bits = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF
        largest = tl.maximum(largest, tl.max(bits, axis=1))
    # First by the largest channel: before that, the norm itself may overflow or underflow.
    exponent = tl.maximum(254 - (largest >> 23), 1)
    scale = _power_of_two(exponent)
    squared_norm = tl.zeros([BLOCK_R], dtype=tl.float32)
    for first in range(0, channels, BLOCK_C):
        x = _token_tile(pointers, inside, first + tl.arange(0, BLOCK_C), channels).to(tl.float32)
        x *= scale[:, None]
        squared_norm += tl.sum(x * x, axis=1)
    excess = (((squared_norm.to(tl.int32, bitcast=True) >> 23) - 127) >> 1) + 1
    final_exponent = tl.minimum(tl.maximum(exponent - excess, 1), 254)
    change = _power_of_two(127 + final_exponent - exponent)
    inverse = 1.0 / (squared_norm * change * change)
    inverse = tl.where(squared_norm < float("inf"), inverse, float("nan"))
    tl.store(weights + position, _power_of_two(final_exponent), mask=inside)
    tl.store(weights + rows + position, tl.where(largest == 0, 0.0, inverse), mask=inside)


@triton.jit(do_not_specialize=["first_row"])  # one compilation for all bands
def tile_moments(
    tokens, weights, partials,
    first_row, split_rows, rows, channels, image_tokens, image_stride, token_stride,
    WEIGHTED: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """One tile of the upper triangle over one split: partials[split] [D, D]."""
    if tl.program_id(0) > tl.program_id(1):
        return
    left_channel = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    right_channel = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    split = tl.program_id(2)
    start = first_row + split * split_rows
    end = tl.minimum(start + split_rows, rows)
    sums = tl.zeros([BLOCK_D, BLOCK_D], dtype=tl.float32)
    for first in range(start, end, BLOCK_R):
        position = first + tl.arange(0, BLOCK_R)
        inside = position < end
        pointers = tokens + _locate(position, image_tokens, image_stride, token_stride)[:, None]
        left = _token_tile(pointers, inside, left_channel, channels)
        right = _token_tile(pointers, inside, right_channel, channels)
        if WEIGHTED:
            scale = tl.load(weights + position, mask=inside, other=0.0)
            inverse = tl.load(weights + rows + position, mask=inside, other=0.0)
            left = (left.to(tl.float32) * scale[:, None]).to(left.dtype)
            weighted = right.to(tl.float32) * scale[:, None] * inverse[:, None]
            right = weighted.to(right.dtype)
            if right.dtype != tl.float32:
                rest = (weighted - right.to(tl.float32)).to(right.dtype)
                sums = tl.dot(tl.trans(left), rest, sums, input_precision=PRECISION)
        sums = tl.dot(tl.trans(left), right, sums, input_precision=PRECISION)
    offset = split.to(tl.int64) * channels * channels
    offset += left_channel[:, None].to(tl.int64) * channels + right_channel[None, :]
    mask = (left_channel < channels)[:, None] & (right_channel < channels)[None, :]
    tl.store(partials + offset, sums, mask=mask)


@triton.jit
def add_splits(
    partials, moment, splits, channels, ADD: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """The sum of the splits' upper triangles, added to the moment or in its place, and mirrored."""
    if tl.program_id(0) > tl.program_id(1):
        return
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    upper = (row[:, None] <= column[None, :]) & (column < channels)[None, :]
    offset = row[:, None].to(tl.int64) * channels + column[None, :]
    total = tl.zeros([BLOCK, BLOCK], dtype=tl.float64)
    if ADD:
        total += tl.load(moment + offset, mask=upper, other=0.0)
    partial = partials + offset
    for _ in range(splits):
        total += tl.load(partial, mask=upper, other=0.0).to(tl.float64)
        partial += channels * channels
    tl.store(moment + offset, total, mask=upper)
    mirrored = row[:, None] + column[None, :].to(tl.int64) * channels
    tl.store(moment + mirrored, total, mask=upper)


@dataclass(frozen=True)
class Tile:
    """A configuration of `tile_moments`."""

    channels: int  # of a square tile, BLOCK_D
    rows: int  # tokens per step, BLOCK_R
    warps: int
    stages: int
    programs: int  # to aim at, in whole waves on the 132 multiprocessors of an H100


LARGE = Tile(128, 64, warps=8, stages=3, programs=132)
SMALL = Tile(64, 64, warps=4, stages=3, programs=264)
FLOAT = Tile(64, 32, warps=4, stages=3, programs=264)
WEIGHTED_ROWS = 32  # 64 tokens and their weights are spilled on sm_80
WIDE = 512  # from here on a large tile that is cut off costs less than many small ones


def tile_of(tokens: Tensor, weight: str) -> Tile:
    """The configuration for [B, N, D] tokens: large tiles where few of them are cut off."""
    if tokens.dtype == torch.float32:
        return FLOAT
    channels = tokens.shape[2]
    # Addresses that do not lie 16 bytes apart take the registers that a large tile needs.
    aligned = channels % 16 == tokens.stride(1) % 16 == 0
    whole = channels % LARGE.channels == 0 or channels >= WIDE
    tile = LARGE if aligned and whole else SMALL
    return replace(tile, rows=WEIGHTED_ROWS) if weight == "row_norm" else tile


@dataclass(frozen=True)
class Cut:
    """How a band of tokens is split."""

    tile: Tile
    split_rows: int
    splits: int  # in a band; in the last one some may be empty, and are left out

    @staticmethod
    def of(tokens: Tensor, weight: str) -> Cut:
        """The cut of [B, N, D] tokens: enough programs to fill a GPU, no sum too long or large."""
        tile = tile_of(tokens, weight)
        most_splits = min(MAX_SPLITS, max(1, PARTIAL_BYTES // (4 * tokens.shape[-1] ** 2)))
        band_rows = min(tokens.shape[:2].numel(), most_splits * SPLIT_ROWS)
        blocks = triton.cdiv(tokens.shape[-1], tile.channels)
        wanted = triton.cdiv(tile.programs, blocks * (blocks + 1) // 2)
        wanted = min(wanted, most_splits, triton.cdiv(band_rows, SHORTEST_SPLIT))
        wanted = max(wanted, triton.cdiv(band_rows, SPLIT_ROWS))
        split_rows = triton.cdiv(triton.cdiv(band_rows, wanted), tile.rows) * tile.rows
        return Cut(tile, split_rows, triton.cdiv(band_rows, split_rows))


def refuses(tokens: Tensor, weight: str) -> str | None:
    """Why these inputs cannot run here; None where they can."""
    if tokens.shape[:2].numel() > MAX_ROWS:
        return f"at most {MAX_ROWS} tokens, got {tokens.shape[:2].numel()}"
    if tokens.shape[2] > MAX_CHANNELS:
        return f"at most {MAX_CHANNELS} channels, got {tokens.shape[2]}"
    return None


def forward(tokens: Tensor, weight: str) -> Tensor:
    """As `reference.forward`; no synchronization. Copies tokens whose channels are not adjacent."""
    if tokens.stride(2) != 1:
        tokens = tokens.contiguous()
    moment = tokens.new_empty((tokens.shape[2], tokens.shape[2]), dtype=torch.float64)
    for launch in launches(tokens, weight, moment):
        launch.run()
    return moment


def launches(tokens: Tensor, weight: str, moment: Tensor) -> list[KernelLaunch]:
    """Weights of all tokens, where there are any; then, band by band, partial sums and their sum.

    ``tokens`` are [B, N, D] with adjacent channels, ``moment`` is [D, D] float64.
    """
    cut = Cut.of(tokens, weight)
    rows, channels = tokens.shape[:2].numel(), tokens.shape[2]
    weighted = weight == "row_norm"
    weights = tokens.new_empty((2, rows if weighted else 0), dtype=torch.float32)
    partials = tokens.new_empty((cut.splits, channels, channels), dtype=torch.float32)
    started = [_weights_launch(tokens, weights)] if weighted else []
    for first in range(0, rows, cut.splits * cut.split_rows):
        splits = min(cut.splits, triton.cdiv(rows - first, cut.split_rows))
        started += [
            _moments_launch(tokens, weights, partials, cut, first, splits),
            _finish_launch(partials, moment, splits, add=first > 0),
        ]
    return started


def _walk(tokens: Tensor) -> dict[str, Tensor | int]:
    return {
        "tokens": tokens,
        "rows": tokens.shape[:2].numel(),
        "channels": tokens.shape[2],
        "image_tokens": tokens.shape[1],
        "image_stride": tokens.stride(0),
        "token_stride": tokens.stride(1),
    }


def _weights_launch(tokens: Tensor, weights: Tensor) -> KernelLaunch:
    return KernelLaunch(
        row_weights,
        (triton.cdiv(weights.shape[1], WEIGHT_ROWS),),
        {**_walk(tokens), "weights": weights},
        {"BLOCK_R": WEIGHT_ROWS, "BLOCK_C": WEIGHT_CHANNELS},
    )


def _moments_launch(
    tokens: Tensor, weights: Tensor, partials: Tensor, cut: Cut, first_row: int, splits: int
) -> KernelLaunch:
    tile = cut.tile
    blocks = triton.cdiv(tokens.shape[2], tile.channels)
    return KernelLaunch(
        tile_moments,
        (blocks, blocks, splits),
        {
            **_walk(tokens),
            "weights": weights,
            "partials": partials,
            "first_row": first_row,
            "split_rows": cut.split_rows,
        },
        {
            "WEIGHTED": weights.shape[1] > 0,
            "PRECISION": "tf32x3",  # of float32 tokens; others are multiplied as they are
            "BLOCK_D": tile.channels,
            "BLOCK_R": tile.rows,
        },
        num_warps=tile.warps,
        num_stages=tile.stages,
    )


def _finish_launch(partials: Tensor, moment: Tensor, splits: int, add: bool) -> KernelLaunch:
    blocks = triton.cdiv(partials.shape[2], FINISH_BLOCK)
    return KernelLaunch(
        add_splits,
        (blocks, blocks),
        {"partials": partials, "moment": moment, "splits": splits, "channels": partials.shape[2]},
        {"ADD": add, "BLOCK": FINISH_BLOCK},
    )
