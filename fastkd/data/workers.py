"""Loader processes: how they are run, and which sample one of them died over.

Knows processes and numbers of samples; neither images nor batches.
"""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Sequence
from multiprocessing import popen_fork
from multiprocessing.context import ForkContext, ForkProcess
from typing import Any

import torch
from torch.utils.data import get_worker_info

# What a loop over a loader may see of a process that died.
DEATHS = (RuntimeError, ConnectionError, EOFError)
TORCH_SECONDS = 2.0  # within which torch hears of it
SHOWN_PIDS = re.compile(r"DataLoader worker \(pid(?:\(s\))? ([\d, ]+)\)")
PID, SAMPLE = 0, 1  # columns of the shared notes


class WorkerNotes:
    """What every loader process is working on, in memory that outlives the process.

    Args:
        workers: loader processes; 0 notes nothing.
    """

    def __init__(self, workers: int) -> None:
        self.rows = torch.full((workers, 2), -1, dtype=torch.int64).share_memory_()

    def note(self, sample: int) -> None:
        """Say, in a loader process, which sample is next; does nothing in the main process.

        Args:
            sample: its index in the data set.
        """
        worker = get_worker_info()
        if worker is not None and worker.id < len(self.rows):
            self.rows[worker.id, SAMPLE] = sample
            self.rows[worker.id, PID] = os.getpid()

    def samples(self, pids: Sequence[int]) -> dict[int, int]:
        """What processes were last working on.

        Args:
            pids: of loader processes, alive or dead.

        Returns:
            Sample by process id, for those that noted one.
        """
        noted = {int(pid): int(sample) for pid, sample in self.rows.tolist()}
        return {pid: noted[pid] for pid in pids if pid in noted}


def describe_worker_death(loaders: Sequence[Any], error: BaseException) -> str | None:
    """Name the file that a loader process died over.

    Args:
        loaders: one of them raised; their data sets have ``notes`` (`WorkerNotes`) and
            ``name(sample)``.
        error: what it raised, one of `DEATHS`.

    Returns:
        One sentence, or None where the error is another one or nothing was noted.
    """
    found = SHOWN_PIDS.search(str(_as_torch_tells(error)))
    if found is None:
        return None
    pids = [int(pid) for pid in found.group(1).split(",")]
    for loader in loaders:
        notes = getattr(loader.dataset, "notes", None)
        if notes is None or not (samples := notes.samples(pids)):
            continue
        deaths = (
            f"loader process {pid} died over {loader.dataset.name(sample)} (sample {sample})"
            for pid, sample in samples.items()
        )
        return "data: " + "; ".join(deaths)
    return None


def _as_torch_tells(error: BaseException) -> BaseException:
    """Torch's error for a dead process, where its closed socket was noticed first.

    SIGCHLD reaches torch after the process's sockets were closed, and torch's handler raises in
    whatever code runs then: wait for it here.
    """
    if not isinstance(error, (ConnectionError, EOFError)):
        return error
    end = time.monotonic() + TORCH_SECONDS
    try:
        while time.monotonic() < end:
            time.sleep(0.02)
    except RuntimeError as told:
        return told
    return error


def loader_options(workers: int, device: torch.device) -> dict[str, Any]:
    """How every `DataLoader` here runs its workers; an iteration draws from no global generator.

    Args:
        workers: loader processes; they leave signals to the main process.
        device: pinned memory is used for an accelerator.

    Returns:
        Keyword arguments of the loader.
    """
    return {
        "num_workers": workers,
        "multiprocessing_context": _LoaderContext() if workers > 0 else None,
        "pin_memory": device.type == "cuda",
        "persistent_workers": workers > 0,
        "worker_init_fn": _leave_signals_to_the_main_process,
        "generator": torch.Generator(),  # its own: the global one would be drawn from at the start
    }


def _leave_signals_to_the_main_process(_: int) -> None:
    """Let the main process finish its update and end this one; it may get the signal, too.

    torchrun, SLURM and a terminal's Ctrl-C signal all processes; a loader that loses its own cannot
    finish the update after which all ranks stop.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


class _Killable(popen_fork.Popen):
    """A child that ignores SIGTERM, which is how multiprocessing ends one that hangs."""

    def terminate(self) -> None:
        self.kill()


class _LoaderProcess(ForkProcess):
    _Popen = staticmethod(_Killable)


class _LoaderContext(ForkContext):
    Process = _LoaderProcess
