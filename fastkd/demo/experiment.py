"""The demo's experiment: digits, a teacher, six kinds of students, several seeds, feature ranks."""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from fastkd.analysis import ImageSpectra, InSharedBasis, Ranks, SecondMoment
from fastkd.models import LiftVisionTransformer, Taps, Teacher, create_student
from fastkd.training import Recipe, train
from fastkd.training.logging import RESULT
from fastkd.utils.io import read_json, write_text
from fastkd.utils.progress import Progress
from fastkd.utils.random import preserved_rng

SETTINGS = "settings.json"
RUNS = "runs"

CLASSES = 10
SIDE = 8
HELD_OUT = 500

# Wider ranges turn one digit into another, or push it out of the 8 x 8 pixels.
_ROTATION = math.radians(12)
_SCALE = 0.1
_SHIFT = 0.5  # pixels


@dataclass(frozen=True)
class Settings:
    """What decides the demo's numbers beside the seeds; an output folder holds one of these."""

    name: str
    default_seeds: int
    teacher_epochs: int  # over the augmented copies
    student_epochs: int
    augmented_copies: int = 10  # of each training image, for the teacher
    teacher_width: int = 48  # channels; students have half, as DeiT-Tiny has of CaiT-S24
    teacher_depth: int = 4  # blocks
    student_depth: int = 3
    feature_loss: str = "spectral"  # between the last token maps
    # A tenth of the paper's: this teacher's last tokens are so large that the feature term would
    # outweigh the others.
    feature_weight: float = 0.02
    device: str = "cpu"


FULL = Settings("full", default_seeds=4, teacher_epochs=10, student_epochs=25)
QUICK = Settings("quick", default_seeds=1, teacher_epochs=3, student_epochs=10)


class Contender(NamedTuple):
    """One kind of student."""

    key: str  # in folder names and results
    name: str
    variant: str  # of `fastkd.create_student`
    projector: str | None = None  # from student to teacher width; None trains without a teacher
    twin: str | None = None  # key of the same student without distillation


CONTENDERS = (
    Contender("plain", "plain", "plain"),
    Contender("plain-kd", "plain + KD", "plain", "linear", twin="plain"),
    Contender("lift", "Lift", "lift"),
    Contender("lift-kd", "Lift + KD", "lift", "lift", twin="lift"),
    Contender("widelast", "WideLast", "widelast"),
    Contender("widelast-kd", "WideLast + KD", "widelast", "none", twin="widelast"),
)


class Digits(NamedTuple):
    """Datasets of (float32 [1, 8, 8], label), normalized by the training pixels."""

    train: TensorDataset  # 1,297 images, for students
    augmented: TensorDataset  # rotated, scaled and shifted copies of them, for the teacher
    held_out: TensorDataset  # 500 images, stratified by digit; never trained on


class Scores(NamedTuple):
    """The runs of a contender."""

    contender: Contender
    parameters: int  # at inference
    top1: list[float]  # held-out accuracy in % after the last epoch, by seed
    gains: list[float] | None  # points over the twin, by seed; None without a twin


class FeatureRanks(NamedTuple):
    """Ranks of one model's distilled features over the held-out images."""

    name: str  # of the model
    feature: str
    tokens: int  # N
    dim: int  # D
    image: Ranks  # in each image's own basis
    dataset: Ranks  # in the basis that all held-out images share


@dataclass
class Findings:
    """Everything that the demo measured."""

    settings: Settings
    seeds: int  # runs of each student
    train_images: int
    held_out_images: int
    teacher_top1: float  # in %
    teacher_parameters: int
    scores: list[Scores]  # in the order of `CONTENDERS`
    ranks: list[FeatureRanks]  # the teacher's first
    kept: int  # runs that had been finished before


def load_digits(copies: int) -> Digits:
    """Split and normalize scikit-learn's digits; the same split and copies on every call."""
    from sklearn.datasets import load_digits as sklearn_digits
    from sklearn.model_selection import train_test_split

    pixels, labels = sklearn_digits(return_X_y=True)
    parts = train_test_split(pixels, labels, test_size=HELD_OUT, stratify=labels, random_state=0)
    train, held_out = (torch.from_numpy(p).float().view(-1, 1, SIDE, SIDE) / 16 for p in parts[:2])
    train_labels, held_out_labels = (torch.from_numpy(part).long() for part in parts[2:])
    mean, std = train.mean(), train.std()

    def dataset(images: Tensor, labels: Tensor) -> TensorDataset:
        return TensorDataset((images - mean) / std, labels)

    return Digits(
        dataset(train, train_labels),
        dataset(_augmented(train, copies), train_labels.repeat(copies)),
        dataset(held_out, held_out_labels),
    )


def _augmented(images: Tensor, copies: int) -> Tensor:
    """Copy images under small, seeded random rotations, scalings and shifts."""
    images = images.repeat(copies, 1, 1, 1)
    generator = torch.Generator().manual_seed(0)

    def uniform(limit: float) -> Tensor:
        return (2 * torch.rand(len(images), generator=generator) - 1) * limit

    angle, scale = uniform(_ROTATION), 1 + uniform(_SCALE)
    # affine_grid measures in half images.
    shift_x, shift_y = uniform(2 * _SHIFT / SIDE), uniform(2 * _SHIFT / SIDE)
    cos, sin = scale * angle.cos(), scale * angle.sin()
    matrices = torch.stack([cos, -sin, shift_x, sin, cos, shift_y], dim=1).view(-1, 2, 3)
    grid = F.affine_grid(matrices, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, align_corners=False)


def run_experiment(settings: Settings, seeds: int, output: Path, progress: Progress) -> Findings:
    """Train what is not trained yet, and measure."""
    claim(output, settings)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # more gain little on small matrices, and sum in another order
    try:
        return _run(settings, seeds, output, progress)
    finally:
        torch.set_num_threads(threads)


def claim(output: Path, settings: Settings) -> None:
    """Record the settings in the folder; raise if it holds runs of other settings."""
    wanted = dataclasses.asdict(settings)
    path = output / SETTINGS
    if not path.exists():
        output.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(wanted, indent=2) + "\n")
        return
    found = read_json(path)
    names = [name for name in {**found, **wanted} if found.get(name) != wanted.get(name)]
    if names:
        changes = ", ".join(f"{n} {found.get(n)!r} -> {wanted.get(n)!r}" for n in names)
        raise ValueError(
            f"{output} holds a demo with other settings ({changes}): choose another --output, or "
            "delete that folder"
        )


def _run(settings: Settings, seeds: int, output: Path, progress: Progress) -> Findings:
    digits = load_digits(settings.augmented_copies)
    kept = 0
    progress.start("", 1 + seeds * len(CONTENDERS))

    def run(
        name: str, folder: str, model: nn.Module, guide: Teacher | None, data: Any, recipe: Recipe
    ) -> tuple[float, int]:
        """Train, unless the run was finished before; returns top-1 and parameters."""
        nonlocal kept
        path = output / RUNS / folder
        finished_before = (path / RESULT).exists()
        kept += finished_before
        progress.note("", label=name)
        started = time.monotonic()
        # `train` leaves the trained weights in the model, also if the run was finished before.
        result = train(model, guide, data, path, recipe, device=settings.device, quiet=True)
        progress.advance()
        assert result.top1 is not None  # None is for evaluation sets without labels
        took = "kept from before" if finished_before else f"{time.monotonic() - started:.0f} s"
        done, total = progress.done, progress.total
        number = f"[{done:>{len(str(total))}}/{total}]"
        progress.write(f"{number} {name}: {result.top1:.1f} % ({took})")
        return result.top1, result.parameters

    model = build_teacher(settings)
    data = (digits.augmented, digits.held_out)
    epochs = settings.teacher_epochs
    recipe = Recipe(epochs=epochs, eval_interval=epochs, lr=5e-3, **_COMMON)
    taught = run("teacher", "teacher", model, None, data, recipe)
    teacher = Teacher(model)
    ranks = [measure_ranks("teacher", model, digits, settings.device)]
    results: dict[str, list[tuple[float, int]]] = {contender.key: [] for contender in CONTENDERS}
    # Seed by seed, so that a demo that is stopped early compares equal seeds.
    for seed in range(seeds):
        for key, name, variant, projector, _ in CONTENDERS:
            model = build_student(settings, variant, seed)
            guide = None if projector is None else teacher
            recipe = student_recipe(settings, projector, seed)
            data = (digits.train, digits.held_out)
            label, folder = f"{name}, seed {seed}", f"{key}-seed{seed}"
            results[key].append(run(label, folder, model, guide, data, recipe))
            if seed == 0 and guide is not None:
                ranks.append(measure_ranks(name, model, digits, settings.device))
    top1 = {key: [accuracy for accuracy, _ in found] for key, found in results.items()}
    scores = []
    for contender in CONTENDERS:
        own, twin = top1[contender.key], top1.get(contender.twin or "")
        gains = None if twin is None else [a - b for a, b in zip(own, twin, strict=True)]
        scores.append(Scores(contender, results[contender.key][0][1], own, gains))
    return Findings(
        settings, seeds, len(digits.train), len(digits.held_out), *taught, scores, ranks, kept
    )


def build_teacher(settings: Settings) -> nn.Module:
    """The teacher, untrained: a timm ViT that pools its patch tokens."""
    width, depth = settings.teacher_width, settings.teacher_depth
    return _vit(0, "plain", None, embed_dim=width, depth=depth, global_pool="avg")


def build_student(settings: Settings, variant: str, seed: int) -> nn.Module:
    """A student, untrained, half as wide as the teacher but for what its variant widens."""
    width = None if variant == "plain" else settings.teacher_width
    own = settings.teacher_width // 2
    return _vit(seed, variant, width, embed_dim=own, depth=settings.student_depth)


def _vit(seed: int, variant: str, width: int | None, **options: Any) -> nn.Module:
    # "jax": timm's default, a normal of 0.02, is made for hundreds of channels, not for dozens.
    with preserved_rng():
        torch.manual_seed(seed)
        return create_student(
            "vit_tiny_patch16_224",
            variant,  # type: ignore[arg-type]
            width=width,
            num_classes=CLASSES,
            img_size=SIDE,
            patch_size=2,
            in_chans=1,
            num_heads=3,
            weight_init="jax",
            init_weights="timm",  # that is, by weight_init
            **options,
        )


# Label smoothing, AdamW and the cosine are the paper's; the rest suits 8 x 8 pixels and minutes.
_COMMON: dict[str, Any] = {
    "warmup_epochs": 1, "batch_size": 64, "lr_scaling": False, "clip_grad": 1.0,
    "ema_decay": None, "amp": "none", "augment": "none", "workers": 0, "eval_batch_size": 500,
}  # fmt: skip


def student_recipe(settings: Settings, projector: str | None, seed: int) -> Recipe:
    """How a student is trained: 0.1 CE + 0.9 soft KD + w feature, or CE alone without a teacher."""
    return Recipe(
        epochs=settings.student_epochs,
        eval_interval=settings.student_epochs,
        lr=4e-3,
        seed=seed,
        alpha=0.9,
        tau=1.0,
        feature_loss=settings.feature_loss,
        feature_weight=settings.feature_weight,
        pairs=((-1, -1),),
        projector=projector or "none",
        classes_by="number",  # the digits have no names, of which every student would warn
        **_COMMON,
    )


@torch.no_grad()
def measure_ranks(name: str, model: nn.Module, digits: Digits, device: str) -> FeatureRanks:
    """Ranks per image and over the dataset of a model's distilled features."""
    output = Taps(model.eval().to(device), [-1])(digits.held_out.tensors[0].to(device))
    (found,), feature = output.tokens.values(), "last block"
    if isinstance(model, LiftVisionTransformer) and output.final is not None:
        found, feature = output.final, "lifted tokens"
    tokens = found.data
    image, moment = ImageSpectra(), SecondMoment()
    image.update(tokens)
    moment.update(tokens)
    dataset = InSharedBasis(moment.result(), subspaces=())
    dataset.update(tokens)
    _, count, dim = tokens.shape
    return FeatureRanks(name, feature, count, dim, image.result().ranks, dataset.result().ranks)


def mean_and_spread(values: list[float]) -> tuple[float, float | None]:
    """Mean and sample standard deviation."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None
