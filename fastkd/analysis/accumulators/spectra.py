"""Spectra of each image (singular values) and of tokens (SEP, energy over channel frequency)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastkd.analysis.accumulators import Accumulator, mean_and_std
from fastkd.analysis.results import Curve, Ranks, Sep, SepTest, intervals
from fastkd.ops.checks import levels_of
from fastkd.ops.second_moment import second_moment
from fastkd.ops.sep import LEVELS as BANDWIDTH_LEVELS
from fastkd.ops.sep import (
    TIE_TOLERANCE,
    Convention,
    bandwidth,
    check_convention,
    permuted_moment,
    sep_curves,
    sep_from_moment,
    sep_from_power,
    sep_power,
    white_noise_sep,
)
from fastkd.ops.spectrum import LEVELS, effective_rank, energy_curve, spectral_ranks, stable_rank

CONFIDENCE = 0.95
RESAMPLES = 1000  # bootstrap samples

# float64 values at a time: 32 MB of curves, 128 MB of permuted moments.
_CHUNK_VALUES = 1 << 22
_CHUNK_MOMENTS = 1 << 24


@dataclass(frozen=True)
class ImageSpectraResult:
    """Spectra of a set of images."""

    ranks: Ranks
    curve: Curve  # over images with energy
    effective_rank: np.ndarray  # [images] float32; NaN where an image has no rank
    stable_rank: np.ndarray  # [images] float32; NaN where an image has no rank
    finite: np.ndarray  # [images] bool; the others have a NaN, an infinity or too large a norm
    without_energy: int  # images whose tokens are all zero


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
        return {"levels": self.levels}

    def update(self, tokens: Tensor, places: Sequence[int] | None = None) -> None:
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


class TokenPattern(Accumulator):
    """Mean cumulated energy of tokens over channel frequency, and its permutation test.

    Each token gives the energies of its DFT along the channels, cumulated in frequency order, over
    their total (arXiv 2511.15572). White noise gives nearly the same straight line, so compare with
    ``white_noise`` and `permutation_test`.

    Args:
        convention: ``"full"``: all D bins in FFT order, as in the paper; ``"folded"``: the
            D // 2 + 1 unique bins, with conjugate pairs folded.
        detailed: also measure the std over tokens, and keep what `permutation_test` needs.

    Raises:
        ValueError: unknown convention.
    """

    def __init__(self, convention: Convention = "full", detailed: bool = False) -> None:
        super().__init__()
        check_convention("TokenPattern", convention)
        self.convention = convention
        self.detailed = detailed

    def options(self) -> dict[str, Any]:
        return {"convention": self.convention, "detailed": self.detailed}

    def update(self, tokens: Tensor, places: Sequence[int] | None = None) -> None:
        tokens, finite = self._checked(tokens)
        present = tokens.any(dim=-1)
        self._add("tokens", present.sum())
        self._add("without_energy", (~present & finite.unsqueeze(-1)).sum())
        if not self.detailed:
            for some in self._chunks(tokens):
                self._add("power", sep_power(tokens[some]))
            return
        self._add("moment", second_moment(tokens, "row_norm"))
        where = self._places(places, tokens)
        for some in self._chunks(tokens):
            here = present[some].unsqueeze(-1)
            curves = torch.where(here, sep_curves(tokens[some], self.convention), 0.0).double()
            self._add("curve", curves.sum(dim=(0, 1)))
            self._add("curve_squares", curves.square().sum(dim=(0, 1)))
            count = here.sum(dim=1)
            own = curves.sum(dim=1) / count.clamp_min(1)
            self.rows.add(where[some], curves=own.float(), tokens=count.squeeze(-1))

    def _chunks(self, tokens: Tensor) -> list[slice]:
        """Slice the batch so that the curves of a slice fit into memory."""
        step = max(1, _CHUNK_VALUES // tokens[0].numel()) if len(tokens) else 1
        return [slice(start, start + step) for start in range(0, len(tokens), step)]

    def result(self, levels: Sequence[float] = BANDWIDTH_LEVELS) -> Sep:
        """Summarize what was seen so far, with bandwidths at some levels; synchronizes."""
        self._refuse_empty()
        assert self.channels is not None
        std = None
        if self.detailed:
            mean = sep_from_moment(self.sums["moment"], self.convention)
            sums = self.sums["curve"], self.sums["curve_squares"], self.sums["tokens"]
            std = mean_and_std(*sums)[1]
        else:
            mean = sep_from_power(self.sums["power"], self.channels, self.convention)
        return Sep(
            convention=self.convention,
            curve=Curve(mean.cpu().numpy(), std),
            white_noise=white_noise_sep(self.channels, self.convention).cpu().numpy(),
            levels=tuple(levels),
            bandwidths=bandwidth(mean, levels).cpu().numpy(),
            tokens=self.tokens,
            without_energy=int(self.sums["without_energy"]),
        )

    def permutation_test(
        self, permutations: int = 100, levels: Sequence[float] = BANDWIDTH_LEVELS, seed: int = 0
    ) -> SepTest:
        """Compare bandwidths with those under random permutations of the channels.

        Args:
            permutations: number of permutations, at least 1.
            levels: fractions of the energy at which bandwidths are read.
            seed: for permutations and bootstrap samples.

        Returns:
            Bandwidths, shifts, their intervals and p-values.

        Raises:
            ValueError: not ``detailed``, no permutations, or no token with energy was seen.
        """
        if not self.detailed or permutations < 1:
            raise ValueError(
                "TokenPattern.permutation_test: needs detailed=True and at least one permutation, "
                f"got detailed={self.detailed} and {permutations}"
            )
        self._refuse_empty()
        moment = self.sums["moment"]
        levels = tuple(levels)
        observed = sep_from_moment(moment, self.convention).cpu()
        permuted = self._permuted(permutations, seed)
        rng = np.random.default_rng(seed)
        resampled = self._resampled(rng)
        # Read between bins: in whole bins, a shift by less than one bin would be rounding.
        here, there = _crossings(observed, levels), _crossings(permuted, levels)
        center = torch.cat([there, here[None]]).mean(dim=0)
        as_far = (there - center).abs() >= (here - center).abs()
        drawn = rng.integers(len(there), size=(RESAMPLES, len(there)))
        shifts = there.numpy()[drawn].mean(axis=1) - _crossings(resampled, levels).numpy()
        return SepTest(
            levels=levels,
            observed=bandwidth(observed, levels).numpy(),
            observed_interval=intervals(bandwidth(resampled, levels).numpy(), CONFIDENCE),
            permuted=bandwidth(permuted, levels).numpy(),
            shift=(there.mean(dim=0) - here).numpy(),
            shift_interval=intervals(shifts, CONFIDENCE),
            p_value=((1 + as_far.sum(dim=0)).double() / (1 + len(there))).numpy(),
            confidence=CONFIDENCE,
        )

    def _permuted(self, permutations: int, seed: int) -> Tensor:
        """Compute the patterns of randomly permuted channels, [permutations, F]."""
        moment = self.sums["moment"]
        generator = torch.Generator().manual_seed(seed)
        orders = [torch.randperm(len(moment), generator=generator) for _ in range(permutations)]
        step = max(1, _CHUNK_MOMENTS // moment.numel())
        curves = []
        # The pattern of permuted channels follows exactly from the permuted second moment.
        for part in range(0, permutations, step):
            some = torch.stack(orders[part : part + step]).to(moment.device)
            curves.append(sep_from_moment(permuted_moment(moment, some), self.convention).cpu())
        return torch.cat(curves)

    def _resampled(self, rng: np.random.Generator) -> Tensor:
        """Average bootstrap samples of images, weighted by their tokens, to [RESAMPLES, F]."""
        rows = self.rows.sorted()
        images = len(rows["tokens"])
        drawn = rng.multinomial(images, [1 / images] * images, size=RESAMPLES)
        shares = torch.from_numpy(drawn * rows["tokens"]).double()
        curves = torch.from_numpy(rows["curves"]).double()
        return shares @ curves / shares.sum(dim=1, keepdim=True)

    def _refuse_empty(self) -> None:
        if not self.tokens:
            raise ValueError("TokenPattern: no token with energy was seen")


def _crossings(curves: Tensor, levels: tuple[float, ...]) -> Tensor:
    """Interpolate where curves [..., F] cross each level, as fractions of F: [..., levels]."""
    start = torch.cat([torch.zeros_like(curves[..., :1]), curves], dim=-1)
    wanted = (curves.new_tensor(levels) - TIE_TOLERANCE).expand(*curves.shape[:-1], -1).contiguous()
    after = torch.searchsorted(start.contiguous(), wanted).clamp(1, curves.shape[-1])
    low, high = start.gather(-1, after - 1), start.gather(-1, after)
    part = (wanted - low) / (high - low).clamp_min(torch.finfo(curves.dtype).tiny)
    return (after - 1 + part.clamp(0, 1)) / curves.shape[-1]
