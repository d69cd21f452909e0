"""Stand-ins for what timm's transforms work on: they keep what was drawn, and touch no pixel.

Knows timm's operations by their functions; neither which of them a policy has nor what the device
makes of the calls.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any

import torch
from PIL import Image
from timm.data import auto_augment
from timm.data.auto_augment import AugmentOp
from torch import Tensor
from torchvision.transforms import ColorJitter

from fastkd.data.gpu_augment.operations import Operation

Call = tuple[Operation, tuple[float, ...]]


def not_done(name: str) -> ValueError:
    """The error for what the device does not do.

    Args:
        name: timm's or torchvision's.

    Returns:
        The error, to be raised.
    """
    return ValueError(
        f"augment: 'gpu' does not do {name}: take augment='cpu', or a policy (auto_augment) without"
    )


class CallRecorder:
    """In the place of an operation's pixel function: appends the call to a list, its "image".

    Args:
        operation: whose function it stands for.
        size: (channels, height, width) of the image.

    Raises:
        ValueError: the device does not do it.
    """

    def __init__(self, operation: AugmentOp, size: tuple[int, int, int]) -> None:
        # By name: the operation's own function may be wrapped by one that keeps a bit.
        function = auto_augment.NAME_TO_OP[operation.name]
        if function not in _TRANSLATIONS:
            raise not_done(operation.name)
        self.translate = _TRANSLATIONS[function]
        self.size = size

    def __call__(self, calls: list[Call], *arguments: float, resample: Any, **_: Any) -> list[Call]:
        """As timm calls it; a filter of several is drawn here, as in timm's functions."""
        return [*calls, self.translate(self.size, resample, *arguments)]


class JitterRecorder:
    """In the place of torchvision's colour jitter: appends what it draws, as calls.

    Args:
        jitter: without a range of hues, as timm makes it of one number.
    """

    operations = (Operation.BRIGHTNESS, Operation.CONTRAST, Operation.COLOR)

    def __init__(self, jitter: ColorJitter) -> None:
        self.ranges = jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue

    def __call__(self, calls: list[Call]) -> list[Call]:
        """Append brightness, contrast and saturation in the order that is drawn."""
        order, *factors = ColorJitter.get_params(*self.ranges)
        drawn = [
            (self.operations[number], (factors[number],))
            for number in order.tolist()
            if factors[number] is not None
        ]
        return [*calls, *drawn]


class ErasedBox:
    """In the place of the tensor that timm's random erasing writes to: keeps where.

    Args:
        size: (channels, height, width) of the image.

    Attributes:
        box: top, left, height, width; zeros where nothing was written.
    """

    dtype = torch.float32

    def __init__(self, size: tuple[int, int, int]) -> None:
        self._size = size
        self.box = (0, 0, 0, 0)

    def size(self) -> tuple[int, int, int]:
        """As a tensor's."""
        return self._size

    def __setitem__(self, place: tuple[slice, slice, slice], pixels: Tensor) -> None:
        rows, columns = place[1:]
        self.box = (rows.start, columns.start, rows.stop - rows.start, columns.stop - columns.start)


def _desaturation(_: Any, __: Any, part: float) -> Call:
    return Operation.COLOR, (min(1.0, max(0.0, 1 - part)),)


def _single(operation: Operation) -> Callable[..., Call]:
    def translate(_: Any, __: Any, *values: float) -> Call:
        return operation, values

    return translate


def _affine(matrix: Callable[..., tuple[float, ...]]) -> Callable[..., Call]:
    def translate(size: tuple[int, int, int], resample: Any, value: float) -> Call:
        if isinstance(resample, list | tuple):
            resample = random.choice(resample)
        bicubic = resample == Image.Resampling.BICUBIC
        operation = Operation.AFFINE_BICUBIC if bicubic else Operation.AFFINE_BILINEAR
        return operation, matrix(size[2], size[1], value)

    return translate


def _rotation(width: int, height: int, degrees: float) -> tuple[float, ...]:
    """Counterclockwise about the centre, as Pillow: from a pixel to where it comes from."""
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    x, y = width / 2, height / 2
    return cos, -sin, x - cos * x + sin * y, sin, cos, y - sin * x - cos * y


# What timm's functions do, by the function: (size, resample, *arguments) -> Call.
_TRANSLATIONS: dict[Any, Callable[..., Call]] = {
    auto_augment.auto_contrast: _single(Operation.AUTO_CONTRAST),
    auto_augment.equalize: _single(Operation.EQUALIZE),
    auto_augment.invert: _single(Operation.INVERT),
    auto_augment.posterize: _single(Operation.POSTERIZE),
    auto_augment.solarize: _single(Operation.SOLARIZE),
    auto_augment.solarize_add: _single(Operation.SOLARIZE_ADD),
    auto_augment.brightness: _single(Operation.BRIGHTNESS),
    auto_augment.contrast: _single(Operation.CONTRAST),
    auto_augment.color: _single(Operation.COLOR),
    auto_augment.sharpness: _single(Operation.SHARPNESS),
    auto_augment.desaturate: _desaturation,
    auto_augment.rotate: _affine(_rotation),
    auto_augment.shear_x: _affine(lambda w, h, factor: (1, factor, 0, 0, 1, 0)),
    auto_augment.shear_y: _affine(lambda w, h, factor: (1, 0, 0, factor, 1, 0)),
    auto_augment.translate_x_rel: _affine(lambda w, h, part: (1, 0, part * w, 0, 1, 0)),
    auto_augment.translate_y_rel: _affine(lambda w, h, part: (1, 0, 0, 0, 1, part * h)),
    auto_augment.translate_x_abs: _affine(lambda w, h, pixels: (1, 0, pixels, 0, 1, 0)),
    auto_augment.translate_y_abs: _affine(lambda w, h, pixels: (1, 0, 0, 0, 1, pixels)),
}
