"""VkD's distance: the student, as it is, to the normalised teacher.

Knows tensors only. Made to follow `fastkd.losses.projectors.orthogonal_projector`, which changes
neither lengths nor angles, so that the teacher's scale has to be taken out here.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastkd.losses.base import Distance, Grid, MapDistance, check_choice
from fastkd.losses.softening import check_positive
from fastkd.ops.checks import in_float64

NORMALIZATIONS = ("standardize", "whiten", "none")
DISTANCES = ("smooth_l1", "mse")
WHITENING_EPS = 1e-6


class VkD(Distance):
    r"""Distance to the normalised teacher (VkD, arXiv 2403.06213).

    .. math:: L = \frac{1}{B D} \sum_{b,d} \mathrm{huber}_\beta (s_{bd} - \nu(t)_{bd})

    with s and t the tokens' mean per image (``pool=False``: each of the B N tokens), and the mean
    over all elements. The normalisation :math:`\nu` is of the teacher only, and one of

    - ``"standardize"``: each vector over its channels, a LayerNorm without weights (eps 1e-5); the
      authors' choice for classification;
    - ``"whiten"``: `whiten`, decorrelated channels; the paper's choice for generative tasks;
    - ``"none"``.

    The defaults are what the authors' code runs for DeiT, where the term has weight 1: pooled,
    standardised, smooth L1. That code leaves out the whitening, and its detector differs: there
    each channel is standardised over the tokens of the batch, on both sides.

    Statistics of ``"whiten"`` are of one process's slice of the batch.

    Args:
        normalize: one of the three.
        distance: ``"smooth_l1"`` or ``"mse"``.
        beta: the threshold of ``"smooth_l1"``, 1 if omitted.
        pool: average the tokens of an image first. ``"whiten"`` is better off without: it wants
            more vectors than channels.
        eps: of `whiten`, 1e-6 if omitted.

    Raises:
        ValueError: an unknown or misplaced option, or an ``eps`` that is not positive.
    """

    takes_embeddings = True

    def __init__(
        self,
        normalize: str = "standardize",
        distance: str = "smooth_l1",
        beta: float | None = None,
        pool: bool = True,
        eps: float | None = None,
    ) -> None:
        super().__init__()
        check_choice(self, "normalize", normalize, NORMALIZATIONS)
        check_choice(self, "distance", distance, DISTANCES)
        if eps is not None and normalize != "whiten":
            raise ValueError(f"VkD: eps is of 'whiten', got eps={eps} with {normalize!r}")
        if eps is not None:
            check_positive(self, "eps", eps)
        self.normalize = normalize
        self.distance = MapDistance(distance, beta)
        self.pool = pool
        self.eps = WHITENING_EPS if eps is None else eps

    @property
    def pools_first(self) -> bool:
        """Whether nothing of an image but its mean token counts.

        The mean commutes with affine maps: a Linear projector may follow it, at a share of the
        work and without the projected map.
        """
        return self.pool

    def compare(self, student: Tensor, teacher: Tensor, grid: Grid | None) -> Tensor:
        """The distance itself, of [B, N, D] tokens."""
        if self.pool:
            student, teacher = _mean_token(student), _mean_token(teacher)
        return self.distance(student, self._normalized(teacher))

    def _normalized(self, teacher: Tensor) -> Tensor:
        if self.normalize == "standardize":
            # Statistics of half precision tokens, kept in float32.
            wide = teacher.to(torch.promote_types(teacher.dtype, torch.float32))
            return F.layer_norm(wide, wide.shape[-1:])
        return whiten(teacher, self.eps) if self.normalize == "whiten" else teacher

    def extra_repr(self) -> str:
        """Options, for ``print``."""
        eps = f", eps={self.eps}" if self.normalize == "whiten" else ""
        return f"normalize={self.normalize}, pool={self.pool}{eps}"


def whiten(tokens: Tensor, eps: float = WHITENING_EPS) -> Tensor:
    r"""Tokens whose channels have mean 0, variance 1 and no correlation, over all tokens given.

    .. math:: y = L^{-1} (x - \mu), \quad L L^T = \Sigma + \varepsilon \, \bar\lambda I

    with :math:`\Sigma` the covariance (divided by the number of tokens) and :math:`\bar\lambda` the
    mean of its eigenvalues. Directions in which the tokens vary by less than about eps of that fade
    to nothing rather than being blown up: those of too few tokens, and all of equal tokens, give 0.

    L is Cholesky's factor, as in the whitening that VkD's authors point to (arXiv 2007.06346).
    Against ZCA's inverse root, which is a rotation away and so no different to a projector that is
    learned, it needs no eigenvectors: nothing waits for the device, and NaN give NaN, no exception.

    In float64 throughout, which autocast leaves alone: about 1.5 n D^2 multiplications, which GPUs
    made for graphics are slow at, and three copies of the tokens at 8 bytes a value. A device
    without float64 (``"mps"``) waits for the CPU, which does it.

    Args:
        tokens: [..., D], any float dtype; the n vectors of length D count alike.
        eps: the least variance that is taken for real, as a share of the mean variance. Below
            1e-10 rounding can defeat the factorisation; then everything is NaN.

    Returns:
        [..., D], float32 (float64 for float64 tokens). Gradients pass through.
    """
    vectors = in_float64(tokens).flatten(0, -2)
    # Less the first, equal tokens are zeros and not what rounding leaves of their mean.
    vectors = vectors - vectors[:1]
    centered = vectors - vectors.mean(0)
    factor = _factor(centered.mT @ centered / len(centered), eps)
    whitened = torch.linalg.solve_triangular(factor, centered.mT, upper=False).mT
    wide = torch.promote_types(tokens.dtype, torch.float32)
    return whitened.reshape(tokens.shape).to(wide).to(tokens.device)


def _factor(covariance: Tensor, eps: float) -> Tensor:
    """Cholesky's factor of a [D, D] covariance with a floor; NaN where there is none."""
    floor = eps * covariance.diagonal().mean() + torch.finfo(covariance.dtype).tiny
    identity = torch.eye(len(covariance), dtype=covariance.dtype, device=covariance.device)
    factor, info = torch.linalg.cholesky_ex(covariance + floor * identity)
    return torch.where(info == 0, factor, torch.nan)


def _mean_token(tokens: Tensor) -> Tensor:
    """[B, N, D] to [B, 1, D], summed in float32 or wider."""
    dtype = torch.promote_types(tokens.dtype, torch.float32)
    return tokens.mean(1, keepdim=True, dtype=dtype)
