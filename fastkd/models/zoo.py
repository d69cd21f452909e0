"""The way into timm's model zoo: one clear error where a name, weights or the network is missing.

Knows nothing of students, teachers or taps; those add what they need on top.
"""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
from timm.models import get_pretrained_cfg
from torch import nn

from fastkd.models.hub import (
    DownloadError,
    explained,
    is_download_failure,
    is_hub_name,
    no_waiting_offline,
    not_downloaded,
)
from fastkd.models.weights import looks_like_a_path

__all__ = ["LOCAL", "DownloadError", "build_timm_model", "check_name", "fixed_input_size"]

LOCAL = "local-dir:"  # before a folder that timm builds a model from


def build_timm_model(
    caller: str, name: str, *, pretrained: bool = False, alternative: str = "", **kwargs: Any
) -> nn.Module:
    """`timm.create_model`, with errors that say what is missing and what can be done.

    Args:
        caller: the public function that asks, named in errors.
        name: a timm model name, with or without a pretrained tag.
        pretrained: load timm's weights; the only thing here that touches the network.
        alternative: what a user can do without these weights, appended to errors about them.
        **kwargs: passed on to `timm.create_model`; ``img_size`` only to models that have one (most
            CNNs run at any size and do not).

    Returns:
        The model.

    Raises:
        ValueError: timm does not know ``name``, or publishes no weights for it; or the hub has no
            such model.
        FileNotFoundError: ``name`` is a path, or a ``local-dir:`` with one, that is not there.
        DownloadError: the weights could not be downloaded.
    """
    check_name(caller, name)
    if pretrained and not _has_weights(name, kwargs):
        raise ValueError(f"{caller}: timm publishes no weights for {name!r}{_or_else(alternative)}")
    downloads = _downloads(name, pretrained, kwargs)
    try:
        with no_waiting_offline() if downloads else contextlib.nullcontext():
            return _create(name, pretrained, kwargs)
    except Exception as error:
        told = explained(caller, name, error)
        if told is not None:
            raise type(told)(f"{told}{_or_else(alternative)}") from error
        if downloads and is_download_failure(error):
            what = f"the pretrained weights of {name!r} are"
            told = not_downloaded(caller, what, error)
            raise DownloadError(f"{told}{_or_else(alternative)}") from error
        raise


def _create(name: str, pretrained: bool, kwargs: dict[str, Any]) -> nn.Module:
    try:
        return timm.create_model(name, pretrained=pretrained, **kwargs)
    except TypeError as error:
        # timm says nowhere which models are built for a size, but by refusing the argument.
        if kwargs.get("img_size") is None or "'img_size'" not in str(error):
            raise
    return timm.create_model(name, pretrained=pretrained, **kwargs | {"img_size": None})


def fixed_input_size(model: nn.Module) -> tuple[int, int] | None:
    """The one input size that a model's patch embedding takes.

    Args:
        model: any.

    Returns:
        (H, W); None where it takes any size, or there is no such patch embedding.
    """
    patch_embed = getattr(model, "patch_embed", None)
    size = getattr(patch_embed, "img_size", None)
    if size is None or not getattr(patch_embed, "strict_img_size", False):
        return None
    return int(size[0]), int(size[1])


def check_name(caller: str, name: str) -> None:
    """Refuse a name that is not in timm's registry, suggesting the nearest ones.

    Names with a source (``hf-hub:...``, ``local-dir:...``) are left to timm.

    Raises:
        ValueError: timm does not know ``name``, or it is the path of a file.
        FileNotFoundError: it is the path of a file that is not there.
    """
    if looks_like_a_path(name):
        if Path(name).exists():
            raise ValueError(
                f"{caller}: {name} is no timm name: give the name of a model, and its weights with "
                "checkpoint="
            )
        raise FileNotFoundError(f"{caller}: there is no file or folder {name!r}")
    architecture = name.split(".", 1)[0]
    if name.startswith(LOCAL) and not (folder := Path(name.removeprefix(LOCAL))).is_dir():
        raise FileNotFoundError(f"{caller}: there is no folder {str(folder)!r}")
    if ":" in name or timm.is_model(architecture):
        return
    near = difflib.get_close_matches(architecture, timm.list_models(), n=3)
    raise ValueError(
        f"{caller}: timm has no model {name!r}"
        + (f"; did you mean {' or '.join(near)}?" if near else "; see timm.list_models()")
    )


def _has_weights(name: str, kwargs: dict[str, Any]) -> bool:
    if ":" in name or kwargs.get("pretrained_cfg") or kwargs.get("pretrained_cfg_overlay"):
        return True  # the caller says where the weights are; timm checks that
    cfg = get_pretrained_cfg(name, allow_unregistered=True)
    return cfg is not None and cfg.has_weights


def _downloads(name: str, pretrained: bool, kwargs: Mapping[str, Any]) -> bool:
    """Whether building a model may touch the network."""
    given = kwargs.get("pretrained_cfg_overlay") or {}
    if name.startswith(LOCAL) or "state_dict" in given or "file" in given:
        return False
    return pretrained or is_hub_name(name)


def _or_else(alternative: str) -> str:
    return f"; {alternative}" if alternative else ""
