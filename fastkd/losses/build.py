"""What options a named loss has, and the distance that a name and options stand for.

Knows the catalogue and what constructors take; not what the losses do.
"""

from __future__ import annotations

import inspect
import typing
from collections.abc import Mapping
from typing import Any

from torch import nn

from fastkd.losses.base import MAP_DISTANCES, Distance, FeatureTerm, LogitTerm, MapDistance
from fastkd.losses.registry import Loss

# What the caller wires, and options do not name.
_WIRED: dict[type[nn.Module], tuple[str, ...]] = {
    LogitTerm: ("weight", "tau"),
    MapDistance: ("loss", "backend"),
    Distance: ("student_dim", "teacher_dim"),
    FeatureTerm: ("pairs", "weight", "student_dims", "teacher_dims", "resample"),
}
_WORDS = {bool: "true or false", int: "an integer", float: "a number", str: "a word"}


def options_of(entry: Loss) -> dict[str, Any]:
    """What a loss lets one choose, beside what it shares with others.

    Args:
        entry: of the catalogue.

    Returns:
        Defaults by name.
    """
    cls = entry.load()
    if cls is MapDistance:  # one class for four losses, of which one has an option
        return {"beta": 1.0} if entry.name == "smooth_l1" else {}
    wired = [name for kind, names in _WIRED.items() if issubclass(cls, kind) for name in names]
    parameters = inspect.signature(cls).parameters.values()
    return {p.name: p.default for p in parameters if p.name not in wired}


def check_options(entry: Loss, options: Mapping[str, Any] | None, argument: str) -> None:
    """Refuse options that a loss does not have, and values of another type.

    Args:
        entry: of the catalogue.
        options: by name.
        argument: what the caller calls them, for the message.

    Raises:
        ValueError: an unknown option; the error lists what there is.
        TypeError: a value of the wrong type.
    """
    known = options_of(entry)
    hints = typing.get_type_hints(entry.load().__init__)
    for name, value in (options or {}).items():
        if name == "tau" and has_temperature(entry):
            raise ValueError(f"{argument}: tau is a field of its own, not an option: tau={value}")
        if name not in known:
            what = f"it has {', '.join(known)}" if known else "it has none"
            raise ValueError(f"{argument}: {entry.name!r} has no option {name!r}; {what}")
        kinds = _kinds(hints[name])
        if not any(_is_of(kind, value) for kind in kinds):
            expected = " or ".join(_WORDS.get(kind, "none") for kind in kinds)
            raise TypeError(
                f"{argument}: {entry.name!r} takes {expected} for {name}, got {value!r}"
            )


def _kinds(hint: Any) -> tuple[Any, ...]:
    return typing.get_args(hint) or (hint,)


def _is_of(kind: Any, value: Any) -> bool:
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, int | float if kind is float else kind)


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
