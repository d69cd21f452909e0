"""The demo at a size that takes seconds: what it writes, what it keeps, what it refuses."""

import contextlib
import io
import json
import sys
from dataclasses import replace
from importlib import metadata

import pytest
import torch

import fastkd.demo
from fastkd.cli import main
from fastkd.demo import experiment, run_demo
from fastkd.demo.experiment import CONTENDERS, HELD_OUT, QUICK, load_digits, mean_and_spread
from fastkd.training import trainer

TINY = replace(
    QUICK,
    name="tiny",
    teacher_epochs=2,
    student_epochs=2,
    augmented_copies=1,
    teacher_width=12,
    teacher_depth=1,
    student_depth=1,
)
RUNS = 1 + 2 * len(CONTENDERS)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder in which two seeds have run."""
    output = tmp_path_factory.mktemp("demo")
    run_demo(TINY, 2, output)
    return output


@pytest.fixture(scope="module")
def printed(finished):
    """What a further run prints: (standard output, standard error)."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        run_demo(TINY, 2, finished)
    return out.getvalue(), err.getvalue()


@pytest.fixture
def trained(monkeypatch):
    """Names of the runs whose recipes were really begun, filled as the demo goes."""
    names = []
    train_one_epoch = trainer.train_one_epoch

    def noting(run, *rest):
        if not run.history:
            names.append(run.output.name)
        return train_one_epoch(run, *rest)

    monkeypatch.setattr(trainer, "train_one_epoch", noting)
    return names


def test_figures_results_and_every_run_are_in_the_folder(finished):
    for name in ("accuracy.png", "ranks.png"):
        assert (finished / name).read_bytes().startswith(b"\x89PNG")
    folders = {path.name for path in (finished / "runs").iterdir()}
    assert folders == {"teacher"} | {f"{c.key}-seed{s}" for c in CONTENDERS for s in (0, 1)}
    assert all((finished / "runs" / name / "last.pth").exists() for name in folders)


def test_results_hold_every_student_seed_by_seed(finished):
    results = json.loads((finished / "results.json").read_text(encoding="utf-8"))
    assert results["versions"]["torch"] == metadata.version("torch")
    students = {student["student"]: student for student in results["students"]}
    assert list(students) == [c.key for c in CONTENDERS]
    for student in students.values():
        assert len(student["top1"]) == 2
        assert student["top1_mean"] == pytest.approx(sum(student["top1"]) / 2)
    lift, twin = students["lift-kd"], students["lift"]
    expected = [a - b for a, b in zip(lift["top1"], twin["top1"], strict=True)]
    assert lift["gain"] == pytest.approx(expected)
    assert students["plain"]["parameters"] < lift["parameters"] == twin["parameters"]


def test_distillation_reaches_the_students(finished):
    for contender in CONTENDERS:
        columns = (finished / "runs" / f"{contender.key}-seed0" / "epochs.csv").read_text()
        assert ("feature" in columns) == (contender.projector is not None)
        assert ("soft_kd" in columns) == (contender.projector is not None)


def test_ranks_are_of_the_teacher_and_of_every_distilled_student(finished):
    results = json.loads((finished / "results.json").read_text(encoding="utf-8"))
    ranks = {rank["model"]: rank for rank in results["ranks"]}
    assert list(ranks) == ["teacher", "plain + KD", "Lift + KD", "WideLast + KD"]
    assert {name: rank["dim"] for name, rank in ranks.items()} == {
        "teacher": 12,
        "plain + KD": 6,
        "Lift + KD": 12,
        "WideLast + KD": 12,
    }
    for rank in ranks.values():
        assert rank["per_image"]["images"] == HELD_OUT
        own, shared = (rank[v]["statistics"]["0.99"]["mean"] for v in ("per_image", "dataset"))
        assert own <= shared


@pytest.mark.slow
def test_a_second_run_trains_nothing_and_reports_the_same(finished, trained, capsys):
    before = (finished / "results.json").read_bytes()
    run_demo(TINY, 2, finished)
    printed = capsys.readouterr()
    assert trained == []
    assert (finished / "results.json").read_bytes() == before
    assert printed.err.count("kept from before") == RUNS
    assert f"{RUNS} runs, {RUNS} of them kept from before" in printed.out


@pytest.mark.slow
def test_the_report_has_both_tables_and_says_what_they_cannot_show(printed):
    text = " ".join(printed[0].split())
    for words in (
        "gain over its twin",
        "projector dropped",
        "WideLast",
        "shared by all",
        "no evidence about ImageNet",
        "results.json",
    ):
        assert words in text
    assert text.count("±") >= 2 * len(CONTENDERS) - 3


@pytest.mark.slow
def test_progress_is_one_numbered_line_a_run(printed):
    lines = printed[1].splitlines()
    assert len(lines) == RUNS
    assert lines[0].startswith(f"[ 1/{RUNS}] teacher: ")
    assert lines[-1].startswith(f"[{RUNS}/{RUNS}] WideLast + KD, seed 1: ")


@pytest.mark.slow
def test_fewer_seeds_report_those_alone(finished, trained):
    findings_before = (finished / "results.json").read_bytes()
    run_demo(TINY, 1, finished)
    students = json.loads((finished / "results.json").read_text(encoding="utf-8"))["students"]
    assert trained == []
    assert all(len(s["top1"]) == 1 and s["top1_std"] is None for s in students)
    run_demo(TINY, 2, finished)
    assert (finished / "results.json").read_bytes() == findings_before


@pytest.mark.slow
def test_an_interrupted_demo_continues_with_what_is_missing(tmp_path, monkeypatch, trained, capsys):
    students = []
    build = experiment.build_student

    def stopping(*arguments):
        students.append(arguments)
        if len(students) == 3:
            raise KeyboardInterrupt
        return build(*arguments)

    monkeypatch.setattr(experiment, "build_student", stopping)
    with pytest.raises(KeyboardInterrupt):
        run_demo(TINY, 1, tmp_path)
    assert "the same command continues" in capsys.readouterr().err
    assert trained == ["teacher", "plain-seed0", "plain-kd-seed0"]
    assert not (tmp_path / "results.json").exists()
    trained.clear()
    run_demo(TINY, 1, tmp_path)
    assert trained == [f"{c.key}-seed0" for c in CONTENDERS[2:]]


def test_other_settings_in_the_same_folder_are_refused(finished, trained):
    with pytest.raises(ValueError, match=r"student_epochs 2 -> 3.*choose another --output"):
        run_demo(replace(TINY, student_epochs=3), 2, finished)
    assert trained == []


def test_quick_and_full_have_folders_of_their_own(monkeypatch):
    calls = []
    monkeypatch.setattr(fastkd.demo, "run_demo", lambda *arguments: calls.append(arguments))
    assert main(["demo"]) == 0
    assert main(["demo", "--quick"]) == 0
    assert main(["demo", "--quick", "--seeds", "5", "--output", "here"]) == 0
    assert [(settings.name, seeds, str(output)) for settings, seeds, output in calls] == [
        ("full", experiment.FULL.default_seeds, "fastkd-demo"),
        ("quick", 1, "fastkd-demo-quick"),
        ("quick", 5, "here"),
    ]


@pytest.mark.parametrize("module, package", [("sklearn", "scikit-learn"), ("matplotlib",) * 2])
def test_a_missing_package_is_one_error_that_says_what_to_install(
    module, package, monkeypatch, capsys, tmp_path
):
    monkeypatch.setitem(sys.modules, module, None)
    assert main(["demo", "--output", str(tmp_path / "demo")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == f'fastkd demo: error: {package} not found: pip install "fastkd[demo]"'
    assert not (tmp_path / "demo").exists()


@pytest.mark.parametrize("arguments", [["--seeds", "0"], ["--sedes", "3"]], ids=" ".join)
def test_wrong_arguments_are_refused_in_one_line(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["demo", *arguments])
    assert stopped.value.code == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_figures_need_no_pyplot_which_would_choose_a_backend(finished, monkeypatch):
    (finished / "accuracy.png").unlink()
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)  # importing it is an error now
    run_demo(TINY, 2, finished)
    assert (finished / "accuracy.png").exists()


@pytest.mark.slow
def test_threads_and_random_numbers_are_given_back(finished):
    torch.manual_seed(5)
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    run_demo(TINY, 2, finished)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_num_threads() == threads


def test_held_out_digits_are_apart_from_the_training_ones_and_stratified():
    digits = load_digits(copies=2)
    (train, _), (held_out, labels) = digits.train.tensors, digits.held_out.tensors
    assert (len(train), len(held_out), len(digits.augmented)) == (1297, 500, 2 * 1297)
    assert labels.bincount().min() >= 48
    distances = torch.cdist(held_out.flatten(1), train.flatten(1))
    assert distances.min() > 0
    again = load_digits(copies=2)
    assert torch.equal(again.augmented.tensors[0], digits.augmented.tensors[0])


def test_spread_is_the_sample_deviation_and_unknown_for_one_value():
    assert mean_and_spread([1.0, 3.0]) == (2.0, pytest.approx(2**0.5))
    assert mean_and_spread([4.0]) == (4.0, None)
