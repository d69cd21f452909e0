#!/usr/bin/env python3
"""Write the tables of README.md and docs/ that come from the code, between their markers.

python .ci/tables.py           # write
python .ci/tables.py --check   # exit with 1 if a table is not up to date
"""

from __future__ import annotations

import importlib
import inspect
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from fastkd.config import Recipe
from fastkd.losses import registry

ROOT = Path(__file__).resolve().parent.parent
TABLE = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end of table -->)", re.DOTALL)
PUBLIC = ("ops", "tokens", "losses", "models", "analysis", "training", "integrations.timm")


def main(arguments: Sequence[str] = ()) -> int:
    """Write or check every table; returns the exit status."""
    stale = []
    for page in [ROOT / "README.md", *sorted(ROOT.glob("docs/**/*.md"))]:
        text = page.read_text(encoding="utf-8")
        fresh = with_tables(text)
        if fresh != text:
            stale.append(page.relative_to(ROOT))
            if "--check" not in arguments:
                page.write_text(fresh, encoding="utf-8")
    if stale and "--check" in arguments:
        print("not up to date, run python .ci/tables.py:", *stale)
        return 1
    return 0


def with_tables(text: str) -> str:
    """Fill every marked table of a page."""
    return TABLE.sub(lambda found: f"{found[1]}\n{TABLES[found[2]]()}\n\n{found[3]}", text)


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]], align: str = "") -> str:
    """Format rows as a Markdown table; ``align`` has l, c or r for each column."""
    marks = {"l": ":--", "c": ":-:", "r": "--:"}
    rule = [marks[letter] for letter in align or "l" * len(header)]
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, rule, *rows))


def losses() -> str:
    """List the losses by their names in recipes."""
    groups = ("logits", registry.LOGIT_LOSSES), ("features", registry.FEATURE_LOSSES)
    rows = [
        [kind, f"`{loss.name}`", f"`{loss.class_name}`", loss.summary, loss.source]
        for kind, group in groups
        for loss in group
    ]
    return markdown(("of", "in recipes", "module", "what it compares", "source"), rows)


def projectors() -> str:
    """List the projectors by their names in recipes."""
    rows = [
        [f"`{p.name}`", p.summary, "yes" if p.learned else "no", "stays" if p.stays else "dropped"]
        for p in registry.PROJECTORS
    ]
    return markdown(("`projector`", "what it does", "learned", "at inference"), rows)


def recipes() -> str:
    """List the recipes with the published accuracy that each aims at."""
    rows = []
    for name in Recipe.names():
        text = Recipe.path(name).read_text(encoding="utf-8")
        aim = re.search(r"# Aims at: (\d[\d.]*) %", text)
        title = text.splitlines()[0].lstrip("# ").rstrip(".")
        rows.append([f"`{name}`", title, aim[1] if aim else "-"])
    return markdown(("recipe", "run", "published top-1, %"), rows, "llr")


def api() -> str:
    """List the public names of every module."""
    rows = []
    for module in ("fastkd", *(f"fastkd.{name}" for name in PUBLIC)):
        found = importlib.import_module(module)
        names = [n for n in found.__all__ if not inspect.ismodule(getattr(found, n))]
        names.sort(key=lambda name: (name[0].isupper(), name.lower()))
        rows.append([f"`{module}`", ", ".join(f"`{name}`" for name in names)])
    return markdown(("module", "names"), rows)


# Which backends a function runs on; those that are not named here are plain PyTorch.
BACKENDS = {
    "feature_kd": "feature_kd:BACKENDS",
    "lift_kd": "lift_kd:BACKENDS",
    "lift": "lift_kd:BACKENDS",
    "second_moment": "second_moment:BACKENDS",
    "sep": "second_moment:BACKENDS",
    "spectrum": "spectrum:SOLVERS",
    "singular_values": "spectrum:SOLVERS",
    "spectral_ranks": "spectrum:SOLVERS",
}


def operators() -> str:
    """List the functions of fastkd.ops that have fused backends."""
    rows = []
    for name, home in BACKENDS.items():
        module, _, attribute = home.partition(":")
        backends = getattr(importlib.import_module(f"fastkd.ops.{module}"), attribute)
        cells = []
        for backend in ("torch", "triton", "cuda"):
            found = backends.implementations.get(backend)
            cells.append("" if found is None else "yes" if found.proven else "on request")
        rows.append([f"`{name}`", summary(name), *cells])
    return markdown(
        ("operator", "what it computes", "PyTorch", "Triton", "CUDA C++"), rows, "llccc"
    )


def measures() -> str:
    """List the other functions of fastkd.ops."""
    names = set(importlib.import_module("fastkd.ops").__all__) - {"backends", *BACKENDS}
    return markdown(
        ("function", "what it computes"), [[f"`{n}`", summary(n)] for n in sorted(names)]
    )


def summary(name: str) -> str:
    """Get the first line of an operator's docstring."""
    function = getattr(importlib.import_module("fastkd.ops"), name)
    first = (inspect.getdoc(function) or "").splitlines()[0].rstrip(".")
    return first.replace("|", r"\|").replace("``", "`")


def variables() -> str:
    """List the environment variables."""
    from fastkd.ops.environment import VARIABLES

    rows = [
        [f"`{name}`", kind, text]
        for kind, group in VARIABLES.items()
        for name, text in group.items()
    ]
    return markdown(("variable", "for", "effect"), rows)


TABLES: dict[str, Callable[[], str]] = {
    "losses": losses,
    "projectors": projectors,
    "recipes": recipes,
    "api": api,
    "operators": operators,
    "measures": measures,
    "variables": variables,
}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
