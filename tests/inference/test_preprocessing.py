"""Students as recipes ask for them, and what they take in, read off them."""

import pytest
import timm
import torch
from PIL import Image
from timm.layers import DropPath
from torch import nn

from fastkd.config import Recipe
from fastkd.data.open_data import open_data
from fastkd.inference.preprocessing import Shape, build_student, change_input_size, input_spec
from tests.harness.tiny import vit

IMAGES = [(Image.new("RGB", (40, 40)), 0)] * 2
GRAY = Recipe(mean=(0.5,), std=(0.2,))


@pytest.mark.parametrize(
    ("student", "channels"),
    [
        (vit(in_chans=1), 1),
        (vit(in_chans=3), 3),
        (timm.create_model("test_resnet", in_chans=1), 1),
        (timm.create_model("test_convnext", in_chans=4), 4),
        (nn.Conv2d(3, 3, 1), 3),
    ],
    ids=lambda value: type(value).__name__,
)
def test_channels_are_those_of_the_students_first_layer(student, channels):
    recipe = Recipe(mean=(0.5,) * channels, std=(0.2,) * channels)
    assert input_spec(student, recipe, open_data((IMAGES, IMAGES))).size[0] == channels


def test_a_student_of_any_size_gets_what_it_was_built_for():
    student = timm.create_model("test_vit", img_size=48)
    assert input_spec(student, Recipe(), open_data((IMAGES, IMAGES))).size == (3, 48, 48)


def test_a_student_of_a_fixed_size_is_changed_to_another():
    student = vit()
    change_input_size(student, (16, 8))
    assert student(torch.zeros(1, 1, 16, 8)).shape == (1, 6)


def test_statistics_of_another_number_of_channels_are_refused():
    with pytest.raises(ValueError, match="3 values for images of 1 channels: give mean and std"):
        input_spec(vit(in_chans=1), Recipe(), open_data((IMAGES, IMAGES)))
    assert input_spec(vit(in_chans=1), GRAY, open_data((IMAGES, IMAGES))).mean == (0.5,)


def drop_rates(model):
    return [part.drop_prob for part in model.modules() if isinstance(part, DropPath)]


@pytest.mark.parametrize("rate", [0.0, 0.2])
def test_stochastic_depth_is_what_the_recipe_says_and_not_the_models_default(rate):
    recipe = Recipe(model="swin_tiny_patch4_window7_224", drop_path=rate)
    student = build_student(recipe, Shape(10, 3, None))
    assert max(drop_rates(student), default=0.0) == pytest.approx(rate)


def test_a_model_without_stochastic_depth_is_built_and_a_rate_for_it_refused():
    recipe = Recipe(model="vgg11")
    assert build_student(recipe, Shape(10, 3, None)).num_classes == 10
    with pytest.raises(ValueError, match="drop_path: vgg11 has no stochastic depth"):
        build_student(recipe.override(drop_path=0.1), Shape(10, 3, None))
