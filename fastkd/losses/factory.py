"""Losses by the names that recipes use: from a name and options to a term.

Knows the catalogue; which models the terms compare is the caller's business.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from fastkd.losses.base import FeatureTerm, Key, LogitTerm, Pairs
from fastkd.losses.build import check_options, has_temperature
from fastkd.losses.feature import FeatureKD
from fastkd.losses.registry import FEATURE_LOSSES, LOGIT_LOSSES, names


def create_logit_loss(
    name: str,
    *,
    weight: float = 1.0,
    tau: float | None = None,
    options: Mapping[str, Any] | None = None,
) -> LogitTerm:
    """Build a logit loss by name.

    Args:
        name: of the catalogue's logit losses (``fastkd losses``).
        weight: what the caller multiplies the term with.
        tau: temperature, of losses that have one; None leaves it at the loss's own.
        options: what else the loss takes.

    Returns:
        The term.

    Raises:
        ValueError: an unknown name or option, or a value that the loss refuses.
    """
    known = {entry.name: entry for entry in LOGIT_LOSSES}
    if name not in known:
        raise ValueError(f"logit_loss must be one of {names(LOGIT_LOSSES)}, got {name!r}")
    entry = known[name]
    check_options(entry, options, "logit_options")
    arguments = dict(options or {})
    if tau is not None and has_temperature(entry):
        arguments["tau"] = tau
    term: LogitTerm = entry.load()(weight=weight, **arguments)
    return term


def create_feature_loss(
    name: str,
    pairs: Pairs,
    *,
    weight: float = 0.2,
    projector: str = "none",
    student_dims: Mapping[Key, int],
    teacher_dims: Mapping[Key, int],
    resample: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> FeatureTerm:
    """Build a feature loss over pairs of blocks by name.

    Args:
        name: of the catalogue's feature losses (``fastkd losses``).
        pairs: (student key, teacher key).
        weight: what the caller multiplies the term with.
        projector: how widths meet; "none" for a loss that projects by itself.
        student_dims: channels per student key.
        teacher_dims: channels per teacher key.
        resample: as in `FeatureTerm`.
        options: what else the loss takes.

    Returns:
        The term; learnable parts are on the CPU.

    Raises:
        ValueError: an unknown name or option, or widths that do not meet.
    """
    known = {entry.name: entry for entry in FEATURE_LOSSES}
    if name not in known:
        raise ValueError(f"feature_loss must be one of {names(FEATURE_LOSSES)}, got {name!r}")
    entry = known[name]
    check_options(entry, options, "feature_options")
    make: Callable[..., FeatureTerm] = partial(FeatureKD, name, projector=projector)
    if entry.projects:
        make = entry.load()
        if projector != "none":
            raise ValueError(
                f"projector: {name!r} brings widths together itself, got projector={projector!r}"
            )
    return make(
        pairs=pairs,
        weight=weight,
        student_dims=student_dims,
        teacher_dims=teacher_dims,
        resample=resample,
        **(options or {}),
    )
