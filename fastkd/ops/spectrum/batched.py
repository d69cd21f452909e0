"""Many small symmetric eigenproblems on a CPU, shared out over threads.

torch.linalg solves a batch one matrix after the other, with all threads on each; at a few hundred
rows they mostly wait for each other. Here every thread solves its share alone, which is two to
three times as fast on two cores, and the bits do not depend on how many threads there are.
"""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

# n^3 summed over the batch; below it, handing the work out takes longer than doing it.
_WORTH_SHARING = 1e7

_POOLS: dict[int, ThreadPoolExecutor] = {}
_LOCK = threading.Lock()


def eigvalsh(matrices: Tensor) -> Tensor:
    """`torch.linalg.eigvalsh` of [B, n, n]: [B, n], ascending; no gradient."""
    return torch.cat(_share(torch.linalg.eigvalsh, matrices))


def eigh(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """`torch.linalg.eigh` of [B, n, n]: [B, n], ascending, and [B, n, n]; no gradient."""
    values, vectors = zip(*_share(torch.linalg.eigh, matrices), strict=True)
    return torch.cat(values), torch.cat(vectors)


def _share(solve: Callable[[Tensor], Tensor], matrices: Tensor) -> list[Tensor]:
    matrices = matrices.detach()
    threads = torch.get_num_threads()
    work = len(matrices) * matrices.shape[-1] ** 3
    if matrices.device.type != "cpu" or min(threads, len(matrices)) < 2 or work < _WORTH_SHARING:
        return [solve(matrices)]
    if torch.compiler.is_compiling() or not _threads_are_openmp():
        return [solve(matrices)]
    return list(_pool(threads).map(solve, matrices.chunk(threads)))


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

    pool = ThreadPoolExecutor(threads, "fastkd-eigen", initializer=begin)
    for _ in range(threads):
        pool.submit(int)
    ready.wait()
    torch.set_num_threads(threads)  # also what threads that start later begin with
    return pool


# A child has none of its parent's threads, and would wait for them for ever.
os.register_at_fork(after_in_child=_POOLS.clear)
