"""Relational distillation: compare the distances and angles between the images of a batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastkd.losses.base import Distance, Grid, check_weights
from fastkd.losses.relations import (
    SHORTEST,
    before_direction,
    check_chunk_bytes,
    chunk_limit,
    directions,
    normalized,
    slices,
)
from fastkd.ops.checks import wide_dtype
from fastkd.ops.operator import empty_gradient, gradient_in_forward


class RKD(Distance):
    r"""Distances between pairs of images and angles between triples, by smooth L1.

    With :math:`x_i` the mean of image i's tokens (or its embedding), h smooth L1 with threshold 1,

    .. math::
        L &= \frac{w_d}{B^2} \sum_{ij} h(\delta^s_{ij} - \delta^t_{ij})
           + \frac{w_a}{B^3} \sum_{ijk} h(\cos^s_{ijk} - \cos^t_{ijk}) \\
        \delta_{ij} &= \|x_i - x_j\| / \mu, \qquad
        \cos_{ijk} = \left\langle \frac{x_j - x_i}{\|x_j - x_i\|},
                     \frac{x_k - x_i}{\|x_k - x_i\|} \right\rangle

    where :math:`\mu` is the mean of a side's nonzero distances. Source: arXiv 1904.05068, with the
    weights commonly used for classification. The authors' code clamps distances of equal images to
    1e-6; here they are 0 and have no gradient, like angles with a leg of length 0. Relations are
    within one process's micro-batch. Second derivatives are refused.

    Args:
        distance_weight: :math:`w_d`; 0 skips distances.
        angle_weight: :math:`w_a`; 0 skips angles.
        normalize: scale embeddings to unit length first, like the authors' classification script.
        chunk_bytes: limit of the temporaries, by default 2 MiB on a CPU, 64 MiB elsewhere.
    """

    equal_widths = False
    takes_embeddings = True
    pools_first = True

    def __init__(
        self,
        distance_weight: float = 25.0,
        angle_weight: float = 50.0,
        normalize: bool = False,
        chunk_bytes: int | None = None,
    ) -> None:
        super().__init__()
        check_weights(self, distance_weight=distance_weight, angle_weight=angle_weight)
        check_chunk_bytes(self, chunk_bytes)
        self.distance_weight = distance_weight
        self.angle_weight = angle_weight
        self.normalize = normalize
        self.chunk_bytes = chunk_bytes

    def compare(self, student: Tensor, teacher: Tensor, grid: Grid | None) -> Tensor:
        dtype = wide_dtype(student, teacher)
        student, teacher = (x.mean(dim=1, dtype=dtype) for x in (student, teacher))
        if self.normalize:
            student, teacher = (normalized(x) for x in (student, teacher))
        limit = chunk_limit(student.device, self.chunk_bytes)
        parts = []
        if self.distance_weight:
            parts.append(self.distance_weight * _rkd_distances(student, teacher, limit))
        if self.angle_weight:
            parts.append(self.angle_weight * _rkd_angles(student, teacher, limit))
        return torch.stack(parts).sum()


def _distance_flops(student: Sequence[int], *options: Any) -> int:
    images, width = student
    return 4 * images**2 * width if options[-1] else 0  # products in the gradient only


@gradient_in_forward("rkd_distances", flops=_distance_flops)
def _rkd_distances(
    student: Tensor, teacher: Tensor, limit: int, needs_gradient: bool
) -> tuple[Tensor, Tensor]:
    """Mean smooth L1 between the relative distances of all pairs, and the student's gradient."""
    # With the slopes c of smooth L1 and distances d of sum T and mean m, the gradient of a distance
    # is (c - (sum of c d) / T) / m; the second part comes through the mean.
    images, width = student.shape
    scale = 1 / max(1, images) ** 2
    whole, mean = _sum_and_mean(student, limit)
    _, teacher_mean = _sum_and_mean(teacher, limit)
    gradient, by_mean = (empty_gradient(student, student.dtype, needs_gradient) for _ in range(2))
    total, along = (student.new_zeros(()) for _ in range(2))
    numbers_each = images * (width + 7)
    for vertices in slices(images, numbers_each * student.itemsize, limit):
        lengths = _lengths(student, vertices)
        value, slope = _smooth_l1(lengths / mean - _lengths(teacher, vertices) / teacher_mean)
        total += value
        if needs_gradient:
            along += torch.dot(slope.view(-1), lengths.view(-1))
            # Each pair occurs in the rows of both ends, so a vertex needs its own row only.
            inverse = lengths.reciprocal().masked_fill_(lengths < SHORTEST, 0)
            pulls = torch.stack((slope * inverse, inverse), dim=1)
            pulled = pulls @ (student - student[vertices, None])
            gradient[vertices], by_mean[vertices] = pulled.unbind(dim=1)
    gradient.sub_(by_mean.mul_(along / whole)).mul_(-2 * scale / mean)
    return total * scale, gradient


def _sum_and_mean(x: Tensor, limit: int) -> tuple[Tensor, Tensor]:
    """Sum and mean of the nonzero distances between [B, D] embeddings; 1 where all are zero."""
    total, count = (x.new_zeros(()) for _ in range(2))
    for vertices in slices(len(x), 2 * len(x) * x.itemsize, limit):
        lengths = _lengths(x, vertices)
        total += lengths.sum()
        count += lengths.count_nonzero()
    total = torch.where(total == 0, 1.0, total)
    return total, total / count.clamp(min=1)


def _lengths(x: Tensor, vertices: slice) -> Tensor:
    """[c, B] distances from c vertices to all images."""
    # Not by a matrix product, in which the distance of close images would be rounding error.
    return torch.cdist(x[vertices], x, compute_mode="donot_use_mm_for_euclid_dist")


def _angle_flops(student: Sequence[int], teacher: Sequence[int], *options: Any) -> int:
    images, width = student
    return 2 * images**3 * ((2 if options[-1] else 1) * width + teacher[1])


@gradient_in_forward("rkd_angles", flops=_angle_flops)
def _rkd_angles(
    student: Tensor, teacher: Tensor, limit: int, needs_gradient: bool
) -> tuple[Tensor, Tensor]:
    """Mean smooth L1 between the cosines of all triples, and the student's gradient."""
    images, width = student.shape
    scale = 1 / max(1, images) ** 3
    gradient = empty_gradient(student, student.dtype, needs_gradient).zero_()
    total = student.new_zeros(())
    numbers_each = images * (2 * images + 3 * width + 2 * teacher.shape[1])
    for vertices in slices(images, numbers_each * student.itemsize, limit):
        legs, inverse = _legs(student, vertices)
        value, slope = _smooth_l1(_cosine_differences(legs, teacher, vertices))
        total += value
        if needs_gradient:
            # Twice, because a cosine has two legs. A leg's gradient goes to its end, and with the
            # opposite sign to the vertex.
            pull = before_direction(slope @ legs, legs, inverse).mul_(2 * scale)
            gradient += pull.sum(dim=0)
            gradient[vertices] -= pull.sum(dim=1)
        del slope  # free it before the next images' is allocated
    return total * scale, gradient


def _cosine_differences(legs: Tensor, teacher: Tensor, vertices: slice) -> Tensor:
    """[c, B, B] cosines of the student's legs, less those of the teacher's."""
    taught, _ = _legs(teacher, vertices)
    return torch.bmm(legs, legs.mT).baddbmm_(taught, taught.mT, alpha=-1)


def _legs(x: Tensor, vertices: slice) -> tuple[Tensor, Tensor]:
    """[c, B, D] unit vectors from c vertices to all images, and [c, B, 1] inverse lengths."""
    return directions(x - x[vertices, None], x.dtype)


def _smooth_l1(difference: Tensor) -> tuple[Tensor, Tensor]:
    """Sum of smooth L1 over all elements, and its slope at each."""
    slope = difference.clamp(-1, 1)
    flat = slope.view(-1)  # smooth L1 of d is c d - c^2 / 2, with c its slope
    return torch.dot(flat, difference.view(-1)) - torch.dot(flat, flat) / 2, slope
