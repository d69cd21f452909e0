"""The task: what a step minimises, against the same computed by hand from timm models."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastkd import create_teacher
from fastkd.config import Recipe
from fastkd.losses import DistillationLoss, FeatureKD
from fastkd.training.optim import build_optimizer
from fastkd.training.task import DistillationTask, build_task
from tests.harness.tiny import lift, vit

IMAGES = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(3))
TARGET = torch.tensor([0, 1, 2, 3])
EXAMPLE = torch.zeros(1, 1, 8, 8)


def task_for(student, teacher, **options):
    teacher = create_teacher(teacher)
    return build_task(student, teacher, Recipe(**options), EXAMPLE), teacher


def spectral(student, teacher):
    maps = (one.unflatten(1, (2, 2)).permute(0, 3, 1, 2) for one in (student, teacher))
    return F.mse_loss(*(torch.view_as_real(torch.fft.rfft2(m, norm="ortho")) for m in maps))


def test_lift_step_equals_the_paper_computed_by_hand():
    student, teacher = lift(24).eval(), vit(24, depth=3, seed=1).eval()
    task, frozen = task_for(student, teacher, alpha=0.9, feature_loss="spectral", projector="lift")
    parts = task(IMAGES, TARGET, frozen(IMAGES))

    blocks, lifted = student.norm, []
    handle = blocks.register_forward_hook(lambda module, args, out: lifted.append(out))
    logits = student(IMAGES)
    handle.remove()
    with torch.no_grad():
        features = teacher.forward_intermediates(
            IMAGES, indices=[2], norm=False, intermediates_only=True, output_fmt="NLC"
        )[0]
        teacher_logits = teacher(IMAGES)
    cross_entropy = F.cross_entropy(logits, TARGET, label_smoothing=0.1)
    kl = F.kl_div(logits.log_softmax(-1), teacher_logits.softmax(-1), reduction="batchmean")
    expected = 0.1 * cross_entropy + 0.9 * kl + 0.2 * spectral(lifted[0][:, 1:], features)
    torch.testing.assert_close(parts["loss"], expected)
    torch.testing.assert_close(parts["output"], logits)


def test_every_parameter_of_a_lift_task_receives_a_gradient():
    task, teacher = task_for(lift(24), vit(24, seed=1), alpha=0.9, projector="lift")
    task(IMAGES, TARGET, teacher(IMAGES))["loss"].backward()
    assert [n for n, p in task.named_parameters() if p.grad is None] == []


def test_the_teacher_is_no_part_of_the_task():
    student, teacher = vit(), vit(24, seed=1)
    task, _ = task_for(student, teacher, projector="linear")
    ours = {id(p) for p in task.parameters()}
    assert ours.isdisjoint(id(p) for p in teacher.parameters())
    assert len(ours) == len(list(student.parameters())) + 2


def test_negative_and_positive_indices_of_one_block_are_one_tap():
    task, teacher = task_for(vit(), vit(seed=1, depth=3), pairs=((-1, 2), (1, 0), (0, -1)))
    assert task.terms.feature.pairs == ((1, 2), (1, 0), (0, 2))
    assert set(task(IMAGES, TARGET, teacher(IMAGES))) == {"loss", "ce", "feature", "output"}


def test_a_pair_in_other_numbers_is_the_same_pair():
    with pytest.raises(ValueError, match=r"pairs must differ, got \(\(1, 2\), \(1, 2\)\)"):
        task_for(vit(), vit(seed=1, depth=3), pairs=((-1, 2), (1, -1)))


def test_without_a_teacher_the_loss_is_cross_entropy():
    student = vit()
    task = build_task(student, None, Recipe(alpha=0.9, label_smoothing=0.0), EXAMPLE)
    parts = task(IMAGES, TARGET)
    torch.testing.assert_close(parts["loss"], F.cross_entropy(student(IMAGES), TARGET))


def test_alpha_zero_needs_no_teacher_logits():
    task, _ = task_for(vit(), vit(seed=1))
    assert not task.needs_logits
    assert task.needs_tokens


def test_logits_only_distillation_needs_no_taps():
    task, teacher = task_for(vit(), vit(24, seed=1), alpha=0.5, feature_weight=0.0)
    assert task.taps is None
    assert set(task(IMAGES, TARGET, teacher(IMAGES))) == {"loss", "ce", "soft_kd", "output"}


def test_a_feature_term_without_taps_is_refused():
    with pytest.raises(ValueError, match="needs the student's taps"):
        DistillationTask(vit(), DistillationLoss(feature=FeatureKD()))


def test_a_missing_teacher_output_is_an_error():
    task, _ = task_for(vit(), vit(seed=1))
    with pytest.raises(ValueError, match="need teacher_output"):
        task(IMAGES, TARGET)


def test_unequal_widths_are_refused_at_construction():
    with pytest.raises(ValueError, match="16 channels, teacher 24"):
        task_for(vit(16), vit(24))


def test_lift_projector_without_a_lift_student_is_refused():
    with pytest.raises(ValueError, match=r"variant='lift'.*VisionTransformer has none"):
        task_for(vit(), vit(), projector="lift")


def test_modules_that_are_not_timms_are_paired_by_name():
    def network(width):
        return nn.Sequential(
            nn.Conv2d(1, width, 4, 4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * width, 6)
        )

    task, teacher = task_for(network(8), network(12), pairs=(("0", "1"),), projector="linear")
    parts = task(IMAGES, TARGET, teacher(IMAGES))
    assert task.terms.feature.projectors[0].weight.shape == (12, 8)
    assert parts["feature"] > 0


@pytest.mark.parametrize("decay_pos_embed", [False, True])
def test_embeddings_are_decayed_only_where_the_recipe_says_so(decay_pos_embed):
    recipe = Recipe(decay_pos_embed=decay_pos_embed)
    task = build_task(vit(), None, recipe, EXAMPLE)
    optimizer, _ = build_optimizer(task, recipe, 10)
    decay = {id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    decayed = {name for name, p in task.named_parameters() if decay[id(p)] > 0}
    assert ("student.pos_embed" in decayed) == decay_pos_embed
    assert "student.head.weight" in decayed
    assert not any(name.endswith("bias") for name in decayed)


def test_a_lift_student_that_is_not_compared_by_its_lifted_tokens_is_warned_about(caplog):
    """Easy to forget beside variant='lift', and the run would be another than the paper's."""
    teacher = create_teacher(vit(), pretrained=False)
    recipe = Recipe().override(pairs=((-1, -1),), projector="pool")
    with caplog.at_level("WARNING", logger="fastkd"):
        build_task(lift(), teacher, recipe, torch.zeros(1, 1, 8, 8))
    assert "projector='lift'" in caplog.text
