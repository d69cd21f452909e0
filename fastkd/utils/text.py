"""Names as text that can be written. Knows nothing of what is named."""

from __future__ import annotations

import os


def writable(name: str | os.PathLike[str]) -> str:
    r"""A name as it can be printed and encoded, whatever bytes a file system has for it.

    Args:
        name: of a file, or made of one.

    Returns:
        The name; bytes of it that are no UTF-8 as ``\xff``.
    """
    return os.fsencode(name).decode("utf-8", "backslashreplace")
