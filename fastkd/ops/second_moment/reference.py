"""second_moment in plain PyTorch: the definition, and the path of CPUs, a chunk at a time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, get_args

import torch
from torch import Tensor

from fastkd.ops.checks import exact_float32, power_of_two

Weight = Literal["none", "row_norm"]
WEIGHTS: tuple[Weight, ...] = get_args(Weight)

# Tokens whose products are summed in float32. On a CPU so many fit the caches. The tensor cores of
# GPUs, which half precision runs on, round what they add up towards zero: 4096 squares on the
# diagonal fall short by up to 2e-5 of their sum, and further chunks do not average that out. Other
# precisions round to nearest, and run faster in long sums.
CHUNK_ROWS = 1024
ACCELERATOR_CHUNK_ROWS = 4096

# Columns of one product on a CPU: narrow enough to leave out most of the lower triangle.
STRIP = 128


def definition(tokens: Tensor, weight: str) -> Tensor:
    """The sum over tokens of x x^T, or of x x^T / ||x||^2; [..., D] -> [D, D], in their dtype."""
    rows = tokens.reshape(-1, tokens.shape[-1])
    if weight == "row_norm":
        rows = rows[rows.ne(0).any(dim=-1)]
        rows = rows / rows.norm(dim=-1, keepdim=True)
    return rows.mT @ rows


def as_images(tokens: Tensor) -> Tensor:
    """[..., D] as [B, N, D]: a view where two strides reach every token, else a copy."""
    while tokens.ndim < 3:
        tokens = tokens[None]
    for dim in reversed(range(tokens.ndim - 2)):
        pair = tokens.shape[dim : dim + 2]
        if 1 in pair or tokens.stride(dim) == pair[1] * tokens.stride(dim + 1):
            tokens = tokens.flatten(dim, dim + 1)
    return tokens[None] if tokens.ndim == 2 else tokens.flatten(0, -3)


def row_chunks(tokens: Tensor, rows: int) -> Iterator[Tensor]:
    """The tokens of [B, N, D] in order, as [up to ``rows``, D]: whole images, or parts of one."""
    for images in tokens.split(max(1, rows // max(1, tokens.shape[1]))):
        for part in images.split(rows, dim=1):
            yield part.reshape(-1, part.shape[-1])


def chunk_rows(tokens: Tensor) -> int:
    """How many tokens one product takes."""
    short = tokens.device.type == "cpu" or tokens.dtype in (torch.float16, torch.bfloat16)
    return CHUNK_ROWS if short else ACCELERATOR_CHUNK_ROWS


def forward(tokens: Tensor, weight: str) -> Tensor:
    """[B, N, D] -> [D, D] float64, exactly symmetric; see `fastkd.ops.second_moment`."""
    channels = tokens.shape[-1]
    moment = tokens.new_zeros((channels, channels), dtype=torch.float64)
    strip = STRIP if tokens.device.type == "cpu" else channels
    dtype = _product_dtype(tokens)
    with exact_float32():
        for rows in row_chunks(tokens, chunk_rows(tokens)):
            left, rights = operands(rows, weight, dtype)
            for first in range(0, channels, strip):
                own = slice(first, first + strip)
                for right in rights:
                    moment[own, first:] += _product(left[:, own], right[:, first:])
    return moment.triu() + moment.triu(1).mT


def operands(rows: Tensor, weight: str, dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
    """Left and right [rows, D], whose products left^T right add up to a chunk's second moment.

    Half-precision tokens are exact on the left; on the right, where a norm divides them, a second
    operand holds what rounding left over.
    """
    if weight == "none":
        rows = rows.to(dtype)
        return rows, [rows]
    scaled, weighted = normalized(rows.to(torch.promote_types(rows.dtype, torch.float32)))
    high = weighted.to(dtype)
    if high.dtype == weighted.dtype:
        return scaled, [weighted]
    return scaled.to(dtype), [high, (weighted - high).to(dtype)]


def normalized(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Factors a x and a x / ||a x||^2 of x x^T / ||x||^2 that neither overflow nor underflow.

    a is the power of two that brings the token's norm into [1/2, 1]: float16, too, holds both, and
    what rounding the second leaves over. Zero for a token of zeros, NaN for one with a NaN.
    """
    # First by the largest channel: before that, the norm itself may overflow or underflow.
    scaled = rows / power_of_two(rows.abs().amax(dim=-1, keepdim=True))
    scaled = scaled / (2 * power_of_two(scaled.square().sum(dim=-1, keepdim=True).sqrt()))
    squared_norm = scaled.square().sum(dim=-1, keepdim=True)
    return scaled, scaled / squared_norm.masked_fill(squared_norm == 0, 1.0)


def _product_dtype(tokens: Tensor) -> torch.dtype:
    """The tokens' own on a GPU, whose half-precision products are exact; else at least float32."""
    if tokens.device.type == "cuda":
        return tokens.dtype
    return torch.promote_types(tokens.dtype, torch.float32)


def _product(left: Tensor, right: Tensor) -> Tensor:
    if left.dtype in (torch.float16, torch.bfloat16):
        return torch.mm(left.mT, right, out_dtype=torch.float32)
    return left.mT @ right
