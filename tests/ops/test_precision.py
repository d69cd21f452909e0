"""exact_float32 against torch's settings: in force inside, as they were outside."""

import threading

import pytest
import torch

from fastkd.ops.checks import exact_float32

WIDER = torch.backends
PRODUCTS = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)


def in_force() -> list[str]:
    return [setting.fp32_precision for setting in PRODUCTS]


@pytest.fixture(autouse=True)
def restored_settings():
    # The widest first: what reads as inherited has nothing of its own.
    before = WIDER.fp32_precision
    WIDER.fp32_precision = "none"
    own = in_force()
    yield
    WIDER.fp32_precision = before
    for setting, precision in zip(PRODUCTS, own):
        setting.fp32_precision = precision


@pytest.mark.parametrize("precision", ["none", "ieee", "tf32"])
def test_products_are_exact_inside_and_as_they_were_outside(precision):
    for setting in PRODUCTS:
        setting.fp32_precision = precision
    with exact_float32():
        assert in_force() == ["ieee"] * 2
    assert in_force() == [precision] * 2


def test_an_inherited_precision_is_inherited_afterwards():
    WIDER.fp32_precision = "tf32"
    with exact_float32():
        assert in_force() == ["ieee"] * 2
    assert in_force() == ["tf32"] * 2
    WIDER.fp32_precision = "ieee"
    assert in_force() == ["ieee"] * 2


def test_a_precision_of_their_own_stays_their_own():
    WIDER.fp32_precision = "tf32"
    for setting in PRODUCTS:
        setting.fp32_precision = "ieee"
    with exact_float32():
        pass
    WIDER.fp32_precision = "ieee"
    WIDER.fp32_precision = "tf32"
    assert in_force() == ["ieee"] * 2


def test_the_inner_of_two_blocks_ends_nothing():
    PRODUCTS[0].fp32_precision = "tf32"
    with exact_float32():
        with exact_float32():
            pass
        assert in_force()[0] == "ieee"
    assert in_force()[0] == "tf32"


def test_the_last_of_several_threads_ends_it():
    PRODUCTS[0].fp32_precision = "tf32"
    entered, leave = threading.Event(), threading.Event()

    def stay():
        with exact_float32():
            entered.set()
            leave.wait(10)

    other = threading.Thread(target=stay)
    other.start()
    entered.wait(10)
    with exact_float32():
        pass
    assert in_force()[0] == "ieee"
    leave.set()
    other.join()
    assert in_force()[0] == "tf32"


def test_an_error_inside_ends_it():
    PRODUCTS[0].fp32_precision = "tf32"
    with pytest.raises(KeyError), exact_float32():
        raise KeyError
    assert in_force()[0] == "tf32"
