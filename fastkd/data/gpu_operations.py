"""The pixel operations of timm's policies on batches of uint8 images, with a factor per image.

Pointwise operations match Pillow bit for bit, rounding to uint8 included. Affine ones compute in
float32 where Pillow has double: with bicubic interpolation, fewer than one pixel in a hundred
differs by a gray level; with bilinear, one in twenty where the shift is a simple fraction.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from enum import IntEnum

import torch
from torch import Tensor

ARGUMENTS = 6  # of an operation: a matrix, or a value in the first place
LEVELS = 256

# By their number in a plan.
Operation = IntEnum(
    "Operation",
    "NOTHING AUTO_CONTRAST EQUALIZE INVERT POSTERIZE SOLARIZE SOLARIZE_ADD BRIGHTNESS CONTRAST "
    "COLOR SHARPNESS AFFINE_BILINEAR AFFINE_BICUBIC",
    start=0,
)


def apply_operation(
    operation: Operation, images: Tensor, arguments: Tensor, fill: Tensor
) -> Tensor:
    """Apply one operation (not ``NOTHING``) to images [G, 3, H, W] uint8.

    ``arguments`` are [G, 6] float32. For an affine operation they are (a, b, c, d, e, f): the pixel
    whose center is (x, y) comes from (a x + b y + c, d x + e y + f), and from outside it is
    ``fill``, [3] uint8. For others the first is the number of bits kept, the threshold, what is
    added, or the factor.
    """
    if operation in _TAPS:
        return _affine(images, arguments, fill, *_TAPS[operation])
    value = arguments[:, 0].view(-1, 1, 1, 1)
    match operation:
        case Operation.AUTO_CONTRAST:
            return _auto_contrast(images)
        case Operation.EQUALIZE:
            return _equalize(images)
        case Operation.INVERT:
            return 255 - images
        case Operation.POSTERIZE:
            dropped = (8 - value.int()).clamp(min=0).to(torch.uint8)
            return (images >> dropped) << dropped
        case Operation.SOLARIZE:
            return torch.where(images < value, images, 255 - images)
        case Operation.SOLARIZE_ADD:
            brighter = (images.int() + value.int()).clamp(max=255).to(torch.uint8)
            return torch.where(images < 128, brighter, images)
    # From a degenerate image (factor 0) to the image (1) and beyond.
    start = _degenerate(operation, images).to(torch.float32)
    change = value * (images - start)  # rounded by itself, as in Pillow: no fused multiply-add
    return (start + change).clamp_(0, 255).to(torch.uint8)


def _degenerate(operation: Operation, images: Tensor) -> Tensor:
    """Return the image without brightness, contrast, color or sharpness."""
    if operation == Operation.BRIGHTNESS:
        return torch.zeros_like(images[:, :1, :1, :1])
    if operation == Operation.SHARPNESS:
        pixels = images.int()
        columns = pixels[..., :-2] + pixels[..., 1:-1] + pixels[..., 2:]
        window = columns[..., :-2, :] + columns[..., 1:-1, :] + columns[..., 2:, :]
        smooth = pixels.clone()  # Pillow's filters leave the outermost pixels as they are
        inner = smooth[..., 1:-1, 1:-1]
        # Weights 1, and 5 in the middle, over 13, rounded to the nearest.
        inner.copy_((2 * (window + 4 * inner) + 13) // 26)
        return smooth
    # Pillow's gray levels, ITU-R 601-2 in 16 bits: [G, 1, H, W] int32.
    red, green, blue = images.int().unbind(1)
    gray = ((19595 * red + 38470 * green + 7471 * blue + 0x8000) >> 16).unsqueeze(1)
    if operation == Operation.COLOR:
        return gray
    count = gray[0].numel()
    mean = (2 * gray.flatten(1).sum(1) + count) // (2 * count)
    return mean.view(-1, 1, 1, 1)


def _auto_contrast(images: Tensor) -> Tensor:
    pixels = images.flatten(2)
    low, high = pixels.amin(2, keepdim=True), pixels.amax(2, keepdim=True)
    # In double, since values just below a whole number decide a gray level, as in Pillow.
    low, high = low.double(), high.double()
    levels = torch.arange(LEVELS, device=images.device, dtype=torch.float64)
    scale = levels[-1] / (high - low).clamp(min=1)  # a number here would be times the reciprocal
    stretched = (levels * scale + -low * scale).clamp(0, 255)
    return _look_up(torch.where(high > low, stretched, levels), images)


def _equalize(images: Tensor) -> Tensor:
    pixels = images.flatten(2).long()
    ones = torch.ones((), dtype=torch.int32, device=images.device).expand(pixels.shape)
    counts = torch.zeros(*images.shape[:2], LEVELS, dtype=torch.int32, device=images.device)
    histogram = counts.scatter_add_(2, pixels, ones)  # without synchronization
    levels = torch.arange(LEVELS, device=images.device, dtype=torch.int32)
    brightest = (levels * (histogram > 0)).amax(2, keepdim=True)
    step = (histogram.sum(2, keepdim=True) - histogram.gather(2, brightest.long())) // 255
    below = histogram.cumsum(2) - histogram
    equalized = (step // 2 + below) // step.clamp(min=1)
    # With (nearly) a single level, Pillow leaves the channel as it is.
    return _look_up(torch.where(step > 0, equalized.clamp(max=255), levels), images)


def _look_up(tables: Tensor, images: Tensor) -> Tensor:
    """Map levels by tables [G, 3, 256], whose fractions are truncated."""
    pixels = images.flatten(2).long()
    return tables.to(torch.uint8).gather(2, pixels).view_as(images)


def _affine(
    images: Tensor,
    matrices: Tensor,
    fill: Tensor,
    interpolate: Callable[[list[Tensor], Tensor], Tensor],
    first: int,
    taps: int,
) -> Tensor:
    """Pillow's affine transform: pixels whose center comes from outside are filled."""
    height, width = images.shape[2:]
    x = torch.arange(width, device=matrices.device) + 0.5
    y = (torch.arange(height, device=matrices.device) + 0.5).unsqueeze(1)
    a, b, c, d, e, f = matrices.view(-1, ARGUMENTS, 1, 1).unbind(1)
    # The source of each pixel's center, [G, H * W] float32.
    x, y = (a * x + b * y + c).flatten(1), (d * x + e * y + f).flatten(1)
    inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
    left, top = (x - 0.5).floor(), (y - 0.5).floor()
    columns = [(left.long() + first + tap).clamp(0, width - 1) for tap in range(taps)]
    rows = [(top.long() + first + tap).clamp(0, height - 1) * width for tap in range(taps)]
    across, down = ((x - 0.5) - left).unsqueeze(1), ((y - 0.5) - top).unsqueeze(1)
    pixels = images.flatten(2)
    lines = [interpolate([_pick(pixels, row + c) for c in columns], across) for row in rows]
    values = interpolate(lines, down).clamp_(0, 255).to(torch.uint8)
    return torch.where(inside.unsqueeze(1), values, fill.view(1, -1, 1)).view_as(images)


def _pick(pixels: Tensor, index: Tensor) -> Tensor:
    """Gather pixels [G, 3, H * W] at places [G, H * W], as float32."""
    picked = pixels.gather(2, index.unsqueeze(1).expand(-1, pixels.shape[1], -1))
    return picked.to(torch.float32)


def _linear(values: list[Tensor], place: Tensor) -> Tensor:
    first, second = values
    return first + place * (second - first)


def _cubic(values: list[Tensor], place: Tensor) -> Tensor:
    """Pillow's cubic with a = -1, by Horner's rule, which keeps constant values exactly."""
    before, first, second, after = values
    linear = second - before
    quadratic = 2 * (before - first) + second - after
    cubic = first - before - second + after
    return first + place * (linear + place * (quadratic + place * cubic))


# Interpolation, first tap (from the pixel left of, or above, the place), number of taps.
_TAPS = {Operation.AFFINE_BILINEAR: (_linear, 0, 2), Operation.AFFINE_BICUBIC: (_cubic, -1, 4)}


def erase(images: Tensor, boxes: Tensor, seeds: Tensor) -> Tensor:
    """Fill a box of every image [E, C, H, W] with normal noise.

    ``boxes`` are [E, 4] int64 (top, left, height, width), ``seeds`` [E] int64 in [0, 2 ** 32).
    Allocates some int64 tensors of the images' size.
    """
    height, width = images.shape[2:]
    top, left, box_height, box_width = boxes.view(-1, 4, 1, 1).unbind(1)
    y = torch.arange(height, device=images.device).unsqueeze(1)
    x = torch.arange(width, device=images.device)
    inside = (y >= top) & (y < top + box_height) & (x >= left) & (x < left + box_width)
    noise = normals(seeds, images[0].numel()).view_as(images)
    return torch.where(inside.unsqueeze(1), noise.to(images.dtype), images)


def normals(seeds: Tensor, count: int) -> Tensor:
    """Draw standard normal numbers [E, count] float32 by Box and Muller, for seeds [E].

    The same for a seed on every machine, but for the device's last bits.
    """
    pairs = -(-count // 2)
    # Hashed twice: places alone would give neighboring seeds the same numbers in another order.
    places = _hash(torch.arange(2 * pairs, device=seeds.device))
    bits = _hash(places ^ seeds.unsqueeze(1))
    # In (0, 1): the upper 24 bits, which float32 holds, and a half.
    uniform = ((bits >> 8) + 0.5) * 2.0**-24
    radius = (-2 * uniform[:, :pairs].log()).sqrt()
    angle = 2 * math.pi * uniform[:, pairs:]
    return torch.cat([radius * angle.cos(), radius * angle.sin()], dim=1)[:, :count]


def _hash(x: Tensor) -> Tensor:
    """Mix 32 bits, held in int64, by lowbias32 of Chris Wellons' hash prospector."""
    x = x ^ (x >> 16)
    x = (x * 0x7FEB352D) & 0xFFFFFFFF
    x = x ^ (x >> 15)
    x = (x * (0x846CA68B - 2**32)) & 0xFFFFFFFF  # the same modulo 2 ** 32, and within int64
    return x ^ (x >> 16)
