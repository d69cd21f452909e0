"""Directions of token matrices: top-k subspaces, and how far two of them turn away from each other.

In float64 throughout: a direction with 1e-6 of the energy is lost in a float32 Gram matrix.
Measurements, without gradients. Knows nothing of images or data sets.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastkd.ops import checks
from fastkd.ops.spectrum import reference
from fastkd.ops.threads import over_shares

# Of the largest singular value; below it a direction is rounding, as for numpy.linalg.matrix_rank.
_RANK_TOLERANCE = 1e-7


def subspace(x: Tensor, k: int) -> Tensor:
    """Top-k right singular vectors of every matrix: the k channel directions with most energy.

    Through the eigenvectors of the smaller Gram matrix. Allocates x and [..., n, n] in float64; the
    library's solver may synchronise with the host.

    Args:
        x: [..., N, D] in any float dtype, any strides.
        k: how many, from 1 to min(N, D).

    Returns:
        [..., D, k] float64, orthonormal columns, the most energetic first; signs are arbitrary.
        Columns past a matrix's rank are zero: nothing says where they point (singular values below
        1e-7 of the largest do not count). All NaN for a matrix with a NaN or an infinity.

    Raises:
        TypeError: ``x`` is no floating-point tensor.
        ValueError: it has no tokens or channels, or ``k`` is out of range.
        RuntimeError: a gradient is asked for.
    """
    _check_matrix("subspace", "x", x)
    if 0 in x.shape[-2:] or not 1 <= k <= min(x.shape[-2:]):
        raise ValueError(f"subspace: k must be from 1 to min(N, D) of {list(x.shape)}, got {k}")
    tokens = x.detach().reshape(-1, *x.shape[-2:])
    cost = min(x.shape[-2:]) ** 2 * (x.shape[-2] + 4 * x.shape[-1])
    vectors = torch.cat(over_shares(lambda some: _top(tokens[some], k), tokens, cost))
    return vectors.view(*x.shape[:-2], x.shape[-1], k)


def _top(tokens: Tensor, k: int) -> Tensor:
    """`subspace` of [B, N, D]."""
    rows = reference.smaller_side(tokens.double())
    gram = rows @ rows.mT
    finite = reference.finite(gram)
    energies, vectors = torch.linalg.eigh(torch.where(finite, gram, 0.0))
    energies, vectors = energies[..., -k:].flip(-1), vectors[..., -k:].flip(-1)
    values = energies.clamp_min(0).sqrt().unsqueeze(-2)
    known = values > _RANK_TOLERANCE * values[..., :1]
    if tokens.shape[-2] <= tokens.shape[-1]:
        vectors = rows.mT @ vectors / torch.where(known, values, 1.0)
    return torch.where(finite, torch.where(known, vectors, 0.0), torch.nan)


def principal_angles(a: Tensor, b: Tensor) -> Tensor:
    """Principal angles between subspaces: arccos of the singular values of A^T B.

    Args:
        a: [..., D, k], orthonormal columns (`subspace`), or zero ones, which are at right angles to
            everything.
        b: [..., D, l], likewise; leading dimensions broadcast.

    Returns:
        [..., min(k, l)] float64, radians in [0, pi / 2], ascending, exact to about 1e-8.

    Raises:
        TypeError: an input is no floating-point tensor.
        ValueError: they have different D.
        RuntimeError: a gradient is asked for.
    """
    products = _products("principal_angles", a, b)
    products = reference.smaller_side(products)
    finite = products.isfinite().all(dim=-1).all(dim=-1).unsqueeze(-1)
    products = torch.where(finite.unsqueeze(-1), products, 0.0)
    # Not svdvals, which takes one matrix after another on a GPU; arccos is no more exact than this.
    squares = torch.linalg.eigvalsh(products @ products.mT).flip(-1)
    return torch.where(finite, squares.clamp(0, 1).sqrt().arccos(), torch.nan)


def overlap(a: Tensor, b: Tensor) -> Tensor:
    """Overlap of subspaces, ||A^T B||_F^2 / min(k, l): mean squared cosine of the principal angles.

    Two random k-dimensional subspaces of R^D overlap by k / D on average.

    Args:
        a: [..., D, k], orthonormal columns (`subspace`), or zero ones, which overlap with nothing.
        b: [..., D, l], likewise; leading dimensions broadcast.

    Returns:
        [...] float64 in [0, 1].

    Raises:
        TypeError: an input is no floating-point tensor.
        ValueError: they have different D.
        RuntimeError: a gradient is asked for.
    """
    products = _products("overlap", a, b)
    return products.square().sum(dim=(-2, -1)) / min(products.shape[-2:])


def _products(caller: str, a: Tensor, b: Tensor) -> Tensor:
    _check_matrix(caller, "a", a)
    _check_matrix(caller, "b", b)
    if a.shape[-2] != b.shape[-2] or 0 in (a.shape[-1], b.shape[-1]):
        raise ValueError(
            f"{caller}: a and b must be [..., D, k] with one D, got {list(a.shape)} and "
            f"{list(b.shape)}"
        )
    return a.double().mT @ b.double()


def _check_matrix(caller: str, name: str, x: Tensor) -> None:
    checks.check_tensor(caller, name, x)
    if x.ndim < 2:
        raise ValueError(f"{caller}: {name} must have two dimensions or more, got {list(x.shape)}")
    if x.requires_grad and torch.is_grad_enabled():
        raise RuntimeError(
            f"{caller}: {name} requires a gradient, and this measurement has none: detach it or "
            "call this under torch.no_grad()"
        )
