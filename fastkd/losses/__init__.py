"""Distillation losses as modules: logit losses, distances between token maps, terms over pairs.

Terms hold options and learnable projectors; the arithmetic on token maps is `fastkd.ops`, where an
operator computes it. `fastkd.losses.registry` names them all. Names are imported at first use, so
that reading the registry does not import torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastkd.losses.attention import AttentionTransfer
    from fastkd.losses.base import Distance, FeatureTerm, LogitTerm, MapDistance
    from fastkd.losses.crd import CRD
    from fastkd.losses.distillation import DistillationLoss
    from fastkd.losses.factory import create_feature_loss, create_logit_loss
    from fastkd.losses.feature import FeatureKD
    from fastkd.losses.lift import Lift, LiftKD
    from fastkd.losses.logit import DIST, DKD, NKD, HardKD, SoftKD
    from fastkd.losses.manifold import ManifoldKD
    from fastkd.losses.projectors import PROJECTORS, build_projector, pool_side, undecayed
    from fastkd.losses.rkd import RKD
    from fastkd.losses.vitkd import ViTKD
    from fastkd.losses.vkd import VkD

_HOMES = {
    "CRD": "crd",
    "DIST": "logit",
    "DKD": "logit",
    "NKD": "logit",
    "PROJECTORS": "projectors",
    "RKD": "rkd",
    "AttentionTransfer": "attention",
    "Distance": "base",
    "DistillationLoss": "distillation",
    "FeatureKD": "feature",
    "FeatureTerm": "base",
    "HardKD": "logit",
    "Lift": "lift",
    "LiftKD": "lift",
    "LogitTerm": "base",
    "ManifoldKD": "manifold",
    "MapDistance": "base",
    "SoftKD": "logit",
    "ViTKD": "vitkd",
    "VkD": "vkd",
    "build_projector": "projectors",
    "create_feature_loss": "factory",
    "create_logit_loss": "factory",
    "pool_side": "projectors",
    "undecayed": "projectors",
}

__all__ = [
    "CRD",
    "DIST",
    "DKD",
    "NKD",
    "PROJECTORS",
    "RKD",
    "AttentionTransfer",
    "Distance",
    "DistillationLoss",
    "FeatureKD",
    "FeatureTerm",
    "HardKD",
    "Lift",
    "LiftKD",
    "LogitTerm",
    "ManifoldKD",
    "MapDistance",
    "SoftKD",
    "ViTKD",
    "VkD",
    "build_projector",
    "create_feature_loss",
    "create_logit_loss",
    "pool_side",
    "undecayed",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value
