"""Inputs on which kernels go wrong, and how far an answer may be from the truth.

Truth is the float64 reference on the inputs as they are after rounding to their dtype.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

slow = pytest.mark.slow
# Where one dtype shows what a test is about, the others are left to -m slow.
BFLOAT16_FIRST = [
    torch.bfloat16,
    pytest.param(torch.float16, marks=slow),
    pytest.param(torch.float32, marks=slow),
]

Pair = tuple[Tensor, Tensor]


def _noise(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def noise(shape: tuple[int, ...]) -> Pair:
    return _noise(shape, 1), _noise(shape, 2)


def equal(shape: tuple[int, ...]) -> Pair:
    """Loss and gradient are exactly zero (cosine: to rounding)."""
    return _noise(shape, 1), _noise(shape, 1)


def zero_tokens(shape: tuple[int, ...]) -> Pair:
    """Every third student token and every fourth teacher token is all zeros: no direction."""
    student, teacher = noise(shape)
    student[:, ::3] = 0
    teacher[:, ::4] = 0
    return student, teacher


def rank_one(shape: tuple[int, ...]) -> Pair:
    """All tokens of an image are multiples of one vector."""
    student, teacher = noise(shape)
    return student[:, :1] * student[..., :1], teacher


def dominant_direction(shape: tuple[int, ...]) -> Pair:
    """One direction is 1e3 times the rest, as in ViT-Tiny's and MAE's last blocks."""
    shared = _noise((1, 1, shape[-1]), 3) * 30
    student, teacher = noise(shape)
    return student * 0.03 + shared, teacher * 0.03 + shared


def large(shape: tuple[int, ...]) -> Pair:
    """Values near float16's largest, 65504: squares overflow unless taken in float32."""
    return tuple(x.clamp(-1, 1) * 6e4 for x in noise(shape))  # type: ignore[return-value]


def tiny(shape: tuple[int, ...]) -> Pair:
    """Values among float16's subnormals."""
    return tuple(x * 1e-6 for x in noise(shape))  # type: ignore[return-value]


FINITE: dict[str, Callable[[tuple[int, ...]], Pair]] = {
    case.__name__: case
    for case in (noise, equal, zero_tokens, rank_one, dominant_direction, large, tiny)
}


def _with_values(shape: tuple[int, ...], values: Tensor) -> Tensor:
    """Matrices of random directions with the given singular values."""
    left, _, right = torch.linalg.svd(_noise(shape, 4).double(), full_matrices=False)
    return ((left * values) @ right).float()


def _flat(shape: tuple[int, ...]) -> Tensor:
    return torch.ones(min(shape[-2:]), dtype=torch.float64)


def noise_matrix(shape: tuple[int, ...]) -> Tensor:
    return _noise(shape, 1)


def dominant_value(shape: tuple[int, ...]) -> Tensor:
    """s_1 is 1e3 times the rest, as in ViT-Tiny's and MAE's last blocks."""
    values = _flat(shape)
    values[0] = 1e3
    return _with_values(shape, values)


def power_law(shape: tuple[int, ...]) -> Tensor:
    """s_k = 1 / k: thresholds fall on a slowly falling tail, as in CaiT."""
    return _with_values(shape, 1 / _flat(shape).cumsum(0))


def rank_deficient(shape: tuple[int, ...]) -> Tensor:
    values = _flat(shape)
    values[(len(values) + 2) // 3 :] = 0
    return _with_values(shape, values)


def repeated_values(shape: tuple[int, ...]) -> Tensor:
    """All energies are equal, so that levels may fall on ties."""
    return _with_values(shape, _flat(shape))


def all_zero(shape: tuple[int, ...]) -> Tensor:
    return torch.zeros(shape)


def repeated_token(shape: tuple[int, ...]) -> Tensor:
    """Every token is the same: rank one."""
    return _noise(shape, 1)[..., :1, :].expand(shape).contiguous()


def near_half_limit(shape: tuple[int, ...]) -> Tensor:
    return _noise(shape, 1).clamp(-1, 1) * 6e4


SPECTRA: dict[str, Callable[[tuple[int, ...]], Tensor]] = {
    case.__name__: case
    for case in (
        noise_matrix,
        dominant_value,
        power_law,
        rank_deficient,
        repeated_values,
        all_zero,
        repeated_token,
        near_half_limit,
    )
}


def laid_out(x: Tensor, layout: str) -> Tensor:
    """[B, H, W, D] as an operator's input, [B, N, D] or [B, D, H, W], as models produce them."""
    tokens = x.flatten(1, 2)
    if layout == "tokens":
        return tokens.contiguous()
    if layout == "cls_sliced_off":
        return torch.cat([tokens[:, :1], tokens], dim=1)[:, 1:]
    if layout == "unaligned":  # packs of 8 channels, but not at 16-byte addresses
        padded = torch.cat([tokens.new_zeros(1), tokens.flatten()])
        return padded[1:].view(tokens.shape)
    if layout == "channels_sliced":  # tokens are an odd number of elements apart
        return F.pad(tokens, (0, 1))[..., :-1]
    if layout == "every_other_token":
        return tokens.repeat_interleave(2, dim=1)[:, ::2]
    if layout == "transposed":  # a channels-first map as tokens
        return tokens.mT.contiguous().mT
    if layout == "expanded":
        return tokens[:1].expand(tokens.shape)
    if layout == "channels_first":
        return x.permute(0, 3, 1, 2).contiguous()
    if layout == "channels_last_map":
        return x.contiguous().permute(0, 3, 1, 2)
    assert layout == "cropped"  # rows are not adjacent in memory
    return F.pad(x, (0, 0, 1, 2, 1, 1)).permute(0, 3, 1, 2)[:, :, 1:-1, 1:-2]


TOKEN_LAYOUTS = (
    *("cls_sliced_off", "unaligned", "channels_sliced"),
    *("every_other_token", "transposed", "expanded"),
)
MAP_LAYOUTS = ("channels_first", "channels_last_map", "cropped")


def relative_error(found: Tensor, truth: Tensor) -> float:
    """Norm of the error over the norm of the truth, or the former where the truth is zero."""
    truth = truth.double()
    error, size = (found.double() - truth).norm(), truth.norm()
    return (error / size if size > 0 else error).item()


def signed_bias(found: Tensor, truth: Tensor) -> float:
    """Mean error over the mean size of the truth: rounding averages out, a wrong formula stays."""
    truth = truth.double()
    size = truth.abs().mean()
    return ((found.double() - truth).mean() / size).abs().item() if size > 0 else 0.0


def cosine(found: Tensor, truth: Tensor) -> float:
    """Cosine between two tensors; 1 where both are zero."""
    found, truth = found.double().flatten(), truth.double().flatten()
    sizes = found.norm() * truth.norm()
    if sizes == 0:
        return 1.0 if found.norm() == truth.norm() else math.nan
    return (found @ truth / sizes).item()


def nearest_dtype_error(dtype: torch.dtype, eager: float) -> float:
    """Error allowed: 1e-5 in float32, else twice what eager PyTorch makes in the same dtype."""
    return 1e-5 if dtype == torch.float32 else 2 * eager + 1e-6
