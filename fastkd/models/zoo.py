"""The way into timm's model zoo: one clear error where a name, weights or the network is missing.

Knows nothing of students, teachers or taps; those add what they need on top.
"""

from __future__ import annotations

import difflib
from typing import Any

import timm
from timm.models import get_pretrained_cfg
from torch import nn

# Hugging Face's client raises its transport's own exceptions, whichever transport it was built on.
_DOWNLOAD_PACKAGES = {"httpx", "httpcore", "huggingface_hub", "requests", "urllib3"}


def build_timm_model(
    caller: str, name: str, *, pretrained: bool = False, alternative: str = "", **kwargs: Any
) -> nn.Module:
    """`timm.create_model`, with errors that say what is missing and what can be done.

    Args:
        caller: the public function that asks, named in errors.
        name: a timm model name, with or without a pretrained tag.
        pretrained: load timm's weights; the only thing here that touches the network.
        alternative: what a user can do without these weights, appended to errors about them.
        **kwargs: passed on to `timm.create_model`.

    Raises:
        ValueError: timm does not know ``name``, or publishes no weights for it.
        RuntimeError: the weights could not be downloaded.
    """
    check_name(caller, name)
    if pretrained and not _has_weights(name, kwargs):
        raise ValueError(f"{caller}: timm publishes no weights for {name!r}{_or_else(alternative)}")
    try:
        return timm.create_model(name, pretrained=pretrained, **kwargs)
    except Exception as error:
        if pretrained and _is_download_failure(error):
            raise RuntimeError(
                f"{caller}: the pretrained weights of {name!r} are not cached and could not be "
                f"downloaded ({type(error).__name__}; no network?){_or_else(alternative)}"
            ) from error
        raise


def check_name(caller: str, name: str) -> None:
    """Refuse a name that is not in timm's registry, suggesting the nearest ones.

    Names with a source (``hf-hub:...``, ``local-dir:...``) are left to timm.

    Raises:
        ValueError: timm does not know ``name``.
    """
    architecture = name.split(".", 1)[0]
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


def _is_download_failure(error: Exception) -> bool:
    package = type(error).__module__.split(".", 1)[0]
    return isinstance(error, OSError) or package in _DOWNLOAD_PACKAGES


def _or_else(alternative: str) -> str:
    return f"; {alternative}" if alternative else ""
