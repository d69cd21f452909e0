"""A run's classes, a teacher's and those of the weights that a student starts from."""

import pytest
import torch
from torch.utils.data import TensorDataset

from fastkd import create_teacher
from fastkd.training import load_checkpoint, train
from tests.harness.tiny import image_folder, made_run, tensor_data, vit

LOGITS = {"alpha": 0.5, "feature_weight": 0.0, "epochs": 1}


def named(*classes):
    sets = [TensorDataset(*part.tensors) for part in tensor_data()]
    for part in sets:
        part.classes = list(classes)
    return tuple(sets)


def teacher_of(*classes, **options):
    module = vit(24, seed=1, **options)
    module.pretrained_cfg = {"label_names": list(classes)}
    return module


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        ("abdcfe", "2 is 'c' in the data, 'd' in the teacher; 3 is .*; 4 is"),
        ("uvwxyz", "6 of the 6 classes of the data .*'a', 'b', 'c', .*'u', 'v', 'w'"),
        ("abcdez", "1 of the 6 classes of the data .*'f'"),
    ],
    ids=["order", "others", "one"],
)
def test_a_teacher_of_other_classes_is_refused_before_anything_is_written(
    fast, tmp_path, classes, message
):
    with pytest.raises(ValueError, match=f"teacher: .*{message}.*classes_by='number'"):
        train(vit(), teacher_of(*classes), named(*"abcdef"), tmp_path / "o", **fast | LOGITS)
    assert not (tmp_path / "o").exists()


def test_a_teacher_with_another_number_of_classes_is_refused(fast, tmp_path):
    teacher = vit(24, seed=1, num_classes=9)
    with pytest.raises(ValueError, match=r"teacher: .*the teacher has 9 classes, the data 6"):
        train(vit(), teacher, tensor_data(), tmp_path / "o", **fast | LOGITS)
    assert not (tmp_path / "o").exists()


def test_classes_that_a_missing_one_shifts_are_refused(fast, tmp_path):
    """As a class folder does that is empty in both splits, with num_classes."""
    data = named(*"abdef")
    with pytest.raises(ValueError, match=r"teacher: .*2 is 'd' in the data, 'c' in the teacher"):
        train(vit(), teacher_of(*"abcdef"), data, tmp_path / "o", num_classes=6, **fast | LOGITS)


@pytest.mark.parametrize("options", [{"classes_by": "number"}, {"alpha": 0, "feature_weight": 1}])
def test_other_classes_are_taken_by_number_or_for_features(fast, options):
    changed = fast | LOGITS | {"projector": "linear"} | options
    if changed["feature_weight"] == 0:
        del changed["projector"]
    train(vit(), teacher_of(*"uvwxyz"), named(*"abcdef"), **changed)


def test_a_teacher_without_names_is_taken_by_number_which_a_line_says(fast, caplog):
    train(vit(), vit(24, seed=1), named(*"abcdef"), **fast | LOGITS)
    lines = [r.getMessage() for r in caplog.records if "by number" in r.getMessage()]
    assert len(lines) == 1 and lines[0].startswith("teacher: classes are taken by number")


def test_a_teacher_knows_the_classes_of_its_run(tmp_path):
    run = made_run(tmp_path / "run", classes=["x", "y", "z"])
    assert create_teacher(run).classes == ("x", "y", "z")


def test_weights_of_other_classes_to_start_from_are_named(fast, tmp_path, caplog):
    run = made_run(tmp_path / "run", classes=["blue", "red", "violet"])
    folder = image_folder(tmp_path / "images", train=6, val=1)
    options = {
        name: fast[name] for name in ("lr", "lr_scaling", "amp", "workers", "device", "quiet")
    }
    options |= {"epochs": 1, "warmup_epochs": 0, "batch_size": 18, "img_size": 32}
    train(run, None, folder, tmp_path / "o", **options)
    lines = [r.getMessage() for r in caplog.records if r.getMessage().startswith("student: ")]
    assert len(lines) == 1 and "1 is 'green' in the data, 'red' in the weights; 2 is" in lines[0]
    assert load_checkpoint(tmp_path / "o")["classes"] == ["blue", "green", "red"]


class Unlabelled(TensorDataset):
    def __getitem__(self, index):
        return super().__getitem__(index)[0], None


@pytest.mark.parametrize(
    ("classes", "counted"), [("abcdef", True), ("fedcba", True), ("uvwxyz", False)]
)
def test_without_labels_the_student_has_the_classes_of_its_teacher(
    fast, tmp_path, caplog, classes, counted
):
    given, val = named(*classes)
    given = Unlabelled(*given.tensors)
    images, labels = val.tensors
    letters = torch.tensor([classes.find(letter) for letter in "abcdef"])
    val.tensors = (images, letters[labels] if counted else labels)
    teacher = teacher_of(*"abcdef")
    options = fast | LOGITS | {"alpha": 1.0, "labels": False}
    result = train(vit(), teacher, (given, val), tmp_path / classes, **options)
    assert load_checkpoint(tmp_path / classes)["classes"] == list("abcdef")
    assert ("no top-1 is measured" in caplog.text) == (not counted)
    expected = train(vit(), teacher, (given, tensor_data()[1]), **options).top1
    assert result.top1 == (expected if counted else None)
