"""One model, whatever stands for it: a run, its checkpoint, or what was exported of it."""

import argparse
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

from fastkd import create_teacher
from fastkd.analysis.tokens import open_subject
from fastkd.checkpoint import LAST, CheckpointError, load_checkpoint, save_checkpoint
from fastkd.data.transforms import InputSpec
from fastkd.inference.open_model import open_model, weights_to_choose
from fastkd.models import create_student
from fastkd.training import Recipe, evaluate, export, load_student
from fastkd.training.build import resolve_teacher
from tests.harness.tiny import made_run, tensor_data

CLASSES = ("blue", "green", "red")
KINDS = ["run", "checkpoint", "timm", "local-dir", "safetensors"]
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.4)
SPEC = InputSpec((3, 32, 32), (0.5,) * 3, (0.5,) * 3)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    return made_run(folder, "lift", 96, classes=list(CLASSES), interpolation="bilinear")


@pytest.fixture(scope="module")
def forms(run):
    """The same student, in all the forms in which somebody has it."""
    folder = export(run).path
    return {
        "run": run,
        "checkpoint": run / LAST,
        "timm": folder,
        "local-dir": f"local-dir:{folder}",
        "safetensors": export(run, "safetensors").path,
    }


def images(size=32):
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))


def computed(model):
    with torch.no_grad():
        return model.eval()(images())


def opened(model, checkpoint=None, weights="auto", **options):
    return open_model(model, checkpoint=checkpoint, weights=weights, caller="test", **options)


def check_is_the_runs(subject, run):
    recipe = subject.preprocessing.recipe
    assert torch.equal(computed(subject.network), computed(load_student(run).network))
    assert (recipe.mean, recipe.std, recipe.crop_pct) == (MEAN, STD, 0.9)
    assert (recipe.interpolation, subject.classes) == ("bilinear", CLASSES)


@pytest.mark.parametrize("kind", KINDS)
def test_every_form_is_opened_with_its_runs_preprocessing_and_classes(forms, run, kind):
    check_is_the_runs(opened(forms[kind]), run)


@pytest.mark.parametrize("kind", KINDS)
def test_every_form_teaches_the_same(forms, run, kind):
    spec = InputSpec((3, 48, 48), (0.5,) * 3, (0.5,) * 3)
    teacher = resolve_teacher(str(forms[kind]), Recipe(), spec)
    expected = resolve_teacher(run, Recipe(), spec)
    assert (teacher.mean, teacher.std, teacher.input_size) == (MEAN, STD, (32, 32))
    assert torch.equal(teacher(images(48)).logits, expected(images(48)).logits)
    larger = resolve_teacher(forms[kind], Recipe(teacher_img_size=64), spec)
    assert larger(images(48)).logits.shape == (2, 3) and larger.input_size == (64, 64)


@pytest.mark.parametrize("kind", KINDS)
def test_every_form_can_be_analyzed(forms, run, kind):
    subject = open_subject(forms[kind])
    assert torch.equal(computed(subject.model), computed(load_student(run).network))
    assert subject.preprocessing.recipe.mean == MEAN
    assert subject.weights.removesuffix(" (ema)") in (LAST, Path(forms[kind]).name)


@pytest.mark.parametrize("kind", ["checkpoint", "safetensors"])
def test_a_form_fills_a_module_and_brings_its_preprocessing(forms, run, kind):
    module = load_student(run, "raw").network
    subject = opened(module, forms[kind])
    assert subject.network is module
    check_is_the_runs(subject, run)


@pytest.mark.parametrize("kind", ["run", "checkpoint"])
def test_a_runs_checkpoint_beside_its_name_is_the_run(forms, run, kind):
    subject = opened("test_vit", forms[kind])
    check_is_the_runs(subject, run)
    assert subject.weights == "ema"
    assert opened("test_vit", forms[kind], "raw").weights == "raw"
    assert weights_to_choose("test", "test_vit", forms[kind]) == ("raw", "ema")


def test_an_exported_student_beside_its_name_keeps_its_preprocessing(tmp_path):
    run = made_run(tmp_path / "run", classes=list(CLASSES), interpolation="bilinear")
    path = export(run, "safetensors").path
    check_is_the_runs(opened("test_vit", path), run)
    assert create_teacher("test_vit", checkpoint=path).mean == MEAN


def test_a_teacher_by_its_name_is_fed_what_its_run_was_fed(tmp_path):
    run = made_run(tmp_path / "run")
    assert create_teacher("test_vit", checkpoint=run / LAST, img_size=32).std == STD
    teacher = resolve_teacher("test_vit", Recipe(teacher_checkpoint=str(run / LAST)), SPEC)
    assert (teacher.std, teacher.input_size) == (STD, (32, 32))


@pytest.mark.parametrize("kind", ["checkpoint", "safetensors"])
def test_another_models_name_beside_a_file_that_says_its_own_is_refused(forms, kind):
    with pytest.raises(ValueError, match="not of test_resnet: give it alone"):
        opened("test_resnet", forms[kind])


def test_a_name_builds_the_module_that_a_runs_recipe_does_not_say(tmp_path):
    run = made_run(tmp_path / "run")
    state = load_checkpoint(run)
    state["recipe"]["model"] = "module:VisionTransformer"
    save_checkpoint(state, run / LAST)
    subject = opened("test_vit", run / LAST)
    assert torch.equal(subject.network.head.weight, state["state_dict_ema"]["head.weight"])
    assert subject.preprocessing.recipe.mean == MEAN


@pytest.mark.parametrize("kind", ["run", "timm", "safetensors"])
def test_every_form_takes_another_size(forms, kind):
    subject = opened(forms[kind], img_size=64)
    assert subject.preprocessing.recipe.img_size == 64
    assert subject.network(images(64)).shape == (2, 3)


def test_weights_of_anybody_fill_a_module(tmp_path):
    module, other = (create_student("test_vit", num_classes=3, img_size=32) for _ in range(2))
    torch.save({"model": other.state_dict(), "args": argparse.Namespace(lr=1)}, tmp_path / "a.pth")
    assert torch.equal(computed(opened(module, tmp_path / "a.pth").network), computed(other))


def test_an_exported_module_that_timm_does_not_know_asks_for_it(tmp_path):
    run = made_run(tmp_path / "run")
    module = create_student("test_vit", num_classes=3, img_size=32)
    module.norm.eps = 1.0  # which timm's of this name has not
    path = export(module, "safetensors", checkpoint=run).path
    with pytest.raises(ValueError, match=r"cannot build, module:VisionTransformer: .*module"):
        opened(path)
    assert opened(module, path).preprocessing.recipe.mean == MEAN


def test_a_checkpoint_may_be_called_like_a_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"blocks": {"deep": "er"}, "pos_embed": torch.zeros(3)}, "resnet18.pth")
    with pytest.raises(ValueError, match=r"open_model: .*resnet18\.pth"):
        open_model("test_vit", checkpoint="resnet18.pth")


def test_a_folder_without_weights_names_the_checkpoints_in_it(tmp_path, run):
    (tmp_path / "best.pth").write_bytes((run / LAST).read_bytes())
    for use in (opened, open_subject, lambda path: resolve_teacher(path, Recipe(), SPEC)):
        with pytest.raises(ValueError, match=r"no last\.pth; there is best\.pth: give the file"):
            use(tmp_path)


def test_classes_are_called_as_timm_describes_them():
    model = timm.create_model("test_resnet", num_classes=2)
    model.pretrained_cfg |= {"label_names": ("n1", "n2"), "label_descriptions": {"n1": "tench"}}
    assert opened(model).classes == ("tench", "n2")


def test_a_module_in_another_size_is_a_copy(run):
    module = load_student(run).network
    changed = load_student(run, model=module, img_size=64)
    assert changed.network is not module and changed.network(images(64)).shape == (2, 3)
    assert load_student(run, model=module).network is module


def test_a_recipe_that_is_not_known_names_the_file(tmp_path):
    run = made_run(tmp_path / "run")
    state = load_checkpoint(run)
    state["recipe"]["warp_factor"] = 9
    save_checkpoint(state, run / LAST)
    for use in (load_student, export, opened):
        with pytest.raises(CheckpointError, match=r"last\.pth holds a recipe.*warp_factor"):
            use(run)


def test_a_module_with_plain_weights_has_no_choice_of_them(tmp_path):
    module = nn.Linear(2, 2)
    torch.save(module.state_dict(), tmp_path / "plain.pth")
    with pytest.raises(ValueError, match="weights='ema' chooses in a fastkd checkpoint"):
        evaluate(module, tensor_data(), checkpoint=tmp_path / "plain.pth", weights="ema")
