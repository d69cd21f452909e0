"""What a person sees of long work on files. Knows counts only."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable
from typing import TypeVar

from fastkd.utils.bar import Bar

LINE_EVERY_SECONDS = 10.0
SLOW = 3.0  # seconds after which listing and verifying are shown
_Item = TypeVar("_Item")


def shown(items: list[_Item], what: str, unit: str, quiet: bool) -> Iterable[_Item]:
    """The items, with a bar on a terminal where they take long.

    Args:
        items: gone through.
        what: is done with them.
        unit: what one of them is called.
        quiet: show nothing.
    """
    disable = True if quiet else None  # None: where there is no terminal
    return Bar(items, desc=what, unit=unit, leave=False, delay=SLOW, disable=disable)


class Progress:
    """A bar on a terminal, a line now and then elsewhere.

    Args:
        total: images.
        done: images that an earlier run converted.
        quiet: show nothing.
    """

    def __init__(self, total: int, done: int, quiet: bool) -> None:
        self.total = total
        self.done = done
        self.unreadable = 0
        self.shows = not quiet
        self._bar: Bar | None = None
        self._line_at = time.monotonic()

    def __enter__(self) -> Progress:
        if self.shows and self.done:
            print(f"goes on behind {self.done:,} images", file=sys.stderr)
        if self.shows and sys.stderr.isatty():
            self._bar = Bar(
                total=self.total, initial=self.done, desc="shard", unit="image", leave=False,
                dynamic_ncols=True,
            )  # fmt: skip
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()
        if self.shows and error is not None:
            print(f"stopped at image {self.done:,}; the same command goes on", file=sys.stderr)

    def advance(self, unreadable: bool) -> None:
        """Count an image.

        Args:
            unreadable: whether it could not be read.
        """
        self.done += 1
        self.unreadable += unreadable
        if self._bar is not None:
            self._bar.update()
            if unreadable:
                self._bar.set_postfix_str(f"{self.unreadable} unreadable")
        elif self.shows and time.monotonic() - self._line_at >= LINE_EVERY_SECONDS:
            self._line_at = time.monotonic()
            lost = f", {self.unreadable} unreadable" if self.unreadable else ""
            print(f"shard: {self.done:,} of {self.total:,} images{lost}", file=sys.stderr)
