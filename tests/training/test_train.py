"""Whole runs: they learn, they resume exactly, they refuse what cannot work."""

import csv
import json
import os
import signal

import pytest
import torch
from torch.utils.data import TensorDataset

from fastkd import create_teacher
from fastkd.data.transforms import InputSpec
from fastkd.training import (
    CheckpointError,
    Recipe,
    Result,
    load_checkpoint,
    load_student,
    train,
)
from fastkd.training.build import resolve_teacher
from tests.harness.tiny import Interrupting, each_optimizer, image_folder, vit

SPEC = InputSpec((3, 32, 32), (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


def larger_tensors():
    return (TensorDataset(torch.randn(16, 3, 32, 32), torch.arange(16) % 6),) * 2


def weights(path, name="state_dict"):
    return load_checkpoint(path)[name]


def same(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


def test_a_student_learns_without_a_teacher(data, fast):
    result = train(vit(), None, data, **fast | {"epochs": 12, "lr": 1e-2})
    assert result.top1 > 80
    assert result.ema_top1 is not None
    assert result.images == 30


def test_distillation_lowers_every_term(data, fast):
    teacher = vit(24, seed=1)
    train(teacher, None, data, **fast | {"epochs": 6})
    result = train(
        vit(),
        teacher,
        data,
        **fast | {"epochs": 10},
        projector="linear",
        alpha=0.5,
        feature_loss="spectral",
    )
    first, last = result.history[0], result.history[-1]
    assert all(last[name] < first[name] for name in ("loss", "soft_kd", "feature"))


def test_a_run_is_a_function_of_its_recipe(data, fast, tmp_path):
    for name in "ab":
        train(vit(), vit(seed=1), data, tmp_path / name, **fast, alpha=0.5)
    assert same(weights(tmp_path / "a"), weights(tmp_path / "b"))


def test_another_seed_is_another_run(data, fast):
    students = [vit(), vit()]
    for seed, student in enumerate(students):
        train(student, None, data, **fast, seed=seed)
    assert not torch.equal(students[0].head.weight, students[1].head.weight)


def test_the_callers_generators_are_left_alone(data, fast):
    student = vit()
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    train(student, None, data, **fast | {"epochs": 1})
    assert torch.equal(torch.rand(2), expected)


def test_the_outputs_hold_every_term_and_the_resolved_recipe(data, fast, tmp_path):
    options = {"alpha": 0.5, "log_interval": 2, "logit_loss": "hard"}
    result = train(vit(), vit(seed=1), data, tmp_path, **fast, **options)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [(r["kind"], r["update"]) for r in lines] == [
        ("interval", 2),
        ("interval", 4),
        ("epoch", 4),
        ("interval", 6),
        ("interval", 8),
        ("epoch", 8),
    ]
    assert all({"loss", "ce", "hard_kd", "feature", "lr", "grad_norm"} <= set(r) for r in lines)
    with open(tmp_path / "epochs.csv") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["top1"]) for row in rows] == [r["top1"] for r in result.history]
    recipe = Recipe.load(tmp_path)
    assert (recipe.model, recipe.teacher, recipe.alpha) == (
        "module:VisionTransformer",
        "module:VisionTransformer",
        0.5,
    )
    assert Result.load(tmp_path) == result


def test_without_output_nothing_is_written(data, fast, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = train(vit(), None, data, **fast)
    assert os.listdir(tmp_path) == []
    assert result.last is None


def test_best_keeps_the_epoch_that_its_rule_names(data, fast, tmp_path):
    result = train(vit(), None, data, tmp_path, **fast | {"epochs": 4}, best="ema")
    tops = [record["ema_top1"] for record in result.history]
    assert (result.best_top1, result.best_epoch) == (max(tops), tops.index(max(tops)) + 1)
    assert "EMA" in result.best_rule
    assert load_checkpoint(result.best)["position"]["epoch"] == result.best_epoch


@each_optimizer
@pytest.mark.parametrize("stop_at", [3, 16 * 2 + 5, 16 * 4 + 1, 16 * 6 + 9])
def test_interrupted_and_resumed_ends_bit_identical(data, fast, tmp_path, stop_at, opt):
    options = fast | {"opt": opt, "alpha": 0.5, "mixup": 0.8, "cutmix": 1.0, "mixup_prob": 0.7}
    student = {"proj_drop_rate": 0.2}
    train(vit(**student), vit(seed=1), data, tmp_path / "whole", **options)

    def interrupt():
        raise KeyboardInterrupt

    broken = (Interrupting(data[0], stop_at, interrupt), data[1])
    with pytest.raises(KeyboardInterrupt):
        train(vit(**student), vit(seed=1), broken, tmp_path / "parts", **options)
    assert load_checkpoint(tmp_path / "parts")["position"]["total"] == (stop_at - 2) // 16
    resumed = train(vit(seed=9, **student), vit(seed=1), data, tmp_path / "parts", **options)

    whole, parts = (load_checkpoint(tmp_path / name) for name in ("whole", "parts"))
    assert same(whole["state_dict"], parts["state_dict"])
    assert same(whole["state_dict_ema"], parts["state_dict_ema"])
    measured = ("loss", "ce", "soft_kd", "feature", "top1", "ema_loss")
    for ours, theirs in zip(whole["history"], resumed.history, strict=True):
        assert {n: ours[n] for n in measured} == {n: theirs[n] for n in measured}


@pytest.mark.parametrize(
    ("number", "error"),
    [
        (signal.SIGTERM, SystemExit),
        (signal.SIGUSR1, SystemExit),
        (signal.SIGINT, KeyboardInterrupt),
    ],
)
def test_a_signal_writes_a_checkpoint_after_the_running_update(data, fast, tmp_path, number, error):
    broken = (Interrupting(data[0], 20, lambda: os.kill(os.getpid(), number)), data[1])
    handlers = signal.getsignal(number)
    with pytest.raises(error):
        train(vit(), None, broken, tmp_path, **fast)
    assert load_checkpoint(tmp_path)["position"] == {"epoch": 0, "update": 2, "total": 2}
    assert signal.getsignal(number) is handlers


@each_optimizer
def test_a_crash_resumes_from_the_last_periodic_checkpoint(data, fast, tmp_path, opt):
    fast |= {"opt": opt}

    def crash():
        raise LookupError("disk gone")

    train(vit(), None, data, tmp_path / "whole", **fast)
    broken = (Interrupting(data[0], 16 * 3 + 2, crash), data[1])
    with pytest.raises(LookupError, match="disk gone"):
        train(vit(), None, broken, tmp_path / "parts", **fast, checkpoint_interval=2)
    assert load_checkpoint(tmp_path / "parts")["position"]["total"] == 2
    train(vit(seed=9), None, data, tmp_path / "parts", **fast)
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "parts"))


def test_resuming_rewrites_no_line_of_the_log_twice(data, fast, tmp_path):
    def crash():
        raise LookupError

    broken = (Interrupting(data[0], 16 * 3 + 2, crash), data[1])
    with pytest.raises(LookupError):
        train(vit(), None, broken, tmp_path, **fast, checkpoint_interval=2, log_interval=1)
    train(vit(), None, data, tmp_path, **fast, log_interval=1)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [r["update"] for r in lines if r["kind"] == "interval"] == list(range(1, 9))


def test_a_finished_run_gives_its_result_and_weights_without_training(data, fast, tmp_path):
    first, again = vit(), vit(seed=5)
    result = train(first, None, data, tmp_path, **fast)
    before = os.stat(tmp_path / "last.pth").st_mtime_ns
    assert train(again, None, data, tmp_path, **fast) == result
    assert os.stat(tmp_path / "last.pth").st_mtime_ns == before
    assert same(first.state_dict(), again.state_dict())


def test_a_checkpoint_of_another_recipe_is_refused_naming_the_difference(data, fast, tmp_path):
    train(vit(), None, data, tmp_path, **fast)
    with pytest.raises(CheckpointError, match=r"another recipe \(weight_decay 0\.05 -> 0\.1\)"):
        train(vit(), None, data, tmp_path, **fast, weight_decay=0.1)


@pytest.mark.parametrize("other", [{"opt": "lion"}, {"sched": "tanh"}], ids=str)
def test_a_checkpoint_of_another_optimizer_or_schedule_is_refused(data, fast, tmp_path, other):
    train(vit(), None, data, tmp_path, **fast)
    ((name, value),) = other.items()
    with pytest.raises(CheckpointError, match=rf"another recipe \({name} '\w+' -> '{value}'\)"):
        train(vit(), None, data, tmp_path, **fast, **other)


def test_a_checkpoint_of_other_data_is_refused(data, fast, tmp_path):
    train(vit(), None, data, tmp_path, **fast)
    with pytest.raises(CheckpointError, match="training images: 70, now 30"):
        train(vit(), None, (data[1], data[1]), tmp_path, **fast)


def test_resume_never_starts_afresh(data, fast, tmp_path):
    train(vit(), None, data, tmp_path, **fast)
    result = train(vit(), None, data, tmp_path, resume="never", **fast | {"epochs": 1})
    assert result.epochs == 1


def test_a_checkpoint_of_another_student_is_refused(data, fast, tmp_path):
    train(vit(16), None, data, tmp_path, **fast)
    with pytest.raises(CheckpointError, match="does not fit this student"):
        train(vit(24), None, data, tmp_path, **fast)


def test_a_torn_checkpoint_is_refused_and_left_alone(data, fast, tmp_path):
    (tmp_path / "last.pth").write_bytes(b"PK torn")
    with pytest.raises(CheckpointError, match="torn"):
        train(vit(), None, data, tmp_path, **fast)
    assert (tmp_path / "last.pth").read_bytes() == b"PK torn"


def test_a_finished_run_can_be_the_teacher(data, fast, tmp_path):
    (tmp_path / "images").mkdir()
    folder = image_folder(tmp_path / "images", train=6, val=2)
    options = fast | {"epochs": 1, "augment": "cpu", "img_size": 32, "batch_size": 6}
    train("test_vit", None, folder, tmp_path / "teacher", **options)
    result = train(
        "test_vit", tmp_path / "teacher", folder, tmp_path / "student", **options, alpha=0.5
    )
    assert {"soft_kd", "feature"} <= set(result.history[0])


def test_a_lift_student_named_by_its_recipe_trains_on_a_folder(fast, tmp_path):
    folder = image_folder(tmp_path / "images", train=6, val=2)
    teacher = create_teacher(vit(48, in_chans=3, img_size=32, patch_size=16, num_classes=3))
    recipe = Recipe.load("lift_softkd_spectral").override(
        width=48, img_size=32, num_classes=3, pairs=((-1, -1),), warmup_epochs=0
    )
    options = {"epochs": 1, "batch_size": 6, "workers": 0, "device": "cpu", "quiet": True}
    options |= {"lr_scaling": False}
    result = train("test_vit", teacher, folder, tmp_path / "run", recipe, **options)
    assert {"ce", "soft_kd", "feature"} <= set(result.history[0])
    assert load_checkpoint(tmp_path / "run")["state_dict"]["head.weight"].shape == (3, 48)


@pytest.mark.parametrize("during", ["first", "last"])
def test_a_signal_in_an_evaluation_costs_nothing_that_was_trained(data, fast, tmp_path, during):
    def stop():
        os.kill(os.getpid(), signal.SIGTERM)

    at = 2 if during == "first" else 32  # the opening of the data fetches one; 30 images, twice
    train(vit(), None, data, tmp_path / "whole", **fast)
    broken = (data[0], Interrupting(data[1], at, stop))
    with pytest.raises(SystemExit):
        train(vit(), None, broken, tmp_path / "parts", **fast)
    assert load_checkpoint(tmp_path / "parts")["position"]["total"] == 4
    resumed = train(vit(seed=9), None, data, tmp_path / "parts", **fast)
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "parts"))
    assert [r["loss"] for r in resumed.history] == [
        r["loss"] for r in load_checkpoint(tmp_path / "whole")["history"]
    ]


def test_resume_never_leaves_nothing_of_the_old_run_to_continue(data, fast, tmp_path):
    def crash():
        raise LookupError

    train(vit(), None, data, tmp_path, **fast)
    broken = (Interrupting(data[0], 5, crash), data[1])
    with pytest.raises(LookupError):
        train(vit(), None, broken, tmp_path, resume="never", **fast)
    assert not list(tmp_path.glob("*.pth"))
    assert not (tmp_path / "result.json").exists()


def test_a_checkpoint_of_classes_in_another_order_is_refused(fast, tmp_path):
    folder = image_folder(tmp_path / "images", train=6, val=2)
    options = fast | {"epochs": 1, "augment": "none", "img_size": 32, "batch_size": 6}
    train("test_vit", None, folder, tmp_path / "run", **options)
    for split in ("train", "val"):
        (folder / split / "blue").rename(folder / split / "violet")
    with pytest.raises(CheckpointError, match=r"other class names or their order: .*violet"):
        train("test_vit", None, folder, tmp_path / "run", **options)


def test_many_runs_leave_no_threads_behind(data, fast):
    import threading

    train(vit(), None, data, **fast | {"epochs": 1})
    before = threading.active_count()
    for _ in range(3):
        train(vit(), None, data, **fast | {"epochs": 1})
    assert threading.active_count() == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"variant": "lift"}, "variant='lift' has no effect: the student is given as a module"),
        ({"batch_size": 100}, "100 images per update, but the training set has only 70"),
        ({"num_classes": 9}, "6 logits for data of 9 classes"),
        ({"augment": "cpu"}, "set augment='none'"),
        ({"img_size": 16}, "img_size: 16, but the data are tensors of 8 x 8"),
        ({"crop_pct": 0.9}, "crop_pct=0.9 has no effect: the data are tensors"),
        ({"interpolation": "bilinear"}, "interpolation='bilinear' has no effect"),
        ({"mean": (0.5, 0.5), "std": (1.0, 1.0)}, "2 values for images of 1 channels"),
        ({"epoch": 3}, "did you mean 'epochs'"),
    ],
)
def test_options_that_cannot_work_are_refused(data, fast, options, message):
    with pytest.raises(ValueError, match=message):
        train(vit(), None, data, **fast | options)


def test_a_student_of_another_fixed_size_is_refused(data, fast, tmp_path):
    with pytest.raises(ValueError, match=r"images are 8 x 8, but the student, .* for 16 x 16"):
        train(vit(img_size=16), None, data, **fast)
    folder = image_folder(tmp_path, train=6, val=2)
    with pytest.raises(ValueError, match=r"images are 32 x 32, but the student, .* for 8 x 8"):
        train(vit(in_chans=3), None, folder, **fast | {"img_size": 32})


def test_no_teacher_gives_the_matched_run_without_distillation(data, fast, tmp_path):
    distilling = Recipe(alpha=0.9, feature_loss="spectral", projector="linear")
    plain, matched = vit(), vit()
    train(plain, None, data, **fast)
    train(matched, None, data, tmp_path, distilling, **fast)
    assert same(plain.state_dict(), matched.state_dict())
    recipe = Recipe.load(tmp_path)
    assert (recipe.teacher, recipe.alpha, recipe.feature_weight) == (None, 0.0, 0.0)


def test_a_teacher_that_is_left_out_is_the_recipes(data, fast, tmp_path):
    folder = image_folder(tmp_path / "images", train=6, val=2)
    options = fast | {"epochs": 1, "img_size": 32, "batch_size": 6}
    train("test_vit", None, folder, tmp_path / "teacher", **options)
    recipe = Recipe(teacher=str(tmp_path / "teacher"), alpha=0.5)
    result = train("test_vit", data=folder, recipe=recipe, **options)
    assert {"soft_kd", "feature"} <= set(result.history[0])
    result = train("test_vit", None, data=folder, recipe=recipe, **options)
    assert not {"soft_kd", "feature"} & set(result.history[0])


def test_a_young_average_does_not_teach(data, fast, tmp_path):
    folder = image_folder(tmp_path / "images", train=6, val=2)
    options = {"img_size": 32, "batch_size": 6, "ema_decay": 0.9999}
    train("test_vit", None, folder, tmp_path / "teacher", **fast | options | {"epochs": 6})
    state = load_checkpoint(tmp_path / "teacher")
    assert state["measured"]["top1"] > state["measured"]["ema_top1"]
    teacher = resolve_teacher(tmp_path / "teacher", Recipe(), SPEC)
    assert torch.equal(teacher.model.head.weight, state["state_dict"]["head.weight"])


def test_a_runs_student_teaches_at_the_size_and_statistics_of_its_run(data, fast, tmp_path):
    folder = image_folder(tmp_path / "images", train=6, val=2)
    options = fast | {"epochs": 1, "batch_size": 6, "img_size": 48}
    train("test_resnet", None, folder, tmp_path / "images_run", **options)
    teacher = resolve_teacher(tmp_path / "images_run", Recipe(), SPEC)
    assert teacher.prepare(torch.zeros(1, 3, 32, 32)).shape == (1, 3, 48, 48)
    larger = resolve_teacher(tmp_path / "images_run", Recipe(teacher_img_size=64), SPEC)
    assert larger.prepare(torch.zeros(1, 3, 32, 32)).shape == (1, 3, 64, 64)


def test_a_runs_student_of_tensors_teaches_on_images_as_they_come(fast, tmp_path):
    train("test_vit", None, larger_tensors(), tmp_path, **fast | {"epochs": 1, "num_classes": 6})
    teacher = resolve_teacher(tmp_path, Recipe(), SPEC)
    images = torch.randn(1, 3, 32, 32)
    assert teacher.prepare(images) is images


def test_a_named_student_is_built_for_the_size_of_the_tensors(fast, tmp_path):
    train("test_vit", None, larger_tensors(), tmp_path, **fast | {"epochs": 1, "num_classes": 6})
    assert load_student(tmp_path).network.patch_embed.img_size == (32, 32)


def test_an_img_size_reaches_only_models_that_are_built_for_one(fast, tmp_path):
    folder = image_folder(tmp_path / "images", train=6, val=2)
    result = train(
        "test_resnet", None, folder, **fast | {"epochs": 1, "img_size": 32, "batch_size": 6}
    )
    assert result.images == 6


def test_a_finished_run_can_be_kept_in_another_folder(data, fast, tmp_path):
    first = train(vit(), None, data, tmp_path / "first", **fast)
    options = fast | {"resume": str(tmp_path / "first" / "last.pth")}
    second = train(vit(seed=3), None, data, tmp_path / "second", **options)
    assert second.history == first.history
    assert load_checkpoint(second.best)["best"] == load_checkpoint(first.best)["best"]
    assert same(weights(first.last), weights(second.last))
    names = {"recipe.yaml", "log.jsonl", "epochs.csv", "last.pth", "best.pth", "result.json"}
    assert set(os.listdir(tmp_path / "second")) == names
    lines = (tmp_path / "second" / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["epoch"] for line in lines] == [1, 2]


def test_a_best_checkpoint_that_is_not_there_is_not_named(data, fast, tmp_path):
    train(vit(), None, data, tmp_path / "first", **fast)
    (tmp_path / "first" / "best.pth").unlink()
    options = fast | {"resume": str(tmp_path / "first")}
    assert train(vit(), None, data, tmp_path / "second", **options).best is None


def test_a_kill_between_checkpoint_and_log_loses_no_epoch(data, fast, tmp_path):
    train(vit(), None, data, tmp_path, **fast)
    lines = (tmp_path / "log.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "log.jsonl").write_text("".join(lines[:-1]))
    (tmp_path / "epochs.csv").unlink()
    (tmp_path / ".last.pth.4711.tmp").write_bytes(b"half")
    train(vit(), None, data, tmp_path, **fast)
    assert (tmp_path / "log.jsonl").read_text() == "".join(lines)
    assert len((tmp_path / "epochs.csv").read_text().splitlines()) == 3
    assert not (tmp_path / ".last.pth.4711.tmp").exists()


def test_missing_data_is_an_error(fast):
    with pytest.raises(ValueError, match="data is missing"):
        train(vit(), **fast)


def test_a_teacher_of_other_classes_is_refused(data, fast):
    with pytest.raises(ValueError, match="the teacher has 9 classes, the data 6"):
        train(vit(), vit(num_classes=9), data, **fast, alpha=0.5)
