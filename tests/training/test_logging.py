"""What a run tells, on a terminal and off it."""

import io
import json
import re
from types import SimpleNamespace

import pytest
import torch

from fastkd.config import Recipe
from fastkd.training import trainer
from fastkd.training.logging import Result, RunLogger
from fastkd.utils.distributed import World

RECORD = {
    "epoch": 1,
    "update": 5,
    "lr": 1e-3,
    "loss": 1.25,
    "ce": 1.5,
    "feature": 0.5,
    "grad_norm": 2.0,
    "images_per_second": 1800.0,
    "data_wait": 3.0,
}
RECIPE = Recipe(epochs=2, warmup_epochs=0, ema_decay=None)
STAMP = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d "


class Terminal(io.StringIO):
    def isatty(self):
        return True


def told(stream, recipe=RECIPE, **options):
    logger = RunLogger(None, recipe, 5, stream=stream, **options)
    logger.start(0)
    logger.announce({}, {"epoch": 1, "update": 0}, [])
    for update in range(1, 6):
        logger.advance([], update)
    logger.interval(RECORD)
    logger.epoch({**RECORD, "top1": 50.0}, [RECORD])
    logger.close()
    return stream.getvalue()


def test_off_a_terminal_intervals_and_epochs_are_lines_with_time_speed_and_estimate():
    interval, epoch = told(io.StringIO()).splitlines()
    assert re.fullmatch(
        STAMP
        + r"epoch 1/2, update 5/5, loss 1\.2500 \(ce 1\.5000, feature 0\.5000\), lr 1\.00e-03, "
        r"1,800 images/s, data wait 3 %, ETA \d:\d\d:\d\d",
        interval,
    )
    assert re.fullmatch(
        STAMP + r"epoch 1/2, loss 1\.2500, top-1 50\.00 %, 1,800 images/s, data wait 3 %", epoch
    )


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"ema_decay": 0.99996}, True),  # 10 updates: 0.04 % of the way
        ({"ema_decay": 0.94}, True),  # 0.46
        ({"ema_decay": 0.93}, False),  # 0.52
        ({"ema_decay": 0.99996, "ema_warmup": True}, False),
    ],
)
def test_an_average_that_the_updates_cannot_move_is_said(options, said):
    text = told(io.StringIO(), RECIPE.override(**options))
    assert ("the initial weights still make up" in text) == said


def test_on_a_terminal_one_bar_shows_throughput_and_data_wait():
    text = told(Terminal())
    assert "5/10" in text
    assert "1,800 images/s, data wait 3%" in text


def test_quiet_and_other_ranks_show_nothing():
    assert told(Terminal(), quiet=True) == ""
    assert told(Terminal(), peers=World(torch.device("cpu"), rank=1, size=2)) == ""


@pytest.mark.parametrize("epoch", ["", ', "epoch": "x"', ', "epoch": [1]', ', "epoch": 9'])
def test_an_evaluation_of_no_epoch_of_the_run_is_left_out(tmp_path, epoch):
    (tmp_path / "log.jsonl").write_text(f'{{"update": 1, "kind": "evaluation"{epoch}}}\n')
    RunLogger(tmp_path, RECIPE, 5, quiet=True).mend(3, [])
    assert (tmp_path / "log.jsonl").read_text() == ""


def test_a_log_torn_by_a_kill_is_mended(tmp_path):
    (tmp_path / "log.jsonl").write_text('{"update": 1}\n{"update": 5}\n{"upda')
    logger = RunLogger(tmp_path, RECIPE, 5, quiet=True)
    logger.mend(3, [])
    assert (tmp_path / "log.jsonl").read_text() == '{"update": 1}\n'


def test_an_epoch_that_a_kill_kept_from_the_files_is_added(tmp_path):
    first, second = RECORD, RECORD | {"epoch": 2, "update": 10}
    lines = [{"kind": "epoch", **first}, {"kind": "interval", **second}]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    RunLogger(tmp_path, RECIPE, 5, quiet=True).mend(10, [first, second])
    written = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [(r["kind"], r["epoch"]) for r in written] == [
        ("epoch", 1),
        ("interval", 2),
        ("epoch", 2),
    ]
    assert len((tmp_path / "epochs.csv").read_text().splitlines()) == 3


def test_a_table_of_epochs_that_are_not_of_this_run_is_removed(tmp_path):
    (tmp_path / "epochs.csv").write_text("epoch\n1\n")
    RunLogger(tmp_path, RECIPE, 5, quiet=True).mend(0, [], foreign=True)
    assert not (tmp_path / "epochs.csv").exists()


def test_a_summary_says_what_was_measured_and_how_the_best_was_picked():
    result = Result(50.0, None, 60.0, None, 55.0, 2, "by rule", 3, 1000, 5_717_416)
    text = result.summary()
    assert "top-1 after epoch 3: 50.00 % (raw weights, 1,000 evaluation images)" in text
    assert "with EMA weights: 60.00 %" in text
    assert "55.00 % at epoch 2 (by rule)" in text
    assert "parameters: 5,717,416" in text


def test_the_memory_of_a_gpu_is_in_gib(monkeypatch):
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 3 * 2**30)
    world = SimpleNamespace(device=torch.device("cuda"), size=1)
    engine = SimpleNamespace(world=world, meter=SimpleNamespace(lr=0.1))
    run = SimpleNamespace(engine=engine, where=dict)
    reading = SimpleNamespace(record=lambda since, size: {})
    assert trainer._record(run, reading, None)["gpu_memory"] == 3
