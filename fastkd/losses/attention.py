"""Attention transfer: compare where in an image the energy of token maps lies."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from fastkd.losses.base import Distance, Grid, check_numbers
from fastkd.ops.checks import at_least_float32


class AttentionTransfer(Distance):
    r"""Mean squared difference of normalized energy maps.

    Place n of an image has the energy :math:`q_n = \frac{1}{D} \sum_d |x_{nd}|^p`; the energies of
    the N places form a vector q. With B images,

    .. math:: L = \frac{1}{B N} \sum_b \left\| \frac{q^s_b}{\|q^s_b\|_2}
              - \frac{q^t_b}{\|q^t_b\|_2} \right\|_2^2

    Source: arXiv 1612.03928, following its code; the paper's eq. 2 sums norms without squares.

    Args:
        power: p, at least 1 (below, a value of zero would have an infinite gradient). The larger,
            the more the strongest places count.
    """

    equal_widths = False

    def __init__(self, power: float = 2.0) -> None:
        super().__init__()
        check_numbers(self, power=(power, 1.0))
        self.power = power

    def compare(self, student: Tensor, teacher: Tensor, grid: Grid | None) -> Tensor:
        # Plain PyTorch, whose saved tensors torch.compile fuses away.
        difference = _energy_map(student, self.power) - _energy_map(teacher, self.power)
        return difference.square().sum() / max(1, difference.numel())  # an empty batch gives 0


def _energy_map(tokens: Tensor, power: float) -> Tensor:
    """[B, N] energies of unit length."""
    tokens = at_least_float32(tokens)
    # By the largest value of the image, so that no power over- or underflows. It cancels in a
    # normalized map, also in its gradient, and so is taken for a constant.
    largest = tokens.detach().abs().amax(dim=(1, 2), keepdim=True)
    relative = tokens / largest.masked_fill(largest == 0, 1)
    return F.normalize(relative.abs().pow(power).mean(dim=2), dim=1)
