"""Recipes: loading, overriding, what is refused and how it is said."""

import copy
import functools
import itertools
import pickle
import re

import jsonschema
import pytest
import torch
import yaml

from fastkd import create_teacher
from fastkd.config import (
    SECTIONS,
    Recipe,
    describe,
    parse_value,
)
from fastkd.inference.preprocessing import Shape, build_student
from fastkd.training.task import build_task

# Top-1 on ImageNet-1k in %, as published: arXiv 2012.12877, 2412.19055 and 2511.15572.
PUBLISHED = {
    "deit_tiny": 72.2,
    "spectralkd_deit_tiny": 77.4,
    "spectralkd_deit_small": 82.2,
    "spectralkd_swin_tiny": 82.7,
    "plain_supervised": 74.86,
    "plain_spectral": 75.07,
    "lift_supervised": 75.41,
    "lift_mse": 76.61,
    "lift_softkd": 77.23,
    "lift_softkd_mse": 77.50,
    "lift_softkd_spectral": 77.53,
    "widelast_supervised": 75.54,
    "widelast_mse": 77.15,
    "widelast_spectral": None,
    "widelast_softkd": 77.88,
    "widelast_softkd_mse": 78.23,
    "widelast_softkd_spectral": 78.16,
    "uniform219_supervised": None,
    "uniform219_spectral": None,
}

NO_TEACHER = {"teacher", "alpha", "feature_weight"}
WIDENED = {"variant", "width", "projector", "decay_pos_embed"}

# Where and how fast a run happens, what its author has not, and what follows from the model.
LEFT_TO_THE_USER = {
    *("data", "data_root", "labels", "train_samples", "max_unreadable", "workers"),
    *("student_prefix", "teacher_prefix", "resample", "mean", "std"),
    *("accumulation", "max_nonfinite", "compile", "channels_last"),
}

NAN, INF = float("nan"), float("inf")

# Recipes and the fields that their names set apart.
TWINS = [
    ("lift_softkd_mse", "lift_mse", {"alpha"}),
    ("lift_softkd_mse", "lift_softkd", {"feature_weight"}),
    ("lift_softkd_mse", "lift_softkd_spectral", {"feature_loss"}),
    ("lift_softkd_mse", "lift_supervised", NO_TEACHER),
    ("widelast_softkd_mse", "widelast_mse", {"alpha"}),
    ("widelast_softkd_mse", "widelast_softkd", {"feature_weight"}),
    ("widelast_softkd_mse", "widelast_softkd_spectral", {"feature_loss"}),
    ("widelast_softkd_spectral", "widelast_spectral", {"alpha"}),
    ("widelast_softkd_mse", "widelast_supervised", NO_TEACHER),
    ("lift_softkd_mse", "widelast_softkd_mse", {"variant", "projector"}),
    ("lift_softkd_spectral", "widelast_softkd_spectral", {"variant", "projector"}),
    ("plain_spectral", "plain_supervised", {"teacher", "feature_weight"}),
    ("plain_spectral", "widelast_spectral", WIDENED),
    ("uniform219_spectral", "uniform219_supervised", {"teacher", "feature_weight"}),
    ("uniform219_spectral", "plain_spectral", WIDENED - {"projector"}),
    ("spectralkd_deit_tiny", "spectralkd_deit_small", {"model", "projector", "epochs"}),
    ("spectralkd_deit_tiny", "plain_spectral", {"alpha", "pairs", "epochs", "batch_size"}),
]


# What the recipes are made of. A digit that changes here changes what a published number is
# compared with: PAPER is most recipes' value, DIFFERENT what a recipe has instead.
PAPER = {
    **{"model": "deit_tiny_patch16_224", "variant": "widelast", "width": 384},
    **{"img_size": 224, "num_classes": 1000, "drop_path": 0.0, "init_weights": "released"},
    **{"teacher": "cait_s24_224", "alpha": 0.9, "tau": 1.0, "logit_loss": "soft"},
    **{"ce_weight": None, "logit_options": None, "feature_options": None},
    **{"feature_loss": "spectral", "feature_weight": 0.2},
    **{"pairs": ((11, 23),), "projector": "none"},
    **{"augment": "cpu", "interpolation": "bicubic", "crop_pct": 0.875, "crop_mode": "center"},
    **{"scale": (0.08, 1.0), "ratio": (3 / 4, 4 / 3), "hflip": 0.5, "color_jitter": 0.4},
    **{"auto_augment": "rand-m9-mstd0.5-inc1", "reprob": 0.25, "repeated_aug": 3},
    **{"mixup": 0.0, "cutmix": 0.0, "mixup_prob": 1.0, "mixup_switch_prob": 0.5},
    **{"epochs": 300, "warmup_epochs": 5, "batch_size": 2048, "lr": 5e-4, "lr_scaling": True},
    **{"opt": "adamw", "opt_kwargs": None, "sched": "cosine", "sched_kwargs": None},
    **{"min_lr": 1e-5, "warmup_lr": 1e-6, "weight_decay": 0.05, "decay_pos_embed": True},
    **{"adam_eps": 1e-8, "label_smoothing": 0.1, "clip_grad": None},
    **{"ema_decay": 0.99996, "ema_warmup": False, "amp": "bf16", "seed": 0, "best": "raw"},
}
SUPERVISED = {"teacher": None, "alpha": 0.0, "feature_weight": 0.0}
LIFT = {"variant": "lift", "projector": "lift"}
PLAIN = {"variant": "plain", "width": None, "projector": "pool", "decay_pos_embed": False}
UNIFORM = {"variant": "uniform", "width": 219, "projector": "pool"}
MSE, LOGITS = {"feature_loss": "mse"}, {"feature_loss": "mse", "feature_weight": 0.0}
EIGHT = ((0, 0), (1, 1), (6, 18), (7, 19), (8, 20), (9, 21), (10, 22), (11, 23))
SPECTRALKD = PLAIN | {"pairs": EIGHT, "batch_size": 512}
DIFFERENT = {
    "deit_tiny": PLAIN
    | SUPERVISED
    | {"feature_loss": "mse", "pairs": ((-1, -1),), "projector": "none", "batch_size": 1024}
    | {"drop_path": 0.1, "init_weights": "timm"}
    | {"color_jitter": 0.3, "mixup": 0.8, "cutmix": 1.0},
    "spectralkd_deit_tiny": SPECTRALKD | {"epochs": 400},
    "spectralkd_deit_small": SPECTRALKD
    | {"model": "deit_small_patch16_224", "projector": "none", "epochs": 500},
    "spectralkd_swin_tiny": SPECTRALKD
    | {"model": "swin_tiny_patch4_window7_224", "projector": "none", "epochs": 500}
    | {"teacher": "swin_small_patch4_window7_224.ms_in1k", "feature_weight": 0.05}
    | {"pairs": ((0, 0), (1, 1), (2, 2), (3, 3)), "warmup_epochs": 20},
    "plain_supervised": PLAIN | SUPERVISED,
    "plain_spectral": PLAIN | {"alpha": 0.0},
    "lift_supervised": LIFT | MSE | SUPERVISED,
    "lift_mse": LIFT | MSE | {"alpha": 0.0},
    "lift_softkd": LIFT | LOGITS,
    "lift_softkd_mse": LIFT | MSE,
    "lift_softkd_spectral": LIFT,
    "widelast_supervised": MSE | SUPERVISED,
    "widelast_mse": MSE | {"alpha": 0.0},
    "widelast_spectral": {"alpha": 0.0},
    "widelast_softkd": LOGITS,
    "widelast_softkd_mse": MSE,
    "widelast_softkd_spectral": {},
    "uniform219_supervised": UNIFORM | SUPERVISED,
    "uniform219_spectral": UNIFORM | {"alpha": 0.0},
}


def header(name):
    """The comments that a recipe begins with, one paragraph an item."""
    lines = Recipe.path(name).read_text(encoding="utf-8").splitlines()
    comments = itertools.takewhile(lambda line: line.startswith("#"), lines)
    text = "\n".join(line.removeprefix("#").strip() for line in comments)
    return [paragraph.replace("\n", " ") for paragraph in text.split("\n\n")]


def test_the_shipped_recipes_are_those_whose_numbers_are_known():
    assert Recipe.names() == sorted(PUBLISHED)


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_recipe_begins_with_a_title_that_fits_a_line(name):
    title = header(name)[0]
    assert "arXiv" in title
    assert title.endswith(".")
    assert len(title) < 98


@pytest.mark.parametrize(("name", "top1"), PUBLISHED.items())
def test_every_recipe_says_the_published_number_or_that_there_is_none(name, top1):
    aim = header(name)[1]
    assert aim.startswith("Aims at: ")
    number = re.match(r"Aims at: ([\d.]+) % ImageNet-1k top-1 \(published", aim)
    if top1 is None:
        assert number is None
        assert "no published number" in aim
    else:
        assert number is not None
        assert float(number[1]) == top1


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_recipe_names_the_rule_that_it_follows(name):
    rule = header(name)[2]
    assert rule.startswith("Selected by: the ")
    assert f"(best: {Recipe.load(name).best})" in rule


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_quirk_that_is_set_is_told(name):
    recipe, text = Recipe.load(name), " ".join(header(name))
    assert ("(decay_pos_embed)" in text) == recipe.decay_pos_embed
    assert ("(mixup: 0, cutmix: 0)" in text) == (not recipe.mixes)
    assert ("(init_weights: released)" in text) == (recipe.variant != "plain")
    assert ("alpha: 0 means" in text) == (recipe.teacher is not None and recipe.alpha == 0)
    assert ("averaged" in text and "(projector: pool)" in text) == (
        recipe.teacher is not None and recipe.projector == "pool"
    )


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_recipe_sets_everything_that_decides_a_number(name):
    """A default that changes later must not change a frozen recipe."""
    given = yaml.safe_load(Recipe.path(name).read_text(encoding="utf-8"))
    fields = {
        name for s in ("student", "distill", "data", "optim") for name in SECTIONS[s].model_fields
    }
    assert fields - set(given) == LEFT_TO_THE_USER


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_value_of_a_recipe_is_the_published_one(name):
    recipe = Recipe.load(name)
    given = yaml.safe_load(Recipe.path(name).read_text(encoding="utf-8"))
    assert {field: getattr(recipe, field) for field in given} == PAPER | DIFFERENT[name]


@pytest.mark.parametrize(("name", "twin", "fields"), TWINS)
def test_twins_differ_in_nothing_but_what_their_names_say(name, twin, fields):
    assert set(Recipe.load(name).differences(Recipe.load(twin))) == fields


@pytest.mark.parametrize("name", [name for name in PUBLISHED if name.endswith("_supervised")])
def test_supervised_recipes_are_the_matched_runs_without_distillation(name):
    recipe = Recipe.load(name)
    assert (recipe.teacher, recipe.alpha, recipe.feature_weight) == (None, 0.0, 0.0)


@pytest.mark.parametrize(
    ("name", "schedule"),
    [
        ("deit_tiny", (300, 5, 1024, 1e-3)),
        ("spectralkd_deit_tiny", (400, 5, 512, 5e-4)),
        ("spectralkd_deit_small", (500, 5, 512, 5e-4)),
        ("spectralkd_swin_tiny", (500, 20, 512, 5e-4)),
        ("lift_softkd_spectral", (300, 5, 2048, 2e-3)),
        ("widelast_softkd_mse", (300, 5, 2048, 2e-3)),
        ("uniform219_supervised", (300, 5, 2048, 2e-3)),
    ],
)
def test_schedules_are_the_published_ones(name, schedule):
    r = Recipe.load(name)
    assert (r.epochs, r.warmup_epochs, r.batch_size, r.scaled_lr) == schedule


@pytest.mark.parametrize(
    ("name", "weights"),
    [
        ("lift_softkd_spectral", (0.9, 1.0, "spectral", 0.2)),
        ("widelast_mse", (0.0, 1.0, "mse", 0.2)),
        ("lift_softkd", (0.9, 1.0, "mse", 0.0)),
        ("spectralkd_deit_small", (0.9, 1.0, "spectral", 0.2)),
        ("spectralkd_swin_tiny", (0.9, 1.0, "spectral", 0.05)),
    ],
)
def test_terms_have_the_published_weights(name, weights):
    r = Recipe.load(name)
    assert (r.alpha, r.tau, r.feature_loss, r.feature_weight) == weights


@pytest.mark.parametrize("name", ["spectralkd_deit_tiny", "spectralkd_deit_small"])
def test_spectralkd_pairs_eight_blocks(name):
    pairs = dict(Recipe.load(name).pairs)
    assert pairs == {0: 0, 1: 1, 6: 18, 7: 19, 8: 20, 9: 21, 10: 22, 11: 23}


def test_spectralkd_pairs_the_four_stages_of_swin():
    recipe = Recipe.load("spectralkd_swin_tiny")
    assert recipe.pairs == ((0, 0), (1, 1), (2, 2), (3, 3))
    assert recipe.teacher == "swin_small_patch4_window7_224.ms_in1k"


def test_lift_and_widelast_pair_the_last_blocks():
    names = [name for name in PUBLISHED if name.startswith(("lift", "widelast"))]
    assert {Recipe.load(name).pairs for name in names} == {((11, 23),)}


@pytest.fixture(scope="module")
def untrained():
    """Teachers by name at their own size, with random weights."""
    return functools.cache(functools.partial(create_teacher, pretrained=False))


@pytest.mark.parametrize("name", [n for n in PUBLISHED if Recipe.load(n).teacher is not None])
def test_a_recipes_student_and_teacher_fit_each_other_as_they_are_published(name, untrained):
    recipe = Recipe.load(name)
    student = build_student(recipe, Shape(recipe.num_classes, 3, recipe.img_size))
    task = build_task(student, untrained(recipe.teacher), recipe, torch.zeros(1, 3, 224, 224))
    assert task.needs_logits == (recipe.alpha > 0)
    assert task.needs_tokens == (recipe.feature_weight > 0)
    assert len(list(task.parameters())) == len(list(student.parameters()))  # no projector is left


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("plain_supervised", 5_717_416),
        ("lift_supervised", 5_983_528),
        ("widelast_supervised", 7_313_896),
        ("uniform219_supervised", 7_372_759),
    ],
)
def test_students_have_the_published_number_of_parameters(name, parameters):
    recipe = Recipe.load(name)
    student = build_student(recipe, Shape(recipe.num_classes, 3, recipe.img_size))
    assert sum(p.numel() for p in student.parameters()) == parameters


def test_saving_and_loading_gives_the_same_recipe(tmp_path):
    recipe = Recipe(pairs=((0, 0), (-1, 23)), mean=(0.5,), std=(0.2,), clip_grad=1.0, lr=1e-5)
    recipe.save(tmp_path / "r.yaml")
    assert Recipe.load(tmp_path / "r.yaml") == recipe


def test_a_run_folder_loads_as_its_recipe(tmp_path):
    Recipe(epochs=7).save(tmp_path / "recipe.yaml")
    assert Recipe.load(tmp_path).epochs == 7


def test_exponents_without_a_point_are_numbers_in_yaml(tmp_path):
    (tmp_path / "r.yaml").write_text("lr: 5e-4\nmin_lr: 1E-6\n")
    recipe = Recipe.load(tmp_path / "r.yaml")
    assert (recipe.lr, recipe.min_lr) == (5e-4, 1e-6)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("ema_decay", "none"),
        ("auto_augment", "none"),
        ("width", "NULL"),
        ("amp", "none"),
        ("lr", "1e-3"),
        ("lr", "5"),
        ("pairs", "11:23"),
        ("pairs", "0:0,-1:23"),
        ("mean", "0.5,0.4,0.3"),
        ("labels", "no"),
        ("labels", "false"),
        ("model", "123"),
        ("data", "2024-01-01"),
        ("feature_options", "beta=8,eps=1e-5,loss=mse"),
        ("opt_kwargs", "betas=[0.9,0.98],amsgrad=true"),
    ],
)
def test_a_scalar_in_yaml_means_what_it_means_on_the_command_line(tmp_path, name, text):
    given = {"mean": "std: 0.2,0.2,0.2\n"}.get(name, "")
    (tmp_path / "r.yaml").write_text(f"{given}{name}: {text}\n")
    assert getattr(Recipe.load(tmp_path / "r.yaml"), name) == parse_value(name, text)


def test_an_empty_scalar_in_yaml_is_none_and_an_empty_text_is_refused(tmp_path):
    (tmp_path / "r.yaml").write_text("teacher:\n")
    assert Recipe.load(tmp_path / "r.yaml").teacher is None
    (tmp_path / "r.yaml").write_text("teacher: ''\n")
    with pytest.raises(ValueError, match="teacher: expected a text that is not empty"):
        Recipe.load(tmp_path / "r.yaml")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lr: 1e-3\nepochs: 3\nlr: 1e-4\n", "lr: given twice, again in line 3"),
        ("feature_options: {beta: 1, beta: 2}\n", "beta: given twice"),
        ("lr: [1e-3\n", "no YAML"),
        ("- lr\n", "must hold a mapping"),
        ("lr: [1e-3]\n", "lr: expected a finite number above 0"),
        ("epochs: 1.5\n", "epochs: expected an integer"),
        ("pairs: [[[1], 2]]\n", "pairs: expected pairs of blocks"),
        ("pairs: [{1: 2, 3: 4}]\n", "pairs: expected pairs of blocks"),
        ("lr: " + "[" * 5000 + "]" * 5000, "no YAML.*recursion"),
        ("- " * 5000, "no YAML.*recursion"),
        ("epochs: 1\nlr: " + "{a: " * 3000, "no YAML.*recursion"),
        ("lr: [" + "1, " * 40_000 + "]", "is no recipe: it has more than 100,000 bytes"),
        ("lr:\t1e-3\n", "no YAML.*line 1"),
        ("lr: \0\n", "no YAML.*#x0000"),
        ("lr: 1\n---\nlr: 2\n", "no YAML.*single document"),
        ("%YAML 3.0\n---\nlr: 1\n", "no YAML.*incompatible"),
        ("[1]: 2\n", "no YAML.*line 1 has a key"),
        ("epochs: 1\nlr: *x\n", "line 2 has an alias"),
        ("lr: &a [*a]\n", "line 1 has an alias"),
        ("lr: !!python/name:os.system x\n", "line 1 has .* a tag"),
        ("data: !mine x\n", "line 1 has .* a tag"),
        ("learning_rate: 1e-3\n", r"unknown recipe field 'learning_rate' \(here it is 'lr'\)"),
        ("epocs: 5\n", r"unknown recipe field 'epocs' \(did you mean 'epochs'\?\)"),
    ],
)
def test_a_faulty_file_is_refused_with_its_name(tmp_path, text, message):
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(ValueError, match=rf"r\.yaml: {message}"):
        Recipe.load(tmp_path / "r.yaml")


def test_every_fault_of_a_file_has_a_line(tmp_path):
    (tmp_path / "r.yaml").write_text("lr: x\nepochs: y\nfoo: 1\n")
    with pytest.raises(ValueError, match="lr: expected") as error:
        Recipe.load(tmp_path / "r.yaml")
    assert len(str(error.value).splitlines()) == 3


def test_an_empty_option_leaves_the_others_typed(tmp_path):
    (tmp_path / "r.yaml").write_text("logit_options: {a: 1, b: }\n")
    assert Recipe.load(tmp_path / "r.yaml").logit_options == {"a": 1, "b": None}


@pytest.mark.parametrize("text", ["none", "null", "~", "\x85 \u2028x", "1e3", "a: b", "ünï"])
def test_any_text_survives_a_file(tmp_path, text):
    recipe = Recipe(data=text, feature_options={"a": text})
    recipe.save(tmp_path / "r.yaml")
    assert Recipe.load(tmp_path / "r.yaml") == recipe


@pytest.mark.parametrize("empty", ["", " "])
def test_an_empty_name_is_no_recipe_of_the_current_folder(tmp_path, monkeypatch, empty):
    Recipe(epochs=7).save(tmp_path / "recipe.yaml")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"recipe: expected .*a run's folder"):
        Recipe.load(empty)


def test_a_recipe_does_not_change_and_can_be_hashed_and_copied():
    recipe = Recipe(logit_options={"beta": 8})
    for change in ("recipe.lr = 1", "recipe.logit_options['beta'] = 9"):
        with pytest.raises((TypeError, ValueError)):
            exec(change)
    for same in (copy.copy(recipe), copy.deepcopy(recipe), pickle.loads(pickle.dumps(recipe))):
        assert same == recipe and hash(same) == hash(recipe)


def test_options_and_modules_that_look_like_numbers_survive_a_file(tmp_path):
    recipe = Recipe(
        pairs=(("3", "blocks.1"),), feature_options={"a": "8", "b": "none", "c": 8, "d": None}
    )
    recipe.save(tmp_path / "r.yaml")
    assert Recipe.load(tmp_path / "r.yaml") == recipe


def test_yaml_may_write_pairs_as_lists_or_text(tmp_path):
    for pairs in ([[0, 0], [11, 23]], "0:0,11:23"):
        (tmp_path / "r.yaml").write_text(yaml.safe_dump({"pairs": pairs}))
        assert Recipe.load(tmp_path / "r.yaml").pairs == ((0, 0), (11, 23))


@pytest.mark.parametrize("text", ["11:23", "[11:23]", "- 11:23", "[[11, 23]]", "'11:23'"])
def test_one_pair_is_read_however_yaml_spells_it(tmp_path, text):
    (tmp_path / "r.yaml").write_text(f"pairs:\n  {text}\n")
    assert Recipe.load(tmp_path / "r.yaml").pairs == ((11, 23),)


@pytest.mark.parametrize("word", ["none", "None", "NULL", "~", "null", ""])
@pytest.mark.parametrize("name", ["ema_decay", "teacher", "auto_augment", "track", "opt_kwargs"])
def test_none_is_none_however_yaml_spells_it(tmp_path, name, word):
    (tmp_path / "r.yaml").write_text(f"{name}: {word}\n")
    assert getattr(Recipe.load(tmp_path / "r.yaml"), name) is None


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("learning_rate", "here it is 'lr'"),
        ("per-device-train-batch-size", "here it is 'batch_size'; images of an update"),
        ("output_dir", "here it is 'output'; an argument beside the recipe"),
        ("layer_decay", "no decay of the learning rate by layer"),
        ("temperature", "here it is 'tau'"),
        ("EPOCHS", "did you mean 'epochs'"),
        ("lr_scheduler_type", "here it is 'sched'"),
        ("gradient_accumulation_steps", "here it is 'accumulation'"),
    ],
)
def test_a_name_of_another_trainer_gets_the_name_that_it_has_here(name, hint):
    with pytest.raises(ValueError, match=f"{name}.*{hint}"):
        Recipe(**{name: 1})


def test_an_unknown_field_is_an_error_with_a_suggestion():
    with pytest.raises(ValueError, match=r"unknown recipe field 'feature_los'.*'feature_loss'"):
        Recipe().override(feature_los="mse")


def test_an_unknown_name_is_an_error_with_a_suggestion():
    with pytest.raises(
        ValueError, match=r"recipe: .*got 'lift_softkd_spectrl'.*'lift_softkd_spectral'"
    ):
        Recipe.load("lift_softkd_spectrl")


def test_an_error_in_a_file_names_the_file(tmp_path):
    (tmp_path / "r.yaml").write_text("epochs: many\n")
    with pytest.raises(ValueError, match=r"r\.yaml: epochs: expected an integer.*, got 'many'"):
        Recipe.load(tmp_path / "r.yaml")


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("epochs", 1.5, "an integer"),
        ("epochs", True, "an integer"),
        ("lr", "fast", "a finite number"),
        ("labels", 1, "true or false"),
        ("clip_grad", "1", r"a finite number above 0 .* or none"),
        ("pairs", [[1, 2, 3]], "pairs of blocks"),
        ("logit_options", [("beta", 8)], "options such as beta=8"),
        ("logit_options", {"beta": [8]}, "options such as beta=8"),
        ("feature_options", "beta", "options such as beta=8"),
        ("logit_options", "beta=[8,9]", "options such as beta=8"),
        ("opt_kwargs", {"betas": ["a", 0.9]}, r"options such as betas=\[0\.9"),
        ("opt_kwargs", "betas=[]", r"options such as betas=\[0\.9"),
        ("sched_kwargs", "decay_milestones", r"options such as betas=\[0\.9"),
        ("mean", "0.5", "a list of numbers or none"),
        ("seed", None, "an integer"),
    ],
)
def test_a_wrong_type_names_field_expected_and_got(field, value, expected):
    with pytest.raises(TypeError, match=f"{field}: expected {expected}"):
        Recipe(**{field: value})


@pytest.mark.parametrize(
    "values",
    [
        {"feature_loss": "l2"},
        {"logit_loss": "kl"},
        {"projector": "conv"},
        {"alpha": 1.5},
        {"alpha": -0.1},
        {"ce_weight": -1.0},
        {"ce_weight": INF},
        {"lr": NAN},
        {"lr": INF},
        {"weight_decay": NAN},
        {"feature_weight": INF},
        {"tau": 0},
        {"epochs": 0},
        {"width": 0},
        {"img_size": -1},
        {"num_classes": 0},
        {"seed": -1},
        {"seed": 2**63},
        {"ema_decay": 1.0},
        {"warmup_epochs": 300},
        {"accumulation": 3, "batch_size": 1024},
        {"pairs": []},
        {"mean": [0.5], "std": None},
        {"mean": [0.5, 0.5, 0.5], "std": [0.2, 0.2]},
        {"mean": [0.5], "std": [0.0]},
        {"std": [0.2], "mean": [NAN]},
        {"scale": [1.0, 0.08]},
        {"scale": [0.5, 1.5]},
        {"scale": [0.5]},
        {"ratio": [0.0, 1.0]},
        {"ratio": [0.5, INF]},
        {"crop_pct": 0.0},
        {"hflip": 1.01},
        {"student_prefix": 1},
        {"teacher": ""},
        {"data": "  "},
        {"feature_options": {"beta": INF}},
        {"feature_options": {" ": 1}},
        {"lr": 1e308},
        {"lr_scaling": False, "lr": 1e300},
        {"tau": 1e-300},
        {"adam_eps": 1e-46},
        {"std": [1.0], "mean": [1e300]},
        {"mean": [0.5], "std": [1e-300]},
        {"workers": 1_000_000},
        {"img_size": 10**6},
        {"width": 10**6},
        {"pairs": [(0, 0), (1, 1), (0, 0)]},
        {"pairs": "11:23,11:23"},
        {"batch_size": 8, "repeated_aug": 1000},
        {"ratio": [4.0, 3.0]},
        {"ratio": [0.0, 0.0]},
        {"batch_size": 2**63},
        {"pairs": [(10**30, 1)]},
        {"pairs": [("a", "")]},
        {"pairs": [{1, 2}]},
        {"pairs": {(1, 2): 3}},
        {"pairs": [b"ab"]},
    ],
    ids=str,
)
def test_values_out_of_range_are_refused(values):
    *_, name = values
    with pytest.raises((ValueError, TypeError), match=rf"(?m)^{name}: expected .*, got "):
        Recipe(**values)


@pytest.mark.parametrize("name", [n for n in Recipe.model_fields if "number" in describe(n)])
@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_no_number_is_infinite_or_nan(name, value):
    several = isinstance(getattr(Recipe(), name), tuple) or name in ("mean", "std")
    with pytest.raises(ValueError, match=f"{name}: expected"):
        Recipe(**{name: [value, value] if several else value})


@pytest.mark.parametrize(
    "policy",
    [
        "rand-mABC",  # timm passes over sections without a number
        "rand-m",
        "rand-",
        "rand--m9",
        "rand-m9-m5",  # the last counts
        "rand-m9.5",
        "rand-m9-w0",
        "rand-m9-mstd",
        "rand-m9-mstd.5",
        "rand-m9-inc2",
        "rand-m9-n0",
        "rand-m9-p2",
        "rand-tx",  # timm takes its default for a set that it does not know
        "random",
        "Rand-m9",
        "rand-m9 ",
        "augmix-m5-w",
        "augmix-mABC",
        "original-m9",
        "v1",
        "3a-mstdABC",
        "rand-m9-mstdinf",
        "trivialaugment",
    ],
)
def test_an_augmentation_that_timm_would_misread_is_refused(policy):
    with pytest.raises(ValueError, match="auto_augment: expected") as refused:
        Recipe(auto_augment=policy)
    assert repr(policy) in str(refused.value)


@pytest.mark.parametrize(
    "policy",
    [
        *("rand", "rand-m9-mstd0.5-inc1", "rand-m9-n3-mstd0.5", "rand-mstd1-tweights"),
        *("rand-m15-n2-mmax20-p0.8", "rand-n2-m10-t3a", "augmix", "augmix-m5-w4-d2-b1-a1.5-mstd2"),
        *("original", "originalr", "v0", "v0r-mstd0.5", "3a"),
    ],
)
def test_an_augmentation_of_timm_is_taken(policy):
    from timm.data import create_transform

    assert create_transform(32, is_training=True, auto_augment=policy)
    assert Recipe(auto_augment=policy).auto_augment == policy


@pytest.mark.parametrize("name", ["tau", "alpha", "ce_weight", "weight_decay", "mixup"])
def test_a_number_beyond_float32_is_refused_with_the_range(name):
    with pytest.raises(ValueError, match=rf"{name}: .*1e-37 to 1e37.*got 1e-300"):
        Recipe(**{name: 1e-300})


def test_a_long_value_is_shown_by_its_beginning():
    with pytest.raises(ValueError, match="epochs: expected") as refused:
        parse_value("epochs", "9" * 5000)
    assert len(str(refused.value)) < 300


def test_every_fault_has_a_line_of_its_own():
    with pytest.raises(ValueError, match="epochs") as error:
        Recipe(epochs=0, lr=-1.0, feature_los="mse")
    lines = str(error.value).splitlines()
    assert [line.split(":")[0] for line in lines[:2]] == ["epochs", "lr"]
    assert "'feature_los' (did you mean 'feature_loss'?)" in lines[2]


def test_a_word_that_is_like_no_choice_gets_no_suggestion():
    with pytest.raises(ValueError, match="variant") as error:
        Recipe(variant="none")
    assert "did you mean" not in str(error.value)


def test_a_misspelt_choice_gets_a_suggestion():
    with pytest.raises(ValueError, match=r"got 'specral' \(did you mean 'spectral'\?\)"):
        Recipe(feature_loss="specral")


def test_an_alpha_above_one_needs_a_cross_entropy_weight_of_its_own():
    assert Recipe(alpha=2.0, ce_weight=1.0).alpha == 2.0


def test_options_are_nobody_elses_dict():
    options = {"beta": 0.5}
    recipe = Recipe(feature_loss="smooth_l1", feature_options=options)
    plain = recipe.to_dict()
    options["beta"] = plain["feature_options"]["beta"] = 9.0
    assert recipe.feature_options == {"beta": 0.5}


@pytest.mark.parametrize(("alpha", "given", "weight"), [(0.9, None, 0.1), (0.9, 1.0, 1.0)])
def test_the_cross_entropy_has_what_alpha_leaves_or_its_own_weight(alpha, given, weight):
    assert Recipe(alpha=alpha, ce_weight=given).cross_entropy_weight == pytest.approx(weight)


def test_options_of_losses_survive_a_file(tmp_path):
    recipe = Recipe(logit_loss="dkd", logit_options={"beta": 0.5}, feature_options={"power": 1})
    recipe.save(tmp_path / "recipe.yaml")
    assert Recipe.load(tmp_path / "recipe.yaml") == recipe


def test_lists_in_options_survive_a_file_and_stay_as_they_are(tmp_path):
    milestones = [30, 60.5]
    recipe = Recipe(sched="multistep", sched_kwargs={"decay_milestones": milestones})
    milestones.append(90)
    recipe.save(tmp_path / "recipe.yaml")
    loaded = Recipe.load(tmp_path / "recipe.yaml")
    assert loaded == recipe and hash(loaded) == hash(recipe)
    assert loaded.sched_kwargs == {"decay_milestones": (30, 60.5)}
    assert recipe.to_dict()["sched_kwargs"] == {"decay_milestones": [30, 60.5]}


def test_a_schedule_that_needs_a_metric_is_refused_with_another():
    with pytest.raises(ValueError, match=r"sched: .*use multistep, got 'plateau'"):
        Recipe(sched="plateau")


def test_overrides_leave_the_original_alone():
    recipe = Recipe()
    assert recipe.override(lr=1).lr == 1.0
    assert recipe.lr == 5e-4


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("epochs", "3", 3),
        ("lr", "1e-3", 1e-3),
        ("labels", "true", True),
        ("ema_decay", "none", None),
        ("mean", "0.5,0.4,0.3", (0.5, 0.4, 0.3)),
        ("pairs", "0:0,-1:23", ((0, 0), (-1, 23))),
        ("teacher", "cait_s24_224", "cait_s24_224"),
        ("feature_options", "beta=8,eps=1e-5", {"beta": 8, "eps": 1e-5}),
        ("feature_options", "gather=true, loss=mse", {"gather": True, "loss": "mse"}),
        ("feature_options", "beta=none", {"beta": None}),
        ("feature_options", "none", None),
        ("opt_kwargs", "betas=[0.9, 0.98],eps=1e-6", {"betas": (0.9, 0.98), "eps": 1e-6}),
        ("sched_kwargs", "decay_milestones=[30,60]", {"decay_milestones": (30, 60)}),
    ],
)
def test_command_line_text_becomes_typed_values(name, text, value):
    assert parse_value(name, text) == value


def test_command_line_text_of_the_wrong_type_is_refused():
    with pytest.raises(ValueError, match=r"epochs: expected an integer.*, got 'x'"):
        parse_value("epochs", "x")


def test_pairs_may_name_modules():
    assert parse_value("pairs", "stem.conv:3") == (("stem.conv", 3),)


def test_differences_leave_out_where_and_how_fast():
    other = Recipe(workers=1, data="elsewhere", lr=1.0)
    assert Recipe().differences(other) == {"lr": (5e-4, 1.0)}


def test_an_option_given_twice_is_refused():
    with pytest.raises(ValueError, match=r"feature_options: expected.*'beta=1,beta=2'"):
        parse_value("feature_options", "beta=1,beta=2")


def test_a_section_stands_alone():
    assert SECTIONS["optim"](lr=1.0).scaled_lr == 2.0
    with pytest.raises(ValueError, match="unknown recipe field 'mixup'"):
        SECTIONS["optim"](mixup=0.5)


def test_every_field_is_in_one_section():
    fields = [name for section in SECTIONS.values() for name in section.model_fields]
    assert fields == list(Recipe.model_fields)
    assert len(set(fields)) == len(fields)


@pytest.mark.parametrize("name", Recipe.model_fields)
def test_every_field_has_a_description(name):
    assert Recipe.model_fields[name].description


SCHEMA = jsonschema.Draft202012Validator(Recipe.json_schema())


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_shipped_recipe_fits_the_schema_for_editors(name):
    SCHEMA.validate(yaml.safe_load(Recipe.path(name).read_text(encoding="utf-8")))


@pytest.mark.parametrize(
    "values",
    [
        *({"epocs": 3}, {"epochs": 0}, {"lr": "fast"}, {"amp": "fp8"}, {"feature_loss": "l2"}),
        *({"pairs": []}, {"mean": []}, {"scale": [0, 1]}),
    ],
    ids=str,
)
def test_the_schema_refuses_what_a_recipe_refuses(values):
    assert not SCHEMA.is_valid(values)


def test_the_schema_takes_the_words_of_the_command_line():
    SCHEMA.validate({"ce_weight": "none", "mean": "0.5,0.5", "pairs": "11:23", "ema_decay": None})


def test_the_schema_takes_a_whole_saved_recipe(tmp_path):
    recipe = Recipe(mean=(0.5,), std=(0.2,), feature_options={"beta": 2.0}, clip_grad=1)
    recipe = recipe.override(opt_kwargs={"betas": (0.9, 0.98)})
    SCHEMA.validate(recipe.to_dict())
