"""Scalar losses that make their gradient in the forward, a chunk at a time.

What a relation compares is large (a matrix per image, a cube per batch), what it leaves is not: a
number, and a gradient of the inputs' size. Both come from the same entries, so that none has to be
kept for the backward, which only scales the gradient. Knows nothing of what is compared.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from fastkd.ops.checks import exact_float32, refuse_forward_mode
from fastkd.ops.feature_kd.reference import ACCELERATOR_CHUNK_BYTES, CHUNK_BYTES

# A shorter vector has no direction: it is like no other, and gets no gradient.
SHORTEST = 1e-12

Body = Callable[..., tuple[Tensor, ...]]
Flops = Callable[..., int]


def gradient_in_forward(
    name: str, of: int = 1, flops: Flops | None = None
) -> Callable[[Body], Callable[..., Tensor]]:
    """Declare a loss with hand-written gradients to torch, as the operator ``fastkd::name``.

    The decorated function gets the tensors that have a gradient first, what else it needs, and last
    ``needs_gradient: bool``; it returns the scalar and one gradient for each of those tensors, in
    `wide_dtype` (`empty_gradient` where none is needed). It runs without autocast, and with float32
    products in float32: relations are differences of nearly equal products, of which TensorFloat-32
    would leave the rounding.

    The backward multiplies the gradients by what arrives: in place, or where the graph is kept
    (``retain_graph=True``) into tensors of their own, as a compiler does, too. A gradient of
    another dtype than its input is cast after that.

    Args:
        name: of the operator, and of the function in messages.
        of: how many of the first arguments have a gradient.
        flops: of the matrix products of a call, for `torch.utils.flop_counter`: takes the
            function's arguments, with shapes in place of tensors. None where there are none.

    Returns:
        A decorator; what it returns is called without ``needs_gradient`` and gives the scalar. Its
        gradient cannot be differentiated again, nor forward, nor by `torch.func`: all are refused.
    """

    def declare(function: Body) -> Callable[..., Tensor]:
        return _Declaration(name, function, of, flops).caller()

    return declare


class _Declaration:
    """What torch is told of one operator, in the order of a call.

    Args:
        name: of the operator.
        function: its body.
        of: how many of the first arguments have a gradient.
        flops: see `gradient_in_forward`.
    """

    def __init__(self, name: str, function: Body, of: int, flops: Flops | None) -> None:
        self.name = name
        self.function = function
        self.of = of
        schema = torch.library.infer_schema(function, mutates_args=())
        self.operator = torch.library.custom_op(
            f"fastkd::{name}", self.run, mutates_args=(), schema=schema
        )
        self.operator.register_fake(self.outline)
        self.operator.register_autograd(self.scale, setup_context=self.keep)
        if flops is not None:
            count = flops
            register_flop_formula(getattr(torch.ops.fastkd, name))(
                lambda *arguments, **_: count(*arguments)
            )

    def caller(self) -> Callable[..., Tensor]:
        """What the loss calls: checks, and says whether anybody wants gradients."""
        name, of, operator = self.name, self.of, self.operator

        @functools.wraps(self.function)
        def call(*arguments: Any) -> Tensor:
            for x in arguments[:of]:
                refuse_forward_mode(name, x)
                _refuse_transforms(name, x)
            needs = torch.is_grad_enabled() and any(x.requires_grad for x in arguments[:of])
            value: Tensor = operator(*arguments, needs)[0]
            return value

        return call

    def run(self, *arguments: Any) -> tuple[Tensor, ...]:
        """The body; that of a custom operator runs with the caller's autocast."""
        with torch.autocast(arguments[0].device.type, enabled=False), exact_float32():
            return self.function(*arguments)

    def outline(self, *arguments: Any) -> tuple[Tensor, ...]:
        """Shapes and dtypes of what `run` returns."""
        *inputs, needs_gradient = arguments
        dtype = wide_dtype(*(x for x in inputs if isinstance(x, Tensor)))
        value = inputs[0].new_empty((), dtype=dtype)
        return value, *(empty_gradient(x, dtype, needs_gradient) for x in inputs[: self.of])

    def keep(self, ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        """Keep the gradients, and nothing else, for the backward."""
        ctx.dtypes = [x.dtype for x in inputs[: self.of]]
        ctx.others = len(inputs) - self.of
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)  # zeros of the gradients' sizes otherwise
        ctx.save_for_backward(*output[1:])

    def scale(self, ctx: Any, upstream: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        """The backward."""
        _refuse_second_derivatives(self.name)
        gradients = [
            _scaled(gradient, upstream, dtype) if needed and upstream is not None else None
            for gradient, dtype, needed in zip(
                ctx.saved_tensors, ctx.dtypes, ctx.needs_input_grad, strict=False
            )
        ]
        return *gradients, *[None] * ctx.others


def _scaled(gradient: Tensor, upstream: Tensor, dtype: torch.dtype) -> Tensor:
    """The product in ``dtype``; ``gradient`` is used up where nobody can ask for it again.

    Scaled before the cast: float16's loss scaling arrives here, and must come in time.
    """
    if _graph_is_freed() and _is_plain(gradient) and _is_plain(upstream):
        return gradient.mul_(upstream).to(dtype)
    return (gradient * upstream).to(dtype)


def _graph_is_freed() -> bool:
    kept = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return kept is not None and not kept()


def _is_plain(x: Tensor) -> bool:
    """Neither what a compiler traces with, nor a batch that stands for one tensor."""
    return type(x) is Tensor and not torch._C._functorch.is_functorch_wrapped_tensor(x)


def _refuse_second_derivatives(name: str) -> None:
    if torch.is_grad_enabled():  # in a backward, this is create_graph=True
        raise RuntimeError(
            f"{name}: its gradient cannot be differentiated again (create_graph=True)"
        )


def _refuse_transforms(name: str, x: Tensor) -> None:
    if torch.compiler.is_compiling():
        return
    if torch._C._functorch.is_functorch_wrapped_tensor(x):
        raise NotImplementedError(
            f"{name}: torch.func's transforms (grad, vmap, ...) are not supported; take "
            "torch.autograd"
        )


def wide_dtype(*tensors: Tensor) -> torch.dtype:
    """float64 where one of the tensors is, else float32."""
    return torch.float64 if any(x.dtype == torch.float64 for x in tensors) else torch.float32


def empty_gradient(x: Tensor, dtype: torch.dtype, needed: bool) -> Tensor:
    """Contiguous memory for the gradient of ``x``; as many dimensions of none where not needed."""
    return x.new_empty(x.shape if needed else (0,) * x.ndim, dtype=dtype)


def zero_gradient(x: Tensor, dtype: torch.dtype, needed: bool) -> Tensor:
    """`empty_gradient`, to be added to."""
    return empty_gradient(x, dtype, needed).zero_()


def chunk_limit(device: torch.device, chunk_bytes: int | None) -> int:
    """Bytes that a chunk's temporaries may take: the caller's choice, or the device's default."""
    if chunk_bytes is not None:
        return chunk_bytes
    return CHUNK_BYTES if device.type == "cpu" else ACCELERATOR_CHUNK_BYTES


def check_chunk_bytes(owner: str, chunk_bytes: int | None) -> None:
    """Refuse a size that is none."""
    if chunk_bytes is not None and chunk_bytes < 1:
        raise ValueError(f"{owner}: chunk_bytes must be positive or None, got {chunk_bytes}")


def slices(length: int, bytes_each: int, limit: int) -> Iterator[slice]:
    """Cut ``length`` things of ``bytes_each`` into runs that fit ``limit``, or of one thing."""
    step = max(1, limit // max(1, bytes_each))
    for first in range(0, length, step):
        yield slice(first, min(first + step, length))


def directions(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Unit vectors along the last dimension, and what they were scaled by.

    Args:
        x: [..., D]; of a float dtype.
        dtype: to compute in.

    Returns:
        [..., D] contiguous, zeros where a vector is shorter than `SHORTEST`, and [..., 1].
    """
    x = x.to(dtype)
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    inverse = norm.reciprocal().masked_fill_(norm < SHORTEST, 0)
    # Tokens come transposed, too; a product would keep their strides, and batches of them be slow.
    return torch.mul(x, inverse, out=x.new_empty(x.shape)), inverse


def before_direction(slope: Tensor, unit: Tensor, inverse: Tensor) -> Tensor:
    """Turn a gradient of `directions` into that of its input, in place.

    Args:
        slope: [..., D], the gradient of the unit vectors; overwritten.
        unit: [..., D], the vectors.
        inverse: [..., 1], what they were scaled by.

    Returns:
        ``slope``.
    """
    along = torch.linalg.vecdot(slope, unit).unsqueeze(-1)
    return slope.addcmul_(unit, along, value=-1).mul_(inverse)
