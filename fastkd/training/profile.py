"""Time and memory of a training step and its parts, measured on the trainer's engine and loader."""

from __future__ import annotations

import copy
import itertools
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastkd.data.batches import Batch
from fastkd.data.loader import train_loader
from fastkd.data.open_data import Data, open_data
from fastkd.inference.create_teacher import create_teacher
from fastkd.models import TapOutput
from fastkd.training.build import (
    FromRecipe,
    build_engine,
    open_student,
    resolve_run,
    resolve_teacher,
)
from fastkd.training.updates import Engine
from fastkd.utils.argument_checks import check_numbers
from fastkd.utils.distributed import autocast, world
from fastkd.utils.random import preserved_rng

LOADER = "loader alone"
INPUT = "input: copy, augment, mix"
TEACHER = "teacher alone"
FORWARD = "student forward alone"
STUDENT = "student forward + backward"
OPTIMIZER = "optimizer + EMA"
UPDATE = "update, batch in memory"
FULL = "full step"
PARTS = (LOADER, INPUT, TEACHER, FORWARD, STUDENT, OPTIMIZER, UPDATE, FULL)  # in this order

PIECES = (INPUT, TEACHER, STUDENT, OPTIMIZER)  # that add up to an update
UNSTEADY = 1.0  # no verdict if a part's quartiles lie further apart than this, in medians


@dataclass(frozen=True)
class Part:
    """The time of one part of an update."""

    name: str
    seconds: float  # an update, median
    lower_quartile: float  # seconds
    upper_quartile: float
    images_per_second: float  # of all processes, if there were nothing but this part
    share: float  # of the full step's time; parts overlap, so shares need not sum to 1

    @property
    def spread(self) -> float:
        return (self.upper_quartile - self.lower_quartile) / self.seconds


@dataclass(frozen=True)
class Breakdown:
    """Parts of a step and which of them limits it."""

    parts: dict[str, Part]  # by name, no `TEACHER` without a teacher
    images: int  # of an update, over all processes
    limit: str  # `LOADER`, or the slowest piece of the update
    peak_memory: int | None = None  # bytes of tensors on this process's GPU; None on a CPU

    def sentence(self) -> str:
        """Describe what limits the step, or that the times are too unsteady to tell."""
        worst = max(self.parts.values(), key=lambda part: part.spread)
        if worst.spread > UNSTEADY:
            return (
                f"Too unsteady to say what limits: the middle half of the times of {worst.name!r} "
                f"lies {worst.spread:.1f} medians apart. Is the machine busy with something else?"
            )
        loader, update = (self.parts[name].images_per_second for name in (LOADER, UPDATE))
        if self.limit == LOADER:
            return (
                f"The loader limits: it yields {loader:,.0f} images/s, an update could take "
                f"{update:,.0f}."
            )
        share = self.parts[self.limit].seconds / self.parts[UPDATE].seconds
        return (
            f"The update limits, most of all {self.limit!r} ({100 * share:.0f} % of it); the "
            f"loader could yield {loader / update:.1f} times what an update takes."
        )


def bench_step(
    recipe: Any = None,
    data: Data | None = None,
    teacher: Any = FromRecipe.TEACHER,
    *,
    untrained: bool = False,
    steps: int = 20,
    device: str | torch.device | None = None,
    on_part: Callable[[str], None] | None = None,
    **overrides: Any,
) -> Breakdown:
    """Time the step that `fastkd.train` would run with the same arguments."""
    check_numbers("bench_step", steps=(steps, 2))
    # The learning rate changes no time; scaled down for a small batch it might be refused.
    overrides = {"lr_scaling": False, **overrides}
    given = resolve_run(None, teacher, data, None, recipe, "never", overrides)
    if untrained and (given.teacher is None or isinstance(given.teacher, nn.Module)):
        got = "none" if given.teacher is None else "a module"
        raise ValueError(f"bench_step: untrained=True expects a teacher by its name, got {got}")
    recipe, guide = given.recipe, given.teacher
    with preserved_rng(), world(device) as peers:
        opened = open_data(given.data, recipe.data_root, labels=recipe.labels)
        student = open_student(given.student, recipe, opened, peers)
        if untrained and not Path(guide).exists():
            size, classes = recipe.teacher_img_size, student.num_classes
            guide = create_teacher(guide, pretrained=False, num_classes=classes, img_size=size)
            recipe = recipe.override(teacher_checkpoint=None, teacher_img_size=None)
        loader = train_loader(opened, recipe, student.spec, peers)
        guide = resolve_teacher(guide, recipe, student.spec)
        engine = build_engine(student, guide, recipe, peers, updates=1)  # which changes no time
        return measure_step(engine, loader, steps, on_part=on_part)


def measure_step(
    engine: Engine,
    loader: Any,
    steps: int = 20,
    warmup: int = 3,
    on_part: Callable[[str], None] | None = None,
) -> Breakdown:
    """Time a step and its parts on every process; the engine's weights are trained by it."""
    engine.task.train()
    accumulation = engine.config.accumulation
    batches = itertools.chain.from_iterable(iter(loader) for _ in itertools.count())
    updates = (list(itertools.islice(batches, accumulation)) for _ in itertools.count())
    slices = next(updates)
    # Batches of worker processes arrive in groups, so they are timed in groups, after dropping
    # those that were prefetched during the warm-up (in which models may be compiled).
    prefetched = loader.num_workers * (loader.prefetch_factor or 0)
    ahead, group = math.ceil(prefetched / accumulation), max(1, loader.num_workers)
    device = engine.world.device

    def measure(name: str, work: Callable[[], Any], ahead: int = 0, group: int = 1) -> list[float]:
        if on_part is not None:
            on_part(name)
        for _ in range(warmup):
            work()
        # Before batches are dropped: it waits for the device, and workers prefetch meanwhile.
        clock = _Clock(device)
        for _ in range(ahead):
            next(updates)
        return _timed(work, clock, steps, group)

    # What needs the loader comes first, while its workers are busy.
    seconds = {LOADER: measure(LOADER, lambda: next(updates), ahead, group)}
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    seconds[FULL] = measure(FULL, lambda: engine.update(next(updates)), ahead, group)
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    # `_works` keeps a batch and the teacher's outputs on the device: only after the peak is read.
    for name, work in _works(engine, slices).items():
        seconds[name] = measure(name, work)
    images = engine.world.size * sum(len(batch.images) for batch in slices)
    return _breakdown(seconds, images, peak)


def _timed(work: Callable[[], Any], clock: _Clock, steps: int, group: int) -> list[float]:
    """Return seconds a call, one mean for each group; at least two groups, for quartiles."""
    clock.mark()
    for _ in range(max(2, math.ceil(steps / group))):
        for _ in range(group):
            work()
        clock.mark()
    return [seconds / group for seconds in clock.intervals()]


def _works(engine: Engine, slices: list[Batch]) -> dict[str, Callable[[], Any]]:
    """Return the parts to time on a batch in memory, in the order of an update."""
    prepared = [Batch(*engine.inputs(batch), batch.samples) for batch in slices]

    def teach(batch: Batch) -> TapOutput | None:
        engine.begin_pass()
        with autocast(engine.world.device, engine.config.amp):
            return engine.teach(batch.images)

    # Copies, because the next replay of a CUDA graph overwrites its outputs.
    taught = [copy.deepcopy(teach(batch)) for batch in prepared]
    student = copy.copy(engine)  # for prepared batches and known outputs of the teacher
    student.augment = student.mixup = None
    outputs = itertools.cycle(taught)
    student.teach = lambda images: next(outputs)  # type: ignore[method-assign]

    def forward() -> None:
        for batch, output in zip(prepared, taught, strict=True):
            engine.begin_pass()
            with autocast(engine.world.device, engine.config.amp):
                engine.task(batch.images, batch.labels, output)

    def backward() -> None:
        engine.optimizer.zero_grad(set_to_none=True)
        for number, batch in enumerate(prepared, start=1):
            student.backward(batch, share=1 / len(prepared), synchronize=number == len(prepared))

    works: dict[str, Callable[[], Any]] = {
        INPUT: lambda: [engine.inputs(batch) for batch in slices],
        TEACHER: lambda: [teach(batch) for batch in prepared],
        FORWARD: forward,
        STUDENT: backward,  # leaves the gradients that the optimizer needs
        OPTIMIZER: lambda: engine.apply(torch.zeros_like(engine.meter.sums[:-1])),
        UPDATE: lambda: engine.update(slices),
    }
    return {name: work for name, work in works.items() if name != TEACHER or engine.teacher}


class _Clock:
    """Marks in time; on a GPU they are events, which are waited for at both ends only."""

    def __init__(self, device: torch.device) -> None:
        self.on_gpu = device.type == "cuda"
        self.marks: list[Any] = []
        if self.on_gpu:
            torch.cuda.synchronize(device)

    def mark(self) -> None:
        if not self.on_gpu:
            self.marks.append(time.perf_counter())
            return
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self.marks.append(event)

    def intervals(self) -> list[float]:
        pairs = itertools.pairwise(self.marks)
        if not self.on_gpu:
            return [later - earlier for earlier, later in pairs]
        self.marks[-1].synchronize()
        return [earlier.elapsed_time(later) / 1e3 for earlier, later in pairs]


def _breakdown(seconds: dict[str, list[float]], images: int, peak: int | None = None) -> Breakdown:
    full = statistics.median(seconds[FULL])
    parts = {}
    for name in (name for name in PARTS if name in seconds):
        lower, median, upper = statistics.quantiles(seconds[name], n=4, method="inclusive")
        parts[name] = Part(name, median, lower, upper, images / median, median / full)
    largest = max(parts.keys() & set(PIECES), key=lambda name: parts[name].seconds)
    limit = LOADER if parts[LOADER].seconds > parts[UPDATE].seconds else largest
    return Breakdown(parts, images, limit, peak)
