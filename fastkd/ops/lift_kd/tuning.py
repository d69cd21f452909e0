"""FASTKD_AUTOTUNE=1: times lift_kd's configurations when a shape is first met, and keeps the best.

Off by default: the search synchronises, takes seconds for every shape, and may choose differently
on every run, which changes the last digits of results.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable
from typing import Any

import torch
import triton
from torch import Tensor

from fastkd.ops.lift_kd.projection import Projection
from fastkd.ops.lift_kd.tiles import CANDIDATES, Tile

logger = logging.getLogger("fastkd")

ENVIRONMENT_AUTOTUNE = "FASTKD_AUTOTUNE"
MAX_IMAGES = 256  # of the batch that is timed

Run = Callable[[Tile, Tensor, Tensor], None]
_best: dict[tuple[Any, ...], Tile] = {}


def tuned(tokens: Tensor, projection: Projection, loss: str, default: Tile, run: Run) -> Tile:
    """The fastest configuration for inputs like these; ``default`` unless tuning is asked for.

    Args:
        tokens: [B, H, W, Ds] on a GPU.
        projection: to what the tokens are lifted, and how.
        loss: one of feature_kd's.
        default: what runs without tuning, and while a CUDA graph is captured.
        run: runs forward and backward with a configuration, on tokens and teacher.

    Returns:
        The configuration.
    """
    if os.environ.get(ENVIRONMENT_AUTOTUNE) != "1" or tokens.device.type != "cuda":
        return default
    key = _shape_class(tokens, projection, loss)
    if key not in _best:
        if torch.cuda.is_current_stream_capturing():
            return default
        _best[key] = _search(tokens, projection, loss, default, run)
    return _best[key]


def _shape_class(tokens: Tensor, projection: Projection, loss: str) -> tuple[Any, ...]:
    return (
        torch.cuda.get_device_name(tokens.device),
        tokens.dtype,
        projection.compute,
        *tokens.shape[1:],
        projection.width,
        projection.norm_weight is not None,
        loss,
    )


def _search(tokens: Tensor, projection: Projection, loss: str, default: Tile, run: Run) -> Tile:
    batch = min(len(tokens), MAX_IMAGES)
    sample = torch.randn(batch, *tokens.shape[1:], device=tokens.device).to(tokens.dtype)
    teacher = torch.randn(*sample.shape[:3], projection.width, device=tokens.device)
    teacher = teacher.to(tokens.dtype)
    # A candidate must also take every grid row that the default takes: what an operator refuses
    # does not depend on tuning.
    candidates = [tile for tile in CANDIDATES if tile.rows >= default.rows or loss != "spectral"]
    times = {tile: _milliseconds(tile, sample, teacher, run) for tile in (default, *candidates)}
    best = min(times, key=times.__getitem__)
    shape = [*tokens.shape[1:], projection.width]
    logger.info(
        "lift_kd: tuned %s %s: %.3f ms with %s, %.3f ms by default",
        shape, loss, times[best], best, times[default],
    )  # fmt: skip
    return best


def _milliseconds(tile: Tile, sample: Tensor, teacher: Tensor, run: Run) -> float:
    from triton.testing import do_bench

    try:
        return do_bench(lambda: run(tile, sample, teacher), return_mode="median")
    except triton.runtime.errors.OutOfResources:
        return math.inf
