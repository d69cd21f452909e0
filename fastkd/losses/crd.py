"""Contrastive distillation: an image's student embedding finds its own teacher among the batch's.

One embedding an image. Knows torch.distributed only to let the batches of several processes be one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from fastkd.losses.base import Distance, Grid
from fastkd.losses.forward_gradient import (
    check_chunk_bytes,
    chunk_limit,
    empty_gradient,
    gradient_in_forward,
    slices,
    wide_dtype,
    zero_gradient,
)
from fastkd.ops.checks import at_least_float32


class CRD(Distance):
    r"""Symmetric InfoNCE between student and teacher embeddings of the same images.

    With :math:`z_i` the mean of image i's tokens (or its embedding), through a learned linear layer
    of its side, at unit length, and temperature :math:`\tau`,

    .. math:: L = \frac{1}{2 B} \sum_i \left[
              -\log \frac{e^{z^s_i \cdot z^t_i / \tau}}{\sum_j e^{z^s_i \cdot z^t_j / \tau}}
              -\log \frac{e^{z^t_i \cdot z^s_i / \tau}}{\sum_j e^{z^t_i \cdot z^s_j / \tau}} \right]

    log B where nothing is known, and 0 for a batch of one. Idea, heads and temperature (its code's)
    are of arXiv 1910.10699, and so is taking both sides as anchors. What differs: CRD draws 16384
    negatives of other classes from a memory bank of the whole training set and tells them from the
    positive one by one (NCE, with an estimated normaliser), and adds the directions; here the
    negatives are the batch's other images, of whatever class, told apart by one softmax (InfoNCE),
    and the directions are averaged. No bank means no images' indices, no stale embeddings, and
    weights that are not comparable with CRD's; and large batches matter: see ``gather``. Copies of
    one image in a batch (repeated augmentation) are negatives of each other, and pushed apart.

    The teacher's tokens are frozen, its head learns. Both heads are for training only. They compute
    in the dtype of their parameters, whatever that of the tokens.

    The B x B logits exist for a few rows at a time, with their gradient, in the forward: beyond
    [B, dim] tensors there are temporaries of ``chunk_bytes`` together, or of one row, 2 B numbers,
    where that is larger. Second derivatives are refused.

    Without ``gather`` the negatives are the images that one process sees at once: with several
    processes or accumulation, its slice of the batch.

    Args:
        student_dim: the student's channels.
        teacher_dim: the teacher's.
        dim: of the embeddings.
        temperature: :math:`\tau`; smaller ones look at the hardest negatives.
        gather: while training (in train mode, with gradients), take negatives from all processes of
            torch.distributed's default group. All must call the loss equally often, with equally
            many images, as batches of one size do (``drop_last=True``): CPU tensors are checked,
            but with NCCL, where looking would wait for the GPU at every step, other processes hang
            or fail (``TORCH_DISTRIBUTED_DEBUG=DETAIL`` says why). Value and, averaged over
            processes as DDP does, gradients are those of one process with all the images; the
            value is this process' share, whose mean over processes is the whole. Evaluation, whose
            shares may differ in size, takes each process' own images, and is easier for it. Without
            a process group, one process' images are all there are, and nothing changes.
        chunk_bytes: limit of the temporaries; None takes 2 MiB on a CPU, 64 MiB elsewhere.

    Raises:
        ValueError: a width or the temperature is not positive, or no byte to work with.
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
        for name, value in (
            ("student_dim", student_dim),
            ("teacher_dim", teacher_dim),
            ("dim", dim),
        ):
            if value < 1:
                raise ValueError(f"CRD: {name} must be positive, got {value}")
        if not 0 < temperature < math.inf:
            raise ValueError(f"CRD: temperature must be finite and positive, got {temperature}")
        check_chunk_bytes("CRD", chunk_bytes)
        self.student_dim = student_dim
        self.teacher_dim = teacher_dim
        self.student_head = nn.Linear(student_dim, dim)
        self.teacher_head = nn.Linear(teacher_dim, dim)
        self.temperature = temperature
        self.gather = gather
        self.chunk_bytes = chunk_bytes

    def compare(self, student: Tensor, teacher: Tensor, grid: Grid | None) -> Tensor:
        """The loss, of [B, N, Ds] and [B, N, Dt] tokens."""
        self._check_widths(student, teacher)
        sides = _embedding(student, self.student_head), _embedding(teacher, self.teacher_head)
        limit = chunk_limit(student.device, self.chunk_bytes)
        temperature = float(self.temperature)
        all_sides, first = sides, 0
        if self._gathers():
            _check_shares(student)
            all_sides = tuple(_gather_rows(side, _processes()) for side in sides)
            first = dist.get_rank() * len(student)
        forth = _info_nce(sides[0], all_sides[1], first, temperature, limit)
        back = _info_nce(sides[1], all_sides[0], first, temperature, limit)
        return (forth + back) / 2

    def _check_widths(self, student: Tensor, teacher: Tensor) -> None:
        for side, x, width in (
            ("student", student, self.student_dim),
            ("teacher", teacher, self.teacher_dim),
        ):
            if x.shape[-1] != width:
                raise ValueError(
                    f"CRD: {side} must have {side}_dim={width} channels, got {x.shape[-1]}"
                )

    def _gathers(self) -> bool:
        # A loss that nobody has put into eval mode is still no training without gradients.
        training = self.training and torch.is_grad_enabled()
        return self.gather and training and _processes() > 1

    def extra_repr(self) -> str:
        """Options, for ``print``."""
        return f"temperature={self.temperature}, gather={self.gather}"


def _embedding(tokens: Tensor, head: nn.Module) -> Tensor:
    """[B, N, D] tokens -> [B, dim] unit vectors."""
    pooled = tokens.mean(dim=1, dtype=wide_dtype(tokens))
    parameter = next(head.parameters(), pooled)
    return F.normalize(at_least_float32(head(pooled.to(parameter.dtype))), dim=1)


def _processes() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _check_shares(student: Tensor) -> None:
    """Refuse processes with different numbers of images, where a look costs no synchronisation.

    All processes exchange their sizes, whatever their own has been before: had one of them reason
    to ask and another none, they would wait for each other.
    """
    if student.device.type != "cpu" or torch.compiler.is_compiling():
        return
    sizes = torch.empty(_processes(), dtype=torch.long)
    dist.all_gather_into_tensor(sizes, torch.tensor([len(student)]))
    if len(sizes.unique()) > 1:
        raise ValueError(
            "CRD: gather=True needs equally many images in all processes, "
            f"got {sizes.tolist()} (drop_last=True?)"
        )


# Operators, not a torch.autograd.Function: where one has collectives in it, torch.compile of torch
# 2.11 lets the gradient end, silently.
@torch.library.custom_op("fastkd::gather_rows", mutates_args=())
def _gather_rows(own: Tensor, processes: int) -> Tensor:
    """[B, D] of every process, [processes * B, D] in the order of ranks."""
    rows = own.new_empty(processes * len(own), *own.shape[1:])
    dist.all_gather_into_tensor(rows, own.contiguous())  # NCCL takes no other strides
    return rows


@_gather_rows.register_fake
def _(own: Tensor, processes: int) -> Tensor:
    return own.new_empty(processes * len(own), *own.shape[1:])


@torch.library.custom_op("fastkd::sum_own_rows", mutates_args=())
def _sum_own_rows(rows: Tensor, processes: int) -> Tensor:
    """This process' part of [processes * B, D], [B, D], added up over all processes."""
    own = rows.new_empty(len(rows) // processes, *rows.shape[1:])
    dist.reduce_scatter_tensor(own, rows.contiguous())
    return own


@_sum_own_rows.register_fake
def _(rows: Tensor, processes: int) -> Tensor:
    return rows.new_empty(len(rows) // processes, *rows.shape[1:])


def _keep_processes(ctx: Any, inputs: tuple[Tensor, int], output: Tensor) -> None:
    _, ctx.processes = inputs


def _add_up(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
    # Everyone's loss depends on everyone's rows: ours have what all have to say of them.
    return _sum_own_rows(upstream, ctx.processes), None


_gather_rows.register_autograd(_add_up, setup_context=_keep_processes)


def _flops(
    anchors: Sequence[int],
    candidates: Sequence[int],
    first: int,
    temperature: float,
    limit: int,
    needs_gradient: bool,
) -> int:
    products = 3 if needs_gradient else 1
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
    """Mean over A anchors of -log softmax(anchor . candidates / temperature) at the anchor's own.

    Args:
        anchors: [A, D].
        candidates: [C, D]; that of anchor i lies at ``first`` + i.
        first: see there.
        temperature: divides the logits.
        limit: bytes of temporaries.
        needs_gradient: whether to make gradients.

    Returns:
        The loss, the anchors' gradient, the candidates'.
    """
    dtype = wide_dtype(anchors, candidates)
    scale = 1 / max(1, len(anchors))
    total = anchors.new_zeros((), dtype=dtype)
    anchors_gradient = empty_gradient(anchors, dtype, needs_gradient)
    candidates_gradient = zero_gradient(candidates, dtype, needs_gradient)
    # A row of logits, and what logsumexp makes of it on the way.
    for rows in slices(len(anchors), 2 * len(candidates) * dtype.itemsize, limit):
        value, slope = _cross_entropy(
            (anchors[rows] @ candidates.mT).div_(temperature), first + rows.start, needs_gradient
        )
        total += value
        if slope is not None:
            slope.mul_(scale / temperature)
            anchors_gradient[rows] = slope @ candidates
            candidates_gradient.addmm_(slope.mT, anchors[rows])
        del slope  # or it is there beside the next rows' logits
    return total * scale, anchors_gradient, candidates_gradient


def _cross_entropy(logits: Tensor, first: int, needs_slope: bool) -> tuple[Tensor, Tensor | None]:
    """Sum over rows of -log softmax at column ``first`` + row, and its slope, in ``logits``."""
    log_sum = logits.logsumexp(dim=1)
    value = (log_sum - logits.diagonal(first)).sum()
    if not needs_slope:
        return value, None
    probabilities = logits.sub_(log_sum.unsqueeze(1)).exp_()
    probabilities.diagonal(first).sub_(1)  # less the one-hot target: the slope
    return value, probabilities
