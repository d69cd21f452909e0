"""Share work on a CPU over threads that compute alone, with the same bits for any number of them.

torch.linalg solves a batch one matrix after the other, with all threads on each, which at a few
hundred rows mostly wait for each other: a share for each is about twice as fast on two cores.
"""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor

Item = TypeVar("Item")
Result = TypeVar("Result")

# Multiplications; below it, handing the work out takes longer than doing it.
_WORTH_SHARING = 1e7

_POOLS: dict[int, ThreadPoolExecutor] = {}
_LOCK = threading.Lock()


def over_shares(
    work: Callable[[slice], Result], batch: Tensor, multiplications: float
) -> list[Result]:
    """Call ``work`` on slices of all of a batch, in threads where that is faster; no gradients.

    ``multiplications`` is roughly what one item takes. The results of the shares come in order.
    """
    threads = torch.get_num_threads()
    if not _worth_sharing(batch, threads, multiplications * len(batch)):
        with torch.no_grad():
            return [work(slice(0, len(batch)))]
    step = -(-len(batch) // threads)
    shares = [slice(start, start + step) for start in range(0, len(batch), step)]
    return list(_pool(threads).map(_in_modes_of_here(work), shares))


def each(
    work: Callable[[Item], Result], items: Sequence[Item], device: torch.device
) -> list[Result]:
    """Call ``work`` on every item, on a CPU in several threads at once; no gradients."""
    threads = torch.get_num_threads()
    alone = min(threads, len(items)) < 2 or device.type != "cpu" or not _threads_are_openmp()
    if alone:
        with torch.no_grad():
            return [work(item) for item in items]
    return list(_pool(threads).map(_in_modes_of_here(work), items))


def _in_modes_of_here(work: Callable[[Item], Result]) -> Callable[[Item], Result]:
    """Modes are each thread's own, and tensors made in inference mode are written only in it."""
    inference = torch.is_inference_mode_enabled()

    def in_modes(item: Item) -> Result:
        with torch.inference_mode(inference), torch.no_grad():
            return work(item)

    return in_modes


def _worth_sharing(batch: Tensor, threads: int, multiplications: float) -> bool:
    return (
        batch.device.type == "cpu"
        and min(threads, len(batch)) > 1
        and multiplications >= _WORTH_SHARING
        and not torch.compiler.is_compiling()
        and _threads_are_openmp()
    )


@functools.cache
def _threads_are_openmp() -> bool:
    """Elsewhere the number of threads is not each thread's own."""
    return "ATen parallel backend: OpenMP" in torch.__config__.parallel_info()


def _pool(threads: int) -> ThreadPoolExecutor:
    with _LOCK:
        if threads not in _POOLS:
            _POOLS[threads] = _started(threads)
        return _POOLS[threads]


def _started(threads: int) -> ThreadPoolExecutor:
    """Workers that compute on one thread each."""
    ready = threading.Barrier(threads + 1)

    def begin() -> None:
        torch.linalg.eigvalsh(torch.eye(2))  # a thread's first product sets its number of threads
        torch.set_num_threads(1)
        ready.wait()

    pool = ThreadPoolExecutor(threads, "fastkd", initializer=begin)
    for _ in range(threads):
        pool.submit(int)
    ready.wait()
    torch.set_num_threads(threads)  # also what threads that start later begin with
    return pool


# A child has none of its parent's threads, and would wait for them for ever.
os.register_at_fork(after_in_child=_POOLS.clear)
