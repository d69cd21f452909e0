"""Optimizer updates, the sums of an epoch's losses, and the evaluation of terms."""

from __future__ import annotations

import inspect
import itertools
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import KW_ONLY, dataclass
from typing import Any, NamedTuple

import torch
from timm.data import Mixup
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parallel import DistributedDataParallel

from fastkd.config import OptimConfig
from fastkd.data.batches import Batch, Fault
from fastkd.inference.evaluate import check_readable
from fastkd.models import TapOutput, Teacher
from fastkd.training.task import DistillationTask
from fastkd.utils.distributed import World, autocast
from fastkd.utils.random import derive_seed, seed_all, seeded

# Updates that fp16's scaler may skip in a row only to come down from 2^16 to a scale of 1.
FP16_SETTLING = 17

SKIPPED = "as the loss or its gradient was infinite or NaN"


class NonFiniteError(FloatingPointError):
    """Losses, gradients or weights are infinite or NaN; nothing of them is in files."""


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
        """Return means over the updates applied, and the speed, since a reading or in all."""
        before = since or Reading(dict.fromkeys(self.sums, 0.0))
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
    """Sums of every term over the updates of an epoch, how many were skipped, and their time."""

    def __init__(self, names: tuple[str, ...], device: torch.device) -> None:
        self.names = names
        self.count = 0
        self.sums = torch.zeros(len(names), dtype=torch.float64, device=device)
        # Skipped updates of the epoch, skipped ones in a row until now, and the longest such row.
        self.skips = torch.zeros(3, dtype=torch.float64, device=device)
        self.lr = 0.0  # of the last update
        self.interval: Reading | None = None  # at the epoch's last interval
        self.images = 0
        self.waited = self.seconds = 0.0
        self._began: float | None = None  # while an update is fetched or computed

    @property
    def elapsed(self) -> float:
        """Return seconds of the epoch's updates, with those of an earlier part of the run."""
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
        """Return plain numbers, from which a resumed epoch reports means of the whole epoch."""
        state = {name: getattr(self, name) for name in _PLAIN} | {"seconds": self.elapsed}
        interval = None if self.interval is None else self.interval._asdict()
        sums, skips = self.sums.tolist(), self.skips.tolist()
        return {**state, "sums": sums, "skips": skips, "interval": interval}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name in _PLAIN:
            setattr(self, name, state[name])
        self.sums.copy_(torch.tensor(state["sums"], dtype=torch.float64))
        self.skips.copy_(torch.tensor(state["skips"], dtype=torch.float64))
        self.interval = None if state["interval"] is None else Reading(**state["interval"])


_PLAIN = ("count", "lr", "images", "waited", "seconds")


@dataclass
class Position:
    """Where a run stands: ``update`` updates of ``epoch`` are done, ``total`` in all."""

    epoch: int = 0
    update: int = 0
    total: int = 0


@dataclass(eq=False, repr=False)
class Engine:
    """Everything that changes during training, and the update that changes it.

    The update's random numbers (dropout, stochastic depth, Mixup) are seeded by (seed, update,
    rank), so that a run continues exactly from any finished update. An update whose loss or
    gradient is not finite leaves weights, moments and running statistics as they were; position,
    schedule and EMA go on.
    """

    task: DistillationTask
    teacher: Teacher | None  # None where the terms need none
    optimizer: torch.optim.Optimizer
    scheduler: Any  # timm's, stepped per update
    _: KW_ONLY
    config: OptimConfig
    world: World
    ema: ModelEmaV3 | None = None
    # (uint8 images on the device, plan on the host) -> normalized images
    augment: Callable[[Tensor, dict[str, Tensor]], Tensor] | None = None
    mixup: Mixup | None = None

    def __post_init__(self) -> None:
        task, config, world = self.task, self.config, self.world
        self.scaler = torch.amp.GradScaler(world.device.type, enabled=config.amp == "fp16")
        self.parameters = [p for p in task.parameters() if p.requires_grad]
        self.statistics = _running_statistics(task)
        self._average_statistics = [] if self.ema is None else _running_statistics(self.ema.module)
        self.position = Position()
        self.meter = Meter((*task.terms.names, "grad_norm"), world.device)
        self.changing = False
        # (update, samples, whether applied, whether the loss was finite) since the last report
        self._unread: list[tuple[int, list[Tensor], Tensor, Tensor]] = []
        for module in (task, self.teacher):
            if module is not None and config.channels_last:
                (task.student if module is task else module).to(memory_format=torch.channels_last)
            if module is not None and config.compile != "none":
                # In place: state dicts keep their names, and evaluation runs the bare student.
                module.compile(mode=config.compile)
        self.wrapped: nn.Module = task if world.size == 1 else _data_parallel(task, world)

    @property
    def lr(self) -> float:
        return self.optimizer.param_groups[0]["lr"]

    def update(self, slices: list[Batch]) -> None:
        """Run an optimizer update on the slices of its batch, and advance the position."""
        seed_all(derive_seed("update", self.config.seed, self.position.total, self.world.rank))
        self.optimizer.zero_grad(set_to_none=True)
        losses = torch.zeros_like(self.meter.sums[:-1])
        before = [buffer.clone() for buffer in self.statistics]
        try:
            for number, batch in enumerate(slices):
                last = number == len(slices) - 1
                losses += self.backward(batch, share=1 / len(slices), synchronize=last)
            self.changing = True
            applied = self.apply(losses, before)
        except BaseException:
            for buffer, old in zip(self.statistics, before, strict=True):
                buffer.copy_(old)
            raise
        samples = [batch.samples for batch in slices]
        finite = losses.isfinite().all()
        self._unread.append((self.position.total, samples, applied, finite))
        self.changing = False

    def inputs(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Bring a batch to the device, and augment, normalize and mix it."""
        device = self.world.device
        images = batch.images.to(device, non_blocking=True)
        target = batch.labels.to(device, non_blocking=True)
        if self.augment is not None and batch.plan is not None:
            images = self.augment(images, batch.plan)  # which reads the plan on the host
        if self.mixup is not None:
            images, target = self.mixup(images, target)
        if self.config.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        return images, target

    def teach(self, images: Tensor) -> TapOutput | None:
        return None if self.teacher is None else self.teacher(images)

    def begin_pass(self) -> None:
        """Allow compiled models to overwrite their earlier outputs (CUDA graphs reuse memory)."""
        if self.config.compile != "none":
            torch.compiler.cudagraph_mark_step_begin()

    def backward(self, batch: Batch, share: float, synchronize: bool) -> Tensor:
        """Add a slice's gradient; returns its terms, each times the slice's share."""
        images, target = self.inputs(batch)
        self.begin_pass()
        hold = not synchronize and isinstance(self.wrapped, DistributedDataParallel)
        with self.wrapped.no_sync() if hold else nullcontext():  # type: ignore[operator]
            with autocast(self.world.device, self.config.amp):
                output = self.wrapped(images, target, self.teach(images))
            self.scaler.scale(output["loss"] * share).backward()
        terms = torch.stack([output[name].detach() for name in self.task.terms.names])
        return terms.to(self.meter.sums.dtype) * share

    def apply(self, losses: Tensor, statistics: list[Tensor] | None = None) -> Tensor:
        """Step optimizer, schedule and EMA on the gradients there are; `update` does all of it."""
        self.scaler.unscale_(self.optimizer)
        if self.config.clip_grad is None:
            norm = nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None])
        else:
            norm = nn.utils.clip_grad_norm_(self.parameters, self.config.clip_grad)
        norm = norm.detach().to(losses.dtype)
        broken = (~torch.cat([losses, norm.reshape(1)]).isfinite()).any().float()
        broken = self.world.sum(broken).clamp(max=1)
        if knows_found_inf(self.optimizer):
            # As GradScaler does: a fused optimizer changes nothing where this is 1.
            self.optimizer.found_inf = broken  # type: ignore[attr-defined]
            self.optimizer.grad_scale = None  # type: ignore[attr-defined]
            self.optimizer.step()
        elif not broken:  # synchronizes
            self.optimizer.step()
        self.scaler.update()
        applied = broken == 0
        for buffer, old in zip(self.statistics, statistics or self.statistics, strict=True):
            buffer.copy_(torch.where(applied, buffer, old))
        self.position.update += 1
        self.position.total += 1
        self.meter.lr = self.lr
        self.scheduler.step_update(self.position.total)
        if self.ema is not None:
            step = self.position.total if self.config.ema_warmup else None
            self.ema.update(self.task.student, step=step)
        self.meter.add(torch.cat([losses, norm.reshape(1)]), applied)
        return applied

    def read(self) -> Reading:
        """Return the epoch's sums so far over all processes; waits for them and for the device."""
        own = torch.cat([self.meter.sums, self.meter.skips])
        *sums, skipped, _, longest = (self.world.sum(own) / self.world.size).tolist()
        meter, lost = self.meter, int(skipped)
        named = dict(zip(meter.names, sums, strict=True))
        speed = (meter.images, meter.waited, meter.elapsed)
        reading = Reading(named, meter.count - lost, lost, int(longest), *speed)
        limit = self.config.max_nonfinite + FP16_SETTLING * (self.config.amp == "fp16")
        if reading.longest_row > limit:
            raise self.non_finite(f"{reading.longest_row} updates in a row were skipped, {SKIPPED}")
        return reading

    def is_finite(self) -> bool:
        """Check weights, averages, statistics and moments of all processes; synchronizes once."""
        held = [*self.task.parameters(), *self.task.terms.buffers()]
        held += [] if self.ema is None else self.ema.module.parameters()
        held += [*self.statistics, *self._average_statistics]
        held += (value for state in self.optimizer.state.values() for value in state.values())
        finite = [
            value.isfinite().all().to(self.world.device)
            for value in held
            if isinstance(value, Tensor) and value.is_floating_point()
        ]
        return not self.world.sum((~torch.stack(finite)).any().float())

    def process_state(self) -> dict[str, Any]:
        """Return what every process has of its own: sums, and statistics of batch norms."""
        kept = (*self.statistics, *self._average_statistics)
        statistics = [buffer.cpu() for buffer in kept] if self.world.size > 1 else []
        return {"meter": self.meter.state_dict(), "statistics": statistics}

    def load_process_states(self, states: list[dict[str, Any]]) -> None:
        """Put back what each process had; the mean of the sums where their number changed."""
        own = states[self.world.rank % len(states)]
        if len(states) == self.world.size:
            self.meter.load_state_dict(own["meter"])
            kept = (*self.statistics, *self._average_statistics)
            for buffer, value in zip(kept, own["statistics"], strict=False):
                buffer.copy_(value)
            return
        columns = zip(*(state["meter"]["sums"] for state in states), strict=True)
        sums = [sum(column) / len(states) for column in columns]
        self.meter.load_state_dict(own["meter"] | {"sums": sums})

    def non_finite(self, what: str) -> NonFiniteError:
        """Build the error that ends a run, with what can be done."""
        weights = "finite, from before" if self.is_finite() else "infinite or NaN, too"
        return NonFiniteError(
            f"train: {what}, at or before update {self.position.total} in epoch "
            f"{self.position.epoch + 1} (learning rate {self.lr:.3g}, amp {self.config.amp}). The "
            f"weights in memory are {weights}. Try a lower lr, clip_grad=1.0, or amp='none'; "
            f"max_nonfinite is {self.config.max_nonfinite}"
        )

    def skipped_updates(self) -> list[Skipped]:
        """List the updates skipped since `forget_skipped`; waits for the device."""
        if not self._unread:
            return []
        updates, samples, *flags = zip(*self._unread, strict=True)
        applied, finite = (torch.stack(flag).tolist() for flag in flags)
        return [
            Skipped(updates[number], torch.cat(samples[number]).tolist(), finite[number])
            for number in range(len(updates))
            if not applied[number]
        ]

    def forget_skipped(self) -> None:
        self._unread = []


def knows_found_inf(optimizer: torch.optim.Optimizer) -> bool:
    """Check whether a step leaves all as it is where ``found_inf`` is 1: fused ones do."""
    momentum = isinstance(optimizer, torch.optim.SGD) and optimizer.defaults["momentum"]
    if momentum and not optimizer.state:
        return False  # a first step that is skipped would leave uninitialized memory as momentum
    return getattr(optimizer, "_step_supports_amp_scaling", False)  # as GradScaler asks, too


def _running_statistics(module: nn.Module) -> list[Tensor]:
    """List buffers that a forward pass writes: a skipped update must not leave its NaN there."""
    norms = [part for part in module.modules() if isinstance(part, _NormBase)]
    return [buffer for norm in norms for buffer in norm.buffers()]


def _data_parallel(task: DistillationTask, world: World) -> DistributedDataParallel:
    ids = [world.device.index] if world.device.type == "cuda" else None
    # Batch norms keep statistics of their own process' images; evaluation averages them.
    known = inspect.signature(DistributedDataParallel).parameters
    name = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    options: dict[str, Any] = {name: False}
    return DistributedDataParallel(task, device_ids=ids, **options)


@torch.no_grad()
def evaluate_terms(
    engine: Engine, loader: Iterable[Batch], warn: Callable[[str], None]
) -> dict[str, Any]:
    """Return means of all terms over the images that can be read; ``warn`` of the others."""
    task, world = engine.task, engine.world
    was_training = task.training
    task.eval()
    names = task.terms.names
    sums = torch.zeros(len(names) + 1, dtype=torch.float64, device=world.device)
    faults: list[Fault] = []
    # Terms that draw (masks, patches) draw the same in every evaluation: epochs are compared by it.
    with seeded(engine.config.seed, world.device):
        for batch in loader:
            faults += batch.faults
            if not len(batch.labels):
                continue
            images = batch.images.to(world.device, non_blocking=True)
            target = batch.labels.to(world.device, non_blocking=True)
            engine.begin_pass()
            with autocast(world.device, engine.config.amp):
                output = task(images, target, engine.teach(images))
            values = torch.stack([output[name].double() for name in names])
            images_seen = torch.full_like(values[:1], len(images))
            sums += torch.cat([values * images_seen, images_seen])
    task.train(was_training)
    known = sums.new_tensor([len(faults)])
    *totals, read, unreadable = world.sum(torch.cat([sums, known])).tolist()
    count = int(read + unreadable)
    check_readable(loader, faults, int(unreadable), count, world, warn)
    averages = {n: total / max(read, 1) for n, total in zip(names, totals, strict=True)}
    return {**averages, "count": count, "unreadable": int(unreadable)}
