"""Hints for unknown names: what they may mean, and names of other trainers."""

from __future__ import annotations

import difflib
import functools
from collections.abc import Iterable
from pathlib import Path

import yaml

FOREIGN_NAMES = Path(__file__).with_name("foreign_names.yaml")


def suggestion(word: str, known: Iterable[str]) -> str:
    """``(did you mean ...?)``, or what the word is called here, after a space; may be empty.

    Dashes and underscores are the same; flags are flags (``--lr``) in ``known`` too.
    """
    names = {_plain(name): name for name in known}
    given = _plain(word)
    if given not in names:
        foreign = foreign_names()
        words = foreign["names"].items()
        here = [name for name, others in words if given in others.split() and name in names]
        if here:
            note = foreign["notes"].get(here[0])
            return f" (here it is {_quoted(names[here[0]])}{f'; {note}' if note else ''})"
        if given in foreign["absent"] and "model" in names:
            return f" ({foreign['absent'][given]})"
    if (positive := names.get(given.removeprefix("no_"))) and given.startswith("no_"):
        return f" (it is switched off by a value: {_quoted(positive)} false, none or 0)"
    close = [given] if given in names else difflib.get_close_matches(given, names, n=1)
    return f" (did you mean {_quoted(names[close[0]])}?)" if close else ""


@functools.cache
def foreign_names() -> dict[str, dict[str, str]]:
    """Read the tables "names", "notes" and "absent" of `FOREIGN_NAMES`."""
    tables: dict[str, dict[str, str]] = yaml.safe_load(FOREIGN_NAMES.read_text(encoding="utf-8"))
    return tables


def _plain(name: str) -> str:
    return name.lstrip("-").replace("-", "_").lower()


def _quoted(name: str) -> str:
    return name if name.startswith("-") else repr(name)
