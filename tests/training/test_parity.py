"""One update of a shipped recipe against the same update written by hand.

The hand-written side takes models from timm, the formulae and the numbers from the papers
(arXiv 2511.15572, 2412.19055), and nothing from fastkd: real architectures, random weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastkd.config import Recipe
from fastkd.data.batches import Batch
from fastkd.data.transforms import InputSpec
from fastkd.inference.preprocessing import Shape, build_student
from fastkd.models import Teacher
from fastkd.training.build import BuiltStudent, build_engine
from fastkd.training.updates import Engine
from fastkd.utils.distributed import World

CLASSES = 1000
UPDATES_PER_EPOCH = 10
DONE = 25  # updates: the warm-up of 5 epochs is half over


class HandLift(nn.Module):
    """Tokens of DeiT-Tiny's last block -> Linear -> LayerNorm, classified by their mean."""

    def __init__(self, img_size: int) -> None:
        super().__init__()
        self.deit = timm.create_model("deit_tiny_patch16_224", img_size=img_size)
        self.projection = nn.Linear(192, 384, bias=False)
        self.normalization = nn.LayerNorm(384)
        self.head = nn.Linear(384, CLASSES)

    def forward(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        (narrow,) = self.deit.forward_intermediates(images, indices=[11], intermediates_only=True)
        lifted = self.normalization(self.projection(narrow.permute(0, 2, 3, 1)))
        return self.head(lifted.mean(dim=(1, 2))), [lifted.permute(0, 3, 1, 2)]

    @staticmethod
    def renamed(name: str) -> str:
        """Where a weight of fastkd's student is kept here."""
        own = {"norm.proj.": "projection.", "norm.norm.": "normalization.", "head.": "head."}
        for theirs, ours in own.items():
            if name.startswith(theirs):
                return name.replace(theirs, ours, 1)
        return f"deit.{name}"


class HandWideLast(nn.Module):
    """Eleven blocks of DeiT-Tiny -> Linear -> LayerNorm -> a block of twice the width."""

    def __init__(self, img_size: int) -> None:
        super().__init__()
        self.deit = timm.create_model("deit_tiny_patch16_224", img_size=img_size, num_classes=0)
        self.deit.blocks, self.deit.norm = self.deit.blocks[:11], nn.Identity()
        norm = partial(nn.LayerNorm, eps=1e-6)
        self.projection = nn.Linear(192, 384, bias=False)
        self.normalization = norm(384)
        self.last = timm.models.vision_transformer.Block(384, 6, qkv_bias=True, norm_layer=norm)
        self.norm = norm(384)
        self.head = nn.Linear(384, CLASSES)

    def forward(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        wide = self.last(self.normalization(self.projection(self.deit.forward_features(images))))
        patches = wide[:, 1:].transpose(1, 2)
        grid = self.deit.patch_embed.grid_size
        return self.head(self.norm(wide)[:, 0]), [patches.unflatten(2, grid)]

    @staticmethod
    def renamed(name: str) -> str:
        """Where a weight of fastkd's student is kept here."""
        own = {
            "blocks.11.proj_in.": "projection.",
            "blocks.11.proj_norm.": "normalization.",
            "blocks.11.": "last.",
            "norm.": "norm.",
            "head.": "head.",
        }
        for theirs, ours in own.items():
            if name.startswith(theirs):
                return name.replace(theirs, ours, 1)
        return f"deit.{name}"


class HandPlain(nn.Module):
    """DeiT-Tiny as it is, with the maps of eight blocks."""

    def __init__(self, img_size: int) -> None:
        super().__init__()
        self.deit = timm.create_model("deit_tiny_patch16_224", img_size=img_size)

    def forward(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        final, maps = self.deit.forward_intermediates(images, indices=[0, 1, 6, 7, 8, 9, 10, 11])
        return self.deit.forward_head(final), maps

    @staticmethod
    def renamed(name: str) -> str:
        """Where a weight of fastkd's student is kept here."""
        return f"deit.{name}"


def smoothed_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    log_probabilities = logits.log_softmax(dim=-1)
    of_label = log_probabilities[torch.arange(len(labels)), labels]
    return -(0.9 * of_label + 0.1 * log_probabilities.mean(dim=-1)).mean()


def divergence(logits: Tensor, teacher_logits: Tensor, tau: float = 1.0) -> Tensor:
    student, teacher = ((x / tau).log_softmax(dim=-1) for x in (logits, teacher_logits))
    return tau**2 * F.kl_div(student, teacher, reduction="batchmean", log_target=True)


def spectral(student: Tensor, teacher: Tensor) -> Tensor:
    """rfft2 of both maps [B, C, H, W], real and imaginary parts stacked, mean squared error."""
    teacher = F.adaptive_avg_pool3d(teacher, (student.shape[1], None, None))
    spectra = [
        torch.view_as_real(torch.fft.rfft2(x, dim=(2, 3), norm="ortho")) for x in (student, teacher)
    ]
    return F.mse_loss(*spectra)


@dataclass(frozen=True)
class Case:
    """A recipe as its paper writes it."""

    recipe: str
    student: type[HandLift] | type[HandWideLast] | type[HandPlain]
    teacher_blocks: tuple[int, ...]
    img_size: int
    peak_lr: float
    undecayed: tuple[str, ...]  # beside biases and the weights of norms
    alpha: float = 0.9
    feature: Callable[[Tensor, Tensor], Tensor] = spectral

    def weights(self) -> dict[str, float]:
        """Of the terms in the loss; logits that weigh nothing are not computed."""
        terms = {"ce": 1 - self.alpha, "soft_kd": self.alpha, "feature": 0.2}
        return {name: weight for name, weight in terms.items() if weight > 0}


SMALL = 64  # a grid of 4 x 4, on which an update takes a second instead of ten
CASES = [
    Case("lift_softkd_spectral", HandLift, (23,), 224, 5e-4 * 2048 / 512, ()),
    Case(
        "widelast_mse",
        HandWideLast,
        (23,),
        SMALL,
        5e-4 * 2048 / 512,
        (),
        alpha=0.0,
        feature=F.mse_loss,
    ),
    Case(
        "spectralkd_deit_tiny",
        HandPlain,
        (0, 1, 18, 19, 20, 21, 22, 23),
        SMALL,  # eight maps are compared on a grid of 4 x 4 as on one of 14 x 14
        5e-4 * 512 / 512,
        ("deit.cls_token", "deit.pos_embed"),
    ),
]


@dataclass
class Update:
    """Both sides of a case before their update, with equal weights, and what both are fed."""

    case: Case
    engine: Engine
    hand: nn.Module
    teacher: nn.Module
    images: Tensor
    labels: Tensor

    def by_engine(self) -> dict[str, float]:
        """Run fastkd's update; the unweighted terms and their total."""
        self.engine.scheduler.step_update(DONE)
        samples = torch.arange(len(self.labels))
        self.engine.update([Batch(self.images, self.labels, samples)])
        return self.engine.read().sums

    def by_hand(self) -> dict[str, Tensor]:
        """The hand-written terms and their total."""
        logits, maps = self.hand(self.images)
        with torch.no_grad():
            teacher_logits = self.teacher(self.images)
            teacher_maps = self.teacher.forward_intermediates(
                self.images, indices=list(self.case.teacher_blocks), intermediates_only=True
            )
        distances = [self.case.feature(s, t) for s, t in zip(maps, teacher_maps, strict=True)]
        terms = {
            "ce": smoothed_cross_entropy(logits, self.labels),
            "soft_kd": divergence(logits, teacher_logits),
            "feature": torch.stack(distances).mean(),
        }
        weights = self.case.weights()
        total = sum(weight * terms[name] for name, weight in weights.items())
        return {"loss": total, **{name: terms[name] for name in weights}}

    @property
    def learning_rate(self) -> float:
        """What the warm-up has come to, on its line from 1e-6 to the scaled rate."""
        return 1e-6 + (self.case.peak_lr - 1e-6) * DONE / (5 * UPDATES_PER_EPOCH)

    def step_by_hand(self) -> None:
        """AdamW, with weight decay on matrices and embeddings."""
        named = dict(self.hand.named_parameters())
        flat = {n for n, p in named.items() if p.ndim == 1} | set(self.case.undecayed)
        groups = [
            {"params": [named[n] for n in sorted(flat)], "weight_decay": 0.0},
            {"params": [named[n] for n in sorted(named.keys() - flat)], "weight_decay": 0.05},
        ]
        optimizer = torch.optim.AdamW(groups, self.learning_rate, betas=(0.9, 0.999), eps=1e-8)
        self.by_hand()["loss"].backward()
        optimizer.step()

    def weights(self) -> Iterator[tuple[str, Tensor, Tensor]]:
        """Name, fastkd's and the hand-written student's value of every weight."""
        hand = dict(self.hand.named_parameters())
        for name, ours in self.engine.task.student.named_parameters():
            yield name, ours.detach(), hand[self.case.student.renamed(name)].detach()


def stirred(model: nn.Module) -> nn.Module:
    """Random weights under which every term matters.

    A fresh CaiT's blocks add next to nothing to what they are given, and fresh heads say that all
    classes are about equally likely.
    """
    for name, parameter in model.named_parameters():
        if "gamma" in name:
            nn.init.constant_(parameter, 0.3)
    nn.init.normal_(model.head.weight, std=0.1)
    return model


def prepare(case: Case, dtype: torch.dtype) -> Update:
    torch.manual_seed(0)
    recipe = Recipe.load(case.recipe).override(img_size=case.img_size, amp="none")
    student = stirred(build_student(recipe, Shape(CLASSES, 3, case.img_size))).to(dtype)
    teacher = stirred(timm.create_model(recipe.teacher, img_size=case.img_size)).to(dtype).eval()
    spec = InputSpec((3, case.img_size, case.img_size), None, None)
    built = BuiltStudent(student, spec, CLASSES, case.img_size)
    world = World(torch.device("cpu"))
    engine = build_engine(built, Teacher(teacher), recipe, world, UPDATES_PER_EPOCH)
    engine.task.train()
    hand = case.student(case.img_size).to(dtype).train()
    own = dict(hand.named_parameters())
    with torch.no_grad():
        for name, value in student.named_parameters():
            own[case.student.renamed(name)].copy_(value)
    images = torch.randn(2, 3, case.img_size, case.img_size, dtype=dtype)
    return Update(case, engine, hand, teacher, images, torch.tensor([3, 141]))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.recipe)
def test_the_loss_of_an_update_is_the_sum_of_the_papers_terms(case):
    update = prepare(case, torch.float32)
    with torch.no_grad():
        expected = {name: value.item() for name, value in update.by_hand().items()}
    ours = update.by_engine()
    assert {name: ours[name] for name in expected} == pytest.approx(expected, rel=1e-5)
    # None of them is so small that its absence would go unnoticed.
    weights = case.weights().items()
    assert all(weight * expected[name] > 1e-2 * expected["loss"] for name, weight in weights)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.recipe)
def test_the_weights_after_an_update_are_those_of_adamw_on_the_papers_loss(case):
    update = prepare(replace(case, img_size=SMALL), torch.float64)
    before = {name: value.clone() for name, value, _ in update.weights()}
    update.by_engine()
    update.step_by_hand()
    for name, ours, by_hand in update.weights():
        assert (ours - before[name]).abs().max() > 0.9 * update.learning_rate, name
        # AdamW's first step is g / (|g| + 1e-8), which is sensitive where a gradient is as small.
        torch.testing.assert_close(ours, by_hand, atol=1e-9, rtol=0, msg=name)
