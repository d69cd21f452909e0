"""Recipes: loading, overriding, what is refused and how it is said."""

import pytest
import yaml

from fastkd.training.recipe import Recipe, parse_pairs, parse_value


@pytest.mark.parametrize("name", Recipe.names())
def test_every_shipped_recipe_loads_and_says_what_it_aims_at(name):
    recipe = Recipe.load(name)
    text = Recipe.path(name).read_text(encoding="utf-8")
    assert recipe.epochs >= 300
    assert "Aims at: " in text
    assert "Selected by: " in text


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("lift_softkd_spectral", ("lift", "spectral", "lift", 0.9, 2e-3, True)),
        ("lift_softkd_mse", ("lift", "mse", "lift", 0.9, 2e-3, True)),
        ("widelast_softkd_spectral", ("widelast", "spectral", "none", 0.9, 2e-3, True)),
        ("widelast_softkd_mse", ("widelast", "mse", "none", 0.9, 2e-3, True)),
        ("spectralkd_deit_tiny", ("plain", "spectral", "pool", 0.9, 5e-4, False)),
        ("deit_tiny", ("plain", "mse", "none", 0.0, 1e-3, False)),
    ],
)
def test_shipped_recipes_hold_the_published_settings(name, expected):
    r = Recipe.load(name)
    settings = (r.variant, r.feature_loss, r.projector, r.alpha, r.scaled_lr, r.decay_pos_embed)
    assert settings == expected


def test_spectralkd_pairs_eight_blocks():
    pairs = dict(Recipe.load("spectralkd_deit_tiny").pairs)
    assert pairs == {0: 0, 1: 1, 6: 18, 7: 19, 8: 20, 9: 21, 10: 22, 11: 23}


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


def test_yaml_may_write_pairs_as_lists_or_text(tmp_path):
    for pairs in ([[0, 0], [11, 23]], "0:0,11:23"):
        (tmp_path / "r.yaml").write_text(yaml.safe_dump({"pairs": pairs}))
        assert Recipe.load(tmp_path / "r.yaml").pairs == ((0, 0), (11, 23))


def test_an_unknown_field_is_an_error_with_a_suggestion():
    with pytest.raises(ValueError, match=r"unknown recipe field 'feature_los'.*'feature_loss'"):
        Recipe().override(feature_los="mse")


def test_an_unknown_name_is_an_error_with_a_suggestion():
    with pytest.raises(ValueError, match=r"no recipe 'lift_softkd_spectrl'.*lift_softkd_spectral"):
        Recipe.load("lift_softkd_spectrl")


def test_an_error_in_a_file_names_the_file(tmp_path):
    (tmp_path / "r.yaml").write_text("epochs: many\n")
    with pytest.raises(TypeError, match=r"r\.yaml: epochs: expected an integer, got 'many' \(str"):
        Recipe.load(tmp_path / "r.yaml")


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("epochs", 1.5, "an integer"),
        ("epochs", True, "an integer"),
        ("lr", "fast", "a number"),
        ("hard", 1, "true or false"),
        ("clip_grad", "1", "a number or none"),
        ("pairs", [[1, 2, 3]], "pairs of blocks"),
        ("mean", "0.5", "a list of numbers or none"),
        ("seed", None, "an integer"),
    ],
)
def test_a_wrong_type_names_field_expected_and_got(field, value, expected):
    with pytest.raises(TypeError, match=f"{field}: expected {expected}"):
        Recipe(**{field: value})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("feature_loss", "l2"),
        ("alpha", 1.5),
        ("epochs", 0),
        ("ema_decay", 1.0),
        ("warmup_epochs", 300),
        ("accumulation", 3),
        ("pairs", []),
        ("mean", [0.5]),
        ("student_prefix", 1),
    ],
)
def test_values_out_of_range_are_refused(field, value):
    with pytest.raises(ValueError, match=r"\w+: expected"):
        Recipe(**{field: value})


def test_overrides_leave_the_original_alone():
    recipe = Recipe()
    assert recipe.override(lr=1).lr == 1.0
    assert recipe.lr == 5e-4


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("epochs", "3", 3),
        ("lr", "1e-3", 1e-3),
        ("hard", "true", True),
        ("ema_decay", "none", None),
        ("mean", "0.5,0.4,0.3", (0.5, 0.4, 0.3)),
        ("pairs", "0:0,-1:23", ((0, 0), (-1, 23))),
        ("teacher", "cait_s24_224", "cait_s24_224"),
    ],
)
def test_command_line_text_becomes_typed_values(name, text, value):
    assert parse_value(name, text) == value


def test_command_line_text_of_the_wrong_type_is_refused():
    with pytest.raises(ValueError, match="epochs: expected an integer, got 'x'"):
        parse_value("epochs", "x")


def test_pairs_may_name_modules():
    assert parse_pairs("stem.conv:3") == (("stem.conv", 3),)


def test_differences_leave_out_where_and_how_fast():
    other = Recipe(workers=1, data="elsewhere", lr=1.0)
    assert Recipe().differences(other) == {"lr": (5e-4, 1.0)}
