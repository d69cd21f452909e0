"""Checkpoints: atomic, safe to load, refused when they are not whole or not ours."""

import os

import pytest
import torch

from fastkd.training import checkpoint as checkpoints
from fastkd.training.atomic import remove_leftovers
from fastkd.training.checkpoint import CheckpointError, load_checkpoint, save_checkpoint


def test_what_is_saved_is_loaded(tmp_path):
    save_checkpoint({"weights": torch.arange(3), "epoch": 2}, tmp_path / "last.pth")
    state = load_checkpoint(tmp_path)
    assert state["epoch"] == 2
    assert torch.equal(state["weights"], torch.arange(3))


def test_a_failed_write_keeps_the_old_checkpoint_and_leaves_no_rubbish(tmp_path, monkeypatch):
    save_checkpoint({"epoch": 1}, tmp_path / "last.pth")

    def full(state, file):
        file.write(b"half a checkpoint")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoints.torch, "save", full)
    with pytest.raises(OSError, match="No space left"):
        save_checkpoint({"epoch": 2}, tmp_path / "last.pth")
    monkeypatch.undo()
    assert load_checkpoint(tmp_path)["epoch"] == 1
    assert os.listdir(tmp_path) == ["last.pth"]


@pytest.mark.parametrize("kept", [0, 10, 400, 900])
def test_a_torn_checkpoint_is_refused(tmp_path, kept):
    path = tmp_path / "last.pth"
    save_checkpoint({"weights": torch.zeros(100)}, path)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(CheckpointError, match="torn"):
        load_checkpoint(path)


@pytest.mark.parametrize("part", [0.01, 0.1, 0.5, 0.999])
def test_a_torn_checkpoint_of_many_megabytes_is_refused(tmp_path, part):
    path = tmp_path / "last.pth"
    save_checkpoint({f"weights{i}": torch.zeros(1 << 18) for i in range(4)}, path)
    os.truncate(path, int(part * path.stat().st_size))
    with pytest.raises(CheckpointError, match="torn"):
        load_checkpoint(path)


def test_what_a_killed_writer_left_is_removed_and_nothing_else(tmp_path):
    names = [".last.pth.4711.tmp", ".recipe.yaml.12.tmp"]
    kept = ["last.pth", "notes.tmp", ".hidden"]
    for name in names + kept:
        (tmp_path / name).touch()
    remove_leftovers(tmp_path)
    assert sorted(os.listdir(tmp_path)) == sorted(kept)


def test_a_foreign_checkpoint_is_refused(tmp_path):
    torch.save({"state_dict": {}}, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match="not written by fastkd"):
        load_checkpoint(tmp_path / "x.pth")


def test_a_checkpoint_that_would_run_code_is_refused(tmp_path):
    class Payload:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    torch.save({"format": checkpoints.FORMAT, "x": Payload()}, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match="safety"):
        load_checkpoint(tmp_path / "x.pth")
    assert not (tmp_path / "ran").exists()


def test_a_later_version_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoints, "VERSION", 99)
    save_checkpoint({}, tmp_path / "last.pth")
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match="version 99"):
        load_checkpoint(tmp_path)


def test_a_missing_checkpoint_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"there is no .*last\.pth"):
        load_checkpoint(tmp_path)
