"""Float32 products that are float32, whatever the user allows elsewhere.

Measurements subtract and cumulate what a product gives: TensorFloat-32 or bfloat16 in its place
would change the answer, not only its last digits.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

_SETTINGS: tuple[Any, ...] = (
    torch.backends.cuda.matmul,
    torch.backends.mkldnn.matmul,  # type: ignore[attr-defined]
)


@contextmanager
def exact_float32() -> Iterator[None]:
    """Keep float32 matrix products in float32 inside the block; changes nothing outside it.

    torch's settings are the process': another thread that multiplies at the same moment is exact
    too, and not the faster for it.
    """
    before = [setting.fp32_precision for setting in _SETTINGS]
    try:
        for setting in _SETTINGS:
            setting.fp32_precision = "ieee"
        yield
    finally:
        for setting, precision in zip(_SETTINGS, before, strict=True):
            setting.fp32_precision = precision
