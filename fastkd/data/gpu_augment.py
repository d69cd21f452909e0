"""``augment="gpu"``: timm's training transform, its crop by the loader and the rest on the device.

timm's own transforms draw the random numbers, in their order, so that an image gets what timm would
give it under the same seed. In place of images they work on recorders, which keep their calls.
"""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from timm.data import auto_augment
from timm.data.auto_augment import AugmentOp, AutoAugment, RandAugment
from timm.data.random_erasing import RandomErasing
from timm.data.transforms import MaybeToTensor, RandomResizedCropAndInterpolation
from torch import Tensor, nn
from torchvision.transforms import ColorJitter, Normalize, RandomHorizontalFlip

from fastkd.config import DataConfig
from fastkd.data.gpu_operations import ARGUMENTS, Operation, apply_operation, erase
from fastkd.data.transforms import InputSpec, keep_one_bit, operations_of, train_transform

Call = tuple[Operation, tuple[float, ...]]
Size = tuple[int, int, int]  # (channels, height, width)
JITTERS = (Operation.BRIGHTNESS, Operation.CONTRAST, Operation.COLOR)


class Planned(NamedTuple):
    """A cropped image, and what the device is to do to it."""

    image: Tensor  # [3, H, W] uint8
    # "flip" [] bool; "operations" [K] int64, numbers of Operation; "arguments" [K, 6] float32;
    # "erase" [4] int64: top, left, height, width, 0 where nothing is erased; "noise" [] int64: seed
    plan: dict[str, Tensor]


def plan_transform(config: DataConfig, spec: InputSpec) -> PlanTransform:
    """Create the loader's half of ``augment="gpu"``; ``spec`` must have mean and std."""
    return PlanTransform(train_transform(config, spec).transforms, spec.size)


def device_augment(config: DataConfig, spec: InputSpec) -> DeviceAugment | None:
    """Create the device's half of ``augment="gpu"``; None for any other ``augment``."""
    if config.augment != "gpu":
        return None
    if spec.mean is None or spec.std is None:
        raise ValueError("augment: 'gpu' normalizes images, but the input has no mean and std")
    return DeviceAugment(spec.mean, spec.std, plan_transform(config, spec).fill)


class DeviceAugment(nn.Module):
    """Flip, apply operations one after the other, normalize, erase: timm's order after the crop.

    Affine operations allocate some 15 float32 copies of their images, as a rule a sixth of the
    batch. Not to be compiled: groups change their size with every batch, and fused multiply-adds
    round otherwise than Pillow.
    """

    mean: Tensor
    std: Tensor
    fill: Tensor

    def __init__(
        self,
        mean: tuple[float, ...],  # per channel, of values in [0, 1]
        std: tuple[float, ...],
        fill: tuple[int, ...],  # color of what affine operations bring in from outside, 0 to 255
    ) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1), persistent=False)
        self.register_buffer("fill", torch.tensor(fill, dtype=torch.uint8), persistent=False)

    @torch.no_grad()
    def forward(self, images: Tensor, plan: dict[str, Tensor]) -> Tensor:
        """Augment images [B, 3, H, W] uint8 to float32, with a plan of [B, ...] on the host."""
        if images.dtype != torch.uint8:  # floats would be clipped and rounded without an error
            raise ValueError(f"DeviceAugment: images must be uint8, got {images.dtype}")
        # Its groups are read without waiting for the device.
        if away := {str(part.device) for part in plan.values()} - {"cpu"}:
            raise ValueError(f"DeviceAugment: plan must be on the host, got {', '.join(away)}")
        moved = {name: part.to(images.device, non_blocking=True) for name, part in plan.items()}
        images = torch.where(moved["flip"].view(-1, 1, 1, 1), images.flip(3), images)
        layers = (moved[name].unbind(1) for name in ("operations", "arguments"))
        for planned, *layer in zip(plan["operations"].unbind(1), *layers, strict=True):
            self._operate(images, planned, *layer)
        # Rounded as torchvision does: a division by 255, then by the deviation.
        normalized = images.to(torch.float32).div_(255).sub_(self.mean).div_(self.std)
        count = int((plan["erase"][:, 2] > 0).sum())
        if count:
            rows = (moved["erase"][:, 2] == 0).to(torch.uint8).argsort(stable=True)[:count]
            boxes, seeds = moved["erase"][rows], moved["noise"][rows]
            normalized.index_copy_(0, rows, erase(normalized[rows], boxes, seeds))
        return normalized

    def _operate(
        self, images: Tensor, planned: Tensor, operations: Tensor, arguments: Tensor
    ) -> None:
        """Apply one layer in place, all images with the same operation together.

        Group sizes come from ``planned``, the host's copy of ``operations``: no synchronization.
        """
        order = operations.argsort(stable=True)
        numbers, counts = planned.unique(return_counts=True)  # in the order of the sort
        for number, rows in zip(numbers.tolist(), order.split(counts.tolist()), strict=True):
            if number != Operation.NOTHING:
                done = apply_operation(Operation(number), images[rows], arguments[rows], self.fill)
                images.index_copy_(0, rows, done)


class PlanTransform:
    """PIL image -> `Planned`, drawing what timm's training transform draws, in its order.

    The operations in timm's ``stages`` are changed in place.
    """

    def __init__(self, stages: list[Any], size: Size) -> None:
        if size[0] != 3:
            raise ValueError(f"augment: 'gpu' augments images of 3 channels, got {size[0]}")
        self.size = size
        self.crop: Any = None
        self.flip: RandomHorizontalFlip | None = None
        self.erasing: RandomErasing | None = None
        self.policies: list[Any] = []
        for stage in stages:
            if isinstance(stage, RandomResizedCropAndInterpolation):
                self.crop = stage
            elif isinstance(stage, RandomHorizontalFlip):
                self.flip = stage
            elif isinstance(stage, RandAugment | AutoAugment):
                self.policies.append(stage)
            elif isinstance(stage, ColorJitter):
                self.policies.append(partial(_record_jitter, stage))
            elif isinstance(stage, RandomErasing):
                self.erasing = copy.copy(stage)
                self.erasing.per_pixel = False  # boxes alone: the device makes the noise
            elif not isinstance(stage, MaybeToTensor | Normalize):  # which the device does
                raise _unsupported(type(stage).__name__)
        operations = list(operations_of(self.policies))
        for operation in operations:
            operation.aug_fn = _CallRecorder(operation, size)
        keep_one_bit(self.policies)
        self.layers = max(1, sum(map(_max_operations, self.policies)))
        self.fill = operations[0].kwargs["fillcolor"] if operations else (0, 0, 0)

    def __call__(self, image: Any) -> Planned:
        """Crop an RGB image, and draw the rest from python's, numpy's and torch's generators."""
        pixels = np.asarray(self.crop(image))
        flip = self.flip is not None and bool(torch.rand(1) < self.flip.p)
        calls: list[Call] = []
        for policy in self.policies:
            calls = policy(calls)
        operations = np.full(self.layers, Operation.NOTHING, np.int64)
        arguments = np.zeros((self.layers, ARGUMENTS), np.float32)  # whatever torch's default dtype
        for layer, (operation, values) in enumerate(calls):
            operations[layer] = operation
            arguments[layer, : len(values)] = values
        erased = _ErasedBox(self.size)
        if self.erasing is not None:
            self.erasing(erased)
        plan = {
            "flip": torch.tensor(flip),
            "operations": torch.from_numpy(operations),
            "arguments": torch.from_numpy(arguments),
            "erase": torch.tensor(erased.box),
            # Drawn last: the numbers above are timm's, one for one.
            "noise": torch.tensor(random.getrandbits(32)),
        }
        return Planned(torch.from_numpy(pixels.transpose(2, 0, 1).copy()), plan)


def _max_operations(policy: Any) -> int:
    if isinstance(policy, RandAugment):
        return policy.num_layers
    return max(map(len, policy.policy)) if isinstance(policy, AutoAugment) else len(JITTERS)


def _unsupported(name: str) -> ValueError:
    return ValueError(
        f"augment: 'gpu' does not do {name}: take augment='cpu', or a policy (auto_augment) without"
    )


class _CallRecorder:
    """In place of an operation's pixel function: append the call to a list, its "image"."""

    def __init__(self, operation: AugmentOp, size: Size) -> None:
        # By name: the operation's own function may be wrapped by one that keeps a bit.
        self.function, self.size = auto_augment.NAME_TO_OP[operation.name], size
        if self.function not in _TRANSLATIONS:
            raise _unsupported(operation.name)

    def __call__(self, calls: list[Call], *arguments: float, resample: Any, **_: Any) -> list[Call]:
        translation = _TRANSLATIONS[self.function]
        if self.function is auto_augment.desaturate:
            arguments = (min(1.0, max(0.0, 1 - arguments[0])),)
        if isinstance(translation, Operation):
            return [*calls, (translation, arguments)]
        if isinstance(resample, list | tuple):  # drawn here, as in timm's functions
            resample = random.choice(resample)
        bicubic = resample == Image.Resampling.BICUBIC
        operation = Operation.AFFINE_BICUBIC if bicubic else Operation.AFFINE_BILINEAR
        return [*calls, (operation, translation(self.size[2], self.size[1], *arguments))]


def _record_jitter(jitter: ColorJitter, calls: list[Call]) -> list[Call]:
    """Append what torchvision's color jitter (without hue) draws, as calls."""
    ranges = jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue
    order, *factors = ColorJitter.get_params(*ranges)
    drawn = [(JITTERS[n], (factors[n],)) for n in order.tolist() if factors[n] is not None]
    return [*calls, *drawn]


class _ErasedBox:
    """In place of the tensor that timm's random erasing writes to: keep where."""

    dtype = torch.float32

    def __init__(self, size: Size) -> None:
        self._size = size
        self.box = (0, 0, 0, 0)  # top, left, height, width

    def size(self) -> Size:
        return self._size

    def __setitem__(self, place: tuple[slice, slice, slice], pixels: Tensor) -> None:
        rows, columns = place[1:]
        self.box = (rows.start, columns.start, rows.stop - rows.start, columns.stop - columns.start)


def _rotation(width: int, height: int, degrees: float) -> tuple[float, ...]:
    """Return the matrix that maps a pixel to its source, counterclockwise about the center."""
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    x, y = width / 2, height / 2
    return cos, -sin, x - cos * x + sin * y, sin, cos, y - sin * x - cos * y


_POINTWISE = (
    *("auto_contrast", "equalize", "invert", "posterize", "solarize", "solarize_add"),
    *("brightness", "contrast", "color", "sharpness"),
)
# timm's functions as operations, or as (width, height, argument) -> matrix.
_TRANSLATIONS: dict[Any, Operation | Callable[..., tuple[float, ...]]] = {
    **{getattr(auto_augment, name): Operation[name.upper()] for name in _POINTWISE},
    auto_augment.desaturate: Operation.COLOR,
    auto_augment.rotate: _rotation,
    auto_augment.shear_x: lambda w, h, factor: (1, factor, 0, 0, 1, 0),
    auto_augment.shear_y: lambda w, h, factor: (1, 0, 0, factor, 1, 0),
    auto_augment.translate_x_rel: lambda w, h, part: (1, 0, part * w, 0, 1, 0),
    auto_augment.translate_y_rel: lambda w, h, part: (1, 0, 0, 0, 1, part * h),
    auto_augment.translate_x_abs: lambda w, h, pixels: (1, 0, pixels, 0, 1, 0),
    auto_augment.translate_y_abs: lambda w, h, pixels: (1, 0, 0, 0, 1, pixels),
}
