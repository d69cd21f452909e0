"""The lock of an output folder: one run at a time, and none is kept out by a dead one."""

import contextlib
import json
import os
import shutil
import signal
import threading
import time

import pytest

from fastkd.utils import lock as locks
from fastkd.utils.lock import NAME, FolderInUseError, FolderLock, holding


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(locks, "PATIENCE_SECONDS", 0.2)
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)


@contextlib.contextmanager
def forked(action):
    """A process of its own that holds nothing of this one's; yields its number."""
    pid = os.fork()
    if pid == 0:
        locks._held.clear()
        code = 1
        with contextlib.suppress(FolderInUseError):
            action()
            code = 0
        os._exit(code)
    try:
        yield pid
    finally:
        with contextlib.suppress(ProcessLookupError, ChildProcessError):
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


def status_of(action):
    with forked(action) as pid:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def hold_for_ever(folder, workers):
    with holding(folder):
        for _ in range(workers):
            if os.fork() == 0:
                time.sleep(5)
                os._exit(0)
        (folder / "ready").touch()
        time.sleep(60)


def wait_for(path):
    while not path.exists():
        time.sleep(0.005)


def record(folder, **changes):
    """What a run left that was killed a moment ago."""
    folder.mkdir(exist_ok=True)
    known = {"host": "elsewhere", "pid": 4711, "job": None, "time": time.time()}
    (folder / NAME).write_text(json.dumps(known | changes))


def test_a_second_run_is_refused_with_host_process_and_folder(tmp_path):
    with forked(lambda: hold_for_ever(tmp_path / "run", 0)) as pid:
        wait_for(tmp_path / "run" / "ready")
        with pytest.raises(FolderInUseError) as error, holding(tmp_path / "run"):
            pass
    for part in (os.uname().nodename, f"process {pid})", str(tmp_path / "run")):
        assert part in str(error.value)


def test_a_run_killed_beside_two_workers_is_followed_at_once(tmp_path):
    folder = tmp_path / "run"
    with forked(lambda: hold_for_ever(folder, 2)) as pid:
        wait_for(folder / "ready")
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        began = time.monotonic()
        with holding(folder) as lock:
            assert lock.note == ""
        assert time.monotonic() - began < locks.PATIENCE_SECONDS


def test_a_process_has_the_lock_once(tmp_path):
    with holding(tmp_path), pytest.raises(FolderInUseError), holding(tmp_path / "."):
        pass
    with holding(tmp_path):  # and again, once it is given back
        pass


def test_what_the_lock_made_is_removed_and_nothing_else(tmp_path):
    with holding(tmp_path / "new"):
        assert os.listdir(tmp_path / "new") == [NAME]
    assert os.listdir(tmp_path) == []
    with holding(tmp_path / "new"):
        (tmp_path / "new" / "last.pth").touch()
    assert os.listdir(tmp_path / "new") == ["last.pth"]
    (tmp_path / "empty").mkdir()
    with holding(tmp_path / "empty"):
        pass
    assert os.listdir(tmp_path / "empty") == []


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"time": 0.0}, "silent for"),
        ({"time": time.time() + 1e6}, "silent for"),  # a clock that was wrong
        ({"job": "77"}, "same SLURM job"),
    ],
)
def test_the_record_of_a_dead_host_is_taken_over_with_a_line(tmp_path, monkeypatch, changes, said):
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    record(tmp_path, **changes)
    with holding(tmp_path) as lock:
        assert "elsewhere" in lock.note and said in lock.note and str(tmp_path) in lock.note


@pytest.mark.parametrize("job", [None, "78"])
def test_the_record_of_a_host_that_may_be_alive_is_not(tmp_path, monkeypatch, job):
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    record(tmp_path, job=job)
    with pytest.raises(FolderInUseError, match=r"elsewhere, process 4711.*180 s"):
        FolderLock(tmp_path).acquire()


@pytest.mark.parametrize("content", ["", "x", "[]", "{}", '{"host": "a", "pid": "b", "time": 1}'])
def test_a_record_that_says_nothing_keeps_nobody_out(tmp_path, content):
    (tmp_path / NAME).write_text(content)
    with holding(tmp_path) as lock:
        assert lock.note == "" and lock.is_held()


@pytest.fixture
def no_locks(monkeypatch):
    def refuse(*_):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(locks.fcntl, "lockf", refuse)
    monkeypatch.setattr(locks.time, "sleep", lambda _: None)


def test_without_locks_the_record_decides(tmp_path, no_locks):
    with holding(tmp_path):
        assert status_of(lambda: FolderLock(tmp_path).acquire()) == 1
    assert status_of(lambda: FolderLock(tmp_path).acquire()) == 0
    with holding(tmp_path) as lock:  # of a process of this host that is gone
        assert lock.note == ""


def test_the_time_of_the_record_is_renewed(tmp_path, monkeypatch):
    monkeypatch.setattr(locks, "RENEW_SECONDS", 0.01)
    with holding(tmp_path):
        first = json.loads((tmp_path / NAME).read_text())["time"]
        deadline = time.monotonic() + 5
        while json.loads((tmp_path / NAME).read_text())["time"] == first:
            assert time.monotonic() < deadline
            time.sleep(0.005)


def test_nothing_is_renewed_in_a_file_that_is_closed(tmp_path, monkeypatch):
    monkeypatch.setattr(locks, "RENEW_SECONDS", 0.001)
    entered, written = threading.Event(), []

    def slow(lock):
        if threading.current_thread() is not threading.main_thread():
            entered.set()
            time.sleep(0.05)
        written.append(lock._file)

    monkeypatch.setattr(FolderLock, "_write", slow)
    with holding(tmp_path):
        assert entered.wait(5)
    time.sleep(0.1)
    assert len(written) > 1 and min(written) >= 0


def test_a_folder_that_is_gone_or_taken_is_noticed(tmp_path):
    with holding(tmp_path / "run") as lock:
        assert lock.is_held()
        shutil.rmtree(tmp_path / "run")
        assert not lock.is_held()
        (tmp_path / "run").mkdir()
        assert not lock.is_held()
        lock.release()
        lock.acquire()
        assert lock.is_held()
        record(tmp_path / "run", time=time.time())  # after this one had been silent for long
        with pytest.raises(FolderInUseError, match="elsewhere"):
            lock.is_held()
