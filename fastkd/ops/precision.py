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
_before: list[str] = []


def at_least_float32(tensor: Tensor) -> Tensor:
    """Half precision to float32, float32 and float64 as they are.

    Args:
        tensor: of a float dtype.

    Returns:
        The tensor, or a copy of it.
    """
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


@contextmanager
def exact_float32() -> Iterator[None]:
    """Keep float32 matrix products in float32 inside the block.

    torch's settings are the process': they come back when the last thread has left its block, and
    another thread that multiplies before that is exact, too, and not the faster for it.
    """
    global _depth
    with _LOCK:
        if _depth == 0:
            _before[:] = [setting.fp32_precision for setting in _SETTINGS]
            for setting in _SETTINGS:
                setting.fp32_precision = "ieee"
        _depth += 1
    try:
        yield
    finally:
        with _LOCK:
            _depth -= 1
            if _depth == 0:
                for setting, precision in zip(_SETTINGS, _before, strict=True):
                    setting.fp32_precision = precision
