"""Create students, the paper's variants of timm models, and register them in timm."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import partial
from typing import Any, Literal, get_args

import timm
import torch
from timm.layers import DropPath
from timm.models import (
    build_model_with_cfg,
    generate_default_cfgs,
    get_pretrained_cfg,
    register_model,
)
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from torch import nn

from fastkd.losses.projectors import has_hooks
from fastkd.models.architectures import (
    BlockRecorder,
    InitWeights,
    LiftVisionTransformer,
    WideLastVisionTransformer,
    check_init_weights,
    check_lift_pool,
    check_wide_block_type,
    into_lift,
    into_widelast,
    widened,
)
from fastkd.models.taps import evaluating
from fastkd.models.timm_models import build_timm_model, input_channels
from fastkd.utils.random import preserved_rng

Variant = Literal["plain", "lift", "widelast", "uniform"]

_BASE = "deit_tiny_patch16_224"
_TEACHER_WIDTH = 384  # of CaiT-S24, the paper's teacher


def create_student(
    name: str = "deit_tiny_patch16_224",
    variant: Variant = "plain",
    *,
    width: int | None = None,
    num_classes: int = 1000,
    img_size: int | tuple[int, int] | None = None,
    pretrained: bool = False,
    init_weights: InitWeights = "released",
    **timm_kwargs: Any,
) -> nn.Module:
    """Create a student from a timm model.

    ========  =================================================================  ==============
    variant   what it is                                                         DeiT-Tiny, 1000
    ========  =================================================================  ==============
    plain     the timm model itself, of any kind                                      5,717,416
    lift      patch tokens lifted to ``width``, normalized, averaged, classified      5,983,528
    widelast  the last block, final norm and head ``width`` wide                      7,313,896
    uniform   every block ``width`` wide, as many heads as the base (219)             7,372,759
    ========  =================================================================  ==============

    Args:
        name: a timm model name; all variants but ``plain`` need a plain ViT or DeiT.
        variant: one of the four.
        width: channels of the final features; 384 by default for ``lift`` and ``widelast``.
        num_classes: of the head; 0 leaves it out.
        img_size: input size the model is built for; None keeps the timm model's own. Ignored by
            models that run at any size (most CNNs).
        pretrained: start from timm's weights. ``lift`` keeps all but the final norm and head,
            ``widelast`` also not the last block; ``uniform`` has none that fit.
        init_weights: ``"released"``, as in the paper's runs, initializes the lift's projection and
            head like `torch.nn.Linear`, and the class token of an untrained widelast with std 0.02;
            ``"timm"`` initializes all as timm does.
        **timm_kwargs: of the timm model (``drop_path_rate``, ``in_chans``, ``patch_size``, ...).

    Returns:
        A timm model; a `LiftVisionTransformer` for ``lift``, a `WideLastVisionTransformer` for
        ``widelast``.

    Raises:
        ValueError: an unknown name or variant, a model that has no such variant, a width that is
            missing or does not divide into heads, or pretrained weights that do not exist.
        RuntimeError: the pretrained weights cannot be downloaded.
    """
    if variant not in get_args(Variant):
        raise ValueError(
            f"create_student: variant must be one of {get_args(Variant)}, got {variant!r}"
        )
    scheme = timm_kwargs.get("weight_init") or ""
    replaces = variant in ("lift", "widelast")  # layers of timm's model
    check_init_weights("create_student", init_weights, scheme if replaces else "")
    timm_kwargs |= {"num_classes": num_classes, "img_size": img_size}
    if variant == "plain":
        if width is not None:
            raise ValueError(
                f"create_student: variant 'plain' has no width, got {width} ('uniform' is the timm "
                "model at another width)"
            )
        if name in default_cfgs:  # a student by its registered name
            timm_kwargs["init_weights"] = init_weights
        return _build_base(name, pretrained, timm_kwargs)
    width = default_width(variant) if width is None else width
    if variant == "lift":
        return _create_lift(name, width, pretrained, init_weights, timm_kwargs)
    if variant == "widelast":
        if pretrained or "checkpoint_path" in timm_kwargs:  # keep a trained class token
            init_weights = "timm"
        return _create_widelast(name, width, pretrained, init_weights, timm_kwargs)
    return _create_uniform(name, width, pretrained, timm_kwargs)


def default_width(variant: str) -> int:
    if variant != "uniform":
        return _TEACHER_WIDTH
    raise ValueError(
        "create_student: variant 'uniform' needs width= (219 makes deit_tiny_patch16_224 as large "
        "as its WideLast)"
    )


def _create_lift(
    name: str, width: int, pretrained: bool, init_weights: InitWeights, kwargs: dict[str, Any]
) -> nn.Module:
    pool = kwargs.pop("global_pool", "avg")
    check_lift_pool(pool)
    _outline(name, "lift", kwargs)
    vit = _build_base(name, pretrained, kwargs)
    return _renamed(into_lift(vit, width, pool, init_weights), "lift")


def _create_widelast(
    name: str, width: int, pretrained: bool, init_weights: InitWeights, kwargs: dict[str, Any]
) -> nn.Module:
    check_wide_block_type(type(_outline(name, "widelast", kwargs).blocks[-1]))
    recorder = BlockRecorder()
    _outline(name, "widelast", kwargs | {"block_fn": recorder})
    widened(recorder.arguments, width)  # refuses a wrong one before anything is downloaded
    vit = _build_base(name, pretrained, kwargs)
    student = into_widelast(vit, recorder.arguments, width, init_weights)
    return _renamed(student, "widelast")


def _create_uniform(name: str, width: int, pretrained: bool, kwargs: dict[str, Any]) -> nn.Module:
    if pretrained:
        raise ValueError(
            f"create_student: pretrained weights of {name!r} do not fit variant 'uniform', whose "
            "every layer has another width; use pretrained=False"
        )
    recorder = BlockRecorder()  # not every kind of block has its number of heads as an attribute
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
    """Build the timm model without storage, to check it before anything is downloaded."""
    left_out = ("device", "dtype", "checkpoint_path")
    on_meta = {key: value for key, value in kwargs.items() if key not in left_out}
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
    """Keep the base's statistics, but neither its name nor the source of its weights."""
    cfg = student.pretrained_cfg
    architecture = str(cfg["architecture"])
    # By these a checkpoint would be reloaded as the base, with weights that do not fit.
    for source in ("url", "file", "state_dict", "hf_hub_id", "hf_hub_filename", "tag"):
        cfg.pop(source, None)
    cfg["architecture"] = variant_name(architecture, variant)
    cfg |= _paper_cfg(architecture, variant)
    return student


def variant_name(architecture: str, variant: str) -> str:
    """``deit_tiny_lift_patch16_224`` for ``deit_tiny_patch16_224`` and ``lift``."""
    stem, patch, rest = architecture.partition("_patch")
    return f"{stem}_{variant}{patch}{rest}"


def _student_cfg(base: str, variant: str) -> dict[str, Any] | None:
    """Get the configuration of a student: its base's, without the base's weights."""
    published = get_pretrained_cfg(base)
    if published is None:  # a base on the hub or in a folder
        return None
    cfg = published.to_dict(remove_source=True).items()
    kept = {key: value for key, value in cfg if key not in ("architecture", "tag")}
    return kept | {"num_classes": 1000} | _paper_cfg(base, variant)


def _paper_cfg(base: str, variant: str) -> dict[str, Any]:
    # The paper and DeiT evaluate at this crop; timm's configuration has 0.9.
    is_of_paper = base.partition(".")[0] == _BASE and variant != "plain"
    return {"crop_pct": 0.875} if is_of_paper else {}


default_cfgs = generate_default_cfgs(
    {
        "deit_tiny_lift_patch16_224": _student_cfg(_BASE, "lift"),
        "deit_tiny_widelast_patch16_224": _student_cfg(_BASE, "widelast"),
        "deit_tiny_uniform219_patch16_224": _student_cfg(_BASE, "uniform"),
        "fastkd_student": _student_cfg(_BASE, "plain"),
    }
)


def _build_deit_tiny(
    model_class: type[nn.Module], variant: str, pretrained: bool, **kwargs: Any
) -> Any:
    deit_tiny = {"patch_size": 16, "embed_dim": 192, "depth": 12, "num_heads": 3}
    return build_model_with_cfg(
        model_class,
        variant_name(_BASE, variant),
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": kwargs.pop("out_indices", 3), "feature_cls": "getter"},
        **deit_tiny | kwargs,
    )


@register_model
def deit_tiny_lift_patch16_224(pretrained: bool = False, **kwargs: Any) -> LiftVisionTransformer:
    """DeiT-Tiny with its patch tokens lifted to ``width`` (384) channels; 5,983,528 parameters."""
    return _build_deit_tiny(LiftVisionTransformer, "lift", pretrained, **kwargs)


@register_model
def deit_tiny_widelast_patch16_224(
    pretrained: bool = False, **kwargs: Any
) -> WideLastVisionTransformer:
    """DeiT-Tiny with a last block of ``width`` (384) channels; 7,313,896 parameters."""
    return _build_deit_tiny(WideLastVisionTransformer, "widelast", pretrained, **kwargs)


@register_model
def deit_tiny_uniform219_patch16_224(
    pretrained: bool = False, *, init_weights: InitWeights = "released", **kwargs: Any
) -> VisionTransformer:
    """DeiT-Tiny with 219 channels (73 per head) in every block; 7,372,759 parameters."""
    check_init_weights("deit_tiny_uniform219_patch16_224", init_weights)
    arguments = {"embed_dim": 219} | kwargs
    return _build_deit_tiny(VisionTransformer, "uniform219", pretrained, **arguments)


@register_model
def fastkd_student(
    pretrained: bool = False,
    *,
    base: str = _BASE,
    variant: Variant = "plain",
    width: int | None = None,
    pretrained_cfg: Any = None,
    **kwargs: Any,
) -> nn.Module:
    """The student that `create_student` makes of any ``base``, with the base's preprocessing."""
    # Exported students have this name where their base and variant have no entry of their own.
    if pretrained_cfg is None or isinstance(pretrained_cfg, str):  # a tag, and there are none
        cfg = _student_cfg(base, variant)
        pretrained_cfg = None if cfg is None else cfg | {"architecture": "fastkd_student"}
    return build_model_with_cfg(
        partial(create_student, base, variant, width=width),
        "fastkd_student",
        pretrained,
        pretrained_cfg=pretrained_cfg,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": kwargs.pop("out_indices", 3), "feature_cls": "getter"},
        **kwargs,
    )


def registered_name(name: str, variant: str, width: int | None) -> tuple[str, dict[str, Any]]:
    """Name and arguments by which `timm.create_model` builds a student of `create_student`."""
    if variant == "plain":
        return name, {}
    width = default_width(variant) if width is None else width
    own_width = variant == "uniform"  # which is part of its name
    registered = variant_name(name.partition(".")[0], f"uniform{width}" if own_width else variant)
    if registered in default_cfgs:
        return registered, {} if own_width else {"width": width}
    return fastkd_student.__name__, {"base": name, "variant": variant, "width": width}


@preserved_rng()
def rebuilt_by(network: nn.Module) -> dict[str, Any] | None:
    """Find the recipe fields by which `create_student` builds this very module, or None."""
    if any(has_hooks(module) for module in network.modules()):
        return None  # which a rebuilt module would lack
    size = getattr(getattr(network, "patch_embed", None), "img_size", None)
    options: dict[str, Any] = {
        "num_classes": getattr(network, "num_classes", None),
        "img_size": None if size is None else tuple(size),
        "in_chans": input_channels(network),
    }
    for name, variant, width in _candidates(network):
        create = partial(create_student, name, variant, width=width, **options)
        try:
            with torch.device("meta"):
                outline = create()
            if type(outline) is not type(network) or _shapes(outline) != _shapes(network):
                continue
            # A pooling or an activation leaves no trace in the weights, so logits must agree.
            if _compute_the_same(network, create()):
                rates = [m.drop_prob for m in network.modules() if isinstance(m, DropPath)]
                fields = {"model": name, "variant": variant, "width": width}
                return fields | {"drop_path": round(max(rates, default=0.0), 6)}
        except (ValueError, TypeError, RuntimeError, AssertionError):
            continue
    return None


def _candidates(network: nn.Module) -> Iterator[tuple[str, Variant, int | None]]:
    """Yield bases, variants and widths that a network of timm may have been built by."""
    architecture = (getattr(network, "pretrained_cfg", None) or {}).get("architecture", "")
    width = getattr(network, "num_features", None)
    made_of: Any = getattr(network, "_model_args", {})  # timm's record of its arguments
    if architecture == fastkd_student.__name__:
        made_of = {"base": _BASE, "variant": "plain", "width": None, **made_of}
        yield made_of["base"], made_of["variant"], made_of["width"]
        return
    named = re.search(r"_(lift|widelast|uniform)\d*(?=_patch|$)", architecture)
    if named is not None:
        base = architecture[: named.start()] + architecture[named.end() :]
        if timm.is_model(base):
            yield base, named[1], width  # type: ignore[misc]
    if timm.is_model(architecture):
        yield architecture, "plain", None


def _shapes(network: nn.Module) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in network.state_dict().items()}


@torch.no_grad()
def _compute_the_same(network: nn.Module, rebuilt: nn.Module) -> bool:
    weight = next(network.parameters())
    rebuilt.to(weight.device, weight.dtype).load_state_dict(network.state_dict())
    size = getattr(getattr(network, "patch_embed", None), "img_size", None)
    cfg: Any = getattr(network, "pretrained_cfg", {})
    height, width = size or cfg["input_size"][-2:]
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(1, input_channels(network), height, width, generator=generator)
    images = images.to(weight.device, weight.dtype)
    with evaluating(network):
        logits, found = network(images), rebuilt.eval()(images)
    # Of the same layers and weights, so that hardly a rounding differs.
    return bool((logits - found).abs().max() <= 1e-5 * logits.abs().max().clamp(min=1))
