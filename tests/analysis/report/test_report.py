"""Reports: nothing is lost on the way to a folder and back, and nothing wrong comes back."""

import dataclasses
import json
import sys

import numpy as np
import pytest

from fastkd.analysis import results as codec
from fastkd.analysis.report import Report
from fastkd.analysis.results import Curve, ModelResult
from tests.analysis import made_results as made


@pytest.fixture(scope="module")
def report():
    skipped = [("n01/torn.JPEG", "truncated")]
    return made.report(made.model(skipped=skipped), made.model("other", layers=1, seed=1))


@pytest.fixture
def saved(report, tmp_path):
    report.save(tmp_path, figures=False)
    return tmp_path


def with_last(model, **changes):
    last = dataclasses.replace(model.last, **changes)
    return dataclasses.replace(model, layers=[*model.layers[:-1], last])


def strict_json(path):
    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)


def test_a_loaded_report_equals_the_saved_one(report, saved):
    loaded = Report.load(saved)

    assert loaded == report
    assert loaded.models[0].last.ranks.values.dtype == np.int32
    assert loaded.models[0].skipped == report.models[0].skipped
    assert loaded.models[0].input_size == (224, 224)


def test_models_without_optional_parts_come_back(tmp_path):
    bare = dataclasses.replace(
        with_last(made.model(), sep=None, sep_test=None, shared=None),
        parameters=None,
        input_size=None,
        architecture="",
    )
    report = made.report(bare)

    report.save(tmp_path, figures=False)

    assert Report.load(tmp_path) == report


def test_reports_that_differ_in_one_number_are_not_equal(report):
    values = report.models[0].last.ranks.values.copy()
    values[0, 0] += 1
    ranks = dataclasses.replace(report.models[0].last.ranks, values=values)
    changed = dataclasses.replace(
        report, models=[with_last(report.models[0], ranks=ranks), *report.models[1:]]
    )

    assert changed != report
    assert dataclasses.replace(report, settings={**report.settings, "seed": 1}) != report


def test_nan_survives_in_valid_json(tmp_path):
    model = made.model()
    lost = np.full_like(model.last.effective_rank, np.nan)
    ranks = dataclasses.replace(model.last.ranks, values=np.zeros_like(model.last.ranks.values))
    model = with_last(model, effective_rank=lost, ranks=ranks)
    model = dataclasses.replace(model, seconds={"forward": float("nan"), "analysis": float("inf")})
    report = made.report(model)

    report.save(tmp_path, figures=False)

    content = strict_json(tmp_path / "report.json")
    assert content["models"][0]["layers"][-1]["ranks"]["0.99"]["mean"] is None
    assert Report.load(tmp_path) == report


def test_json_names_format_and_version(saved):
    content = strict_json(saved / "report.json")

    assert (content["format"], content["version"]) == ("fastkd-analysis", 1)


def test_json_holds_the_numbers_that_people_look_for(report):
    layer = report.to_dict()["models"][0]["layers"][-1]

    last = report.models[0].last
    assert layer["ranks"]["0.99"]["percentile_99"] == last.ranks.distribution(0.99).percentile_99
    assert layer["sep"]["bandwidths"]["0.9"] == last.sep.bandwidths[-1]
    assert layer["rotation"][0]["overlap_random"] == last.shared.rotation[0].overlap_random
    json.dumps(report.to_dict(), allow_nan=False)


def test_arrays_are_readable_without_fastkd_and_without_pickle(report, saved):
    with np.load(saved / "arrays.npz", allow_pickle=False) as arrays:
        found = arrays["results.models.0.layers.2.shared.curves"]

    np.testing.assert_array_equal(found, report.models[0].last.shared.curves)


def test_equal_reports_give_equal_files(report, saved, tmp_path_factory):
    again = tmp_path_factory.mktemp("again")
    report.save(again, figures=False)

    for name in ("report.json", "report.md", "arrays.npz"):
        assert (again / name).read_bytes() == (saved / name).read_bytes()


def test_saving_leaves_no_temporary_files_and_replaces_an_older_report(saved):
    other = made.report(made.model("newer", seed=7))

    other.save(saved, figures=False)

    assert Report.load(saved) == other
    assert not [path for path in saved.rglob("*") if path.name.endswith(".tmp")]


def test_every_table_is_written_as_csv_and_latex(saved):
    stems = {path.stem for path in (saved / "tables").glob("*.csv")}

    assert {"models", "ranks_last_layer", "ranks_by_layer", "rotation", "comparison"} <= stems
    assert stems == {path.stem for path in (saved / "tables").glob("*.tex")}


def truncate(path):
    path.write_bytes(path.read_bytes()[:-20])


def foreign_format(path):
    path.write_text(json.dumps({"format": "something else"}))


def other_version(path):
    path.write_text(json.dumps({**json.loads(path.read_text()), "version": 99}))


def no_models(path):
    content = json.loads(path.read_text())
    content["results"]["models"] = []
    path.write_text(json.dumps(content))


def field_missing(path):
    content = json.loads(path.read_text())
    del content["results"]["models"][0]["layers"][0]["curve"]
    path.write_text(json.dumps(content))


def array_missing(path):
    content = json.loads(path.read_text())
    content["results"]["models"][0]["layers"][0]["stable_rank"] = {"array": "nowhere"}
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("report.json", lambda path: path.unlink(), "No such file"),
        ("report.json", truncate, "cannot be read"),
        ("report.json", lambda path: path.write_text("[1, 2]"), "no mapping"),
        ("report.json", lambda path: path.write_bytes(b"\xff\xfe\x00"), "cannot be read"),
        ("report.json", foreign_format, "no report"),
        ("report.json", other_version, "version 1, got 99"),
        ("report.json", no_models, "at least one result"),
        ("report.json", field_missing, "curve"),
        ("report.json", array_missing, "nowhere"),
        ("arrays.npz", lambda path: path.unlink(), "No such file"),
        ("arrays.npz", truncate, "torn or belongs to another"),
    ],
)
def test_a_missing_foreign_or_torn_file_is_refused_by_name(saved, name, damage, message):
    damage(saved / name)

    with pytest.raises(ValueError, match=message) as caught:
        Report.load(saved)

    assert str(saved / name) in str(caught.value)


def test_arrays_of_another_report_are_refused(saved, tmp_path_factory):
    other = tmp_path_factory.mktemp("other")
    made.report(made.model("other", seed=5)).save(other, figures=False)
    (saved / "arrays.npz").write_bytes((other / "arrays.npz").read_bytes())

    with pytest.raises(ValueError, match="belongs to another"):
        Report.load(saved)


def test_a_report_needs_a_model():
    with pytest.raises(ValueError, match="at least one result"):
        Report([], {}, {})


def test_merging_keeps_models_in_order_and_settings_as_they_are():
    first, second = made.report(made.model("a")), made.report(made.model("b", seed=1))

    merged = Report.merged([first, second])

    assert [model.name for model in merged.models] == ["a", "b"]
    assert merged.settings == first.settings
    assert merged.environment == first.environment


def test_merging_one_report_changes_nothing(report):
    assert Report.merged([report]) == report


@pytest.mark.parametrize(
    ("name", "value"),
    [("levels", [0.9]), ("bandwidth_levels", [0.5]), ("convention", "folded"), ("centered", True)],
)
def test_reports_of_different_quantities_do_not_merge(name, value):
    with pytest.raises(ValueError, match=f"the same {name}"):
        Report.merged([made.report(), made.report(**{name: value})])


def test_levels_loaded_from_json_match_those_of_a_fresh_report(tmp_path):
    fresh = made.report(made.model("fresh"), levels=(0.8, 0.9, 0.95, 0.99))
    fresh.save(tmp_path, figures=False)

    merged = Report.merged([fresh, Report.load(tmp_path)])

    assert [model.name for model in merged.models] == ["fresh", "fresh (2)"]


def test_different_data_are_kept_by_model_through_saving_and_merging_again(tmp_path):
    first = made.report(made.model("a"), data="imagenet/val")
    second = made.report(made.model("b", seed=1), data="photographs")
    third = made.report(made.model("c", seed=2), data="imagenet/val")

    merged = Report.merged([Report.merged([first, second]), third])

    assert merged.settings["by_model"] == {
        "data": {"a": "imagenet/val", "b": "photographs", "c": "imagenet/val"}
    }
    text = merged.save(tmp_path, figures=False).read_text()
    assert "not all measured alike" in text
    assert "photographs" in text
    assert Report.load(tmp_path) == merged


def test_the_written_report_warns_of_untrained_weights_first(tmp_path):
    untrained = made.report(made.model("deit_tiny_patch16_224", weights="untrained"))

    text = untrained.save(tmp_path, figures=False).read_text()

    assert text.index("Untrained weights: deit_tiny_patch16_224") < text.index("## ")
    assert "UNTRAINED" in untrained.summary()


def test_the_written_report_says_what_was_measured_and_how_to_repeat_it(tmp_path):
    report = made.report(command="fastkd analyze cait_s24_224 --data imagenet/val")

    text = report.save(tmp_path, figures=False).read_text()

    for part in ("cait_s24_224.fb_dist_in1k", "imagenet/val", "2.15.0", '"seed": 0'):
        assert part in text
    assert "```bash\nfastkd analyze cait_s24_224 --data imagenet/val\n```" in text
    assert "arXiv 2511.15572" not in text  # was not asked for


def test_the_paper_stands_beside_where_it_was_asked_for(tmp_path):
    text = made.report(compare_paper=True).save(tmp_path, figures=False).read_text()

    assert "Beside the paper" in text
    assert (tmp_path / "tables" / "paper_ranks.csv").exists()


def test_the_summary_holds_the_findings_of_every_model(report):
    text = report.summary()

    for model in report.models:
        assert f"{model.name} (pretrained)" in text
    assert f"{report.models[0].last.ranks.distribution(0.99).mean:.1f}" in text
    assert "images skipped: 1" in text


def test_without_matplotlib_everything_but_the_figures_is_written(
    report, tmp_path, monkeypatch, caplog
):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "fastkd.analysis.report.plots", raising=False)
    monkeypatch.delattr("fastkd.analysis.report.plots", raising=False)

    report.save(tmp_path)

    assert "no figures" in caplog.text
    assert not (tmp_path / "figures").exists()
    assert Report.load(tmp_path) == report


def test_a_value_that_json_cannot_hold_is_refused_by_its_path():
    with pytest.raises(TypeError, match=r"settings\.odd must be a plain value, got object"):
        codec.encode({"odd": object()}, {}, "settings")


@pytest.mark.parametrize(
    ("kind", "value", "message"),
    [
        (int, "five", "valid integer"),
        (float, "five", "valid number"),
        (list[int], 5, "valid list"),
        (tuple[int, int], [1, 2, 3], "at most 2 items"),
        (Curve, {"std": {"array": "x"}}, r"mean.*required"),
        (Curve, {"mean": {"array": "x"}, "median": 1}, "median"),
        (Curve, {"mean": [0.5]}, r"mean.*ndarray"),
        (ModelResult, None, "dictionary"),
    ],
)
def test_a_value_of_another_kind_is_refused_by_its_path(kind, value, message):
    with pytest.raises(ValueError, match=message):
        codec.decode(kind, value, {"x": np.zeros(1)})


def test_a_second_report_in_the_folder_leaves_nothing_of_the_first(report, tmp_path):
    report.save(tmp_path, figures=False)
    (tmp_path / "tables" / "mine.csv").write_text("kept")
    before = {path.name for path in (tmp_path / "tables").iterdir()}
    smaller = dataclasses.replace(report, models=report.models[1:])  # without skipped images
    smaller.save(tmp_path, figures=False)
    alone = smaller.save(tmp_path / "alone", figures=False).parent
    names = {path.name for path in (tmp_path / "tables").iterdir()}
    assert names == {path.name for path in (alone / "tables").iterdir()} | {"mine.csv"}
    assert names < before
