"""Bounds of numbers, and checks of arguments that are no fields of a recipe."""

from __future__ import annotations

import numbers
from typing import Any

LARGEST = 2**63  # whole numbers lie below it
LARGEST_IMAGE = 16_384  # pixels a side
MOST_WORKERS = 1024  # processes of a rank; more would only fill the machine
FLOAT32 = (1e-37, 1e37)  # neither these numbers nor their reciprocals are 0 or infinite in float32


def check_numbers(caller: str, **given: tuple[Any, ...]) -> None:
    """Raise unless every value that is not None is a number in bounds, and whole where they are.

    An argument is (value, least) or (value, least, most).
    """
    for name, (value, least, *most) in given.items():
        if value is None:
            continue
        whole = isinstance(least, int)
        kind: Any = numbers.Integral if whole else numbers.Real
        if isinstance(value, bool) or not isinstance(value, kind):
            what = "an int" if whole else "a number"
            raise TypeError(f"{caller}: {name} must be {what}, got {value!r}")
        if not least <= value <= max(most, default=LARGEST):
            limit = "finite and below 2^63" if value >= least else f"at least {least}"
            limit = f"{least} to {most[0]}" if most else limit
            raise ValueError(f"{caller}: {name} must be {limit}, got {value}")


def refuse_blank(caller: str, **given: Any) -> None:
    """Refuse empty texts: as a path they would be the current folder."""
    for name, value in given.items():
        if isinstance(value, str) and not value.strip():
            raise ValueError(f"{caller}: {name} must not be empty, got {value!r}")
