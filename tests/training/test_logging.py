"""What a run tells, on a terminal and off it."""

import io
import json

from fastkd.training.logging import Result, RunLogger

RECORD = {"epoch": 0, "update": 5, "loss": 1.25, "images_per_second": 800.0, "data_wait": 3.0}


class Terminal(io.StringIO):
    def isatty(self):
        return True


def told(stream, **options):
    logger = RunLogger(None, 10, stream=stream, **options)
    logger.start(0)
    for _ in range(5):
        logger.advance()
    logger.interval(RECORD)
    logger.epoch({**RECORD, "top1": 50.0}, [RECORD], 2)
    logger.close()
    return stream.getvalue()


def test_off_a_terminal_every_epoch_is_a_plain_line():
    assert told(io.StringIO()) == (
        "epoch 1/2, loss 1.2500, top-1 50.00 %, 800 images/s, data wait 3 %\n"
    )


def test_on_a_terminal_one_bar_shows_throughput_and_data_wait():
    text = told(Terminal())
    assert "5/10" in text
    assert "800 images/s, data wait 3%" in text


def test_quiet_and_other_ranks_show_nothing():
    assert told(Terminal(), quiet=True) == ""
    assert told(Terminal(), enabled=False) == ""


def test_a_log_torn_by_a_kill_is_mended(tmp_path):
    (tmp_path / "log.jsonl").write_text('{"update": 1}\n{"update": 5}\n{"upda')
    logger = RunLogger(tmp_path, 10, quiet=True)
    logger.mend(3, [])
    assert (tmp_path / "log.jsonl").read_text() == '{"update": 1}\n'


def test_an_epoch_that_a_kill_kept_from_the_files_is_added(tmp_path):
    first, second = RECORD, RECORD | {"epoch": 1, "update": 10}
    lines = [{"kind": "epoch", **first}, {"kind": "interval", **second}]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    RunLogger(tmp_path, 10, quiet=True).mend(10, [first, second])
    written = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [(r["kind"], r["epoch"]) for r in written] == [
        ("epoch", 0),
        ("interval", 1),
        ("epoch", 1),
    ]
    assert len((tmp_path / "epochs.csv").read_text().splitlines()) == 3


def test_a_table_of_epochs_that_are_not_of_this_run_is_removed(tmp_path):
    (tmp_path / "epochs.csv").write_text("epoch\n0\n")
    RunLogger(tmp_path, 10, quiet=True).mend(0, [])
    assert not (tmp_path / "epochs.csv").exists()


def test_a_summary_says_what_was_measured_and_how_the_best_was_picked():
    result = Result(50.0, None, 60.0, None, 55.0, 2, "by rule", 3, 1000, 5_717_416)
    text = result.summary()
    assert "top-1 after epoch 3: 50.00 % (raw weights, 1,000 evaluation images)" in text
    assert "with EMA weights: 60.00 %" in text
    assert "55.00 % at epoch 2 (by rule)" in text
    assert "5,717,416 parameters" in text
