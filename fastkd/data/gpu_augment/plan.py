"""What a loader process does for the device: crop, and draw every random number.

Knows timm's training transform, whose own objects draw the numbers: an image that the device
augments gets the crop, flip, operations and erased box that timm would give it under the same seed.
Does not know how the device carries them out.
"""

from __future__ import annotations

import copy
import random
from typing import Any, NamedTuple

import numpy as np
import torch
from timm.data.auto_augment import AutoAugment, RandAugment
from timm.data.random_erasing import RandomErasing
from timm.data.transforms import MaybeToTensor, RandomResizedCropAndInterpolation
from torch import Tensor
from torchvision.transforms import ColorJitter, Normalize, RandomHorizontalFlip

from fastkd.config import DataConfig
from fastkd.data.gpu_augment.operations import ARGUMENTS, Operation
from fastkd.data.gpu_augment.recorders import (
    Call,
    CallRecorder,
    ErasedBox,
    JitterRecorder,
    not_done,
)
from fastkd.data.transforms import InputSpec, keep_one_bit, operations_of, train_stages

NO_FILL = (0, 0, 0)


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
