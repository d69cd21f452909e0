"""What a run's student starts from is part of its recipe."""

import pytest

from fastkd.checkpoint import CheckpointError, load_checkpoint
from fastkd.config import OPERATIONAL_FIELDS, Recipe
from fastkd.training import train
from fastkd.training.build import resolve_recipe
from tests.harness.tiny import image_folder, vit

LIFT = {"variant": "lift", "width": 48, "img_size": 32, "batch_size": 6}
UNTRAINED = {"epochs": 1, "lr": 1e-30, "weight_decay": 0.0, "warmup_lr": 0.0, "min_lr": 0.0}


def start_of(run):
    """The head of a run that went nowhere."""
    return load_checkpoint(run)["state_dict"]["head.weight"]


def test_a_run_records_what_it_started_from_and_resumes_with_nothing_else(fast, tmp_path):
    folder = image_folder(tmp_path / "images", train=6, val=2)
    options = fast | LIFT | UNTRAINED
    for way in ("released", "timm"):
        output = tmp_path / way
        train("test_vit", None, folder, output, **options, init_weights=way)
        assert Recipe.load(output).init_weights == way
        assert f"init_weights: {way}" in (output / "recipe.yaml").read_text().splitlines()
    bound = 48**-0.5
    assert 0.9 * bound < start_of(tmp_path / "released").abs().max() <= bound
    assert start_of(tmp_path / "timm").std().item() == pytest.approx(0.02, rel=0.3)
    with pytest.raises(CheckpointError, match="init_weights 'released' -> 'timm'"):
        train("test_vit", None, folder, tmp_path / "released", **options, init_weights="timm")


def test_it_changes_what_a_run_computes():
    assert "init_weights" not in OPERATIONAL_FIELDS
    assert Recipe().differences(Recipe(init_weights="timm")) == {
        "init_weights": ("released", "timm")
    }


def test_a_student_that_is_given_starts_from_its_own_weights():
    with pytest.raises(ValueError, match="init_weights='timm' has no effect"):
        resolve_recipe(None, vit(), None, None, {"init_weights": "timm"})


@pytest.mark.parametrize("name", Recipe.names())
def test_the_papers_students_start_as_in_its_runs(name):
    recipe = Recipe.load(name)
    if recipe.variant != "plain":
        assert recipe.init_weights == "released"
