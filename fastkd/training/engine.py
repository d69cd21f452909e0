"""The engine: one optimiser update after the other, and what each of them does.

Knows how to compute; not where data come from, what is logged where, or when a checkpoint is due.
Nothing here waits for an accelerator, but `Engine.read`.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from timm.data import Mixup
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parallel import DistributedDataParallel

from fastkd.models import TapOutput, Teacher
from fastkd.training.batch import Batch
from fastkd.training.distributed import World
from fastkd.training.meter import Meter, Reading
from fastkd.training.recipe import Recipe
from fastkd.training.seeding import derive_seed, seed_all
from fastkd.training.task import DistillationTask

AMP_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
FIRST_FP16_SCALE = 2.0**16
# Updates that fp16's scaler may skip in a row only to come down to a scale of 1.
FP16_SETTLING = 17
# Updates whose samples are remembered until somebody asks which of them were skipped.
KEPT_UPDATES = 1000


class NonFiniteError(FloatingPointError):
    """The loss or the gradient stayed infinite or NaN; nothing of it is in weights or files."""


@dataclass(frozen=True)
class SkippedUpdate:
    """An update whose gradient was not finite.

    Attributes:
        update: its number in the run, from 1.
        samples: indices in the training set of what this process fed to it.
        finite_loss: whether this process' own loss was finite (then another's was not, or the
            gradient alone overflowed).
    """

    update: int
    samples: list[int]
    finite_loss: bool


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


class Engine:
    """Everything that changes during training, and the update that changes it.

    The update's random numbers (dropout, stochastic depth, Mixup) are seeded by (seed, update,
    rank), so that a run continues exactly from any finished update. An update whose gradient is not
    finite changes nothing but the position and the schedule.

    Args:
        task: student and terms, on the device.
        teacher: on the device; None where the terms need none.
        optimizer: over the task's parameters; fused, so that skipping needs no synchronisation.
        scheduler: timm's, stepped per update.
        recipe: ``amp``, ``clip_grad``, ``compile``, ``channels_last``, ``ema_warmup``,
            ``max_nonfinite`` and ``seed`` are the engine's.
        world: this process among its peers.
        ema: average of the student's weights, or None.
        augment: (uint8 images on the device, plan on the host) -> normalised images, or None.
        mixup: timm's, or None.
    """

    def __init__(
        self,
        task: DistillationTask,
        teacher: Teacher | None,
        optimizer: torch.optim.Optimizer,
        scheduler: Any,
        *,
        recipe: Recipe,
        world: World,
        ema: ModelEmaV3 | None = None,
        augment: Callable[[Tensor, dict[str, Tensor]], Tensor] | None = None,
        mixup: Mixup | None = None,
    ) -> None:
        self.task = task
        self.teacher = teacher
        self.optimizer = optimizer
        self.scheduler = scheduler
        self.recipe = recipe
        self.world = world
        self.ema = ema
        self.augment = augment
        self.mixup = mixup
        self.scaler = _scaler(world.device, recipe.amp)
        self.parameters = [p for p in task.parameters() if p.requires_grad]
        self.statistics = _running_statistics(task)
        self.position = Position()
        self.meter = Meter((*task.terms.names, "grad_norm"), world.device)
        self.applying = False
        self._unread: deque[tuple[int, list[Tensor], Tensor, Tensor]] = deque(maxlen=KEPT_UPDATES)
        if recipe.channels_last:
            task.student.to(memory_format=torch.channels_last)
        self._compile()
        self.wrapped: nn.Module = task if world.size == 1 else _data_parallel(task, world)

    def _compile(self) -> None:
        """Compile in place: state dicts keep their names, and evaluation runs the bare student."""
        if self.recipe.compile == "none":
            return
        for module in (self.task, self.teacher):
            if module is not None:
                module.compile(mode=self.recipe.compile)

    @property
    def lr(self) -> float:
        """The learning rate of the next update."""
        return self.optimizer.param_groups[0]["lr"]

    def update(self, slices: list[Batch]) -> None:
        """One optimiser update from the slices of its batch; advances the position.

        Args:
            slices: on the host, all of one size.
        """
        seed = derive_seed("update", self.recipe.seed, self.position.total, self.world.rank)
        seed_all(seed)
        self.optimizer.zero_grad(set_to_none=True)
        before = [buffer.clone() for buffer in self.statistics]
        losses = torch.zeros_like(self.meter.sums[:-1])
        for number, batch in enumerate(slices):
            last = number == len(slices) - 1
            losses += self._backward(batch, share=1 / len(slices), synchronise=last)
        self.applying = True
        applied = self.apply(losses)
        for buffer, old in zip(self.statistics, before, strict=True):
            buffer.copy_(torch.where(applied, buffer, old))
        self._unread.append(
            (self.position.total, [b.samples for b in slices], applied, losses.isfinite().all())
        )
        self.applying = False

    def inputs(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """A batch as the student takes it: on the device, augmented, normalised and mixed.

        Args:
            batch: on the host.

        Returns:
            Images [B, C, H, W]; targets, [B] class indices or [B, classes] where mixed.
        """
        device = self.world.device
        images = batch.images.to(device, non_blocking=True)
        target = batch.labels.to(device, non_blocking=True)
        if self.augment is not None and batch.plan is not None:
            images = self.augment(images, batch.plan)  # which reads the plan on the host
        if self.mixup is not None:
            images, target = self.mixup(images, target)
        if self.recipe.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        return images, target

    def teach(self, images: Tensor) -> TapOutput | None:
        """The teacher's logits and tokens for the student's images; None without a teacher."""
        return None if self.teacher is None else self.teacher(images)

    def _backward(self, batch: Batch, share: float, synchronise: bool) -> Tensor:
        """Add a slice's gradient; returns its terms, each times the slice's share."""
        images, target = self.inputs(batch)
        if self.recipe.compile != "none":
            torch.compiler.cudagraph_mark_step_begin()
        hold = not synchronise and isinstance(self.wrapped, DistributedDataParallel)
        with self.wrapped.no_sync() if hold else nullcontext():  # type: ignore[operator]
            with autocast(self.world.device, self.recipe.amp):
                output = self.wrapped(images, target, self.teach(images))
            self.scaler.scale(output["loss"] * share).backward()
        terms = torch.stack([output[name].detach() for name in self.task.terms.names])
        return terms.to(self.meter.sums.dtype) * share

    def apply(self, losses: Tensor) -> Tensor:
        """Step optimiser, schedule and EMA on the gradients there are; `update` does all of it.

        Args:
            losses: [terms] float64 on the device, for the meter.

        Returns:
            Bool scalar on the device: False where a gradient is not finite, and nothing was done.
        """
        self.scaler.unscale_(self.optimizer)
        norm = self._gradient_norm().detach()
        self.scaler.step(self.optimizer)
        self.scaler.update(None if self.recipe.amp == "fp16" else 1.0)
        self.position.update += 1
        self.position.total += 1
        self.scheduler.step_update(self.position.total)
        if self.ema is not None:
            step = self.position.total if self.recipe.ema_warmup else None
            self.ema.update(self.task.student, step=step)
        applied = norm.isfinite()
        self.meter.add(torch.cat([losses, norm.to(losses.dtype).reshape(1)]), applied)
        return applied

    def _gradient_norm(self) -> Tensor:
        if self.recipe.clip_grad is not None:
            return nn.utils.clip_grad_norm_(self.parameters, self.recipe.clip_grad)
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        return nn.utils.get_total_norm(gradients)

    def read(self) -> Reading:
        """The epoch's sums so far over all processes; synchronises, with them and with the host.

        Raises:
            NonFiniteError: a term is not finite although its gradient was, or more than
                ``max_nonfinite`` updates in a row were skipped.
        """
        own = torch.cat([self.meter.sums, self.meter.skips])
        values = (self.world.sum(own) / self.world.size).tolist()
        sums = dict(zip(self.meter.names, values, strict=False))
        skipped, longest = int(values[-3]), int(values[-1])
        reading = Reading(sums, self.meter.count - skipped, skipped, longest)
        self._check(reading)
        return reading

    def skipped_updates(self) -> list[SkippedUpdate]:
        """Updates skipped since this was asked last; synchronises with the host alone."""
        if not self._unread:
            return []
        unread = list(self._unread)
        self._unread.clear()
        flags = torch.stack([torch.stack([a, f]) for _, _, a, f in unread]).tolist()
        return [
            SkippedUpdate(update, torch.cat(samples).tolist(), finite)
            for (update, samples, _, _), (applied, finite) in zip(unread, flags, strict=True)
            if not applied
        ]

    def _check(self, reading: Reading) -> None:
        broken = [name for name, value in reading.sums.items() if not math.isfinite(value)]
        limit = self.recipe.max_nonfinite
        if self.recipe.amp == "fp16":
            limit += FP16_SETTLING
        if broken or reading.longest_row > limit:
            what = ", ".join(broken) if broken else "the loss or its gradient"
            row = "" if broken else f", in {reading.longest_row} updates in a row (all skipped)"
            raise NonFiniteError(
                f"train: {what} became infinite or NaN in epoch {self.position.epoch + 1}, at or "
                f"before update {self.position.total}{row} (learning rate {self.lr:.3g}, amp "
                f"{self.recipe.amp}); the weights are from before. Try a lower lr, clip_grad=1.0, "
                f"or amp='none'; max_nonfinite is {self.recipe.max_nonfinite}"
            )


def _scaler(device: torch.device, amp: str) -> torch.amp.GradScaler:
    """fp16's scaler of the loss; elsewhere one that stays at 1, for the updates that it skips."""
    scale = FIRST_FP16_SCALE if amp == "fp16" else 1.0
    return torch.amp.GradScaler(device.type, init_scale=scale)


def _running_statistics(module: nn.Module) -> list[Tensor]:
    """Buffers that a forward pass writes: a skipped update must not leave its NaN there."""
    norms = [part for part in module.modules() if isinstance(part, _NormBase)]
    return [buffer for norm in norms for buffer in norm.buffers()]


def _data_parallel(task: DistillationTask, world: World) -> DistributedDataParallel:
    ids = [world.device.index] if world.device.type == "cuda" else None
    return DistributedDataParallel(task, device_ids=ids)
