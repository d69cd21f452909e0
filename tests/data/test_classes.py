"""Class numbers: natural order, and the training set's numbers for another set."""

import numpy as np
import pytest
import torch

from fastkd.data.classes import is_missing, map_classes, number_classes


def test_classes_are_numbered_in_natural_order():
    assert number_classes({"n10", "n2", "A1"}) == {"A1": 0, "n2": 1, "n10": 2}


def test_numbers_are_mapped_by_the_names_of_the_classes():
    assert map_classes({"red": 0, "blue": 1}, {"blue": 5, "green": 1, "red": 3}, "val") == {
        0: 3,
        1: 5,
    }


def test_classes_that_training_lacks_are_refused_by_name():
    with pytest.raises(ValueError, match=r"val .*\['violet'\]"):
        map_classes({"red": 0, "violet": 1}, {"red": 0}, "val")


@pytest.mark.parametrize("label", [None, -1, np.int64(-1), torch.tensor(-1)])
def test_a_label_of_none_or_minus_one_is_missing(label):
    assert is_missing(label)


@pytest.mark.parametrize("label", [0, 3, np.array([-1, -1]), "-1"])
def test_any_other_label_is_there(label):
    assert not is_missing(label)
