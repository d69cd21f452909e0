"""A run's classes, a teacher's and those of the weights that a student starts from."""

import pytest
from torch.utils.data import TensorDataset

from fastkd import create_teacher
from fastkd.config import Recipe
from fastkd.data.classes import Classes
from fastkd.data.open_data import open_data
from fastkd.training import load_checkpoint, train
from fastkd.training.build import check_classes, resolve_run
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


def checked(data, teacher, **fields):
    opened = open_data(data, labels=fields.get("labels", True))
    recipe = Recipe(**{"teacher": "module:Net", "alpha": 0.5, **fields})
    return check_classes(recipe, opened, 6, Classes(), create_teacher(teacher))


@pytest.mark.parametrize("options", [{"classes_by": "number"}, {"alpha": 0.0}])
def test_other_classes_are_taken_by_number_or_for_features(options):
    assert checked(named(*"abcdef"), teacher_of(*"uvwxyz"), **options).numbers is None


def test_a_teacher_without_names_is_taken_by_number_which_a_line_says(fast, caplog):
    train(vit(), vit(24, seed=1), named(*"abcdef"), **fast | LOGITS)
    lines = [r.getMessage() for r in caplog.records if "by number" in r.getMessage()]
    assert len(lines) == 1 and lines[0].startswith("teacher: classes are taken by number")


def test_a_teacher_knows_the_classes_of_its_run(tmp_path):
    run = made_run(tmp_path / "run", classes=["x", "y", "z"])
    assert create_teacher(run).classes == ("x", "y", "z")


def test_weights_of_other_classes_to_start_from_are_named(tmp_path, caplog):
    run = made_run(tmp_path / "run", classes=["blue", "red", "violet"])
    folder = image_folder(tmp_path / "images", train=1, val=1)
    given = resolve_run(run, None, folder, None, None, "never", {})
    data = open_data(folder)
    assert check_classes(given.recipe, data, 3, given.classes, None) is data
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith("student: ") and "1 is 'green' in the data, 'red' in the weights" in line


class Unlabeled(TensorDataset):
    def __getitem__(self, index):
        return super().__getitem__(index)[0], None


@pytest.mark.parametrize(
    ("classes", "counted", "numbers"),
    [
        ("abcdef", True, {label: label for label in range(6)}),
        ("fedcba", True, {label: 5 - label for label in range(6)}),
        ("be", True, {0: 1, 1: 4}),
        ("uvwxyz", False, None),
        ("abcdex", False, None),
    ],
)
def test_without_labels_the_evaluation_set_is_matched_with_the_teacher(
    classes, counted, numbers, caplog
):
    train_set, val = named(*classes)
    data = checked((Unlabeled(*train_set.tensors), val), teacher_of(*"abcdef"), labels=False)
    assert (data.labeled_val, data.numbers) == (counted, numbers)
    assert ("no top-1 is measured: teacher: " in caplog.text) == (not counted)


def test_without_labels_the_student_has_the_classes_of_its_teacher(fast, tmp_path):
    sets = tuple(Unlabeled(*part.tensors) for part in named(*"uvwxyz"))
    options = fast | LOGITS | {"alpha": 1.0, "labels": False}
    train(vit(), teacher_of(*"abcdef"), sets, tmp_path / "o", **options)
    assert load_checkpoint(tmp_path / "o")["classes"] == list("abcdef")
