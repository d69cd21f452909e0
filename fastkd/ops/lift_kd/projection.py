"""The lifting projector as a value: what every implementation of lift_kd gets beside the tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# What can have a gradient, in the order of every tuple of gradients and of `needs`.
DIFFERENTIABLE = ("tokens", "weight", "bias", "norm_weight", "norm_bias")
Gradients = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]

# Of the LayerNorm, as in the paper's released code; the other norms of a timm ViT have 1e-6.
LIFT_EPS = 1e-5


@dataclass(frozen=True)
class Projection:
    """Linear, then LayerNorm where there is a ``norm_weight``.

    Attributes:
        weight: [Dt, Ds].
        bias: [Dt] or None.
        norm_weight: [Dt], or None for no LayerNorm.
        norm_bias: [Dt] or None.
        eps: of the LayerNorm.
        compute: dtype in which matrix products take their operands; sums are in `accumulator`.
        exact_gradients: hand the parameters' gradients out in the accumulator's dtype, because they
            will be scaled before they are rounded to the parameters' own.
    """

    weight: Tensor
    bias: Tensor | None
    norm_weight: Tensor | None
    norm_bias: Tensor | None
    eps: float
    compute: torch.dtype
    exact_gradients: bool = False

    @property
    def width(self) -> int:
        """Channels of the lifted tokens, Dt."""
        return self.weight.shape[0]

    @property
    def accumulator(self) -> torch.dtype:
        """float64 for float64 products, else float32."""
        return torch.float64 if self.compute == torch.float64 else torch.float32

    def parameters(self) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
        """Weight, bias, norm weight, norm bias."""
        return self.weight, self.bias, self.norm_weight, self.norm_bias

    def empty_gradients(self, tokens: Tensor, needs: Sequence[bool]) -> Gradients:
        """Uninitialized gradients like their inputs; without elements where they are not needed."""
        dtype = self.accumulator if self.exact_gradients else None
        gradients = [torch.empty_like(tokens) if needs[0] else tokens.new_empty(0)]
        for parameter, needed in zip(self.parameters(), needs[1:], strict=True):
            if parameter is None or not needed:
                gradients.append(tokens.new_empty(0))
                continue
            # Contiguous, because kernels write row by row, however the parameter lies in memory.
            gradients.append(
                torch.empty_like(parameter, dtype=dtype, memory_format=torch.contiguous_format)
            )
        return tuple(gradients)  # type: ignore[return-value]
