"""A lock on an output folder, which ends with its process and is not held by forked ones."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

NAME = ".fastkd.lock"
RENEW_SECONDS = 30.0
STALE_SECONDS = 180.0  # after which the holder on another host is taken for dead
PATIENCE_SECONDS = 5.0  # a killed process that had a GPU takes seconds to end

_RECORD_BYTES = 512  # of one size, so that it is replaced in one write
_held: set[str] = set()  # by this process, which POSIX locks do not keep from itself


class FolderInUseError(RuntimeError):
    """Another run writes into the folder."""


class FolderLock:
    """Keeps other runs from writing into a folder.

    A POSIX record lock ends with its process and is not inherited by loader processes. For file
    systems without locks, and for hosts that do not share them, the file holds a record of the
    process, whose time a thread renews.
    """

    def __init__(self, folder: Path, argument: str = "output") -> None:
        self.folder, self.argument = folder, argument
        self.path = folder / NAME
        self.note = ""  # a line for the log if the folder was taken over from another run
        self._record = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "job": os.environ.get("SLURM_JOB_ID"),
        }
        self._file = -1
        self._made = False  # the folder, by this lock
        self._ended = threading.Event()
        self._renewing: threading.Thread | None = None

    def acquire(self) -> None:
        """Take the lock, or raise a FolderInUseError that names its holder."""
        key = os.path.realpath(self.folder)
        if key in _held:
            raise self._in_use(self._record)
        self._made = not self.folder.exists()
        self.folder.mkdir(parents=True, exist_ok=True)
        deadline = time.monotonic() + PATIENCE_SECONDS
        while (holder := self._try()) is not None:
            if time.monotonic() > deadline:
                raise self._in_use(holder)
            time.sleep(0.1)
        _held.add(key)
        self._ended = threading.Event()
        self._renewing = threading.Thread(target=self._renew, args=(self._ended,), daemon=True)
        self._renewing.start()

    def _try(self) -> dict[str, Any] | None:
        """Take the lock: None, or the record of the process that has it."""
        self._file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
        with contextlib.ExitStack() as on_failure:
            on_failure.callback(self._close)
            locks = True
            try:
                fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError):
                return self._read() or {}
            except OSError:  # a file system without locks
                locks = False
            if not self._is_same_file():  # removed by its holder in between
                return {}
            self._check_record(locks)
            self._write()
            if not locks:
                time.sleep(0.5)  # for another that read the file at the same time
                self._check_record(locks)
            on_failure.pop_all()
        return None

    def _check_record(self, locks: bool) -> None:
        """Refuse a folder whose last record is of a run that may be alive."""
        record = self._read()
        if record is None:
            return
        age = abs(time.time() - record["time"])
        here = record["host"] == self._record["host"]
        same_job = record["job"] is not None and record["job"] == self._record["job"]
        alive = record["pid"] != os.getpid() and os.path.exists(f"/proc/{record['pid']}")
        if here and (locks or not alive):
            return
        if age < STALE_SECONDS and (here or not same_job):
            until = f"; one that is silent for {STALE_SECONDS:.0f} s is taken over"
            raise self._in_use(record, "" if here else until)
        reason = "of the same SLURM job" if same_job else f"silent for {age / 60:.0f} minutes"
        self.note = f"{self.folder} is taken over from {record['host']} ({reason})"

    def _in_use(self, record: dict[str, Any], hint: str = "") -> FolderInUseError:
        host, pid = record.get("host", "unknown"), record.get("pid", "unknown")
        return FolderInUseError(
            f"{self.argument}: another run is writing into {self.folder} (host {host}, process "
            f"{pid}): choose another folder{hint}"
        )

    def is_held(self) -> bool:
        """Whether the folder is there and still this run's; FolderInUseError if it is another's."""
        if not self._is_same_file():
            return False
        record = self._read()
        if record is not None and self._record != {name: record[name] for name in self._record}:
            raise self._in_use(record)
        return True

    def release(self) -> None:
        """Remove the lock's file, and the folder if the lock made it and it is empty."""
        self._ended.set()
        if self._renewing is not None:
            self._renewing.join()  # or it might write to what is opened next under this number
        _held.discard(os.path.realpath(self.folder))
        with contextlib.suppress(OSError, FolderInUseError):
            if self.is_held():
                self.path.unlink()
            if self._made:
                self.folder.rmdir()
        self._close()

    def _renew(self, ended: threading.Event) -> None:
        while not ended.wait(RENEW_SECONDS):
            with contextlib.suppress(OSError, FolderInUseError):
                if self.is_held():
                    self._write()

    def _is_same_file(self) -> bool:
        with contextlib.suppress(OSError):
            return os.path.samestat(os.stat(self.path), os.fstat(self._file))
        return False

    def _read(self) -> dict[str, Any] | None:
        """Read the record in the file; None for anything else."""
        try:
            record = json.loads(os.pread(self._file, _RECORD_BYTES, 0))
            host, pid, job = str(record["host"]), int(record["pid"]), record.get("job")
            return {"host": host, "pid": pid, "job": job, "time": float(record["time"])}
        except (OSError, ValueError, TypeError, KeyError):
            return None

    def _write(self) -> None:
        text = json.dumps({**self._record, "time": time.time()}).ljust(_RECORD_BYTES)
        os.pwrite(self._file, text.encode(), 0)

    def _close(self) -> None:
        if self._file >= 0:
            os.close(self._file)
        self._file = -1


@contextlib.contextmanager
def holding(folder: Path, argument: str = "output") -> Iterator[FolderLock]:
    """Hold the lock of a folder, made if needed, within the block; errors name ``argument``."""
    lock = FolderLock(folder, argument)
    lock.acquire()
    try:
        yield lock
    finally:
        lock.release()
