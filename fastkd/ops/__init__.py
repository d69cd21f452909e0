"""Operators: fused functions of tensors."""

from fastkd.ops.backend import backends
from fastkd.ops.feature_kd import feature_kd
from fastkd.ops.lift_kd import lift, lift_kd
from fastkd.ops.second_moment import second_moment
from fastkd.ops.sep import bandwidth, sep
from fastkd.ops.spectrum import (
    effective_rank,
    energy_curve,
    gram,
    overlap,
    principal_angles,
    rank_at,
    singular_values,
    spectral_ranks,
    spectrum,
    stable_rank,
    subspace,
)

__all__ = [
    "backends",
    "bandwidth",
    "effective_rank",
    "energy_curve",
    "feature_kd",
    "gram",
    "lift",
    "lift_kd",
    "overlap",
    "principal_angles",
    "rank_at",
    "second_moment",
    "sep",
    "singular_values",
    "spectral_ranks",
    "spectrum",
    "stable_rank",
    "subspace",
]
