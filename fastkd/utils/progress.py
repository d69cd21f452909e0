"""What a person sees while images are gone through: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from typing import TextIO

from fastkd.utils.bar import Bar

LINE_EVERY_SECONDS = 10.0
BAR_AFTER = 2.0  # seconds: what is done sooner needs no bar


class ImageProgress:
    """Counts images.

    Args:
        label: what is done with them.
        total: images of this process.
        shows: False shows nothing: quiet runs, and processes other than the main one.
        stream: where it goes; standard error by default.
    """

    def __init__(
        self, label: str, total: int, shows: bool = True, stream: TextIO | None = None
    ) -> None:
        self.label = label
        self.total = total
        self.shows = shows
        self.stream = stream or sys.stderr
        self._done = self._passed_over = 0
        self._line_at = time.monotonic()
        self._bar: Bar | None = None

    def __enter__(self) -> ImageProgress:
        if self.shows and self.stream.isatty():
            self._bar = Bar(
                total=self.total, desc=self.label, unit="image", file=self.stream, delay=BAR_AFTER,
                leave=False, dynamic_ncols=True,
            )  # fmt: skip
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def advance(self, images: int, passed_over: int = 0) -> None:
        """Count images.

        Args:
            images: how many more.
            passed_over: how many of them to no effect.
        """
        self._done += images
        self._passed_over += passed_over
        lost = f"{self._passed_over:,} passed over" if self._passed_over else ""
        if self._bar is not None:
            self._bar.set_postfix_str(lost, refresh=False)
            self._bar.update(images)
        elif self.shows and time.monotonic() - self._line_at >= LINE_EVERY_SECONDS:
            self._line_at = time.monotonic()
            line = f"{self.label}: {self._done:,} of {self.total:,} images"
            print(f"{line}, {lost}" if lost else line, file=self.stream, flush=True)
