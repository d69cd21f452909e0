"""Fine-grained manifold distillation: compare the cosine similarities between patches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastkd.losses.base import Distance, Grid, check_numbers, check_weights
from fastkd.losses.relations import (
    before_direction,
    check_chunk_bytes,
    chunk_limit,
    directions,
    slices,
)
from fastkd.ops.checks import wide_dtype
from fastkd.ops.operator import empty_gradient, gradient_in_forward


class ManifoldKD(Distance):
    r"""Squared differences of the cosine similarities between patches.

    With the tokens of both sides normalized to unit length, :math:`R(X) = X X^T`, and
    :math:`\overline{\,\cdot\,}` the mean over a matrix' elements and over the groups,

    .. math:: L = \alpha \, \overline{(R(S_b) - R(T_b))^2}
              + \beta \, \overline{(R(S^n) - R(T^n))^2} + \gamma \, \overline{(R(S_K) - R(T_K))^2}

    - intra-image: the N x N similarities within each of B images;
    - inter-image: the B x B similarities between the images at each of N places;
    - random: the K x K similarities of K different patches drawn from all B N.

    Source: arXiv 2107.01378, with the weights and K of its ImageNet runs. The paper writes squared
    Frobenius norms; its code takes means over the matrices' elements, as here. In eval mode patches
    are evenly spaced instead. Relations are within one process's micro-batch. Second derivatives
    are refused.

    Args:
        intra: weight of the similarities within an image; 0 skips them.
        inter: weight of those between images at a place; 0 skips them.
        random: weight of those between random patches; 0 skips them, and draws none.
        patches: K; all patches where there are fewer.
        chunk_bytes: limit of a temporary, by default 2 MiB on a CPU, 64 MiB elsewhere.
    """

    equal_widths = False

    def __init__(
        self,
        intra: float = 4.0,
        inter: float = 0.1,
        random: float = 0.2,
        patches: int = 192,
        chunk_bytes: int | None = None,
    ) -> None:
        super().__init__()
        check_weights(self, intra=intra, inter=inter, random=random)
        check_numbers(self, patches=(patches, 1))
        check_chunk_bytes(self, chunk_bytes)
        self.intra = intra
        self.inter = inter
        self.random = random
        self.patches = patches
        self.chunk_bytes = chunk_bytes

    def compare(self, student: Tensor, teacher: Tensor, grid: Grid | None) -> Tensor:
        limit = chunk_limit(student.device, self.chunk_bytes)
        drawn = self.draw(student) if self.random else None
        return _manifold_kd(
            student, teacher, drawn, float(self.intra), float(self.inter), float(self.random), limit
        )

    def draw(self, tokens: Tensor) -> Tensor:
        """Choose the patches to compare: at random in training, else evenly spaced.

        Args:
            tokens: [B, N, D].

        Returns:
            min(K, B N) different indices into the B N tokens.
        """
        count = tokens.shape[0] * tokens.shape[1]
        if self.training:
            return torch.randperm(count, device=tokens.device)[: self.patches]
        drawn = min(self.patches, count)
        return torch.arange(drawn, device=tokens.device) * count // max(1, drawn)


def _flops(student: Sequence[int], teacher: Sequence[int], *options: Any) -> int:
    drawn, intra, inter, _, _, needs_gradient = options
    images, places, width = student
    similarities = images * places**2 if intra else 0
    similarities += places * images**2 if inter else 0
    similarities += 0 if drawn is None else drawn[0] ** 2
    return 2 * similarities * ((2 if needs_gradient else 1) * width + teacher[2])


@gradient_in_forward("manifold_kd", flops=_flops)
def _manifold_kd(
    student: Tensor,
    teacher: Tensor,
    drawn: Tensor | None,
    intra: float,
    inter: float,
    random: float,
    limit: int,
    needs_gradient: bool,
) -> tuple[Tensor, Tensor]:
    """(loss, gradient) of [B, N, Ds] and [B, N, Dt] tokens; ``drawn`` indexes all B N."""
    dtype = wide_dtype(student, teacher)
    gradient = empty_gradient(student, dtype, needs_gradient).zero_()
    total = student.new_zeros((), dtype=dtype)
    if intra:
        total += _relations(student, teacher, gradient, intra, limit, needs_gradient)
    if inter:
        places, taught, own = (x.transpose(0, 1) for x in (student, teacher, gradient))
        total += _relations(places, taught, own, inter, limit, needs_gradient)
    if drawn is not None:
        # By two indices: flattening would copy tokens that are a slice of a larger tensor.
        image, place = drawn // student.shape[1], drawn % student.shape[1]
        chosen, taught = (x[image, place].unsqueeze(0) for x in (student, teacher))
        own = empty_gradient(chosen, dtype, needs_gradient).zero_()
        total += _relations(chosen, taught, own, random, limit, needs_gradient)
        if needs_gradient:
            gradient.flatten(0, 1).index_add_(0, drawn, own[0])
    return total, gradient


def _relations(
    student: Tensor,
    teacher: Tensor,
    gradient: Tensor,
    weight: float,
    limit: int,
    needs_gradient: bool,
) -> Tensor:
    """Weighted mean over groups and elements of (S S^T - T T^T)^2, of unit vectors [G, M, D]."""
    dtype = wide_dtype(student, teacher)
    groups, members, width = student.shape
    # A group: its unit vectors, their gradient, and its matrix.
    numbers_each = members * (2 * width + teacher.shape[2] + members)
    total = student.new_zeros((), dtype=dtype)
    scale = weight / max(1, groups * members * members)
    for chunk in slices(groups, numbers_each * dtype.itemsize, limit):
        s, inverse = directions(student[chunk], dtype)
        t, _ = directions(teacher[chunk], dtype)
        slope = empty_gradient(s, dtype, needs_gradient)
        for rows in slices(members, s.shape[0] * members * dtype.itemsize, limit):
            total += _add_rows(s, t, rows, slope, needs_gradient)
        if needs_gradient:
            # Added, because all three kinds of relations share the tokens.
            gradient[chunk].add_(before_direction(slope, s, inverse), alpha=scale)
    return total * scale


def _add_rows(s: Tensor, t: Tensor, rows: slice, slope: Tensor, needs_slope: bool) -> Tensor:
    """Sum of squares of some rows of S S^T - T T^T; writes these rows' gradient to ``slope``."""
    difference = torch.bmm(s[:, rows], s.mT).baddbmm_(t[:, rows], t.mT, alpha=-1)
    if needs_slope:
        # 2 for the square, 2 for symmetry, so a vector needs its own row only.
        slope[:, rows].baddbmm_(difference, s, beta=0, alpha=4)
    flat = difference.view(-1)
    return torch.dot(flat, flat)
