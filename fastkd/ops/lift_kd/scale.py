"""Gradients that were made in the forward, times the gradient that arrives in the backward.

In place where nobody can need the originals again, and free where that gradient is 1: on a GPU a
kernel looks at it there and returns at once; the host never waits for it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fastkd.ops.backend import unavailable
from fastkd.ops.launch import KernelLaunch


def scaled(gradients: Sequence[Tensor], upstream: Tensor) -> list[Tensor]:
    """``gradients`` times the scalar ``upstream``; the originals are used up unless kept.

    Args:
        gradients: any shapes and dtypes; changed in place where the graph is freed.
        upstream: scalar on their device.

    Returns:
        The products.
    """
    gradients = list(gradients)
    # retain_graph=True: another backward may ask for the originals. A compiler that traces this
    # (subclasses of tensors tell) has its own ways to save memory.
    if _graph_is_kept() or any(type(gradient) is not Tensor for gradient in gradients):
        return [gradient * upstream.to(gradient.dtype) for gradient in gradients]
    _scale_(gradients, upstream)
    return gradients


def _graph_is_kept() -> bool:
    asked = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return True if asked is None else asked()


@torch.library.custom_op("fastkd::scale_", mutates_args={"gradients"})
def _scale_(gradients: Sequence[Tensor], upstream: Tensor) -> None:
    """Multiply in place by a scalar."""
    launch = _triton_scale(upstream.device)
    if launch is not None:
        for gradient in gradients:
            launch(gradient, upstream).run()
    elif upstream.device.type != "cpu" or upstream.item() != 1:
        for gradient in gradients:
            gradient.mul_(upstream)


@_scale_.register_fake
def _(gradients: Sequence[Tensor], upstream: Tensor) -> None:
    return None


@functools.cache
def _triton_scale(device: torch.device) -> Callable[[Tensor, Tensor], KernelLaunch] | None:
    if unavailable("triton", device) is not None:
        return None
    from fastkd.ops.lift_kd.triton import scale_launch

    return scale_launch
