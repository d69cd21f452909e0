"""Contrastive distillation between the images of a batch, or of the batches of all processes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastkd.losses.base import POSITIVE, Distance, Grid, check_numbers
from fastkd.losses.relations import check_chunk_bytes, chunk_limit, normalized, slices
from fastkd.ops.checks import at_least_float32, wide_dtype
from fastkd.ops.operator import empty_gradient, gradient_in_forward, operator


class CRD(Distance):
    r"""Symmetric InfoNCE between student and teacher embeddings of the same images.

    With :math:`z_i` the mean of image i's tokens (or its embedding) after a learned linear layer
    per side, scaled to unit length, and temperature :math:`\tau`,

    .. math:: L = \frac{1}{2 B} \sum_i \left[
              -\log \frac{e^{z^s_i \cdot z^t_i / \tau}}{\sum_j e^{z^s_i \cdot z^t_j / \tau}}
              -\log \frac{e^{z^t_i \cdot z^s_i / \tau}}{\sum_j e^{z^t_i \cdot z^s_j / \tau}} \right]

    which is log B for random embeddings. Heads, temperature and both sides as anchors are from
    arXiv 1910.10699, which contrasts 16384 negatives of other classes, from a memory bank, with the
    positive (NCE), and adds the directions. Here the negatives are the batch's other images, of any
    class, and the directions are averaged: weights are not comparable, large batches matter (see
    ``gather``), and copies of an image in a batch (repeated augmentation) are pushed apart.

    Both heads are dropped at inference. Second derivatives are refused.

    Args:
        student_dim: the student's channels.
        teacher_dim: the teacher's channels.
        dim: channels of the embeddings.
        temperature: :math:`\tau`; the smaller, the more the hardest negatives count.
        gather: in training, take negatives from all processes. All must call the loss equally
            often with equally many images (``drop_last=True``); checked for CPU tensors only.
        chunk_bytes: limit of the temporaries, by default 2 MiB on a CPU, 64 MiB elsewhere.
    """

    equal_widths = False
    needs_widths = True
    takes_embeddings = True
    pools_first = True

    def __init__(
        self,
        student_dim: int,
        teacher_dim: int,
        dim: int = 128,
        temperature: float = 0.07,
        gather: bool = False,
        chunk_bytes: int | None = None,
    ) -> None:
        super().__init__()
        check_numbers(self, student_dim=(student_dim, 1), teacher_dim=(teacher_dim, 1))
        check_numbers(self, dim=(dim, 1), temperature=(temperature, POSITIVE))
        check_chunk_bytes(self, chunk_bytes)
        self.student_dim = student_dim
        self.teacher_dim = teacher_dim
        self.student_head = nn.Linear(student_dim, dim)
        self.teacher_head = nn.Linear(teacher_dim, dim)
        self.temperature = temperature
        self.gather = gather
        self.chunk_bytes = chunk_bytes

    def compare(self, student: Tensor, teacher: Tensor, grid: Grid | None) -> Tensor:
        for side, x in (("student", student), ("teacher", teacher)):
            width = getattr(self, f"{side}_dim")
            if x.shape[-1] != width:
                raise ValueError(
                    f"CRD: {side} must have {side}_dim={width} channels, got {x.shape[-1]}"
                )
        sides = _embedding(student, self.student_head), _embedding(teacher, self.teacher_head)
        limit = chunk_limit(student.device, self.chunk_bytes)
        temperature = float(self.temperature)
        all_sides, first = sides, 0
        # Evaluation, whose shares may differ in size, may forget eval mode, but has no gradients.
        if self.gather and self.training and torch.is_grad_enabled() and _processes() > 1:
            _check_shares(student)
            # The mean of the values over processes, and the gradients averaged as DDP does, are
            # those of one process with all images.
            all_sides = tuple(_gather_rows(side, _processes()) for side in sides)
            first = dist.get_rank() * len(student)
        forth = _info_nce(sides[0], all_sides[1], first, temperature, limit)
        back = _info_nce(sides[1], all_sides[0], first, temperature, limit)
        return (forth + back) / 2


def _embedding(tokens: Tensor, head: nn.Module) -> Tensor:
    """Map [B, N, D] tokens to [B, dim] unit vectors."""
    pooled = tokens.mean(dim=1, dtype=wide_dtype(tokens))
    parameter = next(head.parameters(), pooled)
    return normalized(at_least_float32(head(pooled.to(parameter.dtype))))


def _processes() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _check_shares(student: Tensor) -> None:
    """Raise if processes have different numbers of images; only where that does not synchronize."""
    # All processes exchange sizes in every call: if only some did, they would wait for each other.
    if student.device.type != "cpu" or torch.compiler.is_compiling():
        return
    sizes = torch.empty(_processes(), dtype=torch.long)
    dist.all_gather_into_tensor(sizes, torch.tensor([len(student)]))
    if len(sizes.unique()) > 1:
        raise ValueError(
            "CRD: gather=True needs equally many images in all processes, "
            f"got {sizes.tolist()} (drop_last=True?)"
        )


def _sum_own(rows: Tensor, processes: int) -> Tensor:
    own = rows.new_empty(len(rows) // processes, *rows.shape[1:])
    dist.reduce_scatter_tensor(own, rows.contiguous())  # NCCL needs contiguous tensors
    return own


def _gather(own: Tensor, processes: int) -> Tensor:
    rows = own.new_empty(processes * len(own), *own.shape[1:])
    dist.all_gather_into_tensor(rows, own.contiguous())
    return rows


# Operators, not a torch.autograd.Function: around collectives in one, torch.compile of torch 2.11
# silently drops the gradient.
@operator("sum_own_rows", _sum_own)
def _sum_own_rows(rows: Tensor, processes: int) -> Tensor:
    """Sum [processes * B, D] over all processes and take this process's part, [B, D]."""
    return rows.new_empty(len(rows) // processes, *rows.shape[1:])


# The loss of every process depends on the rows of this one.
@operator(
    "gather_rows",
    _gather,
    gradient=lambda needs, upstream, own, processes: [_sum_own_rows(upstream, processes)],
)
def _gather_rows(own: Tensor, processes: int) -> Tensor:
    """Gather [B, D] of every process to [processes * B, D] in the order of ranks."""
    return own.new_empty(processes * len(own), *own.shape[1:])


def _flops(anchors: Sequence[int], candidates: Sequence[int], *options: Any) -> int:
    products = 3 if options[-1] else 1  # with or without the two gradients
    return products * 2 * anchors[0] * candidates[0] * anchors[1]


@gradient_in_forward("info_nce", of=2, flops=_flops)
def _info_nce(
    anchors: Tensor,
    candidates: Tensor,
    first: int,
    temperature: float,
    limit: int,
    needs_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean over anchors [A, D] of -log softmax(anchor . candidates / temperature) at its positive.

    Anchor i's positive is row ``first`` + i of the candidates [C, D].
    """
    dtype = wide_dtype(anchors, candidates)
    scale = 1 / max(1, len(anchors))
    total = anchors.new_zeros((), dtype=dtype)
    anchors_gradient = empty_gradient(anchors, dtype, needs_gradient)
    candidates_gradient = empty_gradient(candidates, dtype, needs_gradient).zero_()
    # Two numbers per logit: logsumexp has a temporary of the same size.
    for rows in slices(len(anchors), 2 * len(candidates) * dtype.itemsize, limit):
        value, slope = _cross_entropy(
            (anchors[rows] @ candidates.mT).div_(temperature), first + rows.start, needs_gradient
        )
        total += value
        if slope is not None:
            slope.mul_(scale / temperature)
            anchors_gradient[rows] = slope @ candidates
            candidates_gradient.addmm_(slope.mT, anchors[rows])
        del slope  # free it before the next rows' logits are allocated
    return total * scale, anchors_gradient, candidates_gradient


def _cross_entropy(logits: Tensor, first: int, needs_slope: bool) -> tuple[Tensor, Tensor | None]:
    """Sum over rows of -log softmax at column ``first`` + row, and its slope, in place."""
    log_sum = logits.logsumexp(dim=1)
    value = (log_sum - logits.diagonal(first)).sum()
    if not needs_slope:
        return value, None
    probabilities = logits.sub_(log_sum.unsqueeze(1)).exp_()
    probabilities.diagonal(first).sub_(1)  # minus the one-hot target
    return value, probabilities
