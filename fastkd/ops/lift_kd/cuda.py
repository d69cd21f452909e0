"""lift_kd by csrc/lift_kd.cu: schemas of its raw operators, their limits and buffers.

A tensor without elements stands for an absent one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fastkd.ops.feature_kd.reference import LOSSES
from fastkd.ops.lift_kd.reference import Gradients, Inputs

WIDTHS = ((192, 384),)  # (Ds, Dt) of the compiled kernels: W must fit into shared memory
HOST_WIDTHS = (*WIDTHS, (32, 64))  # compiled for CPU tensors, as tests do: a quick one, too
SHARED_BYTES = 212_512  # per block of the largest kernel: W, exchanged sums, column sums
TILE_ROWS = 16  # csrc/lift_kd.h's kLiftTileRows
WORKERS = 4  # kLiftWorkers, per block
WEIGHT_SPLITS = 22  # kWeightSplits
HOST_BLOCKS = 2  # CPU tensors: more than one, for partial sums to add up
MAX_BLOCKS: int | None = None  # fewer than a GPU has multiprocessors: for small inputs to loop

# Gradients of the Linear's outputs, kept for as many rows as stay in the L2 cache.
SLOPE_BYTES = 20 << 20

_INPUTS = (
    "Tensor tokens, Tensor teacher, Tensor weight, Tensor bias, Tensor norm_weight, "
    "Tensor norm_bias, int loss, float beta, float eps, int blocks"
)
torch.library.define(
    "fastkd::_lift_kd_forward",
    f"({_INPUTS}, Tensor(a!) packed, Tensor(b!) vectors, Tensor(c!) loss_parts, "
    "Tensor(d!) pooled_parts, Tensor(e!) result, Tensor(f!) pooled) -> ()",
)
torch.library.define(
    "fastkd::_lift_kd_gradients",
    f"(Tensor upstream, Tensor pooled_upstream, {_INPUTS}, Tensor(a!) packed, Tensor(b!) vectors, "
    "Tensor(c!) loss_parts, Tensor(d!) column_parts, Tensor(e!) slopes, "
    "Tensor(f!) weight_parts, Tensor(g!) result, Tensor(h!) tokens_gradient, "
    "Tensor(i!) weight_gradient, Tensor(j!) bias_gradient, Tensor(k!) norm_weight_gradient, "
    "Tensor(l!) norm_bias_gradient) -> ()",
)


@contextlib.contextmanager
def few_blocks() -> Iterator[None]:
    """One block while this lasts: a small input then takes every loop more than once."""
    global MAX_BLOCKS
    before, MAX_BLOCKS = MAX_BLOCKS, 1
    try:
        yield
    finally:
        MAX_BLOCKS = before


def refuses(inputs: Inputs) -> str | None:
    """Why these inputs cannot run here; None where they can."""
    tokens, compute = inputs.tokens, inputs.compute
    batch, height, width = tokens.shape[:3]
    widths = tokens.shape[3], inputs.width
    compiled = WIDTHS if tokens.is_cuda else HOST_WIDTHS
    if compute not in (torch.float16, torch.bfloat16):
        return f"it multiplies in float16 or bfloat16, not {compute}"
    if widths not in compiled:
        known = ", ".join(f"{student} to {lifted}" for student, lifted in compiled)
        return f"it lifts {known} channels, not {widths[0]} to {widths[1]}"
    if inputs.teacher is not None and inputs.loss == "spectral" and width > TILE_ROWS:
        return f"its spectral loss takes grid rows of up to {TILE_ROWS} tokens, got {width}"
    if batch * height * max(width, TILE_ROWS) >= 2**31:
        return "it counts tokens in 32 bits"
    if tokens.is_cuda:
        # torch's own types have its shared memory from 2.15 on
        properties: Any = torch.cuda.get_device_properties(tokens.device)
        found = properties.shared_memory_per_block_optin
        if found < SHARED_BYTES:
            return f"it needs {SHARED_BYTES} bytes of shared memory per block, found {found}"
    return None


def forward(inputs: Inputs, pool: bool) -> tuple[Tensor, Tensor, Tensor]:
    """As `reference.forward`; a fill and at most four launches, no synchronization."""
    tokens, teacher = inputs.tokens, inputs.teacher
    batch, width, blocks = tokens.shape[0], inputs.width, _blocks(tokens)
    stats = _floats(tokens, *inputs.stats_shape).zero_()
    result = _floats(tokens) if teacher is not None else tokens.new_zeros((), dtype=torch.float32)
    pooled = _floats(tokens, batch, width if pool else 0)
    if teacher is None and not pool:
        return result, pooled, stats
    torch.ops.fastkd._lift_kd_forward(
        *_arguments(inputs),
        _floats(tokens, blocks),
        _floats(tokens, blocks * WORKERS + batch if pool else 0, width),
        result,
        pooled,
    )
    return result, pooled, stats


def one_pass(inputs: Inputs, needs: Sequence[bool]) -> tuple[Tensor, ...]:
    """As `reference.one_pass`; five launches, two more per further chunk, no synchronization."""
    result, absent = _floats(inputs.tokens), _absent(inputs.tokens)
    return result, *_differentiate(inputs, absent, absent, result, needs, exact=True)


def backward(
    upstream: Tensor | None,
    pooled_upstream: Tensor | None,
    inputs: Inputs,
    stats: Tensor,
    needs: Sequence[bool],
) -> Gradients:
    """As `reference.backward`; launches as `one_pass` does. The statistics are not needed."""
    absent = _absent(inputs.tokens)
    if upstream is None or inputs.teacher is None:
        upstream, inputs = None, replace(inputs, teacher=None)
    of_loss, of_pooled = (absent if x is None else _dense(x) for x in (upstream, pooled_upstream))
    return _differentiate(inputs, of_loss, of_pooled, absent, needs, exact=False)


def _differentiate(
    inputs: Inputs,
    upstream: Tensor,
    pooled_upstream: Tensor,
    result: Tensor,
    needs: Sequence[bool],
    exact: bool,
) -> Gradients:
    tokens, blocks = inputs.tokens, _blocks(inputs.tokens)
    gradients = inputs.empty_gradients(needs, exact)
    width, student_width = inputs.weight.shape
    of_weight = gradients[1].numel() > 0
    of_vectors = any(gradient.numel() > 0 for gradient in gradients[2:])
    slopes = _slope_rows(inputs) if of_weight else 0, width
    torch.ops.fastkd._lift_kd_gradients(
        upstream,
        pooled_upstream,
        *_arguments(inputs),
        _floats(tokens, blocks),
        _floats(tokens, blocks if of_vectors else 0, 3, width),
        tokens.new_empty(slopes, dtype=inputs.compute),
        _floats(tokens, WEIGHT_SPLITS if of_weight else 0, width, student_width),
        result,
        *gradients,
    )
    return gradients


def _arguments(inputs: Inputs) -> tuple[Tensor | int | float, ...]:
    """The inputs; buffers for the weight as the kernels want it, and for the vectors in float32."""
    tokens = inputs.tokens
    optional = inputs.teacher, inputs.weight, *inputs.vectors
    tensors = (_absent(tokens) if x is None else x for x in optional)
    options = LOSSES.index(inputs.loss), inputs.beta, inputs.eps, _blocks(tokens)
    packed = tokens.new_empty(inputs.weight.shape, dtype=inputs.compute)
    return tokens, *tensors, *options, packed, _floats(tokens, 3, inputs.width)


def _slope_rows(inputs: Inputs) -> int:
    """Rows of a chunk: a tile for each of the workers, as many times as the buffer may be large."""
    batch, height, width = inputs.tokens.shape[:3]
    if inputs.loss == "spectral" and inputs.teacher is not None:
        # Its tiles are whole grid rows, of 8 or 16 tokens.
        width = TILE_ROWS // 2 if width <= TILE_ROWS // 2 else TILE_ROWS
    tiles = -(-batch * height * width // TILE_ROWS)
    limit = SLOPE_BYTES // (TILE_ROWS * inputs.width * inputs.compute.itemsize)
    workers = _blocks(inputs.tokens) * WORKERS
    return min(tiles, max(limit // workers, 1) * workers) * TILE_ROWS


def _dense(x: Tensor) -> Tensor:
    """Contiguous float32 at a 16-byte address, as kernels load it; a view may start anywhere."""
    x = x.to(torch.float32).contiguous()
    return x if x.data_ptr() % 16 == 0 else x.clone()


def _blocks(tokens: Tensor) -> int:
    if MAX_BLOCKS is not None:
        return MAX_BLOCKS
    if not tokens.is_cuda:
        return HOST_BLOCKS
    return torch.cuda.get_device_properties(tokens.device).multi_processor_count


def _absent(tokens: Tensor) -> Tensor:
    return tokens.new_empty(0)


def _floats(tokens: Tensor, *shape: int) -> Tensor:
    return tokens.new_empty(shape, dtype=torch.float32)
