"""SEP, the token spectral energy pattern: how a token's energy is spread over channel frequencies.

The definition is per token: `sep_curves`. Their mean needs no FFT per token: |x^(f)|^2 is the
Fourier transform of a token's circular autocorrelation, which is linear in x x^T: the sums along
the wrapped diagonals of the second moment.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from fastkd.ops import checks
from fastkd.ops.backend import Backend, check_backend
from fastkd.ops.second_moment import check_tokens, second_moment
from fastkd.ops.second_moment.reference import as_images, normalized, row_chunks
from fastkd.utils.argument_checks import check_number

Convention = Literal["full", "folded"]
CONVENTIONS: tuple[Convention, ...] = get_args(Convention)
LEVELS = (0.5, 0.6, 0.7, 0.8, 0.9)
TIE_TOLERANCE = 1e-6  # a curve that meets a level up to rounding (float32) has reached it

# Tokens whose curves are there at once: on a CPU they fit its caches.
CHUNK_ROWS = 256
ACCELERATOR_CHUNK_ROWS = 16384


def sep(
    tokens: Tensor, convention: Convention = "full", *, std: bool = False, backend: Backend = "auto"
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Token spectral energy pattern, averaged over tokens (arXiv 2511.15572).

    A token x in R^D has at bin f the energy \|DFT(x)_f\|^2; its curve cumulates them in frequency
    order, over their total. The mean curve is read off the row-normalized second moment and one
    FFT of length D, exactly: no FFT per token. The standard deviation needs that FFT; it is made in
    float32 (float64 for float64 tokens) a chunk of tokens at a time; chunks add up in float64.

    Of every real signal the full curve is symmetric, so that it reaches 0.5 halfway by
    construction, and of white noise it is the diagonal (`white_noise_sep`): compare with both.

    Args:
        tokens: [..., D], any leading dimensions, any strides; float16, bfloat16, float32 or
            float64. Tokens of zeros are left out. No gradient: see `second_moment`.
        convention: ``"full"``: all D bins in FFT order, what the paper plots; ``"folded"``: the
            D // 2 + 1 unique ones, with conjugate pairs folded into one.
        std: also return the standard deviation.
        backend: of the second moment: ``"auto"``, ``"triton"`` or ``"torch"``.

    Returns:
        The mean curve, [D] or [D // 2 + 1] float64; with ``std`` a pair of it and of the population
        standard deviation over tokens, of the same shape. NaN where no token has energy, or one is
        not finite.

    Raises:
        TypeError: ``tokens`` is no floating-point tensor.
        ValueError: it has no channels or requires a gradient, or the convention is unknown.
        RuntimeError: ``backend`` names one that cannot run here, and why.
    """
    check_tokens("sep", tokens)
    check_convention("sep", convention)
    checks.check_flag("sep", "std", std)
    check_backend("sep", backend)
    moment = second_moment(tokens, "row_norm", backend=backend)
    mean = sep_from_moment(moment, convention)
    return (mean, _deviation(tokens, mean, convention)) if std else mean


def _deviation(tokens: Tensor, mean: Tensor, convention: Convention) -> Tensor:
    """Population standard deviation over the curves of tokens with energy."""
    rows = CHUNK_ROWS if tokens.device.type == "cpu" else ACCELERATOR_CHUNK_ROWS
    # Sums of deviations, not of curves: squares of nearly equal curves would cancel. What is left
    # is small enough for float32 within a chunk.
    count, sums, squares = (torch.zeros_like(mean) for _ in range(3))
    for chunk in row_chunks(as_images(tokens), rows):
        curves = sep_curves(chunk, convention)
        energetic = curves[:, -1:] != 0
        deviation = torch.where(energetic, curves - mean.to(curves.dtype), 0.0)
        count += energetic.sum()
        sums += deviation.sum(dim=0)
        squares += deviation.square().sum(dim=0)
    return (squares / count - (sums / count).square()).clamp(min=0).sqrt()


def sep_from_moment(moment: Tensor, convention: Convention = "full") -> Tensor:
    """Mean curve of row-normalized second moments [..., D, D]; NaN for one without tokens."""
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
    """Power at the D // 2 + 1 unique frequencies, summed over tokens with a total of 1 each.

    For accumulators, with `sep_from_power`: sums over batches add up. On a CPU a transform of every
    token is several times faster than their second moment. Tokens of zeros count as nothing.
    """
    power = _token_power("sep_power", tokens).reshape(-1, tokens.shape[-1] // 2 + 1)
    total = (power * _folds(tokens.shape[-1], power)).sum(dim=-1)
    return (power / total.masked_fill(total == 0, 1.0)[:, None]).sum(dim=0, dtype=torch.float64)


def sep_from_power(power: Tensor, dim: int, convention: Convention = "full") -> Tensor:
    """Mean curve of powers [..., dim // 2 + 1] summed over tokens; NaN without tokens."""
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
    """Curve of every token [..., D] of any size, by a real FFT; allocates about four times as much.

    Zeros for a token of zeros, which has no curve; NaN for one that is not finite.
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
    """Second moments [R, D, D] of tokens x[permutation[r]], P C P^T, without the tokens."""
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
    """Expected curve of white noise, whose energy is spread evenly over the full bins."""
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
    scaled, _ = normalized(tokens.to(torch.promote_types(tokens.dtype, torch.float32)))
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
