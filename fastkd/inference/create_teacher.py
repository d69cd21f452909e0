"""Open a model as a frozen teacher."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from fastkd.inference.open_model import Model, Size, Source, open_model, pair, refuse_for_modules
from fastkd.models import Teacher
from fastkd.models.taps import model_name
from fastkd.models.timm_models import fixed_input_size
from fastkd.models.weights import verifying

Statistics = Sequence[float]


def create_teacher(
    source: Source,
    *,
    checkpoint: str | Path | None = None,
    weights: str = "auto",
    pretrained: bool = True,
    num_classes: int | None = None,
    mean: Statistics | None = None,
    std: Statistics | None = None,
    input_size: Size | None = None,
    verify: bool = True,
    **timm_kwargs: Any,
) -> Teacher:
    """Open a model and freeze it as a teacher, which is fed images as it was trained.

    Args:
        source: any model that `fastkd.evaluate` takes; a module is frozen in place.
        checkpoint: weights for a timm name or a module, read without unpickling code. For timm
            names, formats that timm converts (original DINOv2, Swin ...) load too.
        weights: ``"raw"``, ``"ema"`` or ``"auto"`` (the better ones) of a run.
        pretrained: load published weights of a timm name; False leaves them random, for tests.
        num_classes: of the head; None: as the weights have; 0 removes the head, for features alone.
        mean: per channel, what images are normalized with; None: as a run or an export was trained,
            else as in timm's ``pretrained_cfg``, if the model has one.
        std: per channel, given together with ``mean``.
        input_size: (H, W) or a side that images are resized to; None: as a run or an export was
            trained, or the size that the model is fixed to, if it is.
        verify: refuse weights whose checksum is wrong or missing.
        **timm_kwargs: of `timm.create_model`. ``img_size`` builds the model for another size, to
            which images are resized; a file that defines its model takes no other.

    Returns:
        The teacher, on the CPU unless ``device`` is among ``timm_kwargs``.

    Raises:
        ValueError: an unknown name, or weights or a head that do not exist or do not fit.
        FileNotFoundError: there is no file ``checkpoint`` or ``source``.
        RuntimeError: the pretrained weights cannot be downloaded.
        TypeError: ``source`` has another type, or options of timm are given for a module.
    """
    if isinstance(source, nn.Module):
        refuse_for_modules("create_teacher", {"num_classes": num_classes, **timm_kwargs})
    with verifying(verify):
        opened = open_model(
            source,
            checkpoint=checkpoint,
            weights=weights,
            num_classes=num_classes,
            pretrained=pretrained,
            caller="create_teacher",
            **timm_kwargs,
        )
    img_size = timm_kwargs.get("img_size")
    return as_teacher(opened, mean=mean, std=std, input_size=input_size, built_for=img_size)


def as_teacher(
    opened: Model,
    *,
    mean: Statistics | None = None,
    std: Statistics | None = None,
    input_size: Size | None = None,
    built_for: Size | None = None,  # img_size that the model was opened with
) -> Teacher:
    """Freeze an open model."""
    model, fed = opened.network, opened.trained_on
    if mean is None and std is None:
        # A run on tensors was fed them as they came: its statistics are None, not timm's.
        mean, std = _own_statistics(model) if fed is None else (fed.mean, fed.std)
    if built_for is None and fed is not None:
        built_for = fed.size[-2:]
    wanted, fixed = pair(input_size), _fixed_size(model, built_for)
    if wanted is not None and fixed is not None and wanted != fixed:
        raise ValueError(
            f"create_teacher: {model_name(model)} is fixed to images of {fixed}, got "
            f"input_size={input_size}; build it for another size with img_size={input_size}"
        )
    size = wanted or fixed or pair(built_for)
    return Teacher(model, mean=mean, std=std, input_size=size, classes=opened.classes)


def _own_statistics(model: nn.Module) -> tuple[Statistics | None, Statistics | None]:
    """Timm's statistics, unless the model was built for another number of channels."""
    cfg = getattr(model, "pretrained_cfg", None) or {}
    mean, std = cfg.get("mean"), cfg.get("std")
    channels = getattr(model, "in_chans", None)
    if mean is None or std is None or (channels is not None and channels != len(mean)):
        return None, None
    return mean, std


def _fixed_size(model: nn.Module, built_for: Size | None) -> tuple[int, int] | None:
    """The only input size of a timm model; None where it takes any."""
    if hasattr(getattr(model, "patch_embed", None), "strict_img_size"):
        return fixed_input_size(model)
    cfg = getattr(model, "pretrained_cfg", None) or {}
    if not cfg.get("fixed_input_size"):
        return None
    return pair(built_for) or pair(tuple(cfg["input_size"][-2:]))
