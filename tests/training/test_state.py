"""What a run leaves in its folder: the same whether or not it was stopped, and what timm reads."""

import ast
import contextlib
import csv
import inspect
import json
import os
import shutil
import signal
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from timm.data import create_dataset, create_loader, resolve_data_config
from timm.models import load_checkpoint as timm_load_checkpoint
from torch.utils.data import TensorDataset

from fastkd import evaluate
from fastkd.checkpoint import save_checkpoint
from fastkd.training import CheckpointError, load_checkpoint, train, trainer
from fastkd.training.state import RunState
from fastkd.training.updates import Position
from fastkd.utils.lock import holding
from tests.harness.tiny import FAST, Interrupting, image_folder, tensor_data, vit
from tests.harness.torchrun import run_ranks
from tests.utils.test_distributed import with_batch_norm

# What depends on the clock, or on where the folder is.
TIMES = {"images_per_second", "data_wait", "seconds", "eval_seconds", "waited", "time"}
PLACES = {"output", "last", "best"}
OPTIONS = {"alpha": 0.5, "mixup": 0.8, "mixup_prob": 0.7, "epochs": 3, "log_interval": 2}


def without_times(value):
    if isinstance(value, dict):
        return {k: without_times(v) for k, v in value.items() if k not in TIMES}
    return [without_times(v) for v in value] if isinstance(value, list | tuple) else value


def contents(folder):
    """Every file of a run, but for times."""
    with open(folder / "epochs.csv") as file:
        rows = [without_times(row) for row in csv.DictReader(file)]
    result = json.loads((folder / "result.json").read_text())
    return {
        "log.jsonl": [
            without_times(json.loads(line))
            for line in (folder / "log.jsonl").read_text().splitlines()
        ],
        "epochs.csv": rows,
        "result.json": {k: without_times(v) for k, v in result.items() if k not in PLACES},
        "recipe.yaml": (folder / "recipe.yaml").read_text(),
        "last.pth": without_times(load_checkpoint(folder / "last.pth")),
        "best.pth": without_times(load_checkpoint(folder / "best.pth")),
    }


def assert_same_files(ours, theirs):
    ours, theirs = contents(ours), contents(theirs)
    for name, content in theirs.items():
        difference = _difference(ours[name], content, name)
        assert difference is None, difference


def _difference(a, b, path):
    """Where two nested values differ first; None if they are equal to the bit."""
    if isinstance(b, torch.Tensor):
        return None if torch.equal(a, b) else path
    if isinstance(b, dict):
        if list(a) != list(b):
            return f"{path}: {list(a)} != {list(b)}"
        return next(filter(None, (_difference(a[k], b[k], f"{path}.{k}") for k in b)), None)
    if isinstance(b, list):
        if len(a) != len(b):
            return f"{path}: {len(a)} != {len(b)} items"
        pairs = zip(a, b, strict=True)
        return next(
            filter(None, (_difference(*pair, f"{path}[{n}]") for n, pair in enumerate(pairs))), None
        )
    return None if a == b else f"{path}: {a!r} != {b!r}"


def kill(number):
    return lambda: os.kill(os.getpid(), number)


def stopped_and_resumed(data, output, stopping, error, **options):
    for source in (stopping, data):
        try:
            train(vit(proj_drop_rate=0.2), vit(seed=1), source, output, **options)
        except error:
            continue


@pytest.mark.parametrize(
    ("at", "changed"),
    [
        (3, {}),  # in the first update
        (16 * 2 + 5, {}),  # between two intervals' ends
        (16 * 3 + 1, {}),  # in the middle of an interval
        (16 * 6 + 9, {"eval_interval": 2}),  # in the second epoch
        (16 * 6 + 9, {"opt": "nesterov", "lr": 1e-3, "accumulation": 2}),
        (16 * 6 + 9, {"opt": "lamb", "checkpoint_interval": 1}),  # its step asks the host
        (16 * 6 + 9, {"amp": "fp16", "ema_warmup": True}),
    ],
)
def test_a_run_stopped_in_training_leaves_the_same_files(data, fast, tmp_path, at, changed):
    options = fast | OPTIONS | changed
    train(vit(proj_drop_rate=0.2), vit(seed=1), data, tmp_path / "whole", **options)
    stopping = (Interrupting(data[0], at, kill(signal.SIGTERM)), data[1])
    stopped_and_resumed(data, tmp_path / "parts", stopping, SystemExit, **options)
    assert_same_files(tmp_path / "parts", tmp_path / "whole")


@pytest.mark.parametrize(
    "at",
    [
        2,  # the opening of the data fetches one
        32,  # the averaged weights: 30 images, twice
        62,  # the second epoch
    ],
)
def test_a_run_stopped_in_an_evaluation_leaves_the_same_files(data, fast, tmp_path, at):
    options = fast | OPTIONS
    train(vit(proj_drop_rate=0.2), vit(seed=1), data, tmp_path / "whole", **options)
    stopping = (data[0], Interrupting(data[1], at, kill(signal.SIGUSR1)))
    stopped_and_resumed(data, tmp_path / "parts", stopping, SystemExit, **options)
    assert_same_files(tmp_path / "parts", tmp_path / "whole")


def test_a_run_that_crashed_leaves_the_same_files(data, fast, tmp_path):
    options = fast | OPTIONS | {"checkpoint_interval": 3}

    def crash():
        raise LookupError("disk gone")

    train(vit(proj_drop_rate=0.2), vit(seed=1), data, tmp_path / "whole", **options)
    stopping = (Interrupting(data[0], 16 * 7 + 5, crash), data[1])
    stopped_and_resumed(data, tmp_path / "parts", stopping, LookupError, **options)
    assert_same_files(tmp_path / "parts", tmp_path / "whole")


def test_unreadable_images_and_skipped_updates_are_the_same_lines_after_a_stop(
    fast, tmp_path, monkeypatch
):
    folder = image_folder(tmp_path / "images", train=4, val=2)
    (folder / "train" / "green" / "1.jpg").write_bytes(b"no image")
    options = fast | {"augment": "cpu", "img_size": 32, "batch_size": 6, "epochs": 2}
    options |= {"log_interval": 5, "eval_batch_size": 2}
    train("test_vit", None, folder, tmp_path / "whole", **options)
    advance, updates = trainer.RunLogger.advance, []

    def stopping(logger, faults, update):
        advance(logger, faults, update)
        updates.append(update)
        if len(updates) in (1, 3):
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(trainer.RunLogger, "advance", stopping)
    for _ in range(2):
        with pytest.raises(SystemExit):
            train("test_vit", None, folder, tmp_path / "parts", **options)
    train("test_vit", None, folder, tmp_path / "parts", **options)
    assert_same_files(tmp_path / "parts", tmp_path / "whole")


def test_a_run_that_goes_back_to_an_earlier_checkpoint_leaves_the_same_files(data, fast, tmp_path):
    for name in ("whole", "parts"):
        train(vit(), None, data, tmp_path / name, **fast | OPTIONS | {"alpha": 0.0})
    os.truncate(tmp_path / "parts" / "last.pth", 500)
    train(vit(seed=9), None, data, tmp_path / "parts", **fast | OPTIONS | {"alpha": 0.0})
    log = (tmp_path / "parts" / "log.jsonl").read_text().splitlines(keepends=True)
    assert sum('"torn"' in line for line in log) == 1
    text = "".join(line for line in log if '"torn"' not in line)
    (tmp_path / "parts" / "log.jsonl").write_text(text)
    assert_same_files(tmp_path / "parts", tmp_path / "whole")


def test_an_interrupt_while_the_best_is_written_does_not_lose_it(data, fast, tmp_path, monkeypatch):
    run_save, calls = trainer.RunState.save, []

    def interrupted(run, name="last.pth"):
        calls.append(name)
        if name == "best.pth" and calls.count(name) == 1:
            raise KeyboardInterrupt
        return run_save(run, name)

    train(vit(), None, data, tmp_path / "whole", **fast | {"lr": 1e-2})
    monkeypatch.setattr(trainer.RunState, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(vit(), None, data, tmp_path / "parts", **fast | {"lr": 1e-2})
    train(vit(seed=9), None, data, tmp_path / "parts", **fast | {"lr": 1e-2})
    assert_same_files(tmp_path / "parts", tmp_path / "whole")


def test_a_run_is_not_continued_in_the_folder_of_another(data, fast, tmp_path):
    for name in "ab":
        train(vit(), None, data, tmp_path / name, **fast | {"epochs": 1})
    before = {path.name: path.read_bytes() for path in (tmp_path / "b").iterdir()}
    with pytest.raises(CheckpointError, match=r"b holds a run of its own"):
        train(vit(), None, data, tmp_path / "b", resume=str(tmp_path / "a"), **fast | {"epochs": 1})
    assert {path.name: path.read_bytes() for path in (tmp_path / "b").iterdir()} == before


def test_a_log_of_something_else_does_not_enter_the_runs(data, fast, tmp_path):
    (tmp_path / "log.jsonl").write_text('{"a": 1}\n[2]\n3\n{"update": 1, "kind": "interval"}\n')
    train(vit(), None, data, tmp_path, **fast | {"epochs": 1})
    lines = contents(tmp_path)["log.jsonl"]
    assert [line["kind"] for line in lines] == ["epoch"]


def test_a_run_continued_in_a_new_folder_leaves_no_line_of_what_was_there(data, fast, tmp_path):
    options = fast | {"epochs": 2, "log_interval": 1}
    stopping = (Interrupting(data[0], 16 * 5 + 3, kill(signal.SIGTERM)), data[1])
    with pytest.raises(SystemExit):
        train(vit(), None, stopping, tmp_path / "first", **options)
    (tmp_path / "second").mkdir()
    line = {"kind": "interval", "epoch": 1, "update": 2, "loss": -1.0}
    (tmp_path / "second" / "log.jsonl").write_text(json.dumps(line) + "\n")
    first = str(tmp_path / "first")
    train(vit(), None, data, tmp_path / "second", resume=first, **options)
    assert all(line["loss"] > 0 for line in contents(tmp_path / "second")["log.jsonl"])


def test_a_torn_best_checkpoint_is_not_named_and_ends_nothing(data, fast, tmp_path):
    result = train(vit(), None, data, tmp_path, **fast)
    os.truncate(tmp_path / "best.pth", 100)
    again = train(vit(seed=9), None, data, tmp_path, **fast)
    assert (again.best, again.top1) == (None, result.top1)


def test_the_speed_of_an_epoch_is_that_of_all_its_parts(data, fast, tmp_path):
    options = fast | OPTIONS | {"epochs": 1}
    stopping = (data[0], Interrupting(data[1], 2, kill(signal.SIGUSR1)))
    stopped_and_resumed(data, tmp_path, stopping, SystemExit, **options)
    record = load_checkpoint(tmp_path)["history"][0]
    assert record["seconds"] * record["images_per_second"] == pytest.approx(64)
    assert record["seconds"] > 0.01


def train_one_of_two(rank, output, student, stops, options):
    """A run of two processes, one of which may be asked to stop."""
    data = tensor_data(70, 31)
    images = data[0].tensors[0].clone()
    images[5] = float("nan")  # an update of each epoch is skipped
    data = (TensorDataset(images, data[0].tensors[1]), data[1])
    if stops:
        asked = kill(signal.SIGTERM) if rank == 1 else lambda: None
        data = (Interrupting(data[0], 8 * 5 + 3, asked), data[1])
    with contextlib.suppress(SystemExit):
        train(student(), None, data, output, **FAST | {"log_interval": 3} | options)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("student", "options"),
    [
        (partial(vit, proj_drop_rate=0.2), OPTIONS | {"alpha": 0.0, "accumulation": 2}),
        # Every process has running statistics of its own.
        (with_batch_norm, {"opt": "lamb"}),
    ],
)
def test_two_processes_that_were_stopped_leave_the_same_files(tmp_path, student, options):
    for folder, stops in (("whole", False), ("parts", True), ("parts", False)):
        run_ranks(train_one_of_two, str(tmp_path / folder), student, stops, options)
    assert_same_files(tmp_path / "parts", tmp_path / "whole")
    lines = contents(tmp_path / "whole")["log.jsonl"]
    skipped = [line for line in lines if line["kind"] == "skipped"]
    assert skipped
    assert all(len(line["samples"]) == 2 for line in skipped)


def test_epochs_count_from_one_in_every_file_and_message(data, fast, tmp_path, capsys):
    result = train(vit(), None, data, tmp_path, **fast | {"log_interval": 4, "quiet": False})
    files = contents(tmp_path)
    assert [line["epoch"] for line in files["log.jsonl"]] == [1, 1, 2, 2]
    assert [row["epoch"] for row in files["epochs.csv"]] == ["1", "2"]
    assert [record["epoch"] for record in result.history] == [1, 2]
    assert result.best_epoch in (1, 2)
    assert load_checkpoint(tmp_path / "best.pth")["best"]["epoch"] == result.best_epoch
    told = capsys.readouterr().err
    assert "epoch 1/2" in told
    assert "epoch 2/2" in told
    assert "epoch 0" not in told
    assert "epoch 3" not in told


def test_seconds_and_the_time_are_in_the_log_and_the_table(data, fast, tmp_path):
    train(vit(), None, data, tmp_path, **fast)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    with open(tmp_path / "epochs.csv") as file:
        rows = list(csv.DictReader(file))
    for record in lines + rows:
        assert float(record["seconds"]) > 0
        assert record["time"][10] == "T"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run whose averaged weights are better at one epoch and worse at another."""
    root = tmp_path_factory.mktemp("state")
    folder = image_folder(root / "images", train=6, val=3)
    options = {"epochs": 2, "warmup_epochs": 0, "batch_size": 6, "img_size": 32, "amp": "none"}
    options |= {"lr": 1e-3, "lr_scaling": False, "workers": 0, "quiet": True, "device": "cpu"}
    train("test_vit", None, folder, root / "run", **options, ema_decay=0.5)
    return folder, root / "run"


def test_last_holds_raw_and_averaged_weights_and_best_the_better_alone(run):
    last, best = (load_checkpoint(run[1] / name) for name in ("last.pth", "best.pth"))
    assert {"state_dict", "state_dict_ema"} <= set(last)
    assert "weights" not in last
    assert best["weights"] in ("raw", "ema")
    measured = best["measured"]
    better = "ema" if measured["ema_top1"] > measured["top1"] else "raw"
    assert best["weights"] == better
    assert not {"state_dict_ema", "optimizer"} & set(best)


def measured_by_timm(model, folder):
    """Top-1 by timm's loader and accuracy, as its validate.py computes it."""
    config = resolve_data_config({"img_size": 32, "crop_pct": 0.875}, model=model)
    images = create_dataset("", root=str(folder / "val"))
    loader = create_loader(
        images, batch_size=4, use_prefetcher=False, num_workers=0, device=torch.device("cpu"),
        **{name: config[name] for name in ("interpolation", "mean", "std", "crop_pct")},
        input_size=(3, 32, 32),
    )  # fmt: skip
    with torch.no_grad():
        hits = [(model.eval()(x).argmax(-1) == y).sum().item() for x, y in loader]
    return 100 * sum(hits) / len(images)


@pytest.mark.parametrize("name", ["last.pth", "best.pth"])
@pytest.mark.parametrize("use_ema", [False, True])
def test_timm_measures_what_evaluate_reports(run, name, use_ema):
    folder, output = run
    model = timm.create_model("test_vit", num_classes=3, img_size=32)
    timm_load_checkpoint(model, output / name, use_ema=use_ema)  # as timm's validate.py does
    weights = load_checkpoint(output / name).get("weights", "ema" if use_ema else "raw")
    ours = evaluate(output / name, folder, weights=weights, device="cpu", workers=0)
    assert ours["weights"] == weights
    assert ours["top1"] == pytest.approx(measured_by_timm(model, folder))


@pytest.mark.parametrize(
    ("name", "key"), [("last.pth", "state_dict_ema"), ("best.pth", "state_dict")]
)
def test_timm_builds_a_student_from_a_runs_checkpoint(run, name, key):
    path = run[1] / name
    model = timm.create_model("test_vit", checkpoint_path=path, num_classes=3, img_size=32)
    held = load_checkpoint(path)[key]
    assert all(torch.equal(value, held[key]) for key, value in model.state_dict().items())


def test_weights_that_a_checkpoint_does_not_hold_are_named(run):
    best = load_checkpoint(run[1] / "best.pth")["weights"]
    other = {"raw": "ema", "ema": "raw"}[best]
    with pytest.raises(ValueError, match=rf"best\.pth has no (EMA|raw) weights, only {best}"):
        evaluate(run[1] / "best.pth", run[0], weights=other, device="cpu")


def test_the_epoch_loop_stands_in_train():
    tree = ast.parse(inspect.getsource(trainer.train))
    loops = [node for node in ast.walk(tree) if isinstance(node, ast.For | ast.While)]
    names = [{call.func.id for call in ast.walk(loop) if _calls_by_name(call)} for loop in loops]
    assert any({"train_one_epoch", "evaluate", "save"} <= called for called in names)
    for name in ("train_one_epoch", "evaluate", "save"):
        assert getattr(trainer, name).__module__ == trainer.__name__


def _calls_by_name(node):
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name)


@pytest.mark.parametrize(
    ("ranked_by", "values", "best"),
    [
        ("top1", [50.0, 60.0, 60.0, 40.0], 2),
        ("ema_top1", [60.0, 60.0, 60.0], 1),
        ("eval_loss", [1.0, 0.5, 0.5, 0.7], 2),
        ("top1", [0.0, 0.0], 1),
        ("eval_loss", [float("nan"), 0.5, 0.5], 2),
    ],
)
def test_of_equal_epochs_the_earliest_is_the_best(ranked_by, values, best):
    engine = SimpleNamespace(
        task=SimpleNamespace(student=None),
        meter=SimpleNamespace(reset=lambda: None),
        position=Position(),
        changing=False,
    )
    run = RunState(engine, None, None, ranked_by)
    improved = [
        run.finish_epoch({"epoch": epoch, ranked_by: value})
        for epoch, value in enumerate(values, start=1)
    ]
    assert run.best == {"epoch": best, ranked_by: values[best - 1]}
    assert [epoch for epoch, better in enumerate(improved, start=1) if better][-1] == best


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of two epochs of four updates, the last two checkpoints of which are kept."""
    output = tmp_path_factory.mktemp("finished") / "run"
    train(vit(), None, tensor_data(), output, **FAST)
    return output


@pytest.fixture
def copied(finished, tmp_path):
    return Path(shutil.copytree(finished, tmp_path / "run"))


def bytes_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def changed(output, change):
    state = load_checkpoint(output)
    change(state)
    save_checkpoint(state, output / "last.pth")


NOT_A_RUNS = {
    "epoch": lambda s: s["position"].update(epoch=99),
    "total": lambda s: s["position"].update(total=10**6),
    "update": lambda s: s["position"].update(epoch=1, update=10**6, total=10**6 + 4),
    "negative": lambda s: s["position"].update(epoch=1, update=-1, total=3),
    "text": lambda s: s["position"].update(epoch="2"),
    "more": lambda s: s["position"].update(step=3),
    "less": lambda s: s["position"].pop("total"),
    "short history": lambda s: s["history"].pop(),
    "other history": lambda s: s["history"][0].update(epoch=2),
    "best of later": lambda s: s["best"].update(epoch=3),
    "best by what": lambda s: s["best"].pop("top1"),
    "no processes": lambda s: s["processes"].clear(),
    "no meter": lambda s: s["processes"][0].pop("meter"),
    "empty meter": lambda s: s["processes"][0]["meter"].clear(),
    "no moments": lambda s: s["optimizer"].clear(),
    "no generator": lambda s: s.update(rng=None),
    **{
        f"without {name}": partial(lambda s, name: s.pop(name), name=name)
        for name in ("recipe", "scheduler", "terms", "history", "state_dict_ema", "train_images")
    },
}


@pytest.mark.parametrize("change", NOT_A_RUNS)
def test_a_resume_checks_what_it_needs(copied, change):
    changed(copied, NOT_A_RUNS[change])
    before = bytes_of(copied)
    with pytest.raises(CheckpointError, match=r"last\.pth") as error:
        train(vit(), None, tensor_data(), copied, **FAST)
    if change.startswith("without "):
        assert change.removeprefix("without ") in str(error.value)
    assert bytes_of(copied) == before


@pytest.mark.parametrize(
    "change",
    [
        lambda s: s["state_dict"]["head.bias"].fill_(float("nan")),
        lambda s: s["state_dict_ema"]["head.bias"].fill_(float("inf")),
        lambda s: s["optimizer"]["state"][0]["exp_avg"].fill_(float("-inf")),
    ],
    ids=["weights", "average", "moments"],
)
def test_a_checkpoint_that_is_not_finite_is_not_resumed(copied, change):
    changed(copied, change)
    before = bytes_of(copied)
    with pytest.raises(CheckpointError, match=r"last\.pth holds .* not finite"):
        train(vit(), None, tensor_data(), copied, **FAST)
    assert bytes_of(copied) == before


def test_a_checkpoint_with_more_in_it_is_resumed(copied):
    changed(copied, lambda s: s.update(mine=[Path("x")], top1=np.float64(3)))
    assert train(vit(seed=9), None, tensor_data(), copied, **FAST).epochs == 2


@pytest.mark.parametrize(
    "best", [b"", b"PK", b"\xff" * 999, None, {"format": "fastkd-checkpoint"}, {"version": 2}, 3]
)
def test_a_best_checkpoint_that_is_none_ends_nothing(copied, best):
    path = copied / "best.pth"
    path.unlink()
    if best is None:
        path.mkdir()
    elif isinstance(best, bytes):
        path.write_bytes(best)
    else:
        torch.save(best, path)
    again = train(vit(seed=9), None, tensor_data(), copied, **FAST)
    assert again.best is None and again.top1 is not None


def test_a_folder_called_like_the_last_checkpoint_hides_nothing(copied, capsys):
    (copied / "last.pth").unlink()
    (copied / "last.pth").mkdir()
    (copied / "last.pth" / "data.pkl").touch()
    result = train(vit(seed=9), None, tensor_data(), copied, **FAST | {"quiet": False})
    told = capsys.readouterr().err
    assert "last.pth is a folder; the checkpoint before it is taken" in told
    assert "last.pth.folder" in told and (copied / "last.pth.folder" / "data.pkl").exists()
    assert load_checkpoint(copied / "last.pth")["position"]["epoch"] == result.epochs


def test_zeros_in_the_last_checkpoint_let_the_one_before_it_serve(copied, capsys):
    content = bytearray((copied / "last.pth").read_bytes())
    content[len(content) // 2 : len(content) // 2 + 512] = bytes(512)
    (copied / "last.pth").write_bytes(content)
    before = load_checkpoint(copied / "last-1.pth")["position"]
    train(vit(seed=9), None, tensor_data(), copied, **FAST | {"quiet": False})
    told = capsys.readouterr().err
    assert "last.pth is damaged" in told and f"resumed after update {before['total']}" in told


FOREIGN = [
    b"\xff\xfe\x00",
    b"[" * 100_000,
    b"9" * 5000,
    b'{"kind": "interval"}',
    b'{"update": "x", "kind": "interval"}',
    b'{"update": 1, "kind": ["epoch"]}',
    b"null",
    b"12:00 hello",
]


@pytest.mark.parametrize("line", FOREIGN, ids=range(len(FOREIGN)))
def test_a_foreign_line_in_the_log_is_counted_and_left_out(copied, capsys, line):
    text = (copied / "log.jsonl").read_bytes()
    (copied / "log.jsonl").write_bytes(line + b"\n" + text)
    train(vit(seed=9), None, tensor_data(), copied, **FAST | {"quiet": False})
    assert (copied / "log.jsonl").read_bytes() == text
    assert "log.jsonl: 1 line" in capsys.readouterr().err


@pytest.mark.parametrize("resume", ["auto", "never"])
def test_a_second_run_in_a_folder_is_refused_before_it_removes_anything(copied, resume):
    with holding(copied):
        before = bytes_of(copied)
        with pytest.raises(RuntimeError, match=rf"process {os.getpid()}") as error:
            train(vit(), None, tensor_data(), copied, resume=resume, **FAST | {"lr": 1.0})
        assert str(copied) in str(error.value)
        assert bytes_of(copied) == before


@pytest.mark.parametrize("again", [False, True], ids=["deleted", "deleted and made again"])
def test_a_folder_deleted_in_mid_run_is_made_again(data, fast, tmp_path, capsys, again):
    output = tmp_path / "a" / "run"

    def delete():
        shutil.rmtree(tmp_path / "a")
        if again:
            output.mkdir(parents=True)

    options = fast | {"epochs": 3, "log_interval": 1, "quiet": False}
    deleting = (Interrupting(data[0], 16 * 5 + 3, delete), data[1])
    result = train(vit(), None, deleting, output, **options)
    assert f"{output} was deleted and is made again" in capsys.readouterr().err
    files = {"recipe.yaml", "log.jsonl", "epochs.csv", "last.pth", "result.json"}
    assert files <= set(os.listdir(output)) and ".fastkd.lock" not in os.listdir(output)
    lines = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    kinds = [line["kind"] for line in lines]
    assert kinds.count("epoch") == 3 and kinds.count("remade") == 1
    assert [line["epoch"] for line in lines if line["kind"] == "epoch"] == [1, 2, 3]
    assert load_checkpoint(output)["position"]["total"] == 12
    repeated = train(vit(seed=9), None, data, output, **options)
    assert repeated.top1 == result.top1


def test_a_removed_lock_is_taken_again_and_nothing_is_called_deleted(data, fast, tmp_path, capsys):
    def remove():
        (tmp_path / ".fastkd.lock").unlink()

    losing = (Interrupting(data[0], 16 * 5 + 3, remove), data[1])
    result = train(vit(), None, losing, tmp_path, **fast | {"epochs": 2, "quiet": False})
    said = capsys.readouterr().err
    assert f"the lock of {tmp_path} was removed and is taken again" in said
    assert "deleted" not in said and result.best == str(tmp_path / "best.pth")
    kinds = [json.loads(line)["kind"] for line in (tmp_path / "log.jsonl").open()]
    assert kinds.count("epoch") == 2 and "remade" not in kinds
