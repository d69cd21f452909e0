"""Random erasing on the device: boxes of normal noise that depend on a seed per image alone.

Knows boxes and seeds; not how they were drawn. The noise is a hash of (seed, place) turned into
normal numbers, so no generator of the device is read or moved.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

MASK = 0xFFFFFFFF
# lowbias32 of Chris Wellons' hash prospector. The second factor is taken less 2 ** 32: the same
# modulo 2 ** 32, and no product leaves int64.
FACTORS = (0x7FEB352D, 0x846CA68B - 2**32)


def erase(images: Tensor, boxes: Tensor, seeds: Tensor) -> Tensor:
    """Fill a box of every image with normal noise.

    Args:
        images: [E, C, H, W] float32.
        boxes: [E, 4] int64: top, left, height, width.
        seeds: [E] int64, in [0, 2 ** 32).

    Returns:
        [E, C, H, W] float32. Allocates some int64 tensors of that size.
    """
    height, width = images.shape[2:]
    top, left, box_height, box_width = boxes.view(-1, 4, 1, 1).unbind(1)
    y = torch.arange(height, device=images.device).unsqueeze(1)
    x = torch.arange(width, device=images.device)
    inside = (y >= top) & (y < top + box_height) & (x >= left) & (x < left + box_width)
    noise = normals(seeds, images[0].numel()).view_as(images)
    return torch.where(inside.unsqueeze(1), noise.to(images.dtype), images)


def normals(seeds: Tensor, count: int) -> Tensor:
    """Standard normal numbers by Box and Muller.

    Args:
        seeds: [E] int64, in [0, 2 ** 32).
        count: how many for each seed, below 2 ** 32.

    Returns:
        [E, count] float32; the same for a seed on every machine, but for the device's last bits.
    """
    pairs = -(-count // 2)
    # Hashed twice: places alone would give neighbouring seeds the same numbers in another order.
    places = _hash(torch.arange(2 * pairs, device=seeds.device))
    uniform = _uniform(_hash(places ^ seeds.unsqueeze(1)))
    radius = (-2 * uniform[:, :pairs].log()).sqrt()
    angle = 2 * math.pi * uniform[:, pairs:]
    return torch.cat([radius * angle.cos(), radius * angle.sin()], dim=1)[:, :count]


def _uniform(bits: Tensor) -> Tensor:
    """32 random bits to float32 in (0, 1): the upper 24, which float32 holds, and a half."""
    return ((bits >> 8) + 0.5) * 2.0**-24


def _hash(x: Tensor) -> Tensor:
    """Mix 32 bits, held in int64."""
    x = x ^ (x >> 16)
    x = (x * FACTORS[0]) & MASK
    x = x ^ (x >> 15)
    x = (x * FACTORS[1]) & MASK
    return x ^ (x >> 16)
