"""Float32 that is float32, whatever the user allows elsewhere.

Measurements subtract and cumulate what a product gives: TensorFloat-32 or bfloat16 in its place
would change the answer, not only its last digits.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

_SETTINGS: tuple[Any, ...] = (
    torch.backends.cuda.matmul,
    torch.backends.mkldnn.matmul,  # type: ignore[attr-defined]
)


_LOCK = threading.Lock()
_depth = 0
_before: list[tuple[Any, str]] = []


def at_least_float32(tensor: Tensor) -> Tensor:
    """Half precision to float32, float32 and float64 as they are.

    Args:
        tensor: of a float dtype.

    Returns:
        The tensor, or a copy of it.
    """
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def in_float64(tensor: Tensor) -> Tensor:
    """Bring a tensor to float64: on its device, or on the CPU where that has none (``"mps"``).

    Args:
        tensor: of a float dtype.

    Returns:
        The tensor, or a copy of it.
    """
    # Moved first, since a conversion on the way could be made on either device.
    return (tensor.cpu() if tensor.device.type == "mps" else tensor).double()


@contextmanager
def exact_float32() -> Iterator[None]:
    """Keep float32 matrix products in float32 inside the block.

    torch's settings are the process': they come back when the last thread has left its block, and
    another thread that multiplies before that is exact, too, and not the faster for it. A product's
    setting that only followed a wider one (``torch.backends.fp32_precision``) follows it again.
    """
    global _depth
    with _LOCK:
        if _depth == 0:
            inexact = [setting for setting in _SETTINGS if setting.fp32_precision != "ieee"]
            _before[:] = [(setting, _own_precision(setting)) for setting in inexact]
            for setting in inexact:
                setting.fp32_precision = "ieee"
        _depth += 1
    try:
        yield
    finally:
        with _LOCK:
            _depth -= 1
            if _depth == 0:
                for setting, precision in _before:
                    setting.fp32_precision = precision


def _own_precision(setting: Any) -> str:
    """What has been set for products themselves: ``"none"`` where a wider setting decides.

    A setting reads as what is in force, so that only a look without its own can tell the two apart;
    leaves it without.
    """
    in_force: str = setting.fp32_precision
    setting.fp32_precision = "none"
    return "none" if setting.fp32_precision == in_force else in_force
