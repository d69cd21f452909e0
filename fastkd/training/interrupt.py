"""Stopping a run politely: signals become a request that the loop honours between two updates."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any, NoReturn

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class StopRequest:
    """While entered, a signal to stop sets `received`; a second SIGINT interrupts at once.

    SIGUSR1 is what SLURM can send some time before it ends a job.

    Outside the main thread, where python has no signals, it only offers `received`.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._previous: dict[int, Any] = {}

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

    def raise_as_exception(self) -> NoReturn:
        """Raise what the signal would have: KeyboardInterrupt, or SystemExit(128 + its number)."""
        if self.received is not None and self.received != signal.SIGINT:
            raise SystemExit(128 + self.received)
        raise KeyboardInterrupt
