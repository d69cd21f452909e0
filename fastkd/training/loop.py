"""The loops: an epoch of updates, and an evaluation.

Knows engines, loaders and clocks; not what is logged where, or when a checkpoint is due.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

from fastkd.data.samples import Batch
from fastkd.inference.evaluate import _check_whole
from fastkd.training.engine import Engine
from fastkd.training.logging import Reading, Throughput
from fastkd.utils.distributed import autocast
from fastkd.utils.random import seeded


def train_one_epoch(
    engine: Engine,
    loader: Iterable[Batch],
    accumulation: int,
    *,
    log_interval: int,
    on_interval: Callable[[dict[str, Any]], None],
    after_update: Callable[[list[Batch]], None],
) -> dict[str, Any]:
    """Run the rest of an epoch.

    Args:
        engine: trained; its position is advanced.
        loader: slices, starting at the engine's position.
        accumulation: slices per update.
        log_interval: updates between two calls of ``on_interval``.
        on_interval: takes the means of every term since the last call, or since the epoch was begun
            or taken up.
        after_update: called with an update's slices before the next; may raise to stop.

    Returns:
        The epoch's record: means of every term, learning rate, throughput, memory, skipped updates.

    Raises:
        NonFiniteError: too many updates in a row had no finite loss and gradient, or none at all.
    """
    engine.task.train()
    lr = engine.lr
    # A host-side check costs nothing where the host computes, and stops at the very update.
    check_always = engine.world.device.type == "cpu" and engine.world.size == 1
    clock = _Clock(engine)
    for slices, waited in _updates(iter(loader), accumulation):
        lr = engine.lr
        engine.update(slices)
        clock.count(slices, waited)
        if check_always:
            engine.read()
        if engine.position.update % log_interval == 0:
            on_interval({**_where(engine, lr), **clock.interval()})
        after_update(slices)
    record = {**_where(engine, lr), **clock.epoch()}
    if record["skipped_updates"] == engine.meter.count > 0 and engine.recipe.amp != "fp16":
        raise engine.non_finite("every update was skipped")
    return record


class _Clock:
    """Measures an epoch and its intervals."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.speed, self.speed_before = Throughput(), Throughput()
        self.reading_before = engine.read()
        self.started = time.perf_counter()

    def count(self, slices: list[Batch], waited: float) -> None:
        self.speed.images += self.engine.world.size * sum(len(b.images) for b in slices)
        self.speed.waited += waited

    def interval(self) -> dict[str, Any]:
        reading, speed = self._read()
        record = self._record(reading, self.reading_before, speed.since(self.speed_before))
        self.reading_before, self.speed_before = reading, speed
        return record

    def epoch(self) -> dict[str, Any]:
        reading, speed = self._read()
        return self._record(reading, None, speed)

    def _read(self) -> tuple[Reading, Throughput]:
        reading = self.engine.read()  # first, as it waits for the device
        self.speed.seconds = time.perf_counter() - self.started
        return reading, dataclasses.replace(self.speed)

    def _record(self, reading: Reading, since: Reading | None, speed: Throughput) -> dict[str, Any]:
        skipped = reading.skipped - (0 if since is None else since.skipped)
        return {
            **reading.means(since),
            **speed.record(),
            **_memory(self.engine.world.device),
            "skipped_updates": skipped,
        }


def _memory(device: torch.device) -> dict[str, float]:
    """The most that tensors have held on a GPU, in GiB."""
    if device.type != "cuda":
        return {}
    return {"gpu_memory": torch.cuda.max_memory_allocated(device) / 2**30}


def _where(engine: Engine, lr: float) -> dict[str, Any]:
    return {"epoch": engine.position.epoch, "update": engine.position.total, "lr": lr}


def _updates(batches: Iterator[Batch], accumulation: int) -> Iterator[tuple[list[Batch], float]]:
    """The slices of each update and the seconds waited for them."""
    while True:
        started = time.perf_counter()
        slices = [batch for _, batch in zip(range(accumulation), batches, strict=False)]
        if not slices:
            return
        yield slices, time.perf_counter() - started


@torch.no_grad()
def evaluate_terms(engine: Engine, loader: Iterable[Batch]) -> dict[str, Any]:
    """Every term of the task on an evaluation set; needs its labels only for a cross-entropy.

    Args:
        engine: its task runs in eval mode, which is put back afterwards.
        loader: this process' share, normalised for the student.

    Returns:
        Means over images by the terms' names, ``"loss"`` first, and ``"count"``, the images of all
        processes.

    Raises:
        ValueError: as `evaluate_model`.
    """
    task, world = engine.task, engine.world
    was_training = task.training
    task.eval()
    names = task.terms.names
    sums = torch.zeros(len(names) + 1, dtype=torch.float64, device=world.device)
    # Terms that draw (masks, patches) draw the same in every evaluation: epochs are compared by it.
    with seeded(engine.recipe.seed, world.device):
        for batch in loader:
            images = batch.images.to(world.device, non_blocking=True)
            target = batch.labels.to(world.device, non_blocking=True)
            engine.begin_pass()
            with autocast(world.device, engine.recipe.amp):
                output = task(images, target, engine.teach(images))
            values = torch.stack([output[name].double() for name in names])
            images_seen = torch.full_like(values[:1], len(images))
            sums += torch.cat([values * images_seen, images_seen])
    task.train(was_training)
    *totals, count = world.sum(sums).tolist()
    _check_whole(loader, int(count))
    averages = [total / max(count, 1) for total in totals]
    return {**dict(zip(names, averages, strict=True)), "count": int(count)}
