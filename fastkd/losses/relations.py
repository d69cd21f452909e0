"""Chunks and unit vectors, for losses between images that compute their gradient in the forward."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastkd.losses.base import check_numbers
from fastkd.ops.checks import power_of_two
from fastkd.ops.feature_kd.reference import ACCELERATOR_CHUNK_BYTES, CHUNK_BYTES

# A shorter vector has no direction: its similarities are 0, and it gets no gradient.
SHORTEST = 1e-12


def chunk_limit(device: torch.device, chunk_bytes: int | None) -> int:
    """Get the limit of a chunk's temporaries in bytes: the caller's or the device's default."""
    if chunk_bytes is not None:
        return chunk_bytes
    return CHUNK_BYTES if device.type == "cpu" else ACCELERATOR_CHUNK_BYTES


def check_chunk_bytes(term: nn.Module, chunk_bytes: int | None) -> None:
    """Raise unless the size is positive or None."""
    if chunk_bytes is not None:
        check_numbers(term, chunk_bytes=(chunk_bytes, 1))


def slices(length: int, bytes_each: int, limit: int) -> Iterator[slice]:
    """Cut ``length`` items of ``bytes_each`` into slices that fit ``limit``, or of one item."""
    step = max(1, limit // max(1, bytes_each))
    for first in range(0, length, step):
        yield slice(first, min(first + step, length))


def directions(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Get unit vectors of [..., D], zero where shorter than `SHORTEST`, and the scale [..., 1]."""
    x = x.to(dtype)
    # A norm of squares that overflow would be infinite, and the direction lost.
    size = power_of_two(torch.linalg.vector_norm(x, ord=torch.inf, dim=-1, keepdim=True))
    # Contiguous: tokens may come transposed, and a batched product of their strides would be slow.
    unit = torch.div(x, size, out=x.new_empty(x.shape))
    norm = torch.linalg.vector_norm(unit, dim=-1, keepdim=True)
    inverse = norm.reciprocal().masked_fill_(norm * size < SHORTEST, 0)
    return unit.mul_(inverse), inverse.div_(size)


def normalized(x: Tensor) -> Tensor:
    """`F.normalize` of [B, D] over D, for any size of float32."""
    size = power_of_two(torch.linalg.vector_norm(x.detach(), ord=torch.inf, dim=1, keepdim=True))
    return F.normalize(x / size.clamp_min(1), dim=1)


def before_direction(slope: Tensor, unit: Tensor, inverse: Tensor) -> Tensor:
    """Turn ``slope``, the gradient of unit vectors, into that of `directions`' input, in place."""
    along = torch.linalg.vecdot(slope, unit).unsqueeze(-1)
    return slope.addcmul_(unit, along, value=-1).mul_(inverse)
