"""A training step and its loader: fastkd against timm, the released trainers and plain PyTorch.

python bench/train_step.py --output bench/results/train_step_cpu.json

Two questions. How many images a second does a core bring to the GPU: with all of timm's transforms,
or with the crop alone, the rest being the device's. And how many does a step of CaiT-S24 ->
DeiT-Tiny Lift take, written in several ways with the same weights and the same loss.
"""

from __future__ import annotations

import itertools
import math
import os
import statistics
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import harness
import timm
import torch
import torch.nn.functional as F
from timm.data import create_dataset, create_loader
from timm.utils import ModelEmaV2
from torch import Tensor, nn

from fastkd import create_teacher
from fastkd.data.batches import Batch
from fastkd.data.loader import train_loader
from fastkd.data.open_data import open_data
from fastkd.data.transforms import InputSpec, keep_one_bit
from fastkd.models import LiftVisionTransformer, Teacher, create_student
from fastkd.training import Recipe
from fastkd.training.build import BuiltStudent, build_engine
from fastkd.utils.distributed import World

sys.path.append(str(Path(__file__).parents[1] / "examples"))
from make_jpegs import make_jpegs

RECIPE = "lift_softkd_spectral"
STUDENT, TEACHER, CLASSES = "deit_tiny_patch16_224", "cait_s24_224", 1000
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
EMA_DECAY = 0.99996
EAGER = ("none",)  # modes of torch.compile
UPDATES_COMPARED = 3
QUICK_ROUNDS = 5

Runs = dict[str, Callable[[], object]]


@dataclass
class StepRow(harness.Row):
    """A result, with what users of a trainer ask for."""

    images_per_second: float = 0.0


@dataclass
class StepCase:
    """Competitors at the same work.

    Attributes:
        name: what is done.
        images: in one run of a provider.
        providers: each ``run`` does it once, and from then on the same with other numbers.
        timer: (work by name, rounds) -> seconds by name, in turns.
        rounds: timed runs of each, unless another number is asked for.
    """

    name: str
    images: int
    providers: list[harness.Provider]
    timer: Callable[[Runs, int], dict[str, list[float]]]
    rounds: int = 21


def time_processor(runs: Runs, rounds: int) -> dict[str, list[float]]:
    """Seconds of this process on a core, in turns: what others do meanwhile does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, work in runs.items():
            start = time.process_time()
            work()
            seconds[name].append(time.process_time() - start)
    return seconds


def time_gpu(runs: Runs, rounds: int) -> dict[str, list[float]]:
    """Seconds from an idle GPU to an idle GPU, in turns."""
    return harness.time_cuda(runs, rounds, list(runs))


def measure(case: StepCase, device: str, options: Namespace) -> Iterator[list[StepRow]]:
    """Time a case, print its rows and what ours are to every other; yields the rows.

    In quick mode one provider after the other, with the rows so far after each: a run that is cut
    off has what it had measured.
    """
    rounds = 2 if options.smoke else options.rounds or case.rounds
    if not options.quick or options.smoke:
        runs = {provider.name: provider.run for provider in case.providers}
        peaks = {name: harness.peak_extra_bytes(run, device) for name, run in runs.items()}
        rows = _rows(case, peaks, case.timer(runs, rounds))
        _print(case, rows)
        yield rows
        return
    peaks, times = {}, {}
    for provider in case.providers:
        peaks[provider.name] = harness.peak_extra_bytes(provider.run, device)
        times |= case.timer({provider.name: provider.run}, QUICK_ROUNDS)
        rows = _rows(case, peaks, times)
        _print(case, rows)
        yield rows


def _rows(case: StepCase, peaks: dict[str, int], timed: dict[str, list[float]]) -> list[StepRow]:
    """The rows of the providers that have been timed."""
    providers = [provider for provider in case.providers if provider.name in timed]
    quartiles = {name: statistics.quantiles(values, n=4) for name, values in timed.items()}
    baselines = [quartiles[provider.name][1] for provider in providers if provider.baseline]
    rows = []
    for provider in providers:
        ours = not provider.baseline and baselines
        lower, seconds, upper = quartiles[provider.name]
        row = StepRow(
            case=case.name,
            provider=provider.name,
            milliseconds=seconds * 1e3,
            lower_quartile=lower * 1e3,
            upper_quartile=upper * 1e3,
            gigabytes_per_second=0.0,
            roofline_percent=0.0,
            peak_megabytes=peaks[provider.name] / 1e6,
            speedup=min(baselines) / seconds if ours else None,
            images_per_second=case.images / seconds,
        )
        rows.append(row)
    return rows


def _print(case: StepCase, rows: list[StepRow]) -> None:
    print(case.name)
    for row in rows:
        print(
            f"  {row.provider:<48}{row.milliseconds:>10.2f}{row.images_per_second:>11.1f}"
            f"{row.peak_megabytes:>10.1f}",
            flush=True,
        )
    for ours in (row for row in rows if row.speedup is not None):
        ratios = (
            f"{ours.images_per_second / other.images_per_second:.2f}x {other.provider}"
            for other in rows
            if other.speedup is None
        )
        print(f"    {ours.provider}: {'; '.join(ratios)}")


# The loader: images a second of one core.


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute with one thread, as a loader process does."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def loader_case(root: Path, repeats: int, batch: int) -> StepCase:
    """A batch of training images, in this process."""
    copies = f"{repeats} copies of an image" if repeats > 1 else "one copy of an image"
    # Its repeated augmentation is off on one process, and on several decodes every copy again.
    timms = "timm's create_loader" + (" (decodes every copy)" if repeats > 1 else "")
    providers = [
        harness.Provider(timms, timm_batches(root, batch).__next__, True),
        harness.Provider(
            "fastkd (augment='cpu')", our_batches(root, repeats, batch, "cpu").__next__, True
        ),
        harness.Provider(
            "fastkd (augment='gpu'), device's part not counted",
            our_batches(root, repeats, batch, "gpu").__next__,
        ),
    ]
    name = f"loader, {batch} JPEGs of 500 x 375, {copies}, one core"
    return StepCase(name, batch, providers, time_processor)


def our_batches(root: Path, repeats: int, batch: int, augment: str) -> Iterator[Any]:
    """Batches of the trainer's own loader."""
    recipe = Recipe.load(RECIPE).override(
        batch_size=batch, repeated_aug=repeats, augment=augment, workers=0
    )
    spec = InputSpec((3, 224, 224), MEAN, STD)
    return endless(train_loader(open_data(root), recipe, spec))


def timm_batches(root: Path, batch: int) -> Iterator[Any]:
    """Batches of timm's loader as its train.py makes it, but for workers and prefetching to a GPU.

    With Pillow >= 13 it would stop at the first image that RandAugment posterizes to 0 bits; it is
    helped over that.
    """
    recipe = Recipe.load(RECIPE)
    loader = create_loader(
        create_dataset("", root=str(root / "train"), search_split=False),
        (3, 224, 224),
        batch,
        is_training=True,
        use_prefetcher=False,
        no_aug=False,
        re_prob=recipe.reprob,
        re_mode="pixel",
        scale=recipe.scale,
        ratio=recipe.ratio,
        hflip=recipe.hflip,
        color_jitter=recipe.color_jitter,
        auto_augment=recipe.auto_augment,
        interpolation=recipe.interpolation,
        mean=MEAN,
        std=STD,
        num_workers=0,
        pin_memory=False,
        persistent_workers=False,
    )
    keep_one_bit(loader.dataset.transform)
    return endless(loader)


def endless(loader: Any) -> Iterator[Any]:
    return itertools.chain.from_iterable(iter(loader) for _ in itertools.count())


# The step, as the DeiT and SpectralKD trainers write it.


class HookedLift(nn.Module):
    """A timm DeiT whose last block's tokens are taken by a hook, lifted, normalized and pooled.

    The class token's final norm and head stay where they were, and are computed.

    Args:
        ours: whose weights it starts with.
        vit: the timm model.
    """

    def __init__(self, ours: LiftVisionTransformer, vit: nn.Module) -> None:
        super().__init__()
        body = {k: v for k, v in ours.state_dict().items() if not k.startswith(("norm.", "head."))}
        vit.load_state_dict(body, strict=False)
        self.vit = vit
        self.proj = nn.Linear(ours.embed_dim, ours.num_features, bias=False)
        self.norm = nn.LayerNorm(ours.num_features, eps=ours.lift.norm.eps)
        self.head = nn.Linear(ours.num_features, ours.num_classes)
        self.proj.load_state_dict(ours.lift.proj.state_dict())
        self.norm.load_state_dict(ours.lift.norm.state_dict())
        self.head.load_state_dict(ours.head.state_dict())
        self.captured: Tensor | None = None
        vit.blocks[-1].register_forward_hook(self.capture)

    def capture(self, module: nn.Module, inputs: Any, output: Tensor) -> None:
        self.captured = output

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        self.vit(images)
        lifted = self.norm(self.proj(self.captured[:, 1:]))
        return self.head(lifted.mean(dim=1)), lifted


def fft_spectral(lifted: Tensor, teacher: Tensor) -> Tensor:
    """SpectralKD by its definition: both maps' spectra, real and imaginary parts stacked."""

    def spectrum(tokens: Tensor) -> Tensor:
        side = math.isqrt(tokens.shape[1])
        maps = tokens.float().mT.unflatten(2, (side, side))
        transformed = torch.fft.rfft2(maps, dim=(2, 3), norm="ortho")
        return torch.stack([transformed.real, transformed.imag], dim=-1)

    return F.mse_loss(spectrum(lifted), spectrum(teacher))


def parseval_spectral(lifted: Tensor, teacher: Tensor) -> Tensor:
    """The same number without an FFT: residual, and its sums over pairs of columns (even sides)."""
    d = lifted.float() - teacher.float()
    side = math.isqrt(d.shape[1])
    pairs = d.unflatten(1, (side, side // 2, 2)).sum(dim=2)
    total = d.square().sum() + pairs.square().sum() * (2 / side)
    return total / (4 * d.shape[0] * d.shape[2] * side * (side // 2 + 1))


def total_loss(
    logits: Tensor, labels: Tensor, teacher_logits: Tensor, distance: Tensor, recipe: Recipe
) -> Tensor:
    """The paper's sum."""
    cross_entropy = F.cross_entropy(logits.float(), labels, label_smoothing=recipe.label_smoothing)
    soft = F.kl_div(
        F.log_softmax(logits.float() / recipe.tau, dim=-1),
        F.log_softmax(teacher_logits.float() / recipe.tau, dim=-1),
        reduction="batchmean",
        log_target=True,
    )
    logit_part = (1 - recipe.alpha) * cross_entropy + recipe.alpha * recipe.tau**2 * soft
    return logit_part + recipe.feature_weight * distance


Step = Callable[[Tensor, Tensor], Any]


def released_step(student: HookedLift, teacher: nn.Module, recipe: Recipe, device: str) -> Step:
    """Eager, fp16 with its scaler, tokens by hooks, an FFT, and the host told of every loss.

    As in DeiT's main.py, cuDNN tries out convolutions.
    """
    captured: dict[str, Tensor] = {}
    teacher.blocks[-1].register_forward_hook(lambda m, i, o: captured.update(tokens=o))
    optimizer = torch.optim.AdamW(
        student.parameters(), lr=recipe.lr, weight_decay=recipe.weight_decay
    )
    # From a scale that skips no update, which would make later losses other ones.
    scaler = torch.amp.GradScaler(device, init_scale=2.0**8, enabled=recipe.amp != "none")
    ema = ModelEmaV2(student, decay=EMA_DECAY)

    @cudnn_benchmark()
    def step(images: Tensor, labels: Tensor) -> float:
        with torch.autocast(device, torch.float16, enabled=recipe.amp != "none"):
            logits, lifted = student(images)
            with torch.no_grad():
                teacher_logits = teacher(images)
            distance = fft_spectral(lifted, captured["tokens"])
            loss = total_loss(logits, labels, teacher_logits, distance, recipe)
        value = loss.item()
        if not math.isfinite(value):
            raise FloatingPointError(f"loss is {value}")
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        if device == "cuda":
            torch.cuda.synchronize()
        ema.update(student)
        return value

    return step


@contextmanager
def cudnn_benchmark() -> Iterator[None]:
    before, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, True
    yield
    torch.backends.cudnn.benchmark = before


# The step in plain PyTorch, as well as it can be written.


class PlainLift(nn.Module):
    """The Lift student's layers, nothing dead and nothing hooked.

    Args:
        hooked: whose weights it starts with.
    """

    def __init__(self, hooked: HookedLift) -> None:
        super().__init__()
        self.vit, self.proj, self.norm, self.head = (
            hooked.vit,
            hooked.proj,
            hooked.norm,
            hooked.head,
        )
        self.vit.blocks[-1]._forward_hooks.clear()
        self.vit.norm, self.vit.head = nn.Identity(), nn.Identity()

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        (tokens,) = self.vit.forward_intermediates(
            images, indices=1, output_fmt="NLC", intermediates_only=True
        )
        lifted = self.norm(self.proj(tokens))
        return self.head(lifted.mean(dim=1)), lifted


def plain_step(
    student: PlainLift, teacher: nn.Module, recipe: Recipe, device: str, mode: str
) -> Step:
    """bf16, teacher, student and loss compiled as one, fused optimizer, no synchronization.

    Args:
        student: on the device, as the teacher.
        teacher: timm's model.
        recipe: weights of the terms, precision and optimizer.
        device: its type.
        mode: of `torch.compile`; "none" runs it eager. "max-autotune" replays CUDA graphs, whose
            memory is not in the peak.
    """
    parameters = list(student.parameters())
    averaged = [parameter.detach().clone() for parameter in parameters]
    optimizer = torch.optim.AdamW(
        parameters, lr=recipe.lr, weight_decay=recipe.weight_decay, fused=True
    )

    def compute(images: Tensor, labels: Tensor) -> Tensor:
        with torch.autocast(device, torch.bfloat16, enabled=recipe.amp != "none"):
            with torch.no_grad():
                features, maps = teacher.forward_intermediates(images, indices=1)
                teacher_logits = teacher.forward_head(features)
            logits, lifted = student(images)
            distance = parseval_spectral(lifted, maps[0].flatten(2).mT)
            return total_loss(logits, labels, teacher_logits, distance, recipe)

    if mode != "none":
        compute = torch.compile(compute, dynamic=False, mode=mode)

    def step(images: Tensor, labels: Tensor) -> Tensor:
        torch.compiler.cudagraph_mark_step_begin()
        optimizer.zero_grad(set_to_none=True)
        loss = compute(images, labels)
        loss.backward()
        optimizer.step()
        torch._foreach_lerp_(averaged, [p.detach() for p in parameters], 1 - EMA_DECAY)
        return loss.detach()

    return step


# Ours, and all together.


@dataclass
class Size:
    """How large the models and the batch are."""

    batch: int
    image: int = 224
    student_depth: int = 12
    teacher_depth: int = 24


def steps(size: Size, amp: str, device: str, modes: tuple[str, ...]) -> dict[str, Step]:
    """The same step by everybody, from the same weights.

    Args:
        size: of models and batch.
        amp: of the recipe.
        device: its type.
        modes: of torch.compile, that plain PyTorch is tried in; ours is compiled as by default.
    """
    recipe = Recipe.load(RECIPE).override(
        amp=amp,
        batch_size=size.batch,
        compile="none" if modes == EAGER else "default",
        pairs=((-1, -1),),
        ema_decay=EMA_DECAY,
        # The same for all, from the first update on.
        lr=1e-3,
        lr_scaling=False,
        warmup_epochs=0,
    )
    torch.manual_seed(0)
    student = create_student(
        STUDENT, "lift", width=384, img_size=size.image, depth=size.student_depth
    )
    teacher = create_teacher(
        TEACHER, pretrained=False, img_size=size.image, depth=size.teacher_depth
    )
    spec = InputSpec((3, size.image, size.image), MEAN, STD)

    def copies() -> tuple[HookedLift, nn.Module]:
        lift = HookedLift(student, base_model(size)).to(device).train()
        return lift, copy_of(teacher, size).to(device)

    # Eager in fp16 with an FFT; in bf16 without one.
    made = {"as the released trainers write it": released_step(*copies(), recipe, device)}
    for mode in modes:
        lift, guide = copies()
        name = f"plain PyTorch, {'eager' if mode == 'none' else f'compiled ({mode})'}"
        made[name] = plain_step(PlainLift(lift), guide, recipe, device, mode)
    made["fastkd"] = our_step(student, teacher, recipe, spec, device)
    return made


def base_model(size: Size) -> nn.Module:
    return timm.create_model(STUDENT, img_size=size.image, depth=size.student_depth)


def copy_of(teacher: Teacher, size: Size) -> nn.Module:
    model = timm.create_model(TEACHER, img_size=size.image, depth=size.teacher_depth)
    model.load_state_dict(teacher.model.state_dict())
    return model.requires_grad_(False).eval()


def our_step(
    student: nn.Module, teacher: Teacher, recipe: Recipe, spec: InputSpec, device: str
) -> Step:
    """The trainer's engine."""
    here = torch.device(device, torch.cuda.current_device()) if device == "cuda" else device
    world = World(torch.device(here))
    student, teacher = student.to(here), teacher.to(here)
    teacher.set_input_stats(MEAN, STD)
    built = BuiltStudent(student, spec, CLASSES, None)
    engine = build_engine(built, teacher, recipe, world, updates=1000)
    engine.task.train()

    def step(images: Tensor, labels: Tensor) -> Callable[[], float]:
        engine.update([Batch(images, labels, torch.arange(len(images)))])
        return last_loss

    def last_loss() -> float:
        loss = engine.read().sums["loss"]
        engine.meter.reset()
        return loss

    return step


def step_case(
    size: Size,
    amp: str,
    device: str,
    modes: tuple[str, ...],
    repeat: int,
    tolerance: float,
    ours_first: bool = False,
) -> StepCase:
    """``repeat`` steps in a row; the first updates of each provider must give the same losses."""
    images = torch.randn(size.batch, 3, size.image, size.image, device=device)
    labels = torch.randint(CLASSES, (size.batch,), device=device)
    made = steps(size, amp, device, modes)
    if ours_first:
        made = dict(reversed(made.items()))
    losses: dict[str, list[float]] = {}

    def run(name: str, step: Step) -> Callable[[], None]:
        def repeated() -> None:
            if name not in losses:  # before it is timed
                losses[name] = [read(step(images, labels)) for _ in range(UPDATES_COMPARED)]
                print(f"losses, {name}: " + ", ".join(f"{loss:.4f}" for loss in losses[name]))
                agree(losses, tolerance)
            for _ in range(repeat):
                step(images, labels)

        return repeated

    providers = [
        harness.Provider(name, run(name, step), baseline=name != "fastkd")
        for name, step in made.items()
    ]
    count = "a step" if repeat == 1 else f"{repeat} steps"
    name = (
        f"{count} of {size.batch} images of {size.image} px, {'float32' if amp == 'none' else amp}"
    )
    timer = time_gpu if device == "cuda" else harness.time_cpu
    return StepCase(name, repeat * size.batch, providers, timer, rounds=7)


def read(loss: Any) -> float:
    return float(loss() if callable(loss) else loss)


def agree(losses: dict[str, list[float]], tolerance: float) -> None:
    """Refuse to time steps that do not compute the same thing."""
    reference = next(iter(losses.values()))
    for name, values in losses.items():
        for value, expected in zip(values, reference, strict=True):
            if not abs(value - expected) <= tolerance * abs(expected):
                raise AssertionError(f"{name} gives the losses {values}, others {reference}")


def loader_cases(root: Path, smoke: bool) -> list[StepCase]:
    batch, drawn = (12, 3) if smoke else (48, 24)
    make_jpegs(root, classes=4, train=drawn, val=1)
    for number in range(4 if smoke else 8):  # a batch needs as many; further names cost nothing
        for file in sorted(root.glob("train/*/?????.jpg")):
            os.link(file, file.with_name(f"{file.stem}-{number}.jpg"))
    return [loader_case(root, repeats, batch) for repeats in (3, 1)]


def step_cases(options: Namespace) -> Iterator[StepCase]:
    """One after the other, so that only one case's models are in memory."""
    device = options.device
    tiny = Size(batch=4, image=32, student_depth=2, teacher_depth=2)
    yield step_case(tiny, "none", device, EAGER, 1, tolerance=1e-3)  # the same sum
    if options.smoke:
        if device == "cuda":  # the released trainers' fp16 is for GPUs
            yield step_case(tiny, "bf16", device, EAGER, 1, tolerance=2e-2)
    elif options.quick:
        yield step_case(Size(256), "bf16", device, ("default",), 5, 2e-2, ours_first=True)
    elif device == "cuda":
        # Tuning takes minutes, and says at one size what there is to gain by it.
        for batch, modes in ((256, ("default", "max-autotune")), (512, ("default",))):
            yield step_case(Size(batch), "bf16", device, modes, 5, tolerance=2e-2)
    else:
        small = Size(batch=8, student_depth=4, teacher_depth=4)
        yield step_case(small, "none", device, ("default",), 1, tolerance=1e-3)


def main() -> None:
    parser = harness.arguments(__doc__.splitlines()[0], quick=True)
    parser.set_defaults(rounds=None)  # a case has its own number
    options = parser.parse_args()
    print(f"train_step on {harness.machine(options.device)}")
    print(f"{'':50}{'ms':>10}{'images/s':>11}{'peak MB':>10}")
    rows: list[harness.Row] = []

    def record(case: StepCase, device: str) -> None:
        done = list(rows)
        for made in measure(case, device, options):
            rows[:] = [*done, *made]
            if options.output is not None:  # a run that is cut short leaves rows
                harness.save(options.output, "train_step", options.device, 0.0, {}, rows)

    if not options.quick:
        with tempfile.TemporaryDirectory() as folder, one_thread():
            for case in loader_cases(Path(folder) / "jpegs", options.smoke):
                record(case, "cpu")
    for case in step_cases(options):
        record(case, options.device)
        torch._dynamo.reset()
    if options.output is not None:
        print(f"wrote {options.output}")


if __name__ == "__main__":
    main()
