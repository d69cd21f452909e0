"""ViTKD: mimic the teacher's first blocks, generate its last one from masked tokens."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from einops import rearrange
from torch import Tensor, nn

from fastkd.losses.base import FeatureTerm, Grid, Key, Pairs, check_numbers
from fastkd.losses.projectors import fused_weights
from fastkd.ops import feature_kd, lift_kd
from fastkd.ops.checks import at_least_float32
from fastkd.tokens import ResampleMode, Tokens

MASK_RATIO = 0.5
MIMIC_WEIGHT = 3e-5


class ViTKD(FeatureTerm):
    r"""Mimicking of the shallow pairs, generation of the last one.

    .. math:: L = \frac{m}{B} \sum_{(i, j) \in P_{:-1}} \| A_i F^s_i - F^t_j \|^2
                  + \frac{g}{\lambda B} \| M \odot (G(F^s_{last}) - F^t_{last}) \|^2

    with m ``mimic_weight``, g ``generate_weight`` and lambda ``mask_ratio``. Squares are averaged
    over images only, hence the small weights. A is a Linear to the teacher's width, the identity
    where the widths are equal. G does the same, replaces a share lambda of each image's tokens by
    one learned token and runs Conv 3x3, ReLU, Conv 3x3 over the grid; M keeps the replaced tokens.

    Source: Yang et al. 2022 (arXiv 2209.02432), with the generator and the defaults of their code,
    for weight 1 beside the whole cross-entropy. They pair blocks 0 and 1, and the last blocks after
    the final norm: taps named "blocks.0", "blocks.1" and "norm". Numbered taps give the last block
    before that norm, whose scale may need another ``generate_weight``. All parameters, about
    18 Dt^2 and a Linear per pair, are dropped at inference. The mask is random in evaluation too.

    Args:
        pairs: (student key, teacher key); the last (or single) one is generated, others mimicked.
        weight: factor of the loss.
        student_dims: channels per student key.
        teacher_dims: channels per teacher key.
        resample: see `FeatureTerm`.
        mask_ratio: share of tokens that are masked, in (0, 1), rounded up to whole tokens; 0.5 by
            default.
        mimic_weight: of the first part, >= 0, 3e-5 by default; 0 removes it and its parameters.
        generate_weight: of the second part, >= 0; 0 removes it and its parameters.

    Raises:
        ValueError: an option out of range or without effect, or nothing to do.
    """

    def __init__(
        self,
        pairs: Pairs,
        weight: float,
        student_dims: Mapping[Key, int],
        teacher_dims: Mapping[Key, int],
        resample: ResampleMode | None = None,
        *,
        mask_ratio: float | None = None,
        mimic_weight: float | None = None,
        generate_weight: float = 3e-6,
    ) -> None:
        super().__init__(pairs, weight, resample)
        single = len(self.pairs) == 1
        if mask_ratio is not None and generate_weight == 0:
            raise ValueError(f"ViTKD: {mask_ratio=} has no effect with generate_weight=0")
        self.mask_ratio = MASK_RATIO if mask_ratio is None else mask_ratio
        default = 0.0 if single else MIMIC_WEIGHT
        self.mimic_weight = default if mimic_weight is None else mimic_weight
        self.generate_weight = generate_weight
        check_numbers(self, mask_ratio=(self.mask_ratio, 0.0))
        check_numbers(self, mimic_weight=(self.mimic_weight, 0.0))
        check_numbers(self, generate_weight=(generate_weight, 0.0))
        if not 0 < self.mask_ratio < 1:
            raise ValueError(f"ViTKD: mask_ratio must lie between 0 and 1, got {mask_ratio}")
        if single and self.mimic_weight > 0:
            raise ValueError(f"ViTKD: {mimic_weight=} has no effect on a single pair (generated)")
        if self.mimic_weight == 0 and generate_weight == 0:
            raise ValueError(
                f"ViTKD: nothing to do for {len(self.pairs)} pair(s): both weights are 0 (the last "
                "pair is generated only)"
            )
        mimicked = len(self.pairs) - 1 if self.mimic_weight > 0 else 0
        self._dims = tuple(self.widths(student_dims, teacher_dims))
        self.aligners = nn.ModuleList(_aligner(*dims) for dims in self._dims[:mimicked])
        self.generator = _Generator(*self._dims[-1]) if generate_weight > 0 else None

    def compare(self, student: Mapping[Key, Tokens], teacher: Mapping[Key, Tokens]) -> Tensor:
        def pair(index: int) -> tuple[Tokens, Tokens]:
            return self.matched(student, teacher, index, self._dims[index])

        parts = [
            self.mimic_weight * _squared_distance(aligner, *pair(index))
            for index, aligner in enumerate(self.aligners)
        ]
        if self.generator is not None:
            made = self._generate(self.generator, *pair(len(self.pairs) - 1))
            parts.append(self.generate_weight * made)
        return torch.stack(parts).sum()

    def _generate(self, generator: nn.Module, student: Tokens, teacher: Tokens) -> Tensor:
        mask = _random_mask(student.data, self.mask_ratio)
        made = generator(student.data, mask, student.grid)
        difference = at_least_float32(made) - at_least_float32(teacher.data)
        squares = difference.square().sum(dim=-1)
        total = (squares * mask).sum() / self.mask_ratio
        return total / max(1, len(mask))  # an empty batch gives 0


class _Generator(nn.Module):
    """Make the teacher's map from a student's of which some tokens are masked."""

    def __init__(self, student_dim: int, teacher_dim: int) -> None:
        super().__init__()
        self.aligner = _aligner(student_dim, teacher_dim)
        self.mask_token = nn.Parameter(torch.zeros(teacher_dim))
        self.convolutions = nn.Sequential(
            nn.Conv2d(teacher_dim, teacher_dim, kernel_size=3, padding=1),
            nn.ReLU(),
            nn.Conv2d(teacher_dim, teacher_dim, kernel_size=3, padding=1),
        )

    def forward(self, tokens: Tensor, mask: Tensor, grid: Grid) -> Tensor:
        """Map tokens [B, N, Ds] and a mask [B, N] to [B, N, Dt]."""
        # Outside autocast, half-precision tokens meet float32 parameters.
        aligned = self.aligner(tokens.to(self.mask_token.dtype))
        shown = torch.where(mask.unsqueeze(-1), self.mask_token.to(aligned.dtype), aligned)
        maps = self.convolutions(rearrange(shown, "b (h w) d -> b d h w", h=grid[0], w=grid[1]))
        return rearrange(maps, "b d h w -> b (h w) d")


def _aligner(student_dim: int, teacher_dim: int) -> nn.Module:
    return nn.Identity() if student_dim == teacher_dim else nn.Linear(student_dim, teacher_dim)


def _squared_distance(aligner: nn.Module, student: Tokens, teacher: Tokens) -> Tensor:
    """|A student - teacher|^2: sum over tokens and channels, mean over images."""
    weights = fused_weights(aligner)  # then the projected map is never written
    if weights is None:
        mean = feature_kd(aligner(student.data), teacher.data, grid=student.grid)
    else:
        weight, bias = weights
        mean = lift_kd(student.data, weight, teacher.data, bias, grid=student.grid)
    return mean * (teacher.data.shape[1] * teacher.dim)


def _random_mask(tokens: Tensor, ratio: float) -> Tensor:
    """[B, N], True for the same number of random tokens in each image."""
    batch, count = tokens.shape[:2]
    # 1e-6, because in floating point 1 - 0.9 is below 0.1: of ten tokens, none would be left.
    shown = math.floor(count * (1 - ratio) + 1e-6)
    order = torch.rand(batch, count, device=tokens.device).argsort(dim=1)
    return order.argsort(dim=1) >= shown
