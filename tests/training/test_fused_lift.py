"""A Lift student's task in one fused call, against the same from written lifted tokens."""

import copy

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from fastkd import create_teacher
from fastkd.config import Recipe
from fastkd.models import TapOutput
from fastkd.ops.feature_kd.reference import definition
from fastkd.training.task import build_task
from tests.harness.tiny import lift, vit
from tests.harness.torchrun import run_ranks

LOSSES = ["mse", "spectral", "smooth_l1", "cosine"]
IMAGES = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(3))
TARGET = torch.tensor([0, 1, 2, 3])
EXAMPLE = torch.zeros(1, 1, 8, 8)


def task_for(student, teacher=None, **options):
    """A task of soft KD and a feature term, and its teacher."""
    teacher = create_teacher(vit(24, seed=1) if teacher is None else teacher)
    recipe = Recipe(**{"alpha": 0.9, "projector": "lift", **options})
    return build_task(student, teacher, recipe, EXAMPLE), teacher


def unfused(task):
    twin = copy.deepcopy(task)
    twin.student.fused_lift = False
    return twin


@pytest.fixture
def lifted_maps(monkeypatch):
    """Whatever a Lift writes: none of it in a fused pass."""
    maps = []
    layer = nn.Linear.forward

    def recording(self, x):
        y = layer(self, x)
        if y.shape[1:] == (5, 24):  # class token and 2 x 2 patches
            maps.append(y)
        return y

    monkeypatch.setattr(nn.Linear, "forward", recording)
    return maps


def assert_same_step(ours, theirs, images=IMAGES, teacher_output=None, **tolerance):
    """Equal terms, logits and parameter gradients."""
    parts = [task(images, TARGET, teacher_output) for task in (ours, theirs)]
    assert parts[0].keys() == parts[1].keys()
    for name, expected in parts[1].items():
        torch.testing.assert_close(parts[0][name], expected, **tolerance)
    for one in parts:
        one["loss"].backward()
    gradients = {name: p.grad for name, p in theirs.named_parameters()}
    for name, parameter in ours.named_parameters():
        assert parameter.grad is not None, name
        torch.testing.assert_close(
            parameter.grad, gradients[name], **tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("loss", LOSSES)
def test_the_fused_step_equals_the_unfused_one(loss):
    task, teacher = task_for(lift(), feature_loss=loss)
    assert_same_step(task, unfused(task), teacher_output=teacher(IMAGES))


def test_the_fused_step_writes_no_lifted_tokens(lifted_maps):
    task, teacher = task_for(lift())
    output = teacher(IMAGES)
    lifted_maps.clear()  # the teacher's own layers are as wide
    task(IMAGES, TARGET, output)["loss"].backward()
    assert lifted_maps == []
    unfused(task)(IMAGES, TARGET, output)
    assert len(lifted_maps) == 1


@pytest.mark.parametrize("pool", ["max", "avgmax"])
def test_other_pools_take_the_lifted_tokens(pool, lifted_maps):
    student = lift()
    student.reset_classifier(6, pool)
    task, teacher = task_for(student)
    output = teacher(IMAGES)
    lifted_maps.clear()
    task(IMAGES, TARGET, output)["loss"].backward()
    assert len(lifted_maps) == 1
    assert [name for name, p in task.named_parameters() if p.grad is None] == []


def test_a_lift_that_someone_has_exchanged_is_called(lifted_maps):
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    task, teacher = task_for(lift())
    output = teacher(IMAGES)
    before = task(IMAGES, TARGET, output)["feature"]
    task.student.norm.proj.__class__ = Doubled
    task.student.norm.norm = nn.Identity()  # a LayerNorm would take the factor out again
    lifted_maps.clear()
    assert task(IMAGES, TARGET, output)["feature"] != before
    assert len(lifted_maps) == 1


def test_a_hook_on_the_lift_is_heard():
    task, teacher = task_for(lift())
    heard = []
    task.student.norm.register_forward_hook(lambda module, inputs, output: heard.append(output))
    parts = task(IMAGES, TARGET, teacher(IMAGES))
    torch.testing.assert_close(parts["output"], task.student.head(heard[0][:, 1:].mean(1)))


def test_bfloat16_autocast_differs_from_float32_no_more_than_unfused():
    task, teacher = task_for(lift(), feature_loss="spectral")
    output = teacher(IMAGES)
    exact = task(IMAGES, TARGET, output)
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = (one(IMAGES, TARGET, output) for one in (task, unfused(task)))
    for name in task.terms.names:
        assert ours[name].dtype == theirs[name].dtype
        error, allowed = ((one[name] - exact[name]).abs() for one in (ours, theirs))
        assert error <= 2 * allowed + 1e-3 * exact[name].abs(), name
    assert ours["output"].dtype == theirs["output"].dtype == torch.bfloat16


def test_a_teacher_of_another_grid_is_resampled_to_the_students():
    task, teacher = task_for(
        lift(), vit(24, seed=1, patch_size=2), feature_loss="spectral", resample="bilinear"
    )
    assert_same_step(task, unfused(task), teacher_output=teacher(IMAGES))


def test_other_grids_without_resample_are_refused():
    task, teacher = task_for(lift(), vit(24, seed=1, patch_size=2))
    with pytest.raises(ValueError, match=r"\(2, 2\) grid.*\(4, 4\) grid.*resample"):
        task(IMAGES, TARGET, teacher(IMAGES))


def test_the_grid_follows_images_that_are_not_square():
    student, teacher = lift(dynamic_img_size=True), vit(24, seed=1, dynamic_img_size=True)
    task, teacher = task_for(student, teacher, feature_loss="spectral")
    images = IMAGES.repeat(1, 1, 1, 3)  # a 2 x 6 grid: neither square nor one row
    assert_same_step(task, unfused(task), images, teacher(images))


def test_dropped_patches_are_refused():
    task, teacher = task_for(lift(patch_drop_rate=0.5))
    with pytest.raises(ValueError, match=r"drops patches in training \(patch_drop\)"):
        task(IMAGES, TARGET, teacher(IMAGES))


def test_dropout_in_the_head_and_checkpointing_go_with_the_fused_step():
    task, teacher = task_for(lift(drop_rate=0.3, attn_drop_rate=0.2, drop_path_rate=0.2))
    twin = unfused(task)
    task.student.set_grad_checkpointing()
    output = teacher(IMAGES)
    for one in (task, twin):
        torch.manual_seed(5)
        one(IMAGES, TARGET, output)["loss"].backward()
    for ours, theirs in zip(task.parameters(), twin.parameters()):
        torch.testing.assert_close(ours.grad, theirs.grad)


def test_a_task_on_labels_trains_the_same_without_lifted_tokens(lifted_maps):
    task = build_task(lift(), None, Recipe(), EXAMPLE)
    twin = unfused(task)
    task(IMAGES, TARGET)
    assert lifted_maps == []
    assert_same_step(task, twin)


def reference_losses(student, images, target, output: TapOutput):
    """Soft KD and SpectralKD of a Lift student, from timm's blocks and torch's functions alone."""
    x = student.patch_embed(images)
    x = student.blocks(student.norm_pre(student._pos_embed(x)))[:, 1:]
    norm = student.norm.norm
    lifted = F.layer_norm(
        F.linear(x, student.norm.proj.weight), (24,), norm.weight, norm.bias, norm.eps
    )
    logits = F.linear(lifted.mean(1), student.head.weight, student.head.bias)
    (teacher,) = output.tokens.values()
    ce = F.cross_entropy(logits, target, label_smoothing=0.1)
    kd = F.kl_div(
        logits.log_softmax(-1), output.logits.log_softmax(-1), reduction="batchmean",
        log_target=True,
    )  # fmt: skip
    maps = (tokens.unflatten(1, (2, 2)) for tokens in (lifted, teacher.data))
    feature = definition(*maps, "spectral", 1.0, 1e-8)
    return 0.1 * ce + 0.9 * kd + 0.2 * feature


def test_ten_steps_follow_the_trajectory_of_the_plain_layers():
    """Equal to float32 rounding, which is 6e-8 of a loss and a little more after every step.

    AdamW divides gradients by their own size, so small ones carry larger relative errors into the
    weights: 1e-5 leaves room for that, and is a hundredth of one step. There is no bias in the
    attention: the keys' has no gradient but rounding, of which AdamW would make whole steps.
    """
    task, teacher = task_for(lift(qkv_bias=False), feature_loss="spectral")
    twin = copy.deepcopy(task.student)
    ours, theirs = (
        torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05)
        for model in (task.student, twin)
    )
    generator = torch.Generator().manual_seed(0)
    seen = []
    for _ in range(10):
        images = torch.randn(4, 1, 8, 8, generator=generator)
        output = teacher(images)
        losses = (
            task(images, TARGET, output)["loss"],
            reference_losses(twin, images, TARGET, output),
        )
        for optimizer, loss in zip((ours, theirs), losses):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        seen.append([loss.item() for loss in losses])
    assert seen[-1][0] < seen[0][0]
    for fused, plain in seen:
        assert fused == pytest.approx(plain, rel=1e-5)
    for (name, weight), expected in zip(task.student.named_parameters(), twin.parameters()):
        torch.testing.assert_close(
            weight, expected, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.slow
@pytest.mark.parametrize("loss", LOSSES)
def test_a_whole_step_compiles_as_one_graph(loss):
    task, teacher = task_for(lift(), feature_loss=loss)
    compiled = torch.compile(copy.deepcopy(task), fullgraph=True, backend="aot_eager")
    output = teacher(IMAGES)
    parts = compiled(IMAGES, TARGET, output)
    expected = task(IMAGES, TARGET, output)
    for name in expected:
        torch.testing.assert_close(parts[name], expected[name])
    for one in (parts, expected):
        one["loss"].backward()
    for ours, theirs in zip(compiled.parameters(), task.parameters()):
        torch.testing.assert_close(ours.grad, theirs.grad)


def make_gradients_on_rank(rank: int, folder: str) -> None:
    dist.init_process_group("gloo")
    task, teacher = task_for(lift(), feature_loss="spectral")
    wrapped = nn.parallel.DistributedDataParallel(task)
    share = slice(2 * rank, 2 * rank + 2)
    images, target = IMAGES[share], TARGET[share]
    for _ in range(2):  # DDP notices a parameter without gradient in the step after
        task.zero_grad()
        wrapped(images, target, teacher(images))["loss"].backward()
    torch.save({n: p.grad for n, p in task.named_parameters()}, f"{folder}/{rank}.pth")
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_make_the_gradients_of_one(tmp_path):
    run_ranks(make_gradients_on_rank, str(tmp_path))
    task, teacher = task_for(lift(), feature_loss="spectral")
    task(IMAGES, TARGET, teacher(IMAGES))["loss"].backward()
    ranks = [torch.load(tmp_path / f"{rank}.pth") for rank in range(2)]
    for name, parameter in task.named_parameters():
        assert ranks[0][name] is not None, name
        assert torch.equal(ranks[0][name], ranks[1][name])
        torch.testing.assert_close(
            ranks[0][name], parameter.grad, msg=lambda m, n=name: f"{n}: {m}"
        )
