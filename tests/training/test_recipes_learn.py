"""Every shipped recipe, from its name to a student that has learnt, on JPEGs made here.

Models and images are small and the schedule is short; all else is the recipe's: its variant, terms,
pairs of blocks, augmentation, optimizer and averaging.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from make_jpegs import make_jpegs
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.cait import Cait
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from fastkd.training import Recipe, train

CLASSES = 3
SIDE = 32
# The published models with as many blocks, an eighth as wide, on 4 x 4 patches.
WIDTHS = {384: 48, 192: 24, 219: 30}
VIT: dict[str, Any] = {"img_size": SIDE, "patch_size": 8, "mlp_ratio": 2.0}
SWIN: dict[str, Any] = {
    "img_size": SIDE,
    "patch_size": 2,
    "window_size": 4,
    "embed_dim": 16,
    "num_heads": (1, 2, 4, 8),
    "mlp_ratio": 2.0,
}
SMALL: dict[str, Any] = {
    "img_size": SIDE,
    "num_classes": CLASSES,
    "epochs": 8,
    "warmup_epochs": 1,
    "batch_size": 24,
    "lr": 5e-3 * 512 / 24,
    "eval_interval": 8,
    "amp": "none",  # CPUs without bf16 arithmetic take many times as long
    "workers": 0,
    "device": "cpu",
    "quiet": True,
}
# The distance at four stages, of weight 0.05, falls more slowly than that at a ViT's last blocks.
LONGER: dict[str, Any] = {"epochs": 16, "eval_interval": 16, "lr": 3e-3 * 512 / 24}

default_cfgs = generate_default_cfgs(
    {"small_deit_tiny": {}, "small_deit_small": {}, "small_swin_tiny": {}}
)


def _small_deit(name: str, width: int, pretrained: bool, options: dict[str, Any]) -> nn.Module:
    options = {**VIT, "embed_dim": width, "depth": 12, "num_heads": width // 12, **options}
    return build_model_with_cfg(VisionTransformer, name, pretrained, **options)


@register_model
def small_deit_tiny(pretrained: bool = False, **options: Any) -> nn.Module:
    """DeiT-Tiny in small."""
    return _small_deit("small_deit_tiny", WIDTHS[192], pretrained, options)


@register_model
def small_deit_small(pretrained: bool = False, **options: Any) -> nn.Module:
    """DeiT-Small in small."""
    return _small_deit("small_deit_small", WIDTHS[384], pretrained, options)


@register_model
def small_swin_tiny(pretrained: bool = False, **options: Any) -> nn.Module:
    """Swin-Tiny in small."""
    options = {**SWIN, "depths": (1, 1, 1, 1), **options}
    return build_model_with_cfg(SwinTransformer, "small_swin_tiny", pretrained, **options)


STUDENTS = {
    "deit_tiny_patch16_224": "small_deit_tiny",
    "deit_small_patch16_224": "small_deit_small",
    "swin_tiny_patch4_window7_224": "small_swin_tiny",
}


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Operations this small gain nothing from threads, and lose much where cores are shared."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def jpegs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("learn") / "jpegs"
    return make_jpegs(folder, classes=CLASSES, train=32, val=16, size=(64, 48))


def taught(model: nn.Module, jpegs: Path) -> nn.Module:
    mild = {"auto_augment": None, "reprob": 0.0, "scale": (0.5, 1.0)}
    train(model, None, jpegs, **SMALL, **mild, ema_decay=None)
    return model


@pytest.fixture(scope="session")
def cait(jpegs: Path) -> nn.Module:
    torch.manual_seed(0)
    shape = {"embed_dim": WIDTHS[384], "depth": 24, "num_heads": 4, "init_values": 0.1}
    return taught(Cait(**VIT, **shape, num_classes=CLASSES), jpegs)


@pytest.fixture(scope="session")
def swin(jpegs: Path) -> nn.Module:
    torch.manual_seed(0)
    return taught(SwinTransformer(**SWIN, depths=(2, 2, 2, 2), num_classes=CLASSES), jpegs)


def terms(recipe: Recipe) -> set[str]:
    """What the recipe's loss is the sum of, and the sum."""
    named = {"loss", "ce"}
    if recipe.alpha > 0:
        named.add("soft_kd")
    if recipe.feature_weight > 0:
        named.add("feature")
    return named


# One of each kind of student and loss; the others are nightly.
EVERY_TIME = ("deit_tiny", "lift_mse", "widelast_softkd_spectral", "spectralkd_swin_tiny")


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name in EVERY_TIME else pytest.mark.nightly)
        for name in Recipe.names()
    ],
)
def test_a_recipe_runs_and_its_student_learns(name, jpegs, request):
    recipe = Recipe.load(name)
    teacher = None
    if recipe.teacher is not None:
        teacher = request.getfixturevalue(recipe.teacher.split("_")[0])
    width = {} if recipe.width is None else {"width": WIDTHS[recipe.width]}
    options = SMALL | width | (LONGER if "swin" in name else {})
    result = train(STUDENTS[recipe.model], teacher, jpegs, recipe=recipe, **options)
    first, last = result.history[0], result.history[-1]
    assert {key for key in last if key in {"loss", "ce", "soft_kd", "feature"}} == terms(recipe)
    assert all(last[term] < first[term] for term in terms(recipe)), (first, last)
    assert result.images == 16 * CLASSES
    assert result.top1 > 100 / CLASSES + 15
