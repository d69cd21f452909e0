"""A source means the same model to every public function that takes one."""

import copy
import json
import shutil

import pytest
import timm
import torch
from huggingface_hub import constants
from safetensors.torch import save_file
from torch.utils.data import TensorDataset

import fastkd
from fastkd.checkpoint import LAST
from fastkd.inference.open_model import open_model
from fastkd.models import create_student, hub_download
from tests.harness.tiny import FAST, image_folder, made_run

SOURCES = [
    *("name", "hub model", "hub file", "local-dir", "run", "checkpoint", "exported folder"),
    *("exported file", "exported local-dir", "released", "module"),
]
COMMIT = "a" * 40
CPU = {"device": "cpu", "workers": 0}


def in_the_hubs_cache(cache, repo, *files):
    folder = cache / f"models--{repo.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text(COMMIT)
    snapshot = folder / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    for file in files:
        shutil.copy(file, snapshot / file.name)


def foreign_folder(folder, model):
    """A model in timm's layout that fastkd did not write."""
    folder.mkdir()
    save_file(model.state_dict(), folder / "model.safetensors")
    config = {
        "architecture": "test_vit",
        "num_classes": 3,
        "model_args": {"img_size": 32},
        "pretrained_cfg": {
            **{"input_size": [3, 32, 32], "mean": [0.5] * 3, "std": [0.5] * 3, "num_classes": 3},
            **{"crop_pct": 0.9, "interpolation": "bicubic", "fixed_input_size": False},
            **{"first_conv": "patch_embed.proj", "classifier": "head"},
        },
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Every kind of source on this machine, the hub's cache, and two images a class."""
    root = tmp_path_factory.mktemp("sources")
    torch.manual_seed(3)
    named = timm.create_model("test_vit", num_classes=1000)
    small = timm.create_model("test_vit", num_classes=3, img_size=32)
    base = {"img_size": 32, "patch_size": 16, "embed_dim": 64, "num_heads": 1, "depth": 1}
    released = create_student("deit_tiny_patch16_224", "widelast", width=64, num_classes=3, **base)
    torch.save({"model": released.state_dict()}, root / "released.pth")
    save_file(named.state_dict(), root / "model.safetensors")
    in_the_hubs_cache(root / "hub", "timm/test_vit.r160_in1k", root / "model.safetensors")
    layout = foreign_folder(root / "foreign", small)
    in_the_hubs_cache(root / "hub", "owner/whole", *layout.iterdir())
    in_the_hubs_cache(root / "hub", "owner/files", root / "released.pth")
    run = made_run(root / "run", "lift", 96, classes=["blue", "green", "red"])
    exported = fastkd.export(run).path
    sources = {
        "name": "test_vit.r160_in1k",
        "hub model": "hf-hub:owner/whole",
        "hub file": "hf_hub:owner/files/released.pth",
        "local-dir": f"local-dir:{layout}",
        "run": run,
        "checkpoint": str(run / LAST),
        "exported folder": exported,
        "exported file": fastkd.export(run, "safetensors").path,
        "exported local-dir": f"local-dir:{exported}",
        "released": root / "released.pth",
        "module": small,
    }
    return root, sources, image_folder(root / "images", train=2, val=1)


@pytest.fixture(params=SOURCES)
def source(request, made, monkeypatch):
    monkeypatch.setattr(hub_download, "_hub_answers", lambda: False)  # what is cached will do
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(made[0] / "hub"))
    return copy.deepcopy(made[1][request.param])  # a module is trained and frozen in place


@pytest.fixture
def expected(source):
    return open_model(source)


def logits(network, size=32):
    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return network.eval()(images)


def size_of(opened):
    return opened.network.patch_embed.img_size[0]


def test_it_can_teach(source, expected):
    teacher = fastkd.create_teacher(source)
    size = size_of(expected)
    assert torch.equal(logits(teacher.model, size), logits(expected.network, size))
    fed = expected.trained_on or expected.preprocessing.input_spec(expected.network, None)
    assert (teacher.mean, teacher.std) == (fed.mean, fed.std)


def test_it_can_teach_a_run(source, expected, made):
    classes = expected.num_classes
    student = timm.create_model("test_vit", num_classes=classes, img_size=32)
    options = FAST | {"epochs": 1, "batch_size": 6, "img_size": 32, "alpha": 0.5}
    result = fastkd.train(student, source, made[2], feature_weight=0.0, **options)
    assert len(result.history) == 1


def test_a_run_can_start_from_it(source, expected, made, tmp_path):
    size, classes = size_of(expected), expected.num_classes
    images = torch.randn(4, 3, size, size)
    data = TensorDataset(images, torch.arange(4) % classes)
    options = FAST | {"epochs": 1, "batch_size": 2, "lr": 1e-30, "min_lr": 0.0, "ema_decay": None}
    named = source == "test_vit.r160_in1k"
    if named:  # a student by its name alone starts from random weights, which have no tag
        with pytest.raises(ValueError, match=r"student: the tag of 'test_vit\.r160_in1k'"):
            fastkd.train(source, None, (data, data), tmp_path / "run", **options)
        source, options["num_classes"] = "test_vit", classes
    before = logits(expected.network, size)
    drawn = torch.random.get_rng_state()
    fastkd.train(source, None, (data, data), tmp_path / "run", **options)
    assert torch.equal(torch.random.get_rng_state(), drawn)
    run = tmp_path / "run"
    if fastkd.Recipe.load(run).model.startswith("module:"):  # the released one of this test is tiny
        rebuilt = open_model(copy.deepcopy(expected.network), checkpoint=run)
    else:
        rebuilt = open_model(run)
    same = torch.equal(logits(rebuilt.network, size), before)
    assert same == (not named)


def test_it_is_evaluated(source, expected, made):
    measured = fastkd.evaluate(source, made[2], classes_by="number", **CPU)
    assert (measured["count"], measured["weights"]) == (3, expected.weights)


def test_it_predicts(source, expected, made):
    found = fastkd.predict(source, made[2] / "val", top=1, quiet=True, **CPU)
    assert len(found.images) == 3 and found.weights == expected.weights
    if expected.classes is not None:
        assert {p.guesses[0].name for p in found.images} <= set(expected.classes)


def test_it_is_analyzed(source, expected, made):
    report = fastkd.analyze(
        source, made[2], layers="last", images=3, permutations=0, quiet=True, **CPU
    )
    assert len(report.models) == 1


def test_it_is_exported(source, expected, tmp_path):
    exported = fastkd.export(source, "timm", tmp_path / "out")
    loaded = open_model(exported.path)
    size = size_of(expected)
    assert torch.equal(logits(loaded.network, size), logits(expected.network, size))
    assert (loaded.name, loaded.classes) == (exported.architecture, expected.classes)
    spec = expected.trained_on or expected.preprocessing.input_spec(expected.network, None)
    assert loaded.trained_on == spec


def test_it_teaches_in_timms_loop(source, expected):
    from fastkd.integrations.timm import FeatureMapDistillationTask

    size = size_of(expected)
    student = timm.create_model("test_vit", num_classes=expected.num_classes, img_size=size)
    task = FeatureMapDistillationTask(
        student, source, alpha=0.5, feature_weight=0.0, verbose=False, device=torch.device("cpu")
    )
    images = torch.randn(2, 3, size, size)
    assert task(images, torch.tensor([0, 1]))["loss"].isfinite()
    assert torch.equal(logits(task.teacher.model, size), logits(expected.network, size))
