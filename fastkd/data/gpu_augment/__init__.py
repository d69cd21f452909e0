"""``augment="gpu"``: timm's training transform, its crop by the loader and the rest by the device.

The loader's half (`plan_transform`) crops to uint8 and draws every random number with timm's own
objects; the device's half (`device_augment`) carries the numbers out on whole batches. Neither
knows data sets, loaders or models.
"""

from __future__ import annotations

from fastkd.config import Recipe
from fastkd.data.gpu_augment.module import DeviceAugment
from fastkd.data.gpu_augment.plan import Planned, plan_transform
from fastkd.data.transforms import InputSpec

__all__ = ["DeviceAugment", "Planned", "device_augment", "plan_transform"]


def device_augment(recipe: Recipe, spec: InputSpec) -> DeviceAugment | None:
    """What the device does to a batch of training images.

    Args:
        recipe: its ``augment`` and the options of the data group.
        spec: size and statistics of the input.

    Returns:
        (images [B, 3, H, W] uint8 on the device, plan **on the host**) -> images float32,
        normalised; to be moved to the device. None where ``augment`` is not ``"gpu"``.

    Raises:
        ValueError: the device does not do what the recipe asks for.
    """
    if recipe.augment != "gpu":
        return None
    if spec.mean is None or spec.std is None:
        raise ValueError("augment: 'gpu' normalises images, but the input has no mean and std")
    return DeviceAugment(spec.mean, spec.std, plan_transform(recipe, spec).fill)
