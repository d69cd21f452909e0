"""analyze and its command line, as a user runs them: models and data in, a report out."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image

import fastkd
from fastkd.analysis import Report, analyze, analyzer
from fastkd.cli import main
from fastkd.models import create_student

VIT = "vit_tiny_patch16_224"
SMALL = {"untrained": True, "img_size": 32, "workers": 0, "device": "cpu", "quiet": True}
QUICK = {"layers": "0,-1", "permutations": 3, "subspaces": (1, 2), "figures": False}


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """Two classes of three images."""
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (folder / name).mkdir()
        for number in range(3):
            pixels = rng.integers(0, 255, (6, 6, 3), dtype=np.uint8)
            Image.fromarray(pixels).resize((40, 40)).save(folder / name / f"{number}.png")
    return folder


@pytest.fixture
def saved_tokens(tmp_path):
    folder = tmp_path / "tokens"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in range(6):
        np.save(folder / f"{number}.npy", rng.normal(size=(2, 9, 12)).astype(np.float32))
    return folder


def test_a_model_on_an_image_folder_gives_a_report_with_everything(photographs, tmp_path):
    report = analyze(VIT, photographs, tmp_path / "out", **SMALL, **QUICK | {"figures": True})
    (model,) = report.models
    assert (model.weights, model.images, model.input_size) == ("untrained", 6, (32, 32))
    assert [layer.name for layer in model.layers] == ["blocks.0", "blocks.11"]
    assert (model.last.tokens, model.last.channels) == (4, 192)
    assert model.last.shared is not None and model.last.sep_test is not None
    assert Report.load(tmp_path / "out") == report
    for name in ("report.md", "report.json", "arrays.npz"):
        assert (tmp_path / "out" / name).stat().st_size > 0
    assert list((tmp_path / "out" / "figures").glob("*.pdf"))
    assert list((tmp_path / "out" / "tables").glob("*.tex"))
    assert not (tmp_path / "out" / analyzer.RESUME_FOLDER).exists()
    assert "untrained" in (tmp_path / "out" / "report.md").read_text().lower()


@pytest.mark.slow
def test_models_of_every_kind_stand_side_by_side(photographs, tmp_path):
    lift = create_student("deit_tiny_patch16_224", "lift", width=64, num_classes=2, img_size=32)
    first = analyze(VIT, photographs, tmp_path / "first", **SMALL, **QUICK)
    report = analyze(
        tmp_path / "first", photographs, compare=[lift, VIT], **SMALL, **QUICK | {"layers": "last"}
    )
    assert [model.last.channels for model in report.models] == [192, 64, 192]
    assert [model.last.name for model in report.models] == ["blocks.11", "final", "blocks.11"]
    assert report.models[0].layers[0].name == first.models[0].layers[0].name
    assert len({model.name for model in report.models}) == 3


def test_saved_reports_need_no_data(photographs, tmp_path):
    analyze(VIT, photographs, tmp_path / "one", **SMALL, **QUICK)
    joined = analyze([tmp_path / "one", tmp_path / "one"], output=tmp_path / "two", figures=False)
    assert len(Report.load(tmp_path / "two").models) == len(joined.models) == 2


def test_saved_tokens_are_measured_under_a_label(saved_tokens):
    report = analyze("theirs", saved_tokens, quiet=True, device="cpu", **QUICK | {"layers": "all"})
    (model,) = report.models
    assert (model.name, model.weights, model.parameters) == ("theirs", "saved tokens", None)
    assert [layer.name for layer in model.layers] == ["layer.0", "layer.1"]
    truth = np.load(saved_tokens / "0.npy")[1].astype(float)
    ranks = {tuple(row) for row in model.last.ranks.values.tolist()}
    parts = np.cumsum(np.linalg.svd(truth)[1] ** 2) / (truth**2).sum()
    assert tuple(int(np.argmax(parts >= q)) + 1 for q in (0.8, 0.9, 0.95, 0.99)) in ranks


def test_saved_tokens_refuse_what_is_of_models(saved_tokens):
    for given in ({"checkpoint": "x.pth"}, {"img_size": 32}, {"amp": "bf16"}, {"untrained": True}):
        (name,) = given
        with pytest.raises(ValueError, match=f"analyze: {name} has no effect on the saved tokens"):
            analyze("theirs", saved_tokens, quiet=True, device="cpu", **QUICK, **given)


def test_a_folder_of_images_and_tokens_is_refused(photographs, tmp_path):
    for path in photographs.glob("cat/*.png"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    np.save(tmp_path / "stray.npy", np.ones((2, 3)))
    with pytest.raises(ValueError, match=r"both images and saved tokens"):
        analyze(VIT, tmp_path, **SMALL, **QUICK)


def test_reports_that_cannot_be_compared_are_refused_before_measuring(
    photographs, tmp_path, monkeypatch
):
    analyze(VIT, photographs, tmp_path / "one", levels=(0.5,), **SMALL, **QUICK)
    monkeypatch.setattr(analyzer._Run, "_source", None)
    with pytest.raises(ValueError, match="reports must have the same levels"):
        analyze([VIT, tmp_path / "one"], photographs, **SMALL, **QUICK)


def test_averaged_weights_may_be_asked_for_beside_a_teacher_by_name():
    assert analyzer._opening(VIT, True, True, "ema")["weights"] == "auto"
    assert analyzer._opening(VIT, False, False, "ema")["weights"] == "ema"


def test_the_same_seed_gives_the_same_report_and_images_are_taken_evenly(photographs):
    ours, theirs = (analyze(VIT, photographs, images=4, **SMALL, **QUICK) for _ in range(2))
    np.testing.assert_array_equal(
        ours.models[0].last.ranks.values, theirs.models[0].last.ranks.values
    )
    assert ours.models[0].images == 4


def test_an_interrupted_analysis_is_resumed_model_by_model(photographs, tmp_path, monkeypatch):
    models, out = [VIT, "vit_tiny_patch16_384"], tmp_path / "out"
    whole = analyze(models, photographs, **SMALL, **QUICK)
    built = []

    def source(run, model, opening):
        built.append(model)
        if len(built) == 2:
            raise KeyboardInterrupt
        return original(run, model, opening)

    original = analyzer._Run._source
    monkeypatch.setattr(analyzer._Run, "_source", source)
    with pytest.raises(KeyboardInterrupt):
        analyze(models, photographs, out, **SMALL, **QUICK)
    with pytest.raises(ValueError, match="holds an interrupted analysis; give resume=True"):
        analyze(models, photographs, out, **SMALL, **QUICK)
    with pytest.raises(ValueError, match=r"another analysis .*its seed is 0, not 1"):
        analyze(models, photographs, out, resume=True, seed=1, **SMALL, **QUICK)
    other = ["deit_tiny_patch16_224", models[1]]
    with pytest.raises(ValueError, match="another analysis"):
        analyze(other, photographs, out, resume=True, **SMALL, **QUICK)
    resumed = analyze(models, photographs, out, resume=True, **SMALL, **QUICK)
    for ours, theirs in zip(resumed.models, whole.models):
        np.testing.assert_array_equal(ours.last.ranks.values, theirs.last.ranks.values)
        np.testing.assert_allclose(ours.last.sep.curve.mean, theirs.last.sep.curve.mean)
    assert not (out / analyzer.RESUME_FOLDER).exists()


def test_unreadable_images_are_reported_by_name(photographs, tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    for path in photographs.rglob("*.png"):
        (folder / f"{path.parent.name}{path.name}").write_bytes(path.read_bytes())
    (folder / "broken.png").write_bytes(b"no image")
    report = analyze(VIT, folder, max_unreadable=0.2, **SMALL, **QUICK)
    ((name, reason),) = report.models[0].skipped
    assert "broken.png" in name and reason
    with pytest.raises(RuntimeError, match=r"1 of 7 images could not be read.*broken\.png"):
        analyze(VIT, folder, **SMALL, **QUICK)


def test_the_command_line_measures_and_says_where_the_report_is(photographs, tmp_path, capsys):
    out = tmp_path / "out"
    status = main(
        [
            *("analyze", VIT, "--data", str(photographs), "--output", str(out), "--untrained"),
            *("--img-size", "32", "--layers", "last", "--images", "all", "--workers", "0"),
            *("--permutations", "0", "--subspaces", "1,2", "--levels", "0.5,0.99"),
            *("--sep", "folded", "--device", "cpu", "--no-figures", "--quiet", "--compare-paper"),
        ]
    )  # fmt: skip
    assert status == 0
    assert str(out / "report.md") in capsys.readouterr().out
    report = Report.load(out)
    assert report.models[0].last.ranks.levels == (0.5, 0.99)
    assert report.models[0].last.sep.convention == "folded"
    assert [plane.k for plane in report.models[0].last.shared.rotation] == [1, 2]
    settings = json.loads((out / "report.json").read_text())["settings"]
    assert settings["compare_paper"] is True and settings["images"] is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["vit_tinny_patch16_224", "--data", "DATA"], "did you mean vit_tiny_patch16_224"),
        ([VIT], "data is missing"),
        ([VIT, "--data", "nowhere"], "nowhere"),
        ([VIT, "deit_tiny_patch16_224", "--data", "DATA", "--checkpoint", "x.pth"], "one model"),
        ([VIT, "--data", "DATA", "--resume"], "resume needs output"),
        ([VIT, "--data", "DATA", "--untrained", "--layers", "99"], "99"),
        ([VIT, "--data", "DATA", "--untrained", "--num-prefix", "1"], "num_prefix: expected mod"),
        ([VIT, "--data", "DATA", "--levels", "a"], "invalid floats with commas between value: 'a'"),
        ([VIT, "--data", "DATA", "--color", "red"], "unknown argument --color"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_the_command_line_refuses_in_one_line(arguments, message, photographs, capsys):
    arguments = [str(photographs) if word == "DATA" else word for word in arguments]
    try:
        status = main(["analyze", *arguments, "--quiet", "--workers", "0", "--no-figures"])
    except SystemExit as stop:
        status = stop.code
    error = capsys.readouterr().err
    assert status == 2
    assert message in error and len(error.strip().splitlines()) == 1


def test_without_matplotlib_figures_are_refused_before_anything_is_measured(
    photographs, tmp_path, monkeypatch
):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'fastkd\[analysis\]'"):
        analyze(VIT, photographs, tmp_path / "out", **SMALL)
    assert not (tmp_path / "out").exists()


def test_an_unknown_option_is_refused_by_name(photographs):
    with pytest.raises(ValueError, match=r"analyze: .*'level' \(did you mean 'levels'\?\)"):
        analyze(VIT, photographs, level=0.9)


def test_no_model_is_refused(photographs):
    with pytest.raises(ValueError, match="at least one model, got none"):
        analyze([], photographs)


def test_it_is_there_at_the_top():
    assert fastkd.analyze is analyze and fastkd.Report is Report


def test_measuring_changes_neither_weights_nor_mode(photographs):
    model = create_student(
        "deit_tiny_patch16_224", "widelast", width=64, num_classes=2, img_size=32
    ).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    analyze(model, photographs, workers=0, device="cpu", quiet=True, **QUICK)
    assert model.training
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
