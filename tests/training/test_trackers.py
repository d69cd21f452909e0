"""Trackers take what the logs take, go on where a run goes on, and are refused when missing."""

import sys
from types import ModuleType, SimpleNamespace

import pytest

from fastkd.training import train
from tests.harness.tiny import Interrupting, vit


@pytest.fixture
def wandb(monkeypatch):
    """A stand-in for the service: what was started, and what was logged where."""
    module = ModuleType("wandb")
    module.starts, module.logged = [], []

    def init(**options):
        module.starts.append(options)
        return SimpleNamespace(
            id=options["id"] or "run-1",
            log=lambda values, step: module.logged.append((step, values)),
            finish=lambda: None,
        )

    module.init = init
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


def test_wandb_gets_intervals_and_epochs_by_update(wandb, data, fast, tmp_path):
    train(vit(), None, data, tmp_path, **fast, track="wandb", log_interval=2)
    assert [step for step, _ in wandb.logged] == [2, 4, 4, 6, 8, 8]
    assert {"train/loss", "train/lr", "train/grad_norm"} <= set(wandb.logged[0][1])
    assert {"epoch/top1", "epoch/ema_top1"} <= set(wandb.logged[2][1])
    assert wandb.starts[0]["config"]["lr"] == fast["lr"]


def test_a_resumed_run_goes_on_in_the_same_wandb_run(wandb, data, fast, tmp_path):
    def crash():
        raise LookupError

    broken = (Interrupting(data[0], 16 * 4 + 2, crash), data[1])
    with pytest.raises(LookupError):
        train(vit(), None, broken, tmp_path, **fast, track="wandb")
    train(vit(), None, data, tmp_path, **fast, track="wandb")
    train(vit(), None, data, tmp_path, resume="never", **fast, track="wandb")
    assert [start["id"] for start in wandb.starts] == [None, "run-1", None]


def test_tensorboard_writes_into_the_runs_folder(monkeypatch, data, fast, tmp_path):
    module = ModuleType("torch.utils.tensorboard")
    scalars = []

    class SummaryWriter:
        def __init__(self, folder, purge_step):
            scalars.append((folder, purge_step))

        def add_scalar(self, name, value, step):
            scalars.append((name, step))

        def close(self):
            scalars.append("closed")

    module.SummaryWriter = SummaryWriter
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    train(vit(), None, data, tmp_path, **fast | {"epochs": 1}, track="tensorboard")
    assert scalars[0] == (str(tmp_path / "tensorboard"), 1)
    assert ("epoch/top1", 4) in scalars
    assert scalars[-1] == "closed"


@pytest.mark.parametrize("track", ["tensorboard", "wandb", "both"])
def test_a_missing_tracker_is_named_before_the_run_begins(monkeypatch, data, fast, tmp_path, track):
    for name in ("wandb", "torch.utils.tensorboard"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ValueError, match=r"track: \w+ is asked for .*pip install"):
        train(vit(), None, data, tmp_path / "run", **fast, track=track)
    assert not (tmp_path / "run").exists()


def test_a_tracker_needs_a_folder(wandb, data, fast):
    with pytest.raises(ValueError, match="give an output"):
        train(vit(), None, data, **fast, track="wandb")
