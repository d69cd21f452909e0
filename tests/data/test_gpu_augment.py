"""augment="gpu": the same draws as timm's transform, and images that depend on them alone."""

from collections import Counter

import numpy as np
import pytest
import torch
from timm.data.auto_augment import rand_augment_transform

from fastkd.config import Recipe
from fastkd.data.datasets import DataPair
from fastkd.data.gpu_augment import device_augment, plan_transform
from fastkd.data.gpu_operations import Operation
from fastkd.data.loader import train_loader
from fastkd.data.transforms import InputSpec, train_transform
from fastkd.utils.distributed import World
from fastkd.utils.random import seed_cpu
from tests.harness.pictures import photograph

CPU = torch.device("cpu")
SPEC = InputSpec((3, 40, 40), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
RECIPE = Recipe(augment="gpu", workers=0, batch_size=8, seed=3)
POLICIES = [
    "rand-m9-mstd0.5-inc1",
    "rand-m10-n4-mstd101-inc1-p0.8",  # as strong as they come, the magnitude uniform
    "rand-m15-mmax20-mstd1",
    "rand-m9-tweights",
    "original-mstd0.5",
    None,  # color jitter
]


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """Pictures are so small that threads would mostly wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Photographs(torch.utils.data.Dataset):
    def __len__(self):
        return 24

    def __getitem__(self, index):
        return photograph(index), index


def planned(recipe, seeds, image=None):
    plan, image = plan_transform(recipe, SPEC), image or photograph()
    samples = []
    for seed in seeds:
        seed_cpu(seed)
        samples.append(plan(image))
    names = samples[0].plan
    plans = {name: torch.stack([sample.plan[name] for sample in samples]) for name in names}
    return torch.stack([sample.image for sample in samples]), plans


def augmented(recipe, images, plan):
    return device_augment(recipe, SPEC)(images, plan)


def levels(images):
    """Gray levels before normalization."""
    mean, std = (torch.tensor(part).view(-1, 1, 1) for part in (SPEC.mean, SPEC.std))
    return (images * std + mean) * 255


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("interpolation", ["bicubic", "random"])
def test_an_image_is_what_timm_makes_of_it_under_the_same_seed(policy, interpolation):
    recipe = RECIPE.override(auto_augment=policy, reprob=0.0, interpolation=interpolation)
    transform = train_transform(recipe.override(augment="cpu"), SPEC)
    done = augmented(recipe, *planned(recipe, range(16)))
    for seed, image in enumerate(done):
        seed_cpu(seed)
        difference = (levels(image) - levels(transform(photograph()))).abs()
        # A pixel that an affine operation rounded otherwise may cross a threshold afterwards.
        assert (difference > 1.01).float().mean() <= 2e-3
        assert difference.mean() < 0.05


def test_erased_boxes_are_timms():
    recipe = RECIPE.override(auto_augment=None, color_jitter=0.0, reprob=0.6)
    transform = train_transform(recipe.override(augment="cpu"), SPEC)
    untouched = augmented(recipe, *planned(recipe.override(reprob=0.0), range(24)))
    done = augmented(recipe, *planned(recipe, range(24)))
    erased = (done != untouched).all(1)
    for seed in range(24):
        seed_cpu(seed)
        theirs = (transform(photograph()) != untouched[seed]).all(0)
        assert torch.equal(erased[seed], theirs)
    assert 6 < erased.flatten(1).any(1).sum() < 22


def test_erasing_is_as_frequent_as_asked():
    _, plan = planned(RECIPE.override(reprob=0.25), range(800))
    assert abs((plan["erase"][:, 2] > 0).double().mean() - 0.25) < 0.05


@pytest.mark.parametrize("probability", [0.0, 0.3, 1.0])
def test_flips_are_as_frequent_as_asked(probability):
    _, plan = planned(RECIPE.override(hflip=probability), range(600))
    assert abs(plan["flip"].double().mean() - probability) < 0.06 * (0 < probability < 1) + 1e-9


def test_a_flip_mirrors_the_image():
    recipe = RECIPE.override(auto_augment=None, color_jitter=0.0, reprob=0.0)
    images, plan = planned(recipe, [0])
    plain, mirrored = (
        augmented(recipe, images, {**plan, "flip": torch.tensor([flip])}) for flip in (False, True)
    )
    assert torch.equal(mirrored, plain.flip(3))
    torch.testing.assert_close(levels(plain), images.float(), rtol=0, atol=1e-3)


def test_operations_are_drawn_as_often_as_by_timm():
    draws = 3000
    policy = rand_augment_transform(RECIPE.auto_augment, {"img_mean": (1, 2, 3)})
    theirs = Counter()
    for operation in policy.ops:
        operation.aug_fn = lambda seen, *_, name=operation.name, **__: [*seen, name]
    np.random.seed(0)
    for _ in range(draws):
        theirs.update(policy([]))
    _, plan = planned(RECIPE, range(draws))
    ours = Counter(plan["operations"].flatten().tolist())
    affine = sum(theirs[n] for n in theirs if n.startswith(("Rotate", "Shear", "Translate")))
    for operation, count in (
        (Operation.AFFINE_BICUBIC, affine),
        (Operation.EQUALIZE, theirs["Equalize"]),
        (Operation.SHARPNESS, theirs["SharpnessIncreasing"]),
        (Operation.POSTERIZE, theirs["PosterizeIncreasing"]),
    ):
        assert abs(ours[operation] - count) < 5 * count**0.5
    assert ours[Operation.AFFINE_BILINEAR] == 0


def test_posterizing_keeps_a_bit_at_least():
    recipe = RECIPE.override(auto_augment="rand-m10-mstd0.5-inc1-p1.0")
    _, plan = planned(recipe, range(300))
    bits = plan["arguments"][plan["operations"] == Operation.POSTERIZE][:, 0]
    assert len(bits)
    assert bits.min() == 1


def test_uint8_goes_in_and_normalized_float32_comes_out():
    images, plan = planned(RECIPE, range(4))
    assert (images.dtype, images.shape) == (torch.uint8, (4, 3, 40, 40))
    done = augmented(RECIPE, images, plan)
    assert (done.dtype, done.shape) == (torch.float32, images.shape)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_arguments_are_float32_whatever_the_default_dtype(dtype):
    _, expected = planned(RECIPE, range(16))
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        _, plan = planned(RECIPE, range(16))
    finally:
        torch.set_default_dtype(default)
    assert plan["arguments"].dtype == torch.float32
    assert torch.equal(plan["arguments"], expected["arguments"])


def test_a_result_does_not_depend_on_the_rest_of_the_batch():
    images, plan = planned(RECIPE.override(reprob=0.5), range(24))
    whole = augmented(RECIPE, images, plan)
    for chosen in ([3], [20, 7, 11]):
        part = augmented(RECIPE, images[chosen], {k: v[chosen] for k, v in plan.items()})
        assert torch.equal(part, whole[chosen])


def test_images_and_plan_are_left_as_they_were():
    images, plan = planned(RECIPE, range(16))
    before = images.clone(), {name: part.clone() for name, part in plan.items()}
    augmented(RECIPE, images, plan)
    assert torch.equal(images, before[0])
    assert all(torch.equal(plan[name], part) for name, part in before[1].items())


def test_the_device_draws_nothing():
    images, plan = planned(RECIPE.override(reprob=1.0), range(4))
    state = torch.get_rng_state()
    first = augmented(RECIPE, images, plan)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(augmented(RECIPE, images, plan), first)


def loaded(recipe, position=0, rank=0, world_size=1):
    data = DataPair(Photographs(), Photographs(), None, False, None)
    loader = train_loader(data, recipe, SPEC, World(CPU, rank, world_size))
    loader.batch_sampler.set_position(0, position)
    return [(batch, augmented(recipe, batch.images, batch.plan)) for batch in loader]


def test_batches_do_not_depend_on_workers():
    alone, shared = loaded(RECIPE), loaded(RECIPE.override(workers=2))
    assert len(alone) == 3
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(alone, shared, strict=True))


def test_batches_continue_identically_in_mid_epoch():
    recipe = RECIPE.override(repeated_aug=3)
    whole, rest = loaded(recipe), loaded(recipe, position=1)
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(whole[1:], rest, strict=True))


def test_two_ranks_see_the_images_of_one():
    recipe = RECIPE.override(repeated_aug=2)
    whole = loaded(recipe)
    ranks = [loaded(recipe, rank=rank, world_size=2) for rank in range(2)]
    for number, (_, images) in enumerate(whole):
        assert torch.equal(torch.cat([rank[number][1] for rank in ranks]), images)


def test_copies_of_an_image_are_augmented_differently():
    batch, images = loaded(RECIPE.override(repeated_aug=2))[0]
    assert batch.samples[0] == batch.samples[1]
    assert not torch.equal(images[0], images[1])


@pytest.mark.parametrize(
    ("policy", "named"), [("augmix-m5", "AugMixAugment"), ("rand-m9-t3a", "GaussianBlur")]
)
def test_what_the_device_does_not_do_is_refused_by_name(policy, named):
    with pytest.raises(ValueError, match=rf"augment: 'gpu' does not do {named}.*augment='cpu'"):
        device_augment(RECIPE.override(auto_augment=policy), SPEC)


def test_other_channels_than_three_are_refused():
    with pytest.raises(ValueError, match="3 channels, got 1"):
        plan_transform(RECIPE.override(auto_augment=None), InputSpec((1, 8, 8), (0.5,), (0.5,)))


def test_float_images_are_refused():
    images, plan = planned(RECIPE, range(2))
    with pytest.raises(ValueError, match=r"images must be uint8, got torch.float32"):
        augmented(RECIPE, images.float(), plan)


def test_a_plan_that_left_the_host_is_refused():
    images, plan = planned(RECIPE, range(2))
    with pytest.raises(ValueError, match=r"plan must be on the host, got meta"):
        augmented(RECIPE, images, {name: part.to("meta") for name, part in plan.items()})


@pytest.mark.parametrize("augment", ["cpu", "none", "dataset"])
def test_the_device_has_nothing_to_do_elsewhere(augment):
    assert device_augment(RECIPE.override(augment=augment), SPEC) is None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_gives_what_the_host_gives_without_waiting():
    images, plan = planned(RECIPE.override(reprob=0.5), range(64))
    augment = device_augment(RECIPE, SPEC).cuda()
    moved = images.cuda()
    augment(moved, plan)
    torch.cuda.set_sync_debug_mode("error")
    try:
        done = augment(moved, plan)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    difference = (levels(done.cpu()) - levels(augmented(RECIPE, images, plan))).abs()
    assert (difference > 1.01).float().mean() < 1e-3
