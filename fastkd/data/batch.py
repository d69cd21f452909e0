"""Batch: what a loader hands to the engine.

Knows tensors and names; neither how they were made nor what is computed from them.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Fault(NamedTuple):
    """A sample that could not be read, and was replaced.

    Attributes:
        sample: its index in the data set; -1 in a stream.
        name: its file, or whatever else the data set calls it.
        reason: what the reader said.
    """

    sample: int
    name: str
    reason: str


class Batch(NamedTuple):
    """Samples of one rank and one slice of an update.

    Attributes:
        images: [B, C, H, W]; float32 and normalised, or uint8 where the device augments.
        labels: [B] int64, -1 where a sample has none.
        samples: [B] int64, the indices in the data set that were asked for; of a stream, which has
            none, the positions in the epoch, and -1 in its evaluation.
        plan: what the device does to every image, [B, ...] by name; None where nothing is left.
        faults: samples of this batch that had to be replaced.
    """

    images: Tensor
    labels: Tensor
    samples: Tensor
    plan: dict[str, Tensor] | None = None
    faults: tuple[Fault, ...] = ()
