"""VkD's distance to the normalized teacher, and the whitening of tokens."""

from __future__ import annotations

from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from fastkd.losses.base import POSITIVE, Distance, Grid, check_choice, check_numbers
from fastkd.losses.feature import MapDistance
from fastkd.ops.checks import at_least_float32, in_float64, wide_dtype

Normalization = Literal["standardize", "whiten", "none"]
VectorLoss = Literal["smooth_l1", "mse"]
WHITENING_EPS = 1e-6


class VkD(Distance):
    r"""Distance to the normalized teacher (VkD, arXiv 2403.06213).

    .. math:: L = \frac{1}{B D} \sum_{b,d} \mathrm{huber}_\beta (s_{bd} - \nu(t)_{bd})

    with s and t the tokens' mean per image (``pool=False``: each of the B N tokens). The
    normalization :math:`\nu` removes the teacher's scale, which the projector ``"orthogonal"``
    cannot. The defaults are those of the authors' code for DeiT, which has no whitening.

    Args:
        normalize: ``"standardize"``, a LayerNorm without weights (for classification);
            ``"whiten"``, decorrelated channels over one process's batch (for generative tasks); or
            ``"none"``.
        distance: ``"smooth_l1"`` or ``"mse"``.
        beta: threshold of ``"smooth_l1"``, 1 by default.
        pool: average an image's tokens first; ``"whiten"`` needs more vectors than channels.
        eps: of the whitening, > 0, 1e-6 by default.

    Raises:
        ValueError: an ``eps`` without ``"whiten"``.
    """

    takes_embeddings = True

    def __init__(
        self,
        normalize: Normalization = "standardize",
        distance: VectorLoss = "smooth_l1",
        beta: float | None = None,
        pool: bool = True,
        eps: float | None = None,
    ) -> None:
        super().__init__()
        check_choice(self, "normalize", normalize, get_args(Normalization))
        check_choice(self, "distance", distance, get_args(VectorLoss))
        if eps is not None and normalize != "whiten":
            raise ValueError(f"VkD: eps is of 'whiten', got {eps=} with {normalize!r}")
        self.normalize: Normalization = normalize
        self.distance = MapDistance(distance, beta)
        self.pool = pool
        self.eps = WHITENING_EPS if eps is None else eps
        check_numbers(self, eps=(self.eps, POSITIVE))

    @property
    def pools_first(self) -> bool:
        return self.pool

    def compare(self, student: Tensor, teacher: Tensor, grid: Grid | None) -> Tensor:
        if self.pool:
            student, teacher = (
                x.mean(1, keepdim=True, dtype=wide_dtype(x)) for x in (student, teacher)
            )
        if self.normalize == "standardize":
            teacher = F.layer_norm(at_least_float32(teacher), teacher.shape[-1:])
        elif self.normalize == "whiten":
            teacher = whiten(teacher, self.eps)
        return self.distance(student, teacher)


def whiten(tokens: Tensor, eps: float = WHITENING_EPS) -> Tensor:
    r"""Give tokens [..., D] channels of mean 0 and variance 1 without correlation, over all tokens.

    .. math:: y = L^{-1} (x - \mu), \quad L L^T = \Sigma + \varepsilon \, \bar\lambda I

    with :math:`\Sigma` the covariance and :math:`\bar\lambda` the mean of its eigenvalues. Computed
    in float64, slow on consumer GPUs. Below an eps of 1e-10 rounding can make all NaN.
    """
    # L is the Cholesky factor, as in the whitening that VkD's authors cite, arXiv 2007.06346. ZCA's
    # inverse root differs by a rotation, which a learned projector absorbs, and needs eigenvectors.
    vectors = in_float64(tokens).flatten(0, -2)
    # Subtracting the first token makes equal tokens exactly zero, without a rounded mean.
    vectors = vectors - vectors[:1]
    centered = vectors - vectors.mean(0)
    factor = _factor(centered.mT @ centered / len(centered), eps)
    whitened = torch.linalg.solve_triangular(factor, centered.mT, upper=False).mT
    return whitened.reshape(tokens.shape).to(wide_dtype(tokens)).to(tokens.device)


def _factor(covariance: Tensor, eps: float) -> Tensor:
    """Cholesky factor of a [D, D] covariance with a floor; NaN where it fails, without a sync."""
    floor = eps * covariance.diagonal().mean() + torch.finfo(covariance.dtype).tiny
    identity = torch.eye(len(covariance), dtype=covariance.dtype, device=covariance.device)
    factor, info = torch.linalg.cholesky_ex(covariance + floor * identity)
    return torch.where(info == 0, factor, torch.nan)
