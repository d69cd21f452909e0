"""The cost of a run, told from shapes alone, against counts that are published or measured."""

import copy

import pytest
import timm
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

import fastkd
from fastkd.config import Recipe
from fastkd.data.transforms import InputSpec
from fastkd.models import create_student, create_teacher
from fastkd.training.dry_run import Memory, cost_lines, estimate, sketch_teacher
from fastkd.training.task import build_task
from tests.harness.tiny import lift, vit

IMAGENET = InputSpec((3, 224, 224), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
SMALL = InputSpec((1, 8, 8), None, None)
BATCH = 32

LIFT = Recipe(
    variant="lift", teacher="module:VisionTransformer", projector="lift", alpha=0.5, amp="none"
)


def held_after(work):
    """What a function's result keeps allocated, by the profiler's own record; and the result."""
    work()  # warms up
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        result = work()
    events = [e for e in record.profiler.kineto_results.events() if e.name() == "[memory]"]
    return sum(event.nbytes() for event in events), result


def most_held(work):
    """The most that a function allocates at a time, by the profiler's own record."""
    work()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        work()
    events = [e for e in record.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


@pytest.fixture(scope="module")
def paper():
    recipe = Recipe.load("lift_softkd_spectral")
    student = create_student(recipe.model, recipe.variant, width=recipe.width)
    return estimate(student, sketch_teacher(recipe, IMAGENET), recipe, IMAGENET, 512)


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


@pytest.mark.parametrize("amp", ["none", "bf16"])
def test_activations_are_what_a_forward_pass_keeps_allocated(amp):
    recipe = LIFT.override(amp=amp)
    student, teacher = lift(depth=4), create_teacher(vit(dim=24))
    cost = estimate(student, teacher, recipe, SMALL, BATCH)
    task = build_task(student, teacher, recipe, torch.zeros(1, *SMALL.size)).train()
    images, labels = torch.randn(BATCH, *SMALL.size), torch.zeros(BATCH, dtype=torch.long)

    def forward():
        with torch.autocast("cpu", torch.bfloat16, enabled=amp != "none"):
            return task(images, labels, teacher(images))["loss"]

    held, _ = held_after(forward)
    assert cost.memory.activations == pytest.approx(held, rel=0.05)


def test_the_teachers_activations_are_the_most_that_its_forward_pass_holds():
    student, teacher = lift(), create_teacher(vit(dim=24, depth=4))
    cost = estimate(student, teacher, LIFT, SMALL, BATCH)
    build_task(student, teacher, LIFT, torch.zeros(1, *SMALL.size))
    images = torch.randn(BATCH, *SMALL.size)
    measured = most_held(lambda: teacher(images))
    assert cost.memory.teacher_activations == pytest.approx(measured, rel=0.1)


class Attending(nn.Module):
    """Softmax over what a Linear gives, as attention has it."""

    def __init__(self):
        super().__init__()
        self.num_classes = 6
        self.keys = nn.Linear(8, 512)
        self.head = nn.Linear(512, 6)

    def forward(self, images):
        return self.head(self.keys(images).softmax(dim=-1).mean(dim=(1, 2)))


def test_under_autocast_softmax_is_in_float32_as_on_a_gpu():
    recipe = LIFT.override(variant="plain", projector="none", feature_weight=0.0, amp="bf16")
    teacher = create_teacher(Attending())
    memory = estimate(vit(), teacher, recipe, SMALL, BATCH).memory
    rows = BATCH * 8 * 512
    # keys in bf16, their copy in float32, and the softmax in float32 are there together
    assert memory.teacher_activations == pytest.approx((2 + 4 + 4) * rows, rel=0.05)


def test_several_processes_hold_their_gradients_twice():
    alone, among = (
        estimate(vit(), None, Recipe(amp="none"), SMALL, BATCH, size).memory for size in (1, 2)
    )
    assert (alone.buckets, among.buckets) == (0, among.gradients)
    assert among.total - alone.total == among.gradients


def test_weights_gradients_moments_and_ema_are_multiples_of_the_parameters():
    student, teacher = vit(), create_teacher(vit(dim=24))
    recipe = LIFT.override(variant="plain", projector="linear")
    cost = estimate(student, teacher, recipe, SMALL, BATCH)
    trained = cost.student_parameters + cost.dropped_parameters
    assert cost.dropped_parameters == 16 * 24 + 24  # the Linear between the widths
    assert cost.memory.weights == cost.memory.gradients == 4 * trained
    assert cost.memory.optimizer == 8 * trained
    assert cost.memory.ema == 4 * cost.student_parameters
    assert cost.memory.teacher_weights == 4 * cost.teacher_parameters


def test_a_run_without_ema_and_teacher_pays_for_neither():
    recipe = Recipe(amp="none", ema_decay=None)
    memory = estimate(vit(), None, recipe, SMALL, BATCH).memory
    assert memory.ema == memory.teacher_weights == memory.teacher_activations == 0


def test_the_batch_holds_values_labels_and_the_bytes_that_a_device_augments():
    student = vit()
    host = estimate(student, None, Recipe(amp="none"), SMALL, BATCH).memory.batch
    device = estimate(student, None, Recipe(amp="none", augment="gpu"), SMALL, BATCH).memory.batch
    assert host == BATCH * (4 * 64 + 8)
    assert device == host + BATCH * 64


def test_of_both_kinds_of_activations_the_larger_counts():
    memory = Memory(1, 2, 3, 4, 5, 6, 7, teacher_activations=100, activations=1000)
    assert memory.total == 1028


def test_the_models_are_left_as_they_were():
    student, teacher = lift(), create_teacher(vit(dim=24))
    before = copy.deepcopy(student.state_dict())
    estimate(student, teacher, LIFT, SMALL, BATCH)
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())
    assert all(parameter.device.type == "cpu" for parameter in student.parameters())
    assert teacher.indices == []  # it taps nothing yet


def test_mixed_targets_are_counted_with():
    recipe = Recipe(amp="none", mixup=0.8, num_classes=6)
    mixed = estimate(vit(), None, recipe, SMALL, BATCH).memory.activations
    hard = estimate(vit(), None, recipe.override(mixup=0.0), SMALL, BATCH).memory.activations
    # [B, 6] float32 in the place of [B] int64, and some scalars
    assert mixed - hard == pytest.approx(BATCH * (6 * 4 - 8), abs=64)


def test_a_cnn_keeps_at_least_the_input_and_output_of_its_batch_norms():
    student = timm.create_model("test_resnet", num_classes=6)
    spec = InputSpec((3, 32, 32), None, None)
    cost = estimate(student, None, Recipe(amp="none"), spec, 4)
    shapes = []
    for module in student.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.register_forward_hook(lambda module, given, made: shapes.append(made.numel()))
    student(torch.randn(4, *spec.size))
    assert 2 * 4 * sum(shapes) <= cost.memory.activations <= 2.5 * 4 * sum(shapes)


def test_lines_name_parameters_compute_and_memory_of_one_process():
    recipe = LIFT.override(batch_size=64)
    lines = cost_lines(recipe, lift(), create_teacher(vit(dim=24)), SMALL, world_size=2)
    assert list(lines) == ["parameters", "compute", "memory"]
    assert "at 32 images" in lines["memory"]


def test_small_sizes_are_said_in_smaller_units():
    lines = cost_lines(Recipe(amp="none", batch_size=4), vit(), None, SMALL)
    assert "0.00" not in lines["compute"] + lines["memory"]
    assert "MB a process" in lines["memory"] and "MFLOPs an image" in lines["compute"]


def test_lines_say_where_the_teacher_is_not_counted():
    lines = cost_lines(LIFT.override(batch_size=4, alpha=0, feature_weight=0), lift(), None, SMALL)
    assert lines["memory"].endswith("without the teacher")


def test_a_pass_that_depends_on_values_is_said_to():
    class Thresholded(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(64, 6)

        def forward(self, x):
            x = x.flatten(1)
            return self.head(x) if x.sum() > 0 else self.head(-x)

    lines = cost_lines(Recipe(amp="none", batch_size=4), Thresholded(), None, SMALL)
    assert "depends on values" in lines["compute"]


@pytest.mark.parametrize("teacher", [None, "module:VisionTransformer"])
def test_only_a_timm_name_can_be_sketched(teacher):
    assert sketch_teacher(Recipe(teacher=teacher), IMAGENET) is None


def test_a_sketched_teacher_has_no_storage():
    teacher = sketch_teacher(Recipe(teacher="cait_s24_224"), IMAGENET)
    assert all(tensor.is_meta for tensor in teacher.parameters())


def test_a_runs_student_is_read_as_the_teacher(tmp_path):
    made = {"model": "test_vit", "num_classes": 6, "img_size": 32, "amp": "none", "epochs": 1}
    data = [(torch.randn(3, 32, 32), index % 6) for index in range(8)]
    options = {"batch_size": 4, "warmup_epochs": 0, "lr_scaling": False, "augment": "none"}
    run = fastkd.train(
        None, None, (data, data), tmp_path / "run", device="cpu", quiet=True, workers=0,
        **made, **options,
    )  # fmt: skip
    teacher = sketch_teacher(Recipe(teacher=run.output), InputSpec((3, 32, 32), None, None))
    assert teacher is not None
    assert sum(p.numel() for p in teacher.parameters()) == run.parameters
