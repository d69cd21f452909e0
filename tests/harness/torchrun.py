"""Several processes on this machine, as torchrun starts them: its environment, and a free port."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from typing import Any

import torch
import torch.multiprocessing as multiprocessing


def run_ranks(function: Callable[..., None], *arguments: Any, processes: int = 2) -> None:
    """Call ``function(rank, *arguments)`` in processes that find themselves under torchrun.

    Each computes on one thread. Returns when all have ended; raises when one has failed.

    Args:
        function: of a module's top level, for the processes import it.
        *arguments: given to all of them; picklable.
        processes: how many.
    """
    start = (function, processes, _free_port(), arguments)
    multiprocessing.spawn(_run_rank, start, nprocs=processes)


def _run_rank(
    rank: int, function: Callable[..., None], processes: int, port: int, arguments: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    os.environ.update(
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(processes),
    )
    function(rank, *arguments)


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
