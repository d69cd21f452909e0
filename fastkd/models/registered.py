"""The students under names of their own in timm's registry, which importing this puts there.

Knows names, timm's entry points and the statistics that go with them; the models are
`fastkd.models.students`' and `fastkd.models.factory`'s.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from torch import nn

from fastkd.models.factory import Variant, create_student, default_width, variant_name
from fastkd.models.students import LiftVisionTransformer, WideLastVisionTransformer

__all__ = ["default_cfgs", "registered_name"]


def _deit_cfg() -> dict[str, Any]:
    """What timm says of deit_tiny_patch16_224, without its weights, which are not these models'."""
    return {
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "crop_pct": 0.875,  # as the paper and DeiT evaluate; timm says 0.9
        "interpolation": "bicubic",
        "fixed_input_size": True,
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "patch_embed.proj",
        "classifier": "head",
        "license": "apache-2.0",
    }


default_cfgs = generate_default_cfgs(
    {
        "deit_tiny_lift_patch16_224": _deit_cfg(),
        "deit_tiny_widelast_patch16_224": _deit_cfg(),
        "deit_tiny_uniform219_patch16_224": _deit_cfg(),
        "fastkd_student": _deit_cfg(),
    }
)


def _build_deit_tiny(
    model_class: type[nn.Module], architecture: str, pretrained: bool, **kwargs: Any
) -> Any:
    feature_cfg = {"out_indices": kwargs.pop("out_indices", 3), "feature_cls": "getter"}
    deit_tiny = {"patch_size": 16, "embed_dim": 192, "depth": 12, "num_heads": 3}
    return build_model_with_cfg(
        model_class,
        architecture,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg=feature_cfg,
        **deit_tiny | kwargs,
    )


@register_model
def deit_tiny_lift_patch16_224(pretrained: bool = False, **kwargs: Any) -> LiftVisionTransformer:
    """DeiT-Tiny with its patch tokens lifted to ``width`` (384) channels; 5,983,528 parameters."""
    return _build_deit_tiny(
        LiftVisionTransformer, "deit_tiny_lift_patch16_224", pretrained, **kwargs
    )


@register_model
def deit_tiny_widelast_patch16_224(
    pretrained: bool = False, **kwargs: Any
) -> WideLastVisionTransformer:
    """DeiT-Tiny with a last block of ``width`` (384) channels; 7,313,896 parameters."""
    return _build_deit_tiny(
        WideLastVisionTransformer, "deit_tiny_widelast_patch16_224", pretrained, **kwargs
    )


@register_model
def deit_tiny_uniform219_patch16_224(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """DeiT-Tiny with 219 channels (73 per head) in every block; 7,372,759 parameters."""
    arguments = {"embed_dim": 219} | kwargs
    return _build_deit_tiny(
        VisionTransformer, "deit_tiny_uniform219_patch16_224", pretrained, **arguments
    )


@register_model
def fastkd_student(
    pretrained: bool = False,
    *,
    base: str,
    variant: Variant = "plain",
    width: int | None = None,
    **kwargs: Any,
) -> nn.Module:
    """The student that `create_student` makes of another ``base``.

    Exported students are called so whose base has no entry of its own here.
    """
    return build_model_with_cfg(
        partial(create_student, base, variant, width=width),
        "fastkd_student",
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        **kwargs,
    )


def registered_name(name: str, variant: str, width: int | None) -> tuple[str, dict[str, Any]]:
    """By what `timm.create_model` builds a student of `create_student`, fastkd being imported.

    Args:
        name: of the base, as in `create_student`.
        variant: of the student.
        width: of its final features; None as in `create_student`.

    Returns:
        A name in timm's registry, and the arguments that it needs.
    """
    if variant == "plain":
        return name, {}
    width = default_width(variant) if width is None else width
    own_width = variant == "uniform"  # which its name says
    registered = variant_name(name.partition(".")[0], f"uniform{width}" if own_width else variant)
    if registered in default_cfgs:
        return registered, {} if own_width else {"width": width}
    return fastkd_student.__name__, {"base": name, "variant": variant, "width": width}
