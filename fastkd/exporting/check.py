"""Whether a written model computes what the student does."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

BATCHES = (2, 5)  # of two sizes, neither of them 1: a size that was built in would show


def largest_difference(
    model: nn.Module, input_size: tuple[int, ...], compute: Callable[[Tensor], Tensor]
) -> float:
    """How far another way of computing the logits is from the model's.

    Args:
        model: in eval mode, on the CPU.
        input_size: (C, H, W).
        compute: float32 images [B, C, H, W] to logits [B, classes].

    Returns:
        The largest absolute difference, on a random batch of each size in `BATCHES`.

    Raises:
        RuntimeError: it is more than rounding.
    """
    generator = torch.Generator().manual_seed(0)
    largest = 0.0
    for batch in BATCHES:
        images = torch.randn(batch, *input_size, generator=generator)
        with torch.no_grad():
            expected = model(images)
            difference = (compute(images) - expected).abs().max().item()
        if not difference <= 1e-4 * max(1.0, expected.abs().max().item()):  # NaN is refused, too
            raise RuntimeError(
                f"export: what was written computes something else: logits differ by "
                f"{difference:.1e} from the student's on a random batch of {batch}"
            )
        largest = max(largest, difference)
    return largest
