"""Numbers of classes: natural order by name, and the training set's numbers for another set."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import Any

from timm.utils.misc import natural_key

UNLABELLED = -1


def is_missing(label: Any) -> bool:
    """Return whether a label is None, or -1 as hubs write it."""
    return label is None or (getattr(label, "ndim", 0) == 0 and bool(label == UNLABELLED))


def number_classes(names: Iterable[str]) -> dict[str, int]:
    """Number class names in natural order, as timm does."""
    return {name: number for number, name in enumerate(sorted(names, key=natural_key))}


def map_classes(
    classes: Mapping[str, int], training: Mapping[str, int], place: str | os.PathLike[str]
) -> dict[int, int]:
    """Map each class number of an evaluation set to the training set's number of that name.

    A class without evaluation images then shifts no label. Raise a ValueError that names the
    folder ``place`` where it has classes that the training set lacks.
    """
    unknown = [name for name in classes if name not in training]
    if unknown:
        raise ValueError(f"data: {place} has classes that the training set lacks: {unknown[:5]}")
    return {number: training[name] for name, number in classes.items()}
