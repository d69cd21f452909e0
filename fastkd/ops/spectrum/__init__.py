"""`spectrum`, `spectral_ranks` and `singular_values` of batches of token matrices."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fastkd.ops import checks
from fastkd.ops.backend import Backend, Implementation, Operator, check_backend
from fastkd.ops.spectrum import cuda, reference
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

MOST_LEVELS = cuda.MOST_LEVELS  # that a kernel takes at once


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
    r"""Energies of every matrix: its squared singular values s_1^2 >= s_2^2 >= ...

    They are the eigenvalues of the smaller Gram matrix (`gram`). On a CPU it is made and solved in
    float64, so that energies down to about 1e-10 of the total are right; elsewhere in float32, with
    errors of a few 1e-7 of the total, so that smaller energies are rounding. Nothing is centred.
    Allocates [..., n, n]; the library's solver, where it is the one that runs, may synchronise with
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
    energies, _, _ = _operator(_batched(x), [], backend)
    return energies.view(*x.shape[:-2], energies.shape[-1])


def spectral_ranks(
    x: Tensor, q: float | Sequence[float] = LEVELS, *, backend: Backend = "auto"
) -> tuple[Tensor, Tensor]:
    """Energies of every matrix with their rank@q, which the CUDA kernel finds in the same launch.

    Args:
        x: as in `spectrum`.
        q: a part of the energy, in (0, 1], or up to eight of them.
        backend: as in `spectrum`.

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
    energies, ranks, _ = _operator(_batched(x), list(levels), backend)
    batch = x.shape[:-2]
    return energies.view(*batch, energies.shape[-1]), ranks.view(*batch, len(levels))


def singular_values(x: Tensor, *, backend: Backend = "auto") -> Tensor:
    """Singular values of every matrix, as square roots of `spectrum`.

    A square root magnifies what rounding leaves: where energies are found in float32 (see
    `spectrum`), values below about 5e-4 of the largest are not told from 0.

    Args:
        x: as in `spectrum`.
        backend: as in `spectrum`.

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


@torch.library.custom_op("fastkd::gram", mutates_args=())
def _gram(x: Tensor) -> Tensor:
    """See `gram`; of [B, N, D]."""
    with torch.autocast(x.device.type, enabled=False):
        return reference.gram(x, reference.accumulator_dtype(x))


@_gram.register_fake
def _(x: Tensor) -> Tensor:
    size = min(x.shape[1], x.shape[2])
    return x.new_empty((x.shape[0], size, size), dtype=reference.accumulator_dtype(x))


@torch.library.custom_op("fastkd::gram_backward", mutates_args=())
def _gram_backward(upstream: Tensor, x: Tensor) -> Tensor:
    """(upstream + upstream^T) times the smaller side of x, as x lies."""
    with torch.autocast(x.device.type, enabled=False):
        return reference.multiply_smaller_side(upstream + upstream.mT, x)


@_gram_backward.register_fake
def _(upstream: Tensor, x: Tensor) -> Tensor:
    return torch.empty_like(x)


def _save_tokens(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ctx.save_for_backward(inputs[0])


def _differentiate_gram(ctx, upstream):  # type: ignore[no-untyped-def]
    return _gram_backward(upstream, ctx.saved_tensors[0])


_gram.register_autograd(_differentiate_gram, setup_context=_save_tokens)
checks.refuse_second_derivatives(_gram_backward, "gram")


@torch.library.custom_op("fastkd::spectrum", mutates_args=())
def _operator(x: Tensor, levels: list[float], backend: str) -> tuple[Tensor, Tensor, Tensor]:
    """(energies, ranks, Gram matrix for the backward) of [B, N, D]; see `spectral_ranks`."""
    with torch.autocast(x.device.type, enabled=False):
        product = reference.gram(x, reference.solver_dtype(x))
        if len(x) == 0:
            energies = product.new_empty(0, product.shape[-1])
            ranks = x.new_empty(0, len(levels), dtype=torch.long)
        else:
            chosen = OPERATOR.select(backend, (x,), product.shape[-1])
            energies, ranks = chosen.forward(product, tuple(levels))
        dtype = reference.accumulator_dtype(x)
        if energies.dtype != dtype:  # solved in float64, but ties are those of the tokens' dtype
            energies = energies.to(dtype)
            held = energies.isfinite().all(dim=-1, keepdim=True)
            energies = torch.where(held, energies, torch.nan)
            ranks = reference.ranks_of(energies, tuple(levels))
            product = torch.where(held.unsqueeze(-1), product, torch.nan)  # and so the gradient
        return energies, ranks, product


@_operator.register_fake
def _(x: Tensor, levels: list[float], backend: str) -> tuple[Tensor, Tensor, Tensor]:
    size = min(x.shape[1], x.shape[2])
    return (
        x.new_empty((x.shape[0], size), dtype=reference.accumulator_dtype(x)),
        x.new_empty((x.shape[0], len(levels)), dtype=torch.long),
        x.new_empty((x.shape[0], size, size), dtype=reference.solver_dtype(x)),
    )


@torch.library.custom_op("fastkd::spectrum_backward", mutates_args=())
def _backward_operator(upstream: Tensor, x: Tensor, product: Tensor) -> Tensor:
    """Gradient of x; see `reference.backward`, which every backend takes."""
    with torch.autocast(x.device.type, enabled=False):
        return reference.backward(upstream, x, product)


@_backward_operator.register_fake
def _(upstream: Tensor, x: Tensor, product: Tensor) -> Tensor:
    return torch.empty_like(x)


def _save_for_backward(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    _, ranks, product = output
    ctx.mark_non_differentiable(ranks, product)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(inputs[0], product)


def _differentiate(ctx, upstream, _ranks, _product):  # type: ignore[no-untyped-def]
    if upstream is None:
        return None, None, None
    x, product = ctx.saved_tensors
    return _backward_operator(upstream, x, product), None, None


_operator.register_autograd(_differentiate, setup_context=_save_for_backward)
checks.refuse_second_derivatives(_backward_operator, "spectrum")


# Of the total energy, as the solvers are exact to a few units of rounding of the largest.
SELF_CHECK_TOLERANCE = 1e-6


def self_check(
    implementation: Implementation, device: torch.device, dtypes: tuple[torch.dtype, ...], size: int
) -> tuple[float, float]:
    """Compare a solver with the float64 reference on small seeded matrices; synchronises.

    Args:
        implementation: the solver to try.
        device: where to run it.
        dtypes: of the tokens; solvers see their Gram matrices in float32.
        size: n, which chooses the kernel.

    Returns:
        The largest error of an energy, as a part of the total; infinite where a rank is wrong. And
        what is allowed.
    """
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, size, size + 3, generator=generator, dtype=torch.float64)
    x[1] *= torch.logspace(0, -6, size, dtype=torch.float64).unsqueeze(-1)
    product = (x @ x.mT).to(device, torch.float32)
    product[2] = 0.0
    energies, ranks = implementation.forward(product, LEVELS)
    truth, _ = reference.solve(product.double(), ())
    total = truth.sum(dim=-1, keepdim=True).clamp_min(1e-30)
    error = ((energies.double() - truth).abs() / total).amax().nan_to_num(nan=math.inf).item()
    near = ranks_near(truth, ranks, LEVELS)
    return (error if near else math.inf), SELF_CHECK_TOLERANCE


def ranks_near(
    energies: Tensor, ranks: Tensor, levels: tuple[float, ...], band: float = 1e-5
) -> bool:
    """Whether ranks are right; a curve within ``band`` of a level may count as on either side.

    Args:
        energies: [B, n], the truth, in float64.
        ranks: [B, levels].
        levels: parts of the energy.
        band: half the width of what counts as a tie.

    Returns:
        The answer.
    """
    least = reference.ranks_of(energies, tuple(level - band for level in levels))
    most = reference.ranks_of(energies, tuple(level + band for level in levels))
    return bool(((least <= ranks) & (ranks <= most)).all())


def _solve_in_float32(product: Tensor, levels: tuple[float, ...]) -> tuple[Tensor, Tensor]:
    return cuda.solve(product.float(), levels)


def _too_large(x: Tensor, size: int) -> str | None:
    if size <= cuda.LARGEST:
        return None
    return f"it takes matrices up to {cuda.LARGEST} on their smaller side, got {size}"


# A solver: forward(gram, levels) as `reference.solve`. The backward is the library's everywhere.
OPERATOR: Operator[Implementation] = Operator(
    name="spectrum",
    implementations={
        "torch": Implementation(reference.solve),
        "cuda": Implementation(_solve_in_float32, refuses=_too_large, proven=False),
    },
    order=("cuda", "torch"),
    self_check=self_check,
)
