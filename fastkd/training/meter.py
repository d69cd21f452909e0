"""Sums of an epoch's losses on the device, and its speed."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterable, Iterator
from datetime import datetime
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastkd.data.samples import Batch


def timestamp() -> str:
    """Return the local time with its offset, in ISO 8601."""
    return datetime.now().astimezone().isoformat("T", "seconds")


class Skipped(NamedTuple):
    """An update whose loss or gradient was not finite, as one process saw it."""

    update: int  # its number in the run, from 1
    samples: list[int]  # indices in the training set of what this process fed to it
    finite_loss: bool  # else the loss itself was not finite


class Reading(NamedTuple):
    """A meter's sums on the host, over all processes, and the speed of this one."""

    sums: dict[str, float]  # of every term by name, mean over processes
    applied: int = 0  # updates
    skipped: int = 0
    longest_row: int = 0  # the most updates skipped in a row
    images: int = 0  # of this process, in the epoch so far
    waited: float = 0.0  # seconds, for data
    seconds: float = 0.0

    def record(self, since: Reading | None, processes: int) -> dict[str, Any]:
        """Means over the updates applied, and the speed, since an earlier reading or in all."""
        before = Reading(dict.fromkeys(self.sums, 0.0)) if since is None else since
        count = max(1, self.applied - before.applied)
        seconds = max(self.seconds - before.seconds, 1e-9)
        return {
            **{name: (total - before.sums[name]) / count for name, total in self.sums.items()},
            "images_per_second": processes * (self.images - before.images) / seconds,
            "data_wait": 100 * (self.waited - before.waited) / seconds,
            "skipped_updates": self.skipped - before.skipped,
            "seconds": seconds,
        }


class Meter:
    """Sums of every term over the updates of an epoch, how many were skipped, and their time.

    Args:
        names: what is summed, in order.
        device: where the sums are kept.

    Attributes:
        lr: learning rate of the last update.
        interval: what was read at the epoch's last interval; None before the first.
    """

    def __init__(self, names: tuple[str, ...], device: torch.device) -> None:
        self.names = names
        self.count = 0
        self.sums = torch.zeros(len(names), dtype=torch.float64, device=device)
        # Skipped updates of the epoch, skipped ones in a row until now, and the longest such row.
        self.skips = torch.zeros(3, dtype=torch.float64, device=device)
        self.lr = 0.0
        self.interval: Reading | None = None
        self.images = 0
        self.waited = self.seconds = 0.0
        self._began: float | None = None  # while an update is fetched or computed

    @property
    def elapsed(self) -> float:
        """Seconds of the epoch's updates, with those of an earlier part of the run."""
        return self.seconds + (0.0 if self._began is None else time.perf_counter() - self._began)

    def add(self, values: Tensor, applied: Tensor) -> None:
        """Count an update; one that was skipped adds nothing to the sums. Does not synchronize."""
        self.sums += torch.where(applied, values.to(self.sums.dtype), 0)
        skipped = (~applied).to(self.skips.dtype)
        total, row, longest = self.skips.unbind()
        row = (row + 1) * skipped
        self.skips = torch.stack([total + skipped, row, torch.maximum(longest, row)])
        self.count += 1

    def timed(self, batches: Iterable[Batch], accumulation: int) -> Iterator[list[Batch]]:
        """Yield the slices of each update, and measure the time until the next is asked for."""
        batches = iter(batches)
        self._began = time.perf_counter()
        while slices := list(itertools.islice(batches, accumulation)):
            self.waited += time.perf_counter() - self._began
            self.images += sum(len(batch.images) for batch in slices)
            yield slices
            self.seconds, self._began = self.elapsed, time.perf_counter()
        self._began = None

    def reset(self) -> None:
        """Start an epoch: all at zero but the row of skipped updates, which may go on."""
        self.sums.zero_()
        row = self.skips[1]
        self.skips = torch.stack([torch.zeros_like(row), row, row])
        self.count = self.images = 0
        self.waited = self.seconds = 0.0
        self.interval = None

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers, from which a resumed epoch reports means of the whole epoch."""
        state = {name: getattr(self, name) for name in _PLAIN} | {"seconds": self.elapsed}
        interval = None if self.interval is None else self.interval._asdict()
        sums, skips = self.sums.tolist(), self.skips.tolist()
        return {**state, "sums": sums, "skips": skips, "interval": interval}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put back what `state_dict` gave."""
        for name in _PLAIN:
            setattr(self, name, state[name])
        self.sums.copy_(torch.tensor(state["sums"], dtype=torch.float64))
        self.skips.copy_(torch.tensor(state["skips"], dtype=torch.float64))
        self.interval = None if state["interval"] is None else Reading(**state["interval"])


_PLAIN = ("count", "lr", "images", "waited", "seconds")
