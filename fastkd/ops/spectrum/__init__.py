"""`spectrum`, `spectral_ranks` and `singular_values` of batches of token matrices."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from fastkd.ops import checks
from fastkd.ops.backend import Backend, Backends, Implementation, check_backend
from fastkd.ops.operator import operator
from fastkd.ops.self_check import Draw
from fastkd.ops.spectrum import reference
from fastkd.ops.spectrum.measures import (
    LEVELS,
    effective_rank,
    energy_curve,
    overlap,
    principal_angles,
    rank_at,
    singular_values_of,
    stable_rank,
    subspace,
)

__all__ = [
    "LEVELS",
    "MOST_LEVELS",
    "effective_rank",
    "energy_curve",
    "gram",
    "overlap",
    "principal_angles",
    "rank_at",
    "singular_values",
    "spectral_ranks",
    "spectrum",
    "stable_rank",
    "subspace",
]

LARGEST = 257  # rows of a matrix; csrc/spectrum.h's kSpectrumLargest
MOST_LEVELS = 8  # that a kernel takes at once; kSpectrumLevels

torch.library.define(
    "fastkd::_spectrum_solve",
    "(Tensor gram, float[] levels, Tensor(a!) energies, Tensor(b!) ranks) -> ()",
)


def gram(x: Tensor) -> Tensor:
    """Gram matrix of the smaller side of every matrix: X X^T if N <= D, else X^T X.

    Products are accumulated in float32 (float64 for float64), and are not made of TensorFloat-32
    whatever torch is set to. Has a gradient.

    Args:
        x: [..., N, D] in float16, bfloat16, float32 or float64, any strides.

    Returns:
        [..., n, n], n = min(N, D), float32 (float64 for float64). A NaN or an infinity stays in its
        own matrix.

    Raises:
        TypeError: ``x`` is no floating-point tensor.
        ValueError: it has no tokens or channels.
    """
    _check("gram", x)
    product = _gram(_batched(x))
    return product.view(*x.shape[:-2], *product.shape[1:])


def spectrum(x: Tensor, *, backend: Backend = "auto") -> Tensor:
    r"""Squared singular values of every matrix, the largest first: its energies.

    They are the eigenvalues of the smaller Gram matrix (`gram`). On a CPU it is made and solved in
    float64, so that energies down to about 1e-10 of the total are right; elsewhere in float32, with
    errors of a few 1e-7 of the total, so that smaller energies are rounding. Nothing is centered.
    Allocates [..., n, n]; the library's solver, where it is the one that runs, may synchronize with
    the host.

    The gradient goes through the eigenvectors of the saved Gram matrix, 2 V diag(g) V^T X, and
    divides by no gap: repeated energies are safe. There is no second derivative.

    Args:
        x: [..., N, D] in float16, bfloat16, float32 or float64, any strides.
        backend: ``"auto"``, ``"cuda"`` (min(N, D) <= 257) or ``"torch"``; see
            `fastkd.ops.backends`.

    Returns:
        [..., n] float32 (float64 for float64), n = min(N, D), descending, never negative. All NaN
        for a matrix with a NaN or an infinity, or whose energies float32 cannot hold.

    Raises:
        TypeError: ``x`` is no floating-point tensor.
        ValueError: it has no tokens or channels.
        RuntimeError: ``backend`` names one that cannot run here, and why.
    """
    _check("spectrum", x)
    check_backend("spectrum", backend)
    energies, _, _ = _spectrum(_batched(x), [], backend)
    return energies.view(*x.shape[:-2], energies.shape[-1])


def spectral_ranks(
    x: Tensor, q: float | Sequence[float] = LEVELS, *, backend: Backend = "auto"
) -> tuple[Tensor, Tensor]:
    """Squared singular values of every matrix, and its rank@q.

    The CUDA kernel finds both in one launch.

    Args:
        x: [..., N, D] in float16, bfloat16, float32 or float64, any strides.
        q: a part of the energy, in (0, 1], or up to eight of them.
        backend: ``"auto"``, ``"cuda"`` or ``"torch"``.

    Returns:
        `spectrum` of x, [..., n], which carries the gradient; and `rank_at` of it, [..., len(q)]
        int64.

    Raises:
        TypeError: ``x`` is no floating-point tensor.
        ValueError: it has no tokens or channels, or a q is out of range or missing.
        RuntimeError: ``backend`` names one that cannot run here, and why.
    """
    _check("spectral_ranks", x)
    check_backend("spectral_ranks", backend)
    levels = checks.levels_of("spectral_ranks", q)
    if len(levels) > MOST_LEVELS:
        raise ValueError(
            f"spectral_ranks: q may hold {MOST_LEVELS} levels, got {len(levels)}; "
            "rank_at(spectrum(x), q) takes any number"
        )
    energies, ranks, _ = _spectrum(_batched(x), list(levels), backend)
    batch = x.shape[:-2]
    return energies.view(*batch, energies.shape[-1]), ranks.view(*batch, len(levels))


def singular_values(x: Tensor, *, backend: Backend = "auto") -> Tensor:
    """Singular values of every matrix: the roots of its `spectrum`.

    A square root magnifies what rounding leaves: where energies are found in float32 (see
    `spectrum`), values below about 5e-4 of the largest are not told from 0.

    Args:
        x: [..., N, D] in float16, bfloat16, float32 or float64, any strides.
        backend: ``"auto"``, ``"cuda"`` or ``"torch"``.

    Returns:
        [..., n] float32 (float64 for float64), descending; the gradient of a value that is 0 is 0.

    Raises:
        TypeError: ``x`` is no floating-point tensor.
        ValueError: it has no tokens or channels.
        RuntimeError: ``backend`` names one that cannot run here, and why.
    """
    _check("singular_values", x)
    check_backend("singular_values", backend)
    return singular_values_of(spectrum(x, backend=backend))


def _check(caller: str, x: Tensor) -> None:
    checks.check_tensor(caller, "x", x)
    if x.ndim < 2 or 0 in x.shape[-2:]:
        raise ValueError(
            f"{caller}: x must be [..., N, D] with at least one token and one channel, "
            f"got {list(x.shape)}"
        )


def _batched(x: Tensor) -> Tensor:
    """[B, N, D]; a copy only where several leading dimensions do not lie evenly."""
    return x if x.ndim == 3 else x.reshape(math.prod(x.shape[:-2]), *x.shape[-2:])


def _empty_gram(x: Tensor, dtype: torch.dtype) -> Tensor:
    size = min(x.shape[1:])
    return x.new_empty((x.shape[0], size, size), dtype=dtype)


def _gram_backward(upstream: Tensor, x: Tensor) -> Tensor:
    return reference.multiply_smaller_side(upstream + upstream.mT, x)


@operator("gram_backward", _gram_backward)
def _gram_gradient(upstream: Tensor, x: Tensor) -> Tensor:
    return torch.empty_like(x)


@operator(
    "gram",
    lambda x: reference.gram(x, checks.wide_dtype(x)),
    gradient=lambda needs, upstream, x: [_gram_gradient(upstream, x)],
)
def _gram(x: Tensor) -> Tensor:
    return _empty_gram(x, checks.wide_dtype(x))


def _run(x: Tensor, levels: list[float], backend: str) -> tuple[Tensor, Tensor, Tensor]:
    """Compute energies, ranks, and the Gram matrix for the backward, of [B, N, D]."""
    product = reference.gram(x, reference.solver_dtype(x))
    solver = SOLVERS.select(backend if len(x) else "torch", x, product.shape[-1])
    energies, ranks = solver.forward(product, tuple(levels))
    dtype = checks.wide_dtype(x)
    if energies.dtype != dtype:  # solved in float64, but ties are those of the tokens' dtype
        energies = energies.to(dtype)
        held = energies.isfinite().all(dim=-1, keepdim=True)
        energies = torch.where(held, energies, torch.nan)
        ranks = reference.ranks_of(energies, tuple(levels))
        product = torch.where(held.unsqueeze(-1), product, torch.nan)  # and so the gradient
    return energies, ranks, product


@operator("spectrum_backward", reference.backward)
def _spectrum_gradient(upstream: Tensor, x: Tensor, gram: Tensor) -> Tensor:
    return torch.empty_like(x)


@operator(
    "spectrum",
    _run,
    gradient=lambda needs, upstream, x, levels, backend, product: [
        _spectrum_gradient(upstream, x, product)
    ],
    kept=(2,),
)
def _spectrum(x: Tensor, levels: list[float], backend: str) -> tuple[Tensor, Tensor, Tensor]:
    return (
        x.new_empty((x.shape[0], min(x.shape[1:])), dtype=checks.wide_dtype(x)),
        x.new_empty((x.shape[0], len(levels)), dtype=torch.long),
        _empty_gram(x, reference.solver_dtype(x)),
    )


def _solve(product: Tensor, levels: tuple[float, ...]) -> tuple[Tensor, Tensor]:
    """As `reference.solve`, by csrc/spectrum.cu; one launch, no synchronization.

    Eigenvalues are those of the lower triangle, to a few 1e-7 of their sum; what is smaller than
    about 2^-29 of it is 0.
    """
    product = product.float()
    energies = product.new_empty(product.shape[:-1])
    ranks = product.new_empty((len(product), len(levels)), dtype=torch.long)
    torch.ops.fastkd._spectrum_solve(product, list(levels), energies, ranks)
    return energies, ranks


def _too_large(x: Tensor, size: int) -> str | None:
    if size <= LARGEST:
        return None
    return f"it takes matrices up to {LARGEST} on their smaller side, got {size}"


def _example(run: Implementation, draw: Draw, x: Tensor, size: int) -> Iterator[Any]:
    matrices = draw(3, size, size + 3, like=None).double()
    matrices[1] *= torch.logspace(0, -6, size, dtype=torch.float64, device=x.device).unsqueeze(-1)
    matrices[2] = 0
    energies, ranks = run.forward(draw.rounded(matrices @ matrices.mT, torch.float32), LEVELS)
    yield "value", energies
    yield "value", ranks.double()


# A solver: forward(gram, levels) as `reference.solve`. The backward is torch's on all backends.
SOLVERS = Backends(
    "spectrum",
    {
        "torch": Implementation(reference.solve),
        "cuda": Implementation(_solve, refuses=_too_large, proven=False),
    },
    ("cuda", "torch"),
    ("x", "size"),
    _example,
)
