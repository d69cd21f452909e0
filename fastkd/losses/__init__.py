"""Distillation losses as modules: one named term per class, and their sum.

Terms hold options and learnable projectors; the arithmetic on token maps is `fastkd.ops`.
"""

from fastkd.losses.feature import FeatureKD
from fastkd.losses.lift import LiftKD
from fastkd.losses.logit import HardKD, SoftKD
from fastkd.losses.projectors import PROJECTORS, pool_side
from fastkd.losses.total import DistillationLoss

__all__ = ["PROJECTORS", "DistillationLoss", "FeatureKD", "HardKD", "LiftKD", "SoftKD", "pool_side"]
