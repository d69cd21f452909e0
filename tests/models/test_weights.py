"""Files of weights: one reader, and one wording for what cannot be read."""

import os
import zipfile
from argparse import Namespace
from datetime import date
from pathlib import Path, PurePosixPath

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file

from fastkd import create_teacher
from fastkd.models import load_released_checkpoint, weights
from fastkd.models.weights import (
    CRC_KEY,
    NO_CRC,
    ChecksumError,
    FileKind,
    UnreadableError,
    file_kind,
    held_weights,
    read_file,
    verifying,
    write_crc,
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
    "date": (
        lambda path: torch.save({"from": date(2026, 1, 1)}, path),
        r"holds more than plain state, datetime\.date, and is not loaded.*weights_only=False",
    ),
    "array": (
        lambda path: torch.save({"from": np.zeros(2)}, path),
        r"holds more than plain state, numpy\.\S+, and is not loaded.*weights_only=False",
    ),
    "moment": (  # of a type that the reader of scalars does not know
        lambda path: torch.save({"from": np.datetime64("2026")}, path),
        r"holds more than plain state, numpy\.dtypes\.\w+, and is not loaded.*weights_only=False",
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


@pytest.mark.parametrize(
    ("value", "read"),
    [
        (np.float64(1.5), 1.5),
        (np.float32(0.5), 0.5),
        (np.int64(7), 7),
        (np.bool_(True), True),
        (np.str_("cat"), "cat"),
        (Path("/data/run"), PurePosixPath("/data/run")),
    ],
)
def test_numbers_of_numpy_and_paths_beside_the_weights_are_read(tmp_path, value, read):
    torch.save({"model": {"a": torch.ones(2)}, "args": {"x": [value]}}, tmp_path / "x.pth")
    content = read_file(tmp_path / "x.pth")
    assert content["args"]["x"] == [read]
    assert type(content["args"]["x"][0]) is type(read)
    assert torch.equal(held_weights(content, "x")["a"], torch.ones(2))


WEIGHTS = {f"w{n}": torch.arange(2000.0) + n for n in range(12)}


def write_pth(path):
    torch.save({"model": WEIGHTS, "epoch": 3}, path)


def write_export(path):
    """As `export` does; the mean is what a wrong accuracy could come from."""
    save_file(WEIGHTS, path, {"fastkd_version": "0.1", "mean": "[0.5, 0.5, 0.5]", CRC_KEY: NO_CRC})
    write_crc(path)


def content_of(path):
    held = read_file(path)
    if path.suffix == ".pth":
        return {**held["model"], "rest": {k: v for k, v in held.items() if k != "model"}}
    return {**held, "rest": weights.metadata(path)}


@pytest.mark.parametrize(("name", "write"), [("x.pth", write_pth), ("x.safetensors", write_export)])
def test_no_single_wrong_bit_is_loaded(tmp_path, name, write):
    path = tmp_path / name
    write(path)
    whole_bytes, right = path.read_bytes(), content_of(path)
    random = np.random.default_rng(0)
    head = 8 + int.from_bytes(whole_bytes[:8], "little")  # of safetensors: names, shapes, metadata
    tail = len(whole_bytes) - 2500  # of a zip: its directory
    first, last = (0, head) if name == "x.safetensors" else (tail, len(whole_bytes))
    places = [*random.integers(len(whole_bytes), size=100), *random.integers(first, last, size=100)]
    refused = 0
    for place in places:
        changed = bytearray(whole_bytes)
        changed[place] ^= 1 << int(random.integers(8))
        path.write_bytes(changed)
        try:
            held = content_of(path)
        except UnreadableError:
            refused += 1
            continue
        assert held["rest"] == right["rest"]
        assert all(torch.equal(held[key], right[key]) for key in WEIGHTS)
    assert refused > 140  # the others were in what nothing reads


@pytest.mark.parametrize(("name", "write"), [("x.pth", write_pth), ("x.safetensors", write_export)])
def test_zeros_in_the_middle_of_a_file_are_found(tmp_path, name, write):
    path = tmp_path / name
    write(path)
    content = bytearray(path.read_bytes())
    content[len(content) // 2 : len(content) // 2 + 512] = bytes(512)
    path.write_bytes(content)
    with pytest.raises(ChecksumError, match=f"{name} is damaged, or saved without CRC.*no-verify"):
        read_file(path)
    with verifying(False):
        assert len(read_file(path)) == {"x.pth": 2, "x.safetensors": 12}[name]
    with pytest.raises(ChecksumError):
        read_file(path)


def test_a_checkpoint_saved_without_crc_needs_the_flag(tmp_path):
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"model": model().state_dict()}, tmp_path / "x.pth")
    finally:
        torch.serialization.set_crc32_options(True)
    for taker in ("test_vit", model()):
        with pytest.raises(ChecksumError, match=r"x\.pth .*saved without CRC.*verify=False"):
            create_teacher(taker, checkpoint=tmp_path / "x.pth")
    create_teacher("test_vit", checkpoint=tmp_path / "x.pth", verify=False)


def test_formats_without_a_checksum_are_read_as_they_are(tmp_path):
    torch.save({"a": torch.ones(2)}, tmp_path / "x.pth", _use_new_zipfile_serialization=False)
    assert not zipfile.is_zipfile(tmp_path / "x.pth")
    save_file({"a": torch.ones(2)}, tmp_path / "x.safetensors")
    for name in ("x.pth", "x.safetensors"):
        assert torch.equal(read_file(tmp_path / name)["a"], torch.ones(2))


def test_an_export_without_its_checksum_is_damaged(tmp_path):
    save_file(WEIGHTS, tmp_path / "x.safetensors", {"fastkd_version": "0.1"})
    with pytest.raises(ChecksumError):
        read_file(tmp_path / "x.safetensors")


def test_a_file_of_a_machine_of_another_byte_order_is_read(tmp_path):
    path = tmp_path / "x.pth"
    torch.save({"a": torch.arange(4.0)}, path)

    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in records.items():
            if name.endswith("/data/0"):
                content = np.frombuffer(content, "<f4").astype(">f4").tobytes()
            archive.writestr(name, b"big" if name.endswith("byteorder") else content)
    assert file_kind(path) is FileKind.WEIGHTS  # torch ended the process here
    assert torch.equal(read_file(path)["a"], torch.arange(4.0))


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_record_that_is_there_twice_is_damage(tmp_path):
    path = tmp_path / "x.pth"
    torch.save({"a": torch.arange(4.0)}, path)
    with zipfile.ZipFile(path, "a") as archive:
        name = next(name for name in archive.namelist() if name.endswith("/data/0"))
        archive.writestr(name, bytes(16))
    with pytest.raises(ChecksumError, match=r"x\.pth .*twice"):
        read_file(path)
