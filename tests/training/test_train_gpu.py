"""The trainer where only a real GPU can answer: compiled bf16 updates, and no waiting for them.

The same engine runs on a CPU in test_engine.py; the recipe's fields are tested in test_train.py.
"""

from __future__ import annotations

import itertools

import pytest
import torch

import fastkd
from fastkd import create_teacher
from fastkd.config import Recipe
from fastkd.data.loader import train_loader
from fastkd.data.open_data import open_data
from fastkd.inference.preprocessing import input_spec
from fastkd.models import create_student
from fastkd.training.build import BuiltStudent, build_engine
from fastkd.utils.distributed import World
from tests.harness.tiny import image_folder

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

RECIPE = Recipe(
    model="test_vit",
    variant="lift",
    width=64,
    img_size=32,
    num_classes=3,
    projector="lift",
    feature_loss="spectral",
    alpha=0.5,
    augment="gpu",
    repeated_aug=3,
    channels_last=True,
    batch_size=12,
    epochs=2,
    warmup_epochs=0,
    lr=1e-3,
    lr_scaling=False,
    ema_decay=0.9,
    workers=0,
    amp="bf16",
    compile="default",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return image_folder(tmp_path_factory.mktemp("images"))


def teacher():
    torch.manual_seed(1)
    return create_teacher("test_vit2", pretrained=False, num_classes=3, img_size=32)


def losses(folder, device, **overrides):
    """The loss of every epoch."""
    result = fastkd.train(
        None, teacher(), folder, None, RECIPE, device=device, quiet=True, **overrides
    )
    return [record["loss"] for record in result.history]


@pytest.fixture(scope="module")
def exact(folder):
    """On the CPU in float32; the device's augmentations are planned by the same numbers there."""
    return losses(folder, "cpu", amp="none", compile="none")


@pytest.mark.parametrize("mode", ["none", "default", "reduce-overhead"])
def test_a_run_in_bf16_gives_the_losses_of_the_cpu(folder, exact, mode):
    torch._dynamo.reset()
    assert losses(folder, "cuda", compile=mode) == pytest.approx(exact, rel=2e-2)


def test_a_run_in_float32_gives_the_losses_of_the_cpu(folder, exact):
    found = losses(folder, "cuda", amp="none", compile="none")
    assert found == pytest.approx(exact, rel=2e-3)


@pytest.mark.parametrize("opt", ["nesterov", "adagrad", "lamb"])
def test_a_run_with_another_optimizer_gives_the_losses_of_the_cpu(folder, opt):
    options = {"amp": "none", "compile": "none", "opt": opt}
    on_cpu = losses(folder, "cpu", **options)
    assert losses(folder, "cuda", **options) == pytest.approx(on_cpu, rel=2e-3)


WITHOUT_WAITING = [
    *({"amp": amp, "compile": mode} for amp in ("bf16", "fp16") for mode in ("none", "default")),
    {"compile": "reduce-overhead"},
    {"accumulation": 2},
    {"opt": "nesterov", "compile": "none"},
    {"accumulation": 2, "compile": "none", "amp": "fp16"},
    {"mixup": 0.8, "cutmix": 1.0, "compile": "none"},
    {"clip_grad": 1.0},
    {"clip_grad": 1.0, "compile": "none", "amp": "fp16"},
]


@pytest.mark.parametrize("fields", WITHOUT_WAITING, ids=str)
def test_updates_do_not_wait_for_the_device(folder, fields):
    torch._dynamo.reset()
    recipe = RECIPE.override(**fields)
    device = torch.device("cuda", torch.cuda.current_device())
    data = open_data(folder)
    student = create_student(
        recipe.model, recipe.variant, width=recipe.width, num_classes=3, img_size=recipe.img_size
    ).to(device)
    spec = input_spec(student, recipe, data)
    loader = train_loader(data, recipe, spec, World(device))
    built = BuiltStudent(student, spec, 3, None)
    engine = build_engine(built, teacher(), recipe, World(device), updates=2)
    engine.task.train()
    epochs = itertools.chain.from_iterable(iter(loader) for _ in itertools.count())
    updates = [list(itertools.islice(epochs, recipe.accumulation)) for _ in range(6)]
    for slices in updates[:3]:  # compiles, and tries kernels, which waits
        engine.update(slices)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for slices in updates[3:]:
            engine.update(slices)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    reading = engine.read()
    assert reading.applied + reading.skipped == len(updates)  # fp16's scaler may skip the first
    assert reading.applied > 0 and reading.sums["loss"] > 0
