"""Progress of long work: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from typing import Any, TextIO, TypeVar

from tqdm import tqdm

from fastkd.utils.io import printable

LINE_EVERY_SECONDS = 10.0
SLOW_SECONDS = 3.0  # `track` shows nothing of what is done sooner

_Item = TypeVar("_Item")


class _Bar(tqdm):  # type: ignore[type-arg] # generic to type checkers alone
    monitor_interval = 0  # no monitor thread: tqdm starts one that outlives the bar


class Progress:
    """Counts items of long work, and shows how many are done and how long the rest takes."""

    def __init__(
        self,
        label: str = "",
        total: int = 0,  # of this process; 0 shows no bar until `start` is called with more
        *,
        initial: int = 0,  # done in an earlier run; left out of the estimate
        unit: str = "image",
        lines: bool = True,  # print a line every 10 seconds where there is no terminal
        delay: float = 0.0,  # seconds before the bar appears
        leave: bool = False,  # keep the finished bar on the terminal
        shows: bool = True,  # False in quiet runs and on processes other than the main one
        stream: TextIO | None = None,  # standard error by default
    ) -> None:
        self.unit, self.lines, self.delay = unit, lines, delay
        self.leave, self.shows = leave, shows
        self.stream = stream or sys.stderr
        self._bar: _Bar | None = None
        self.start(label, total, initial)

    @property
    def has_bar(self) -> bool:
        """Whether a bar is on the terminal."""
        return self._bar is not None

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def start(self, label: str, total: int, initial: int = 0, lost: int = 0) -> None:
        """Start counting again, with ``initial`` items done before, ``lost`` of which failed."""
        self.close()
        self.label, self.total, self.done, self.lost_items = label, total, initial, lost
        self._initial = initial
        self._begun = self._line_at = time.monotonic()
        if total and self.shows and self.stream.isatty():
            shown: dict[str, Any] = {"total": total, "initial": initial, "unit": self.unit}
            shown |= {"delay": self.delay, "leave": self.leave, "dynamic_ncols": True}
            self._bar = _Bar(desc=printable(label) or None, file=self.stream, **shown)

    @property
    def seconds_left(self) -> float | None:
        """Estimate from the items done since the start; None before the first."""
        if not (fresh := self.done - self._initial):
            return None
        return (time.monotonic() - self._begun) / fresh * max(0, self.total - self.done)

    def advance(self, items: int = 1, lost: int = 0) -> None:
        """Count items, ``lost`` of which failed."""
        self.done += items
        self.lost_items += lost
        if self._bar is not None:
            if lost:
                self._bar.set_postfix_str(f"{self.lost_items:,} unreadable", refresh=False)
            self._bar.update(items)
        elif self.lines and time.monotonic() - self._line_at >= LINE_EVERY_SECONDS:
            self._line_at = time.monotonic()
            self.write(self._line())

    def note(self, text: str, *, label: str | None = None) -> None:
        """Show a text behind the bar and change the label; nothing without a terminal."""
        if self._bar is not None:
            if label is not None:
                self._bar.set_description_str(printable(label))
            self._bar.set_postfix_str(printable(text))

    def write(self, line: str) -> None:
        """Print a line above the bar."""
        line = printable(line, lines=True)
        if self._bar is not None:
            self._bar.write(line, file=self.stream)
        elif self.shows:
            print(line, file=self.stream, flush=True)

    def close(self) -> None:
        """Close the bar."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _line(self) -> str:
        line = f"{self.label}: {self.done:,} of {self.total:,} {self.unit}s"
        if self.lost_items:
            line += f", {self.lost_items:,} unreadable"
        if self.seconds_left:
            line += f", about {tqdm.format_interval(self.seconds_left)} left"
        return line


def track(items: list[_Item], label: str, unit: str, shows: bool = True) -> Iterator[_Item]:
    """Yield the items, with a bar on a terminal if they take long."""
    progress = Progress(label, len(items), unit=unit, lines=False, delay=SLOW_SECONDS, shows=shows)
    with progress:
        for item in items:
            yield item
            progress.advance()
