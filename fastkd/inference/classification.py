"""The likeliest classes of a batch of images.

Knows models and tensors; neither files nor what classes are called.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastkd.data.samples import Batch
from fastkd.utils.distributed import World, autocast


class Likeliest(NamedTuple):
    """The classes that an image may be of, the most probable first.

    Attributes:
        sample: index of the image.
        classes: k indices of logits; none where the image's logits are not finite.
        probabilities: k values of the softmax over all classes.
    """

    sample: int
    classes: tuple[int, ...]
    probabilities: tuple[float, ...]


@torch.no_grad()
def likeliest(
    network: nn.Module, batch: Batch, peers: World, amp: str, top: int
) -> tuple[list[Likeliest], int]:
    """Classify a batch; synchronises once. Of [B, classes] logits, [B, k] numbers are kept.

    Args:
        network: on the device, in eval mode.
        batch: on the host.
        peers: whose device it is.
        amp: as in `evaluate`.
        top: k, where there are as many classes.

    Returns:
        One entry for every image, and how many classes there are.

    Raises:
        ValueError: the model does not give [B, classes], or its weights are not float32.
    """
    images = batch.images.to(peers.device, non_blocking=True)
    with autocast(peers.device, amp):
        logits = _logits(network, images)
    finite = logits.isfinite().all(-1)
    probabilities, classes = logits.float().softmax(-1).topk(min(top, logits.shape[-1]))
    rows = zip(
        batch.samples.tolist(), classes.tolist(), probabilities.tolist(), finite.tolist(),
        strict=True,
    )  # fmt: skip
    found = [
        Likeliest(sample, tuple(indices), tuple(values)) if usable else Likeliest(sample, (), ())
        for sample, indices, values, usable in rows
    ]
    return found, logits.shape[-1]


def _logits(network: nn.Module, images: Tensor) -> Tensor:
    try:
        logits = network(images)
    except RuntimeError as error:
        dtype = _dtype(network)
        if dtype == images.dtype or isinstance(error, torch.OutOfMemoryError):
            raise
        raise ValueError(
            f"predict: the model's weights must be float32, as images are, got {dtype}: hand over "
            "model.float(); amp computes in fewer bits"
        ) from error
    if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != len(images):
        raise ValueError(
            f"predict: the model's logits must be [B, classes] with B = {len(images)}, got "
            f"{_described(logits)}"
        )
    return logits


def _dtype(network: nn.Module) -> torch.dtype:
    floating = (p.dtype for p in network.parameters() if p.is_floating_point())
    return next(floating, torch.float32)


def _described(output: Any) -> str:
    if isinstance(output, Tensor):
        return str(list(output.shape))
    return f"a {type(output).__name__}"
