"""Per-image spectra: how many dimensions each image needs in the basis that suits it best.

For an image's tokens X [N, D], neither centered nor normalized, rank@q is the smallest k whose k
largest squared singular values hold a part q of their sum (arXiv 2511.15572).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastkd.analysis.accumulators.base import Accumulator, mean_and_std
from fastkd.analysis.results import Curve, Ranks
from fastkd.ops.checks import levels_of
from fastkd.ops.spectrum import (
    LEVELS,
    effective_rank,
    energy_curve,
    spectral_ranks,
    stable_rank,
)


@dataclass(frozen=True)
class ImageSpectraResult:
    """Spectra of a set of images.

    Attributes:
        ranks: per-image rank@q.
        curve: energy over dimensions, mean and std over images with energy.
        effective_rank: [images] float32, Roy & Vetterli's; NaN where an image has no rank.
        stable_rank: [images] float32; NaN likewise.
        finite: [images] bool; others were left out because of a NaN, an infinity, or a value that
            is too large for its square.
        without_energy: images left out because all their tokens are zero.
    """

    ranks: Ranks
    curve: Curve
    effective_rank: np.ndarray
    stable_rank: np.ndarray
    finite: np.ndarray
    without_energy: int

    @property
    def images(self) -> int:
        """How many were measured, those left out included."""
        return len(self.finite)

    @property
    def non_finite(self) -> int:
        """How many were left out because of values."""
        return int((~self.finite).sum())


class ImageSpectra(Accumulator):
    """Spectrum of every image: ranks, energy curve, effective and stable rank.

    Args:
        levels: parts of the energy at which ranks are read, in (0, 1], up to eight.

    Raises:
        ValueError: a level outside (0, 1], or none.
    """

    def __init__(self, levels: Sequence[float] = LEVELS) -> None:
        super().__init__()
        self.levels = levels_of("ImageSpectra", levels, "levels")

    def options(self) -> dict[str, Any]:
        """The levels."""
        return {"levels": self.levels}

    def update(self, tokens: Tensor, places: Sequence[int] | None = None) -> None:
        """Measure a batch.

        Args:
            tokens: [B, N, D] in any float dtype, prefix tokens already dropped.
            places: the images' numbers; rows of the result are in their order. Counted without.

        Raises:
            ValueError: another shape.
            TypeError: tokens are not floating-point.
        """
        tokens, finite = self._checked(tokens)
        energies, ranks = spectral_ranks(tokens, self.levels)
        known = ranks[:, 0] > 0
        curves = torch.where(known.unsqueeze(-1), energy_curve(energies), 0.0).double()
        self._add("curve", curves.sum(dim=0))
        self._add("curve_squares", curves.square().sum(dim=0))
        self._add("known", known.sum())
        self.rows.add(
            self._places(places, tokens),
            finite=finite,
            ranks=ranks.int(),
            effective_rank=torch.where(known, effective_rank(energies), torch.nan).float(),
            stable_rank=torch.where(known, stable_rank(energies), torch.nan).float(),
        )

    def result(self) -> ImageSpectraResult:
        """Summarise what was seen so far; waits for the device.

        Returns:
            Ranks, curves and counts.

        Raises:
            ValueError: no image was seen.
        """
        rows = self.rows.sorted()
        if not rows:
            raise ValueError("ImageSpectra.result: no image was seen")
        mean, std = mean_and_std(self.sums["curve"], self.sums["curve_squares"], self.sums["known"])
        return ImageSpectraResult(
            ranks=Ranks(self.levels, rows["ranks"], largest=len(mean)),
            curve=Curve(mean, std),
            effective_rank=rows["effective_rank"],
            stable_rank=rows["stable_rank"],
            finite=rows["finite"],
            without_energy=int(rows["finite"].sum()) - int(self.sums["known"]),
        )
