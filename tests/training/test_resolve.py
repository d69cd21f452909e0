"""What a caller asks for: the recipe of a run, and what is refused because it could do nothing."""

import pytest
import timm

from fastkd.config import Recipe
from fastkd.training import train
from fastkd.training.build import FromRecipe, resolve_recipe
from tests.harness.tiny import vit

LIFT = "lift_softkd_spectral"


def resolve(recipe=None, student=None, teacher=FromRecipe.TEACHER, **overrides):
    return resolve_recipe(recipe, student, teacher, None, overrides)


def test_the_recipes_teacher_is_the_default():
    recipe = resolve(LIFT)
    assert (recipe.teacher, recipe.alpha, recipe.feature_weight) == ("cait_s24_224", 0.9, 0.2)


def test_none_is_no_teacher_and_the_record_says_so():
    recipe = resolve(Recipe(alpha=0.9, teacher="x", teacher_checkpoint="x.pth"), teacher=None)
    assert (recipe.teacher, recipe.teacher_checkpoint) == (None, None)
    assert (recipe.alpha, recipe.feature_weight) == (0.0, 0.0)


def test_a_recipe_of_a_module_asks_for_the_module():
    with pytest.raises(ValueError, match="teacher is module:Net: hand the module over, or None"):
        resolve(Recipe(teacher="module:Net"))


@pytest.mark.parametrize(
    "override",
    [
        {"alpha": 0.5},
        {"feature_weight": 0.1},
        {"feature_loss": "spectral"},
        {"tau": 2.0},
        {"pairs": ((-1, -1),)},
        {"projector": "linear"},
        {"teacher_checkpoint": "x.pth"},
        {"teacher_img_size": 224},
    ],
)
@pytest.mark.parametrize("recipe", [None, LIFT])
def test_options_of_distillation_without_a_teacher_are_refused(recipe, override):
    (name,) = override
    with pytest.raises(ValueError, match=f"{name}: needs a teacher, and there is none"):
        resolve(recipe, teacher=None, **override)


def test_weights_of_zero_need_no_teacher():
    assert resolve(LIFT, teacher=None, alpha=0.0, feature_weight=0.0).alpha == 0.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"augment": "none", "repeated_aug": 3}, "all copies would be equal"),
        ({"width": 384}, "width=384 has no effect: variant='plain' has no width"),
        ({"student": vit(), "variant": "lift"}, "the student is given as a module"),
        ({"teacher": vit(), "tau": 4.0}, "tau=4.0 has no effect: alpha is 0"),
        ({"teacher": vit(), "alpha": 0.5, "feature_weight": 0.0, "projector": "pool"}, "is 0"),
        ({"teacher": vit(), "alpha": 0.0, "feature_weight": 0.0}, "it teaches nothing"),
        ({"teacher": vit(), "logit_loss": "dkd"}, "logit_loss='dkd' has no effect: alpha is 0"),
        (
            {"teacher": vit(), "feature_weight": 0.0, "alpha": 0.5, "feature_options": {"beta": 1}},
            "feature_weight is 0",
        ),
    ],
)
def test_options_without_which_the_run_is_another_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        resolve(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"augment": "none", "reprob": 0.1}, "reprob=0.1 has no effect: augment='none'"),
        ({"augment": "dataset", "auto_augment": None}, "auto_augment=None has no effect"),
        ({"teacher": vit(), "alpha": 0.5, "logit_loss": "hard", "tau": 2.0}, "no temperature"),
        ({"teacher": vit(), "labels": False, "label_smoothing": 0.2}, "label_smoothing=0.2"),
        ({"mixup_prob": 0.3}, "mixup_prob=0.3 has no effect: Mixup and CutMix are off"),
        ({"ema_decay": None, "ema_warmup": True}, "there is no EMA"),
        ({"color_jitter": 0.4}, "auto_augment takes its place"),
        ({"warmup_lr": 1e-7, "warmup_epochs": 0}, "there is no warm-up"),
        ({"opt": "lion", "adam_eps": 1e-6}, "adam_eps=1e-06 has no effect: opt='lion'"),
        ({"opt": "lamb", "adam_eps": 1e-6}, "adam_eps=1e-06 has no effect: opt='lamb'"),
        ({"sched": "step", "min_lr": 0.0}, "min_lr=0.0 has no effect: sched='step'"),
    ],
)
def test_other_options_without_effect_are_warned_of(options, message, caplog):
    resolve(**options)
    (warning,) = [record.getMessage() for record in caplog.records]
    assert message in warning


def test_a_default_in_other_words_asks_for_nothing(caplog):
    options = {"alpha": 0.5, "feature_weight": 0.0, "pairs": "-1:-1"}
    resolve(teacher=vit(), **options, augment="none", scale=[0.08, 1.0])
    assert not caplog.records


def test_what_a_recipe_holds_beside_its_need_is_no_reason_to_warn(caplog):
    resolve(Recipe(mixup_prob=0.3, color_jitter=0.1))
    assert not caplog.records


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": 0.5, "logit_options": {"gamma": 1.0}}, "logit_options: 'soft' has no option"),
        ({"feature_options": {"beta": 1.0}}, "feature_options: 'mse' has no option 'beta'"),
        (
            {"feature_loss": "smooth_l1", "feature_options": {"gamma": 1.0}},
            "no option 'gamma'; it has beta",
        ),
    ],
)
def test_options_that_a_loss_does_not_have_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        resolve(teacher=vit(), **options)


def test_options_of_a_recipes_loss_leave_with_it():
    recipe = Recipe(feature_loss="smooth_l1", feature_options={"beta": 0.5})
    assert resolve(recipe, teacher=vit()).feature_options == {"beta": 0.5}
    assert resolve(recipe, teacher=vit(), feature_loss="mse").feature_options is None


def test_a_weight_of_a_cross_entropy_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match=r"ce_weight=0\.5 has no effect"):
        resolve(teacher=vit(), labels=False, ce_weight=0.5)


def test_a_loss_that_looks_at_labels_needs_them():
    options = {"alpha": 0.5, "logit_loss": "dkd", "labels": False}
    with pytest.raises(ValueError, match="labels: logit_loss='dkd' looks at them"):
        resolve(teacher=vit(), **options)


def test_a_run_without_a_teacher_weighs_the_cross_entropy_in_full():
    recipe = Recipe(alpha=2.0, ce_weight=0.5)
    assert resolve(recipe, teacher=None).ce_weight is None


def test_copies_that_the_data_set_augments_are_no_option_without_effect():
    assert resolve(augment="dataset", repeated_aug=3).repeated_aug == 3


def test_a_width_goes_with_its_variant():
    assert resolve(LIFT).width == 384
    assert resolve(LIFT, variant="uniform").width is None
    assert resolve(LIFT, variant="uniform", width=219).width == 219


def test_a_cosine_that_would_rise_is_refused_with_its_numbers():
    message = (
        r"min_lr: 1e-05 is not below the learning rate 7.8125e-06 \(= lr 0.0005 x batch_size 8"
    )
    with pytest.raises(ValueError, match=message):
        resolve(batch_size=8)


def test_a_warm_up_from_above_the_peak_is_refused():
    with pytest.raises(ValueError, match=r"warmup_lr: 0\.1 is above the learning rate 0\.001"):
        resolve(warmup_lr=0.1)
    assert resolve(Recipe(warmup_lr=0.1, warmup_epochs=0)).warmup_lr == 0.1


@pytest.mark.parametrize("opt", ["lion", "lookahead_adamw", "nesterov", "muon"])
def test_an_optimizer_of_timms_is_taken(opt, caplog):
    assert resolve(opt=opt).opt == opt
    assert not caplog.records


@pytest.mark.parametrize(
    "opt", ["adamx", "adahessian", "kron", "bnbadamw8bit", "fusedadam", "my_adamw", "lookahead_"]
)
def test_an_optimizer_that_a_run_cannot_use_is_refused_with_the_others(opt):
    with pytest.raises(ValueError, match=rf"opt: expected one of .*adamw.*, got '{opt}'"):
        resolve(opt=opt)


def test_a_misspelt_optimizer_gets_a_suggestion():
    with pytest.raises(ValueError, match=r"got 'adamww' \(did you mean 'adamw'\?\)"):
        resolve(opt="adamww")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"opt_kwargs": {"beta": 0.9}}, "'adamw' has no option 'beta'.*'betas'.*it has betas"),
        ({"opt_kwargs": {"momentum": 0.9}}, "'adamw' has no option 'momentum'"),
        ({"opt": "lion", "opt_kwargs": {"eps": 0.1}}, "'lion' has no option 'eps'"),
        ({"opt_kwargs": {"fused": False}}, "'adamw' has no option 'fused'"),
        ({"opt_kwargs": {"layer_decay": 0.7}}, "'adamw' has no option 'layer_decay'"),
        ({"opt_kwargs": {"eps": 1e-6}}, "eps is the recipe's field adam_eps"),
        ({"opt_kwargs": {"lr": 1e-6}}, "lr is the recipe's field lr"),
        ({"opt_kwargs": {"betas": 0.9}}, r"betas of 'adamw': expected a list.*got 0\.9"),
        ({"opt_kwargs": {"amsgrad": "no"}}, "amsgrad of 'adamw': expected true or false, got 'no'"),
        ({"opt_kwargs": {"betas": [0.9]}}, r"betas of 'adamw': expected a list.*got \(0\.9,\)"),
        ({"opt_kwargs": {"betas": [0.9, 0.99, 0.9]}}, "betas of 'adamw': expected a list"),
        ({"opt_kwargs": {"betas": [0.9, 1.5]}}, "'adamw' with .* 1.5"),
        ({"opt": "sgd", "opt_kwargs": {"momentum": "x"}}, "expected a number, got 'x'"),
        ({"opt": "muon", "opt_kwargs": {"algo": "sgd"}}, "'muon' with .*algo"),
    ],
)
def test_options_that_an_optimizer_cannot_use_are_refused(options, message):
    with pytest.raises(ValueError, match=f"opt_kwargs: .*{message}"):
        resolve(**options)


@pytest.mark.parametrize(
    ("sched", "options", "message"),
    [
        (
            "cosine",
            {"decay_epochs": 30},
            "'cosine' has no option 'decay_epochs'.* it has cycle_mul",
        ),
        ("cosine", {"noise": 0.5}, "'cosine' has no option 'noise'"),
        ("cosine", {"min_lr": 0.1}, "'cosine' has no option 'min_lr'"),
        ("cosine", {"cycle_limit": 7}, "300 epochs, .* cannot be divided into 7 cycles"),
        ("cosine", {"cycle_limit": 2.5}, "'cosine' with .*2.5"),
        ("cosine", {"cycle_limit": 10**12, "cycle_mul": 2}, "'cosine' with"),
        ("cosine", {"cooldown_epochs": 300}, "300 epochs, less 300"),
        ("cosine", {"cooldown_epochs": -1}, "cooldown_epochs: expected at least 0.*, got -1"),
        ("cosine", {"warmup_prefix": "no"}, "warmup_prefix of .*expected true or false, got 'no'"),
        ("cosine", {"cycle_limit": 3, "cycle_decay": 1e-4}, "would become .*, expected"),
        ("cosine", {"k_decay": True}, "k_decay of 'cosine': expected a number, got True"),
        ("cosine", {"k_decay": -1}, "k_decay: expected at least 0.*, got -1"),
        ("cosine", {"k_decay": 0}, "does not fall"),
        ("multistep", {"decay_milestones": 30}, "expected a list such as .*, got 30"),
        ("multistep", {"decay_milestones": [300]}, "does not fall within 300 epochs"),
        ("multistep", {"decay_milestones": [60, 30]}, r"ascending in a list, got \(60, 30\)"),
        ("step", {"decay_epochs": 300}, "does not fall within 300 epochs"),
        ("step", {"decay_epochs": 0}, "'step' with"),
        ("step", {"decay_epochs": "x"}, "decay_epochs: expected at least 0.*, got 'x'"),
        ("step", {"decay_rate": 2}, "does not fall"),
        ("step", {"decay_rate": -0.5}, "decay_rate: expected at least 0.*, got -0.5"),
        ("poly", {"decay_rate": 1e4}, "'poly' with"),
    ],
)
def test_a_schedule_that_cannot_work_is_refused(sched, options, message):
    with pytest.raises(ValueError, match=f"sched_kwargs: .*{message}"):
        resolve(sched=sched, sched_kwargs=options)


def test_a_default_schedule_that_would_not_fall_is_refused():
    with pytest.raises(ValueError, match="'multistep' with no options does not fall within 60"):
        resolve(sched="multistep", epochs=60)


def test_a_constant_learning_rate_can_be_asked_for():
    options = {"decay_rate": 1}
    assert resolve(sched="step", sched_kwargs=options).sched_kwargs == options


def test_cycles_without_number_have_no_effect():
    with pytest.raises(ValueError, match=r"cycle_decay=0\.5 has no effect"):
        resolve(sched_kwargs={"cycle_decay": 0.5})


def test_options_of_a_recipes_optimizer_and_schedule_leave_with_them():
    recipe = Recipe(opt_kwargs={"amsgrad": True}, sched_kwargs={"k_decay": 2})
    assert resolve(recipe).opt_kwargs == {"amsgrad": True}
    changed = resolve(recipe, opt="lion", sched="tanh")
    assert (changed.opt_kwargs, changed.sched_kwargs) == (None, None)


def test_a_schedule_of_steps_needs_no_min_lr_below_its_peak():
    assert resolve(sched="step", batch_size=8).scaled_lr < Recipe().min_lr


def test_an_output_below_a_file_is_refused_by_name(data, fast, tmp_path):
    (tmp_path / "file").write_text("")
    for output in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(ValueError, match=r"train: output must be a folder.*file is a file"):
            train(vit(), None, data, output, **fast)


@pytest.mark.parametrize(
    "name", ["vit_tiny_patch16_224.augreg_in21k", "deit_tiny_patch16_224.fb_in1k", "test_vit.lost"]
)
@pytest.mark.parametrize("given", ["student", "recipe", "model"])
def test_a_tag_of_weights_in_a_students_name_is_refused_with_what_to_write(name, given):
    architecture = name.partition(".")[0]
    student = name if given == "student" else None
    overrides = {"model": name} if given == "model" else {}
    recipe = Recipe(model=name) if given == "recipe" else None
    expected = rf"student: .*{name}.*'{architecture}'.*'hf_hub:timm/{name}'"
    with pytest.raises(ValueError, match=expected):
        resolve_recipe(recipe, student, None, None, overrides)


def test_a_file_that_is_not_there_has_no_tag():
    assert resolve_recipe(None, "test_vit.pth", None, None, {}).model == "test_vit.pth"


def test_a_module_that_was_built_by_a_name_with_a_tag_has_its_weights():
    student = timm.create_model("test_vit.r160_in1k", num_classes=3)
    assert resolve_recipe(None, student, None, None, {}).model == "test_vit"
