"""Class numbers: natural order, a model's classes by name, and labels that are none."""

import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from timm.data import ImageNetInfo
from torch.utils.data import Subset

from fastkd.data.classes import (
    Classes,
    LabelError,
    class_names,
    class_number,
    match_classes,
    number_classes,
    require_same_classes,
)

SYNSETS = ImageNetInfo().label_names()
DESCRIPTIONS = ImageNetInfo().label_descriptions()


def named(*names, count=None, guessed=False, first=0):
    by_label = {label: (name,) for label, name in enumerate(names, first)}
    return Classes(by_label, count or len(names), guessed)


IMAGENET = named(*SYNSETS, guessed=True)


def test_classes_are_numbered_in_natural_order():
    assert number_classes({"n10", "n2", "A1"}) == {"A1": 0, "n2": 1, "n10": 2}


NFC, NFD = "caf\u00e9", "cafe\u0301"


@pytest.mark.parametrize(("own", "other"), [(NFC, NFD), (NFD, NFC)])
def test_accents_are_the_same_however_they_are_written(own, other):
    assert match_classes(named(own, "b"), named("b", other)) == {0: 1, 1: 0}


def test_two_classes_that_look_the_same_are_refused():
    with pytest.raises(ValueError, match=r"'cafe\\u0301' and 'caf\\xe9'"):
        number_classes({NFC, "b", NFD})


def test_a_subset_takes_the_models_numbers_by_name():
    assert match_classes(named("dog", "cat"), named("bee", "cat", "cow", "dog")) == {0: 3, 1: 1}


def test_labels_that_begin_anywhere_are_matched_by_name():
    assert match_classes(named("cat", "dog", first=7), named("dog", "cat")) == {7: 1, 8: 0}


@pytest.mark.parametrize("names", [SYNSETS, DESCRIPTIONS], ids=["synsets", "descriptions"])
def test_synsets_and_descriptions_are_names_of_imagenet(names):
    chosen = [names[label] for label in (0, 217, 574)]
    assert match_classes(named(*chosen), IMAGENET) == {0: 0, 1: 217, 2: 574}


def test_synsets_find_the_classes_of_a_model_that_describes_them():
    model = named(*(DESCRIPTIONS[label] for label in (574, 0, 217)))
    assert match_classes(named(*(SYNSETS[label] for label in (0, 574))), model) == {0: 1, 1: 0}


@pytest.mark.parametrize("second", ["crane", "crane2"])  # torchvision's name, Hugging Face's name
def test_both_cranes_of_imagenet_are_found(second):
    names = [second if label == 517 else name for label, name in enumerate(DESCRIPTIONS)]
    assert match_classes(named(*names), IMAGENET) == {label: label for label in range(1000)}


def test_a_name_of_two_classes_is_refused_where_its_number_does_not_tell():
    with pytest.raises(ValueError, match=r"1 of the 2 classes .*'crane'"):
        match_classes(named("crane", "tench, Tinca tinca"), IMAGENET)


@pytest.mark.parametrize("model", [named(*"abcde"), IMAGENET], ids=["own", "guessed"])
def test_classes_of_which_some_are_unknown_are_refused_naming_three(model):
    data = named("a", SYNSETS[0], "v", "w", "x", "y")
    with pytest.raises(ValueError, match=r"evaluate: 5 of the 6 .*'v', .*, \.\.\. .*classes_by"):
        match_classes(data, named("a", *"bcde") if not model.guessed else IMAGENET)


def test_classes_of_which_none_is_known_are_refused_although_they_are_as_many():
    with pytest.raises(ValueError, match=r"2 of the 2 .*'x', 'y' .*'a', 'b'.*classes_by='number'"):
        match_classes(named("x", "y"), named("a", "b"))


@pytest.mark.parametrize(
    ("data", "model", "reason"),
    [
        (
            Classes(count=3),
            named("a", "b", "c"),
            "3 of the data and 3 of the model .*names of the data",
        ),
        (named("a", "b", "c"), Classes(count=3), "3 of the model .*names of the model"),
        (Classes(), Classes(), "[?] of the data and [?] .*names of the data and the model"),
        (
            named(*map(str, range(1000))),
            IMAGENET,
            "1000 of the data and 1000 of the model .*not of ImageNet: '0'",
        ),
        (Classes(count=2), IMAGENET, "2 of the data and 1000 of the model .*names of the data"),
    ],
    ids=["data", "model", "both", "guessed", "fewer numbers"],
)
def test_without_names_numbers_are_kept_and_a_line_says_so(data, model, reason, caplog):
    assert match_classes(data, model) is None
    (record,) = caplog.records
    assert re.search(f"evaluate: classes are taken by number, .*{reason}", record.getMessage())


@pytest.mark.parametrize("model", [IMAGENET, Classes(count=3)], ids=["guessed", "none"])
def test_the_order_of_fewer_names_is_no_number(model):
    with pytest.raises(ValueError, match=f"{model.count} logits for the 2 .*classes_by='number'"):
        match_classes(named("a", "b"), model)
    assert match_classes(named("a", "b"), model, by="number") is None


def test_numbers_that_are_asked_for_need_no_line(caplog):
    assert match_classes(named("x", "y"), named("a", "b"), by="number") is None
    assert not caplog.records


@pytest.mark.parametrize("by", ["name", "number"])
def test_more_classes_than_logits_are_refused(by):
    with pytest.raises(ValueError, match="the model has 2 logits for the 3 classes of the data"):
        match_classes(Classes(count=3), Classes(count=2), by=by)


def test_another_word_for_classes_by_is_refused():
    with pytest.raises(ValueError, match="classes_by must be 'name' or 'number', got 'names'"):
        match_classes(Classes(), Classes(), by="names")


OF = {"by": "name", "caller": "teacher", "of": ("data", "teacher"), "quiet": False}


@pytest.mark.parametrize(
    ("data", "teacher", "message"),
    [
        (named(*"abcde"), named(*"acbed"), "1 is 'b' in the data, 'c' in the teacher; 2 .*; 3 "),
        (named(*"bcd", count=4), named(*"abcd"), "0 is 'b' in the data, 'a' in the teacher; 1 "),
        (named(*"abx"), named(*"abc"), "1 of the 3 classes .*'x'"),
        (named(*"ab"), named(*"abc"), "the teacher has 3 classes, the data 2"),
        (Classes(count=2), Classes(count=3), "the teacher has 3 classes, the data 2"),
    ],
    ids=["order", "an empty folder", "unknown", "count", "count without names"],
)
def test_logits_of_other_classes_are_not_compared(data, teacher, message):
    with pytest.raises(ValueError, match=f"teacher: .*{message}"):
        require_same_classes(data, teacher, **OF)


def test_logits_of_the_same_classes_are_compared_whatever_they_are_called(caplog):
    require_same_classes(named(*DESCRIPTIONS), IMAGENET, **OF)
    assert not caplog.records
    require_same_classes(named(*"abc"), Classes(count=3), **OF)
    assert "teacher: classes are taken by number" in caplog.text


@pytest.mark.parametrize(
    ("dataset", "names"),
    [
        ({"class_to_idx": {"b": 1, "a": 0}}, {0: "a", 1: "b"}),
        ({"class_to_idx": {"cat": 3, "dog": 7}, "classes": ["cat", "dog"]}, {3: "cat", 7: "dog"}),
        ({"classes": ("a", "b")}, {0: "a", 1: "b"}),
        ({"reader": SimpleNamespace(class_to_idx={}), "classes": ["a"]}, {0: "a"}),
        ({"reader": SimpleNamespace(class_to_idx={"": 0}), "labeled": False}, {}),
        # torchvision's ImageNet: synonyms, of which "crane" belongs to two classes
        (
            {
                "class_to_idx": {"tench": 0, "T": 0, "crane": 2},
                "classes": [("tench", "T"), ("crane",)],
            },
            {0: "tench, T", 2: "crane"},
        ),
        (
            {
                "class_to_idx": {"tench": 0, "T": 0, "crane": 2},
                "classes": [("tench", "T"), ("crane",), ("crane",)],
            },
            {0: "tench, T", 1: "crane", 2: "crane"},
        ),
        ({"classes": 10}, {}),
        ({"class_to_idx": {"a": "x"}}, {}),
        ({}, {}),
    ],
)
def test_names_of_a_datasets_classes(dataset, names):
    assert class_names(SimpleNamespace(**dataset)) == names


def test_a_subset_has_the_names_of_the_whole():
    whole = type("Whole", (list,), {"classes": ["a", "b"]})([(None, 0), (None, 1)])
    assert class_names(Subset(Subset(whole, [0, 1]), [1])) == {0: "a", 1: "b"}


@pytest.mark.parametrize(
    ("label", "number"),
    [
        (3, 3),
        (-1, -1),
        (None, None),
        (2.0, 2),
        (np.float32(2), 2),
        (np.uint8(200), 200),
        (torch.tensor(4), 4),
        (torch.tensor([4]), 4),
        (np.array([[5]]), 5),
    ],
)
def test_whole_numbers_are_labels(label, number):
    found = class_number(label, "a.jpg")
    assert found == number and isinstance(found, int | None)


@pytest.mark.parametrize(
    ("label", "shown"),
    [
        (0.9, r"0\.9"),
        (float("nan"), "nan"),
        (float("inf"), "inf"),
        (np.float16(1.5), "1.5"),
        (torch.tensor([0.0, 1.0]), r"tensor\(.* \(one-hot"),
        (np.eye(4)[1], r"array\(.* \(one-hot"),
        (torch.zeros(0), r"tensor\(\[\]"),
        ([0, 1, 0], r"\[0, 1, 0\] \(one-hot"),
        ((0,) * 1000, r"\.\.\."),
        ("3", "'3'"),
        (np.str_("cat"), "cat"),
        (b"3", "b'3'"),
        (True, "True"),
        (np.bool_(False), "False"),
        (torch.tensor(True), "True"),
        (-5, "-5"),
        (-2.0, "-2.0"),
        ({"label": 3}, "label"),
        (1 + 0j, "1"),
    ],
)
def test_anything_else_is_refused_naming_sample_and_label(label, shown):
    with pytest.raises(LabelError, match=rf"data: the label of a\.jpg must be a whole .*{shown}"):
        class_number(label, "a.jpg")
