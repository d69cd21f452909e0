"""Scalar losses that compute their gradient in the forward, a chunk at a time.

Relations are large (a matrix per image, a cube per batch), but the value and the gradient of the
inputs are not. Computed together, nothing large is kept for the backward, which only scales.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import register_flop_formula

from fastkd.losses.base import check_counts
from fastkd.ops.checks import exact_float32, power_of_two, refuse_transforms
from fastkd.ops.feature_kd.reference import ACCELERATOR_CHUNK_BYTES, CHUNK_BYTES

# A shorter vector has no direction: its similarities are 0, and it gets no gradient.
SHORTEST = 1e-12

Body = Callable[..., tuple[Tensor, ...]]
Flops = Callable[..., int]


def gradient_in_forward(
    name: str, of: int = 1, flops: Flops | None = None
) -> Callable[[Body], Callable[..., Tensor]]:
    """Register a loss with hand-written gradients as the operator ``fastkd::name``.

    The decorated function takes the ``of`` tensors that get a gradient, then its other arguments,
    then ``needs_gradient: bool``. It returns the scalar and one gradient per such tensor, in
    `wide_dtype` (an `empty_gradient` where none is needed). It runs without autocast, and without
    TensorFloat-32, whose rounding would outweigh differences of nearly equal products. ``flops``
    counts the matrix products for `torch.utils.flop_counter`, from the arguments with shapes in
    place of tensors.

    The result is called without ``needs_gradient`` and returns the scalar. The backward scales the
    gradients in place, or into new tensors with ``retain_graph=True``. Second derivatives, forward
    mode and `torch.func` are refused.
    """

    def declare(function: Body) -> Callable[..., Tensor]:
        return _Registration(name, function, of, flops).caller()

    return declare


class _Registration:
    """One operator: its methods are what torch calls."""

    def __init__(self, name: str, function: Body, of: int, flops: Flops | None) -> None:
        self.name = name
        self.function = function
        self.of = of
        schema = torch.library.infer_schema(function, mutates_args=())
        self.operator = torch.library.custom_op(
            f"fastkd::{name}", self.run, mutates_args=(), schema=schema
        )
        self.operator.register_fake(self.fake)
        self.operator.register_autograd(self.backward, setup_context=self.setup_context)
        if flops is not None:
            count = flops
            register_flop_formula(getattr(torch.ops.fastkd, name))(
                lambda *arguments, **_: count(*arguments)
            )

    def caller(self) -> Callable[..., Tensor]:
        """Wrap the operator: check the inputs, find out whether gradients are needed."""
        name, of, operator = self.name, self.of, self.operator

        @functools.wraps(self.function)
        def call(*arguments: Any) -> Tensor:
            for x in arguments[:of]:
                refuse_transforms(name, x)
            needs = torch.is_grad_enabled() and any(x.requires_grad for x in arguments[:of])
            value: Tensor = operator(*arguments, needs)[0]
            return value

        return call

    def run(self, *arguments: Any) -> tuple[Tensor, ...]:
        """Run the body. A custom operator would run with the caller's autocast."""
        with torch.autocast(arguments[0].device.type, enabled=False), exact_float32():
            return self.function(*arguments)

    def fake(self, *arguments: Any) -> tuple[Tensor, ...]:
        """Give the shapes and dtypes that `run` returns."""
        *inputs, needs_gradient = arguments
        dtype = wide_dtype(*(x for x in inputs if isinstance(x, Tensor)))
        value = inputs[0].new_empty((), dtype=dtype)
        return value, *(empty_gradient(x, dtype, needs_gradient) for x in inputs[: self.of])

    def setup_context(self, ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        """Keep the gradients, and nothing else, for the backward."""
        ctx.dtypes = [x.dtype for x in inputs[: self.of]]
        ctx.others = len(inputs) - self.of
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)  # zeros of the gradients' sizes otherwise
        ctx.save_for_backward(*output[1:])

    def backward(self, ctx: Any, upstream: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        """Scale the gradients."""
        if torch.is_grad_enabled():  # in a backward, this is create_graph=True
            raise RuntimeError(
                f"{self.name}: its gradient cannot be differentiated again (create_graph=True)"
            )
        gradients = [
            _scaled(gradient, upstream, dtype) if needed and upstream is not None else None
            for gradient, dtype, needed in zip(
                ctx.saved_tensors, ctx.dtypes, ctx.needs_input_grad, strict=False
            )
        ]
        return *gradients, *[None] * ctx.others


def _scaled(gradient: Tensor, upstream: Tensor, dtype: torch.dtype) -> Tensor:
    """Multiply, in place if the graph is freed, then cast."""
    # Not cast first: the scale of float16's loss scaling is part of ``upstream``.
    if _graph_is_freed() and _is_plain(gradient) and _is_plain(upstream):
        return gradient.mul_(upstream).to(dtype)
    return (gradient * upstream).to(dtype)


def _graph_is_freed() -> bool:
    kept = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return kept is not None and not kept()


def _is_plain(x: Tensor) -> bool:
    """Whether it is neither a tracing compiler's tensor nor a wrapper of `torch.func`."""
    return type(x) is Tensor and not torch._C._functorch.is_functorch_wrapped_tensor(x)


def wide_dtype(*tensors: Tensor) -> torch.dtype:
    """float64 if one of the tensors is, else float32."""
    return torch.float64 if any(x.dtype == torch.float64 for x in tensors) else torch.float32


def empty_gradient(x: Tensor, dtype: torch.dtype, needed: bool) -> Tensor:
    """Allocate a contiguous gradient of ``x``, of size 0 in each dimension if not needed."""
    return x.new_empty(x.shape if needed else (0,) * x.ndim, dtype=dtype)


def zero_gradient(x: Tensor, dtype: torch.dtype, needed: bool) -> Tensor:
    """Allocate a gradient of zeros; see `empty_gradient`."""
    return empty_gradient(x, dtype, needed).zero_()


def chunk_limit(device: torch.device, chunk_bytes: int | None) -> int:
    """Get the limit of a chunk's temporaries in bytes: the caller's or the device's default."""
    if chunk_bytes is not None:
        return chunk_bytes
    return CHUNK_BYTES if device.type == "cpu" else ACCELERATOR_CHUNK_BYTES


def check_chunk_bytes(term: nn.Module, chunk_bytes: int | None) -> None:
    """Raise unless the size is positive or None."""
    if chunk_bytes is not None:
        check_counts(term, chunk_bytes=chunk_bytes)


def slices(length: int, bytes_each: int, limit: int) -> Iterator[slice]:
    """Cut ``length`` items of ``bytes_each`` into slices that fit ``limit``, or of one item."""
    step = max(1, limit // max(1, bytes_each))
    for first in range(0, length, step):
        yield slice(first, min(first + step, length))


def directions(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Get unit vectors of [..., D], zero where shorter than `SHORTEST`, and the scale [..., 1]."""
    x = x.to(dtype)
    # A norm of squares that overflow would be infinite, and the direction lost.
    size = power_of_two(torch.linalg.vector_norm(x, ord=torch.inf, dim=-1, keepdim=True))
    # Contiguous: tokens may come transposed, and a batched product of their strides would be slow.
    unit = torch.div(x, size, out=x.new_empty(x.shape))
    norm = torch.linalg.vector_norm(unit, dim=-1, keepdim=True)
    inverse = norm.reciprocal().masked_fill_(norm * size < SHORTEST, 0)
    return unit.mul_(inverse), inverse.div_(size)


def normalized(x: Tensor) -> Tensor:
    """`F.normalize` of [B, D] over D, for any size of float32."""
    size = power_of_two(torch.linalg.vector_norm(x.detach(), ord=torch.inf, dim=1, keepdim=True))
    return F.normalize(x / size.clamp_min(1), dim=1)


def before_direction(slope: Tensor, unit: Tensor, inverse: Tensor) -> Tensor:
    """Turn ``slope``, the gradient of unit vectors, into that of `directions`' input, in place."""
    along = torch.linalg.vecdot(slope, unit).unsqueeze(-1)
    return slope.addcmul_(unit, along, value=-1).mul_(inverse)
