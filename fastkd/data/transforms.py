"""Image transforms of training and evaluation, and the mixing of batches: timm's, set by a recipe.

Knows recipes and transforms; neither data sets nor loaders.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from timm.data import Mixup, create_transform
from timm.data.auto_augment import AugmentOp
from torchvision.transforms import Compose

from fastkd.config import Recipe

Transform = Callable[[Any], Any]


@dataclass(frozen=True)
class InputSpec:
    """What a model takes in.

    Attributes:
        size: (channels, height, width).
        mean: per channel, of values in [0, 1]; None: tensors are fed as they are.
        std: per channel; None like ``mean``.
    """

    size: tuple[int, int, int]
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None


def train_transform(recipe: Recipe, spec: InputSpec) -> Transform:
    """Timm's random training transform for PIL images, or evaluation's where nothing is random.

    Args:
        recipe: its ``augment`` and the options of the data group.
        spec: size and statistics of the input; statistics must be there.

    Returns:
        PIL image -> normalised float32 tensor [C, H, W].
    """
    if recipe.augment != "cpu":
        return eval_transform(recipe, spec)
    return Compose(train_stages(recipe, spec))


def train_stages(recipe: Recipe, spec: InputSpec) -> list[Any]:
    """The steps of timm's random training transform, whatever ``augment`` is.

    Args:
        recipe: the options of the data group.
        spec: size and statistics of the input; statistics must be there.

    Returns:
        timm's and torchvision's transforms in the order in which they are applied.
    """
    transform = create_transform(
        spec.size,
        is_training=True,
        scale=recipe.scale,
        ratio=recipe.ratio,
        hflip=recipe.hflip,
        color_jitter=recipe.color_jitter,
        auto_augment=recipe.auto_augment,
        interpolation=recipe.interpolation,
        re_prob=recipe.reprob,
        re_mode="pixel",
        mean=spec.mean,
        std=spec.std,
    )
    keep_one_bit(transform)
    return list(transform.transforms)


def eval_transform(recipe: Recipe, spec: InputSpec) -> Transform:
    """Timm's evaluation transform: resize, centre crop, normalise.

    Args:
        recipe: its ``interpolation``, ``crop_pct`` and ``crop_mode``.
        spec: size and statistics of the input; statistics must be there.

    Returns:
        PIL image -> normalised float32 tensor [C, H, W].
    """
    interpolation = "bilinear" if recipe.interpolation == "random" else recipe.interpolation
    return create_transform(
        spec.size,
        is_training=False,
        interpolation=interpolation,
        crop_pct=recipe.crop_pct,
        crop_mode=recipe.crop_mode,
        mean=spec.mean,
        std=spec.std,
    )


def keep_one_bit(transform: Any) -> None:
    """Let no posterize operation of a timm transform ask for 0 bits.

    timm's policies may draw 0 bits (a black image), which Pillow >= 13 refuses with an error in the
    middle of an epoch. Only the given transform's operations are changed, not timm.

    Args:
        transform: a composed timm transform; changed in place.
    """
    for operation in operations_of(transform):
        if operation.name.startswith("Posterize"):
            operation.aug_fn = _AtLeastOneBit(operation.aug_fn)


class _AtLeastOneBit:
    """A posterize function whose second argument, the bits to keep, is at least 1."""

    def __init__(self, posterize: Callable[..., Any]) -> None:
        self.posterize = posterize

    def __call__(self, image: Any, bits: int, **options: Any) -> Any:
        return self.posterize(image, max(1, bits), **options)


def operations_of(transform: Any) -> Iterator[AugmentOp]:
    """All of timm's augmentation operations inside a transform.

    Args:
        transform: an operation, a composition, RandAugment, AutoAugment, AugMix or a list of them.

    Yields:
        The operations themselves.
    """
    if isinstance(transform, AugmentOp):
        yield transform
    children = transform if isinstance(transform, list | tuple) else ()
    for attribute in ("transforms", "ops", "policy"):
        children = [*children, *(getattr(transform, attribute, None) or ())]
    for child in children:
        yield from operations_of(child)


def create_mixup(recipe: Recipe, num_classes: int) -> Mixup | None:
    """Timm's Mixup/CutMix of whole batches; draws from numpy's global generator.

    Args:
        recipe: its mixing options and ``label_smoothing``.
        num_classes: width of the soft targets.

    Returns:
        The mixing function, or None where the recipe mixes nothing.
    """
    if not recipe.mixes:
        return None
    return Mixup(
        mixup_alpha=recipe.mixup,
        cutmix_alpha=recipe.cutmix,
        prob=recipe.mixup_prob,
        switch_prob=recipe.mixup_switch_prob,
        label_smoothing=recipe.label_smoothing,
        num_classes=num_classes,
    )
