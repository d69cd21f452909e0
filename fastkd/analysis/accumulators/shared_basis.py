"""The basis that all images share, and each image in it: two passes of the data-set view."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastkd.analysis.accumulators import Accumulator, Rows, only
from fastkd.analysis.results import Curve, Ranks, SharedView, Subspaces
from fastkd.ops.checks import exact_float32, levels_of
from fastkd.ops.second_moment import second_moment
from fastkd.ops.spectrum import LEVELS, energy_curve, overlap, principal_angles, rank_at, subspace

SUBSPACES = (1, 4, 16, 64)
RANDOM_SAMPLES = 64  # pairs of random subspaces whose angles are averaged


@dataclass(frozen=True)
class SharedBasis:
    """Spectrum of a dataset's tokens.

    Attributes:
        vectors: [D, D] float64, eigenvectors of the second moment as columns, by falling energy.
        energies: [D] float64, its eigenvalues, descending: mean energy per token and direction.
        mean: [D] float64, the mean token, if the moment is centered; else None.
        tokens: number of tokens that it was measured on.
        non_finite: images left out for a NaN, an infinity or too large a norm.
    """

    vectors: Tensor
    energies: Tensor
    mean: Tensor | None
    tokens: int
    non_finite: int


class SecondMoment(Accumulator):
    """Second moment C = (1 / tokens) sum_i X_i^T X_i of all tokens, in float64.

    Args:
        centered: subtract the outer product of the mean token, which makes C the covariance. The
            paper does not.
    """

    def __init__(self, centered: bool = False) -> None:
        super().__init__()
        self.centered = centered

    def options(self) -> dict[str, Any]:
        return {"centered": self.centered}

    def update(self, tokens: Tensor, places: Sequence[int] | None = None) -> None:
        tokens, finite = self._checked(tokens)
        count = finite.sum() * tokens.shape[1]
        self._add("tokens", count)
        self._add("non_finite", (~finite).sum())
        if not self.centered:
            self._add("moment", second_moment(tokens))
            return
        moment, total = _sums_around_the_mean(tokens, finite, count)
        self._add("moment", moment)
        self._add("total", total)

    def result(self) -> SharedBasis:
        moment, mean = self._mean()
        energies, vectors = torch.linalg.eigh(moment)
        return SharedBasis(
            vectors=vectors.flip(-1),
            energies=energies.clamp_min(0).flip(-1),
            mean=mean,
            tokens=self.tokens,
            non_finite=int(self.sums["non_finite"]),
        )

    def energies(self) -> Tensor:
        """Compute `SharedBasis.energies` alone, in a fraction of the time of `result`.

        Returns:
            [D] float64, descending.

        Raises:
            ValueError: no token was seen.
        """
        return torch.linalg.eigvalsh(self._mean()[0]).clamp_min(0).flip(-1)

    def _mean(self) -> tuple[Tensor, Tensor | None]:
        """Return the second moment per token and, if centered, the mean token."""
        tokens = self.tokens
        if tokens == 0:
            bad = int(self.sums.get("non_finite", 0))
            raise ValueError(f"SecondMoment: no token was seen ({bad} images not finite)")
        moment = self.sums["moment"] / tokens
        if not self.centered:
            return moment, None
        mean = self.sums["total"] / tokens
        return moment - mean.outer(mean), mean


class InSharedBasis(Accumulator):
    r"""Captured energy of every image in a shared basis, and the rotation of its own directions.

    With V the basis, an image X has \|X V_d\|_F^2 / \|X\|_F^2 of its energy in the first d shared
    directions (arXiv 2511.15572). Its own top-k subspace is compared with the shared one, and with
    another image's: images 2 t and 2 t + 1 form a pair, so give places in a random order.

    Args:
        basis: from `SecondMoment` over the same images; if it is centered, its mean is subtracted
            from every token here, too.
        levels: fractions of the energy, in (0, 1].
        subspaces: dimensions k at which subspaces are compared; those above min(N, D) are left out.

    Raises:
        ValueError: a level outside (0, 1], or a k below 1.
    """

    def __init__(
        self,
        basis: SharedBasis,
        levels: Sequence[float] = LEVELS,
        subspaces: Sequence[int] = SUBSPACES,
    ) -> None:
        super().__init__()
        if any(k < 1 for k in subspaces):
            raise ValueError(f"InSharedBasis: subspaces must be >= 1, got {tuple(subspaces)}")
        self.basis = basis
        self.levels = levels_of("InSharedBasis", levels, "levels")
        self.subspaces = tuple(sorted(set(subspaces)))
        self.pairs = Rows()
        self._waiting: dict[int, Tensor] = {}

    def options(self) -> dict[str, Any]:
        energies = self.basis.energies
        return {
            "levels": self.levels,
            "subspaces": self.subspaces,
            "basis": (len(energies), float(energies.sum()), self.basis.tokens),
        }

    def merge(self, other: Accumulator) -> None:
        super().merge(other)
        assert isinstance(other, InSharedBasis)
        self.pairs.merge(other.pairs)
        for place, vectors in other._waiting.items():
            self._compare_pairs([place], vectors[None])

    def state(self) -> dict[str, Any]:
        waiting = {place: vectors.cpu() for place, vectors in self._waiting.items()}
        return super().state() | {"pairs": self.pairs.state(), "waiting": waiting}

    def restore(self, state: dict[str, Any]) -> None:
        super().restore(state)
        self.pairs = Rows.of(state["pairs"])
        self._waiting = dict(state["waiting"])

    def update(self, tokens: Tensor, places: Sequence[int] | None = None) -> None:
        self._check_channels(len(self.basis.energies))
        tokens, finite = self._checked(tokens)
        if self.basis.mean is not None:
            wide = tokens.to(torch.promote_types(tokens.dtype, torch.float32))
            tokens = only(finite, wide - self.basis.mean.to(wide))
        energies = captured_energies(tokens, self.basis.vectors)
        where = self._places(places, tokens)
        columns = {"ranks": rank_at(energies, self.levels).int(), "curves": energy_curve(energies)}
        if self._sizes():
            own = subspace(tokens, min(self._sizes()[-1], *tokens.shape[1:]))
            self._compare_pairs(where.tolist(), own)
            shared = self.basis.vectors.to(own.device)
            columns |= self._compare("shared", own, shared.expand(len(own), -1, -1))
        self.rows.add(where, **columns)

    def _sizes(self) -> list[int]:
        return [k for k in self.subspaces if k <= len(self.basis.energies)]

    def _compare_pairs(self, places: list[int], own: Tensor) -> None:
        """Compare images whose partners have come; keep the subspaces of the others."""
        met = []
        for place, vectors in zip(places, own, strict=True):
            partner = self._waiting.pop(place ^ 1, None)
            if partner is None:
                self._waiting[place] = vectors.clone()  # not a view that keeps the whole batch
            else:
                met.append((place // 2, vectors, partner.to(vectors.device)))
        if not met:
            return
        numbers, ours, theirs = zip(*met, strict=True)
        depth = min(vectors.shape[1] for vectors in (*ours, *theirs))
        first, second = (torch.stack([v[:, :depth] for v in side]) for side in (ours, theirs))
        self.pairs.add(torch.tensor(numbers), **self._compare("pairs", first, second))

    def _compare(self, what: str, a: Tensor, b: Tensor) -> dict[str, Tensor]:
        """Return overlaps of subspaces [B, D, depth] at every k; add their angles to the sums."""
        columns = {}
        for k in self._sizes():
            if k > min(a.shape[-1], b.shape[-1]):
                columns[f"overlap_{k}"] = torch.full((len(a),), torch.nan, device=a.device)
                continue
            ours, theirs = a[..., :k], b[..., :k]
            # `subspace` pads with zeros: NaN where the k-th column is no direction.
            full = (ours[..., -1].square().sum(-1) > 0.5) & (theirs[..., -1].square().sum(-1) > 0.5)
            columns[f"overlap_{k}"] = torch.where(full, overlap(ours, theirs), torch.nan).float()
            angles = torch.where(full.unsqueeze(-1), principal_angles(ours, theirs), 0.0)
            self._add(f"{what}_angles_{k}", angles.sum(dim=0))
            self._add(f"{what}_compared_{k}", full.sum())
        return columns

    def result(self) -> SharedView:
        rows, pairs = self.rows.sorted(), self.pairs.sorted()
        if not rows:
            raise ValueError("InSharedBasis.result: no image was seen")
        curves, ranks = rows["curves"], rows["ranks"]
        known = curves[ranks[:, 0] > 0].astype(np.float64)
        if len(known) == 0:  # no image has a rank
            known = np.full((1, curves.shape[1]), np.nan)
        return SharedView(
            ranks=Ranks(self.levels, ranks, largest=curves.shape[1]),
            curves=curves,
            curve=Curve(known.mean(axis=0), known.std(axis=0)),
            rotation=[
                self._subspaces(k, rows, pairs)
                for k in self._sizes()
                if f"shared_angles_{k}" in self.sums
            ],
        )

    def _subspaces(
        self, k: int, rows: dict[str, np.ndarray], pairs: dict[str, np.ndarray]
    ) -> Subspaces:
        channels = len(self.basis.energies)
        nothing = np.empty(0, dtype=np.float32)
        return Subspaces(
            k=k,
            overlap_shared=rows[f"overlap_{k}"],
            overlap_pairs=pairs.get(f"overlap_{k}", nothing),
            angles_shared=self._mean_angles("shared", k),
            angles_pairs=self._mean_angles("pairs", k),
            overlap_random=k / channels,
            angles_random=random_angles(channels, k),
        )

    def _mean_angles(self, what: str, k: int) -> np.ndarray:
        if f"{what}_angles_{k}" not in self.sums:
            return np.full(k, np.nan)
        mean = self.sums[f"{what}_angles_{k}"] / self.sums[f"{what}_compared_{k}"]
        return mean.rad2deg().cpu().numpy()


def captured_energies(tokens: Tensor, vectors: Tensor) -> Tensor:
    r"""Energy of every image along each direction of a shared basis: \|X v_d\|^2.

    Read ranks and curves from it with `fastkd.ops.rank_at` and `fastkd.ops.energy_curve`. Products
    do not use TensorFloat-32; allocates [B, N, K].

    Args:
        tokens: [B, N, D] in any float dtype.
        vectors: [D, K], orthonormal columns, the most important first.

    Returns:
        [B, K] float32, or float64 for float64 tokens.

    Raises:
        ValueError: shapes do not match.
    """
    if vectors.ndim != 2 or vectors.shape[0] != tokens.shape[-1]:
        raise ValueError(
            f"captured_energies: vectors must be [{tokens.shape[-1]}, K] for tokens "
            f"{list(tokens.shape)}, got {list(vectors.shape)} (a basis of another layer?)"
        )
    dtype = torch.float64 if tokens.dtype == torch.float64 else torch.float32
    with torch.autocast(tokens.device.type, enabled=False), exact_float32():
        return (tokens.to(dtype) @ vectors.to(tokens.device, dtype)).square().sum(dim=1)


def random_angles(
    channels: int, k: int, samples: int = RANDOM_SAMPLES, seed: int = 0
) -> np.ndarray:
    """Average principal angles of random k-dimensional subspaces, [k] in degrees, ascending."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(samples, channels, k, generator=generator, dtype=torch.float64)
    # Rotating both subspaces changes no angle, so one of them may lie along the axes.
    cosines = torch.linalg.svdvals(torch.linalg.qr(noise).Q[:, :k])
    return (cosines.clamp(0, 1).arccos().mean(dim=0) * (180 / math.pi)).numpy()


def _sums_around_the_mean(tokens: Tensor, finite: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
    """Sum x x^T and x over a batch, exactly even beside a large mean."""
    dtype = torch.promote_types(tokens.dtype, torch.float32)
    mean = (tokens.sum(dim=(0, 1), dtype=torch.float64) / count.clamp_min(1)).to(dtype)
    # Squares of a large mean would use up float32's digits: multiply a = x - c, with c the batch's
    # mean, and use sum x x^T = sum a a^T + c A^T + A c^T + n c c^T, where A = sum a.
    around = only(finite, tokens.to(dtype) - mean)
    center, rest = mean.double(), around.sum(dim=(0, 1), dtype=torch.float64)
    crossed = center.outer(rest)
    products = second_moment(around) + crossed + crossed.mT + count * center.outer(center)
    return products, rest + count * center
