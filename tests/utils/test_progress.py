"""What a person sees of long work."""

import io

import pytest

from fastkd.utils import progress as module
from fastkd.utils.progress import Progress, track


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def at_once(monkeypatch):
    monkeypatch.setattr(module, "LINE_EVERY_SECONDS", 0.0)


@pytest.fixture
def clock(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    return now


def test_where_there_is_no_terminal_lines_tell_what_is_done_lost_and_left(at_once, clock):
    stream = io.StringIO()
    with Progress("predict", 2000, stream=stream) as progress:
        clock[0] = 10.0
        progress.advance(500)
        clock[0] = 40.0
        progress.advance(1300, lost=1)
        progress.advance(200)
    assert stream.getvalue().splitlines() == [
        "predict: 500 of 2,000 images, about 00:30 left",
        "predict: 1,800 of 2,000 images, 1 unreadable, about 00:04 left",
        "predict: 2,000 of 2,000 images, 1 unreadable",
    ]


def test_what_was_done_before_counts_but_not_for_the_time_left(at_once, clock):
    stream = io.StringIO()
    progress = Progress(stream=stream)
    progress.start("vit: spectra", 10, initial=2, lost=1)
    clock[0] = 4.0
    progress.advance(4, lost=1)
    assert stream.getvalue() == "vit: spectra: 6 of 10 images, 2 unreadable, about 00:04 left\n"


def test_lines_come_every_ten_seconds_only(clock):
    stream = io.StringIO()
    progress = Progress("shard", 100, stream=stream)
    for second in range(1, 26):
        clock[0] = float(second)
        progress.advance()
    assert [line.split(",")[0] for line in stream.getvalue().splitlines()] == [
        "shard: 10 of 100 images",
        "shard: 20 of 100 images",
    ]


def test_a_terminal_gets_a_bar_and_lines_above_it():
    stream = Terminal()
    with Progress("shard", 3, stream=stream) as progress:
        progress.write("a line")
        progress.advance(2, lost=1)
        progress.note("epoch 1", label="train")
        assert progress.has_bar
    assert not progress.has_bar
    told = stream.getvalue()
    assert "a line" in told and "2/3" in told and "1 unreadable" in told
    assert "train" in told and "epoch 1" in told


@pytest.mark.parametrize("stream", [io.StringIO(), Terminal()], ids=["file", "terminal"])
def test_a_quiet_run_shows_nothing(at_once, stream):
    with Progress("predict", 2, shows=False, stream=stream) as progress:
        progress.advance()
        progress.write("a line")
    assert stream.getvalue() == ""


def test_a_bar_brings_no_thread():
    import threading

    before = threading.active_count()
    with Progress("shard", 3, stream=Terminal()) as progress:
        progress.advance()
        assert threading.active_count() == before


def test_nothing_to_do_is_no_error():
    stream = io.StringIO()
    with Progress("predict", 0, stream=stream) as progress:
        progress.advance(0)
        progress.write(f"{progress.done} of {progress.total}")
    assert stream.getvalue() == "0 of 0\n"


def test_tracking_yields_every_item():
    assert list(track([3, 1, 2], "listing", "file")) == [3, 1, 2]
