"""Checkpoints: atomic, safe to load, refused when they are not whole or not ours."""

import os

import pytest
import torch
from torch.serialization import get_crc32_options, set_crc32_options

from fastkd import checkpoint as checkpoints
from fastkd.checkpoint import (
    CheckpointError,
    TornCheckpointError,
    load_checkpoint,
    load_latest,
    save_checkpoint,
)
from fastkd.utils.io import remove_leftovers


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


def epochs_kept(folder):
    return {path.name: load_checkpoint(path)["epoch"] for path in folder.iterdir()}


def test_the_last_checkpoints_are_kept_and_no_more(tmp_path):
    for epoch in range(5):
        save_checkpoint({"epoch": epoch}, tmp_path / "last.pth", keep=3)
    assert epochs_kept(tmp_path) == {"last.pth": 4, "last-1.pth": 3, "last-2.pth": 2}
    save_checkpoint({"epoch": 5}, tmp_path / "last.pth", keep=2)
    assert epochs_kept(tmp_path) == {"last.pth": 5, "last-1.pth": 4}


def test_links_are_not_needed_to_keep_an_earlier_checkpoint(tmp_path, monkeypatch):
    def refuse(*paths):
        raise OSError("no links here")

    monkeypatch.setattr(os, "link", refuse)
    for epoch in range(3):
        save_checkpoint({"epoch": epoch}, tmp_path / "last.pth", keep=2)
    assert epochs_kept(tmp_path) == {"last.pth": 2, "last-1.pth": 1}


def test_a_kill_before_the_new_checkpoint_has_its_name_leaves_the_old_one(tmp_path, monkeypatch):
    for epoch in range(2):
        save_checkpoint({"epoch": epoch}, tmp_path / "last.pth", keep=2)

    class Killed(BaseException):
        pass

    replace = os.replace

    def killed(source, target):
        if os.fspath(target).endswith("last.pth"):
            raise Killed
        replace(source, target)

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(Killed):
        save_checkpoint({"epoch": 2}, tmp_path / "last.pth", keep=2)
    state, path = load_latest(tmp_path, pytest.fail)
    assert (state["epoch"], path.name) == (1, "last.pth")


def test_the_latest_whole_checkpoint_is_found_and_torn_ones_are_named(tmp_path):
    for epoch in range(4):
        save_checkpoint({"epoch": epoch}, tmp_path / "last.pth", keep=4)
    (tmp_path / "last.pth").write_bytes(b"PK torn")
    torch.save({"state_dict": {}}, tmp_path / "last-1.pth")
    told = []
    state, path = load_latest(tmp_path, told.append)
    assert (state["epoch"], path.name) == (1, "last-2.pth")
    assert ["last.pth" in told[0], "not written by fastkd" in told[1], len(told)] == [True, True, 2]


def test_without_a_whole_checkpoint_the_last_ones_error_counts(tmp_path):
    assert load_latest(tmp_path, pytest.fail) is None
    (tmp_path / "last.pth").write_bytes(b"PK torn")
    with pytest.raises(TornCheckpointError, match=r"last\.pth is torn"):
        load_latest(tmp_path, lambda reason: None)


def test_plain_text_is_no_checkpoint(tmp_path):
    (tmp_path / "last.pth").write_text("epoch,loss\n1,2.0\n")
    with pytest.raises(TornCheckpointError, match="torn"):
        load_checkpoint(tmp_path)


def test_checksums_are_written_where_torch_was_told_to_leave_them_out(tmp_path):
    set_crc32_options(False)
    try:
        save_checkpoint({"a": torch.ones(9)}, tmp_path / "last.pth")
        assert not get_crc32_options()
    finally:
        set_crc32_options(True)
    assert load_checkpoint(tmp_path)["a"].sum() == 9


def test_a_damaged_checkpoint_is_passed_over_without_a_hint_that_does_not_help(tmp_path):
    for number in range(2):
        save_checkpoint({"a": torch.full((4000,), float(number))}, tmp_path / "last.pth", keep=2)
    path = tmp_path / "last.pth"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    reasons = []
    state, found = load_latest(tmp_path, reasons.append)
    assert found.name == "last-1.pth" and state["a"][0] == 0
    assert len(reasons) == 1 and f"{path} is damaged" in reasons[0] and "verify" not in reasons[0]
    (tmp_path / "last-1.pth").unlink()
    with pytest.raises(TornCheckpointError, match="is damaged") as caught:
        load_latest(tmp_path, reasons.append)
    assert "verify" not in str(caught.value)
