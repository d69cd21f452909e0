r"""Images in the basis that all of them share, and how far each one turns away from it.

The second pass of the data-set view of arXiv 2511.15572: with V the eigenvectors of the second
moment of all tokens, an image X has \|X V_d\|_F^2 / \|X\|_F^2 of its energy in the first d shared
directions. Rotation compares its own top-k subspace with the shared one, and with another image's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastkd.analysis.accumulators.base import Accumulator, Rows, only
from fastkd.analysis.accumulators.second_moment import SharedBasis
from fastkd.analysis.results import Curve, Ranks, SharedView, Subspaces
from fastkd.ops.checks import exact_float32, levels_of
from fastkd.ops.spectrum import (
    LEVELS,
    energy_curve,
    overlap,
    principal_angles,
    rank_at,
    subspace,
)

SUBSPACES = (1, 4, 16, 64)
RANDOM_SAMPLES = 64  # pairs of random subspaces whose angles are averaged


class InSharedBasis(Accumulator):
    """Captured energy of every image in a shared basis, and the rotation of its own directions.

    Images 2 t and 2 t + 1 are compared with each other: give places in a random order. At most one
    subspace is kept between batches, and one for each image whose partner never comes.

    Args:
        basis: of `SecondMoment`, over the same images; where it is centred, its mean is subtracted
            from every token here too.
        levels: parts of the energy, in (0, 1].
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
        """Levels, dimensions, and a fingerprint of the basis."""
        energies = self.basis.energies
        return {
            "levels": self.levels,
            "subspaces": self.subspaces,
            "basis": (len(energies), float(energies.sum()), self.basis.tokens),
        }

    def merge(self, other: Accumulator) -> None:
        """Add what another accumulator has seen in the same basis.

        Args:
            other: an `InSharedBasis` of the same basis and options.

        Raises:
            ValueError: it is not.
        """
        super().merge(other)
        assert isinstance(other, InSharedBasis)
        self.pairs.merge(other.pairs)
        for place, vectors in other._waiting.items():
            self._compare_pairs([place], vectors[None])

    def state(self) -> dict[str, Any]:
        """As `Accumulator.state`, with the pairs."""
        waiting = {place: vectors.cpu() for place, vectors in self._waiting.items()}
        return super().state() | {"pairs": self.pairs.state(), "waiting": waiting}

    def restore(self, state: dict[str, Any]) -> None:
        """As `Accumulator.restore`, with the pairs.

        Args:
            state: of an accumulator of the same class and options.
        """
        super().restore(state)
        self.pairs = Rows.of(state["pairs"])
        self._waiting = dict(state["waiting"])

    def update(self, tokens: Tensor, places: Sequence[int] | None = None) -> None:
        """Measure a batch.

        Args:
            tokens: [B, N, D] in any float dtype, the D of the basis.
            places: the images' numbers; counted without.

        Raises:
            ValueError: another shape, or another D.
            TypeError: tokens are not floating-point.
        """
        self._check_channels(len(self.basis.energies))
        tokens, finite = self._checked(tokens)
        if self.basis.mean is not None:
            wide = tokens.to(torch.promote_types(tokens.dtype, torch.float32))
            tokens = only(finite, wide - self.basis.mean.to(wide))
        energies = captured_energies(tokens, self.basis.vectors)
        where = self._places(places, tokens)
        columns = {"ranks": rank_at(energies, self.levels).int(), "curves": energy_curve(energies)}
        self.rows.add(where, **columns, **self._rotation(tokens, where.tolist()))

    def _rotation(self, tokens: Tensor, places: list[int]) -> dict[str, Tensor]:
        """Overlaps with the shared subspaces, a column for each k; angles go to their sums."""
        if not self._sizes():
            return {}
        own = subspace(tokens, min(self._sizes()[-1], *tokens.shape[1:]))
        self._compare_pairs(places, own)
        shared = self.basis.vectors.to(own.device)
        return self._compare("shared", own, shared.expand(len(own), -1, -1))

    def _sizes(self) -> list[int]:
        return [k for k in self.subspaces if k <= len(self.basis.energies)]

    def _compare_pairs(self, places: list[int], own: Tensor) -> None:
        """Compare images whose partners are there; the others wait for theirs."""
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
        """Overlap of subspaces [B, D, depth] at every k, NaN where one has a rank below k."""
        columns = {}
        for k in self._sizes():
            if k > min(a.shape[-1], b.shape[-1]):
                columns[f"overlap_{k}"] = torch.full((len(a),), torch.nan, device=a.device)
                continue
            ours, theirs = a[..., :k], b[..., :k]
            full = _has_rank(ours) & _has_rank(theirs)
            columns[f"overlap_{k}"] = torch.where(full, overlap(ours, theirs), torch.nan).float()
            angles = torch.where(full.unsqueeze(-1), principal_angles(ours, theirs), 0.0)
            self._add(f"{what}_angles_{k}", angles.sum(dim=0))
            self._add(f"{what}_compared_{k}", full.sum())
        return columns

    def result(self) -> SharedView:
        """Summarise what was seen so far; waits for the device.

        Returns:
            Ranks, curves and rotation.

        Raises:
            ValueError: no image was seen.
        """
        rows, pairs = self.rows.sorted(), self.pairs.sorted()
        if not rows:
            raise ValueError("InSharedBasis.result: no image was seen")
        curves, ranks = rows["curves"], rows["ranks"]
        known = curves[ranks[:, 0] > 0].astype(np.float64)
        return SharedView(
            ranks=Ranks(self.levels, ranks, largest=curves.shape[1]),
            curves=curves,
            curve=_curve(known, curves.shape[1]),
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

    `fastkd.ops.rank_at` and `fastkd.ops.energy_curve` read ranks and curves off it. In float32
    (float64 for float64), products not in TensorFloat-32; allocates [B, N, K].

    Args:
        tokens: [B, N, D] in any float dtype.
        vectors: [D, K], orthonormal columns, the most important first.

    Returns:
        [B, K] float32, or float64 for float64 tokens.

    Raises:
        ValueError: shapes that do not fit.
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
    """Mean principal angles between random k-dimensional subspaces of R^channels.

    Args:
        channels: D.
        k: dimensions of both.
        samples: pairs that are averaged.
        seed: of the sampling.

    Returns:
        [k] float64, degrees, ascending.
    """
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(samples, channels, k, generator=generator, dtype=torch.float64)
    # Turning both subspaces alike changes no angle: one of them may lie along the axes.
    cosines = torch.linalg.svdvals(torch.linalg.qr(noise).Q[:, :k])
    angles = cosines.clamp(0, 1).arccos().mean(dim=0) * (180 / math.pi)
    return angles.numpy()


def _has_rank(vectors: Tensor) -> Tensor:
    """Whether the last of the columns is a direction: `subspace` fills up with zeros."""
    return vectors[..., -1].square().sum(dim=-1) > 0.5


def _curve(curves: np.ndarray, length: int) -> Curve:
    if len(curves) == 0:
        return Curve(np.full(length, np.nan), np.full(length, np.nan))
    return Curve(curves.mean(axis=0), curves.std(axis=0))
