import pytest
import torch

from tests.training.tiny import FAST, tensor_data


@pytest.fixture
def data():
    return tensor_data()


@pytest.fixture
def fast():
    return dict(FAST)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
