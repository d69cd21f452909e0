"""Every loss of the catalogue in a training run: it learns, is costed, compiles, and resumes."""

import pytest
import torch

from fastkd import create_teacher
from fastkd.config import Recipe
from fastkd.data.transforms import InputSpec
from fastkd.losses import VkD
from fastkd.losses import registry as catalogue
from fastkd.training import load_checkpoint, train
from fastkd.training.dry_run import estimate
from fastkd.training.task import build_task
from tests.harness.tiny import FAST, Interrupting, lift, tensor_data, vit

IMAGES = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(3))
TARGET = torch.tensor([0, 1, 2, 3])
LOGIT = catalogue.names(catalogue.LOGIT_LOSSES)
TERMS = [
    *({"alpha": 0.5, "logit_loss": name, "feature_weight": 0.0} for name in LOGIT),
    *({"feature_loss": name, "pairs": ((0, 0), (-1, -1)), "projector": p} for name, p in [
        *((loss.name, "none" if loss.projects else "linear") for loss in catalogue.FEATURE_LOSSES),
        ("rkd", "none"),
        ("vkd", "orthogonal"),
        ("mse", "mlp"),
        ("attention", "pool"),
    ]),
]  # fmt: skip

# Those with parameters, random numbers or labels of their own.
DRAWING = [
    {"feature_loss": "manifold", "feature_options": {"patches": 5}},
    {"feature_loss": "vitkd", "pairs": ((0, 0), (-1, -1))},
    {"feature_loss": "crd", "alpha": 0.5, "logit_loss": "dkd", "mixup": 0.8},
]


def name_of(terms):
    parts = (terms.get("logit_loss"), terms.get("feature_loss"), terms.get("projector"))
    return "-".join(part for part in parts if part)


def task_for(student, teacher, **options):
    teacher = create_teacher(teacher)
    recipe = Recipe(**options)
    return build_task(student, teacher, recipe, torch.zeros(1, 1, 8, 8)), teacher, recipe


@pytest.mark.parametrize("terms", TERMS, ids=name_of)
def test_every_parameter_of_its_task_gets_a_finite_gradient(terms):
    task, teacher, _ = task_for(vit(), vit(24, seed=1), **terms)
    task(IMAGES, TARGET, teacher(IMAGES))["loss"].backward()
    missing = [name for name, p in task.named_parameters() if p.grad is None]
    assert missing == []
    assert all(torch.isfinite(p.grad).all() for p in task.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("terms", DRAWING, ids=name_of)
def test_its_step_compiles_without_a_break_to_the_same_losses(terms):
    task, teacher, _ = task_for(vit(), vit(24, seed=1), **terms)
    output = teacher(IMAGES)
    torch.manual_seed(5)
    expected = task(IMAGES, TARGET, output)
    torch.manual_seed(5)
    torch._dynamo.reset()
    compiled = torch.compile(task, fullgraph=True, backend="aot_eager")(IMAGES, TARGET, output)
    torch.testing.assert_close(compiled["loss"], expected["loss"])


@pytest.mark.parametrize("terms", TERMS, ids=name_of)
def test_its_cost_is_estimated_from_shapes(terms):
    student, teacher = vit(), create_teacher(vit(24, seed=1))
    spec = InputSpec((1, 8, 8), (0.5,), (0.5,))
    cost = estimate(student, teacher, Recipe(**terms), spec, 4)
    assert cost.student_parameters == sum(p.numel() for p in student.parameters())


def test_distances_that_no_operator_computes_compare_lifted_tokens():
    options = {"feature_loss": "vkd", "feature_options": {"pool": False}, "projector": "lift"}
    student = lift(24).eval()
    task, teacher, _ = task_for(student, vit(24, seed=1), **options)
    assert student.fuses_lift(IMAGES)
    output = teacher(IMAGES)
    lifted = student.norm(student.blocks(student._pos_embed(student.patch_embed(IMAGES))))
    expected = VkD(pool=False)(lifted[:, 1:], output.tokens[1].data)
    torch.testing.assert_close(task(IMAGES, TARGET, output)["feature"], expected)


def test_dkd_sees_the_labels_and_the_cross_entropy_keeps_its_weight():
    options = {"alpha": 2.0, "ce_weight": 1.0, "logit_loss": "dkd", "feature_weight": 0.0}
    task, teacher, _ = task_for(vit(), vit(seed=1), **options, tau=2.0)
    output = teacher(IMAGES)
    parts = task(IMAGES, TARGET, output)
    torch.testing.assert_close(parts["loss"], parts["ce"] + 2 * parts["dkd"])
    term = task.terms.logit
    torch.testing.assert_close(2 * parts["dkd"], term(parts["output"], output.logits, TARGET))


def test_an_orthogonal_projector_is_spared_by_weight_decay():
    task, _, _ = task_for(vit(), vit(24, seed=1), projector="orthogonal")
    assert "terms.feature.projectors.0.parametrizations.weight.original" in task.no_weight_decay()


@pytest.mark.parametrize("terms", DRAWING, ids=name_of)
def test_a_run_that_was_stopped_draws_the_same_patches_and_masks(terms, tmp_path):
    options = FAST | terms
    train(vit(), vit(24, seed=1), tensor_data(), tmp_path / "whole", **options)

    def interrupt():
        raise KeyboardInterrupt

    training, evaluation = tensor_data()
    broken = (Interrupting(training, 16 * 2 + 5, interrupt), evaluation)
    with pytest.raises(KeyboardInterrupt):
        train(vit(), vit(24, seed=1), broken, tmp_path / "parts", **options)
    train(vit(seed=9), vit(24, seed=1), tensor_data(), tmp_path / "parts", **options)
    whole, parts = (load_checkpoint(tmp_path / name) for name in ("whole", "parts"))
    assert whole["position"] == parts["position"]
    torch.testing.assert_close(parts["state_dict"], whole["state_dict"], rtol=0, atol=0)


def test_the_recipes_options_reach_its_losses():
    task, _, _ = task_for(
        *(vit(), vit(seed=1)),
        **{"alpha": 0.3, "ce_weight": 0.6, "logit_loss": "dkd", "tau": 3.0},
        **{"logit_options": {"other_weight": 2.5}, "feature_weight": 0.4},
        **{"feature_loss": "vkd", "feature_options": {"pool": False, "beta": 0.5}},
        resample="area",
    )
    logit, feature = task.terms.logit, task.terms.feature
    assert (logit.weight, logit.tau, logit.other_weight) == (0.3, 3.0, 2.5)
    assert (feature.weight, feature.resample) == (0.4, "area")
    assert (feature.distances[0].pool, feature.distances[0].distance.beta) == (False, 0.5)
    assert task.terms.ce_weight == 0.6


def test_the_recipes_options_reach_a_term_of_its_own():
    options = {"mask_ratio": 0.25, "generate_weight": 2e-6}
    task, _, _ = task_for(
        vit(), vit(24, seed=1), feature_loss="vitkd", feature_options=options, resample="area"
    )
    feature = task.terms.feature
    assert (feature.mask_ratio, feature.generate_weight) == (0.25, 2e-6)
    assert feature.resample == "area"


def test_without_labels_no_weight_of_theirs_is_left():
    task, _, _ = task_for(vit(), vit(seed=1), labels=False, ce_weight=0.5, alpha=2.0)
    assert "ce" not in task.terms.names


def test_a_loss_that_is_added_to_the_cross_entropy_warns_where_there_is_none(caplog):
    task_for(vit(), vit(seed=1), alpha=1.0, logit_loss="nkd", feature_weight=0.0)
    assert "set ce_weight=1" in caplog.text


def test_copies_of_an_image_are_no_different_images_to_crd(caplog):
    task_for(vit(), vit(24, seed=1), feature_loss="crd", repeated_aug=3)
    assert "repeated_aug=1 avoids that" in caplog.text
