#!/usr/bin/env python3
"""Break one thing in each of some modules, drawn by seed, and tell which faults the tests find.

A copy of the project is broken, never the project itself. A module's own tests run first, then its
room's, then all: only what survives costs a whole run. Exits with 1 where too many survive.
"""

from __future__ import annotations

import argparse
import ast
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
COPIED = ("fastkd", "docs", "tests", "examples", "bench", "csrc", ".ci")
FILES = ("pyproject.toml", "README.md", "CHANGELOG.md", "CONTRIBUTING.md", "setup.py", "LICENSE")
NEEDS_GPU = "cuda.py"  # modules that call kernels which run on a GPU alone
SWAPS: dict[type[ast.AST], tuple[str, str]] = {
    ast.Add: ("+", "-"),
    ast.Sub: ("-", "+"),
    ast.Mult: ("*", "/"),
    ast.Div: ("/", "*"),
    ast.FloorDiv: ("//", "*"),
    ast.Mod: ("%", "//"),
    ast.Pow: ("**", "*"),
    ast.And: ("and", "or"),
    ast.Or: ("or", "and"),
    ast.Lt: ("<", "<="),
    ast.LtE: ("<=", "<"),
    ast.Gt: (">", ">="),
    ast.GtE: (">=", ">"),
    ast.Eq: ("==", "!="),
    ast.NotEq: ("!=", "=="),
    ast.Is: ("is", "is not"),
    ast.IsNot: ("is not", "is"),
    ast.In: ("in", "not in"),
    ast.NotIn: ("not in", "in"),
}
KINDS = ("operator", "constant", "comparison", "call")
SECONDS = {"own": 600, "room": 1200, "all": 2400}  # a fault that makes a loop endless is found


class Fault(NamedTuple):
    """A change of one module's text, by its bytes."""

    kind: str
    line: int
    start: int
    end: int
    old: str
    new: str


class Finder(ast.NodeVisitor):
    """Collect the faults that can be made in a module."""

    def __init__(self, source: bytes) -> None:
        self.source = source
        self.lines = [0]
        for line in source.splitlines(keepends=True):
            self.lines.append(self.lines[-1] + len(line))
        self.found: list[Fault] = []
        self.visit(ast.parse(source))

    def visit(self, node: ast.AST) -> None:
        """Leave out what no test can tell: annotations, and the words of errors."""
        if isinstance(node, ast.Raise | ast.JoinedStr | ast.Import | ast.ImportFrom):
            return
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            return
        super().visit(node)

    def generic_visit(self, node: ast.AST) -> None:
        """Visit everything but annotations."""
        for name, value in ast.iter_fields(node):
            if name in ("annotation", "returns"):
                continue
            for child in value if isinstance(value, list) else [value]:
                if isinstance(child, ast.AST):
                    self.visit(child)

    def visit_BinOp(self, node: ast.BinOp) -> None:
        """Swap an arithmetic operator."""
        self._swap("operator", node.op, node.left, node.right)
        self.generic_visit(node)

    def visit_BoolOp(self, node: ast.BoolOp) -> None:
        """Swap ``and`` and ``or``."""
        if len(node.values) == 2:  # of three, one swap would need parentheses
            self._swap("operator", node.op, *node.values)
        self.generic_visit(node)

    def visit_Compare(self, node: ast.Compare) -> None:
        """Move or turn round a comparison."""
        sides = [node.left, *node.comparators]
        for i, op in enumerate(node.ops):
            self._swap("comparison", op, sides[i], sides[i + 1])
        self.generic_visit(node)

    def visit_UnaryOp(self, node: ast.UnaryOp) -> None:
        """Drop a ``not``."""
        if isinstance(node.op, ast.Not):
            start = self._at(node.lineno, node.col_offset)
            self._add("operator", node.lineno, start, start + 3, "")
        self.generic_visit(node)

    def visit_Constant(self, node: ast.Constant) -> None:
        """Turn a truth value round, add one to a whole number, double another one."""
        value = node.value
        if isinstance(value, bool):
            new = str(not value)
        elif isinstance(value, int):
            new = str(value + 1)
        elif isinstance(value, float):
            new = str(2 * value if value else 1.0)
        else:
            return
        self._add("constant", node.lineno, *self._span(node), new)

    def visit_Expr(self, node: ast.Expr) -> None:
        """Drop a call whose result nobody takes."""
        if isinstance(node.value, ast.Call):
            self._add("call", node.lineno, *self._span(node), "pass")
        self.generic_visit(node)

    def _at(self, line: int, column: int) -> int:
        return self.lines[line - 1] + column

    def _span(self, node: ast.expr | ast.stmt) -> tuple[int, int]:
        end = self._at(node.end_lineno or node.lineno, node.end_col_offset or 0)
        return self._at(node.lineno, node.col_offset), end

    def _swap(self, kind: str, op: ast.AST, left: ast.expr, right: ast.expr) -> None:
        if type(op) not in SWAPS:
            return
        old, new = SWAPS[type(op)]
        begin, end = self._span(left)[1], self._span(right)[0]
        at = self.source.find(old.encode(), begin, end)
        if at >= 0:  # split over lines it may be spelled otherwise
            self._add(kind, left.lineno, at, at + len(old), new)

    def _add(self, kind: str, line: int, start: int, end: int, new: str) -> None:
        old = self.source[start:end].decode()
        self.found.append(Fault(kind, line, start, end, old, new))


def faults(source: bytes) -> list[Fault]:
    """List the faults that can be made in a module's text."""
    return Finder(source).found


def draw(seed: int, count: int) -> Iterator[tuple[Path, Fault]]:
    """Draw modules, and of each a kind of fault and then one of that kind.

    What is drawn in a module depends on the seed and that module alone.
    """

    def dice(path: Path, what: str) -> random.Random:
        return random.Random(f"{seed} {what} {path.as_posix()}")

    modules = [path.relative_to(ROOT) for path in (ROOT / "fastkd").rglob("*.py")]
    modules = [path for path in modules if path.name != NEEDS_GPU]
    drawn = 0
    for path in sorted(modules, key=lambda path: dice(path, "order").random()):
        found = faults((ROOT / path).read_bytes())
        if not found or drawn == count:
            continue
        chance = dice(path, "fault")
        kind = chance.choice([kind for kind in KINDS if any(f.kind == kind for f in found)])
        drawn += 1
        yield path, chance.choice([fault for fault in found if fault.kind == kind])


def stages(copy: Path, module: Path) -> dict[str, list[str]]:
    """What runs for a module: its own tests, its room's, all."""
    parts = module.with_suffix("").parts[1:]
    parts = parts[:-1] if parts[-1] == "__init__" else parts
    own: list[Path] = []
    for depth in range(len(parts), 0, -1):  # a package's tests stand for its modules'
        place, name = copy.joinpath("tests", *parts[: depth - 1]), parts[depth - 1]
        own = sorted(place.glob(f"test_{name.lstrip('_')}*.py")) if place.is_dir() else []
        if own:
            break
    room = copy / "tests" / parts[0] if len(parts) > 1 else None
    top = sorted((copy / "tests").glob("test_*.py"))  # of the package itself
    found = {"own": own, "room": [room] if room and room.is_dir() else top, "all": [copy]}
    return {stage: [str(path) for path in paths] for stage, paths in found.items() if paths}


def passes(copy: Path, paths: list[str], seconds: float) -> bool:
    """Whether the tests pass; they do not when they take too long."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *paths]
    environment = {**os.environ, "PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1"}
    with (copy / "pytest.log").open("wb") as log:
        process = subprocess.Popen(
            command, cwd=copy, env=environment, stdout=log, stderr=log, start_new_session=True
        )
        try:
            return process.wait(seconds) == 0
        except subprocess.TimeoutExpired:
            return False
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def main() -> int:
    """Break, test, report."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=25, help="modules to break (default: 25)")
    parser.add_argument("--first", type=int, default=0, help="go on from this one (default: 0)")
    parser.add_argument("--survivors", type=int, default=1, help="how many may (default: 1)")
    parser.add_argument("--until", choices=SECONDS, default="all", help="the last tests to run")
    parser.add_argument("--list", action="store_true", help="print the faults and break nothing")
    options = parser.parse_args()
    survived = 0
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "project"
        for name in COPIED if not options.list else ():
            ignored = shutil.ignore_patterns("__pycache__", "build")
            shutil.copytree(ROOT / name, copy / name, ignore=ignored)
        for name in FILES if not options.list else ():
            shutil.copy(ROOT / name, copy / name)
        for module, fault in islice(draw(options.seed, options.count), options.first, None):
            what = f"{module}:{fault.line}  {fault.old.splitlines()[0]!r} -> {fault.new!r}"
            if options.list:
                print(f"{fault.kind:10s} {what}")
                continue
            source = (ROOT / module).read_bytes()
            broken = source[: fault.start] + fault.new.encode() + source[fault.end :]
            (copy / module).write_bytes(broken)
            begin, found = time.monotonic(), None
            allowed = list(SECONDS)[: list(SECONDS).index(options.until) + 1]
            for stage, paths in stages(copy, module).items():
                if stage in allowed and not passes(copy, paths, SECONDS[stage]):
                    found = stage
                    break
            (copy / module).write_bytes(source)
            survived += found is None
            verdict = f"found by {found}" if found else "SURVIVED"
            print(f"{verdict:14s} {time.monotonic() - begin:5.0f} s  {fault.kind:10s} {what}")
            sys.stdout.flush()
    if not options.list:
        tried = options.count - options.first
        print(f"{tried - survived} of {tried} found")
    return int(survived > options.survivors)


if __name__ == "__main__":
    raise SystemExit(main())
