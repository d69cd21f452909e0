"""Evaluation of modules, runs and their weights."""

import pytest
import torch

from fastkd.training import evaluate, load_student, train
from tests.training.tiny import image_folder, tensor_data, vit

CPU = {"device": "cpu", "workers": 0}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    root = tmp_path_factory.mktemp("run")
    folder = image_folder(root / "images", train=6, val=3)
    options = {"epochs": 2, "warmup_epochs": 0, "batch_size": 6, "img_size": 32, "amp": "none"}
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


def test_auto_takes_the_averaged_weights(run):
    folder, output, _ = run
    assert evaluate(output / "best.pth", folder, **CPU)["weights"] == "ema"


def test_one_folder_of_classes_will_do(run):
    folder, output, _ = run
    assert evaluate(output, folder / "val", **CPU) == evaluate(output, folder, **CPU)


def test_a_loaded_student_is_the_trained_one(run):
    _, output, _ = run
    loaded = load_student(output, "raw")
    state = torch.load(output / "last.pth", weights_only=True)["student"]
    assert all(torch.equal(value, state[name]) for name, value in loaded.model.state_dict().items())
    assert loaded.spec.size == (3, 32, 32)


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


def test_weights_that_are_not_there_are_refused(tmp_path):
    options = {"epochs": 1, "warmup_epochs": 0, "batch_size": 16, "augment": "none"}
    train(vit(), None, tensor_data(), tmp_path, **options, ema_decay=None, quiet=True, **CPU)
    with pytest.raises(ValueError, match="no EMA weights"):
        evaluate(vit(), tensor_data(), checkpoint=tmp_path, weights="ema", **CPU)


def test_unknown_options_are_refused():
    with pytest.raises(ValueError, match="unknown option 'crop'"):
        evaluate(vit(), tensor_data(), crop=0.9, **CPU)
