"""Evaluation of modules, runs and their weights."""

import json
import shutil
import tarfile
from pathlib import Path

import pytest
import timm
import torch
from torch.utils.data import TensorDataset

from fastkd.data.transforms import InputSpec
from fastkd.inference import evaluate as evaluation
from fastkd.inference.open_model import classes_of, weights_to_choose
from fastkd.inference.predict import predict
from fastkd.models import create_student
from fastkd.training import Recipe, evaluate, export, load_student, train
from fastkd.training.build import resolve_teacher
from fastkd.utils import progress
from tests.harness.tiny import FAST, image_folder, tensor_data, vit

CPU = {"device": "cpu", "workers": 0}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    root = tmp_path_factory.mktemp("run")
    folder = image_folder(root / "images", train=6, val=3)
    options = {"epochs": 2, "warmup_epochs": 0, "batch_size": 6, "img_size": 32, "amp": "none"}
    options |= {"lr": 1e-3, "lr_scaling": False}
    result = train(
        "test_vit", None, folder, root / "run", **options, ema_decay=0.5, quiet=True, **CPU
    )
    return folder, root / "run", result


@pytest.mark.parametrize(("weights", "field"), [("raw", "top1"), ("ema", "ema_top1")])
def test_a_run_evaluates_to_what_training_measured(run, weights, field):
    folder, output, result = run
    measured = evaluate(output, folder, weights=weights, **CPU)
    assert measured["top1"] == getattr(result, field)
    assert (measured["count"], measured["top5"], measured["weights"]) == (9, None, weights)


def remembering(run, tmp_path, **measured):
    """The run's checkpoint as if its last evaluation had measured this."""
    state = torch.load(run[1] / "last.pth", weights_only=True)
    torch.save(state | {"measured": measured}, tmp_path / "last.pth")
    return tmp_path / "last.pth"


@pytest.mark.parametrize(
    ("top1", "ema_top1", "expected"), [(9.0, 8.0, "raw"), (8.0, 9.0, "ema"), (9.0, 9.0, "raw")]
)
def test_auto_takes_the_weights_that_the_run_measured_to_be_better(
    run, tmp_path, top1, ema_top1, expected
):
    checkpoint = remembering(run, tmp_path, top1=top1, ema_top1=ema_top1)
    assert evaluate(checkpoint, run[0], **CPU)["weights"] == expected


@pytest.mark.parametrize("name", ["last.pth", "best.pth"])
def test_a_checkpoint_remembers_what_was_measured_at_its_epoch(run, name):
    _, output, result = run
    state = torch.load(output / name, weights_only=True)
    record = result.history[state["position"]["epoch"] - 1]
    assert state["measured"] == {n: record[n] for n in ("top1", "ema_top1")}


def test_a_young_average_is_not_taken_for_the_model(tmp_path):
    data, model = tensor_data(), vit()
    options = FAST | {"epochs": 12, "lr": 1e-2, "ema_decay": 0.9999}
    result = train(model, None, data, tmp_path, **options)
    assert result.top1 > 80 > result.ema_top1
    assert evaluate(vit(), data, checkpoint=tmp_path, **CPU)["top1"] == result.top1


def test_a_run_is_a_checkpoint_for_a_timm_name_too(run):
    folder, output, result = run
    measured = evaluate(
        "test_vit", folder, checkpoint=output / "last.pth", img_size=32, crop_pct=0.875, **CPU
    )
    assert measured["top1"] == max(result.top1, result.ema_top1)


def test_a_run_can_be_evaluated_at_another_size(run):
    folder, output, _ = run
    assert evaluate(output, folder, img_size=48, **CPU)["count"] == 9


def test_a_module_of_a_fixed_size_refuses_another(run):
    folder, _, _ = run
    module = vit(in_chans=3, img_size=32, num_classes=3)
    with pytest.raises(ValueError, match=r"images are 48 x 48, but .* built for 32 x 32"):
        evaluate(module, folder, img_size=48, **CPU)


def test_a_timm_model_is_evaluated_as_timm_does(monkeypatch, run):
    seen = {}

    def record(opened, recipe, spec, *rest):
        seen.update(size=spec.size, pct=recipe.crop_pct, mode=recipe.crop_mode)
        raise StopIteration

    monkeypatch.setattr(evaluation, "eval_loader", record)
    model = timm.create_model("test_resnet", num_classes=3)
    model.pretrained_cfg |= {
        "test_input_size": (3, 192, 192),
        "test_crop_pct": 0.97,
        "crop_mode": "squash",
    }
    with pytest.raises(StopIteration):
        evaluate(model, run[0], **CPU)
    assert seen == {"size": (3, 192, 192), "pct": 0.97, "mode": "squash"}


def test_a_long_evaluation_shows_progress_unless_quiet(run, monkeypatch, capsys):
    monkeypatch.setattr(progress, "LINE_EVERY_SECONDS", 0.0)
    evaluate(run[1], run[0], batch_size=5, **CPU)
    lines = capsys.readouterr().err.splitlines()
    shown = [line.split(", about")[0] for line in lines]
    assert shown == ["evaluate: 5 of 9 images", "evaluate: 9 of 9 images"]
    evaluate(run[1], run[0], batch_size=5, quiet=True, **CPU)
    assert capsys.readouterr().err == ""


def test_options_of_images_are_refused_for_tensors():
    with pytest.raises(ValueError, match=r"crop_pct=0\.9 has no effect: the data are tensors"):
        evaluate(vit(), tensor_data(), crop_pct=0.9, **CPU)


def test_one_folder_of_classes_will_do(run):
    folder, output, _ = run
    assert evaluate(output, folder / "val", **CPU) == evaluate(output, folder, **CPU)


def test_a_loaded_student_is_the_trained_one(run):
    _, output, _ = run
    loaded = load_student(output, "raw")
    state = torch.load(output / "last.pth", weights_only=True)["state_dict"]
    assert all(
        torch.equal(value, state[name]) for name, value in loaded.network.state_dict().items()
    )
    assert loaded.trained_on.size == (3, 32, 32)


def test_a_module_is_evaluated_as_it_is():
    data = tensor_data()
    assert evaluate(vit(), data, **CPU) == evaluate(vit(), data[1], **CPU)


def test_a_modules_run_needs_the_module(tmp_path):
    data, model = tensor_data(), vit()
    options = {"epochs": 1, "warmup_epochs": 0, "batch_size": 16, "augment": "none"}
    train(model, None, data, tmp_path, **options, quiet=True, **CPU)
    with pytest.raises(ValueError, match="hand the module over"):
        evaluate(tmp_path, data, **CPU)
    measured = evaluate(vit(seed=4), data, checkpoint=tmp_path, weights="raw", **CPU)
    assert measured["loss"] == pytest.approx(evaluate(model, data, **CPU)["loss"])


def test_a_run_of_timms_module_needs_no_module(run, tmp_path):
    student = create_student("test_vit", "lift", width=96, num_classes=3, img_size=32)
    options = {"epochs": 1, "warmup_epochs": 0, "batch_size": 6, "img_size": 32, "amp": "none"}
    options |= {"lr": 1e-3, "lr_scaling": False}
    output = tmp_path / "run"
    train(student, None, run[0], output, **options, ema_decay=None, quiet=True, **CPU)
    recipe = Recipe.load(output)
    assert (recipe.model, recipe.variant, recipe.width) == ("test_vit", "lift", 96)
    measured = evaluate(output, run[0], **CPU)
    assert evaluate(export(output).path, run[0], **CPU)["loss"] == measured["loss"]
    spec = InputSpec((3, 32, 32), (0.5,) * 3, (0.5,) * 3)
    teacher = resolve_teacher(output, Recipe(), spec)
    assert torch.equal(teacher.model.head.weight, student.head.weight)


def test_weights_that_are_not_there_are_refused(tmp_path):
    options = {"epochs": 1, "warmup_epochs": 0, "batch_size": 16, "augment": "none"}
    train(vit(), None, tensor_data(), tmp_path, **options, ema_decay=None, quiet=True, **CPU)
    with pytest.raises(ValueError, match="no EMA weights"):
        evaluate(vit(), tensor_data(), checkpoint=tmp_path, weights="ema", **CPU)


def test_unknown_options_are_refused():
    with pytest.raises(ValueError, match="unknown option 'crop'"):
        evaluate(vit(), tensor_data(), crop=0.9, **CPU)


def released(folder):
    base = {"img_size": 32, "patch_size": 16, "embed_dim": 64, "num_heads": 1, "depth": 1}
    student = create_student("deit_tiny_patch16_224", "widelast", width=64, num_classes=3, **base)
    torch.save(student.state_dict(), folder / "released.pth")
    return student, folder / "released.pth"


def test_a_released_checkpoint_is_evaluated_as_the_module_would_be(run, tmp_path):
    student, path = released(tmp_path)
    # A file is evaluated as the paper does; the module still has its base's crop, which is timm's.
    assert evaluate(path, run[0], **CPU) == evaluate(student, run[0], crop_pct=0.875, **CPU)
    assert evaluate(path, run[0], img_size=64, **CPU)["count"] == 9


def test_a_released_checkpoint_has_no_weights_to_choose_from(run, tmp_path):
    with pytest.raises(
        ValueError, match=r"evaluate: .*weights='ema' chooses in a fastkd checkpoint"
    ):
        evaluate(released(tmp_path)[1], run[0], weights="ema", **CPU)


def test_a_file_that_was_not_released_asks_for_the_models_name(run, tmp_path):
    torch.save(timm.create_model("test_vit", num_classes=3).state_dict(), tmp_path / "vit.pth")
    with pytest.raises(ValueError, match=r"evaluate: .*vit\.pth is no released checkpoint.*name"):
        evaluate(tmp_path / "vit.pth", run[0], **CPU)


def test_an_exported_folder_is_evaluated_as_its_run(run, tmp_path):
    folder = export(run[1], output=tmp_path / "student", weights="raw").path
    measured = evaluate(folder, run[0], **CPU)
    assert measured == evaluate(run[1], run[0], weights="raw", **CPU) | {"weights": "as given"}
    assert weights_to_choose("evaluate", folder) == ()


def test_a_released_checkpoint_can_be_a_runs_teacher(tmp_path):
    student, path = released(tmp_path)
    spec = InputSpec((3, 32, 32), (0.5, 0.5, 0.5), (0.2, 0.2, 0.2))
    teacher = resolve_teacher(str(path), Recipe(), spec)
    assert torch.equal(teacher.model.head.weight, student.head.weight)
    assert resolve_teacher(path, Recipe(teacher_img_size=64), spec).input_size == (64, 64)


class Named(TensorDataset):
    """The evaluation set of `tensor_data` with names, in which letters stand for its classes."""

    def __init__(self, classes, letters="abcdef"):
        images, labels = tensor_data()[1].tensors
        names = [letters[label] for label in labels]
        kept = [index for index, name in enumerate(names) if name in classes]
        super().__init__(images[kept], torch.tensor([classes.index(names[i]) for i in kept]))
        self.classes = list(classes)


def named_vit(names="abcdef"):
    model = vit()
    model.pretrained_cfg = {"label_names": list(names)}
    return model


@pytest.mark.parametrize("classes", ["fedcba", "be"], ids=["another order", "a subset"])
def test_labels_are_a_models_classes_by_name(classes):
    inputs, labels = Named(classes).tensors
    mapped = TensorDataset(inputs, torch.tensor(["abcdef".index(classes[n]) for n in labels]))
    expected = evaluate(vit(), mapped, **CPU)
    assert evaluate(named_vit(), Named(classes), **CPU) == expected
    by_number = evaluate(named_vit(), Named(classes), classes_by="number", **CPU)
    assert by_number == evaluate(vit(), TensorDataset(inputs, labels), **CPU) != expected


def test_classes_that_a_model_does_not_have_are_refused():
    with pytest.raises(ValueError, match=r"evaluate: 1 of the 2 classes .*: 'x' .*classes_by"):
        evaluate(named_vit(), Named("bx", "abcxef"), **CPU)


def test_a_module_without_num_classes_is_asked_for_its_logits(caplog):
    class Bare(torch.nn.Module):
        def forward(self, images):
            return images.flatten(1)[:, :3]

    with pytest.raises(ValueError, match="the model has 3 logits for the 6 classes of the data"):
        evaluate(Bare(), Named("abcdef"), **CPU)
    assert evaluate(Bare(), Named("abc"), **CPU)["count"] == 15
    assert "classes are taken by number, 3 of the data and 3 of the model" in caplog.text


def test_a_label_beyond_a_models_classes_is_an_error_that_names_it():
    images, labels = tensor_data()[1].tensors
    with pytest.raises(ValueError, match="label of sample 5 must be 0 to 5, got 105"):
        evaluate(vit(), TensorDataset(images, labels + 100 * (labels == 5)), **CPU)


def test_a_runs_classes_are_found_by_name_in_every_form(run, tmp_path):
    folder, output, _ = run
    subset = tmp_path / "subset"
    for name in ("green", "red"):
        shutil.copytree(folder / "val" / name, subset / name)
    guesses = predict(output, subset, top=1, device="cpu", workers=0, quiet=True).images
    right = [Path(image.image).parent.name == image.guesses[0].name for image in guesses]
    expected = 100 * sum(right) / len(right)
    listed = {"classes": ["red", "green"], "splits": {"val": {"filenames": ["val-0.tar"]}}}
    with tarfile.open(tmp_path / "subset.tar", "w") as tar:
        tar.add(subset, "")
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "_info.json").write_text(json.dumps(listed))
    with tarfile.open(tmp_path / "shards" / "val-0.tar", "w") as tar:
        for number, path in enumerate(sorted(subset.rglob("*.jpg"))):
            label = tmp_path / "label"
            label.write_text(str(listed["classes"].index(path.parent.name)))
            tar.add(path, f"{number}.jpg")
            tar.add(label, f"{number}.cls")
    exported = export(output, output=tmp_path / "student").path
    for data in (subset, tmp_path / "subset.tar", tmp_path / "shards"):
        assert evaluate(output, data, **CPU)["top1"] == pytest.approx(expected)
    assert evaluate(exported, subset, **CPU)["top1"] == pytest.approx(expected)


@pytest.mark.parametrize("count", [1000, 11821, 21841])
def test_a_model_of_an_imagenet_has_its_names(count):
    model = torch.nn.Module()
    model.num_classes = count
    classes = classes_of(model)
    assert classes.guessed and len(classes.names) == count
    assert not classes_of(model, ["a", "b"]).guessed
    assert classes_of(torch.nn.Identity()).names == {}


def test_names_of_another_head_are_not_a_models():
    model = named_vit("abcdefgh")
    assert classes_of(model).names == {}


def test_ids_and_descriptions_of_a_configuration_both_count():
    model = named_vit()
    model.pretrained_cfg["label_descriptions"] = {letter: letter.upper() for letter in "abcdef"}
    assert classes_of(model).names[1] == ("b", "B")
