"""`Tokens`, what a tap hands to a loss, and the matching of two token maps' grids."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

__all__ = ["RESAMPLE_MODES", "Tokens", "match_grids"]

ResampleMode = Literal["bilinear", "bicubic", "area", "nearest"]
RESAMPLE_MODES: tuple[str, ...] = get_args(ResampleMode)


@dataclass(frozen=True)
class Tokens:
    """Patch tokens of one layer of one model, prefix tokens already dropped.

    Attributes:
        data: [B, N, D] features, in any float dtype and with any strides.
        grid: (H, W) with H * W = N, row-major: token n lies at row n // W, column n % W.
        num_prefix: how many prefix tokens (class, distillation, registers) were dropped.
        source: where the tokens came from, for error messages: ``"deit_tiny blocks.11"``.
    """

    data: Tensor
    grid: tuple[int, int]
    num_prefix: int = 0
    source: str = "tokens"

    def __post_init__(self) -> None:
        if self.data.ndim != 3:
            raise ValueError(
                f"{self.source}: tokens must be [B, N, D], got {list(self.data.shape)}"
            )
        if math.prod(self.grid) != self.data.shape[1]:
            raise ValueError(
                f"{self.source}: grid {self.grid} has {math.prod(self.grid)} positions, "
                f"but there are {self.data.shape[1]} tokens (a CLS token left in?)"
            )

    @property
    def dim(self) -> int:
        """Number of channels D."""
        return self.data.shape[-1]

    def resample(self, grid: tuple[int, int], mode: ResampleMode = "bilinear") -> Tokens:
        """Interpolate the tokens to another grid; allocates a new [B, H * W, D] tensor.

        Args:
            grid: the new (H, W).
            mode: ``"bilinear"``, ``"bicubic"``, ``"area"`` or ``"nearest"``, as in
                `torch.nn.functional.interpolate`; the first two are antialiased when shrinking.

        Returns:
            Tokens on the new grid; ``self`` if that is its grid.

        Raises:
            ValueError: ``mode`` is none of the four.
        """
        if mode not in RESAMPLE_MODES:
            raise ValueError(f"resample must be one of {RESAMPLE_MODES}, got {mode!r}")
        if grid == self.grid:
            return self
        maps = rearrange(self.data, "b (h w) d -> b d h w", h=self.grid[0])
        antialias = mode in ("bilinear", "bicubic")
        options = {"antialias": True, "align_corners": False} if antialias else {}
        # In float32, because antialiasing does not exist in half precision on a CPU.
        wide = maps.float() if maps.element_size() < 4 else maps
        maps = F.interpolate(wide, size=grid, mode=mode, **options).to(maps.dtype)
        return replace(self, data=rearrange(maps, "b d h w -> b (h w) d"), grid=grid)


def match_grids(
    student: Tokens, teacher: Tokens, resample: ResampleMode | None = None
) -> tuple[Tokens, Tokens]:
    """Resample the teacher's tokens to the student's grid where the grids differ.

    Args:
        student: the student's tokens; their grid is the one that is kept.
        teacher: the teacher's tokens, resampled to the student's grid when ``resample`` is given.
        resample: None refuses different grids; otherwise a mode of `Tokens.resample`.

    Returns:
        Both, on the same grid.

    Raises:
        ValueError: the batch sizes differ, or the grids differ and ``resample`` is None.
    """
    if student.data.shape[0] != teacher.data.shape[0]:
        raise ValueError(
            f"{student.source} has a batch of {student.data.shape[0]}, "
            f"{teacher.source} one of {teacher.data.shape[0]}"
        )
    if student.grid == teacher.grid:
        return student, teacher
    if resample is None:
        raise ValueError(
            f"{student.source} has a {student.grid} grid, {teacher.source} a {teacher.grid} grid: "
            f"choose inputs or layers with equal grids, or set resample to one of {RESAMPLE_MODES}"
        )
    return student, teacher.resample(student.grid, resample)
