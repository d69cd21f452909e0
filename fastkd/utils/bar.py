"""The one progress bar of this package. Knows nothing of what is counted."""

from __future__ import annotations

from tqdm import tqdm


class Bar(tqdm):  # type: ignore[type-arg] # generic to type checkers alone
    """tqdm without its monitor thread, of which many short runs would see one come and stay."""

    monitor_interval = 0
