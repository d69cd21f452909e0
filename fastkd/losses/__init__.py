"""Distillation losses: of logits, of token maps, and of relations between images or patches."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:  # a checker cannot follow the registry, and these may be listed here
    from fastkd.losses.attention import AttentionTransfer as AttentionTransfer
    from fastkd.losses.base import Distance as Distance
    from fastkd.losses.base import FeatureTerm as FeatureTerm
    from fastkd.losses.base import LogitTerm as LogitTerm
    from fastkd.losses.crd import CRD as CRD
    from fastkd.losses.distillation import DistillationLoss as DistillationLoss
    from fastkd.losses.feature import FeatureKD as FeatureKD
    from fastkd.losses.feature import LiftKD as LiftKD
    from fastkd.losses.feature import MapDistance as MapDistance
    from fastkd.losses.logit import DIST as DIST
    from fastkd.losses.logit import DKD as DKD
    from fastkd.losses.logit import NKD as NKD
    from fastkd.losses.logit import HardKD as HardKD
    from fastkd.losses.logit import SoftKD as SoftKD
    from fastkd.losses.manifold import ManifoldKD as ManifoldKD
    from fastkd.losses.projectors import PROJECTORS as PROJECTORS
    from fastkd.losses.projectors import Lift as Lift
    from fastkd.losses.projectors import build_projector as build_projector
    from fastkd.losses.projectors import pool_side as pool_side
    from fastkd.losses.projectors import undecayed as undecayed
    from fastkd.losses.registry import create_feature_loss as create_feature_loss
    from fastkd.losses.registry import create_logit_loss as create_logit_loss
    from fastkd.losses.rkd import RKD as RKD
    from fastkd.losses.vitkd import ViTKD as ViTKD
    from fastkd.losses.vkd import VkD as VkD
else:  # at first use: reading the registry must not import torch
    import importlib

    from fastkd.losses.registry import FEATURE_LOSSES, LOGIT_LOSSES

    _HOMES = {loss.class_name: loss.module for loss in (*LOGIT_LOSSES, *FEATURE_LOSSES)}
    for module, names in {
        "base": "Distance FeatureTerm LogitTerm",
        "distillation": "DistillationLoss",
        "feature": "FeatureKD LiftKD",
        "projectors": "PROJECTORS Lift build_projector pool_side undecayed",
        "registry": "create_feature_loss create_logit_loss",
    }.items():
        _HOMES |= dict.fromkeys(names.split(), module)
    __all__ = sorted(_HOMES)

    def __getattr__(name):
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        globals()[name] = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
        return globals()[name]
