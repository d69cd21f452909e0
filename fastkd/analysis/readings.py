"""Numbers that tables, figures and files read off results: one formula each, in one place.

Knows the records of ``results`` and nothing of how a number is shown.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch

from fastkd.analysis.results import LayerResult, ModelResult, Sep
from fastkd.ops.sep import bandwidth

UNTRAINED = "untrained"


def excess_overlap(overlap: np.ndarray | float, random: float) -> np.ndarray | float:
    """Overlap beyond that of random subspaces: 0 for random ones, 1 for equal ones.

    (o - k/D) / (1 - k/D), which compares models of different widths.

    Args:
        overlap: ||V_i^T V_j||_F^2 / k.
        random: k / D, its expectation for random subspaces.

    Returns:
        As ``overlap``; NaN for k = D, where every subspace is the whole space.
    """
    if random >= 1:
        return overlap * float("nan")
    return (overlap - random) / (1 - random)


def bandwidths(curve: np.ndarray, levels: Iterable[float]) -> np.ndarray:
    """First bin at which a cumulated curve reaches each level, as a part of the bins.

    Args:
        curve: [F], non-decreasing, in [0, 1].
        levels: parts of the energy.

    Returns:
        [levels] float64 in (0, 1], see `fastkd.ops.sep.bandwidth`.
    """
    return bandwidth(torch.tensor(curve), list(levels)).numpy()


def white_noise_bandwidths(sep: Sep) -> np.ndarray:
    """Bandwidths of white noise with as many channels, [levels]."""
    return bandwidths(sep.white_noise, sep.levels)


def first_median_last(angles: np.ndarray) -> tuple[float, float, float]:
    """The smallest, the median and the largest of ascending principal angles; NaN without any."""
    if len(angles) == 0:
        return (float("nan"),) * 3
    return float(angles[0]), float(np.median(angles)), float(angles[-1])


def levels_of(layers: Iterable[LayerResult]) -> list[float]:
    """All levels at which the layers' ranks were read, ascending."""
    return sorted({level for layer in layers for level in layer.ranks.levels})


def bandwidth_levels_of(layers: Iterable[LayerResult]) -> list[float]:
    """All levels at which the layers' bandwidths were read, ascending."""
    return sorted({level for layer in layers if layer.sep for level in layer.sep.levels})


def subspace_sizes_of(models: Iterable[ModelResult]) -> list[int]:
    """All k for which rotation was measured in a last layer, ascending."""
    return sorted(
        {r.k for model in models if model.last.shared for r in model.last.shared.rotation}
    )


def has_shared_depth(model: ModelResult) -> bool:
    """Was more than one layer seen in its shared basis?"""
    return sum(layer.shared is not None for layer in model.layers) > 1


def percent(level: float) -> str:
    """A part of the energy as text: 0.99 -> ``"99"``, 0.995 -> ``"99.5"``."""
    return f"{100 * level:g}"
