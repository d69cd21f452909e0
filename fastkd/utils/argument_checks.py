"""Bounds of numbers, and checks of arguments that are no fields of a recipe."""

from __future__ import annotations

import math
import numbers
import textwrap
from typing import Any

LARGEST = 2**63  # whole numbers lie below it
LARGEST_IMAGE = 16_384  # pixels a side
MOST_WORKERS = 1024  # processes of a rank; more would only fill the machine
FLOAT32 = (1e-37, 1e37)  # neither these numbers nor their reciprocals are 0 or infinite in float32


def describe(value: Any) -> str:
    """Describe a value in a few words, a tensor without its numbers."""
    if isinstance(value, type):
        return f"the class {value.__name__}"
    if isinstance(value, numbers.Number):
        return f"{type(value).__name__} {value}"
    if hasattr(value, "new_zeros"):  # a tensor, without the import of torch
        where = "" if str(value.device) == "cpu" else f" on {value.device}"
        return f"{list(value.shape)} of {value.dtype}{where}"
    if value is None or isinstance(value, str):
        return textwrap.shorten(repr(value), 60, placeholder="...")
    return type(value).__name__


def check_number(
    caller: str,
    name: str,
    value: Any,
    least: float | None = None,
    most: float | None = None,
    *,
    whole: bool = False,
) -> None:
    """Raise unless a value is a number in bounds, an integer if ``whole``."""
    kind: Any = numbers.Integral if whole else numbers.Real
    if isinstance(value, bool) or not isinstance(value, kind):
        expected = "an integer" if whole else "a number"
        raise TypeError(f"{caller}: {name} must be {expected}, got {describe(value)}")
    end = LARGEST - 1 if whole else FLOAT32[1]
    low, high = (-end if least is None else least), (end if most is None else most)
    if low <= value <= high:
        return
    if most is not None:
        limit = f"{low} to {most}"
    elif least is None or high < value < math.inf:
        limit = "finite and below 2^63" if whole else "finite in float32"
    elif whole:
        limit = f"at least {least}"
    else:
        limit = "positive" if least == FLOAT32[0] else f"finite and >= {least:g}"
    raise ValueError(f"{caller}: {name} must be {limit}, got {value}")


def check_numbers(caller: str, **given: tuple[Any, ...]) -> None:
    """Apply `check_number` to (value, least[, most]) of every argument that is not None.

    An argument must be an integer where its ``least`` is one.
    """
    for name, (value, *bounds) in given.items():
        if value is not None:
            check_number(caller, name, value, *bounds, whole=isinstance(bounds[0], int))


def refuse_blank(caller: str, **given: Any) -> None:
    """Raise for empty text, which as a path would be the current folder."""
    for name, value in given.items():
        if isinstance(value, str) and not value.strip():
            raise ValueError(f"{caller}: {name} must not be empty, got {value!r}")
