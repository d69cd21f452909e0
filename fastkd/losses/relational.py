"""Relational distillation: how far images lie from each other, and at which angles.

One embedding an image; the B^3 angles of a batch exist for a few of their vertices at a time.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from fastkd.losses.distance import Distance, Grid
from fastkd.losses.forward_gradient import (
    before_direction,
    check_chunk_bytes,
    chunk_limit,
    directions,
    gradient_in_forward,
    slices,
    wide_dtype,
    zero_gradient,
)


class RKD(Distance):
    r"""Distances between pairs of images and angles between triples, by smooth L1.

    With :math:`x_i` the mean of image i's tokens (or its embedding), h smooth L1 with threshold 1,

    .. math::
        L &= \frac{w_d}{B^2} \sum_{ij} h(\delta^s_{ij} - \delta^t_{ij})
           + \frac{w_a}{B^3} \sum_{ijk} h(\cos^s_{ijk} - \cos^t_{ijk}) \\
        \delta_{ij} &= \|x_i - x_j\| / \mu, \qquad
        \cos_{ijk} = \left\langle \frac{x_j - x_i}{\|x_j - x_i\|},
                     \frac{x_k - x_i}{\|x_k - x_i\|} \right\rangle

    where :math:`\mu` is the mean of the batch's distances that are not zero. Source: arXiv
    1904.05068; the weights are those in use for classification. As in its code, the sums run over
    all indices, equal ones included (whose terms are mostly 0), and each side has its own mean.
    The code takes distances from a Gram matrix and keeps those of equal images at 1e-6; here they
    come from differences, are 0, count as zero, and have no gradient. So do angles of which a leg
    has no length. One image alone has no relations: 0, with a gradient of zeros.

    Angles are made for a few vertices i at a time, with their gradient, in the forward: beyond
    [B, D] and [B, B] tensors there are temporaries of ``chunk_bytes`` together, or of one vertex,
    B (2 B + 3 Ds + 2 Dt) numbers, where those are larger. With ``angle_weight`` > 0, second
    derivatives are refused. Products are taken in float32 proper, for differences of angles.

    The relations are those of the images that one process sees at once: with several processes or
    accumulation, of its slice of the batch.

    Args:
        distance_weight: :math:`w_d`; 0 skips distances.
        angle_weight: :math:`w_a`; 0 skips angles.
        chunk_bytes: limit of the temporaries; None takes 2 MiB on a CPU, 64 MiB elsewhere.

    Raises:
        ValueError: weights that are negative, not finite or both zero, or no byte to work with.
    """

    equal_widths = False
    takes_embeddings = True

    def __init__(
        self,
        distance_weight: float = 25.0,
        angle_weight: float = 50.0,
        chunk_bytes: int | None = None,
    ) -> None:
        super().__init__()
        weights = (distance_weight, angle_weight)
        if not all(0 <= weight < math.inf for weight in weights) or not any(weights):
            raise ValueError(
                "RKD: distance_weight and angle_weight must be finite and >= 0, and one of them "
                f"> 0, got {distance_weight}, {angle_weight}"
            )
        check_chunk_bytes("RKD", chunk_bytes)
        self.distance_weight = distance_weight
        self.angle_weight = angle_weight
        self.chunk_bytes = chunk_bytes

    def compare(self, student: Tensor, teacher: Tensor, grid: Grid | None) -> Tensor:
        """The weighted sum of both, of [B, N, Ds] and [B, N, Dt] tokens."""
        dtype = wide_dtype(student, teacher)
        student, teacher = (x.mean(dim=1, dtype=dtype) for x in (student, teacher))
        parts = []
        if self.distance_weight:
            parts.append(self.distance_weight * _distances(student, teacher))
        if self.angle_weight:
            limit = chunk_limit(student.device, self.chunk_bytes)
            parts.append(self.angle_weight * _rkd_angles(student, teacher, limit))
        return torch.stack(parts).sum()

    def extra_repr(self) -> str:
        """Options, for ``print``."""
        return f"distance_weight={self.distance_weight}, angle_weight={self.angle_weight}"


def _distances(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean smooth L1 between the relative distances of [B, Ds] and [B, Dt] embeddings."""
    total = F.smooth_l1_loss(
        _relative_distances(student), _relative_distances(teacher), reduction="sum"
    )
    return total / max(1, len(student) ** 2)


def _relative_distances(x: Tensor) -> Tensor:
    """[B, D] -> [B, B], over the mean of those that are not zero."""
    # Not by a matrix product, which leaves close images a distance made of rounding.
    distance = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist")
    mean = distance.sum() / (distance > 0).sum().clamp(min=1)
    return distance / torch.where(mean == 0, 1.0, mean)


@gradient_in_forward("rkd_angles")
def _rkd_angles(
    student: Tensor, teacher: Tensor, limit: int, needs_gradient: bool
) -> tuple[Tensor, Tensor]:
    """Mean smooth L1 between the cosines of all triples, and the student's gradient."""
    dtype = wide_dtype(student, teacher)
    images = len(student)
    scale = 1 / max(1, images) ** 3
    gradient = zero_gradient(student, dtype, needs_gradient)
    total = student.new_zeros((), dtype=dtype)
    numbers_each = images * (2 * images + 3 * student.shape[1] + 2 * teacher.shape[1])
    for vertices in slices(images, numbers_each * dtype.itemsize, limit):
        own = gradient if needs_gradient else None
        total += _add_angles(student, teacher, vertices, own, 2 * scale)
    return total * scale, gradient


def _add_angles(
    student: Tensor, teacher: Tensor, vertices: slice, gradient: Tensor | None, scale: float
) -> Tensor:
    """Sum of smooth L1 between the [c, B, B] cosines at c vertices; ``gradient`` is added to.

    The gradient of a leg goes to its end and, reversed, to the vertex.
    """
    legs, inverse = _legs(student, vertices)
    difference = torch.bmm(legs, legs.mT)
    teacher_legs, _ = _legs(teacher, vertices)
    difference.baddbmm_(teacher_legs, teacher_legs.mT, alpha=-1)
    clipped = difference.clamp(-1, 1)  # smooth L1 of d is c d - c^2 / 2, and its slope c
    if gradient is not None:
        slope = before_direction(torch.bmm(clipped, legs), legs, inverse).mul_(scale)
        gradient += slope.sum(dim=0)
        gradient[vertices] -= slope.sum(dim=1)
    flat = clipped.view(-1)
    return torch.dot(flat, difference.view(-1)) - torch.dot(flat, flat) / 2


def _legs(x: Tensor, vertices: slice) -> tuple[Tensor, Tensor]:
    """[c, B, D] unit vectors from c vertices to all images, and [c, B, 1] inverse lengths."""
    return directions(x - x[vertices, None], x.dtype)
