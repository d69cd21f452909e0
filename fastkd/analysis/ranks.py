r"""Ranks of features: how many dimensions one image needs, and how many all of them share.

The two views of arXiv 2511.15572 ("From Per-Image Low-Rank to Encoding Mismatch"). For an image's
tokens X [N, D], neither centred nor normalised, with singular values :math:`s_1 \ge s_2 \ge \dots`:

- per-image rank@q: the smallest k with :math:`\sum_{i \le k} s_i^2 \ge q \sum_i s_i^2`
  (`ImageRank`): the dimensions needed in the best basis for that image alone;
- data-set rank@q: the smallest d with :math:`\|X V_d\|_F^2 \ge q \|X\|_F^2` (`DatasetRank`), V the
  eigenvectors of the second moment of all images' tokens (`SecondMoment`): the dimensions needed in
  the basis that all images share. It takes a second pass over the data.

Accumulators take batches with ``update``, join those of other processes with ``merge``, and keep
histograms of ranks, so their size does not grow with the number of images and their result does not
depend on the order. Everything is computed in float64 on the tokens' device: where one direction
carries nearly all energy, squares in float32 lose the rest. An image without energy, or with a NaN
or an infinity, has no rank; such images are left out and counted. Knows nothing of models.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

LEVELS = (0.80, 0.90, 0.95, 0.99)

# k equal energies reach q = k / n exactly, but their rounded sum may stay a hair below it.
_TIE = 1e-12


def image_energies(tokens: Tensor) -> Tensor:
    """Squared singular values of every image's token matrix.

    Eigenvalues of the smaller Gram matrix, in float64; what rounding made negative is set to 0.
    Allocates the tokens in float64 and [B, K, K], K = min(N, D); synchronises on CUDA.

    Args:
        tokens: [B, N, D] in any float dtype, all finite.

    Returns:
        [B, K] float64, descending.

    Raises:
        ValueError: tokens are no [B, N, D], or have no token or channel.
        TypeError: they are not floating-point.
    """
    _check_tokens("image_energies", tokens)
    x = tokens.detach().double()
    gram = x @ x.mT if x.shape[1] <= x.shape[2] else x.mT @ x
    return torch.linalg.eigvalsh(gram).clamp_min(0).flip(-1)


def captured_energy(tokens: Tensor, basis: Tensor) -> Tensor:
    """Part of every image's energy that lies in the first d directions of a shared basis.

    ||X V_d||_F^2 / ||X||_F^2 for d = 1..K. Allocates the tokens and [B, N, K] in float64.

    Args:
        tokens: [B, N, D] in any float dtype.
        basis: [D, K], orthonormal columns, the most important first (`SharedBasis.vectors`).

    Returns:
        [B, K] float64, non-decreasing along K; 0 for an image without energy.

    Raises:
        ValueError: shapes that do not fit.
        TypeError: tokens are not floating-point.
    """
    _check_tokens("captured_energy", tokens)
    if basis.ndim != 2 or basis.shape[0] != tokens.shape[2]:
        raise ValueError(
            f"captured_energy: basis must be [{tokens.shape[2]}, K] for tokens "
            f"{list(tokens.shape)}, got {list(basis.shape)} (a basis of another layer?)"
        )
    x = tokens.detach().double()
    captured = (x @ basis.to(x)).square().sum(dim=1).cumsum(dim=-1)
    total = x.square().sum(dim=(1, 2)).unsqueeze(-1)
    return torch.where(total > 0, captured / total, 0.0)


def rank_at(curve: Tensor, levels: Sequence[float] = LEVELS) -> Tensor:
    """First position at which a cumulated curve reaches each level.

    Args:
        curve: [..., K], non-decreasing along K: cumulated energy over total energy.
        levels: parts of the energy, in (0, 1]; met to one part in 1e12.

    Returns:
        [..., len(levels)] int64, counted from 1; K + 1 where a level is never reached.

    Raises:
        ValueError: a level outside (0, 1].
    """
    _check_levels("rank_at", levels)
    wanted = torch.tensor(list(levels), dtype=curve.dtype, device=curve.device) * (1 - _TIE)
    return (curve.unsqueeze(-2) < wanted.unsqueeze(-1)).sum(dim=-1) + 1


@dataclass(frozen=True)
class RankStatistics:
    """Distribution of one rank over images.

    Attributes:
        mean: over images.
        std: population standard deviation over images.
        lower_quartile: 25th percentile; percentiles interpolate linearly, as numpy's.
        median: 50th percentile.
        upper_quartile: 75th percentile.
        percentile_99: 99 % of the images need at most this many dimensions (what the paper's tables
            print).
    """

    mean: float
    std: float
    lower_quartile: float
    median: float
    upper_quartile: float
    percentile_99: float


@dataclass(frozen=True)
class RankSummary:
    """Ranks of a set of images.

    Attributes:
        images: how many were measured.
        without_energy: images left out because all their tokens are zero.
        non_finite: images left out because of a NaN or an infinity.
        largest_possible: min(N, D) for per-image ranks, D for data-set ranks.
        statistics: level -> distribution of rank@level.
        histograms: level -> number of images by rank, [largest_possible + 1] int64.
    """

    images: int
    without_energy: int
    non_finite: int
    largest_possible: int
    statistics: dict[float, RankStatistics]
    histograms: dict[float, np.ndarray]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; levels become strings such as ``"0.99"``."""
        return {
            "images": self.images,
            "without_energy": self.without_energy,
            "non_finite": self.non_finite,
            "largest_possible": self.largest_possible,
            "statistics": {f"{level:g}": asdict(s) for level, s in self.statistics.items()},
            "histograms": {f"{level:g}": h.tolist() for level, h in self.histograms.items()},
        }


class _RankAccumulator(ABC):
    """Histograms of rank@level over images; subclasses say which curve the ranks are read from."""

    def __init__(self, levels: Sequence[float] = LEVELS) -> None:
        _check_levels(type(self).__name__, levels)
        self.levels = tuple(levels)
        self.without_energy = 0
        self.non_finite = 0
        self._counts = torch.zeros(len(self.levels), 1, dtype=torch.int64)

    @abstractmethod
    def _curves(self, tokens: Tensor) -> Tensor:
        """Cumulated energy of every image, [B, K]; the last value is its total or 1, 0 if none."""

    def update(self, tokens: Tensor) -> None:
        """Measure a batch; synchronises with an accelerator.

        Args:
            tokens: [B, N, D] in any float dtype, prefix tokens already dropped.

        Raises:
            ValueError: another shape.
            TypeError: tokens are not floating-point.
        """
        tokens, dropped = _finite_images(type(self).__name__, tokens)
        self.non_finite += dropped
        if len(tokens) == 0:
            return
        curves = self._curves(tokens)
        has_energy = curves[:, -1] > 0
        self.without_energy += int((~has_energy).sum())
        ranks = rank_at(curves[has_energy], self.levels).clamp_max(curves.shape[1]).cpu()
        self._add(torch.stack([_histogram(column, curves.shape[1]) for column in ranks.T]))

    def merge(self, other: _RankAccumulator) -> None:
        """Add what another accumulator has seen.

        Args:
            other: of the same class, with the same levels.

        Raises:
            ValueError: it is not.
        """
        if type(other) is not type(self) or other.levels != self.levels:
            raise ValueError(
                f"{type(self).__name__}.merge: other must be a {type(self).__name__} with levels "
                f"{self.levels}, got a {type(other).__name__} with {other.levels}"
            )
        self.without_energy += other.without_energy
        self.non_finite += other.non_finite
        self._add(other._counts)

    def result(self) -> RankSummary:
        """Summarise what was seen so far.

        Returns:
            The distribution of every rank.

        Raises:
            ValueError: no image with energy was seen.
        """
        images = int(self._counts[0].sum())
        if images == 0:
            raise ValueError(
                f"{type(self).__name__}.result: no image to summarise ({self.without_energy} "
                f"without energy, {self.non_finite} not finite)"
            )
        histograms = dict(zip(self.levels, self._counts.numpy().copy(), strict=True))
        return RankSummary(
            images=images,
            without_energy=self.without_energy,
            non_finite=self.non_finite,
            largest_possible=self._counts.shape[1] - 1,
            statistics={level: _statistics(counts) for level, counts in histograms.items()},
            histograms=histograms,
        )

    def _add(self, counts: Tensor) -> None:
        """Add histograms of any length: images of another size have other largest ranks."""
        short, long = sorted((self._counts, counts), key=lambda table: table.shape[1])
        self._counts = long.clone()
        self._counts[:, : short.shape[1]] += short


class ImageRank(_RankAccumulator):
    """Per-image rank@q: dimensions that each image needs in its own best basis.

    Args:
        levels: parts of the energy, in (0, 1].

    Raises:
        ValueError: a level outside (0, 1].
    """

    def _curves(self, tokens: Tensor) -> Tensor:
        energies = image_energies(tokens).cumsum(dim=-1)
        total = energies[:, -1:]
        return torch.where(total > 0, energies / total, 0.0)


class DatasetRank(_RankAccumulator):
    """Data-set rank@q: dimensions that each image needs in the basis that all images share.

    Args:
        basis: [D, D], orthonormal columns, the most important first: ``vectors`` of
            `SecondMoment.result` over the same images.
        levels: parts of the energy, in (0, 1].

    Raises:
        ValueError: the basis is not square, or a level is outside (0, 1].
    """

    def __init__(self, basis: Tensor, levels: Sequence[float] = LEVELS) -> None:
        super().__init__(levels)
        if basis.ndim != 2 or basis.shape[0] != basis.shape[1]:
            raise ValueError(
                f"DatasetRank: basis must be [D, D], all directions, got {list(basis.shape)}"
            )
        self.basis = basis

    def merge(self, other: _RankAccumulator) -> None:
        """Add what another accumulator has seen in the same basis.

        Args:
            other: a `DatasetRank` of the same basis and levels.

        Raises:
            ValueError: it is not.
        """
        if isinstance(other, DatasetRank) and not torch.equal(self.basis.cpu(), other.basis.cpu()):
            raise ValueError("DatasetRank.merge: other was measured in another basis")
        super().merge(other)

    def _curves(self, tokens: Tensor) -> Tensor:
        return captured_energy(tokens, self.basis)


@dataclass(frozen=True)
class SharedBasis:
    """Spectrum of a data set's tokens.

    Attributes:
        vectors: [D, D] float64, orthonormal eigenvectors of the second moment as columns.
        energies: [D] float64, its eigenvalues, descending: mean energy per token and direction.
        tokens: how many tokens it was measured on.
        non_finite: images left out because of a NaN or an infinity.
    """

    vectors: Tensor
    energies: Tensor
    tokens: int
    non_finite: int


class SecondMoment:
    """Second moment C = (1 / tokens) sum_i X_i^T X_i of all tokens, uncentred, in float64.

    The first pass of the data-set view; [D, D] is kept on the device of the first batch.
    """

    def __init__(self) -> None:
        self.tokens = 0
        self.non_finite = 0
        self._sum: Tensor | None = None

    def update(self, tokens: Tensor) -> None:
        """Add a batch; an image with a NaN or an infinity is left out and counted.

        Args:
            tokens: [B, N, D] in any float dtype, prefix tokens already dropped.

        Raises:
            ValueError: another shape, or another D than before.
            TypeError: tokens are not floating-point.
        """
        tokens, dropped = _finite_images("SecondMoment", tokens)
        rows = tokens.double().flatten(0, 1)
        self._add(rows.mT @ rows, len(rows), dropped)

    def merge(self, other: SecondMoment) -> None:
        """Add what another accumulator has seen.

        Args:
            other: of tokens with as many channels.

        Raises:
            ValueError: it has seen another D.
        """
        if other._sum is not None:
            self._add(other._sum, other.tokens, other.non_finite)

    def result(self) -> SharedBasis:
        """Decompose what was seen so far.

        Returns:
            The basis that all images share.

        Raises:
            ValueError: no token was seen.
        """
        if self._sum is None or self.tokens == 0:
            raise ValueError(
                f"SecondMoment.result: no token was seen ({self.non_finite} images not finite)"
            )
        energies, vectors = torch.linalg.eigh(self._sum / self.tokens)
        return SharedBasis(
            vectors.flip(-1), energies.clamp_min(0).flip(-1), self.tokens, self.non_finite
        )

    def _add(self, moment: Tensor, tokens: int, non_finite: int) -> None:
        if self._sum is None:
            self._sum = torch.zeros_like(moment)
        if moment.shape != self._sum.shape:
            raise ValueError(
                f"SecondMoment: tokens must have {len(self._sum)} channels as before, got "
                f"{len(moment)}"
            )
        self._sum += moment.to(self._sum.device)
        self.tokens += tokens
        self.non_finite += non_finite


def _finite_images(caller: str, tokens: Tensor) -> tuple[Tensor, int]:
    """The images without NaN and infinity, and how many others there were."""
    _check_tokens(caller, tokens)
    tokens = tokens.detach()
    finite = tokens.isfinite().all(dim=-1).all(dim=-1)
    return tokens[finite], int((~finite).sum())


def _histogram(ranks: Tensor, largest: int) -> Tensor:
    return torch.bincount(ranks, minlength=largest + 1)


def _statistics(counts: np.ndarray) -> RankStatistics:
    ranks = np.repeat(np.arange(len(counts)), counts)
    lower, median, upper, tail = np.percentile(ranks, [25, 50, 75, 99]).tolist()
    return RankStatistics(float(ranks.mean()), float(ranks.std()), lower, median, upper, tail)


def _check_tokens(caller: str, tokens: Tensor) -> None:
    if tokens.ndim != 3 or 0 in tokens.shape[1:]:
        raise ValueError(
            f"{caller}: tokens must be [B, N, D] with N and D at least 1, got "
            f"{list(tokens.shape)} (one image needs its batch dimension)"
        )
    if not tokens.is_floating_point():
        raise TypeError(f"{caller}: tokens must be floating-point, got {tokens.dtype}")


def _check_levels(caller: str, levels: Sequence[float]) -> None:
    if len(levels) == 0 or not all(0 < level <= 1 for level in levels):
        raise ValueError(f"{caller}: levels must lie in (0, 1], got {tuple(levels)}")
