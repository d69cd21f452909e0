"""Stopping a run politely: signals become a request that the loop honours between two updates.

Several processes have to stop after the same one, whichever of them got the signal.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any, NoReturn

from fastkd.utils.distributed import World

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class StopRequest:
    """While entered, a signal to stop sets `received`; a second SIGINT interrupts at once.

    SIGUSR1 is what SLURM can send some time before it ends a job. (torchrun passes on only what
    ``TORCHELASTIC_SIGNALS_TO_HANDLE`` names, which is without SIGUSR1 unless told.)

    Outside the main thread, where python has no signals, it only offers `received`.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._previous: dict[int, Any] = {}
        self._asked: Callable[[], int] | None = None

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = number

    def poll(self, world: World) -> bool:
        """Whether a process had been asked to stop when this was last called; waits for no device.

        Args:
            world: all of its processes must call, at the same point.

        Returns:
            The same answer on every process; of one process alone, whether it has been asked.
        """
        if world.size == 1:
            return self.received is not None
        before, self._asked = self._asked, world.maximum(self.received or 0)
        return before is not None and self._note(before())

    def agree(self, world: World) -> bool:
        """Whether a process has been asked to stop by now; waits for the other hosts.

        Args:
            world: all of its processes must call, at the same point.

        Returns:
            The same answer on every process.
        """
        return self._note(world.maximum(self.received or 0)())

    def _note(self, number: int) -> bool:
        if number:
            self.received = number
        return bool(number)

    def raise_as_exception(self) -> NoReturn:
        """Raise what the signal would have: KeyboardInterrupt, or SystemExit(128 + its number)."""
        if self.received is not None and self.received != signal.SIGINT:
            raise SystemExit(128 + self.received)
        raise KeyboardInterrupt
