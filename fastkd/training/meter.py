"""What a run counts: sums of every term, skipped updates, images and seconds.

Knows tensors and clocks; neither models nor files. Sums stay on the device until they are read.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


class Meter:
    """Sums of every term over the updates of an epoch, and how many updates were skipped.

    Args:
        names: what is summed, in order.
        device: where the sums are kept.
    """

    def __init__(self, names: tuple[str, ...], device: torch.device) -> None:
        self.names = names
        self.count = 0
        self.sums = torch.zeros(len(names), dtype=torch.float64, device=device)
        # Skipped updates of the epoch, skipped ones in a row until now, and the longest such row.
        self.skips = torch.zeros(3, dtype=torch.float64, device=device)

    def add(self, values: Tensor, applied: Tensor) -> None:
        """Count an update; one that was skipped adds nothing to the sums. Does not synchronise.

        Args:
            values: [len(names)], on the device.
            applied: bool scalar on the device, whether the update was applied.
        """
        self.sums += torch.where(applied, values.to(self.sums.dtype), 0)
        skipped = (~applied).to(self.skips.dtype)
        total, row, longest = self.skips.unbind()
        row = (row + 1) * skipped
        self.skips = torch.stack([total + skipped, row, torch.maximum(longest, row)])
        self.count += 1

    def reset(self) -> None:
        """Start an epoch: all at zero but the row of skipped updates, which may go on."""
        self.sums.zero_()
        row = self.skips[1]
        self.skips = torch.stack([torch.zeros_like(row), row, row])
        self.count = 0

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps, so that a resumed epoch reports means of the whole epoch."""
        return {"sums": self.sums, "skips": self.skips, "count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put back what `state_dict` gave."""
        self.sums.copy_(state["sums"])
        self.skips.copy_(state["skips"])
        self.count = state["count"]


@dataclass(frozen=True)
class Reading:
    """A meter's sums on the host, over all processes.

    Attributes:
        sums: of every term by name, mean over processes.
        applied: updates that were applied.
        skipped: updates that were skipped.
        longest_row: the most updates skipped in a row.
    """

    sums: dict[str, float]
    applied: int = 0
    skipped: int = 0
    longest_row: int = 0

    def means(self, since: Reading | None = None) -> dict[str, float]:
        """Means over the updates applied, since an earlier reading or in all; 0 of none."""
        before = Reading(dict.fromkeys(self.sums, 0.0)) if since is None else since
        count = max(1, self.applied - before.applied)
        return {name: (total - before.sums[name]) / count for name, total in self.sums.items()}


@dataclass
class Throughput:
    """Images and seconds, and how many of those were spent waiting for data."""

    images: int = 0
    seconds: float = 0.0
    waited: float = 0.0

    def record(self) -> dict[str, float]:
        """Images a second and the part of the time that data were waited for, in %."""
        seconds = max(self.seconds, 1e-9)
        return {
            "images_per_second": self.images / seconds,
            "data_wait": 100 * self.waited / seconds,
        }

    def since(self, earlier: Throughput) -> Throughput:
        """The difference to an earlier reading."""
        return Throughput(
            self.images - earlier.images,
            self.seconds - earlier.seconds,
            self.waited - earlier.waited,
        )
