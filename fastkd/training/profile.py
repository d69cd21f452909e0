"""Time and memory of a training step and its parts, measured on the trainer's engine and loader."""

from __future__ import annotations

import copy
import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastkd.config import Recipe
from fastkd.data.datasets import Data, open_data
from fastkd.data.loader import train_loader
from fastkd.data.samples import Batch
from fastkd.inference.loading import build_student, create_teacher
from fastkd.inference.preprocessing import class_count, input_spec, student_shape
from fastkd.models import TapOutput
from fastkd.training.build import (
    FromRecipe,
    build_engine,
    chosen_teacher,
    resolve_recipe,
    resolve_teacher,
)
from fastkd.training.engine import Engine
from fastkd.utils.distributed import World, autocast, world
from fastkd.utils.random import derive_seed, preserved_rng, seed_all

LOADER = "loader alone"
INPUT = "input: copy, augment, mix"
TEACHER = "teacher alone"
FORWARD = "student forward alone"
STUDENT = "student forward + backward"
OPTIMISER = "optimiser + EMA"
UPDATE = "update, batch in memory"
FULL = "full step"
PARTS = (LOADER, INPUT, TEACHER, FORWARD, STUDENT, OPTIMISER, UPDATE, FULL)

# Below this part of the slower one's speed, loader and update stand in each other's way.
CONTENTION = 0.8
UNSTEADY = 1.0  # quartiles further apart than the median say nothing about what limits

# The parts that an update consists of; the others are made of them, or of a piece of one.
_PIECES = {
    INPUT: "bringing the batch to the device and augmenting it",
    TEACHER: "the teacher's forward pass",
    STUDENT: "the student's forward and backward pass",
    OPTIMISER: "optimiser and EMA",
}


@dataclass(frozen=True)
class Part:
    """The time of one part of an update.

    Attributes:
        name: which.
        seconds: an update, median of those measured.
        lower_quartile: seconds.
        upper_quartile: seconds.
        images_per_second: of all processes, if there were nothing but this part.
        share: of the full step's time. Parts overlap, so that shares need not sum to 1.
    """

    name: str
    seconds: float
    lower_quartile: float
    upper_quartile: float
    images_per_second: float
    share: float

    @property
    def spread(self) -> float:
        """How far the quartiles lie apart, in medians."""
        return (self.upper_quartile - self.lower_quartile) / self.seconds


@dataclass(frozen=True)
class Breakdown:
    """Parts of a step, in order, and what limits it.

    Attributes:
        parts: by name, in the order of `PARTS`; no `TEACHER` where the terms need none.
        images: of an update, over all processes.
        limit: `LOADER`, or the largest of the update's pieces: `INPUT`, `TEACHER`, `STUDENT` or
            `OPTIMISER`.
        peak_memory: the most bytes that tensors held on the GPU in a full step; None on a CPU.
    """

    parts: dict[str, Part]
    images: int
    limit: str
    peak_memory: int | None = None

    def sentence(self) -> str:
        """What limits, for people to read, or that the figures are too unsteady to say."""
        if any(part.spread > UNSTEADY for part in self.parts.values()):
            worst = max(self.parts.values(), key=lambda part: part.spread)
            return (
                f"Too unsteady to say what limits: the middle half of the times of {worst.name!r} "
                f"lies {worst.spread:.1f} medians apart. Is the machine busy with something else?"
            )
        loader, update = (self.parts[name].images_per_second for name in (LOADER, UPDATE))
        if self.limit == LOADER:
            text = (
                f"The loader limits: it yields {loader:,.0f} images/s, an update could take "
                f"{update:,.0f}."
            )
        else:
            share = self.parts[self.limit].seconds / self.parts[UPDATE].seconds
            text = (
                f"The update limits, most of all {_PIECES[self.limit]} ({100 * share:.0f} % of "
                f"it); the loader could yield {loader / update:.1f} times what an update takes."
            )
        if self.parts[FULL].images_per_second < CONTENTION * min(loader, update):
            text += (
                " Together they are slower than either alone: they take turns (workers=0), or "
                "compete for the host."
            )
        return text


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
    """Time the step that `fastkd.train` would do with the same arguments."""
    loaded = Recipe.load(recipe)
    guide = chosen_teacher(loaded, teacher)
    if untrained:
        _check_untrained(guide)
    # It changes no time, and scaled down for a small batch it might be refused.
    overrides = {"lr_scaling": False, **overrides}
    resolved = resolve_recipe(loaded, None, teacher, data, overrides)
    source = resolved.data if data is None else data
    if source is None:
        raise ValueError("bench_step: data is missing: a folder, a timm data set name or two sets")
    with preserved_rng(), world(device) as peers:
        engine, loader = _build(resolved, guide, untrained, source, peers)
        return measure_step(engine, loader, steps, on_part=on_part)


def _build(
    recipe: Recipe, teacher: Any, untrained: bool, source: Data, peers: World
) -> tuple[Engine, Any]:
    """Engine and loader of a run."""
    data = open_data(source, recipe.data_root, labels=recipe.labels)
    shape = student_shape(recipe, data)
    seed_all(derive_seed("model", recipe.seed))
    student = build_student(recipe, shape)
    classes = class_count(student, shape)
    spec = input_spec(student, recipe, data)
    if untrained and not Path(teacher).exists():
        teacher = create_teacher(
            str(teacher), pretrained=False, num_classes=classes, img_size=recipe.teacher_img_size
        )
        recipe = recipe.override(teacher_checkpoint=None, teacher_img_size=None)
    loader = train_loader(data, recipe, spec, peers)
    engine = build_engine(
        student.to(peers.device),
        resolve_teacher(teacher, recipe, spec),
        recipe,
        spec,
        peers,
        num_classes=classes,
        updates_per_epoch=1,  # the schedule changes no time
    )
    return engine, loader


def _check_untrained(teacher: Any) -> None:
    if teacher is None:
        raise ValueError("bench_step: untrained=True has no effect: there is no teacher")
    if isinstance(teacher, nn.Module):
        raise ValueError("bench_step: untrained=True builds a teacher by its name, got a module")


def measure_step(
    engine: Engine,
    loader: Any,
    steps: int = 20,
    warmup: int = 3,
    on_part: Callable[[str], None] | None = None,
) -> Breakdown:
    """Time a run's step and its parts; the engine's weights are of no use afterwards.

    Each part is repeated and nothing waits for the device in between. What waits for a loader with
    workers is timed in groups of as many batches as there are workers, because that is how they
    arrive, and after those batches have been dropped that workers made ahead during the warm-up,
    in which models may be compiled. Call it on every process.
    """
    if steps < 2:
        raise ValueError(f"measure_step: steps must be at least 2, got {steps}")
    engine.task.train()
    updates = _endless_updates(loader, engine.config.accumulation)
    slices = next(updates)
    made_ahead = loader.num_workers * (loader.prefetch_factor or 0)
    fed_by_loader = partial(
        _Timing,
        group=max(1, loader.num_workers),
        prepare=partial(_drop, updates, math.ceil(made_ahead / engine.config.accumulation)),
    )
    # What needs the loader comes first, while it is at work; the rest in the order of an update.
    timings = {
        LOADER: fed_by_loader(lambda: next(updates)),
        FULL: fed_by_loader(lambda: engine.update(next(updates))),
    }
    timings |= {name: _Timing(work) for name, work in _works(engine, slices).items()}
    device = engine.world.device
    seconds, peak = {}, None
    for name, timing in timings.items():
        if on_part is not None:
            on_part(name)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        seconds[name] = timing.run(device, steps, warmup)
        if device.type == "cuda" and name == FULL:
            peak = torch.cuda.max_memory_allocated(device)
    images = engine.world.size * sum(len(batch.images) for batch in slices)
    return _breakdown(seconds, images, peak)


def _endless_updates(loader: Any, accumulation: int) -> Iterator[list[Batch]]:
    """The slices of one update after the other, epoch after epoch."""
    batches = itertools.chain.from_iterable(iter(loader) for _ in itertools.count())
    while True:
        yield list(itertools.islice(batches, accumulation))


def _drop(updates: Iterator[list[Batch]], count: int) -> None:
    for _ in range(count):
        next(updates)


def _works(engine: Engine, slices: list[Batch]) -> dict[str, Callable[[], Any]]:
    """What is timed on a batch that is there already, by name, in the order of an update."""
    prepared = [Batch(*engine.inputs(batch), batch.samples) for batch in slices]
    # Copies: of a CUDA graph, the next replay would overwrite them.
    taught = [copy.deepcopy(_teach(engine, batch.images)) for batch in prepared]
    student = _student_alone(engine, taught)

    def forward() -> None:
        for batch, output in zip(prepared, taught, strict=True):
            engine.begin_pass()
            with autocast(engine.world.device, engine.config.amp):
                engine.task(batch.images, batch.labels, output)

    def backward() -> None:
        engine.optimizer.zero_grad(set_to_none=True)
        for number, batch in enumerate(prepared, start=1):
            student.backward(batch, share=1 / len(prepared), synchronise=number == len(prepared))

    works: dict[str, Callable[[], Any]] = {
        INPUT: lambda: [engine.inputs(batch) for batch in slices],
        TEACHER: lambda: [_teach(engine, batch.images) for batch in prepared],
        FORWARD: forward,
        STUDENT: backward,  # last of those on gradients, which the optimiser then finds
        OPTIMISER: lambda: engine.apply(torch.zeros_like(engine.meter.sums[:-1])),
        UPDATE: lambda: engine.update(slices),
    }
    if engine.teacher is None:
        del works[TEACHER]
    return works


def _student_alone(engine: Engine, taught: list[TapOutput | None]) -> Engine:
    """The same engine, but for batches that are prepared and a teacher that has answered."""
    alone = copy.copy(engine)
    alone.augment = alone.mixup = None
    if engine.teacher is not None:
        answers = itertools.cycle(taught)
        alone.teach = lambda images: next(answers)  # type: ignore[method-assign]
    return alone


def _teach(engine: Engine, images: Tensor) -> TapOutput | None:
    engine.begin_pass()
    with autocast(engine.world.device, engine.config.amp):
        return engine.teach(images)


@dataclass(frozen=True)
class _Timing:
    """How one part is timed.

    Attributes:
        work: what it does in an update.
        group: calls between two marks.
        prepare: done once, between warm-up and timing.
    """

    work: Callable[[], Any]
    group: int = 1
    prepare: Callable[[], Any] = lambda: None

    def run(self, device: torch.device, steps: int, warmup: int) -> list[float]:
        """Seconds of a call, mean of every group; at least two groups, which have quartiles."""
        for _ in range(warmup):
            self.work()
        clock = _Clock(device)  # waits for the device, which gives workers time: before `prepare`
        self.prepare()
        clock.mark()
        for _ in range(max(2, math.ceil(steps / self.group))):
            for _ in range(self.group):
                self.work()
            clock.mark()
        return [seconds / self.group for seconds in clock.intervals()]


class _Clock:
    """Marks in time, on a GPU of its own work; that is waited for at both ends alone."""

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
    pieces = [name for name in _PIECES if name in parts]
    largest = max(pieces, key=lambda name: parts[name].seconds)
    limit = LOADER if parts[LOADER].seconds > parts[UPDATE].seconds else largest
    return Breakdown(parts, images, limit, peak)
