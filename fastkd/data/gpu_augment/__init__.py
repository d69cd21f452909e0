"""``augment="gpu"``: timm's training transform, its crop by the loader and the rest on the device.

`plan_transform` crops to uint8 in the loader and draws every random number with timm's own objects;
`device_augment` applies these numbers to whole batches.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastkd.config import DataConfig
from fastkd.data.gpu_augment.operations import Operation, apply_operation, erase
from fastkd.data.gpu_augment.plan import Planned, plan_transform
from fastkd.data.transforms import InputSpec

__all__ = ["DeviceAugment", "Planned", "device_augment", "plan_transform"]


def device_augment(config: DataConfig, spec: InputSpec) -> DeviceAugment | None:
    """Create the device's half of ``augment="gpu"``; None for any other ``augment``."""
    if config.augment != "gpu":
        return None
    if spec.mean is None or spec.std is None:
        raise ValueError("augment: 'gpu' normalizes images, but the input has no mean and std")
    return DeviceAugment(spec.mean, spec.std, plan_transform(config, spec).fill)


class DeviceAugment(nn.Module):
    """Flip, apply operations one after the other, normalize, erase: timm's order after the crop.

    An image's result depends on its own pixels and plan, not on the rest of the batch. The affine
    operations of one kind allocate some 15 float32 copies of their images, as a rule a sixth of the
    batch. Not to be compiled: groups change their size with every batch, and fused multiply-adds
    round otherwise than Pillow.

    Args:
        mean: per channel, of values in [0, 1].
        std: per channel.
        fill: color of what affine operations bring in from outside, 0 to 255.
    """

    mean: Tensor
    std: Tensor
    fill: Tensor

    def __init__(
        self, mean: tuple[float, ...], std: tuple[float, ...], fill: tuple[int, ...]
    ) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1), persistent=False)
        self.register_buffer("fill", torch.tensor(fill, dtype=torch.uint8), persistent=False)

    @torch.no_grad()
    def forward(self, images: Tensor, plan: dict[str, Tensor]) -> Tensor:
        """Augment images [B, 3, H, W] uint8 to float32, with a plan of [B, ...] on the host."""
        _check(images, plan)
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


def _check(images: Tensor, plan: dict[str, Tensor]) -> None:
    if images.dtype != torch.uint8 or images.ndim != 4:
        raise ValueError(
            f"DeviceAugment: images must be [B, 3, H, W] uint8, got {list(images.shape)} "
            f"{images.dtype}"
        )
    away = {str(part.device) for part in plan.values() if part.device.type != "cpu"}
    if away:
        raise ValueError(
            f"DeviceAugment: plan must be on the host (its groups are read there without waiting "
            f"for the device), got {', '.join(sorted(away))}"
        )
