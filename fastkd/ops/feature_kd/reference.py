"""feature_kd in plain PyTorch: the definition, and the CPU path, a few images at a time.

All maps here are [B, H, W, D] views, with any strides.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from fastkd.ops.checks import power_of_two, wide_dtype

LossName = Literal["mse", "spectral", "smooth_l1", "cosine"]
LOSSES: tuple[LossName, ...] = get_args(LossName)

# Bytes of one temporary: on a CPU small enough for the caches, elsewhere big enough to fill a GPU.
CHUNK_BYTES = 2 << 20
ACCELERATOR_CHUNK_BYTES = 64 << 20


def pool_channels(x: Tensor, channels: int) -> Tensor:
    """Average the D channels of [B, H, W, D] down to ``channels``, by adaptive average pooling."""
    if x.shape[-1] == channels:
        return x
    if x.shape[-1] % channels == 0:
        return x.unflatten(-1, (channels, -1)).mean(dim=-1)
    return F.adaptive_avg_pool1d(x.flatten(0, 2), channels).unflatten(0, x.shape[:3])


def definition(
    student: Tensor, teacher: Tensor, loss: str, beta: float = 1.0, eps: float = 1e-8
) -> Tensor:
    """The distance as the papers write it; differentiable by autograd, in the inputs' dtype."""
    channels = min(student.shape[-1], teacher.shape[-1])
    s, t = pool_channels(student, channels), pool_channels(teacher, channels)
    if loss == "mse":
        return F.mse_loss(s, t)
    if loss == "smooth_l1":
        return F.smooth_l1_loss(s, t, beta=beta)
    if loss == "spectral":
        # rfft2 halves the last of its dimensions: the columns.
        student_spectrum, teacher_spectrum = (
            torch.view_as_real(torch.fft.rfft2(x, dim=(1, 2), norm="ortho")) for x in (s, t)
        )
        return F.mse_loss(student_spectrum, teacher_spectrum)
    # A cosine has no scale, so that each token's may be taken out first: squares do not overflow.
    student_size, teacher_size = (_size(x.detach()) for x in (s, t))
    s, t = s / student_size, t / teacher_size
    short = (s.norm(dim=-1) * student_size[..., 0] < eps) | (
        t.norm(dim=-1) * teacher_size[..., 0] < eps
    )
    directed = ~short | (s * t).sum(dim=-1).isnan()
    # A token without direction is replaced before the division, not after: 0 * inf is NaN.
    s, t = (torch.where(directed[..., None], x, 1.0) for x in (s, t))
    return 1 - (F.cosine_similarity(s, t, dim=-1, eps=0.0) * directed).mean()


def _size(x: Tensor) -> Tensor:
    """[..., 1]: the power of two of each token's largest value; dividing by it rounds nothing."""
    return power_of_two(torch.linalg.vector_norm(x, ord=torch.inf, dim=-1, keepdim=True))


def mean_scale(student: Tensor, teacher: Tensor, loss: str) -> float:
    """What the sum over all elements is multiplied by to give the loss."""
    batch, height, width = student.shape[:3]
    channels = min(student.shape[-1], teacher.shape[-1])
    if loss == "cosine":
        return 1 / (batch * height * width)
    if loss == "spectral":
        return 1 / (4 * batch * channels * height * (width // 2 + 1))
    return 1 / (batch * channels * height * width)


def stats_shape(student: Tensor, loss: str) -> tuple[int, ...]:
    """Shape of what the forward keeps for the backward: [B, H, W, 3] for cosine, else nothing."""
    return (*student.shape[:3], 3) if loss == "cosine" else (0,)


def forward(
    student: Tensor, teacher: Tensor, loss: str, beta: float, eps: float
) -> tuple[Tensor, Tensor]:
    """Loss, and `stats_shape` statistics: see `token_cosines`."""
    dtype = wide_dtype(student, teacher)
    stats = student.new_empty(stats_shape(student, loss), dtype=dtype)
    # Added up as they come: torch's summed losses keep the memory of their whole input alive.
    total = student.new_zeros((), dtype=dtype)
    for chunk in _chunks(student, teacher):
        s, t = _compared(student[chunk], teacher[chunk], dtype)
        if loss == "cosine":
            stats[chunk] = token_cosines(s, t, eps)
        total += distance_sum(s, t, stats[chunk], loss, beta)
    return total * mean_scale(student, teacher, loss), stats


def backward(
    upstream: Tensor,
    student: Tensor,
    teacher: Tensor,
    stats: Tensor,
    loss: str,
    beta: float,
    eps: float,
    for_teacher: bool,
) -> Tensor:
    """``upstream`` times the gradient of the student, or of the teacher.

    All four losses are symmetric, so the teacher's gradient is the student's with the maps swapped.
    """
    own = 2 if for_teacher else 1
    if for_teacher:
        student, teacher = teacher, student
    dtype = wide_dtype(student, teacher)
    gradient = torch.empty_like(student)
    factor = upstream.to(dtype) * mean_scale(student, teacher, loss)
    # Where no cast and no unpooling follow, the slope is written where it belongs at once.
    in_place = gradient.dtype == dtype and student.shape[-1] <= teacher.shape[-1]
    for chunk in _chunks(student, teacher):
        s, t = _compared(student[chunk], teacher[chunk], dtype)
        out = gradient[chunk] if in_place else None
        slope = distance_slope(s, t, stats[chunk], loss, beta, factor, own, out)
        if not in_place:
            gradient[chunk] = _unpool_gradient(slope, student.shape[-1])
    return gradient


def _chunks(student: Tensor, teacher: Tensor) -> Iterator[slice]:
    widest = max(student.shape[-1], teacher.shape[-1])
    image_bytes = student.shape[1:3].numel() * widest * wide_dtype(student, teacher).itemsize
    on_cpu = student.device.type == "cpu"
    step = max(1, (CHUNK_BYTES if on_cpu else ACCELERATOR_CHUNK_BYTES) // image_bytes)
    for first in range(0, student.shape[0], step):
        yield slice(first, first + step)


def _compared(student: Tensor, teacher: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    channels = min(student.shape[-1], teacher.shape[-1])
    s, t = (pool_channels(x.to(dtype), channels) for x in (student, teacher))
    return s, t


def distance_sum(s: Tensor, t: Tensor, stats: Tensor, loss: str, beta: float) -> Tensor:
    """The loss of [B, H, W, D] maps of one width before `mean_scale`; ``stats`` are cosine's."""
    if loss == "cosine":
        return (1 - stats[..., 0]).sum()
    if loss == "smooth_l1":
        return F.smooth_l1_loss(s, t, beta=beta, reduction="sum")
    if loss == "mse":
        return F.mse_loss(s, t, reduction="sum")
    d = s - t
    flat = _rows_in_memory(d).reshape(-1)
    return torch.dot(flat, flat) + _half_row_energy(d)


def distance_slope(
    s: Tensor,
    t: Tensor,
    stats: Tensor,
    loss: str,
    beta: float,
    factor: Tensor | float,
    own: int = 1,
    out: Tensor | None = None,
) -> Tensor:
    """``factor`` times the gradient of `distance_sum` for s; ``out`` may be s itself."""
    if loss == "cosine":
        return _cosine_slope(s, t, stats, own, factor, out)
    if loss == "spectral":
        return _plus_half_row_mean((s - t).mul_(2 * factor), out)
    d = torch.sub(s, t, out=out)
    if loss == "mse":
        return d.mul_(2 * factor)
    if beta > 0:
        return d.div_(beta).clamp_(-1, 1).mul_(factor)
    return torch.where(d.isnan(), d, d.sign(), out=out).mul_(factor)


# Half rows: an even grid row is two interleaved ones (even and odd columns), an odd row is one.
#
# rfft2 keeps the columns 0..W/2: column 0, and W/2 of an even W, whole, and one of each pair of the
# others. The former have the energies of the row sums of d and of (-1)^w d; in terms of half
# rows they add up to the sum over half rows of (sum of d)^2 / length.


def _rows_in_memory(d: Tensor) -> Tensor:
    """[B, H, W, D] as it lies in memory: channels-first differences become [B, D, H, W]."""
    return d.permute(0, 3, 1, 2) if d.stride(2) < d.stride(3) else d


def _membership(d: Tensor) -> Tensor | None:
    """[halves, W] zeros and ones, where the sums are better taken as a product with it, else None.

    Short strided sums along the innermost dimension are slow; a thin matrix product is not.
    """
    rows_innermost = d.stride(2) < d.stride(3)
    if not (rows_innermost and d.device.type == "cpu" and _matmul_is_exact(d.dtype)):
        return None
    halves = 2 - d.shape[2] % 2
    column = torch.arange(d.shape[2], device=d.device)
    half = torch.arange(halves, device=d.device)
    return (column % halves == half[:, None]).to(d.dtype)


def _matmul_is_exact(dtype: torch.dtype) -> bool:
    if dtype == torch.float64:
        return True
    try:
        return torch.get_float32_matmul_precision() == "highest"
    except RuntimeError:  # the user has set precisions per backend
        return False


def _half_rows(d: Tensor) -> Tensor:
    """[B, H, W, D] -> [B, H, length, halves, D]."""
    halves = 2 - d.shape[2] % 2
    return d.unflatten(2, (d.shape[2] // halves, halves))


def _half_row_energy(d: Tensor) -> Tensor:
    """Sum over half rows of (sum of d)^2 / length."""
    membership = _membership(d)
    if membership is None:
        sums = _half_rows(d).sum(dim=2)
    else:
        sums = membership @ _rows_in_memory(d).reshape(-1, d.shape[2]).mT
    return sums.square().sum() * (2 - d.shape[2] % 2) / d.shape[2]


def _plus_half_row_mean(d: Tensor, out: Tensor | None) -> Tensor:
    """The sum of d and its mean over each half row."""
    membership = _membership(d)
    if membership is None:
        rows = _half_rows(d)
        target = None if out is None else _half_rows(out)
        return torch.add(rows, rows.mean(dim=2, keepdim=True), out=target).flatten(2, 3)
    batch, height, width, channels = d.shape
    rows = _rows_in_memory(d).reshape(-1, width)
    sums = membership @ rows.mT
    target = None if out is None else out.permute(0, 3, 1, 2)
    direct = target is not None and target.is_contiguous()
    rows_out = target.view(-1, width) if target is not None and direct else None
    mixed = torch.addmm(rows, sums.mT, membership, alpha=len(membership) / width, out=rows_out)
    result = mixed.view(batch, channels, height, width).permute(0, 2, 3, 1)
    return result if out is None or direct else out.copy_(result)


def token_cosines(s: Tensor, t: Tensor, eps: float) -> Tensor:
    """[..., 3]: cosine, 1 / |s| and 1 / |t| of every token; zeros where one has no direction."""
    student_size, teacher_size = _size(s), _size(t)
    s, t = s / student_size, t / teacher_size
    student_norm, teacher_norm = s.norm(dim=-1), t.norm(dim=-1)
    student_size, teacher_size = student_size.squeeze(-1), teacher_size.squeeze(-1)
    product = (s * t).sum(dim=-1)
    undirected = (student_norm * student_size < eps) | (teacher_norm * teacher_size < eps)
    undirected &= ~product.isnan()  # a NaN shows, also beside a token of zeros
    student_inverse, teacher_inverse = (
        norm.reciprocal().masked_fill(undirected, 0) for norm in (student_norm, teacher_norm)
    )
    cosine = (product * student_inverse * teacher_inverse).masked_fill(undirected, 0)
    inverses = student_inverse / student_size, teacher_inverse / teacher_size
    return torch.stack((cosine, *inverses), dim=-1)


def _cosine_slope(
    s: Tensor, t: Tensor, stats: Tensor, own: int, factor: Tensor | float, out: Tensor | None
) -> Tensor:
    cosine, own_inverse = stats[..., 0:1], stats[..., own : own + 1]
    other_inverse = stats[..., 3 - own : 4 - own]
    # Unit vectors first: the inverses' product may underflow.
    slope = torch.mul(s, cosine * own_inverse, out=out).addcmul_(t, other_inverse, value=-1)
    return slope.mul_(own_inverse * factor)


def _unpool_gradient(slope: Tensor, channels: int) -> Tensor:
    """Spread the gradient of averaged channels over the channels of their windows."""
    pooled = slope.shape[-1]
    if pooled == channels:
        return slope
    if channels % pooled == 0:
        share = channels // pooled
        return (slope / share).repeat_interleave(share, dim=-1)
    # The windows overlap: a channel lies in one window or in two neighboring ones.
    window = torch.arange(pooled, device=slope.device)
    sizes = -(-(window + 1) * channels // pooled) - window * channels // pooled
    shares = slope / sizes
    channel = torch.arange(channels, device=slope.device)
    first = channel * pooled // channels
    last = -(-(channel + 1) * pooled // channels) - 1
    return shares[..., first] + shares[..., last] * (last > first)
