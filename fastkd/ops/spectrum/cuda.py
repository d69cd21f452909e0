"""spectrum through the compiled library: schema of its raw operator, and its outputs.

The kernel and the binding are csrc/spectrum.cu and csrc/spectrum_binding.cpp, which register an
implementation for what is declared here.
"""

from __future__ import annotations

import torch
from torch import Tensor

LARGEST = 257  # csrc/spectrum.h's kSpectrumLargest
MOST_LEVELS = 8  # kSpectrumLevels

torch.library.define(
    "fastkd::_spectrum_solve",
    "(Tensor gram, float[] levels, Tensor(a!) energies, Tensor(b!) ranks) -> ()",
)


def solve(gram: Tensor, levels: tuple[float, ...]) -> tuple[Tensor, Tensor]:
    """As `reference.solve`, for matrices up to `LARGEST`; one launch, no synchronisation.

    Eigenvalues are those of the lower triangle, to a few 1e-7 of their sum; what is smaller
    than about 2^-29 of it is 0. Allocates the results alone.

    Args:
        gram: [B, n, n] float32, contiguous, positive semidefinite.
        levels: up to `MOST_LEVELS` parts of the energy.

    Returns:
        Energies [B, n] float32, descending, at least 0; ranks [B, levels] int64. A matrix with a
        NaN or an infinity, or with an energy beyond float32's range, has NaN energies and ranks
        of 0, one of zeros has ranks of 0.

    Raises:
        ValueError: more levels than the kernel takes.
    """
    if len(levels) > MOST_LEVELS:
        raise ValueError(f"spectrum: levels must be {MOST_LEVELS} at most, got {len(levels)}")
    energies = gram.new_empty(gram.shape[:-1])
    ranks = gram.new_empty((len(gram), len(levels)), dtype=torch.long)
    torch.ops.fastkd._spectrum_solve(gram, list(levels), energies, ranks)
    return energies, ranks
