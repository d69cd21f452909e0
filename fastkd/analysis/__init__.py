"""Measurements of features: `analyze`, and accumulators that take tokens batch by batch."""

from fastkd.analysis.accumulators.shared_basis import (
    InSharedBasis,
    SecondMoment,
    SharedBasis,
    captured_energies,
)
from fastkd.analysis.accumulators.spectra import ImageSpectra, TokenPattern
from fastkd.analysis.analyzer import analyze
from fastkd.analysis.report import Report
from fastkd.analysis.results import Curve, Distribution, Ranks
from fastkd.analysis.study import Options
from fastkd.ops.sep import LEVELS as BANDWIDTH_LEVELS
from fastkd.ops.spectrum import LEVELS

__all__ = [
    "BANDWIDTH_LEVELS",
    "LEVELS",
    "Curve",
    "Distribution",
    "ImageSpectra",
    "InSharedBasis",
    "Options",
    "Ranks",
    "Report",
    "SecondMoment",
    "SharedBasis",
    "TokenPattern",
    "analyze",
    "captured_energies",
]
