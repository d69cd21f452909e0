"""Transforms of images: timm's policies, Mixup, and images that cannot be resized."""

import random

import numpy as np
import pytest
import torch
from PIL import Image

from fastkd.config import DataConfig, Recipe
from fastkd.data.batches import eval_sample_transform
from fastkd.data.loader import eval_loader, train_loader
from fastkd.data.open_data import open_data
from fastkd.data.transforms import InputSpec, create_mixup, operations_of, train_transform

SPEC = InputSpec((3, 32, 32), (0.5, 0.5, 0.5), (0.2, 0.2, 0.2))


@pytest.mark.parametrize("policy", ["rand-m9-mstd0.5-inc1", "rand-m10-inc1", "augmix-m9", "v0"])
def test_posterize_never_asks_for_zero_bits(policy):
    recipe = Recipe(auto_augment=policy, reprob=0.0)
    transform = train_transform(recipe, SPEC)
    found = [op for op in operations_of(transform) if op.name.startswith("Posterize")]
    image = Image.new("RGB", (8, 8), (200, 100, 50))
    assert found
    for operation in found:
        assert operation.aug_fn(image, 0).getpixel((0, 0)) == (128, 0, 0)


def test_the_strongest_randaugment_survives_many_images():
    transform = train_transform(Recipe(auto_augment="rand-m10-n4-mstd0.5-inc1"), SPEC)
    image = Image.effect_noise((40, 40), 80).convert("RGB")
    random.seed(0), np.random.seed(0)
    assert all(transform(image).shape == (3, 32, 32) for _ in range(150))


def test_mixup_makes_soft_targets_that_sum_to_one():
    mixup = create_mixup(DataConfig(mixup=0.8, cutmix=1.0), 5, 0.1)
    _, target = mixup(torch.randn(4, 3, 8, 8), torch.tensor([0, 1, 2, 3]))
    torch.testing.assert_close(target.sum(1), torch.ones(4))


@pytest.mark.parametrize(
    ("size", "options", "reason"),
    [
        ((400_000, 1), {}, "400,000 x 1 pixels"),
        ((1, 400_000), {}, "1 x 400,000 pixels"),
        ((2, 120_000), {"crop_mode": "center"}, "at most 67,108,864"),
        ((1, 400_000), {"crop_mode": "border"}, "resized 0 x 36"),
        ((1, 400_000), {"crop_mode": "squash"}, None),
        ((40, 400), {}, None),
        ((400, 40), {"crop_mode": "border"}, None),
    ],
)
@pytest.mark.parametrize("augment", ["none", "cpu", "gpu"])
def test_an_image_too_thin_to_be_resized_is_unreadable(size, options, reason, augment):
    spec = InputSpec((3, 32, 32), (0.5,) * 3, (0.2,) * 3)
    data = [(Image.new("L", size if number == 2 else (40, 40)), number) for number in range(4)]
    recipe = Recipe(batch_size=4, workers=0, seed=3).override(augment=augment, **options)
    pair = open_data((data, data))
    for loader in (train_loader(pair, recipe, spec), eval_loader(pair, recipe, spec)):
        (batch,) = loader
        evaluates = loader.batch_size is not None or augment == "none"
        assert len(batch.faults) == (reason is not None and evaluates)
        assert all(fault.sample == 2 and reason in fault.reason for fault in batch.faults)


@pytest.mark.parametrize(
    ("size", "reason"),
    [((40, 4000), None), ((4, 60_000), "resized 73 x 1,095,000"), ((60_000, 4), None)],
)
def test_a_thin_image_is_judged_by_the_rectangle_that_it_covers(size, reason):
    spec = InputSpec((1, 32, 64), (0.5,), (0.2,))
    transform = eval_sample_transform(DataConfig(), spec, None)
    image = Image.new("L", size)
    if reason is None:
        assert transform(transform.decode(image)).image.shape == (1, 32, 64)
    else:
        with pytest.raises(OSError, match=reason):
            transform.decode(image)
