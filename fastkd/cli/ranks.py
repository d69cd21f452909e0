"""What the processes of torchrun print: one of them speaks for all."""

from __future__ import annotations

import os


def print_once(text: str) -> None:
    """Print on the main process alone.

    Args:
        text: a line or several.
    """
    if os.environ.get("RANK", "0") == "0":
        print(text)
