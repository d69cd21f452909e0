"""The cost of a run, told from shapes alone, against counts that are published or measured."""

import copy

import pytest
import timm
import torch
from torch import nn

import fastkd
from fastkd import create_teacher
from fastkd.config import Recipe
from fastkd.data.transforms import InputSpec
from fastkd.models import create_student
from fastkd.training.dry_run import cost_lines, estimate, sketch_teacher
from tests.harness.tiny import lift, vit

IMAGENET = InputSpec((3, 224, 224), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
SMALL = InputSpec((1, 8, 8), None, None)
BATCH = 32

LIFT = Recipe(
    variant="lift", teacher="module:VisionTransformer", projector="lift", alpha=0.5, amp="none"
)


@pytest.fixture(scope="module")
def paper():
    recipe = Recipe.load("lift_softkd_spectral")
    student = create_student(recipe.model, recipe.variant, width=recipe.width)
    return estimate(
        student, sketch_teacher(recipe.teacher, recipe, IMAGENET), recipe, IMAGENET, 512
    )


def test_parameters_of_the_papers_models(paper):
    with torch.device("meta"):
        teacher = timm.create_model("cait_s24_224")
    assert paper.student_parameters == 5_983_528
    assert paper.dropped_parameters == 0
    assert paper.teacher_parameters == sum(p.numel() for p in teacher.parameters())


def test_flops_of_deit_tiny_are_the_published_ones():
    student = create_student("deit_tiny_patch16_224")
    cost = estimate(student, None, Recipe(amp="none"), IMAGENET, 2)
    assert cost.student_flops == pytest.approx(2 * 1.25e9, rel=0.01)


def test_flops_of_cait_s24_are_the_published_ones(paper):
    assert paper.teacher_flops == pytest.approx(2 * 9.4e9, rel=0.01)


def test_a_training_step_is_the_teachers_forward_and_three_of_the_students(paper):
    expected = paper.teacher_flops + 3 * paper.student_flops
    assert paper.step_flops == pytest.approx(expected, rel=0.02)


def test_the_models_are_left_as_they_were():
    student, teacher = lift(), create_teacher(vit(dim=24))
    before = copy.deepcopy(student.state_dict())
    estimate(student, teacher, LIFT, SMALL, BATCH)
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())
    assert all(parameter.device.type == "cpu" for parameter in student.parameters())
    assert teacher._taps.indices == []  # it taps nothing yet


def test_lines_name_parameters_and_compute():
    recipe = LIFT.override(batch_size=64)
    lines = cost_lines(recipe, lift(), create_teacher(vit(dim=24)), SMALL, world_size=2)
    assert list(lines) == ["parameters", "FLOPs per image"]


def test_small_sizes_are_not_rounded_to_nothing():
    lines = cost_lines(Recipe(amp="none", batch_size=4), vit(), None, SMALL)
    giga = float(lines["FLOPs per image"].split()[0])
    assert 0 < giga < 0.01


def test_lines_say_where_the_teacher_is_not_counted():
    lines = cost_lines(LIFT.override(batch_size=4, alpha=0, feature_weight=0), lift(), None, SMALL)
    assert "without the teacher" in lines["FLOPs per image"]


def test_a_pass_that_depends_on_values_is_said_to():
    class Thresholded(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(64, 6)

        def forward(self, x):
            x = x.flatten(1)
            return self.head(x) if x.sum() > 0 else self.head(-x)

    lines = cost_lines(Recipe(amp="none", batch_size=4), Thresholded(), None, SMALL)
    assert "depends on values" in lines["FLOPs per image"]


def test_a_sketched_teacher_has_no_storage():
    teacher = sketch_teacher("cait_s24_224", Recipe(), IMAGENET)
    assert all(tensor.is_meta for tensor in teacher.parameters())


def test_a_runs_student_is_read_as_the_teacher(tmp_path):
    made = {"model": "test_vit", "num_classes": 6, "img_size": 32, "amp": "none", "epochs": 1}
    data = [(torch.randn(3, 32, 32), index % 6) for index in range(8)]
    options = {"batch_size": 4, "warmup_epochs": 0, "lr_scaling": False, "augment": "none"}
    run = fastkd.train(
        None, None, (data, data), tmp_path / "run", device="cpu", quiet=True, workers=0,
        **made, **options,
    )  # fmt: skip
    teacher = sketch_teacher(run.output, Recipe(), InputSpec((3, 32, 32), None, None))
    assert teacher is not None
    assert sum(p.numel() for p in teacher.parameters()) == run.parameters
