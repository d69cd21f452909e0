"""Ready terms in the task for timm's train loop: taken as they are, and checked before a step."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import nn

from fastkd.losses import FeatureKD, HardKD, SoftKD
from tests.harness.tiny import lift, vit
from tests.integrations.tasks import IMAGES, LINEAR, TARGET, make_task, projected_task

BY_NAME = [("blocks.1", "blocks.1")]
DIMS = ({"blocks.1": 16}, {"blocks.1": 24})


def test_ready_terms_are_taken_as_they_are():
    by_options = projected_task()
    feature = FeatureKD("spectral", [(1, 1)], 0.2, "linear", {1: 16}, {1: 24})
    feature.load_state_dict(by_options.trainable_module.terms.feature.state_dict())
    ready = make_task(vit(), vit(24, seed=1), logit=SoftKD(2.0, 0.5), feature=feature)
    assert torch.equal(ready(IMAGES, TARGET)["loss"], by_options(IMAGES, TARGET)["loss"])


def test_a_ready_term_on_named_layers_is_told_their_prefix():
    by_number = FeatureKD("spectral", [(1, 1)], 0.2, "linear", {1: 16}, {1: 24})
    by_name = FeatureKD("spectral", BY_NAME, 0.2, "linear", *DIMS)
    by_name.load_state_dict(by_number.state_dict())
    prefixes = {"student_prefix": 1, "teacher_prefix": 1}
    named = make_task(vit(), vit(24, seed=1), feature=by_name, **prefixes)
    numbered = make_task(vit(), vit(24, seed=1), feature=by_number)
    torch.testing.assert_close(named(IMAGES, TARGET), numbered(IMAGES, TARGET))


def test_named_layers_of_a_model_that_says_no_input_size_are_not_run_to_learn_their_channels():
    def convolutions():  # for 8 x 8 pixels alone
        return nn.Sequential(nn.Conv2d(1, 4, 2, 2), nn.Flatten(), nn.Linear(64, 6))

    task = make_task(convolutions(), convolutions(), feature=FeatureKD("mse", [("0", "0")]))
    assert task(IMAGES, TARGET)["feature"] > 0


def test_a_student_with_two_heads_is_sent_to_timms_task_for_it():
    options = {"img_size": 32, "embed_dim": 24, "depth": 1, "num_heads": 2, "num_classes": 6}
    student = timm.create_model("deit_tiny_distilled_patch16_224", **options)
    task = make_task(student, timm.create_model("vit_tiny_patch16_224", **options), alpha=1.0,
                     feature_weight=0.0).train()  # fmt: skip
    images = torch.randn(2, 3, 32, 32)
    student.set_distilled_training(True)
    with pytest.raises(TypeError, match=r"TokenDistillationTask.*set_distilled_training\(False\)"):
        task(images, TARGET[:2])
    student.set_distilled_training(False)
    assert task(images, TARGET[:2])["loss"].isfinite()


def linear(student_dim, teacher_dim):
    return FeatureKD("mse", [(1, 1)], 0.2, "linear", {1: student_dim}, {1: teacher_dim})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"logit": HardKD(0.5), "tau": 2.0, "recipe": "lift_softkd"}, "recipe, tau describe terms"),
        ({"logit": HardKD(0.5), "student_prefix": 1}, "student_prefix describe terms"),
        ({"feature": FeatureKD("mse", [(-1, 1)])}, r"count blocks from the front, got \(-1,\)"),
        ({"feature": linear(16, 24), "teacher_prefix": 1}, "teacher_prefix must be 0 .*number"),
        ({"feature": FeatureKD("mse", [(1, 1)])}, "student has 16 channels, teacher 24"),
        ({"feature": linear(12, 24)}, "student has 16 channels, .*made for 12 and 24"),
        ({"feature": FeatureKD("mse", [(1, 1)], projector="lift")}, "VisionTransformer has not"),
    ],
)
def test_ready_terms_that_do_not_fit_are_refused_before_the_first_step(options, message):
    with pytest.raises(ValueError, match=message):
        make_task(vit(), vit(24, seed=1), **options)


def test_widths_of_named_layers_are_refused_before_the_first_step():
    student, teacher = (timm.create_model("test_vit", num_classes=6) for _ in range(2))
    unfit = {"norm": 64}, {"blocks.0": 24}
    feature = FeatureKD("mse", [("norm", "blocks.0")], 0.2, "linear", *unfit)
    with pytest.raises(ValueError, match=r"teacher 64; .* made for 64 and 24"):
        make_task(student, teacher, feature=feature, student_prefix=1, teacher_prefix=1)


def test_a_ready_lift_term_is_checked_with_the_lifted_width():
    feature = FeatureKD("mse", [(1, 1)], projector="lift")
    assert make_task(lift(24), vit(24, seed=1), feature=feature)(IMAGES, TARGET)["feature"] > 0
    with pytest.raises(ValueError, match="student has 20 channels, teacher 24"):
        make_task(lift(20), vit(24, seed=1), feature=feature)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"feature": "mse"}, r"feature must be a FeatureTerm such as FeatureKD.*feature_loss="),
        ({"logit": "soft"}, r"logit must be a LogitTerm such as SoftKD.*logit_loss="),
        ({"feature": SoftKD(1.0)}, "feature must be a FeatureTerm"),
    ],
)
def test_what_is_no_term_is_refused(options, message):
    with pytest.raises(TypeError, match=message):
        make_task(vit(), vit(24, seed=1), **options)


@pytest.mark.parametrize(
    ("name", "instead"),
    [
        ("distill_loss_weight", "alpha .* feature_weight"),
        ("student_feature_dim", "widths are found out"),
        ("teacher_feature_dim", "widths are found out"),
        ("temperature", "tau"),
        ("loss_type", "logit_loss"),
    ],
)
@pytest.mark.parametrize("terms", [LINEAR, {"logit": HardKD(0.5)}], ids=["options", "ready"])
def test_arguments_of_timms_tasks_are_refused_with_what_takes_their_place(name, instead, terms):
    with pytest.raises(TypeError, match=f"{name} is an argument of timm's tasks.*{instead}"):
        make_task(vit(), vit(24, seed=1), **terms, **{name: None})
