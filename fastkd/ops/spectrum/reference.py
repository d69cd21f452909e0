"""Spectra in plain PyTorch: the definition by an SVD, and the far faster way by Gram matrices.

All matrices here are [B, N, D], with any strides.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastkd.ops.checks import exact_float32, wide_dtype
from fastkd.ops.parallel import over_shares

# Bytes of converted tokens at a time: on a CPU small enough for the caches.
CHUNK_BYTES = 4 << 20
ACCELERATOR_CHUNK_BYTES = 256 << 20

# Tensor cores cut off what they add up in float32, always towards zero: beyond some hundred columns
# that would show in the sixth digit.
TENSOR_CORE_COLUMNS = 256

# k equal energies reach q = k / n exactly, but their rounded sum may stay a hair below it.
TIE = {torch.float32: 1e-6, torch.float64: 1e-12}


def definition(x: Tensor) -> Tensor:
    """Squared singular values [B, min(N, D)], descending, in the dtype of x."""
    return torch.linalg.svdvals(x).square()


def smaller_side(x: Tensor) -> Tensor:
    """X [B, n, m] or its transpose, with n = min(N, D) rows."""
    return x if x.shape[-2] <= x.shape[-1] else x.mT


def solver_dtype(x: Tensor) -> torch.dtype:
    """float64 on a CPU, where it costs little and keeps energies of 1e-10 of the total."""
    return torch.float64 if x.device.type == "cpu" else wide_dtype(x)


def gram(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Gram matrix of the smaller side, [B, n, n]; products and sums in ``dtype``."""
    rows = smaller_side(x)
    size = rows.shape[-2]
    half = x.dtype in (torch.float16, torch.bfloat16)
    if x.device.type == "cuda" and half and dtype == torch.float32:
        parts = rows.split(TENSOR_CORE_COLUMNS, dim=-1)
        products = torch.bmm(parts[0], parts[0].mT, out_dtype=torch.float32)
        for part in parts[1:]:
            products += torch.bmm(part, part.mT, out_dtype=torch.float32)
        return products
    products = x.new_empty((len(x), size, size), dtype=dtype)
    tokens = rows.detach()

    def multiply(share: slice) -> None:
        for some in _chunks(x, dtype, share):
            wide = tokens[some].to(dtype)
            torch.bmm(wide, wide.mT, out=products[some])

    with exact_float32():
        over_shares(multiply, x, size * x.shape[1] * x.shape[2])
    return products


def solve(gram: Tensor, levels: tuple[float, ...]) -> tuple[Tensor, Tensor]:
    """Energies [B, n] of positive semidefinite matrices [B, n, n], and the ranks that they give.

    Descending, what rounding made negative set to 0, NaN for a matrix that is not finite.
    """
    matrices = gram.detach()
    shares = over_shares(lambda some: _energies(matrices[some]), gram, gram.shape[-1] ** 3)
    energies = torch.cat(shares)
    return energies, ranks_of(energies, levels)


def _energies(gram: Tensor) -> Tensor:
    is_finite = finite(gram)
    # The solvers refuse NaN on a CPU and may not end on a GPU.
    energies = torch.linalg.eigvalsh(torch.where(is_finite, gram, 0.0)).clamp_min(0).flip(-1)
    is_finite = is_finite.squeeze(-1) & energies[..., :1].isfinite()
    return torch.where(is_finite, energies, torch.nan)


def ranks_of(energies: Tensor, levels: tuple[float, ...]) -> Tensor:
    """Smallest number of leading energies that hold each part of the total, [..., levels] int64.

    0 where there is no energy, or one that is not finite.
    """
    curve = energies.double().cumsum(dim=-1)
    total = curve[..., -1:]
    ranks = curve.new_empty((*curve.shape[:-1], len(levels)), dtype=torch.long)
    for place, level in enumerate(levels):
        missed = curve < (level - TIE[energies.dtype]) * total
        ranks[..., place] = missed.sum(dim=-1) + 1
    has_rank = (total > 0) & total.isfinite()
    return torch.where(has_rank, ranks.clamp_max(energies.shape[-1]), 0)


def backward(upstream: Tensor, x: Tensor, gram: Tensor) -> Tensor:
    r"""Gradient of sum(upstream * energies) with respect to x, in its dtype.

    With G = R R^T = V diag(e) V^T of the smaller side R: 2 V diag(upstream) V^T R. No gap between
    eigenvalues is divided by, so that repeated ones do no harm: the gradient of a function that is
    symmetric in them does not depend on which eigenvectors the solver returns. NaN for a matrix
    that is not finite.
    """
    weight = torch.empty_like(gram)
    twice = (2 * upstream.detach()).to(gram.dtype)
    matrices = gram.detach()

    def weigh(share: slice) -> None:
        is_finite = finite(matrices[share])
        vectors = torch.linalg.eigh(torch.where(is_finite, matrices[share], 0.0)).eigenvectors.flip(
            -1
        )
        weighted = (vectors * twice[share].unsqueeze(-2)) @ vectors.mT
        weight[share] = torch.where(is_finite, weighted, torch.nan)

    with exact_float32():
        over_shares(weigh, gram, 4 * gram.shape[-1] ** 3)
    return multiply_smaller_side(weight, x)


def multiply_smaller_side(weight: Tensor, x: Tensor) -> Tensor:
    """Weight [B, n, n] times the smaller side of x, laid back as x [B, N, D] and in its dtype."""
    product = torch.empty_like(x)
    rows, target = smaller_side(x), smaller_side(product)
    with exact_float32():
        for chunk in _chunks(x, weight.dtype, slice(0, len(x))):
            target[chunk] = (weight[chunk] @ rows[chunk].to(weight.dtype)).to(x.dtype)
    return product


def finite(gram: Tensor) -> Tensor:
    """Which matrices are finite, [B, 1, 1] bool."""
    return gram.isfinite().all(dim=-1, keepdim=True).all(dim=-2, keepdim=True)


def _chunks(x: Tensor, dtype: torch.dtype, share: slice) -> list[slice]:
    """Parts of a share whose converted tokens fill a chunk; all where nothing is converted."""
    stop = min(share.stop, len(x))
    if x.dtype == dtype:
        return [slice(share.start, stop)]
    budget = CHUNK_BYTES if x.device.type == "cpu" else ACCELERATOR_CHUNK_BYTES
    step = max(1, budget // (dtype.itemsize * x.shape[1] * x.shape[2]))
    starts = range(share.start, stop, step)
    return [slice(start, min(start + step, stop)) for start in starts]
