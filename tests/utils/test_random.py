"""States of random generators."""

import pytest
import torch

from fastkd.utils.random import rng_state, set_rng_state


def test_a_state_of_a_gpu_is_put_back_without_one(monkeypatch):
    cpu = torch.device("cpu")
    state = rng_state(cpu)
    drawn = torch.rand(3)
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda *_: pytest.fail("there is none"))
    set_rng_state(state | {"cuda": torch.zeros(16, dtype=torch.uint8)}, cpu)
    assert torch.equal(torch.rand(3), drawn)
