"""Files of other people, damaged in every field: one error that names the file and the field."""

import json

import pytest
import timm
import torch
from safetensors.torch import save_file

from fastkd.config import Recipe
from fastkd.inference.open_model import open_model
from fastkd.models.weights import verifying

CONFIG = {
    "architecture": "test_vit",
    "num_classes": 3,
    "model_args": {"img_size": 32},
    "pretrained_cfg": {
        "input_size": [3, 32, 32], "mean": [0.5] * 3, "std": [0.5] * 3, "num_classes": 3,
        "crop_pct": 0.9, "interpolation": "bicubic", "label_names": ["a", "b", "c"],
    },
}  # fmt: skip
METADATA = {
    "fastkd_version": "0.1", "architecture": "test_vit", "model_args": '{"img_size": 32}',
    "num_classes": "3", "input_size": "[3, 32, 32]", "mean": "[0.5, 0.5, 0.5]",
    "std": "[0.5, 0.5, 0.5]", "interpolation": "bicubic", "crop_pct": "0.9",
}  # fmt: skip
GONE = object()


@pytest.fixture(scope="module")
def weights():
    return timm.create_model("test_vit", num_classes=3, img_size=32).state_dict()


def changed(content, field, value):
    """A copy whose field, ``outer.inner`` for one of an inner mapping, is another or missing."""
    outer, _, inner = field.partition(".")
    value = changed(content[outer], inner, value) if inner else value
    kept = {name: item for name, item in content.items() if name != outer}
    return kept if value is GONE else {**kept, outer: value}


def refused(source, *names, **options):
    with pytest.raises(ValueError) as error:
        open_model(source, caller="evaluate", **options)
    for name in names:
        assert str(name) in str(error.value)
    assert "\n" not in str(error.value)


def folder(path, weights, config):
    (path / "config.json").write_bytes(config)
    save_file(weights, path / "model.safetensors")
    return path


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"5", b"\xff\xfe{", b"[" * 100_000, b'{"architecture": "test_vit"'],
    ids=lambda content: content[:9].decode("latin-1"),
)
def test_a_config_that_is_no_json_is_named(tmp_path, weights, content):
    folder(tmp_path, weights, content)
    refused(f"local-dir:{tmp_path}", tmp_path / "config.json")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("architecture", GONE),
        ("architecture", 5),
        ("architecture", "nix"),
        ("model_args", [1]),
        ("model_args", {"nix": 1}),
        ("model_args", {"img_size": "nix"}),
        ("num_classes", "nix"),
        ("num_classes", -1),
        ("num_classes", float("nan")),
        ("pretrained_cfg", ["nix"]),
        ("pretrained_cfg.mean", "nix"),
        ("pretrained_cfg.mean", [None] * 3),
        ("pretrained_cfg.std", [0, 0, 0]),
        ("pretrained_cfg.input_size", [32, 32]),
        ("pretrained_cfg.input_size", "nix"),
        ("pretrained_cfg.input_size", [3, 32, 10**9]),
        ("pretrained_cfg.crop_pct", "nix"),
        ("pretrained_cfg.crop_pct", 5),
        ("pretrained_cfg.interpolation", "nix"),
        ("pretrained_cfg.label_names", [1, 2, 3]),
    ],
    ids=str,
)
def test_a_config_with_a_wrong_field_is_named_with_it(tmp_path, weights, field, value):
    folder(tmp_path, weights, json.dumps(changed(CONFIG, field, value)).encode())
    names = [tmp_path]
    if value not in ("nix", {"nix": 1}, {"img_size": "nix"}):
        names.append(field.split(".")[-1])
    refused(f"local-dir:{tmp_path}", *names)


@pytest.mark.parametrize("content", [b"", b"garbage", b"\0" * 100, None])
def test_weights_that_timm_cannot_read_are_named(tmp_path, weights, content):
    folder(tmp_path, weights, json.dumps(CONFIG).encode())
    file = tmp_path / "model.safetensors"
    file.unlink() if content is None else file.write_bytes(content)
    refused(f"local-dir:{tmp_path}", "evaluate", tmp_path)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *((field, GONE) for field in ("architecture", "model_args", "input_size", "mean", "std")),
        *((field, "{") for field in ("model_args", "input_size", "mean", "num_classes")),
        ("model_args", "[1]"),
        ("model_args", "[" * 100_000),
        ("model_args", '{"nix": 1}'),
        ("input_size", "[3]"),
        ("input_size", "{}"),
        ("mean", "null"),
        ("mean", '"x"'),
        ("std", "[0.5, 0.5, NaN]"),
        ("crop_pct", '"x"'),
        ("crop_pct", "9"),
        ("num_classes", "9" * 5000),
        ("num_classes", "-3"),
        ("label_names", "5"),
        ("interpolation", "nix"),
    ],
    ids=lambda value: str(value)[:9],
)
def test_an_export_with_a_wrong_field_is_named_with_it(tmp_path, weights, field, value):
    file = tmp_path / "student.safetensors"
    save_file(weights, file, metadata=changed(METADATA, field, value))
    names = [file] if value == '{"nix": 1}' else [file, field]
    with verifying(False):  # made here, it has no checksum
        refused(file, *names)
        refused("test_vit", *names, checkpoint=file)


def run_of(weights):
    return {
        "format": "fastkd-checkpoint", "version": 2, "state_dict": weights,
        "recipe": Recipe(model="test_vit", img_size=32).to_dict(), "img_size": 32,
        "num_classes": 3, "classes": ["a", "b", "c"], "measured": {"top1": 1.0},
        "input": {"size": (3, 32, 32), "mean": (0.5,) * 3, "std": (0.5,) * 3},
    }  # fmt: skip


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *((field, GONE) for field in ("recipe", "state_dict", "num_classes", "img_size", "input")),
        *((field, None) for field in ("recipe", "state_dict", "input")),
        *((field, "nix") for field in ("recipe", "num_classes", "img_size", "measured", "weights")),
        ("recipe", {"nix": 1}),
        ("input", {"size": (3, 32, 32)}),
        ("input.size", 5),
        ("input.std", (0.0,) * 3),
        ("classes", 5),
        ("classes", [1, 2]),
        ("state_dict", [1]),
        ("state_dict", {"a": 1}),
        ("measured", {"top1": "nix"}),
        ("weights", [1]),
    ],
    ids=str,
)
def test_a_checkpoint_with_a_wrong_field_is_named_with_it(tmp_path, weights, field, value):
    file = tmp_path / "last.pth"
    torch.save(changed(run_of(weights) | {"weights": "raw"}, field, value), file)
    refused(file, file, field.split(".")[0])
    refused(tmp_path, file, field.split(".")[0])


def test_a_checkpoint_without_what_a_student_can_do_without_is_read(tmp_path, weights):
    state = run_of(weights)
    for field in ("classes", "measured"):
        state = changed(state, field, GONE)
    torch.save(state, tmp_path / "last.pth")
    assert open_model(tmp_path).num_classes == 3


@pytest.mark.parametrize("content", [{1: 2}, [1], {"model": None}, {"state_dict": {"a": 5}}, "x"])
def test_other_content_is_named(tmp_path, content):
    torch.save(content, tmp_path / "w.pth")
    refused(tmp_path / "w.pth", tmp_path / "w.pth")
    refused("test_vit", tmp_path / "w.pth", checkpoint=tmp_path / "w.pth")


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"source": ""}, "model"),
        ({"source": "test_vit", "checkpoint": " "}, "checkpoint"),
        ({"source": "test_vit", "img_size": 0}, "img_size"),
        ({"source": "test_vit", "img_size": (32, -1)}, "img_size"),
        ({"source": "test_vit", "img_size": 10**6}, "img_size"),
        ({"source": "test_vit", "num_classes": -1}, "num_classes"),
    ],
    ids=str,
)
def test_an_argument_out_of_range_is_refused(options, name):
    with pytest.raises(ValueError, match=f"open_model: {name} must"):
        open_model(**options, pretrained=False)


def test_a_config_whose_number_of_classes_contradicts_its_arguments_is_refused(tmp_path, weights):
    config = {**CONFIG, "model_args": {"img_size": 32, "num_classes": 3}}
    for count, word in ((9, "9 classes"), ("9", "num_classes")):
        folder(tmp_path, weights, json.dumps({**config, "num_classes": count}).encode())
        refused(f"local-dir:{tmp_path}", tmp_path, word)
