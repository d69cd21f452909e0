"""What a person sees while an analysis runs: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from typing import TextIO

from fastkd.utils.bar import Bar

LINE_EVERY_SECONDS = 10.0
_PASSES = {"first": "spectra", "second": "shared basis"}


class AnalysisProgress:
    """Counts images.

    Args:
        shows: False shows nothing: quiet runs, and processes other than the main one.
        stream: where it goes; standard error by default.
    """

    def __init__(self, shows: bool = True, stream: TextIO | None = None) -> None:
        self.shows = shows
        self.stream = stream or sys.stderr
        self._bar: Bar | None = None
        self._label = ""
        self._done = self._total = self._skipped = 0
        self._line_at = 0.0

    def say(self, line: str) -> None:
        """Print a line above the bar."""
        if not self.shows:
            return
        if self._bar is None:
            print(line, file=self.stream, flush=True)
        else:
            self._bar.write(line, file=self.stream)

    def start(self, model: str, phase: str, total: int, done: int) -> None:
        """Begin to count.

        Args:
            model: what is measured.
            phase: ``"first"`` or ``"second"`` pass.
            total: images of this process.
            done: how many of them were measured before an interruption.
        """
        self.close()
        self._label = f"{model}: {_PASSES[phase]}"
        self._done, self._total, self._skipped = done, total, 0
        self._line_at = time.monotonic()
        if self.shows and self.stream.isatty():
            self._bar = Bar(
                total=total, initial=done, desc=self._label, unit="image", file=self.stream,
                leave=False, dynamic_ncols=True,
            )  # fmt: skip

    def advance(self, images: int, skipped: int = 0) -> None:
        """Count images.

        Args:
            images: how many more.
            skipped: unreadable ones so far.
        """
        self._done += images
        self._skipped = skipped
        if self._bar is not None:
            self._bar.update(images)
            if skipped:
                self._bar.set_postfix_str(f"{skipped} unreadable")
        elif time.monotonic() - self._line_at >= LINE_EVERY_SECONDS:
            self._line_at = time.monotonic()
            unreadable = f", {skipped} unreadable" if skipped else ""
            self.say(f"{self._label}: {self._done} of {self._total} images{unreadable}")

    def close(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None
