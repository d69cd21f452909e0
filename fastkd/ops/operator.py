"""Declare operators to torch: schema, result shapes, gradient, backends, FLOPs; launch kernels."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from fastkd.ops.backend import Backends, Implementation
from fastkd.ops.checks import exact_float32, refuse_transforms, tensors_of, wide_dtype
from fastkd.ops.self_check import Draw

LIBRARY = torch.library.Library("fastkd", "FRAGMENT")


class Operator:
    """An operator of torch, called with the arguments of its schema, by position.

    Attributes:
        name: ``torch.ops.fastkd.NAME``.
        shapes: computes empty results from the arguments; its annotations give the schema, in which
            a dataclass becomes its fields and an operator with backends gets a last ``backend``.
        run: computes the results; or the backends, of which ``method`` does.
        gradient: (needs_input_grad, *upstream, *arguments, *kept results) -> the gradients of the
            first arguments. An upstream gradient that nothing asks for is None.
        differentiable: how many of the results, the first ones, have a gradient.
        kept: places of the results that ``gradient`` gets.
        scales: how many arguments, the first ones, have their gradients among the results, after
            a scalar; the backward only scales these, and needs no ``gradient``.
    """

    def __init__(
        self,
        name: str,
        shapes: Callable[..., Any],
        run: Callable[..., Any] | Backends[Any],
        *,
        method: str = "forward",
        gradient: Callable[..., Sequence[Tensor | None]] | None = None,
        differentiable: int = 1,
        kept: tuple[int, ...] = (),
        scales: int = 0,
        flops: Callable[..., int] | None = None,
        mutates: tuple[str, ...] = (),
    ) -> None:
        self.name, self.shapes, self.run, self.method = name, shapes, run, method
        self.gradient, self.differentiable, self.kept = gradient, differentiable, kept
        self.scales = scales
        self.backends = run if isinstance(run, Backends) else None
        signature = inspect.signature(shapes, eval_str=True)
        flat: list[tuple[str, Any]] = []
        self._value: tuple[slice, Any] | None = None  # where a dataclass lies in the schema
        for parameter in signature.parameters.values():
            kind: Any = parameter.annotation
            if isinstance(kind, type) and dataclasses.is_dataclass(kind):
                fields = inspect.signature(kind, eval_str=True).parameters.values()
                self._value = slice(len(flat), len(flat) + len(fields)), kind
                flat += [(field.name, field.annotation) for field in fields]
            else:
                flat.append((parameter.name, kind))
        if self.backends is not None:
            arguments = list(signature.parameters)
            self._looked_at = [
                arguments.index(name) if name in arguments else None
                for name in self.backends.looks_at
            ]
            flat.append(("backend", str))
        schema = _schema(flat, signature.return_annotation, mutates)
        LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
        LIBRARY.impl(name, self._run, "CompositeExplicitAutograd")
        torch.library.register_fake(f"fastkd::{name}", self._fake, lib=LIBRARY)
        packet = getattr(torch.ops.fastkd, name)
        self.overload = packet.default
        if gradient is not None or scales:
            LIBRARY.impl(name, self._differentiate, "Autograd")
        if flops is not None:
            count = flops
            register_flop_formula(packet)(lambda *arguments, **_: count(*arguments))

    def __call__(self, *arguments: Any) -> Any:
        return self.overload(*arguments)

    def _values(self, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        """Put the dataclass together again."""
        if self._value is None:
            return arguments
        place, kind = self._value
        return *arguments[: place.start], kind(*arguments[place]), *arguments[place.stop :]

    def _fake(self, *arguments: Any) -> Any:
        values = self._values(arguments)
        return self.shapes(*(values if self.backends is None else values[:-1]))

    def _run(self, *arguments: Any) -> Any:
        for x in arguments:
            if isinstance(x, Tensor):
                device = x.device.type
                break
        # Autocast is still on in here, and would recast products.
        if torch.is_autocast_enabled(device):
            with torch.autocast(device, enabled=False):
                return self._run(*arguments)
        values = self._values(arguments)
        if self.backends is None:
            return self.run(*values)  # type: ignore[operator]
        values, requested = values[:-1], values[-1]
        looked_at = [None if place is None else values[place] for place in self._looked_at]
        if next(tensors_of(looked_at)).numel() == 0:
            results = self.shapes(*values)
            for result in tensors_of(results if isinstance(results, tuple) else [results]):
                result.zero_()  # none of an operator that writes to its inputs
            return results
        return getattr(self.backends.select(requested, *looked_at), self.method)(*values)

    def _differentiate(self, *arguments: Any) -> Any:
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*arguments):
            return _Gradient.apply(self, *arguments)
        with torch._C._AutoDispatchBelowAutograd():
            return self.overload(*arguments)


@dataclass(frozen=True)
class KernelLaunch:
    """A launch of a ``@triton.jit`` kernel as a value, which tests compile ahead of time.

    ``arguments`` are tensors, ints and floats by name, ``constants`` the ``tl.constexpr`` ones.
    """

    kernel: Any
    grid: tuple[int, ...]
    arguments: Mapping[str, Tensor | int | float]
    constants: Mapping[str, Any]
    num_warps: int = 4
    num_stages: int = 2

    @property
    def options(self) -> dict[str, int | bool]:
        """Compiler options; fused multiply-add is named because Triton's default is changing."""
        stages = self.num_stages
        return {"num_warps": self.num_warps, "num_stages": stages, "enable_fp_fusion": True}

    def run(self) -> None:
        """Start the kernel on the device and current stream of its tensors; does not wait."""
        device = next(a.device for a in self.arguments.values() if isinstance(a, Tensor))
        guard = torch.cuda.device(device) if device.type == "cuda" else nullcontext()
        with guard:
            self.kernel[self.grid](**self.arguments, **self.constants, **self.options)


def _schema(arguments: list[tuple[str, Any]], returns: Any, mutates: tuple[str, ...]) -> str:
    def prototype() -> None: ...

    keyword = inspect.Parameter.POSITIONAL_OR_KEYWORD
    parameters = [inspect.Parameter(name, keyword, annotation=kind) for name, kind in arguments]
    signature = inspect.Signature(parameters, return_annotation=returns)
    prototype.__signature__ = signature  # type: ignore[attr-defined]
    return torch.library.infer_schema(prototype, mutates_args=mutates)


class _Gradient(torch.autograd.Function):
    """The gradient of every operator: the first argument is the operator itself."""

    @staticmethod
    def forward(ctx: Any, operator: Operator, *arguments: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            results = operator.overload(*arguments)
        outputs = results if isinstance(results, tuple) else (results,)
        ctx.operator = operator
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*outputs[operator.differentiable :])
        if operator.scales:
            ctx.arguments = [x.dtype if isinstance(x, Tensor) else x for x in arguments]
            ctx.save_for_backward(*outputs[1:])
        else:
            tensors = [x if isinstance(x, Tensor) else None for x in arguments]
            ctx.arguments = [None if isinstance(x, Tensor) else x for x in arguments]
            ctx.save_for_backward(*tensors, *(outputs[place] for place in operator.kept))
        return results

    @staticmethod
    def backward(ctx: Any, *upstream: Any) -> tuple[Tensor | None, ...]:
        operator, arguments = ctx.operator, ctx.arguments
        if torch.is_grad_enabled():  # in a backward, this is create_graph=True
            name = operator.name if operator.backends is None else operator.backends.name
            raise RuntimeError(
                f"{name}: its gradient cannot be differentiated again (create_graph=True); use "
                "torch's own operations where second derivatives are needed"
            )
        upstream = upstream[: operator.differentiable]
        needs = ctx.needs_input_grad[1:]
        if all(x is None for x in upstream):
            gradients: Sequence[Tensor | None] = ()
        elif operator.scales:
            backend = arguments[-1] if operator.backends is not None else "torch"
            gradients = [
                scaled(gradient, upstream[0], backend).to(dtype) if needed else None
                for gradient, dtype, needed in zip(
                    ctx.saved_tensors, arguments, needs, strict=False
                )
            ]
        else:
            saved = ctx.saved_tensors
            inputs = [
                x if tensor is None else tensor for tensor, x in zip(saved, arguments, strict=False)
            ]
            gradients = operator.gradient(needs, *upstream, *inputs, *saved[len(arguments) :])
            gradients = [g if n else None for g, n in zip(gradients, needs, strict=False)]
        return None, *gradients, *[None] * (len(arguments) - len(gradients))


def operator(
    name: str, run: Callable[..., Any] | Backends[Any], **options: Any
) -> Callable[[Callable[..., Any]], Operator]:
    """Declare an operator by the function of its results' shapes; see `Operator`."""
    return lambda shapes: Operator(name, shapes, run, **options)


def gradient_in_forward(
    name: str, of: int = 1, flops: Callable[..., int] | None = None
) -> Callable[[Callable[..., tuple[Tensor, ...]]], Callable[..., Tensor]]:
    """Declare a scalar loss that makes its gradients in the forward.

    The decorated function takes the ``of`` tensors that get a gradient, then its other arguments,
    then ``needs_gradient: bool``, and returns the scalar and one gradient per such tensor, in
    `wide_dtype` (an `empty_gradient` where none is needed). Its products are never made in
    TensorFloat-32, whose rounding would outweigh differences of nearly equal products. The result
    is called without ``needs_gradient`` and returns the scalar.
    """

    def declare(function: Callable[..., tuple[Tensor, ...]]) -> Callable[..., Tensor]:
        @functools.wraps(function)
        def shapes(*arguments: Any) -> tuple[Tensor, ...]:
            *inputs, needs_gradient = arguments
            dtype = wide_dtype(*(x for x in inputs if isinstance(x, Tensor)))
            value = inputs[0].new_empty((), dtype=dtype)
            return value, *(empty_gradient(x, dtype, needs_gradient) for x in inputs[:of])

        declared = Operator(name, shapes, exact_float32()(function), scales=of, flops=flops)

        @functools.wraps(function)
        def call(*arguments: Any) -> Tensor:
            for x in arguments[:of]:
                refuse_transforms(name, x)
            needs = torch.is_grad_enabled() and any(x.requires_grad for x in arguments[:of])
            value: Tensor = declared(*arguments, needs)[0]
            return value

        return call

    return declare


def empty_gradient(x: Tensor, dtype: torch.dtype, needed: bool) -> Tensor:
    """Allocate a contiguous gradient of ``x``, of size 0 in each dimension if not needed."""
    return x.new_empty(x.shape if needed else (0,) * x.ndim, dtype=dtype)


def scaled(gradient: Tensor, upstream: Tensor, backend: str) -> Tensor:
    """Multiply a gradient by a scalar, in place where its graph is freed."""
    if _graph_is_kept() or not (_is_plain(gradient) and _is_plain(upstream)):
        return _product(gradient, upstream)
    _scale_(gradient, upstream, backend)
    return gradient


def _graph_is_kept() -> bool:
    """Whether another backward may ask for the same gradients (retain_graph=True)."""
    kept = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return kept is None or kept()


def _is_plain(x: Tensor) -> bool:
    """Whether it is neither a tracing compiler's tensor nor a wrapper of `torch.func`."""
    return type(x) is Tensor and not torch._C._functorch.is_functorch_wrapped_tensor(x)


def _product(gradient: Tensor, upstream: Tensor) -> Tensor:
    # Rounded once: a factor rounded to bfloat16 would shift every element the same way.
    return (gradient.to(upstream.dtype) * upstream).to(gradient.dtype)


def _scale_by_torch(gradient: Tensor, upstream: Tensor) -> None:
    # Reading the scalar would make the host wait for a GPU.
    if upstream.device.type == "cpu" and upstream.item() == 1:
        return
    if gradient.dtype == upstream.dtype:
        gradient.mul_(upstream)
    else:
        gradient.copy_(_product(gradient, upstream))


def _scale_example(run: Implementation, draw: Draw, gradient: Tensor, upstream: Tensor) -> Any:
    product = draw(300, like=gradient)
    run.forward(product, torch.full_like(upstream, 0.5, dtype=draw.compute(upstream.dtype)))
    yield "value", product


_by_torch = Implementation(_scale_by_torch)
SCALES = Backends(
    "scale_",
    {"torch": _by_torch, "cuda": _by_torch},  # lift_kd brings a kernel
    order=("triton", "torch"),
    looks_at=("gradient", "upstream"),
    example=_scale_example,
)


@operator("scale_", SCALES, mutates=("gradient",))
def _scale_(gradient: Tensor, upstream: Tensor) -> None:
    return None
