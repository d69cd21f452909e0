"""Broken files, broken numbers, full disks, kills: a long run goes on, or says why not."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from PIL import Image
from torch.utils.data import TensorDataset

from fastkd import checkpoint as checkpoints
from fastkd.training import NonFiniteError, load_checkpoint, train, trainer
from fastkd.training import logging as logger
from fastkd.training.updates import Engine
from tests.harness.tiny import (
    FAST,
    Interrupting,
    each_optimizer,
    image_folder,
    tensor_data,
    vit,
)
from tests.harness.torchrun import run_ranks

IMAGES = FAST | {"augment": "cpu", "img_size": 32, "batch_size": 6, "epochs": 1}


def events(output, kind):
    lines = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == kind]


@pytest.fixture
def broken_folder(tmp_path):
    """Twelve training images of three classes, of which two cannot be read."""
    folder = image_folder(tmp_path / "images", train=4, val=2)
    (folder / "train" / "green" / "1.jpg").write_bytes(b"no image")
    whole = (folder / "train" / "red" / "2.jpg").read_bytes()
    (folder / "train" / "red" / "2.jpg").write_bytes(whole[: len(whole) // 2])
    return folder


@pytest.mark.parametrize("workers", [0, 1])
def test_unreadable_images_are_replaced_and_named_once(broken_folder, tmp_path, workers):
    options = IMAGES | {"epochs": 2, "workers": workers}
    train("test_vit", None, broken_folder, tmp_path / "run", **options)
    names = [event["name"] for event in events(tmp_path / "run", "unreadable")]
    expected = ["train/green/1.jpg", "train/red/2.jpg"]
    assert sorted(os.path.relpath(name, broken_folder) for name in names) == expected


def test_more_unreadable_images_than_allowed_end_the_run(broken_folder, tmp_path):
    with pytest.raises(OSError, match=r"2 training images .* max_unreadable \(1\).*jpg"):
        train("test_vit", None, broken_folder, tmp_path / "run", **IMAGES, max_unreadable=1)


def test_replacements_do_not_depend_on_workers(broken_folder, tmp_path):
    for workers in (0, 2):
        options = IMAGES | {"workers": workers}
        train("test_vit", None, broken_folder, tmp_path / str(workers), **options)
    left, right = (load_checkpoint(tmp_path / name)["state_dict"] for name in ("0", "2"))
    assert all(torch.equal(left[name], right[name]) for name in left)


def test_an_unreadable_evaluation_image_counts_as_wrong_and_is_named(tmp_path):
    folder = image_folder(tmp_path / "images", train=4, val=2)
    (folder / "val" / "blue" / "0.jpg").write_bytes(b"no image")
    options = IMAGES | {"ema_decay": 0.5}
    result = train("test_vit", None, folder, tmp_path / "run", **options)
    (event,) = events(tmp_path / "run", "evaluation")  # of two, the raw and the averaged weights
    assert event["reason"].startswith("1 of 6 evaluation images cannot be read")
    assert f"{folder}/val/blue/0.jpg" in event["reason"]
    assert (result.images, result.unreadable) == (6, 1)
    assert result.history[-1]["eval_unreadable"] == 1
    assert "that cannot be read: 1" in result.summary()
    assert result.top1 * 6 / 100 == pytest.approx(round(result.top1 * 6 / 100))


def test_evaluation_images_of_which_none_can_be_read_end_the_run(tmp_path):
    folder = image_folder(tmp_path / "images", train=4, val=2)
    for image in (folder / "val").glob("*/*.jpg"):
        image.write_bytes(b"no image")
    with pytest.raises(OSError, match=r"6 of 6 evaluation images .*val/blue/0\.jpg .*; \.\.\."):
        train("test_vit", None, folder, tmp_path / "run", **IMAGES)


class Killer(TensorDataset):
    """Kills the worker that fetches a certain sample."""

    def __getitem__(self, index):
        if index == 5 and torch.utils.data.get_worker_info() is not None:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(index)

    def filename(self, index):
        return f"tensor-{index}.pt"


def test_a_workers_death_names_the_file(data, fast):
    killing = (Killer(*data[0].tensors), data[1])
    with pytest.raises(RuntimeError, match=r"loader process \d+ died over tensor-5\.pt"):
        train(vit(), None, killing, **fast | {"workers": 1})


class Poisoned(TensorDataset):
    """Some images are infinite."""

    def __init__(self, dataset, broken):
        images, labels = dataset.tensors
        images = images.clone()
        images[broken] = float("inf")
        super().__init__(images, labels)


@each_optimizer
def test_a_poisoned_batch_is_skipped_and_its_samples_are_listed(data, fast, tmp_path, opt):
    poisoned = Poisoned(data[0], [3])
    result = train(vit(), None, (poisoned, data[1]), tmp_path, **fast, opt=opt)
    skipped = events(tmp_path, "skipped")
    assert [3 in event["samples"][0] for event in skipped] == [True] * len(skipped)
    assert sum(record["skipped_updates"] for record in result.history) == len(skipped) > 0
    assert all(value.isfinite().all() for value in load_checkpoint(tmp_path)["state_dict"].values())


def train_poisoned_on_rank(rank, output, opt):
    train_set, val_set = tensor_data()
    student = vit()
    poisoned = Poisoned(train_set, [3])  # the other process learns of it by the gradient's sum
    train(student, None, (poisoned, val_set), output, **FAST, opt=opt)
    torch.save(student.state_dict(), output / f"{rank}.pt")


@pytest.mark.slow
@pytest.mark.parametrize("opt", ["adamw", "nesterov", "lamb"])
def test_two_processes_skip_the_same_updates_and_stay_equal(tmp_path, opt):
    run_ranks(train_poisoned_on_rank, tmp_path, opt)
    states = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert all(value.isfinite().all() for value in states[0].values())
    skipped = events(tmp_path, "skipped")
    assert skipped and all(any(3 in share for share in event["samples"]) for event in skipped)


@each_optimizer
def test_nothing_but_poison_ends_the_run_and_keeps_the_good_checkpoint(data, fast, tmp_path, opt):
    fast |= {"opt": opt}
    train(vit(), None, data, tmp_path, **fast | {"epochs": 1})
    good = load_checkpoint(tmp_path)
    good["recipe"]["epochs"] = 2
    checkpoints.save_checkpoint(good, tmp_path / "last.pth")
    poisoned = (Poisoned(data[0], slice(None)), data[1])
    with pytest.raises(NonFiniteError, match=r"3 updates in a row.*in epoch 2"):
        train(vit(), None, poisoned, tmp_path, **fast, max_nonfinite=2)
    state = load_checkpoint(tmp_path)
    assert state["position"]["epoch"] == 1
    assert all(value.isfinite().all() for value in state["state_dict"].values())
    assert len(events(tmp_path, "skipped")) == 3


POISONED = {
    "weights": lambda engine: engine.task.student.head.weight.data.fill_(float("nan")),
    "average": lambda engine: engine.ema.module.head.weight.data.fill_(float("inf")),
    "terms": lambda engine: next(engine.task.terms.parameters()).data.fill_(float("inf")),
    "moments": lambda engine: next(iter(engine.optimizer.state.values()))["exp_avg"].fill_(
        float("inf")
    ),
}


@pytest.mark.parametrize("part", POISONED)
def test_what_is_not_finite_is_in_no_file(data, fast, tmp_path, monkeypatch, part):
    train_one_epoch = trainer.train_one_epoch

    def poisoning(run, *others):
        record = train_one_epoch(run, *others)
        if record["epoch"] == 2:
            before.update({path.name: path.read_bytes() for path in tmp_path.glob("*.pth")})
            POISONED[part](run.engine)
        return record

    before = {}
    monkeypatch.setattr(trainer, "train_one_epoch", poisoning)
    options = fast | {"epochs": 3, "projector": "linear", "feature_weight": 1.0, "alpha": 0.0}
    with pytest.raises(NonFiniteError) as error:
        train(vit(), vit(24, seed=1), data, tmp_path, **options)
    assert "last.pth holds the run after update 4" in str(error.value)
    assert "from before" not in str(error.value)
    assert len(before) >= 2
    assert {path.name: path.read_bytes() for path in tmp_path.glob("*.pth")} == before


def make_the_rate_infinite(monkeypatch):
    """From the fifth update on."""
    update = Engine.update

    def infinite(engine, slices):
        if engine.position.total >= 4:
            engine.optimizer.param_groups[0]["lr"] = float("inf")
        update(engine, slices)

    monkeypatch.setattr(Engine, "update", infinite)


def test_an_infinite_rate_leaves_the_files_of_before_and_says_what_is_in_memory(
    data, fast, tmp_path, monkeypatch
):
    make_the_rate_infinite(monkeypatch)
    # The loss was finite, and is not said to be the cause.
    told = r"not finite, at or before update 8 in epoch 2 \(learning.*or NaN, too.*after update 4"
    with pytest.raises(NonFiniteError, match=told):
        train(vit(), None, data, tmp_path, **fast | {"epochs": 3, "keep_checkpoints": 3})
    for path in tmp_path.glob("*.pth"):
        state = load_checkpoint(path)
        assert state["position"]["total"] <= 4
        assert all(value.isfinite().all() for value in state["state_dict"].values())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_saves_nothing_that_is_not_finite(data, fast, tmp_path, number):
    student = vit()

    def poison_and_stop():
        student.pos_embed.data.fill_(float("nan"))
        os.kill(os.getpid(), number)

    stopping = (Interrupting(data[0], 16 * 5 + 3, poison_and_stop), data[1])
    with pytest.raises(NonFiniteError, match=r"last\.pth holds the run after update 4"):
        train(student, None, stopping, tmp_path, **fast | {"max_nonfinite": 9})
    assert load_checkpoint(tmp_path)["position"]["total"] == 4


def test_a_resumed_run_that_saves_nothing_names_where_it_began(data, fast, tmp_path, monkeypatch):
    make_the_rate_infinite(monkeypatch)
    for output, resume in (("a", "auto"), ("b", str(tmp_path / "a"))):
        with pytest.raises(NonFiniteError) as error:
            train(vit(), None, data, tmp_path / output, resume=resume, **fast | {"epochs": 3})
    assert f"Nothing of this run was saved since {tmp_path / 'a' / 'last.pth'}" in str(error.value)


def test_a_torn_checkpoint_gives_way_to_the_one_before_it(data, fast, tmp_path, capsys):
    options = fast | {"epochs": 3, "quiet": False}
    whole = train(vit(), None, data, tmp_path / "whole", **options)
    train(vit(), None, data, tmp_path / "torn", **options)
    os.truncate(tmp_path / "torn" / "last.pth", 500)
    again = train(vit(seed=9), None, data, tmp_path / "torn", **options)
    told = capsys.readouterr().err
    assert "last.pth is torn" in told
    assert "resumed after update 12 (epoch 3)" in told
    assert [r["loss"] for r in again.history] == [r["loss"] for r in whole.history]


def test_a_full_disk_keeps_the_old_checkpoint_and_the_run_says_so(
    data, fast, tmp_path, monkeypatch, capsys
):
    save, calls = torch.save, []

    def full_at_the_second_epoch(state, file):
        calls.append(state["position"]["epoch"])
        if state["position"]["epoch"] == 2:
            raise OSError(28, "No space left on device")
        save(state, file)

    monkeypatch.setattr(checkpoints.torch, "save", full_at_the_second_epoch)
    train(vit(), None, data, tmp_path, **fast | {"epochs": 3, "quiet": False})
    assert "No space left on device" in capsys.readouterr().err
    assert {event["file"] for event in events(tmp_path, "unsaved")} >= {"last.pth"}
    assert load_checkpoint(tmp_path)["position"]["epoch"] == 3  # there was space again


def test_a_full_disk_costs_a_line_of_the_logs_and_not_the_run(
    data, fast, tmp_path, monkeypatch, capsys
):
    write = logger.write_text

    def full(path, text):
        if path.name == "epochs.csv" and not path.exists():
            raise OSError(28, "No space left on device")
        write(path, text)

    monkeypatch.setattr(logger, "write_text", full)
    train(vit(), None, data, tmp_path, **fast | {"quiet": False})
    assert "epochs.csv could not be written" in capsys.readouterr().err


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_a_log_on_a_full_disk_costs_no_run(data, fast, tmp_path, monkeypatch, capsys):
    start = logger.RunLogger.start

    def start_on_a_full_disk(run_logger, updates):
        start(run_logger, updates)
        run_logger._log.close()
        run_logger._log = open("/dev/full", "a")  # noqa: SIM115

    monkeypatch.setattr(logger.RunLogger, "start", start_on_a_full_disk)
    result = train(vit(), None, data, tmp_path, **fast | {"quiet": False})
    assert "log.jsonl could not be written" in capsys.readouterr().err
    assert (tmp_path / "result.json").exists()
    assert result.best is not None


def test_a_best_checkpoint_that_could_not_be_written_is_not_claimed(
    data, fast, tmp_path, monkeypatch
):
    save = checkpoints.torch.save

    def no_space_for_the_second(state, file):
        if "optimizer" not in state and state["position"]["epoch"] > 1:
            raise OSError(28, "No space left on device")
        save(state, file)

    monkeypatch.setattr(checkpoints.torch, "save", no_space_for_the_second)
    result = train(vit(), None, data, tmp_path, **fast | {"epochs": 6, "lr": 1e-2})
    assert result.best_epoch > 1
    assert result.best is None


def test_an_image_that_would_exhaust_memory_is_replaced_like_a_broken_one(tmp_path, monkeypatch):
    folder = image_folder(tmp_path / "images", train=4, val=2)
    Image.new("RGB", (200, 200)).save(folder / "train" / "red" / "0.jpg")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 15_000)
    train("test_vit", None, folder, tmp_path / "run", **IMAGES)
    (event,) = events(tmp_path / "run", "unreadable")
    assert "decompression bomb" in event["reason"]


def test_a_last_checkpoint_that_cannot_be_written_is_an_error(data, fast, tmp_path, monkeypatch):
    save = torch.save

    def full_at_the_end(state, file):
        if state["position"]["epoch"] == 2:
            raise OSError(28, "No space left on device")
        save(state, file)

    monkeypatch.setattr(checkpoints.torch, "save", full_at_the_end)
    with pytest.raises(OSError, match=r"No space left.*older one there is kept"):
        train(vit(), None, data, tmp_path, **fast)
    assert load_checkpoint(tmp_path)["position"]["epoch"] == 1


class SuddenDeath(TensorDataset):
    """Kills the whole process, without a word, when the n-th sample is fetched."""

    left = 16 * 5 + 7

    def __getitem__(self, index):
        SuddenDeath.left -= 1
        if SuddenDeath.left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(index)


KILLED = {"checkpoint_interval": 1, "alpha": 0.5, "mixup": 0.8}


def run_until_killed(output, opt):
    train_set, val_set = tensor_data()
    dying = (SuddenDeath(*train_set.tensors), val_set)
    train(
        *(vit(proj_drop_rate=0.2), vit(24, seed=1), dying, output),
        **FAST | KILLED,
        projector="linear",
        opt=opt,
    )


@each_optimizer
def test_a_run_killed_at_once_resumes_and_ends_bit_identical(data, tmp_path, opt):
    script = (
        "import sys; from tests.training.test_faults import run_until_killed as r; r(*sys.argv[1:])"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "parts"), opt]
    killed = subprocess.run(command, timeout=120)
    assert killed.returncode == -signal.SIGKILL
    assert load_checkpoint(tmp_path / "parts")["position"]["total"] == 5
    for name in ("parts", "whole"):
        student = vit(proj_drop_rate=0.2)
        options = FAST | KILLED | {"projector": "linear", "opt": opt}
        train(student, vit(24, seed=1), data, tmp_path / name, **options)
    parts, whole = (load_checkpoint(tmp_path / name) for name in ("parts", "whole"))
    for kind in ("state_dict", "state_dict_ema", "terms"):
        assert all(torch.equal(parts[kind][n], whole[kind][n]) for n in whole[kind]), kind


class KillsItsRun(TensorDataset):
    """Lets a loader process kill the run that it belongs to, in the second epoch."""

    fetched = 0

    def __getitem__(self, index):
        self.fetched += 1
        if self.fetched == 48 and torch.utils.data.get_worker_info() is not None:
            os.kill(os.getppid(), signal.SIGKILL)
        return super().__getitem__(index)


def run_beside_workers(output):
    train_set, val_set = tensor_data()
    killing = (KillsItsRun(*train_set.tensors), val_set)
    train(vit(), None, killing, output, **FAST | {"workers": 2, "epochs": 9})


@pytest.mark.slow
def test_a_run_killed_beside_two_workers_is_resumed_at_once(data, tmp_path, capsys):
    call = "test_faults.run_beside_workers(sys.argv[1])"
    script = f"import sys; from tests.training import test_faults; {call}"
    killed = subprocess.run([sys.executable, "-c", script, str(tmp_path / "run")], timeout=120)
    assert killed.returncode == -signal.SIGKILL
    assert (tmp_path / "run" / ".fastkd.lock").exists()
    options = FAST | {"workers": 2, "epochs": 9, "quiet": False}
    train(vit(seed=9), None, data, tmp_path / "run", **options)
    assert "resumed after update" in capsys.readouterr().err
    assert not (tmp_path / "run" / ".fastkd.lock").exists()


def fail_on_one_rank():
    if os.environ["RANK"] == "1":
        SuddenError.left = 40
    train_set, val_set = tensor_data()
    train(vit(), None, (SuddenError(*train_set.tensors), val_set), **FAST | {"epochs": 200})


class SuddenError(TensorDataset):
    """Fails on one rank, in the middle of the run."""

    left = -1

    def __getitem__(self, index):
        SuddenError.left -= 1
        if SuddenError.left == 0:
            raise LookupError("this rank's disk has gone")
        return super().__getitem__(index)


def torchrun(tmp_path, function):
    """The command and environment of two processes that call a function of this module."""
    script = tmp_path / "run.py"
    script.write_text(
        f"import sys\nfrom tests.training.test_faults import {function} as f\n"
        f"if __name__ == '__main__': f(*sys.argv[1:])\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2"]
    command += ["--rdzv_backend=c10d", "--rdzv_endpoint=127.0.0.1:0", str(script)]
    return command, os.environ | {"PYTHONPATH": os.getcwd(), "OMP_NUM_THREADS": "1"}


@pytest.mark.slow
def test_one_failing_rank_ends_them_all_within_a_minute(tmp_path):
    command, environment = torchrun(tmp_path, "fail_on_one_rank")
    started = time.monotonic()
    ended = subprocess.run(
        command, env=environment, timeout=110, capture_output=True, text=True, check=False
    )
    assert ended.returncode != 0
    assert "this rank's disk has gone" in ended.stderr
    assert time.monotonic() - started < 60


def run_in_one_long_epoch(output, opt):
    """Nothing but the stop writes a checkpoint: the epoch does not end, no interval is due."""
    options = FAST | {"workers": 1, "log_interval": 10**6, "opt": opt}
    train(vit(), None, tensor_data(train=200_000), output, **options)


@pytest.mark.slow
@pytest.mark.parametrize("opt", ["adamw", "nesterov", "lamb"])
def test_sigterm_to_torchrun_writes_a_checkpoint_in_good_time(tmp_path, opt):
    command, environment = torchrun(tmp_path, "run_in_one_long_epoch")
    run = subprocess.Popen([*command, str(tmp_path / "run"), opt], env=environment)
    begun = tmp_path / "run" / "log.jsonl"
    while not begun.exists() and run.poll() is None:
        time.sleep(0.2)
    time.sleep(3)
    assert not (tmp_path / "run" / "last.pth").exists()
    run.send_signal(signal.SIGTERM)
    assert run.wait(timeout=25) != 0
    assert load_checkpoint(tmp_path / "run")["position"]["total"] > 0
