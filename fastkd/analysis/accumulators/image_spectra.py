"""Per-image spectra: how many dimensions each image needs in its own best basis."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastkd.analysis.accumulators import Accumulator, mean_and_std
from fastkd.analysis.results import Curve, Ranks
from fastkd.ops.checks import levels_of
from fastkd.ops.spectrum import LEVELS, effective_rank, energy_curve, spectral_ranks, stable_rank


@dataclass(frozen=True)
class ImageSpectraResult:
    """Spectra of a set of images."""

    ranks: Ranks
    curve: Curve  # over images with energy
    effective_rank: np.ndarray  # [images] float32; NaN where an image has no rank
    stable_rank: np.ndarray  # [images] float32; NaN where an image has no rank
    finite: np.ndarray  # [images] bool; the others have a NaN, an infinity or too large a norm
    without_energy: int  # images whose tokens are all zero

    @property
    def images(self) -> int:
        """Number of images, including those without a rank."""
        return len(self.finite)

    @property
    def non_finite(self) -> int:
        """Number of images left out for a NaN, an infinity or too large a norm."""
        return int((~self.finite).sum())


class ImageSpectra(Accumulator):
    """Spectrum of every image: ranks, energy curve, effective and stable rank.

    For an image's tokens X [N, D], neither centered nor normalized, rank@q is the smallest k whose
    k largest squared singular values hold a fraction q of their sum (arXiv 2511.15572).

    Args:
        levels: fractions q of the energy, in (0, 1], up to eight.

    Raises:
        ValueError: a level outside (0, 1], or none.
    """

    def __init__(self, levels: Sequence[float] = LEVELS) -> None:
        super().__init__()
        self.levels = levels_of("ImageSpectra", levels, "levels")

    def options(self) -> dict[str, Any]:
        """Return the levels."""
        return {"levels": self.levels}

    def update(self, tokens: Tensor, places: Sequence[int] | None = None) -> None:
        """Measure a batch.

        Args:
            tokens: [B, N, D] in any float dtype, prefix tokens already dropped.
            places: numbers of the images, which order the result; None continues counting.

        Raises:
            ValueError: wrong shape.
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
        """Summarize what was seen so far; synchronizes.

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
