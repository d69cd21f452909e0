"""SEP, the token spectral energy pattern: how a token's energy is spread over channel frequencies.

This file holds `sep`, the measurement of a batch of tokens; reference.py the building blocks that
an accumulator over a data set puts together itself.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastkd.ops import checks
from fastkd.ops.backend import Backend, check_backend
from fastkd.ops.second_moment import check_tokens, second_moment
from fastkd.ops.second_moment.reference import as_images, row_chunks
from fastkd.ops.sep.reference import (
    CONVENTIONS,
    LEVELS,
    TIE_TOLERANCE,
    Convention,
    bandwidth,
    check_convention,
    permuted_moment,
    sep_curves,
    sep_from_moment,
    sep_from_power,
    sep_power,
    white_noise_sep,
)

__all__ = [
    "CONVENTIONS",
    "LEVELS",
    "TIE_TOLERANCE",
    "bandwidth",
    "permuted_moment",
    "sep",
    "sep_curves",
    "sep_from_moment",
    "sep_from_power",
    "sep_power",
    "white_noise_sep",
]

# Tokens whose curves are there at once: on a CPU they fit its caches.
CHUNK_ROWS = 256
ACCELERATOR_CHUNK_ROWS = 16384


def sep(
    tokens: Tensor, convention: Convention = "full", *, std: bool = False, backend: Backend = "auto"
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Token spectral energy pattern, averaged over tokens (arXiv 2511.15572).

    A token x in R^D has at bin f the energy \|DFT(x)_f\|^2; its curve cumulates them in frequency
    order, over their total. The mean curve is read off the row-normalised second moment and one
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
