"""The data set's view of its tokens: their second moment, and the basis that all images share.

The first pass of the second view of arXiv 2511.15572; shared_basis.py is the second pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastkd.analysis.accumulators.base import TokenAccumulator, only
from fastkd.ops.second_moment import second_moment


@dataclass(frozen=True)
class SharedBasis:
    """Spectrum of a data set's tokens.

    Attributes:
        vectors: [D, D] float64, orthonormal eigenvectors of the second moment as columns, those of
            the largest eigenvalues first.
        energies: [D] float64, its eigenvalues, descending: mean energy per token and direction.
        mean: [D] float64, the mean token, where the moment is centred; else None.
        tokens: how many tokens it was measured on.
        non_finite: images left out because of a NaN or an infinity.
    """

    vectors: Tensor
    energies: Tensor
    mean: Tensor | None
    tokens: int
    non_finite: int


class SecondMoment(TokenAccumulator):
    """Second moment C = (1 / tokens) sum_i X_i^T X_i of all tokens, in float64.

    Args:
        centred: subtract the outer product of the mean token: C is then the covariance. The paper's
            is not centred.
    """

    def __init__(self, centred: bool = False) -> None:
        super().__init__()
        self.centred = centred

    def options(self) -> dict[str, Any]:
        """Whether it is centred."""
        return {"centred": self.centred}

    def update(self, tokens: Tensor, places: Sequence[int] | None = None) -> None:
        """Add a batch; an image with a NaN or an infinity is left out and counted.

        Args:
            tokens: [B, N, D] in any float dtype, prefix tokens already dropped.
            places: not needed here; taken so that all accumulators are called alike.

        Raises:
            ValueError: another shape, or another D than before.
            TypeError: tokens are not floating-point.
        """
        tokens, finite = self._checked(tokens)
        count = finite.sum() * tokens.shape[1]
        self._add("tokens", count)
        self._add("non_finite", (~finite).sum())
        if not self.centred:
            self._add("moment", second_moment(tokens))
            return
        moment, total = _sums_around_the_mean(tokens, finite, count)
        self._add("moment", moment)
        self._add("total", total)

    def result(self) -> SharedBasis:
        """Decompose what was seen so far; waits for the device.

        Returns:
            The basis that all images share, on the device of the tokens.

        Raises:
            ValueError: no token was seen.
        """
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
        """`SharedBasis.energies` alone, which takes a fraction of the time of the whole basis.

        Returns:
            [D] float64, descending.

        Raises:
            ValueError: no token was seen.
        """
        return torch.linalg.eigvalsh(self._mean()[0]).clamp_min(0).flip(-1)

    def _mean(self) -> tuple[Tensor, Tensor | None]:
        """Second moment per token, and the mean token where it is centred."""
        tokens = self.tokens
        if tokens == 0:
            bad = int(self.sums.get("non_finite", 0))
            raise ValueError(f"SecondMoment: no token was seen ({bad} images not finite)")
        moment = self.sums["moment"] / tokens
        if not self.centred:
            return moment, None
        mean = self.sums["total"] / tokens
        return moment - mean.outer(mean), mean


def _sums_around_the_mean(tokens: Tensor, finite: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
    """Sums of x x^T and of x over a batch, for a covariance: exact beside a large mean.

    Products are taken of a = x - c, with c the batch's mean: of the squares of a large mean,
    float32 would leave nothing for the rest. Then sum x x^T = sum a a^T + c A^T + A c^T + n c c^T.
    """
    dtype = torch.promote_types(tokens.dtype, torch.float32)
    mean = (tokens.sum(dim=(0, 1), dtype=torch.float64) / count.clamp_min(1)).to(dtype)
    around = only(finite, tokens.to(dtype) - mean)
    centre, rest = mean.double(), around.sum(dim=(0, 1), dtype=torch.float64)
    crossed = centre.outer(rest)
    products = second_moment(around) + crossed + crossed.mT + count * centre.outer(centre)
    return products, rest + count * centre
