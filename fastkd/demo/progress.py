"""What a person sees while the demo runs: one line per finished run, and a bar on a terminal."""

from __future__ import annotations

import sys
from types import TracebackType
from typing import TextIO

from fastkd.utils.bar import Bar


class Progress:
    """Counts runs; a bar where the stream is a terminal, plain lines elsewhere.

    Args:
        stream: where it goes; standard error by default.
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        self.stream = stream or sys.stderr
        self._bar: Bar | None = None
        self._done = 0
        self._total = 0

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.close()
        if isinstance(error, KeyboardInterrupt | SystemExit):
            print("stopped; the same command continues from here", file=self.stream, flush=True)

    def start(self, total: int) -> None:
        """Begin to count.

        Args:
            total: how many runs there will be.
        """
        self._total = total
        if self.stream.isatty():
            self._bar = Bar(total=total, file=self.stream, unit="run", leave=False, ncols=88)

    def begin(self, name: str) -> None:
        """Say what is running.

        Args:
            name: the run.
        """
        if self._bar is not None:
            self._bar.set_description_str(name)

    def finish(self, name: str, top1: float, seconds: float | None) -> None:
        """Count a run.

        Args:
            name: the run.
            top1: its accuracy in %.
            seconds: how long it took; None if it had been finished before.
        """
        self._done += 1
        took = "kept from before" if seconds is None else f"{seconds:.0f} s"
        width = len(str(self._total))
        line = f"[{self._done:>{width}}/{self._total}] {name}: {top1:.1f} % ({took})"
        if self._bar is None:
            print(line, file=self.stream, flush=True)
        else:
            self._bar.write(line, file=self.stream)
            self._bar.update()
