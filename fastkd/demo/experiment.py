"""The demo's experiment: a teacher, six kinds of students, several seeds, and feature ranks."""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastkd.analysis import ImageSpectra, InSharedBasis, Ranks, SecondMoment
from fastkd.demo.data import CLASSES, SIDE, Digits, load_digits
from fastkd.models import LiftVisionTransformer, Taps, Teacher, create_student
from fastkd.training import Recipe, Result, train
from fastkd.training.logging import RESULT
from fastkd.utils.io import read_json, write_text
from fastkd.utils.progress import Progress
from fastkd.utils.random import preserved_rng

SETTINGS = "settings.json"
RUNS = "runs"
TEACHER = "teacher"

_LAST_BLOCK = ((-1, -1),)


@dataclass(frozen=True)
class Settings:
    """What decides the demo's numbers beside the seeds; an output folder holds one of these."""

    name: str
    default_seeds: int
    teacher_epochs: int  # over the augmented copies
    student_epochs: int
    augmented_copies: int = 10  # of each training image, for the teacher
    teacher_width: int = 48  # channels
    teacher_depth: int = 4  # blocks
    student_depth: int = 3
    feature_loss: str = "spectral"  # between the last token maps
    # A tenth of the paper's: this teacher's last tokens are so large that the feature term would
    # outweigh the others.
    feature_weight: float = 0.02
    device: str = "cpu"

    @property
    def student_width(self) -> int:
        """Half the teacher's, as DeiT-Tiny's is half of CaiT-S24's."""
        return self.teacher_width // 2


FULL = Settings("full", default_seeds=4, teacher_epochs=10, student_epochs=25)
QUICK = Settings("quick", default_seeds=1, teacher_epochs=3, student_epochs=10)


@dataclass(frozen=True)
class Contender:
    """One kind of student."""

    key: str  # in folder names and results
    name: str
    variant: str  # of `fastkd.create_student`
    projector: str | None = None  # from student to teacher width; None trains without a teacher
    twin: str | None = None  # key of the same student without distillation, to count the gain from


CONTENDERS = (
    Contender("plain", "plain", "plain"),
    Contender("plain-kd", "plain + KD", "plain", "linear", twin="plain"),
    Contender("lift", "Lift", "lift"),
    Contender("lift-kd", "Lift + KD", "lift", "lift", twin="lift"),
    Contender("widelast", "WideLast", "widelast"),
    Contender("widelast-kd", "WideLast + KD", "widelast", "none", twin="widelast"),
)


@dataclass(frozen=True)
class Scores:
    """A contender's runs."""

    contender: Contender
    parameters: int  # at inference
    top1: list[float]  # held-out accuracy in % after the last epoch, by seed


@dataclass(frozen=True)
class FeatureRanks:
    """Ranks of one model's distilled features over the held-out images."""

    name: str  # of the model
    feature: str
    tokens: int  # N
    dim: int  # D
    image: Ranks  # in each image's own basis
    dataset: Ranks  # in the basis that all held-out images share


@dataclass(frozen=True)
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

    @property
    def runs(self) -> int:
        """Number of runs, the teacher's included."""
        return 1 + self.seeds * len(self.scores)

    def gains(self, scores: Scores) -> list[float] | None:
        """Points over the twin without distillation, by seed; None if there is none."""
        for other in self.scores:
            if other.contender.key == scores.contender.twin:
                return [a - b for a, b in zip(scores.top1, other.top1, strict=True)]
        return None


def run_experiment(settings: Settings, seeds: int, output: Path, progress: Progress) -> Findings:
    """Train what is not trained yet, and measure."""
    claim(output, settings)
    with _one_thread():
        return _Experiment(settings, seeds, output, progress).run()


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


@contextmanager
def _one_thread() -> Iterator[None]:
    """Run torch on one thread: more gain little on small matrices and sum in another order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class _Experiment:
    def __init__(self, settings: Settings, seeds: int, output: Path, progress: Progress) -> None:
        self.settings = settings
        self.seeds = seeds
        self.output = output
        self.progress = progress
        self.digits = load_digits(settings.augmented_copies)
        self.kept = 0
        self.ranks: list[FeatureRanks] = []

    def run(self) -> Findings:
        """Run or fetch everything."""
        self.progress.start("", 1 + self.seeds * len(CONTENDERS))
        teacher, taught = self._train_teacher()
        self._measure("teacher", teacher.model)
        results: dict[str, list[Result]] = {contender.key: [] for contender in CONTENDERS}
        # Seed by seed, so that a demo that is stopped early compares equal seeds.
        for seed in range(self.seeds):
            for contender in CONTENDERS:
                results[contender.key].append(self._train_student(contender, seed, teacher))
        return Findings(
            settings=self.settings,
            seeds=self.seeds,
            train_images=len(self.digits.train),
            held_out_images=len(self.digits.held_out),
            teacher_top1=_top1(taught),
            teacher_parameters=taught.parameters,
            scores=[_scores(contender, results[contender.key]) for contender in CONTENDERS],
            ranks=self.ranks,
            kept=self.kept,
        )

    def _train_teacher(self) -> tuple[Teacher, Result]:
        model = build_teacher(self.settings)
        data = (self.digits.augmented, self.digits.held_out)
        recipe = teacher_recipe(self.settings)
        result = self._timed(
            TEACHER, TEACHER, lambda folder: self._train(model, None, data, folder, recipe)
        )
        return Teacher(model), result

    def _train_student(self, contender: Contender, seed: int, teacher: Teacher) -> Result:
        model = build_student(self.settings, contender.variant, seed)
        guide = None if contender.projector is None else teacher
        data = (self.digits.train, self.digits.held_out)
        recipe = student_recipe(self.settings, contender, seed)
        result = self._timed(
            f"{contender.name}, seed {seed}",
            f"{contender.key}-seed{seed}",
            lambda folder: self._train(model, guide, data, folder, recipe),
        )
        if seed == 0 and guide is not None:
            self._measure(contender.name, model)
        return result

    def _train(
        self, model: nn.Module, teacher: Any, data: Any, folder: Path, recipe: Any
    ) -> Result:
        # `train` leaves the trained weights in the model, also if the run was finished before.
        device = self.settings.device
        return train(model, teacher, data, folder, recipe, device=device, quiet=True)

    def _timed(self, name: str, folder_name: str, run: Callable[[Path], Result]) -> Result:
        folder = self.output / RUNS / folder_name
        finished_before = (folder / RESULT).exists()
        self.progress.note("", label=name)
        started = time.monotonic()
        result = run(folder)
        self.kept += finished_before
        self.progress.advance()
        took = "kept from before" if finished_before else f"{time.monotonic() - started:.0f} s"
        done, total = self.progress.done, self.progress.total
        number = f"[{done:>{len(str(total))}}/{total}]"
        self.progress.write(f"{number} {name}: {_top1(result):.1f} % ({took})")
        return result

    def _measure(self, name: str, model: nn.Module) -> None:
        self.ranks.append(measure_ranks(name, model, self.digits, self.settings.device))


def _scores(contender: Contender, results: list[Result]) -> Scores:
    return Scores(contender, results[0].parameters, [_top1(result) for result in results])


def _top1(result: Result) -> float:
    assert result.top1 is not None  # None is for evaluation sets without labels
    return result.top1


def build_teacher(settings: Settings) -> nn.Module:
    """The teacher, untrained: a timm ViT that pools its patch tokens."""
    width, depth = settings.teacher_width, settings.teacher_depth
    return _vit(0, "plain", None, embed_dim=width, depth=depth, global_pool="avg")


def build_student(settings: Settings, variant: str, seed: int) -> nn.Module:
    """A student, untrained, half as wide as the teacher but for what its variant widens."""
    return _vit(
        seed,
        variant,
        None if variant == "plain" else settings.teacher_width,
        embed_dim=settings.student_width,
        depth=settings.student_depth,
    )


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
    "warmup_epochs": 1,
    "batch_size": 64,
    "lr_scaling": False,
    "clip_grad": 1.0,
    "ema_decay": None,
    "amp": "none",
    "augment": "none",
    "workers": 0,
    "eval_batch_size": 500,
}


def teacher_recipe(settings: Settings) -> Recipe:
    """How the teacher is trained."""
    epochs = settings.teacher_epochs
    return Recipe(epochs=epochs, eval_interval=epochs, lr=5e-3, **_COMMON)


def student_recipe(settings: Settings, contender: Contender, seed: int) -> Recipe:
    """How a student is trained: 0.1 CE + 0.9 soft KD + w feature, or CE alone without a teacher."""
    epochs = settings.student_epochs
    return Recipe(
        epochs=epochs,
        eval_interval=epochs,
        lr=4e-3,
        seed=seed,
        alpha=0.9,
        tau=1.0,
        feature_loss=settings.feature_loss,
        feature_weight=settings.feature_weight,
        pairs=_LAST_BLOCK,
        projector=contender.projector or "none",
        classes_by="number",  # the digits have no names: without it every student warns of that
        **_COMMON,
    )


def measure_ranks(name: str, model: nn.Module, digits: Digits, device: str) -> FeatureRanks:
    """Per-image and data-set ranks of a model's distilled features over the held-out images."""
    tokens, feature = distilled_tokens(model, digits.held_out.tensors[0].to(device))
    image, moment = ImageSpectra(), SecondMoment()
    image.update(tokens)
    moment.update(tokens)
    dataset = InSharedBasis(moment.result(), subspaces=())
    dataset.update(tokens)
    _, count, dim = tokens.shape
    return FeatureRanks(name, feature, count, dim, image.result().ranks, dataset.result().ranks)


@torch.no_grad()
def distilled_tokens(model: nn.Module, images: Tensor) -> tuple[Tensor, str]:
    """The features that take part in distillation."""
    model.eval().to(images.device)
    output = Taps(model, [-1])(images)
    if isinstance(model, LiftVisionTransformer) and output.final is not None:
        return output.final.data, "lifted tokens"
    (tokens,) = output.tokens.values()
    return tokens.data, "last block"


def mean_and_spread(values: list[float]) -> tuple[float, float | None]:
    """Mean and sample standard deviation."""
    mean = math.fsum(values) / len(values)
    if len(values) == 1:
        return mean, None
    return mean, math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (len(values) - 1))
