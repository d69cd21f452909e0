"""Data: opening it, and batches that depend on nothing but the recipe and the position."""

import random

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import IterableDataset, TensorDataset

from fastkd.training.augment import (
    InputSpec,
    _operations,
    create_mixup,
    eval_transform,
    train_transform,
)
from fastkd.training.data import eval_loader, slice_size, train_loader
from fastkd.training.datasets import open_data
from fastkd.training.recipe import Recipe
from tests.training.tiny import image_folder, tensor_data

CPU = torch.device("cpu")
SPEC = InputSpec((3, 32, 32), (0.5, 0.5, 0.5), (0.2, 0.2, 0.2))
RANDAUGMENT = Recipe(batch_size=4, workers=0, seed=3)


def batches(data, recipe, position=(0, 0), spec=SPEC):
    loader = train_loader(open_data(data), recipe, spec, CPU)
    loader.batch_sampler.set_position(*position)
    return [(images.clone(), labels) for images, labels in loader]


def same(left, right):
    assert len(left) == len(right)
    return all(
        torch.equal(a, b) and torch.equal(la, lb)
        for (a, la), (b, lb) in zip(left, right, strict=True)
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return image_folder(tmp_path_factory.mktemp("images"))


def test_augmented_batches_are_the_same_for_any_number_of_workers(folder):
    assert same(batches(folder, RANDAUGMENT), batches(folder, RANDAUGMENT.override(workers=2)))


def test_augmented_batches_continue_identically_in_mid_epoch(folder):
    assert same(batches(folder, RANDAUGMENT, (1, 4)), batches(folder, RANDAUGMENT, (1, 0))[4:])


def test_loading_leaves_the_global_generators_alone(folder):
    torch.manual_seed(5), np.random.seed(5), random.seed(5)
    expected = torch.rand(1).item(), np.random.rand(), random.random()
    torch.manual_seed(5), np.random.seed(5), random.seed(5)
    batches(folder, RANDAUGMENT)
    assert (torch.rand(1).item(), np.random.rand(), random.random()) == expected


def test_copies_of_a_sample_are_augmented_differently(folder):
    recipe = RANDAUGMENT.override(repeated_aug=2)
    images, labels = batches(folder, recipe)[0]
    assert labels[0] == labels[1]
    assert not torch.equal(images[0], images[1])


def test_an_epoch_augments_anew(folder):
    first, second = (batches(folder, RANDAUGMENT, (epoch, 0)) for epoch in (0, 1))
    assert not same(first, second)


def test_augment_none_sees_training_images_as_evaluation_does(folder):
    recipe = Recipe(batch_size=36, workers=0, augment="none")
    images, labels = batches(folder, recipe)[0]
    loader = train_loader(open_data(folder), recipe, SPEC, CPU)
    (first,) = next(iter(loader.batch_sampler))[:1]
    opened = open_data(folder)
    image, label = opened.train[first.sample]
    torch.testing.assert_close(images[0], eval_transform(recipe, SPEC)(image))
    assert labels[0] == label


def test_tensors_pass_as_they_are():
    train, val = tensor_data(8, 4)
    recipe = Recipe(batch_size=8, workers=0, augment="none")
    images, labels = batches((train, val), recipe, spec=InputSpec((1, 8, 8), None, None))[0]
    order = labels.argsort(stable=True)
    assert sorted(images.flatten(1).sum(1).tolist()) == sorted(
        train.tensors[0].flatten(1).sum(1).tolist()
    )
    assert torch.equal(labels[order], train.tensors[1].sort(stable=True).values)


def test_tensors_are_normalised_where_statistics_are_given():
    data = tensor_data(8, 4)
    recipe = Recipe(batch_size=8, workers=0, augment="none")
    loader = eval_loader(open_data(data), recipe, InputSpec((1, 8, 8), (1.0,), (2.0,)), CPU)
    images, _ = next(iter(loader))
    torch.testing.assert_close(images, (data[1].tensors[0] - 1) / 2)


def test_a_data_sets_own_random_transform_is_seeded():
    class Noisy(TensorDataset):
        def __getitem__(self, index):
            image, label = super().__getitem__(index)
            return image + torch.randn_like(image), label

    data = tuple(Noisy(*part.tensors) for part in tensor_data(16, 4))
    recipe = Recipe(batch_size=4, workers=0, augment="dataset")
    spec = InputSpec((1, 8, 8), None, None)
    assert same(batches(data, recipe, spec=spec), batches(data, recipe, spec=spec))


def test_tensors_with_image_augmentation_are_refused_naming_the_way_out():
    recipe = Recipe(batch_size=8, workers=0)
    with pytest.raises(ValueError, match="set augment='none'"):
        train_loader(open_data(tensor_data()), recipe, SPEC, CPU)


@pytest.mark.parametrize("policy", ["rand-m9-mstd0.5-inc1", "rand-m10-inc1", "augmix-m9", "v0"])
def test_posterize_never_asks_for_zero_bits(policy):
    recipe = Recipe(auto_augment=policy, reprob=0.0)
    transform = train_transform(recipe, SPEC)
    found = [op for op in _operations(transform) if op.name.startswith("Posterize")]
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
    mixup = create_mixup(Recipe(mixup=0.8, cutmix=1.0), 5)
    _, target = mixup(torch.randn(4, 3, 8, 8), torch.tensor([0, 1, 2, 3]))
    torch.testing.assert_close(target.sum(1), torch.ones(4))


def test_mixup_refuses_odd_slices():
    with pytest.raises(ValueError, match="odd"):
        slice_size(Recipe(batch_size=6, accumulation=2, mixup=0.8), 1)


def test_a_batch_that_cannot_be_shared_out_is_refused():
    with pytest.raises(ValueError, match="10 images cannot be shared by 4 processes"):
        slice_size(Recipe(batch_size=10), 4)


def test_a_folder_tells_its_classes(folder):
    opened = open_data(folder)
    assert (opened.num_classes, len(opened.train), len(opened.val)) == (3, 36, 12)


def test_a_class_without_validation_images_shifts_no_label(tmp_path):
    folder = image_folder(tmp_path, train=2, val=2)
    for file in (folder / "val" / "blue").iterdir():
        file.unlink()
    (folder / "val" / "blue").rmdir()
    opened = open_data(folder)
    assert {label for _, label in (opened.val[i] for i in range(4))} == {1, 2}


def test_a_validation_class_that_training_lacks_is_refused(tmp_path):
    folder = image_folder(tmp_path, train=1, val=1)
    (folder / "val" / "violet").mkdir()
    with pytest.raises(ValueError, match="violet"):
        open_data(folder)


def test_a_folder_without_validation_says_what_is_missing(tmp_path):
    (tmp_path / "train").mkdir()
    with pytest.raises(ValueError, match=r"no folder val \(or validation\)"):
        open_data(tmp_path)


def test_a_missing_folder_is_refused():
    with pytest.raises(ValueError, match="no folder 'nowhere'"):
        open_data("nowhere")


def test_streaming_data_are_refused():
    class Stream(IterableDataset):
        def __iter__(self):
            return iter(())

    with pytest.raises(ValueError, match="streams its samples"):
        open_data((Stream(), Stream()))


@pytest.mark.parametrize("image", [torch.zeros(3, 8, 8, dtype=torch.uint8), "text"])
def test_samples_of_another_form_are_refused(image):
    with pytest.raises(ValueError, match="PIL images or float tensors"):
        open_data(([(image, 0)], [(image, 0)]))


@pytest.mark.parametrize("content", [b"", b"no image", "half"])
@pytest.mark.parametrize("split", ["train", "val"])
def test_an_unreadable_image_is_an_error_naming_its_file(tmp_path, split, content):
    broken = image_folder(tmp_path) / split / "green" / "1.jpg"
    whole = broken.read_bytes()
    broken.write_bytes(whole[: len(whole) // 2] if content == "half" else content)
    data = open_data(tmp_path)
    loader = (train_loader if split == "train" else eval_loader)(data, RANDAUGMENT, SPEC, CPU)
    with pytest.raises(OSError, match=rf"cannot read .*{split}/green/1\.jpg"):
        list(loader)


def test_gray_images_are_brought_to_the_students_channels():
    data = [(Image.new("L", (40, 40), 7), 0)] * 4
    images, _ = batches((data, data), RANDAUGMENT)[0]
    assert images.shape == (4, 3, 32, 32)
