"""The teacher of the task for timm's train loop: where its weights come from, and what it sees."""

from __future__ import annotations

import huggingface_hub.constants
import pytest
import timm
import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import nn

from fastkd import create_teacher
from fastkd.losses import SoftKD
from tests.harness.tiny import vit
from tests.integrations.tasks import IMAGES, LINEAR, TARGET, make_task, with_statistics

RAW = IMAGES.sigmoid()
FEATURES_ALONE = {"alpha": 0.0, "projector": "linear", "pairs": [(-1, -1)]}


def weights_of(path, classes):
    model = timm.create_model("test_vit", num_classes=classes, in_chans=1)
    torch.save(model.state_dict(), path)
    return str(path), model


def student_of(classes):
    return timm.create_model("test_vit", num_classes=classes, in_chans=1)


def test_the_teacher_sees_images_in_its_own_statistics():
    student = with_statistics(vit(), 0.5, 0.5)
    teacher = with_statistics(vit(24, seed=1), 0.4, 0.2).eval()
    task = make_task(student, teacher, **LINEAR)
    found = task((RAW - 0.5) / 0.5, TARGET)
    with torch.no_grad():
        logits = teacher((RAW - 0.4) / 0.2)
    torch.testing.assert_close(found["soft_kd"], SoftKD(2.0)(found["output"], logits))


def test_images_of_a_student_that_says_nothing_have_the_statistics_of_timms_loaders():
    teacher = vit(24, seed=1, in_chans=3)
    teacher.pretrained_cfg = {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.2, 0.2)}
    task = make_task(vit(in_chans=3), teacher, **LINEAR)
    raw = torch.rand(2, 3, 8, 8)
    columns = (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, (0.5, 0.4, 0.3))
    mean, std, own = (torch.tensor(values).view(3, 1, 1) for values in columns)
    torch.testing.assert_close(task.teacher.prepare((raw - mean) / std), (raw - own) / 0.2)


def test_a_teacher_that_was_told_the_statistics_keeps_them():
    student = with_statistics(vit(), 0.5, 0.5)
    teacher = create_teacher(with_statistics(vit(24, seed=1), 0.4, 0.2))
    teacher.set_input_stats((0.1,), (0.3,))
    task = make_task(student, teacher, **LINEAR)
    torch.testing.assert_close(task.teacher.prepare((RAW - 0.1) / 0.3), (RAW - 0.4) / 0.2)


def timms_wrapper(model):
    return timm.task.DistillationTeacher(model)


@pytest.mark.parametrize("wrap", [create_teacher, timms_wrapper], ids=["fastkd", "timm"])
def test_a_wrapped_teacher_gives_what_its_model_gives(wrap):
    student = with_statistics(vit(), 0.5, 0.5)
    model = with_statistics(vit(24, seed=1), 0.4, 0.2)
    torch.manual_seed(5)
    bare = make_task(student, model, **LINEAR)
    torch.manual_seed(5)
    wrapped = make_task(student, wrap(model), **LINEAR)
    torch.testing.assert_close(wrapped(IMAGES, TARGET), bare(IMAGES, TARGET))


@pytest.mark.parametrize("overlay", [None, {"mean": (0.3,), "std": (0.2,)}], ids=["", "overlay"])
def test_a_teacher_by_name_loads_local_weights(tmp_path, overlay):
    path, source = weights_of(tmp_path / "teacher.pth", 6)
    task = make_task(
        student_of(6).bfloat16(),
        "test_vit",
        teacher_pretrained_path=path,
        teacher_pretrained_cfg_overlay=overlay,
        alpha=1.0,
        dtype=torch.bfloat16,
    )
    for name, value in source.bfloat16().state_dict().items():
        assert torch.equal(task.teacher.model.state_dict()[name], value), name
    assert task.teacher.mean == (overlay["mean"] if overlay else None)


@pytest.mark.parametrize("overlay", [None, {"num_classes": 5}], ids=["", "overlay"])
def test_a_teacher_whose_head_would_be_random_is_refused(tmp_path, overlay):
    path, _ = weights_of(tmp_path / "teacher.pth", 5)
    with pytest.raises(ValueError, match=r"a head of 5 classes.* random"):
        make_task(
            student_of(6),
            "test_vit",
            teacher_pretrained_path=path,
            teacher_pretrained_cfg_overlay=overlay,
            alpha=1.0,
        )


@pytest.mark.parametrize("overlay", [None, {"num_classes": 5}], ids=["", "overlay"])
def test_a_teacher_of_other_classes_gives_features(tmp_path, overlay):
    path, source = weights_of(tmp_path / "teacher.pth", 5)
    task = make_task(
        student_of(6),
        "test_vit",
        teacher_pretrained_path=path,
        teacher_pretrained_cfg_overlay=overlay,
        **FEATURES_ALONE,
    )
    assert torch.equal(task.teacher.model.pos_embed, source.pos_embed)


def test_published_weights_of_other_classes_are_refused_before_any_download():
    student = timm.create_model("test_vit", num_classes=6)
    with pytest.raises(ValueError, match=r"'test_vit' has a head of 1000 classes.*6"):
        make_task(student, "test_vit", alpha=1.0)


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("test_vitt", ValueError, "timm has no model 'test_vitt'; did you mean test_vit"),
        ("runs/teacher.pth", FileNotFoundError, "teacher.pth"),
        ("test_vit", RuntimeError, "could not be downloaded.*checkpoint=PATH"),
    ],
    ids=["typo", "path", "offline"],
)
def test_a_name_without_weights_is_refused_as_create_teacher_does(
    name, error, message, monkeypatch, tmp_path
):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(error, match=message):
        make_task(timm.create_model("test_vit"), name, **FEATURES_ALONE)


def test_teacher_terms_and_criterion_are_put_on_the_device():
    teacher = with_statistics(vit(24), 0.4, 0.2)
    criterion = nn.CrossEntropyLoss(weight=torch.ones(6))
    task = make_task(
        with_statistics(vit(), 0.5, 0.5),
        teacher,
        criterion=criterion,
        device=torch.device("meta"),
        **LINEAR,
    )
    placed = {
        "teacher": next(teacher.parameters()),
        "statistics": task.teacher.scale,
        "projector": next(task.trainable_module.terms.parameters()),
        "criterion": criterion.weight,
    }
    assert {name: tensor.device.type for name, tensor in placed.items()} == dict.fromkeys(
        placed, "meta"
    )


def with_names(model, names):
    model.pretrained_cfg = {"mean": (0.5,), "std": (0.5,), "label_names": list(names)}
    return model


def test_logits_of_a_teacher_of_other_classes_are_refused_unless_taken_by_number(caplog):
    student, teacher = with_names(vit(), "abcdef"), with_names(vit(24, seed=1), "abcdfe")
    with pytest.raises(ValueError, match="4 is 'e' in the student, 'f' in the teacher"):
        make_task(student, teacher, **LINEAR)
    make_task(student, teacher, **FEATURES_ALONE)
    make_task(student, teacher, **LINEAR, classes_by="number")
    assert "by number" not in caplog.text
    make_task(vit(), teacher, **LINEAR, verbose=True)
    assert "FeatureMapDistillationTask: classes are taken by number" in caplog.text
