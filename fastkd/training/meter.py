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


def now() -> datetime:
    """Return the local time, with its offset."""
    return datetime.now().astimezone()


class Skipped(NamedTuple):
    """An update whose loss or gradient was not finite, as one process saw it."""

    update: int  # its number in the run, from 1
    samples: list[int]  # indices in the training set of what this process fed to it
    finite_loss: bool  # else the loss itself was not finite


class Meter:
    """Sums of every term over the updates of an epoch, and how many updates were skipped.

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

    def add(self, values: Tensor, applied: Tensor) -> None:
        """Count an update; one that was skipped adds nothing to the sums. Does not synchronize."""
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
        self.interval = None

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers, from which a resumed epoch reports means of the whole epoch."""
        interval = None if self.interval is None else self.interval._asdict()
        sums, skips = self.sums.tolist(), self.skips.tolist()
        return {
            "sums": sums, "skips": skips, "count": self.count, "lr": self.lr, "interval": interval
        }  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put back what `state_dict` gave."""
        self.sums.copy_(torch.tensor(state["sums"], dtype=torch.float64))
        self.skips.copy_(torch.tensor(state["skips"], dtype=torch.float64))
        self.count, self.lr = state["count"], state["lr"]
        self.interval = None if state["interval"] is None else Reading(**state["interval"])


class Reading(NamedTuple):
    """A meter's sums on the host, over all processes."""

    sums: dict[str, float]  # of every term by name, mean over processes
    applied: int = 0  # updates
    skipped: int = 0
    longest_row: int = 0  # the most updates skipped in a row

    def means(self, since: Reading | None = None) -> dict[str, float]:
        """Means over the updates applied, since an earlier reading or in all; 0 of none."""
        before = Reading(dict.fromkeys(self.sums, 0.0)) if since is None else since
        count = max(1, self.applied - before.applied)
        return {name: (total - before.sums[name]) / count for name, total in self.sums.items()}


class Stopwatch:
    """Speed of an epoch and of its intervals, as this process sees it."""

    def __init__(self, meter: Meter, device: torch.device) -> None:
        self.meter = meter
        self.device = device
        self.images = 0
        self.waited = 0.0  # seconds, for data
        self.started = time.perf_counter()
        self._interval = (0, 0.0, self.started)

    def updates(self, batches: Iterable[Batch], accumulation: int) -> Iterator[list[Batch]]:
        """Yield the slices of each update, and measure how long the data are waited for."""
        batches = iter(batches)
        while True:
            began = time.perf_counter()
            slices = list(itertools.islice(batches, accumulation))
            self.waited += time.perf_counter() - began
            self.images += sum(len(batch.images) for batch in slices)
            if not slices:
                return
            yield slices

    def interval(self, reading: Reading, processes: int) -> dict[str, Any]:
        """Means and speed since the last interval."""
        before, self.meter.interval = self.meter.interval, reading
        images, waited, began = self._interval
        self._interval = self.images, self.waited, time.perf_counter()
        return self._record(
            reading, before, processes * (self.images - images), self.waited - waited, began
        )

    def epoch(self, reading: Reading, processes: int) -> dict[str, Any]:
        """Means of the whole epoch, and speed since it was begun or resumed."""
        return self._record(reading, None, processes * self.images, self.waited, self.started)

    def _record(
        self, reading: Reading, before: Reading | None, images: int, waited: float, began: float
    ) -> dict[str, Any]:
        seconds = max(time.perf_counter() - began, 1e-9)
        record: dict[str, Any] = {"lr": self.meter.lr, **reading.means(before)}
        record |= {"images_per_second": images / seconds, "data_wait": 100 * waited / seconds}
        if self.device.type == "cuda":  # the most that tensors have held, in GiB
            record["gpu_memory"] = torch.cuda.max_memory_allocated(self.device) / 2**30
        record["skipped_updates"] = reading.skipped - (0 if before is None else before.skipped)
        return record | {"seconds": seconds, "time": now().isoformat("T", "seconds")}
