"""Attention transfer: where in an image a block's energy lies, whatever its width.

Knows [B, N, D] tokens; grids have been matched before.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from fastkd.losses.distance import Distance, Grid
from fastkd.ops.precision import at_least_float32


class AttentionTransfer(Distance):
    r"""Mean squared difference of normalised maps of energy.

    A place n of an image has the energy :math:`q_n = \frac{1}{D} \sum_d |x_{nd}|^p`; over the N
    places of an image the energies make a vector q. With B images,

    .. math:: L = \frac{1}{B N} \sum_b \left\| \frac{q^s_b}{\|q^s_b\|_2}
              - \frac{q^t_b}{\|q^t_b\|_2} \right\|_2^2

    which lies between 0 and 2 / N. Source: arXiv 1612.03928. The formula of the paper (eq. 2)
    adds up the norms of the differences, not squared, and its weight is 1000 over the number of
    places and images; its code averages the squares over images and places, as here. Whether
    :math:`|x|^p` is summed over channels or averaged makes no difference after the normalisation.

    Energies are relative to the largest value of the image, so that no power over- or underflows;
    the normalised map does not change by that. An image of zeros has a map of zeros.

    Args:
        power: p, at least 1. The larger, the more the strongest places count.

    Raises:
        ValueError: ``power`` is below 1, where a value of zero would have an infinite gradient.
    """

    equal_widths = False

    def __init__(self, power: float = 2.0) -> None:
        super().__init__()
        if not 1 <= power < math.inf:
            raise ValueError(f"AttentionTransfer: power must be finite and >= 1, got {power}")
        self.power = power

    def compare(self, student: Tensor, teacher: Tensor, grid: Grid | None) -> Tensor:
        """The distance, of [B, N, Ds] and [B, N, Dt] tokens."""
        difference = self.energies(student) - self.energies(teacher)
        return difference.square().sum() / max(1, difference.numel())

    def energies(self, tokens: Tensor) -> Tensor:
        """Normalised map of energy of every image.

        Args:
            tokens: [B, N, D]; any float dtype.

        Returns:
            [B, N] of unit length, at least float32.
        """
        tokens = at_least_float32(tokens)
        peak = tokens.detach().abs().amax(dim=(1, 2), keepdim=True)
        relative = tokens / torch.where(peak == 0, 1.0, peak)
        return F.normalize(relative.abs().pow(self.power).mean(dim=2), dim=1)

    def extra_repr(self) -> str:
        """Options, for ``print``."""
        return f"power={self.power}"
