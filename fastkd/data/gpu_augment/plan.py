"""What a loader process does for the device: crop, and draw every random number.

Knows timm's training transform, whose own objects draw the numbers: an image that the device
augments gets the crop, flip, operations and erased box that timm would give it under the same seed.
Does not know how the device carries them out.
"""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from timm.data import auto_augment
from timm.data.auto_augment import AugmentOp, AutoAugment, RandAugment
from timm.data.random_erasing import RandomErasing
from timm.data.transforms import MaybeToTensor, RandomResizedCropAndInterpolation
from torch import Tensor
from torchvision.transforms import ColorJitter, Normalize, RandomHorizontalFlip

from fastkd.config import DataConfig
from fastkd.data.gpu_augment.operations import ARGUMENTS, Operation
from fastkd.data.transforms import InputSpec, keep_one_bit, operations_of, train_stages

NO_FILL = (0, 0, 0)
Call = tuple[Operation, tuple[float, ...]]


class Planned(NamedTuple):
    """A cropped image, and what the device is to do to it.

    Attributes:
        image: [3, H, W] uint8.
        plan: ``flip`` [] bool; ``operations`` [K] int64, numbers of `Operation`; ``arguments``
            [K, 6] float32; ``erase`` [4] int64: top, left, height and width, 0 where nothing is
            erased; ``noise`` [] int64, the seed of the erased box's noise.
    """

    image: Tensor
    plan: dict[str, Tensor]


class PlanTransform:
    """PIL image -> `Planned`, drawing what timm's training transform draws, in its order.

    Args:
        stages: the steps of timm's transform; the operations in them are changed in place.
        size: (channels, height, width) of the crop.

    Raises:
        ValueError: the device does not do one of the steps, or the images are not of 3 channels.
    """

    def __init__(self, stages: list[Any], size: tuple[int, int, int]) -> None:
        if size[0] != 3:
            raise ValueError(f"augment: 'gpu' augments images of 3 channels, got {size[0]}")
        self.size = size
        self.crop, self.flip, self.policies, self.erasing = _sorted_stages(stages)
        operations = list(operations_of(self.policies))
        for operation in operations:
            operation.aug_fn = CallRecorder(operation, size)
        keep_one_bit(self.policies)
        self.layers = max(1, sum(map(_longest, self.policies)))
        self.fill = operations[0].kwargs["fillcolor"] if operations else NO_FILL

    def __call__(self, image: Any) -> Planned:
        """Crop, and draw the rest.

        Args:
            image: a decoded RGB image.

        Returns:
            The crop and its plan; draws from python's, numpy's and torch's generators.
        """
        pixels = np.asarray(self.crop(image))
        flip = self.flip is not None and bool(torch.rand(1) < self.flip.p)
        calls: list[Call] = []
        for policy in self.policies:
            calls = policy(calls)
        erased = ErasedBox(self.size)
        if self.erasing is not None:
            self.erasing(erased)
        plan = {
            "flip": torch.tensor(flip),
            **self._padded(calls),
            "erase": torch.tensor(erased.box),
            # The last draw: those above are timm's, number for number.
            "noise": torch.tensor(random.getrandbits(32)),
        }
        return Planned(torch.from_numpy(pixels.transpose(2, 0, 1).copy()), plan)

    def _padded(self, calls: list[Call]) -> dict[str, Tensor]:
        operations = np.full(self.layers, Operation.NOTHING, dtype=np.int64)
        arguments = np.zeros((self.layers, ARGUMENTS), dtype=np.float32)
        for layer, (operation, values) in enumerate(calls):
            operations[layer] = operation
            arguments[layer, : len(values)] = values
        return {
            "operations": torch.from_numpy(operations),
            "arguments": torch.from_numpy(arguments),
        }


def plan_transform(config: DataConfig, spec: InputSpec) -> PlanTransform:
    """The loader's half of ``augment="gpu"``.

    Args:
        config: the options of the data group.
        spec: size and statistics of the input; statistics must be there.

    Returns:
        PIL image -> `Planned`.

    Raises:
        ValueError: the device does not do what the recipe asks for.
    """
    return PlanTransform(train_stages(config, spec), spec.size)


def _sorted_stages(
    stages: list[Any],
) -> tuple[Any, RandomHorizontalFlip | None, list[Any], RandomErasing | None]:
    """Crop, flip, policies, erasing; the device turns to float and normalises by itself."""
    crop, flip, erasing = None, None, None
    policies: list[Any] = []
    for stage in stages:
        if isinstance(stage, RandomResizedCropAndInterpolation):
            crop = stage
        elif isinstance(stage, RandomHorizontalFlip):
            flip = stage
        elif isinstance(stage, RandAugment | AutoAugment):
            policies.append(stage)
        elif isinstance(stage, ColorJitter):
            policies.append(JitterRecorder(stage))
        elif isinstance(stage, RandomErasing):
            erasing = copy.copy(stage)
            erasing.per_pixel = False  # its boxes alone: the device makes the noise
        elif not isinstance(stage, MaybeToTensor | Normalize):
            raise not_done(type(stage).__name__)
    return crop, flip, policies, erasing


def _longest(policy: Any) -> int:
    """How many operations a policy does to an image at most."""
    if isinstance(policy, RandAugment):
        return policy.num_layers
    if isinstance(policy, AutoAugment):
        return max(map(len, policy.policy))
    return len(JitterRecorder.operations)


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
