"""Image transforms of training and evaluation, and the mixing of batches, all timm's."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from timm.data import Mixup, create_transform
from timm.data.auto_augment import AugmentOp
from timm.data.constants import DEFAULT_CROP_PCT
from torchvision.transforms import Compose

from fastkd.config import DataConfig

Transform = Callable[[Any], Any]


@dataclass(frozen=True)
class InputSpec:
    """What a model takes in."""

    size: tuple[int, int, int]  # (channels, height, width)
    mean: tuple[float, ...] | None  # per channel, of values in [0, 1]; None: not normalized
    std: tuple[float, ...] | None  # per channel; None like mean


def train_transform(config: DataConfig, spec: InputSpec) -> Compose:
    """Create timm's random training transform, whatever ``augment`` is."""
    transform: Compose = create_transform(
        spec.size,
        is_training=True,
        scale=config.scale,
        ratio=config.ratio,
        hflip=config.hflip,
        color_jitter=config.color_jitter,
        auto_augment=config.auto_augment,
        interpolation=config.interpolation,
        re_prob=config.reprob,
        re_mode="pixel",
        mean=spec.mean,
        std=spec.std,
    )
    keep_one_bit(transform)
    return transform


def eval_transform(config: DataConfig, spec: InputSpec) -> Transform:
    """Create timm's evaluation transform: resize, center crop, normalize."""
    interpolation = "bilinear" if config.interpolation == "random" else config.interpolation
    return create_transform(
        spec.size,
        is_training=False,
        interpolation=interpolation,
        crop_pct=config.crop_pct,
        crop_mode=config.crop_mode,
        mean=spec.mean,
        std=spec.std,
    )


def resized_size(config: DataConfig, spec: InputSpec) -> tuple[int, int, bool] | None:
    """Return what `eval_transform` resizes images to: (height, width, whether they lie within).

    Else they cover it. None where proportions change.
    """
    if config.crop_mode == "squash":
        return None
    crop = config.crop_pct or DEFAULT_CROP_PCT
    height, width = (math.floor(side / crop) for side in spec.size[1:])
    return height, width, config.crop_mode == "border"


def keep_one_bit(transform: Any) -> None:
    """Keep at least 1 bit in timm's posterize operations: Pillow >= 13 refuses 0."""
    for operation in operations_of(transform):
        if operation.name.startswith("Posterize"):
            operation.aug_fn = functools.partial(_posterize, operation.aug_fn)


def _posterize(posterize: Callable[..., Any], image: Any, bits: int, **options: Any) -> Any:
    return posterize(image, max(1, bits), **options)


def operations_of(transform: Any) -> Iterator[AugmentOp]:
    """Yield all of timm's augmentation operations inside a transform."""
    if isinstance(transform, AugmentOp):
        yield transform
    children = transform if isinstance(transform, list | tuple) else ()
    for attribute in ("transforms", "ops", "policy"):
        children = [*children, *(getattr(transform, attribute, None) or ())]
    for child in children:
        yield from operations_of(child)


def create_mixup(config: DataConfig, num_classes: int, label_smoothing: float) -> Mixup | None:
    """Create timm's Mixup/CutMix of whole batches; it draws from numpy's global generator."""
    if not config.mixes:
        return None
    return Mixup(
        mixup_alpha=config.mixup,
        cutmix_alpha=config.cutmix,
        prob=config.mixup_prob,
        switch_prob=config.mixup_switch_prob,
        label_smoothing=label_smoothing,
        num_classes=num_classes,
    )
