"""Gradients that were made in the forward, times the gradient that arrives in the backward.

In place where nobody can need the originals again, and free where that gradient is 1: on a GPU a
kernel looks at it there and returns at once; the host never waits for it.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence

import torch
from torch import Tensor

from fastkd.ops.backend import Implementation, Operator


def scaled(gradients: Sequence[Tensor], upstream: Tensor, backend: str) -> list[Tensor]:
    """``gradients`` times the scalar ``upstream``; the originals are used up unless kept.

    Args:
        gradients: any shapes and dtypes; changed in place where the graph is freed.
        upstream: scalar on their device.
        backend: as the user of the operator has chosen it.

    Returns:
        The products.
    """
    gradients = list(gradients)
    # retain_graph=True: another backward may ask for the originals. A compiler that traces this
    # (subclasses of tensors tell) has its own ways to save memory.
    if _graph_is_kept() or any(type(gradient) is not Tensor for gradient in gradients):
        return [_product(gradient, upstream) for gradient in gradients]
    _scale_(gradients, upstream, backend)
    return gradients


def _graph_is_kept() -> bool:
    asked = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return True if asked is None else asked()


def _product(gradient: Tensor, upstream: Tensor) -> Tensor:
    """Rounded once: a factor rounded to bfloat16 would shift every element the same way."""
    return (gradient.to(upstream.dtype) * upstream).to(gradient.dtype)


@torch.library.custom_op("fastkd::scale_", mutates_args={"gradients"})
def _scale_(gradients: Sequence[Tensor], upstream: Tensor, backend: str) -> None:
    """Multiply in place by a scalar."""
    for gradient in gradients:
        chosen = OPERATOR.select(backend, (gradient, upstream))
        chosen.forward(gradient, upstream)


@_scale_.register_fake
def _(gradients: Sequence[Tensor], upstream: Tensor, backend: str) -> None:
    return None


def _multiply(gradient: Tensor, upstream: Tensor) -> None:
    if upstream.device.type != "cpu" or upstream.item() != 1:
        gradient.copy_(_product(gradient, upstream))


def _launch(gradient: Tensor, upstream: Tensor) -> None:
    from fastkd.ops.lift_kd.triton import scale_launch

    scale_launch(gradient, upstream).run()


def _self_check(
    implementation: Implementation, device: torch.device, dtypes: tuple[torch.dtype, ...]
) -> tuple[float, float]:
    """Largest error on a small input, and none allowed; synchronises."""
    gradient = torch.arange(300, device=device).to(dtypes[0])
    upstream = torch.full((), 0.5, device=device, dtype=dtypes[1])
    expected = gradient / 2
    implementation.forward(gradient, upstream)
    return (gradient - expected).abs().max().item(), 0.0


def _implementations() -> dict[str, Implementation]:
    plain = Implementation(_multiply, _multiply)
    implementations = {"torch": plain, "cuda": plain}
    if importlib.util.find_spec("triton") is not None:
        implementations["triton"] = Implementation(_launch, _launch)
    return implementations


OPERATOR = Operator(
    name="lift_kd's scaling",
    implementations=_implementations(),
    order=("triton", "torch"),
    self_check=_self_check,
)
