"""Bounds of numbers, and how a wrong value is described."""

import math

import numpy as np
import pytest
import torch

from fastkd.utils.argument_checks import FLOAT32, check_number, check_numbers, describe


@pytest.mark.parametrize(
    ("value", "bounds", "whole", "limit"),
    [
        (-1.0, (0,), False, "finite and >= 0"),
        (math.nan, (0,), False, "finite and >= 0"),
        (math.inf, (), False, "finite in float32"),
        (1e38, (0,), False, "finite in float32"),
        (0.0, FLOAT32[:1], False, "positive"),
        (0, (1,), True, "at least 1"),
        (2**63, (0,), True, "finite and below 2^63"),
        (1025, (0, 1024), True, "0 to 1024"),
        (math.nan, (0.0, 1.0), False, "0.0 to 1.0"),
    ],
)
def test_a_number_out_of_bounds_is_named_with_them(value, bounds, whole, limit):
    with pytest.raises(ValueError) as caught:
        check_number("f", "x", value, *bounds, whole=whole)
    assert str(caught.value) == f"f: x must be {limit}, got {value}"


@pytest.mark.parametrize("value", [True, "1", 1.0, None, torch.ones(3), 1j])
def test_what_is_no_integer_is_refused(value):
    with pytest.raises(TypeError, match="f: x must be an integer, got"):
        check_number("f", "x", value, 0, whole=True)


def test_numbers_at_their_bounds_pass():
    check_number("f", "x", np.float32(1e-37), FLOAT32[0])
    check_number("f", "x", -FLOAT32[1])
    check_number("f", "x", np.int64(2**63 - 1), 0, whole=True)
    check_numbers("f", x=(None, 1), y=(1024, 0, 1024), z=(0.5, 0.0, 1.0))


def test_the_type_of_a_bound_says_whether_an_integer_is_asked_for():
    with pytest.raises(TypeError, match=r"f: x must be an integer, got float 1\.0"):
        check_numbers("f", x=(1.0, 1))


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (torch.ones(2, 3), "[2, 3] of torch.float32"),
        (np.ones(2), "ndarray"),
        (torch.nn.Linear, "the class Linear"),
        ("a", "'a'"),
        (None, "None"),
        (1.5, "float 1.5"),
        ({}, "dict"),
    ],
)
def test_a_value_is_described_in_a_few_words(value, words):
    assert describe(value) == words
