#!/usr/bin/env python3
"""Print the measures of the package's structure; exit with 1 where one is over its limit.

Imports are followed wherever they stand, inside functions and under TYPE_CHECKING too.
"""

from __future__ import annotations

import ast
import io
import re
import sys
import tokenize
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FILES, LINES = 125, 27_900
ROOM, OPS = 20, 25  # percent of the lines
DOCSTRINGS, COMMENTS = 18, 3  # percent of the lines: at most, at least
FILE, FUNCTION = 500, 80  # lines
# What may be longer: kernels read from top to bottom, and figures.
LONG = ("ops/lift_kd/kernels.py", "ops/lift_kd/triton.py", "ops/feature_kd/triton.py", "plots.py")
# What must not reach which package, in however many steps.
APART = {"inference": "training", "exporting": "training", "analysis": "training"}
# What stands in one module only: the definition, or the call that everybody else leaves to it.
HOMES = {
    "defining open_model": r"^def open_model\(",
    "calling Image.open": r"\bImage\.open\(",
    "defining match_classes": r"^def match_classes\(",
    "importing tqdm": r"^\s*(from tqdm\b|import tqdm\b)",
}


def main() -> int:
    """Print every measure with its limit."""
    texts = {path: path.read_text(encoding="utf-8") for path in (ROOT / "fastkd").rglob("*.py")}
    modules = {name_of(path): path for path in texts}
    imports = {name: imported(name, texts[path], modules) for name, path in modules.items()}
    reached = {name: reach(name, imports) for name in modules}
    lines = {path: text.count("\n") for path, text in texts.items()}
    total = sum(lines.values())
    rooms = Counter[str]()
    for path, count in lines.items():
        parts = path.relative_to(ROOT).parts
        rooms[parts[1] if len(parts) > 2 else "(top)"] += count
    faults = []

    def measure(what: str, value: float, limit: float, shown: str = "") -> None:
        over = value > limit
        faults.extend([what] if over else [])
        print(
            f"{what:<34} {shown or f'{value:,}':>8}   at most {limit:,}{'  OVER' if over else ''}"
        )

    measure("files", len(texts), FILES)
    measure("lines", total, LINES)
    for room, count in rooms.most_common():
        share = 100 * count / total
        measure(f"lines of {room}, %", share, OPS if room == "ops" else ROOM, f"{share:.1f}")
    circles = sorted(name for name in modules if name in reached[name])
    measure("modules in import circles", len(circles), 0)
    print("".join(f"    {name}\n" for name in circles), end="")
    for room, other in APART.items():
        crossing = [
            f"{name} -> {target}"
            for name in modules
            for target in reached[name]
            if in_room(name, room) and in_room(target, other)
        ]
        measure(f"{room} reaching {other}", len(crossing), 0)
        print("".join(f"    {line}\n" for line in crossing), end="")
    for what, pattern in HOMES.items():
        found = [name_of(p) for p, text in texts.items() if re.search(pattern, text, re.MULTILINE)]
        measure(f"modules {what}", len(found), 1)
        print("".join(f"    {name}\n" for name in sorted(found)), end="")
    share = docstring_share(texts, total)
    measure("docstrings, % of the lines", share, DOCSTRINGS, f"{share:.1f}")
    share = 100 * sum(map(comments, texts.values())) / total
    print(f"{'comments, % of the lines':<34} {share:>8.1f}   at least {COMMENTS}")
    faults.extend(["comments"] if share < COMMENTS else [])
    short = {path: text for path, text in texts.items() if not str(path).endswith(LONG)}
    longest = max(short, key=lambda path: lines[path])
    measure("lines of the longest file", lines[longest], FILE)
    print(f"    {longest.relative_to(ROOT)}")
    functions = max(
        (node.end_lineno - node.lineno + 1, f"{path.relative_to(ROOT)}: {node.name}")
        for path, text in short.items()
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.FunctionDef) and node.end_lineno
    )
    measure("lines of the longest function", functions[0], FUNCTION)
    print(f"    {functions[1]}")
    persons = [path for path, text in texts.items() if text.startswith('"""Knows')]
    measure("modules that begin with Knows", len(persons), 0)
    return 1 if faults else 0


def name_of(path: Path) -> str:
    """The module in a file."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts).removesuffix(".__init__")


def in_room(name: str, room: str) -> bool:
    """Whether a module lies in a package of fastkd."""
    return f"{name}.".startswith(f"fastkd.{room}.")


def imported(me: str, text: str, modules: dict[str, Path]) -> set[str]:
    """The modules of the package that a module imports, at its top or in a function."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                found.add(full if full in modules else node.module)
    # A package that names its own modules is their table of contents.
    return {name for name in found & set(modules) if not name.startswith(f"{me}.")}


def reach(start: str, imports: dict[str, set[str]]) -> set[str]:
    """All modules that a module leads to; itself where it is in a circle."""
    seen: set[str] = set()
    todo = [start]
    while todo:
        for name in imports[todo.pop()] - seen:
            seen.add(name)
            todo.append(name)
    return seen


def docstring_share(texts: dict[Path, str], total: int) -> float:
    """Percent of the lines that are docstrings."""
    lines = 0
    for text in texts.values():
        for node in ast.walk(ast.parse(text)):
            kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
            if isinstance(node, kinds) and ast.get_docstring(node):
                first = node.body[0]
                lines += (first.end_lineno or first.lineno) - first.lineno + 1
    return 100 * lines / total


def comments(text: str) -> int:
    """Count the comments of a file."""
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    return sum(token.type == tokenize.COMMENT for token in tokens)


if __name__ == "__main__":
    sys.exit(main())
