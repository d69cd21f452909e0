"""What options a named loss has, and the distance that a name and options stand for.

Knows the catalogue and what constructors take; not what the losses do.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from fastkd.catalogue import Loss
from fastkd.losses.distance import MAP_DISTANCES, Distance

# What the caller wires and no options may name.
_WIRED = frozenset(
    {
        *("weight", "tau", "loss", "backend", "pairs", "resample"),
        *("student_dim", "teacher_dim", "student_dims", "teacher_dims"),
    }
)


def options_of(entry: Loss) -> dict[str, Any]:
    """What a loss lets one choose, beside what it shares with others.

    Args:
        entry: of the catalogue.

    Returns:
        Defaults by name.
    """
    if entry.name in MAP_DISTANCES:  # one class for four losses, of which one has an option
        return {"beta": 1.0} if entry.name == "smooth_l1" else {}
    parameters = inspect.signature(entry.load()).parameters.values()
    return {p.name: p.default for p in parameters if p.name not in _WIRED}


def check_options(entry: Loss, options: Mapping[str, Any] | None, argument: str) -> None:
    """Refuse options that a loss does not have.

    Args:
        entry: of the catalogue.
        options: by name.
        argument: what the caller calls them, for the message.

    Raises:
        ValueError: an unknown option; the error lists what there is.
    """
    known = options_of(entry)
    for name in options or {}:
        if name not in known:
            what = f"it has {', '.join(known)}" if known else "it has none"
            raise ValueError(f"{argument}: {entry.name!r} has no option {name!r}; {what}")


def has_temperature(entry: Loss) -> bool:
    """Whether a logit loss softens logits by a temperature tau.

    Args:
        entry: of the catalogue.

    Returns:
        True where its constructor takes ``tau``.
    """
    return "tau" in inspect.signature(entry.load()).parameters


def build_distance(
    entry: Loss,
    options: Mapping[str, Any],
    *,
    widths: tuple[int, int] | None = None,
    backend: str = "auto",
) -> Distance:
    """Build the distance of one pair.

    Args:
        entry: a distance of the catalogue.
        options: what it takes.
        widths: (student's, teacher's) channels, for a distance that needs them.
        backend: for a distance that an operator computes.

    Returns:
        The distance.

    Raises:
        ValueError: an unknown option, or a value that the distance refuses.
    """
    check_options(entry, options, "FeatureKD")
    arguments: dict[str, Any] = dict(options)
    if widths is not None:
        arguments["student_dim"], arguments["teacher_dim"] = widths
    if entry.name in MAP_DISTANCES:
        arguments["loss"], arguments["backend"] = entry.name, backend
    elif backend != "auto":
        raise ValueError(f"FeatureKD: {entry.name!r} has one implementation, got {backend=}")
    distance: Distance = entry.load()(**arguments)
    return distance
