"""`create_student`: any of the paper's variants of any timm model that has it.

Knows which variant fits which base and what a base has to be built with; not how a variant computes
(`fastkd.models.students`), nor what timm's registry calls it (`fastkd.models.factory`).
"""

from __future__ import annotations

from functools import partial
from typing import Any, Literal, get_args

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from torch import nn

from fastkd.models.pretrained import build_timm_model
from fastkd.models.students import (
    BlockRecorder,
    LiftVisionTransformer,
    WideLastVisionTransformer,
    check_lift_pool,
    check_wide_block_type,
    widened,
)

Variant = Literal["plain", "lift", "widelast", "uniform"]

_TEACHER_WIDTH = 384  # of CaiT-S24, the paper's teacher


def create_student(
    name: str = "deit_tiny_patch16_224",
    variant: Variant = "plain",
    *,
    width: int | None = None,
    num_classes: int = 1000,
    img_size: int | tuple[int, int] | None = None,
    pretrained: bool = False,
    **timm_kwargs: Any,
) -> nn.Module:
    """A student built from a timm model.

    ========  =================================================================  ==============
    variant   what it is                                                         DeiT-Tiny, 1000
    ========  =================================================================  ==============
    plain     the timm model itself, of any kind                                      5,717,416
    lift      patch tokens lifted to ``width``, normalised, averaged, classified      5,983,528
    widelast  the last block, final norm and head ``width`` wide                      7,313,896
    uniform   every block ``width`` wide, as many heads as the base (219)             7,372,759
    ========  =================================================================  ==============

    Args:
        name: a timm model name; ``lift``, ``widelast`` and ``uniform`` need a plain ViT or DeiT.
        variant: one of the four.
        width: channels of the final features. None: 384 for ``lift`` and ``widelast``; ``uniform``
            has no default, because its control has as many parameters as WideLast, which depends on
            the base (219 for DeiT-Tiny). ``plain`` has none to choose.
        num_classes: of the head; 0 leaves it out.
        img_size: input size the model is built for; None keeps the timm model's own. Models that
            run at any size (most CNNs) do not take it.
        pretrained: start from timm's weights. ``lift`` keeps all but the final norm and head,
            ``widelast`` also not the last block; ``uniform`` has none that fit.
        **timm_kwargs: of the timm model (``drop_path_rate``, ``in_chans``, ``patch_size``, ...).

    Returns:
        A timm model. `LiftVisionTransformer` and `WideLastVisionTransformer` are subclasses of
        timm's `VisionTransformer`.

    Raises:
        ValueError: an unknown name or variant, a model that has no such variant, a width that is
            missing or does not divide into heads, or pretrained weights that do not exist.
        FileNotFoundError: ``name`` is the path of a file.
        RuntimeError: the pretrained weights cannot be downloaded.
    """
    if variant not in get_args(Variant):
        raise ValueError(
            f"create_student: variant must be one of {get_args(Variant)}, got {variant!r}"
        )
    timm_kwargs |= {"num_classes": num_classes, "img_size": img_size}
    if variant == "plain":
        if width is not None:
            raise ValueError(
                f"create_student: variant 'plain' has no width to choose, got width={width}; "
                "'uniform' is the timm model at another width"
            )
        return _build_base(name, pretrained, timm_kwargs)
    width = default_width(variant) if width is None else width
    if variant == "lift":
        return _create_lift(name, width, pretrained, timm_kwargs)
    if variant == "widelast":
        return _create_widelast(name, width, pretrained, timm_kwargs)
    return _create_uniform(name, width, pretrained, timm_kwargs)


def default_width(variant: str) -> int:
    """Channels of the final features where nobody says.

    Args:
        variant: any but ``"plain"``, which has no width to choose.

    Returns:
        The paper's teacher's.

    Raises:
        ValueError: the variant's width depends on its base.
    """
    if variant == "uniform":
        raise ValueError(
            "create_student: variant 'uniform' needs width=: 219 makes deit_tiny_patch16_224 as "
            "large as its WideLast, and another base has another width"
        )
    return _TEACHER_WIDTH


def _create_lift(name: str, width: int, pretrained: bool, kwargs: dict[str, Any]) -> nn.Module:
    pool = kwargs.pop("global_pool", "avg")
    check_lift_pool(pool)
    _outline(name, "lift", kwargs)
    vit = _build_base(name, pretrained, kwargs)
    return _renamed(LiftVisionTransformer.from_vit(vit, width, pool), "lift")


def _create_widelast(name: str, width: int, pretrained: bool, kwargs: dict[str, Any]) -> nn.Module:
    check_wide_block_type(type(_outline(name, "widelast", kwargs).blocks[-1]))
    recorder = BlockRecorder()
    _outline(name, "widelast", kwargs | {"block_fn": recorder})
    widened(recorder.arguments, width)  # refuses a wrong one before anything is downloaded
    vit = _build_base(name, pretrained, kwargs)
    student = WideLastVisionTransformer.from_vit(vit, recorder.arguments, width)
    return _renamed(student, "widelast")


def _create_uniform(name: str, width: int, pretrained: bool, kwargs: dict[str, Any]) -> nn.Module:
    if pretrained:
        raise ValueError(
            f"create_student: pretrained weights of {name!r} do not fit variant 'uniform', whose "
            "every layer has another width; use pretrained=False"
        )
    recorder = BlockRecorder()  # not every kind of block says how many heads it has
    _outline(name, "uniform", kwargs | {"block_fn": recorder})
    num_heads = recorder.arguments["num_heads"]
    if width <= 0 or width % num_heads:
        raise ValueError(
            f"create_student: width must be a multiple of the {num_heads} heads of {name!r}, "
            f"got {width}"
        )
    return _renamed(_build_base(name, False, kwargs | {"embed_dim": width}), f"uniform{width}")


def _build_base(name: str, pretrained: bool, kwargs: dict[str, Any]) -> nn.Module:
    return build_timm_model(
        "create_student",
        name,
        pretrained=pretrained,
        alternative="start from random weights with pretrained=False",
        **kwargs,
    )


def _outline(name: str, variant: str, kwargs: dict[str, Any]) -> VisionTransformer:
    """The timm model without storage, to look at before anything is built or downloaded."""
    on_meta = {key: value for key, value in kwargs.items() if key not in ("device", "dtype")}
    with torch.device("meta"):
        model = build_timm_model("create_student", name, **on_meta)
    if type(model) is VisionTransformer or (
        variant == "uniform" and isinstance(model, VisionTransformer)
    ):
        return model
    raise ValueError(
        f"create_student: variant {variant!r} is defined for timm's plain VisionTransformer (ViT, "
        f"DeiT, DINOv2 ...), got {name!r}, a {type(model).__name__}"
    )


def _renamed(student: Any, variant: str) -> nn.Module:
    """Keep the base's statistics, but neither its name nor the source of its weights.

    By these a checkpoint would be reloaded as the base, with weights that do not fit.
    """
    architecture = str(student.pretrained_cfg["architecture"])
    for source in ("url", "file", "state_dict", "hf_hub_id", "hf_hub_filename", "tag"):
        student.pretrained_cfg.pop(source, None)
    student.pretrained_cfg |= {"architecture": variant_name(architecture, variant)}
    return student


def variant_name(architecture: str, variant: str) -> str:
    """What a variant of a timm architecture is called.

    Args:
        architecture: of the base, without a tag.
        variant: with its width where that is a part of the name.

    Returns:
        ``deit_tiny_lift_patch16_224`` for ``deit_tiny_patch16_224`` and ``lift``.
    """
    stem, patch, rest = architecture.partition("_patch")
    return f"{stem}_{variant}{patch}{rest}"


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
