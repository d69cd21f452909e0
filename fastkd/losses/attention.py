"""Attention transfer: where in an image a block's energy lies, whatever its width.

Knows [B, N, D] tokens; grids have been matched before.
"""

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
    r"""Mean squared difference of normalised maps of energy.

    A place n of an image has the energy :math:`q_n = \frac{1}{D} \sum_d |x_{nd}|^p`; over the N
    places of an image the energies make a vector q. With B images,

    .. math:: L = \frac{1}{B N} \sum_b \left\| \frac{q^s_b}{\|q^s_b\|_2}
              - \frac{q^t_b}{\|q^t_b\|_2} \right\|_2^2

    which lies between 0 and 2 / N, so that its weight has to be large: the authors train with 1000
    on the sum over their networks' three stages, 3000 on a mean of three pairs. Source: arXiv
    1612.03928. The formula of the paper (eq. 2) adds up the norms of the differences, not squared,
    and its weight is 1000 over the number of places and images; its code averages the squares over
    images and places, as here. Whether :math:`|x|^p` is summed over channels or averaged makes no
    difference after the normalisation.

    Energies are relative to the largest value of the image, so that no power over- or underflows;
    the normalised map does not change by that. An image of zeros has a map of zeros, and no
    gradient.

    The gradient is made in the forward, a few images at a time: beyond the inputs there are one
    float32 gradient, [B, N, Ds], and temporaries of ``chunk_bytes`` together, or of one image,
    3 N max(Ds, Dt) numbers, where those are larger. Second derivatives are refused.

    Args:
        power: p, at least 1. The larger, the more the strongest places count.
        chunk_bytes: limit of the temporaries; None takes 2 MiB on a CPU, 64 MiB elsewhere.

    Raises:
        ValueError: ``power`` is below 1, where a value of zero would have an infinite gradient, or
            no byte to work with.
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
        """The distance, of [B, N, Ds] and [B, N, Dt] tokens."""
        limit = chunk_limit(student.device, self.chunk_bytes)
        return _attention_transfer(student, teacher, float(self.power), limit)

    def extra_repr(self) -> str:
        """Options, for ``print``."""
        return f"power={self.power}"


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
        del relative  # or it is there beside the next images'
    return total * scale, gradient


def _relative(tokens: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Tokens [c, N, D] over the largest value of their image, and that value, [c, 1, 1].

    That the largest value depends on the tokens is of no matter to gradients: it cancels in a
    normalised map.
    """
    highest, lowest = (f(tokens, dim=(1, 2), keepdim=True) for f in (torch.amax, torch.amin))
    peak = torch.maximum(highest, -lowest).to(dtype)
    peak = torch.where(peak == 0, 1.0, peak)
    return tokens / peak, peak


def _energies(relative: Tensor, power: float) -> Tensor:
    """Mean of |x|^p over channels, [c, N]."""
    if power == 2:  # in one pass
        return torch.linalg.vector_norm(relative, dim=2).square_() / relative.shape[2]
    return relative.abs().pow_(power).mean(dim=2)


def _slope(relative: Tensor, power: float) -> Tensor:
    """|x|^(p - 1), with the sign of x."""
    if power == 2:
        return relative
    return relative.abs().pow_(power - 1).mul_(relative.sign())
