"""Ranks, energy curves and subspaces, read off the energies or the tokens in plain PyTorch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from fastkd.ops import checks
from fastkd.ops.parallel import over_shares
from fastkd.ops.spectrum import reference
from fastkd.utils.argument_checks import check_number

# Of the largest singular value; below it a direction is rounding, as for numpy.linalg.matrix_rank.
_RANK_TOLERANCE = 1e-7

# Of the largest singular value; a Gram matrix squares values, so that directions below are lost in
# the rounding of the largest.
_GRAM_TOLERANCE = 3e-4

_ORTHONORMAL = 1e-2  # how far from it columns may be: they may have been kept in half precision

LEVELS = (0.80, 0.90, 0.95, 0.99)


def rank_at(energies: Tensor, q: float | Sequence[float] = LEVELS) -> Tensor:
    r"""rank@q: the smallest k with e_1 + ... + e_k >= q (e_1 + ... + e_n).

    Sums are taken in float64. A sum that misses q by less than 1e-6 of the total (float64 energies:
    1e-12) counts as reaching it, so that k of n equal energies hold k / n of the total.

    Args:
        energies: [..., n], from `spectrum`, descending; or energies along the directions of any
            basis, in its order.
        q: a part of the total, in (0, 1], or several.

    Returns:
        int64, from 1 to n; 0 for a matrix without energy, or with a NaN or an infinity: [...] for
        one q, [..., len(q)] for several.

    Raises:
        TypeError: ``energies`` are no floating-point tensor.
        ValueError: they are empty, or a q is out of range or missing.
    """
    check_energies("rank_at", energies)
    ranks = reference.ranks_of(_wide(energies.detach()), checks.levels_of("rank_at", q))
    return ranks if isinstance(q, Iterable) else ranks[..., 0]


def energy_curve(energies: Tensor) -> Tensor:
    """Part of the total in the first 1, 2, ..., n energies.

    Args:
        energies: [..., n], in the order of their directions.

    Returns:
        [..., n] float32 (float64 for float64), non-decreasing to 1, summed in float64; 0 where
        there is no energy, NaN where an energy is.

    Raises:
        TypeError: ``energies`` are no floating-point tensor.
        ValueError: they are empty.
    """
    check_energies("energy_curve", energies)
    cumulated = energies.double().cumsum(dim=-1)
    total = cumulated[..., -1:]
    return (cumulated / torch.where(total == 0, 1.0, total)).to(_wide(energies).dtype)


def effective_rank(energies: Tensor) -> Tensor:
    r"""Effective rank: exp of the Shannon entropy of p_k = s_k / sum(s), s_k the singular values.

    Roy & Vetterli, "The effective rank: a measure of effective dimensionality" (EUSIPCO 2007),
    whose distribution is that of the singular values, not of the energies. It counts what small
    values there are, so it is as right as those (see `spectrum`): of energies found in float32, a
    matrix of rank one may have 1.07. Its slope at a value of 0 is infinite.

    Args:
        energies: [..., n], squared singular values.

    Returns:
        [...] float32 (float64 for float64), from 1 to n; 0 where there is no energy, NaN where an
        energy is.

    Raises:
        TypeError: ``energies`` are no floating-point tensor.
        ValueError: they are empty.
    """
    check_energies("effective_rank", energies)
    values = singular_values_of(_wide(energies))
    total = values.sum(dim=-1, keepdim=True)
    present = values != 0
    # entr has an infinite slope at 0: a value that is 0 takes no part.
    parts = torch.where(present, values / torch.where(total == 0, 1.0, total), 1.0)
    entropy = torch.special.entr(parts).sum(dim=-1)
    return torch.where(total.squeeze(-1) == 0, 0.0, entropy.exp())


def stable_rank(energies: Tensor) -> Tensor:
    """Stable rank: the sum of the energies over the largest one.

    Args:
        energies: [..., n], descending.

    Returns:
        [...] float32 (float64 for float64), from 1 to n; 0 where there is no energy, NaN where an
        energy is.

    Raises:
        TypeError: ``energies`` are no floating-point tensor.
        ValueError: they are empty.
    """
    check_energies("stable_rank", energies)
    wide = _wide(energies)
    largest = wide.amax(dim=-1)
    return (wide / torch.where(largest == 0, 1.0, largest).unsqueeze(-1)).sum(dim=-1)


def singular_values_of(energies: Tensor) -> Tensor:
    """Square roots of energies, whose gradient at 0 is 0 instead of infinite."""
    zero = energies == 0
    return torch.where(zero, 0.0, torch.where(zero, 1.0, energies).sqrt())


def check_energies(caller: str, energies: Tensor) -> None:
    """Raise unless they can be energies [..., n]."""
    checks.check_tensor(caller, "energies", energies)
    if energies.ndim == 0 or energies.shape[-1] == 0:
        raise ValueError(
            f"{caller}: energies must be [..., n] with n >= 1, got {list(energies.shape)}"
        )


def _wide(energies: Tensor) -> Tensor:
    return energies.to(checks.wide_dtype(energies))


def subspace(x: Tensor, k: int) -> Tensor:
    """Top-k right singular vectors of every matrix: the k channel directions with most energy.

    By the eigenvectors of the smaller Gram matrix where they are exact enough, else by a singular
    value decomposition. Allocates x and [..., n, n] in float64; synchronizes with the host.

    Args:
        x: [..., N, D] in any float dtype, any strides.
        k: how many, from 1 to min(N, D).

    Returns:
        [..., D, k] float64, columns that are orthonormal to rounding, the most energetic first;
        signs are arbitrary.
        Columns past a matrix's rank are zero, as they have no direction (singular values below 1e-7
        of the largest do not count). All NaN for a matrix with a NaN or an infinity.

    Raises:
        TypeError: ``x`` is no floating-point tensor.
        ValueError: it has no tokens or channels, or ``k`` is out of range.
        RuntimeError: a gradient is asked for.
    """
    _check_matrix("subspace", "x", x)
    check_number("subspace", "k", k, whole=True)
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
    gram, rows = (torch.where(finite, x, 0.0) for x in (gram, rows))
    energies, vectors = torch.linalg.eigh(gram)
    values = energies[..., -k:].flip(-1).clamp_min(0).sqrt()
    vectors = vectors[..., -k:].flip(-1)
    if tokens.shape[-2] <= tokens.shape[-1]:
        # Not divided by their lengths: beside large values, small ones are not at right angles.
        vectors = torch.linalg.qr(rows.mT @ vectors).Q
    weak = values[:, -1] < _GRAM_TOLERANCE * values[:, 0]
    if weak.any():
        matrices = torch.where(finite[weak], tokens[weak].double(), 0.0)
        _, exact, right = torch.linalg.svd(matrices, full_matrices=False)
        values[weak], vectors[weak] = exact[:, :k], right[:, :k].mT
    known = (values > _RANK_TOLERANCE * values[:, :1]).unsqueeze(-2)
    return torch.where(finite, torch.where(known, vectors, 0.0), torch.nan)


def principal_angles(a: Tensor, b: Tensor) -> Tensor:
    """Principal angles between subspaces: arccos of the singular values of A^T B.

    Args:
        a: [..., D, k], orthonormal columns (`subspace`), or zero ones, which are at right angles to
            everything.
        b: [..., D, l], as ``a``; leading dimensions broadcast.

    Returns:
        [..., min(k, l)] float64, radians in [0, pi / 2], ascending, exact to about 1e-8. NaN where
        columns are not orthonormal.

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
        b: [..., D, l], as ``a``; leading dimensions broadcast.

    Returns:
        [...] float64 in [0, 1]. NaN where columns are not orthonormal.

    Raises:
        TypeError: an input is no floating-point tensor.
        ValueError: they have different D.
        RuntimeError: a gradient is asked for.
    """
    products = _products("overlap", a, b)
    return (products.square().sum(dim=(-2, -1)) / min(products.shape[-2:])).clamp(0, 1)


def _products(caller: str, a: Tensor, b: Tensor) -> Tensor:
    _check_matrix(caller, "a", a)
    _check_matrix(caller, "b", b)
    if a.shape[-2] != b.shape[-2] or 0 in (a.shape[-1], b.shape[-1]):
        raise ValueError(
            f"{caller}: a and b must be [..., D, k] with one D, got {list(a.shape)} and "
            f"{list(b.shape)}"
        )
    a, b = a.double(), b.double()
    comparable = _is_orthonormal(a) & _is_orthonormal(b)
    return torch.where(comparable, a.mT @ b, torch.nan)


def _is_orthonormal(x: Tensor) -> Tensor:
    """[..., 1, 1]: whether all columns are of length 1, or 0, and at right angles."""
    products = x.mT @ x
    lengths = products.diagonal(dim1=-2, dim2=-1)
    ideal = torch.diag_embed((lengths > 0.5).double())
    return ((products - ideal).abs() < _ORTHONORMAL).all(dim=-1, keepdim=True).all(-2, True)


def _check_matrix(caller: str, name: str, x: Tensor) -> None:
    checks.check_tensor(caller, name, x)
    if x.ndim < 2:
        raise ValueError(f"{caller}: {name} must have two dimensions or more, got {list(x.shape)}")
    if x.requires_grad and torch.is_grad_enabled():
        raise RuntimeError(
            f"{caller}: {name} requires a gradient, and this measurement has none: detach it or "
            "call this under torch.no_grad()"
        )
