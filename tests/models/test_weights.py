"""Files of weights: one reader, and one wording for what cannot be read."""

import os
from argparse import Namespace
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file

from fastkd import create_teacher
from fastkd.models import load_released_checkpoint
from fastkd.models.weights import (
    FileKind,
    UnreadableError,
    file_kind,
    held_weights,
    read_file,
)


def read_weights(path):
    return held_weights(read_file(path), path)


def model():
    return timm.create_model("test_vit", num_classes=3)


def whole(path):
    torch.save({"model": {"head.weight": torch.zeros(100, 100)}, "epoch": 3}, path)
    return path.read_bytes()


class Harmful:
    def __reduce__(self):
        return os.mkdir, ("ran",)


def write_harmful(path):
    torch.save({"model": Harmful()}, path)


UNREADABLE = {
    "empty": (lambda path: path.touch(), r"is torn or no file of weights \(it is empty\)"),
    "text": (lambda path: path.write_text("epoch,loss\n"), "is torn or no file of weights"),
    "letter": (lambda path: path.write_text("e"), "is torn or no file of weights"),
    "page": (lambda path: path.write_text("<html>404</html>"), "is torn or no file of weights"),
    "half": (lambda path: path.write_bytes(whole(path)[:20_000]), "is torn or no file of weights"),
    "harmful": (
        write_harmful,
        r"holds more than plain state, \w+\.mkdir, and is not loaded for safety",
    ),
    "path": (
        lambda path: torch.save({"from": Path("a")}, path),
        r"holds more than plain state, pathlib[\w.]*\.\w+, and is not loaded for safety",
    ),
}


@pytest.mark.parametrize("kind", UNREADABLE)
@pytest.mark.parametrize(
    "use",
    [
        read_weights,
        load_released_checkpoint,
        create_teacher,
        lambda path: create_teacher("test_vit", checkpoint=path),
        lambda path: create_teacher(model(), checkpoint=path),
    ],
    ids=["read_weights", "released", "teacher", "teacher_by_name", "module"],
)
def test_what_cannot_be_read_is_told_in_the_same_words_everywhere(kind, use, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write, told = UNREADABLE[kind]
    write(tmp_path / "x.pth")
    with pytest.raises(ValueError, match=r"x\.pth " + told) as error:
        use(tmp_path / "x.pth")
    assert "\x1b" not in str(error.value) and not (tmp_path / "ran").exists()


def test_a_torn_safetensors_file_is_told_alike(tmp_path):
    (tmp_path / "x.safetensors").write_bytes(b"nothing of the kind")
    with pytest.raises(UnreadableError, match=r"x\.safetensors is torn or no file of weights"):
        read_weights(tmp_path / "x.safetensors")


@pytest.mark.parametrize("content", [torch.zeros(3), [1, 2], {1: torch.zeros(2)}])
def test_what_names_no_weights_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "x.pth")
    with pytest.raises(UnreadableError, match=r"x\.pth holds no weights by name"):
        read_weights(tmp_path / "x.pth")


def test_memory_that_runs_out_is_not_blamed_on_the_file(tmp_path, monkeypatch):
    def full(*_, **__):
        raise MemoryError

    whole(tmp_path / "x.pth")
    monkeypatch.setattr(torch, "load", full)
    with pytest.raises(MemoryError):
        read_file(tmp_path / "x.pth")


@pytest.mark.parametrize("into", ["name", "module"])
def test_a_checkpoint_of_deits_trainer_is_read(tmp_path, into):
    given = model()
    torch.save({"model": given.state_dict(), "args": Namespace(epochs=300)}, tmp_path / "deit.pth")
    taker = "test_vit" if into == "name" else model()
    teacher = create_teacher(taker, checkpoint=tmp_path / "deit.pth")
    assert torch.equal(teacher.model.head.weight, given.head.weight)


def test_averaged_weights_come_first(tmp_path):
    state = {"model": {"a": torch.zeros(1)}, "model_ema": {"module.a": torch.ones(1)}}
    torch.save(state, tmp_path / "x.pth")
    assert read_weights(tmp_path / "x.pth") == {"a": torch.ones(1)}


def test_files_are_known_by_what_they_say(tmp_path):
    weight = {"weight": torch.zeros(2)}
    torch.save(weight, tmp_path / "plain.pth")
    torch.save({"format": "fastkd-checkpoint"}, tmp_path / "run.pth")
    (tmp_path / "torn.pth").write_bytes(b"PK")
    save_file(weight, tmp_path / "plain.safetensors")
    save_file(weight, tmp_path / "ours.safetensors", {"fastkd_version": "1"})
    kinds = {path.name: file_kind(path) for path in tmp_path.iterdir()}
    assert kinds == {
        "plain.pth": FileKind.WEIGHTS,
        "run.pth": FileKind.RUN,
        "torn.pth": FileKind.UNREADABLE,
        "plain.safetensors": FileKind.WEIGHTS,
        "ours.safetensors": FileKind.EXPORT,
    }
    assert file_kind(tmp_path) is None and file_kind(tmp_path / "none.pth") is None
