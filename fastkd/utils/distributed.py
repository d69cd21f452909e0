"""Ranks, devices and sums over the processes of torchrun; signals that ask a run to stop."""

from __future__ import annotations

import atexit
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from types import FrameType
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from timm.utils import distribute_bn
from torch import Tensor, nn

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)

# Tasks of one launch. Not SLURM_NTASKS: batch scripts and interactive shells, which run once, have
# that of their allocation.
TASK_COUNTS = (
    *("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE"),
    *("FLUX_JOB_SIZE", "JSM_NAMESPACE_SIZE"),
)

AMP_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class World:
    """This process among its peers."""

    device: torch.device  # where this process computes
    rank: int = 0
    size: int = 1  # number of processes
    # The group for messages between hosts, which must not wait for devices; None: the default one.
    control: dist.ProcessGroup | None = None

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and prints."""
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """Sum over all processes; synchronizes with them, on the device."""
        if self.size == 1:
            return values
        total = values.clone()
        dist.all_reduce(total)
        return total

    def maximum(self, value: int) -> Callable[[], int]:
        """Begin to find the largest value of all processes; waits for no device."""
        if self.size == 1:
            return lambda: value
        largest, op = torch.tensor(value), dist.ReduceOp.MAX
        work: Any = dist.all_reduce(largest, op=op, group=self.control, async_op=True)

        def result() -> int:
            work.wait()
            return int(largest)

        return result

    def gather(self, value: Any) -> list[Any]:
        """Collect a picklable value of every process; synchronizes with them, not with devices."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.control)
        return values

    @torch.no_grad()
    def share(self, module: nn.Module) -> None:
        """Copy the main process' parameters and buffers to all others."""
        if self.size == 1:
            return
        for tensor in (*module.parameters(), *module.buffers()):
            dist.broadcast(tensor.data, 0)

    def average_norms(self, module: nn.Module) -> None:
        """Average the running statistics of batch norms, of which every process has its own."""
        if self.size > 1:
            distribute_bn(module, self.size, reduce=True)

    def barrier(self) -> None:
        """Wait for the other processes."""
        if self.size > 1:
            dist.barrier()


ALONE = World(torch.device("cpu"))  # one process, without an accelerator


@contextmanager
def world(device: str | torch.device | None = None) -> Iterator[World]:
    """Join torchrun's process group, which then stays for other runs until the process ends."""
    size = process_count()
    chosen = _usable_device(device, _from_environment("LOCAL_RANK", 0))
    if size == 1 and not (dist.is_available() and dist.is_initialized()):
        yield World(chosen)
        return
    if not dist.is_initialized():
        dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo")
        # Not at the end of a run: a group that is left and joined again finds the addresses of the
        # earlier one in torchrun's store.
        atexit.register(_leave)
    try:
        control: Any = dist.new_group(backend="gloo") if dist.get_backend() != "gloo" else None
        yield World(chosen, dist.get_rank(), dist.get_world_size(), control)
    except Exception:
        # After an error others may still wait in a collective: destroying NCCL's group would wait
        # for them, while torchrun ends them once this process has ended.
        if chosen.type == "cuda":
            atexit.unregister(_leave)
        raise


def is_main_process() -> bool:
    """Return whether this is torchrun's first process, before there is a group, too."""
    return os.environ.get("RANK", "0") == "0"


def process_count() -> int:
    """Return how many processes torchrun started; raise where another launcher started several."""
    if os.environ.get("WORLD_SIZE") or (dist.is_available() and dist.is_initialized()):
        return _from_environment("WORLD_SIZE", 1)
    ones = dict.fromkeys(TASK_COUNTS, "1") | {"SLURM_PROCID": "0", "RANK": "0"}
    found = {
        name: value for name, one in ones.items() if (value := os.environ.get(name) or one) != one
    }
    if found:
        shown = ", ".join(f"{name}={value}" for name, value in found.items())
        raise ValueError(
            f"this is one of several tasks ({shown}) without a process group, so that each would "
            "do all of the work: start one task a node (srun --ntasks-per-node=1, mpirun -n 1) of "
            "torchrun --nproc-per-node=GPUS -m fastkd ..., or set WORLD_SIZE=1 for independent runs"
        )
    return 1


def _from_environment(name: str, least: int) -> int:
    """Return a whole number that a launcher sets; the least one where it is not set."""
    text = os.environ.get(name) or str(least)
    if not (text.isdecimal() and int(text) >= least):
        raise ValueError(f"the environment's {name} must be a number from {least}, got {text!r}")
    return int(text)


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def check_device(device: str | torch.device | None) -> torch.device:
    """Parse a device of a kind that can train, whether it is there or not."""
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        chosen = torch.device(device)
    except (RuntimeError, TypeError):
        chosen = None
    if chosen is None or not hasattr(torch, chosen.type):  # "meta" and others that compute nothing
        raise ValueError(f"device: expected cpu, cuda or cuda:NUMBER, got {str(device)!r}")
    count = torch.cuda.device_count()
    if chosen.type == "cuda" and 0 < count <= (chosen.index or 0):
        raise ValueError(f"device: expected one of {count} CUDA device(s), got {device}")
    return chosen


def _usable_device(device: str | torch.device | None, local_rank: int) -> torch.device:
    chosen = check_device(device)
    if chosen.type == "cuda" and chosen.index is None:
        chosen = torch.device("cuda", local_rank)
    try:
        torch.empty(1, device=chosen)
    except (RuntimeError, AssertionError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"device: torch cannot use {chosen} here: {reason}") from None
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    return chosen


def autocast(device: torch.device, amp: str) -> AbstractContextManager[Any]:
    """Return the autocast context of a recipe's ``amp``."""
    if amp == "none":
        return nullcontext()
    if amp not in AMP_DTYPES:
        raise ValueError(f"amp: expected none, {' or '.join(AMP_DTYPES)}, got {amp!r}")
    return torch.autocast(device.type, AMP_DTYPES[amp])


class StopRequest:
    """While entered, a signal to stop sets `received`; a second SIGINT interrupts at once.

    SLURM can send SIGUSR1 some time before it ends a job; torchrun passes it on only if
    ``TORCHELASTIC_SIGNALS_TO_HANDLE`` names it. Outside the main thread no signals are handled.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._previous: dict[int, Any] = {}
        self._pending: Callable[[], int] | None = None

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = number

    def poll(self, world: World) -> bool:
        """Return whether a process was asked to stop before the last call; waits for no device."""
        if world.size == 1:
            return self.received is not None
        before, self._pending = self._pending, world.maximum(self.received or 0)
        return before is not None and self._note(before())

    def agree(self, world: World) -> bool:
        """Return whether a process has been asked to stop by now; waits for the other hosts."""
        return self._note(world.maximum(self.received or 0)())

    def raise_if_asked(self, world: World) -> None:
        """Stop all processes if one has been asked to; waits for the other hosts."""
        if self.agree(world):
            self.raise_as_exception()

    def _note(self, number: int) -> bool:
        if number:
            self.received = number
        return bool(number)

    def raise_as_exception(self) -> NoReturn:
        """Raise what the signal would have: KeyboardInterrupt, or SystemExit(128 + its number)."""
        if self.received is not None and self.received != signal.SIGINT:
            raise SystemExit(128 + self.received)
        raise KeyboardInterrupt
