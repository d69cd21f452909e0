"""SEP's building blocks: spectra from a second moment or token by token, and what is read off them.

The definition is per token: `sep_curves`. Their mean needs no FFT per token: |x^(f)|^2 is the
Fourier transform of a token's circular autocorrelation, which is linear in x x^T: the sums along
the wrapped diagonals of the second moment. Everything here is plain PyTorch on any device.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from fastkd.ops import checks
from fastkd.ops.second_moment.reference import normalised
from fastkd.utils.arguments import check_number

Convention = Literal["full", "folded"]
CONVENTIONS: tuple[Convention, ...] = get_args(Convention)
LEVELS = (0.5, 0.6, 0.7, 0.8, 0.9)
TIE_TOLERANCE = 1e-6  # a curve that meets a level up to rounding (float32) has reached it


def sep_from_moment(moment: Tensor, convention: Convention = "full") -> Tensor:
    """Mean SEP curve of the tokens of a row-normalised second moment; one FFT of length D.

    Allocates as much as ``moment``.

    Args:
        moment: [..., D, D], ``second_moment(tokens, "row_norm")`` or a sum of several; moments
            with permuted channels (`permuted_moment`) can be done at once.
        convention: ``"full"`` or ``"folded"``, as in `fastkd.ops.sep.sep`.

    Returns:
        [..., D] or [..., D // 2 + 1], float32 (float64 for a float64 moment); NaN for a moment
        without tokens.

    Raises:
        TypeError: ``moment`` is no floating-point tensor.
        ValueError: it is not [..., D, D], or the convention is unknown.
    """
    checks.check_tensor("sep_from_moment", "moment", moment)
    check_convention("sep_from_moment", convention)
    if moment.ndim < 2 or moment.shape[-1] != moment.shape[-2] or moment.shape[-1] == 0:
        raise ValueError(f"sep_from_moment: moment must be [..., D, D], got {list(moment.shape)}")
    channels = moment.shape[-1]
    channel = torch.arange(channels, device=moment.device)
    wrapped = (channel[:, None] + channel) % channels
    autocorrelation = moment.gather(-1, wrapped.expand_as(moment)).sum(dim=-2)
    power = torch.fft.rfft(autocorrelation).real.clamp(min=0)
    # The number of tokens up to rounding, which so lets the curve end at 1 exactly.
    trace = moment.diagonal(dim1=-2, dim2=-1).sum(dim=-1, keepdim=True)
    return _bins(power, channels, convention).cumsum(dim=-1) / (channels * trace)


def sep_power(tokens: Tensor) -> Tensor:
    """Power at every frequency, summed over tokens that each have a total of 1.

    What `sep_from_power` makes a mean curve of, for accumulators: sums over batches add up. On a
    CPU a transform of every token is several times faster than their second moment.

    Args:
        tokens: [..., D], as in `sep_curves`. Tokens of zeros count as nothing.

    Returns:
        [D // 2 + 1] float64: powers of the unique frequencies, conjugate ones counted once.

    Raises:
        TypeError: ``tokens`` is no floating-point tensor.
        ValueError: it has no channels.
    """
    power = _token_power("sep_power", tokens).reshape(-1, tokens.shape[-1] // 2 + 1)
    total = (power * _folds(tokens.shape[-1], power)).sum(dim=-1)
    return (power / total.masked_fill(total == 0, 1.0)[:, None]).sum(dim=0, dtype=torch.float64)


def sep_from_power(power: Tensor, dim: int, convention: Convention = "full") -> Tensor:
    """Mean SEP curve of powers summed over tokens.

    Args:
        power: [..., dim // 2 + 1], `sep_power` or a sum of several.
        dim: channels D of a token.
        convention: ``"full"`` or ``"folded"``, as in `fastkd.ops.sep.sep`.

    Returns:
        [..., D] or [..., D // 2 + 1] in the dtype of ``power``, ends at 1; NaN without tokens.

    Raises:
        TypeError: ``power`` is no floating-point tensor.
        ValueError: it does not fit ``dim``, or the convention is unknown.
    """
    checks.check_tensor("sep_from_power", "power", power)
    check_convention("sep_from_power", convention)
    check_number("sep_from_power", "dim", dim, whole=True)
    if dim < 1 or power.ndim == 0 or power.shape[-1] != dim // 2 + 1:
        raise ValueError(
            f"sep_from_power: power must be [..., {dim // 2 + 1}] for dim {dim}, got "
            f"{list(power.shape)}"
        )
    curve = _bins(power, dim, convention).cumsum(dim=-1)
    return curve / curve[..., -1:]


def sep_curves(tokens: Tensor, convention: Convention = "full") -> Tensor:
    """SEP curve of every token, by a real FFT per token; allocates about four times the tokens.

    Args:
        tokens: [..., D], any leading dimensions; float16, bfloat16, float32 or float64, of any
            size: each token is scaled first.
        convention: ``"full"`` or ``"folded"``, as in `fastkd.ops.sep.sep`.

    Returns:
        [..., D] or [..., D // 2 + 1], float32 (float64 for float64 tokens), ends at 1. Zeros for a
        token of zeros, which has no curve: leave such out with ``tokens.ne(0).any(dim=-1)``. NaN
        for a token that is not finite.

    Raises:
        TypeError: ``tokens`` is no floating-point tensor.
        ValueError: it has no channels, or the convention is unknown.
    """
    check_convention("sep_curves", convention)
    power = _token_power("sep_curves", tokens)
    curves = _bins(power, tokens.shape[-1], convention).cumsum(dim=-1)
    total = curves[..., -1:]
    return curves / total.masked_fill(total == 0, 1.0)


def bandwidth(curve: Tensor, q: float | Sequence[float] = LEVELS) -> Tensor:
    """Part of the bins after which a SEP curve has reached each level.

    Args:
        curve: [..., F], non-decreasing from bin to bin, ending at 1.
        q: levels in (0, 1]; a single one counts as a list of it.

    Returns:
        [..., len(q)] float64: d / F with the first d, counted from 1, where the curve is at least q
        (or short of it by no more than 1e-6: rounding does not undo a tie). 1 for a level that
        rounding keeps the curve from reaching, NaN for a curve with a NaN.

    Raises:
        TypeError: ``curve`` is no floating-point tensor.
        ValueError: it has no bins, or a level is out of range.
    """
    checks.check_tensor("bandwidth", "curve", curve)
    if curve.ndim == 0 or curve.shape[-1] == 0:
        raise ValueError(f"bandwidth: curve must be [..., F], got {list(curve.shape)}")
    wanted = checks.levels_of("bandwidth", q)
    bins = curve.shape[-1]
    levels = torch.tensor(wanted, dtype=torch.float64, device=curve.device) - TIE_TOLERANCE
    below = (curve.double()[..., None, :] < levels[:, None]).sum(dim=-1)
    width = (below + 1).clamp(max=bins).double() / bins
    return width.masked_fill(curve.isnan().any(dim=-1, keepdim=True), torch.nan)


def permuted_moment(moment: Tensor, permutation: Tensor) -> Tensor:
    """Second moments of tokens with permuted channels, P C P^T, without the tokens.

    Args:
        moment: [D, D].
        permutation: [R, D] int64, R permutations of the channels: x becomes x[permutation[r]].

    Returns:
        [R, D, D]: for many permutations of wide tokens, pass some at a time.

    Raises:
        TypeError: ``moment`` is no floating-point tensor, or ``permutation`` no int64 tensor.
        ValueError: the shapes do not fit.
    """
    checks.check_tensor("permuted_moment", "moment", moment)
    if not isinstance(permutation, Tensor) or permutation.dtype != torch.int64:
        got = permutation.dtype if isinstance(permutation, Tensor) else type(permutation).__name__
        raise TypeError(f"permuted_moment: permutation must be an int64 tensor, got {got}")
    if moment.ndim != 2 or moment.shape[0] != moment.shape[1]:
        raise ValueError(f"permuted_moment: moment must be [D, D], got {list(moment.shape)}")
    if permutation.ndim != 2 or permutation.shape[1] != moment.shape[0]:
        raise ValueError(
            f"permuted_moment: permutation must be [R, {moment.shape[0]}] like moment, "
            f"got {list(permutation.shape)}"
        )
    return moment[permutation[:, :, None], permutation[:, None, :]]


def white_noise_sep(dim: int, convention: Convention = "full") -> Tensor:
    """Expected SEP curve of white noise, whose energy is spread evenly over the full bins.

    Args:
        dim: channels D of a token.
        convention: ``"full"``: the diagonal d / D; ``"folded"``: likewise, with two bins in one.

    Returns:
        [D] or [D // 2 + 1] float64, on the CPU.

    Raises:
        ValueError: ``dim`` is not positive, or the convention is unknown.
    """
    check_convention("white_noise_sep", convention)
    check_number("white_noise_sep", "dim", dim, least=1, whole=True)
    even = torch.ones(dim // 2 + 1, dtype=torch.float64)
    return _bins(even, dim, convention).cumsum(dim=-1) / dim


def check_convention(function: str, convention: str) -> None:
    """Refuse an unknown convention with a ValueError; ``function`` is the caller, for messages."""
    checks.check_choice(function, "convention", convention, CONVENTIONS)


def _token_power(function: str, tokens: Tensor) -> Tensor:
    """[..., D // 2 + 1]: power of every token at its unique frequencies, up to a factor a token."""
    checks.check_tensor(function, "tokens", tokens)
    if tokens.ndim == 0 or tokens.shape[-1] == 0:
        raise ValueError(
            f"{function}: tokens must be [..., D] with at least one channel, got "
            f"{list(tokens.shape)}"
        )
    scaled, _ = normalised(tokens.to(torch.promote_types(tokens.dtype, torch.float32)))
    if scaled.numel() == 0:  # which not every FFT library takes
        return scaled.new_empty((*scaled.shape[:-1], scaled.shape[-1] // 2 + 1))
    spectrum = torch.fft.rfft(scaled)
    return spectrum.real.square() + spectrum.imag.square()


def _bins(power: Tensor, channels: int, convention: Convention) -> Tensor:
    """Energy per bin of a convention, of the power [..., D // 2 + 1] at the unique frequencies."""
    if convention == "folded":
        return power * _folds(channels, power)
    return torch.cat([power, power[..., _paired(channels)].flip(-1)], dim=-1)


def _folds(channels: int, like: Tensor) -> Tensor:
    """How many of the full bins each unique frequency stands for, [D // 2 + 1]."""
    folds = torch.ones(channels // 2 + 1, dtype=like.dtype, device=like.device)
    folds[_paired(channels)] = 2
    return folds


def _paired(channels: int) -> slice:
    """Frequencies that occur twice among the full bins: all but 0 and Nyquist's."""
    return slice(1, (channels + 1) // 2)
