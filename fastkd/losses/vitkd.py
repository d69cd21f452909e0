"""ViTKD: mimic the teacher's first blocks, generate its last one from masked tokens."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from einops import rearrange
from torch import Tensor, nn

from fastkd.losses.base import (
    FeatureTerm,
    Grid,
    Key,
    Pairs,
    check_option,
    mean_of,
)
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

    with m ``mimic_weight``, g ``generate_weight`` and lambda ``mask_ratio``. Squares are summed
    over pairs, tokens and channels and averaged over images only, hence the small weights. A is a
    Linear to the teacher's width, the identity where the widths are equal. G aligns widths in the
    same way, replaces a share lambda of each image's tokens by one learned token, at random in each
    call, and runs Conv 3x3, ReLU, Conv 3x3 over the grid; M keeps the replaced tokens only. A
    single pair is generated, and nothing is mimicked.

    Source: Yang et al. 2022 (arXiv 2209.02432), with the generator and the defaults of their code,
    which are for weight 1 beside the whole cross-entropy. They pair blocks 0 and 1 of both models,
    and the last blocks after the final norm: taps named "blocks.0", "blocks.1" and "norm" give the
    same, while numbered taps give the last block before that norm, whose scale may need another
    ``generate_weight``. Here grids need not be square, any number of blocks may be mimicked, and
    pairs may differ in widths and grids.

    All parameters are dropped at inference: about 18 Dt^2 in the convolutions, Ds Dt in each
    Linear. They have torch's default initialization, as in the authors' code; the mask token starts
    at zero. The mask is drawn from the global generator of the tokens' device without synchronizing
    with it, in evaluation too, so repeated values differ. Projected maps of the mimicked pairs are
    not written (`fastkd.ops.lift_kd`); G runs in autocast's dtype where it is on.

    With tensors [B, 196, Ds] and [B, 196, Dt] in dicts by block, without taps::

        term = ViTKD([(0, 0), (11, 11)], 1.0, {0: 192, 11: 192}, {0: 384, 11: 384})
        loss = term(*({k: Tokens(x, (14, 14)) for k, x in maps.items()} for maps in (s, t)))

    Args:
        pairs: (student key, teacher key); the last one is generated, the others are mimicked.
        weight: factor of the loss.
        student_dims: channels per student key.
        teacher_dims: channels per teacher key.
        resample: see `FeatureTerm`.
        mask_ratio: share of tokens that are masked, in (0, 1), rounded up to whole tokens; 0.5 by
            default. Refused where nothing is generated.
        mimic_weight: of the first part, >= 0, 3e-5 by default; 0 removes it and its parameters.
            Refused with a single pair.
        generate_weight: of the second part, >= 0; 0 removes it and its parameters.

    Raises:
        ValueError: no pairs, an option out of range or of a removed part, a key without channels,
            or nothing to do.
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
        check_option(self, "generate_weight", generate_weight)
        self.mimic_weight = self._checked_mimic_weight(mimic_weight)
        self.generate_weight = generate_weight
        self.mask_ratio = self._checked_mask_ratio(mask_ratio)
        mimicked = len(self.pairs) - 1 if self.mimic_weight > 0 else 0
        if mimicked == 0 and generate_weight == 0:
            raise ValueError(
                f"ViTKD: nothing to do for {len(self.pairs)} pair(s) with mimic_weight="
                f"{self.mimic_weight} and generate_weight=0: the last pair is generated only"
            )
        self._dims = tuple(self.widths(student_dims, teacher_dims))
        self.aligners = nn.ModuleList(_aligner(*dims) for dims in self._dims[:mimicked])
        self.generator = _Generator(*self._dims[-1]) if generate_weight > 0 else None

    def compare(self, student: Mapping[Key, Tokens], teacher: Mapping[Key, Tokens]) -> Tensor:
        """Mimic the shallow pairs and generate the last; see `FeatureTerm.forward`.

        Raises:
            ValueError: tokens do not have the channels given to the constructor, too.
        """
        parts = [
            self.mimic_weight * _squared_distance(aligner, *self._pair(student, teacher, index))
            for index, aligner in enumerate(self.aligners)
        ]
        if self.generator is not None:
            pair = self._pair(student, teacher, len(self.pairs) - 1)
            parts.append(self.generate_weight * self._generate(self.generator, *pair))
        return torch.stack(parts).sum()

    def _checked_mimic_weight(self, weight: float | None) -> float:
        single = len(self.pairs) == 1
        if weight is None:
            return 0.0 if single else MIMIC_WEIGHT
        check_option(self, "mimic_weight", weight)
        if single and weight > 0:
            raise ValueError(
                f"ViTKD: mimic_weight is of the pairs before the last, got mimic_weight={weight} "
                "with a single pair, which is generated"
            )
        return weight

    def _checked_mask_ratio(self, ratio: float | None) -> float:
        if ratio is None:
            return MASK_RATIO
        check_option(self, "mask_ratio", ratio)
        if not 0 < ratio < 1:
            raise ValueError(f"ViTKD: mask_ratio must lie between 0 and 1, got {ratio}")
        if self.generate_weight == 0:
            raise ValueError(
                f"ViTKD: mask_ratio is of the generated pair, got mask_ratio={ratio} with "
                "generate_weight=0"
            )
        return ratio

    def _generate(self, generator: nn.Module, student: Tokens, teacher: Tokens) -> Tensor:
        mask = _random_mask(student.data, self.mask_ratio)
        made = generator(student.data, mask, student.grid)
        difference = at_least_float32(made) - at_least_float32(teacher.data)
        squares = difference.square().sum(dim=-1)
        return mean_of((squares * mask).sum() / self.mask_ratio, len(mask))

    def _pair(
        self, student: Mapping[Key, Tokens], teacher: Mapping[Key, Tokens], index: int
    ) -> tuple[Tokens, Tokens]:
        mine, frozen = self.matched(student, teacher, index)
        if (mine.dim, frozen.dim) != self._dims[index]:
            raise ValueError(
                f"ViTKD: pair {index} must have {self._dims[index]} channels (student's, "
                f"teacher's), got {(mine.dim, frozen.dim)} from {mine.source} and {frozen.source}"
            )
        return mine, frozen


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
    weights = fused_weights(aligner)
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
