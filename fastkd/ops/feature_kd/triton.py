"""feature_kd in Triton. Formulas and symbols: reference.py; the CUDA C++ twin: csrc/feature_kd.cu.

Cut: one program takes a few *runs* of one image (a run is a grid row for spectral, else a stretch
of tokens) at BLOCK_C channels, as tiles [BLOCK_T tokens, BLOCK_C channels]. Row sums of spectral
stay inside a tile. Moves: the forward reads each input once and writes one float per program; the
backward reads both and writes the gradient once. No shared memory beyond that of a reduction.
sm_80, sm_90, sm_100, bf16: no spill, at most 128 registers, 168 where pooling windows overlap
(gates of tests/ops/test_feature_kd_compiled.py).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastkd.ops.feature_kd.reference import LOSSES, mean_scale, stats_shape
from fastkd.ops.operator import KernelLaunch

MSE, SPECTRAL, SMOOTH_L1, COSINE = (tl.constexpr(i) for i in range(4))

MAX_WIDTH = 256  # of a grid row that spectral can hold in one tile
TILE = 1024  # elements of each input per tile: 8 per thread, one 16-byte load of bf16; 2048 spills
FINISH_BLOCK = 256
MAX_IMAGES = 65535  # a grid's second and third axis


@triton.jit
def _window_mean(
    base, token_offset, channel, wide, narrow, channel_stride, mask, WINDOW: tl.constexpr
):
    """Tile [BLOCK_T, BLOCK_C] of compared channels: plain values, or means over pooling windows."""
    if WINDOW == 1:
        offset = token_offset + channel[None, :] * channel_stride
        return tl.load(base + offset, mask=mask, other=0.0).to(tl.float32)
    start = channel * wide // narrow
    end = ((channel + 1) * wide + narrow - 1) // narrow
    total = tl.zeros(mask.shape, dtype=tl.float32)
    for step in tl.static_range(WINDOW):
        source = start + step
        inside = mask & (source < end)[None, :]
        offset = token_offset + source[None, :] * channel_stride
        total += tl.load(base + offset, mask=inside, other=0.0).to(tl.float32)
    return total / (end - start).to(tl.float32)[None, :]


@triton.jit
def _half_row_sums(d, token, PARITY: tl.constexpr):
    """[BLOCK_C]: sum over the tokens of one parity; padded tokens are zero."""
    return tl.sum(tl.where((token % 2 == PARITY)[:, None], d, 0.0), axis=0)


@triton.jit
def _difference_forward(
    student, teacher, partials,
    run_length, tokens, channels, student_channels, teacher_channels,
    student_batch, student_run, student_token, student_channel,
    teacher_batch, teacher_run, teacher_token, teacher_channel,
    beta, inverse_half_row,
    LOSS: tl.constexpr, EVEN_ROWS: tl.constexpr, RUNS: tl.constexpr,
    STUDENT_WINDOW: tl.constexpr, TEACHER_WINDOW: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    image = tl.program_id(2).to(tl.int64)
    student += image * student_batch
    teacher += image * teacher_batch
    token = tl.arange(0, BLOCK_T)
    channel = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    elements = tl.zeros([BLOCK_T, BLOCK_C], dtype=tl.float32)
    rows = tl.zeros([BLOCK_C], dtype=tl.float32)
    for step in range(RUNS):
        run = tl.program_id(1) * RUNS + step
        inside = (token < run_length) & (run * run_length + token < tokens)
        mask = inside[:, None] & (channel < channels)[None, :]
        s = _window_mean(
            student, run * student_run + token[:, None] * student_token,
            channel, student_channels, channels, student_channel, mask, STUDENT_WINDOW,
        )  # fmt: skip
        t = _window_mean(
            teacher, run * teacher_run + token[:, None] * teacher_token,
            channel, teacher_channels, channels, teacher_channel, mask, TEACHER_WINDOW,
        )  # fmt: skip
        d = s - t
        if LOSS == SMOOTH_L1:
            size = tl.abs(d)
            # Where d = beta = 0 the parabola is 0 / 0, but it is not taken there.
            curve = tl.where(size < beta, 0.5 * d * d / beta, size - 0.5 * beta)
            elements += tl.where(mask, curve, 0.0)
        else:
            elements += d * d
        if LOSS == SPECTRAL:
            if EVEN_ROWS:
                even = _half_row_sums(d, token, 0)
                odd = _half_row_sums(d, token, 1)
                rows += even * even + odd * odd
            else:
                whole = tl.sum(d, axis=0)
                rows += whole * whole
    total = tl.sum(tl.sum(elements, axis=0) + rows * inverse_half_row, axis=0)
    program = (image * tl.num_programs(1) + tl.program_id(1)) * tl.num_programs(0) + tl.program_id(
        0
    )
    tl.store(partials + program, total)


@triton.jit
def rescaling(square):
    """Powers of two to scale tokens by, of which float32 does not hold the sum of squares."""
    large, small = 1.2089258e24, 1.2676506e30  # 2^80, 2^100
    return tl.where(square > 1e36, 1.0 / large, tl.where(square < 1e-30, small, 1.0))


@triton.jit
def needs_rescaling(student_square, teacher_square, eps):
    """Whether a token must be scaled. Small ones count where eps lets them have a direction."""
    too_large = (student_square > 1e36) | (teacher_square > 1e36)
    return (tl.max(too_large.to(tl.int32), axis=0) > 0) | (eps < 1e-15)


@triton.jit
def cosine_of_sums(dot, student_square, teacher_square, student_scale, teacher_scale, eps):
    """Cosine and inverse norms of tokens, from the sums over their scaled channels."""
    student_norm = tl.sqrt(student_square)
    teacher_norm = tl.sqrt(teacher_square)
    # A NaN shows, also beside a token of zeros.
    short = (student_norm < eps * student_scale) | (teacher_norm < eps * teacher_scale)
    undirected = short & (dot == dot)
    student_inverse = tl.where(undirected, 0.0, 1.0 / student_norm)
    teacher_inverse = tl.where(undirected, 0.0, 1.0 / teacher_norm)
    cosine = tl.where(undirected, 0.0, dot * student_inverse * teacher_inverse)
    return cosine, student_inverse * student_scale, teacher_inverse * teacher_scale


@triton.jit
def _cosine_sums(
    student, teacher, walk, student_scale, teacher_scale,
    STUDENT_WINDOW: tl.constexpr, TEACHER_WINDOW: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """[BLOCK_T] each: s t, s s and t t of scaled tokens, summed over the channels."""
    (
        run, token, inside, channels, student_channels, teacher_channels,
        student_run, student_token, student_channel, teacher_run, teacher_token, teacher_channel,
    ) = walk  # fmt: skip
    dot = tl.zeros([BLOCK_T], dtype=tl.float32)
    student_square = tl.zeros([BLOCK_T], dtype=tl.float32)
    teacher_square = tl.zeros([BLOCK_T], dtype=tl.float32)
    for first in range(0, channels, BLOCK_C):
        channel = first + tl.arange(0, BLOCK_C)
        mask = inside[:, None] & (channel < channels)[None, :]
        s = _window_mean(
            student, run * student_run + token[:, None] * student_token,
            channel, student_channels, channels, student_channel, mask, STUDENT_WINDOW,
        )  # fmt: skip
        t = _window_mean(
            teacher, run * teacher_run + token[:, None] * teacher_token,
            channel, teacher_channels, channels, teacher_channel, mask, TEACHER_WINDOW,
        )  # fmt: skip
        s *= student_scale[:, None]
        t *= teacher_scale[:, None]
        dot += tl.sum(s * t, axis=1)
        student_square += tl.sum(s * s, axis=1)
        teacher_square += tl.sum(t * t, axis=1)
    return dot, student_square, teacher_square


@triton.jit
def _cosine_forward(
    student, teacher, stats, partials,
    run_length, tokens, channels, student_channels, teacher_channels,
    student_batch, student_run, student_token, student_channel,
    teacher_batch, teacher_run, teacher_token, teacher_channel,
    eps,
    STUDENT_WINDOW: tl.constexpr, TEACHER_WINDOW: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    image = tl.program_id(1).to(tl.int64)
    run = tl.program_id(0)
    student += image * student_batch
    teacher += image * teacher_batch
    token = tl.arange(0, BLOCK_T)
    position = run * run_length + token
    inside = (token < run_length) & (position < tokens)
    walk = (
        run, token, inside, channels, student_channels, teacher_channels,
        student_run, student_token, student_channel, teacher_run, teacher_token, teacher_channel,
    )  # fmt: skip
    one = tl.full([BLOCK_T], 1.0, dtype=tl.float32)
    dot, student_square, teacher_square = _cosine_sums(
        student, teacher, walk, one, one, STUDENT_WINDOW, TEACHER_WINDOW, BLOCK_T, BLOCK_C
    )
    student_scale, teacher_scale = rescaling(student_square), rescaling(teacher_square)
    if needs_rescaling(student_square, teacher_square, eps):
        dot, student_square, teacher_square = _cosine_sums(
            student, teacher, walk, student_scale, teacher_scale,
            STUDENT_WINDOW, TEACHER_WINDOW, BLOCK_T, BLOCK_C,
        )  # fmt: skip
    else:
        student_scale, teacher_scale = one, one
    cosine, student_inverse, teacher_inverse = cosine_of_sums(
        dot, student_square, teacher_square, student_scale, teacher_scale, eps
    )
    stat = stats + (image * tokens + position) * 3
    tl.store(stat, cosine, mask=inside)
    tl.store(stat + 1, student_inverse, mask=inside)
    tl.store(stat + 2, teacher_inverse, mask=inside)
    total = tl.sum(tl.where(inside, 1.0 - cosine, 0.0), axis=0)
    tl.store(partials + image * tl.num_programs(0) + run, total)


@triton.jit
def _finish(partials, loss, count, scale, BLOCK: tl.constexpr):
    """Adds the partial sums in a fixed order: one program, BLOCK strided sums, then a tree."""
    place = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for first in range(0, count, BLOCK):
        total += tl.load(partials + first + place, mask=first + place < count, other=0.0)
    tl.store(loss, tl.sum(total, axis=0) * scale)


@triton.jit
def _gradient(
    student, teacher, stats, upstream, gradient,
    run_length, tokens, channels, student_channels, teacher_channels,
    student_batch, student_run, student_token, student_channel,
    teacher_batch, teacher_run, teacher_token, teacher_channel,
    gradient_batch, gradient_run, gradient_token, gradient_channel,
    beta, inverse_half_row, scale,
    LOSS: tl.constexpr, EVEN_ROWS: tl.constexpr, RUNS: tl.constexpr, OWN: tl.constexpr,
    STUDENT_WINDOW: tl.constexpr, TEACHER_WINDOW: tl.constexpr, COVERING: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Gradient of the student. A channel of a pooled map lies in up to COVERING windows."""
    image = tl.program_id(2).to(tl.int64)
    student += image * student_batch
    teacher += image * teacher_batch
    gradient += image * gradient_batch
    token = tl.arange(0, BLOCK_T)
    own = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)  # channel of the gradient
    first = own * channels // student_channels
    last = ((own + 1) * channels + student_channels - 1) // student_channels - 1
    factor = tl.load(upstream).to(tl.float32) * scale
    for step in range(RUNS):
        run = tl.program_id(1) * RUNS + step
        position = run * run_length + token
        inside = (token < run_length) & (position < tokens)
        value = tl.zeros([BLOCK_T, BLOCK_C], dtype=tl.float32)
        for cover in tl.static_range(COVERING):
            channel = first + cover
            mask = inside[:, None] & ((own < student_channels) & (channel <= last))[None, :]
            s = _window_mean(
                student, run * student_run + token[:, None] * student_token,
                channel, student_channels, channels, student_channel, mask, STUDENT_WINDOW,
            )  # fmt: skip
            t = _window_mean(
                teacher, run * teacher_run + token[:, None] * teacher_token,
                channel, teacher_channels, channels, teacher_channel, mask, TEACHER_WINDOW,
            )  # fmt: skip
            if LOSS == COSINE:
                stat = stats + (image * tokens + position) * 3
                cosine = tl.load(stat, mask=inside, other=0.0)
                own_inverse = tl.load(stat + OWN, mask=inside, other=0.0)
                other_inverse = tl.load(stat + 3 - OWN, mask=inside, other=0.0)
                # Unit vectors first: the inverses' product may underflow.
                slope = s * (cosine * own_inverse)[:, None] - t * other_inverse[:, None]
                slope *= own_inverse[:, None]
            else:
                d = s - t
                slope = 2.0 * d
                if LOSS == SMOOTH_L1:
                    line = tl.where(d > 0.0, 1.0, tl.where(d < 0.0, -1.0, d))
                    slope = tl.where(tl.abs(d) < beta, d / beta, line)
                if LOSS == SPECTRAL:
                    if EVEN_ROWS:
                        even = _half_row_sums(d, token, 0)
                        odd = _half_row_sums(d, token, 1)
                        parity = (token % 2 == 0)[:, None]
                        row = tl.where(parity, even[None, :], odd[None, :])
                    else:
                        row = tl.sum(d, axis=0)[None, :]
                    slope += 2.0 * inverse_half_row * row
            window_start = channel * student_channels // channels
            window_end = ((channel + 1) * student_channels + channels - 1) // channels
            share = factor / (window_end - window_start).to(tl.float32)
            value += tl.where(mask, slope * share[None, :], 0.0)
        offset = (
            run * gradient_run + token[:, None] * gradient_token + own[None, :] * gradient_channel
        )
        mask = inside[:, None] & (own < student_channels)[None, :]
        tl.store(gradient + offset, value.to(gradient.dtype.element_ty), mask=mask)


@dataclass(frozen=True)
class Cut:
    """How the maps are cut into runs and tiles."""

    run_length: int
    runs: int
    by_rows: bool
    runs_per_program: int
    block_tokens: int
    block_channels: int

    def grid(self, batch: int, channels: int) -> tuple[int, int, int]:
        """Programs over (channel blocks, blocks of runs, images)."""
        return (
            triton.cdiv(channels, self.block_channels),
            triton.cdiv(self.runs, self.runs_per_program),
            batch,
        )


def cut(loss: str, *maps: Tensor) -> Cut:
    """Runs and tiles for maps [B, H, W, D] that are walked together."""
    height, width = maps[0].shape[1:3]
    channels = max(x.shape[-1] for x in maps)
    channels_first = maps[0].stride(3) > maps[0].stride(2)
    by_rows = loss == "spectral" or not all(_rows_are_adjacent(x) for x in maps)
    if by_rows:
        run_length, block_tokens = width, max(2, triton.next_power_of_2(width))
    else:
        run_length = block_tokens = 64 if channels_first else 16
    runs = height if by_rows else triton.cdiv(height * width, run_length)
    block_channels = min(triton.next_power_of_2(channels), max(TILE // block_tokens, 8))
    # Channels-first rows share cache lines with their neighbors: one program takes them all.
    runs_per_program = min(runs, 8 if channels_first else 4)
    return Cut(run_length, runs, by_rows, runs_per_program, block_tokens, block_channels)


def refuses(student: Tensor, teacher: Tensor, loss: str) -> str | None:
    """Why these inputs cannot run here; None where they can."""
    rows = loss == "spectral" or not all(_rows_are_adjacent(x) for x in (student, teacher))
    if rows and student.shape[2] > MAX_WIDTH:
        return f"a grid row must have at most {MAX_WIDTH} tokens, got {student.shape[2]}"
    if student.shape[0] > MAX_IMAGES:
        return f"at most {MAX_IMAGES} images, got {student.shape[0]}"
    for name, x in (("student", student), ("teacher", teacher)):
        image = zip(x.shape[1:], x.stride()[1:], strict=True)
        if sum((size - 1) * stride for size, stride in image) >= 2**31:
            return f"an image of {name} spans more than 2^31 elements of memory"
    return None


def forward(
    student: Tensor, teacher: Tensor, loss: str, beta: float, eps: float
) -> tuple[Tensor, Tensor]:
    """As `reference.forward`; two launches, no synchronization."""
    loss_value = student.new_empty((), dtype=torch.float32)
    stats = student.new_empty(stats_shape(student, loss), dtype=torch.float32)
    for launch in forward_launches(student, teacher, loss, beta, eps, loss_value, stats):
        launch.run()
    return loss_value, stats


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
    """As `reference.backward`; one launch, no synchronization."""
    gradient = torch.empty_like(teacher if for_teacher else student)
    backward_launch(upstream, student, teacher, stats, loss, beta, for_teacher, gradient).run()
    return gradient


def forward_launches(
    student: Tensor,
    teacher: Tensor,
    loss: str,
    beta: float,
    eps: float,
    loss_value: Tensor,
    stats: Tensor,
) -> list[KernelLaunch]:
    """The forward's launches: partial sums (and cosine's statistics), then their sum."""
    plan = cut(loss, student, teacher)
    channels = min(student.shape[-1], teacher.shape[-1])
    grid: tuple[int, ...] = plan.grid(student.shape[0], channels)
    kernel, constants = _difference_forward, _kind(loss, student, plan)
    own: dict[str, Any] = {"beta": beta, "inverse_half_row": _inverse_half_row(student)}
    if loss == "cosine":
        grid = (plan.runs, student.shape[0])
        kernel, constants, own = _cosine_forward, {}, {"stats": stats, "eps": eps}
    partials = student.new_empty(math.prod(grid), dtype=torch.float32)
    first = KernelLaunch(
        kernel,
        grid,
        {"partials": partials, **_walk(plan, student, teacher, channels), **own},
        {
            **constants,
            **_windows(student, teacher, channels),
            "BLOCK_T": plan.block_tokens,
            "BLOCK_C": plan.block_channels,
        },
    )
    return [first, finish_launch(partials, loss_value, mean_scale(student, teacher, loss))]


def finish_launch(partials: Tensor, loss_value: Tensor, scale: float) -> KernelLaunch:
    """The launch that adds the partial sums and scales them."""
    return KernelLaunch(
        _finish,
        (1,),
        {"partials": partials, "loss": loss_value, "count": partials.numel(), "scale": scale},
        {"BLOCK": FINISH_BLOCK},
    )


def backward_launch(
    upstream: Tensor,
    student: Tensor,
    teacher: Tensor,
    stats: Tensor,
    loss: str,
    beta: float,
    for_teacher: bool,
    gradient: Tensor,
) -> KernelLaunch:
    """The backward's launch; the losses are symmetric, so the teacher's swaps the maps."""
    if for_teacher:
        student, teacher = teacher, student
    plan = cut(loss, student, teacher, gradient)
    channels = min(student.shape[-1], teacher.shape[-1])
    wide = student.shape[-1]
    return KernelLaunch(
        _gradient,
        plan.grid(student.shape[0], wide),
        {
            "stats": stats,
            "upstream": upstream,
            "gradient": gradient,
            **_walk(plan, student, teacher, channels),
            **_strides("gradient", gradient, plan),
            "beta": beta,
            "inverse_half_row": _inverse_half_row(student),
            "scale": mean_scale(student, teacher, loss),
        },
        {
            **_kind(loss, student, plan),
            **_windows(student, teacher, channels),
            "OWN": 2 if for_teacher else 1,
            "COVERING": 1 if wide % channels == 0 else 2,
            "BLOCK_T": plan.block_tokens,
            "BLOCK_C": plan.block_channels,
        },
    )


def _rows_are_adjacent(x: Tensor) -> bool:
    return x.shape[1] == 1 or x.stride(1) == x.shape[2] * x.stride(2)


def _inverse_half_row(x: Tensor) -> float:
    width = x.shape[2]
    return 2 / width if width % 2 == 0 else 1 / width


def _kind(loss: str, x: Tensor, plan: Cut) -> dict[str, int | bool]:
    return {
        "LOSS": LOSSES.index(loss),
        "EVEN_ROWS": x.shape[2] % 2 == 0,
        "RUNS": plan.runs_per_program,
    }


def _windows(student: Tensor, teacher: Tensor, channels: int) -> dict[str, int]:
    def longest(wide: int) -> int:
        return wide // channels if wide % channels == 0 else wide // channels + 2

    return {
        "STUDENT_WINDOW": longest(student.shape[-1]),
        "TEACHER_WINDOW": longest(teacher.shape[-1]),
    }


def _strides(name: str, x: Tensor, plan: Cut) -> dict[str, int]:
    run = x.stride(1) if plan.by_rows else plan.run_length * x.stride(2)
    return {
        f"{name}_batch": x.stride(0),
        f"{name}_run": run,
        f"{name}_token": x.stride(2),
        f"{name}_channel": x.stride(3),
    }


def _walk(plan: Cut, student: Tensor, teacher: Tensor, channels: int) -> dict[str, Tensor | int]:
    return {
        "student": student,
        "teacher": teacher,
        "run_length": plan.run_length,
        "tokens": student.shape[1] * student.shape[2],
        "channels": channels,
        "student_channels": student.shape[-1],
        "teacher_channels": teacher.shape[-1],
        **_strides("student", student, plan),
        **_strides("teacher", teacher, plan),
    }
