"""Measurements of features: accumulators that take token maps batch by batch, and `analyze`.

Accumulators know tensors only: which model, layer or data set the tokens come from is the caller's
business. `analyze` runs all of them over models and images, and makes a `Report`.
"""

from fastkd.analysis.accumulators.image_spectra import ImageSpectra
from fastkd.analysis.accumulators.sep import TokenPattern
from fastkd.analysis.accumulators.shared_basis import (
    InSharedBasis,
    SecondMoment,
    SharedBasis,
    captured_energies,
)
from fastkd.analysis.analyzer import analyze
from fastkd.analysis.report import Report
from fastkd.analysis.results import Curve, Distribution, Ranks
from fastkd.ops.sep import LEVELS as BANDWIDTH_LEVELS
from fastkd.ops.spectrum import LEVELS

__all__ = [
    "BANDWIDTH_LEVELS",
    "LEVELS",
    "Curve",
    "Distribution",
    "ImageSpectra",
    "InSharedBasis",
    "Ranks",
    "Report",
    "SecondMoment",
    "SharedBasis",
    "TokenPattern",
    "analyze",
    "captured_energies",
]
