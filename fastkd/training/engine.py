"""The loops: one update at a time, one epoch of them, and an evaluation.

Knows how to compute; not where data come from, what is logged where, or when a checkpoint is due.
Nothing here waits for an accelerator between two log intervals.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from timm.data import Mixup
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fastkd.models import TapOutput, Teacher
from fastkd.training.distributed import World
from fastkd.training.seeding import derive_seed, seed_all
from fastkd.training.task import DistillationTask

Batch = tuple[Tensor, Tensor]
AMP_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class NonFiniteError(FloatingPointError):
    """The loss or the gradient became infinite or NaN; nothing was saved since."""


def autocast(device: torch.device, amp: str) -> AbstractContextManager:
    """The autocast context of a recipe's ``amp``.

    Args:
        device: where it computes.
        amp: ``"none"``, ``"bf16"`` or ``"fp16"``.

    Returns:
        A context manager.
    """
    if amp == "none":
        return nullcontext()
    return torch.autocast(device.type, AMP_DTYPES[amp])


@dataclass
class Position:
    """Where a run stands: ``update`` updates of ``epoch`` are done, ``total`` in all."""

    epoch: int = 0
    update: int = 0
    total: int = 0


@dataclass
class Meter:
    """Sums of every term over updates, kept on the device until somebody asks.

    Attributes:
        names: what is summed, in order.
        sums: [len(names)] float64.
        count: updates summed.
        skipped: updates that fp16's scaler skipped, a scalar on the device.
    """

    names: tuple[str, ...]
    sums: Tensor
    count: int = 0
    skipped: Tensor = field(default_factory=lambda: torch.zeros(()))

    @classmethod
    def create(cls, names: tuple[str, ...], device: torch.device) -> Meter:
        """A meter at zero.

        Args:
            names: what is summed.
            device: where.

        Returns:
            The meter.
        """
        sums = torch.zeros(len(names), dtype=torch.float64, device=device)
        return cls(names, sums, 0, torch.zeros((), dtype=torch.float64, device=device))

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps, so that a resumed epoch reports means of the whole epoch."""
        return {"sums": self.sums, "count": self.count, "skipped": self.skipped}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put back what `state_dict` gave."""
        self.sums.copy_(state["sums"])
        self.skipped.copy_(state["skipped"])
        self.count = state["count"]

    def reset(self) -> None:
        """Start again from zero."""
        self.sums.zero_()
        self.skipped.zero_()
        self.count = 0


class Engine:
    """Everything that changes during training, and the update that changes it.

    The update's random numbers (dropout, stochastic depth, Mixup) are seeded by (seed, update,
    rank), so that a run continues exactly from any finished update.

    Args:
        task: student and terms, on the device.
        teacher: on the device; None where the terms need none.
        optimizer: over the task's parameters.
        scheduler: timm's, stepped per update.
        ema: average of the student's weights, or None.
        mixup: timm's, or None.
        world: this process among its peers.
        amp: ``"none"``, ``"bf16"`` or ``"fp16"``.
        clip_grad: largest norm of the gradient, or None.
        ema_warmup: let the EMA's decay grow with the updates.
        seed: the run's.
    """

    def __init__(
        self,
        task: DistillationTask,
        teacher: Teacher | None,
        optimizer: torch.optim.Optimizer,
        scheduler: Any,
        *,
        ema: ModelEmaV3 | None,
        mixup: Mixup | None,
        world: World,
        amp: str = "none",
        clip_grad: float | None = None,
        ema_warmup: bool = False,
        seed: int = 0,
    ) -> None:
        self.task = task
        self.teacher = teacher
        self.optimizer = optimizer
        self.scheduler = scheduler
        self.ema = ema
        self.mixup = mixup
        self.world = world
        self.amp = amp
        self.clip_grad = clip_grad
        self.ema_warmup = ema_warmup
        self.seed = seed
        self.scaler = torch.amp.GradScaler(world.device.type, enabled=amp == "fp16")
        self.parameters = [p for p in task.parameters() if p.requires_grad]
        self.wrapped: nn.Module = task if world.size == 1 else _data_parallel(task, world)
        self.position = Position()
        self.meter = Meter.create((*task.terms.names, "grad_norm"), world.device)
        self.applying = False

    @property
    def lr(self) -> float:
        """The learning rate of the next update."""
        return self.optimizer.param_groups[0]["lr"]

    def update(self, slices: list[Batch]) -> None:
        """One optimiser update from the slices of its batch; advances the position.

        Args:
            slices: (images [B, C, H, W], labels [B]) on the host, all of one size.
        """
        seed_all(derive_seed("update", self.seed, self.position.total, self.world.rank))
        self.optimizer.zero_grad(set_to_none=True)
        losses = torch.zeros_like(self.meter.sums[:-1])
        for number, batch in enumerate(slices):
            last = number == len(slices) - 1
            losses += self._backward(batch, share=1 / len(slices), synchronise=last)
        self.applying = True
        self._apply(losses)
        self.applying = False

    def _backward(self, batch: Batch, share: float, synchronise: bool) -> Tensor:
        """Add a slice's gradient; returns its terms, each times the slice's share."""
        images, target = (part.to(self.world.device, non_blocking=True) for part in batch)
        if self.mixup is not None:
            images, target = self.mixup(images, target)
        hold = not synchronise and isinstance(self.wrapped, DistributedDataParallel)
        with self.wrapped.no_sync() if hold else nullcontext():  # type: ignore[operator]
            with autocast(self.world.device, self.amp):
                output = self.wrapped(images, target, self._teach(images))
            self.scaler.scale(output["loss"] * share).backward()
        terms = torch.stack([output[name].detach() for name in self.task.terms.names])
        return terms.to(self.meter.sums.dtype) * share

    def _teach(self, images: Tensor) -> TapOutput | None:
        return None if self.teacher is None else self.teacher(images)

    def _apply(self, losses: Tensor) -> None:
        self.scaler.unscale_(self.optimizer)
        norm = self._gradient_norm()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.position.update += 1
        self.position.total += 1
        self.scheduler.step_update(self.position.total)
        if self.ema is not None:
            step = self.position.total if self.ema_warmup else None
            self.ema.update(self.task.student, step=step)
        self._record(losses, norm)

    def _gradient_norm(self) -> Tensor:
        if self.clip_grad is not None:
            return nn.utils.clip_grad_norm_(self.parameters, self.clip_grad)
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        return nn.utils.get_total_norm(gradients)

    def _record(self, losses: Tensor, norm: Tensor) -> None:
        norm = norm.detach().to(losses.dtype)
        if self.scaler.is_enabled():
            # The scaler has skipped this update and lowers its scale: that is its way to work.
            finite = norm.isfinite()
            self.meter.skipped += (~finite).to(losses.dtype)
            norm = torch.where(finite, norm, torch.zeros_like(norm))
        self.meter.sums += torch.cat([losses, norm.reshape(1)])
        self.meter.count += 1

    def read_meter(self) -> dict[str, float]:
        """Sums over the epoch so far and all processes; synchronises, with them and with the host.

        Returns:
            Sum over updates of every term (mean over processes) and of the gradient's norm.

        Raises:
            NonFiniteError: one of them is no finite number.
        """
        sums = (self.world.sum(self.meter.sums) / self.world.size).tolist()
        values = dict(zip(self.meter.names, sums, strict=True))
        self._check_finite(values)
        return values

    def check_finite(self) -> None:
        """Refuse to go on, or to save, once a loss or gradient was not finite; synchronises.

        Raises:
            NonFiniteError: naming what it was and what to try.
        """
        self.read_meter()

    def _check_finite(self, values: dict[str, float]) -> None:
        broken = [name for name, value in values.items() if not math.isfinite(value)]
        if broken:
            raise NonFiniteError(
                f"train: {', '.join(broken)} became infinite or NaN in epoch "
                f"{self.position.epoch + 1}, at or before update {self.position.total} (learning "
                f"rate {self.lr:.3g}, amp {self.amp}); checkpoints from before are untouched. Try "
                f"a lower lr, clip_grad=1.0, or amp='none'"
            )


def _data_parallel(task: DistillationTask, world: World) -> DistributedDataParallel:
    ids = [world.device.index] if world.device.type == "cuda" else None
    return DistributedDataParallel(task, device_ids=ids)


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


def train_one_epoch(
    engine: Engine,
    loader: Iterable[Batch],
    accumulation: int,
    *,
    log_interval: int,
    on_interval: Callable[[dict[str, Any]], None],
    after_update: Callable[[], None],
) -> dict[str, Any]:
    """Run the rest of an epoch.

    Args:
        engine: trained; its position is advanced.
        loader: slices, starting at the engine's position.
        accumulation: slices per update.
        log_interval: updates between two calls of ``on_interval``.
        on_interval: takes the means of every term since the last call, or since the epoch's begin.
        after_update: called between two updates; may raise to stop.

    Returns:
        The epoch's record: means of every term, learning rate, throughput.

    Raises:
        NonFiniteError: a loss or gradient was not finite.
    """
    engine.task.train()
    # A host-side check costs nothing where the host computes, and names the very update.
    check_always = engine.world.device.type == "cpu" and engine.world.size == 1
    speed, speed_before = Throughput(), Throughput()
    sums_before, count_before = engine.read_meter(), engine.meter.count
    started = time.perf_counter()
    for slices, waited in _updates(iter(loader), accumulation):
        lr = engine.lr
        engine.update(slices)
        speed.images += engine.world.size * sum(len(images) for images, _ in slices)
        speed.waited += waited
        if check_always:
            engine.check_finite()
        if engine.position.update % log_interval == 0:
            sums, count = engine.read_meter(), engine.meter.count
            speed.seconds = time.perf_counter() - started
            on_interval(
                {
                    **_where(engine, lr),
                    **{n: (sums[n] - sums_before[n]) / (count - count_before) for n in sums},
                    **speed.since(speed_before).record(),
                }
            )
            sums_before, count_before = sums, count
            speed_before = Throughput(speed.images, speed.seconds, speed.waited)
        after_update()
    sums = engine.read_meter()
    speed.seconds = time.perf_counter() - started
    means = {name: value / max(1, engine.meter.count) for name, value in sums.items()}
    record = {**_where(engine, engine.lr), **means, **speed.record()}
    if engine.scaler.is_enabled():
        record["skipped_updates"] = int(engine.meter.skipped.item())
    return record


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
def evaluate_model(
    model: nn.Module, loader: Iterable[Batch], world: World, amp: str = "none"
) -> dict[str, Any]:
    """Accuracy and cross-entropy over the shares of all processes; synchronises once, at the end.

    Args:
        model: on the device; its training mode is put back afterwards.
        loader: this process' share.
        world: this process among its peers.
        amp: as in training.

    Returns:
        ``top1`` and ``top5`` in % (``top5`` None below five classes), ``loss`` (plain
        cross-entropy) and ``count``, the images of all processes.
    """
    was_training = model.training
    model.eval()
    sums = torch.zeros(4, dtype=torch.float64, device=world.device)
    classes = 0
    for images, target in loader:
        images = images.to(world.device, non_blocking=True)
        target = target.to(world.device, non_blocking=True)
        with autocast(world.device, amp):
            logits = model(images)
        classes = logits.shape[-1]
        sums += _scores(logits.float(), target)
    model.train(was_training)
    top1, top5, loss, count = world.sum(sums).tolist()
    count = max(count, 1)
    return {
        "top1": 100 * top1 / count,
        "top5": 100 * top5 / count if classes >= 5 else None,
        "loss": loss / count,
        "count": int(count),
    }


def _scores(logits: Tensor, target: Tensor) -> Tensor:
    """[top-1 hits, top-5 hits, summed cross-entropy, images] of a batch, float64."""
    ranked = logits.topk(min(5, logits.shape[-1]), dim=-1).indices
    hits = ranked == target.unsqueeze(-1)
    loss = F.cross_entropy(logits, target, reduction="sum")
    count = torch.full_like(loss, len(target))
    return torch.stack([hits[:, 0].sum(), hits.any(dim=-1).sum(), loss, count]).double()
