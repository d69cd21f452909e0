"""Attention transfer: compare where in an image the energy of token maps lies."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastkd.losses.base import Distance, Grid
from fastkd.losses.forward_gradient import (
    before_direction,
    check_chunk_bytes,
    chunk_limit,
    directions,
    empty_gradient,
    gradient_in_forward,
    slices,
    wide_dtype,
)


class AttentionTransfer(Distance):
    r"""Mean squared difference of normalized energy maps.

    Place n of an image has the energy :math:`q_n = \frac{1}{D} \sum_d |x_{nd}|^p`; the energies of
    the N places form a vector q. With B images,

    .. math:: L = \frac{1}{B N} \sum_b \left\| \frac{q^s_b}{\|q^s_b\|_2}
              - \frac{q^t_b}{\|q^t_b\|_2} \right\|_2^2

    which lies between 0 and 2 / N, so its weight must be large: the authors use 1000 on the sum
    over three stages, which is 3000 on a mean of three pairs. Source: arXiv 1612.03928. Eq. 2 of
    the paper sums norms that are not squared, with weight 1000 / (places times images); its code
    averages squares over images and places, as here. Summing :math:`|x|^p` over channels instead of
    averaging changes nothing after normalization. An image of zeros has a map of zeros and no
    gradient.

    The gradient is computed in the forward, a few images at a time: it allocates one float32
    gradient, [B, N, Ds], and temporaries of ``chunk_bytes`` in total or, if larger, of one image,
    3 N max(Ds, Dt) numbers. Second derivatives are refused.

    Args:
        power: p, at least 1. The larger, the more the strongest places count.
        chunk_bytes: limit of the temporaries; by default 2 MiB on a CPU, 64 MiB elsewhere.

    Raises:
        ValueError: ``power`` is below 1 (a value of zero would have an infinite gradient), or
            ``chunk_bytes`` is not positive.
    """

    equal_widths = False

    def __init__(self, power: float = 2.0, chunk_bytes: int | None = None) -> None:
        super().__init__()
        if not 1 <= power < math.inf:
            raise ValueError(f"AttentionTransfer: power must be finite and >= 1, got {power}")
        check_chunk_bytes("AttentionTransfer", chunk_bytes)
        self.power = power
        self.chunk_bytes = chunk_bytes

    def compare(self, student: Tensor, teacher: Tensor, grid: Grid | None) -> Tensor:
        """Compute the distance of [B, N, Ds] and [B, N, Dt] tokens."""
        limit = chunk_limit(student.device, self.chunk_bytes)
        return _attention_transfer(student, teacher, float(self.power), limit)


@gradient_in_forward("attention_transfer")
def _attention_transfer(
    student: Tensor, teacher: Tensor, power: float, limit: int, needs_gradient: bool
) -> tuple[Tensor, Tensor]:
    """(loss, gradient) of [B, N, Ds] and [B, N, Dt] tokens."""
    dtype = wide_dtype(student, teacher)
    images, places, width = student.shape
    scale = 1 / max(1, images * places)
    gradient = empty_gradient(student, dtype, needs_gradient)
    total = student.new_zeros((), dtype=dtype)
    numbers_each = 3 * places * max(width, teacher.shape[2])
    for chunk in slices(images, numbers_each * dtype.itemsize, limit):
        taught, _ = directions(_energies(_relative(teacher[chunk], dtype)[0], power), dtype)
        relative, peak = _relative(student[chunk], dtype)
        attention, inverse = directions(_energies(relative, power), dtype)
        difference = attention - taught
        total += difference.square().sum()
        if needs_gradient:
            of_energies = before_direction(difference.mul_(2 * scale), attention, inverse)
            of_powers = of_energies.unsqueeze(-1) * (power / width) / peak
            torch.mul(_slope(relative, power), of_powers, out=gradient[chunk])
        del relative  # free it before the next images' is allocated
    return total * scale, gradient


def _relative(tokens: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Divide tokens [c, N, D] by the largest value of their image, and return that, [c, 1, 1]."""
    # So no power over- or underflows. The value cancels in a normalized map, also in its gradient.
    highest, lowest = (f(tokens, dim=(1, 2), keepdim=True) for f in (torch.amax, torch.amin))
    peak = torch.maximum(highest, -lowest).to(dtype)
    peak = torch.where(peak == 0, 1.0, peak)
    return tokens / peak, peak


def _energies(relative: Tensor, power: float) -> Tensor:
    """Average |x|^p over channels, [c, N]."""
    if power == 2:  # in one pass
        return torch.linalg.vector_norm(relative, dim=2).square_() / relative.shape[2]
    return relative.abs().pow_(power).mean(dim=2)


def _slope(relative: Tensor, power: float) -> Tensor:
    """|x|^(p - 1), with the sign of x."""
    if power == 2:
        return relative
    return relative.abs().pow_(power - 1).mul_(relative.sign())
