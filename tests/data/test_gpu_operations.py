"""The device's pixel operations give what timm's give by Pillow."""

import functools

import pytest
import torch
from PIL import Image

from fastkd.data.gpu_operations import erase, normals
from tests.harness.pictures import PICTURES, by_device, by_timm, photograph, stages

POINTWISE = [
    *("AutoContrast", "Equalize", "Invert", "Posterize", "PosterizeIncreasing"),
    *("PosterizeOriginal", "Solarize", "SolarizeIncreasing", "SolarizeAdd"),
    *("Color", "ColorIncreasing", "Contrast", "ContrastIncreasing", "Brightness"),
    *("BrightnessIncreasing", "Sharpness", "SharpnessIncreasing", "Desaturate"),
]
AFFINE = [
    *("Rotate", "ShearX", "ShearY", "TranslateX", "TranslateY", "TranslateXRel", "TranslateYRel")
]
FILTERS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
# Pixels of an affine operation that may differ at all: float32 beside Pillow's double, where a
# value is nearly a whole level. Linear interpolation by a fraction such as 0.4 gives many of these.
ROUNDED_OTHERWISE = {"bilinear": 0.05, "bicubic": 0.005}


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """Pictures are so small that threads would mostly wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("picture", PICTURES)
@pytest.mark.parametrize("name", POINTWISE)
def test_pointwise_operations_are_pillows_to_the_bit(name, picture):
    image = PICTURES[picture]()
    # At less than 3 and at 10 some of the posterize operations keep no bit, which Pillow refuses.
    for magnitude in (3, 5, 7.3, 9.7):
        for seed in range(2):  # factors go either way
            expected = by_timm(stages(name, magnitude), image, seed)
            assert torch.equal(by_device(stages(name, magnitude), image, seed), expected)


@pytest.mark.parametrize("interpolation", FILTERS)
@pytest.mark.parametrize("name", AFFINE)
def test_affine_operations_are_pillows_to_a_level(name, interpolation):
    image = photograph()
    for magnitude in (0, 1, 4.7, 9, 10):
        for seed in range(2):
            make = functools.partial(stages, name, magnitude, FILTERS[interpolation])
            expected = by_timm(make(), image, seed)
            difference = (by_device(make(), image, seed) - expected).abs()
            assert difference.max() <= 1
            assert (difference > 0).float().mean() <= ROUNDED_OTHERWISE[interpolation]


def test_affine_operations_leave_one_color_as_it_is():
    image = PICTURES["one color"]()
    expected = by_timm(stages("Rotate", 7), image, 0)
    assert torch.equal(by_device(stages("Rotate", 7), image, 0), expected)


def test_affine_filters_are_drawn_where_timm_draws_them():
    image = photograph()
    make = functools.partial(stages, "ShearX", 8, list(FILTERS.values()))
    for seed in range(6):
        assert (by_device(make(), image, seed) - by_timm(make(), image, seed)).abs().max() <= 1


def test_noise_is_standard_normal():
    noise = normals(torch.arange(20), 3 * 101 * 7).double()
    assert noise.shape == (20, 2121)
    assert abs(noise.mean()) < 0.02
    assert abs(noise.var() - 1) < 0.03
    assert abs((noise**4).mean() - 3) < 0.2
    assert abs((noise.abs() > 1.959964).double().mean() - 0.05) < 0.005
    assert noise.isfinite().all()


def test_noise_of_different_seeds_and_places_is_uncorrelated():
    noise = normals(torch.tensor([0, 1, 2, 2**32 - 1]), 40001)
    correlation = torch.corrcoef(torch.cat([noise, noise.roll(1, dims=1)]))
    assert (correlation - torch.eye(8)).abs().max() < 0.03


def test_noise_depends_on_the_seed_alone():
    assert torch.equal(normals(torch.tensor([5, 9]), 10)[1:], normals(torch.tensor([9]), 10))


def test_erasing_fills_the_box_and_nothing_else():
    images = torch.full((2, 3, 9, 8), 7.0)
    boxes = torch.tensor([[2, 1, 3, 4], [0, 0, 9, 8]])
    done = erase(images, boxes, torch.tensor([3, 4]))
    outside = done == 7
    assert not outside[0, :, 2:5, 1:5].any()
    assert outside[0].sum() == 3 * (9 * 8 - 3 * 4)
    assert not outside[1].any()
