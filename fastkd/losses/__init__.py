"""Distillation losses as modules: logit losses, distances between token maps, terms over pairs.

Terms hold options and learnable projectors; the arithmetic on token maps is `fastkd.ops`, where an
operator computes it. `fastkd.losses.registry` names them all.
"""

from fastkd.losses.attention import AttentionTransfer
from fastkd.losses.base import FeatureTerm, LogitTerm
from fastkd.losses.crd import CRD
from fastkd.losses.distance import Distance, MapDistance
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
