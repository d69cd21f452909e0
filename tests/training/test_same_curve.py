"""One process and two with the same global batch: the same images, the same curve."""

import json

import pytest

from fastkd.training import train
from tests.harness.tiny import FAST, image_folder, vit
from tests.harness.torchrun import run_ranks

# The recipes' augmentation, at a size at which a curve takes a second.
OPTIONS = FAST | {
    "img_size": 16,
    "batch_size": 12,
    "augment": "cpu",
    "repeated_aug": 3,
    "alpha": 0.9,
    "feature_loss": "spectral",
    "projector": "linear",
    "log_interval": 1,
    "mean": (0.5, 0.5, 0.5),
    "std": (0.5, 0.5, 0.5),
}
VARIANTS = {
    "cpu": {"augment": "cpu"},
    "gpu": {"augment": "gpu"},
    "nesterov": {"opt": "nesterov"},
    "lamb": {"opt": "lamb"},
}


def distil(data, output, variant):
    models = {"in_chans": 3, "img_size": 16, "num_classes": 3}
    student, teacher = vit(**models), vit(24, seed=1, **models)
    train(student, teacher, data, output, **OPTIONS | VARIANTS[variant])


def distil_on_one_rank(rank, data, output):
    for variant in VARIANTS:
        distil(data, output / variant, variant)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("curves")
    data = image_folder(root / "images", train=12, val=3)
    run_ranks(distil_on_one_rank, data, root / "two")
    for variant in VARIANTS:
        distil(data, root / "one" / variant, variant)
    return root


def curve(folder):
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == "interval"]


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_two_processes_follow_the_curve_of_one(folders, variant):
    one, two = (curve(folders / name / variant) for name in ("one", "two"))
    assert len(one) == 6
    for ours, theirs in zip(one, two, strict=True):
        for name in ("loss", "ce", "soft_kd", "feature", "grad_norm"):
            assert theirs[name] == pytest.approx(ours[name], rel=1e-4), (ours["update"], name)
