"""Measurements of features: accumulators that take token maps batch by batch.

Know tensors only: which model, layer or data set the tokens come from is the caller's business.
"""

from fastkd.analysis.ranks import (
    LEVELS,
    DatasetRank,
    ImageRank,
    RankStatistics,
    RankSummary,
    SecondMoment,
    SharedBasis,
    captured_energy,
    image_energies,
    rank_at,
)

__all__ = [
    "LEVELS",
    "DatasetRank",
    "ImageRank",
    "RankStatistics",
    "RankSummary",
    "SecondMoment",
    "SharedBasis",
    "captured_energy",
    "image_energies",
    "rank_at",
]
