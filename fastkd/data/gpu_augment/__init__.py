"""``augment="gpu"``: timm's training transform, its crop by the loader and the rest by the device.

The loader's half (`plan_transform`) crops to uint8 and draws every random number with timm's own
objects; the device's half (`device_augment`) carries the numbers out on whole batches. Neither
knows data sets, loaders or models.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastkd.config import DataConfig
from fastkd.data.gpu_augment.operations import Operation, apply_operation, erase
from fastkd.data.gpu_augment.plan import Planned, plan_transform
from fastkd.data.transforms import InputSpec

LAYERED = ("operations", "arguments")  # parts of a plan that have an entry for every layer

__all__ = ["DeviceAugment", "Planned", "device_augment", "plan_transform"]


def device_augment(config: DataConfig, spec: InputSpec) -> DeviceAugment | None:
    """What the device does to a batch of training images.

    Args:
        config: its ``augment`` and the options of the data group.
        spec: size and statistics of the input.

    Returns:
        (images [B, 3, H, W] uint8 on the device, plan **on the host**) -> images float32,
        normalised; to be moved to the device. None where ``augment`` is not ``"gpu"``.

    Raises:
        ValueError: the device does not do what the recipe asks for.
    """
    if config.augment != "gpu":
        return None
    if spec.mean is None or spec.std is None:
        raise ValueError("augment: 'gpu' normalises images, but the input has no mean and std")
    return DeviceAugment(spec.mean, spec.std, plan_transform(config, spec).fill)


class DeviceAugment(nn.Module):
    """Flip, operations one after the other, normalisation, erasing: timm's order after the crop.

    An image's result depends on its own pixels and plan, not on the rest of the batch. For a sixth
    of the images, which an affine operation takes at a time, some 15 float32 copies are allocated.
    Not to be compiled: groups change their size with every batch, and fused multiply-adds would
    round otherwise than Pillow.

    Args:
        mean: per channel, of values in [0, 1].
        std: per channel.
        fill: colour that affine operations bring in, in grey levels.
    """

    mean: Tensor
    std: Tensor
    fill: Tensor

    def __init__(
        self,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        fill: tuple[int, ...],
    ) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1), persistent=False)
        self.register_buffer("fill", torch.tensor(fill, dtype=torch.uint8), persistent=False)

    @torch.no_grad()
    def forward(self, images: Tensor, plan: dict[str, Tensor]) -> Tensor:
        """Augment a batch.

        Args:
            images: [B, 3, H, W] uint8, on the module's device.
            plan: a batch's, [B, ...] by name, **on the host**, pinned or not.

        Returns:
            [B, 3, H, W] float32, normalised.

        Raises:
            ValueError: images are not uint8, or the plan was moved to an accelerator, where
                reading it would mean to wait for it.
        """
        _check(images, plan)
        moved = {name: part.to(images.device, non_blocking=True) for name, part in plan.items()}
        images = torch.where(moved["flip"].view(-1, 1, 1, 1), images.flip(3), images)
        for layer, operations in enumerate(plan["operations"].unbind(1)):
            self._operate(images, operations, *(moved[n][:, layer] for n in LAYERED))
        return self._erase(self._normalise(images), plan, moved)

    def _operate(
        self, images: Tensor, planned: Tensor, operations: Tensor, arguments: Tensor
    ) -> None:
        """Do one layer's operations in place, all images with the same one together."""
        order = operations.argsort(stable=True)
        numbers, counts = planned.unique(return_counts=True)  # in the order of the sort
        groups = zip(numbers.tolist(), order.split(counts.tolist()), strict=True)
        for number, rows in groups:
            if number == Operation.NOTHING:
                continue
            done = apply_operation(Operation(number), images[rows], arguments[rows], self.fill)
            images.index_copy_(0, rows, done)

    def _normalise(self, images: Tensor) -> Tensor:
        # Rounded as torchvision does: a division by 255, then by the deviation.
        return images.to(torch.float32).div_(255).sub_(self.mean).div_(self.std)

    def _erase(self, images: Tensor, plan: dict[str, Tensor], moved: dict[str, Tensor]) -> Tensor:
        count = int((plan["erase"][:, 2] > 0).sum())
        if count:
            rows = (moved["erase"][:, 2] == 0).to(torch.uint8).argsort(stable=True)[:count]
            boxes, seeds = moved["erase"][rows], moved["noise"][rows]
            images.index_copy_(0, rows, erase(images[rows], boxes, seeds))
        return images


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
