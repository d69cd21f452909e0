r"""What is read off the energies of a spectrum: ranks, and how many dimensions are in effect used.

Functions of energies e_1 >= e_2 >= ... [..., n], which `fastkd.ops.spectrum` gives; they know
nothing of how those were found, and run on any device, in plain PyTorch, without waiting for it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from fastkd.ops import checks
from fastkd.ops.spectrum import reference

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
    ranks = reference.ranks_of(_wide(energies.detach()), levels_of("rank_at", q))
    return ranks if isinstance(q, Iterable) else ranks[..., 0]


def energy_curve(energies: Tensor) -> Tensor:
    """Part of the total in the first 1, 2, ..., n energies.

    Args:
        energies: [..., n], as in `rank_at`.

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
    return wide.sum(dim=-1) / torch.where(largest == 0, 1.0, largest)


def singular_values_of(energies: Tensor) -> Tensor:
    """Square roots of energies, whose gradient at 0 is 0 instead of infinite."""
    zero = energies == 0
    return torch.where(zero, 0.0, torch.where(zero, 1.0, energies).sqrt())


def levels_of(caller: str, q: float | Sequence[float], name: str = "q") -> tuple[float, ...]:
    """Parts of the energy as a tuple, be it one or several.

    Args:
        caller: named in errors.
        q: what was given.
        name: the argument's name.

    Raises:
        ValueError: one is outside (0, 1], or there is none.
    """
    levels = tuple(map(float, q)) if isinstance(q, Iterable) else (float(q),)
    if not levels or not all(0 < level <= 1 for level in levels):
        raise ValueError(f"{caller}: {name} must be in (0, 1], got {list(levels)}")
    return levels


def check_energies(caller: str, energies: Tensor) -> None:
    """Refuse what cannot be energies [..., n].

    Raises:
        TypeError: no floating-point tensor.
        ValueError: no energy in the last dimension.
    """
    checks.check_tensor(caller, "energies", energies)
    if energies.ndim == 0 or energies.shape[-1] == 0:
        raise ValueError(
            f"{caller}: energies must be [..., n] with n >= 1, got {list(energies.shape)}"
        )


def _wide(energies: Tensor) -> Tensor:
    return energies.to(reference.accumulator_dtype(energies))
