"""The package as a whole: what importing it does, and what it makes public."""

from __future__ import annotations

import ast
import inspect
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import fastkd
from fastkd.losses import LiftKD
from fastkd.models import Lift
from fastkd.ops.lift_kd import LIFT_EPS

ROOT = Path(__file__).parents[1]


def run_python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    ("imports", "expected"),
    [
        ("import fastkd.models, timm", True),
        ("import timm, fastkd", True),
        ("import fastkd, timm", False),
    ],
)
def test_the_students_are_registered_by_fastkd_models_or_where_timm_is_there(imports, expected):
    code = f"{imports}; print(timm.is_model('deit_tiny_lift_patch16_224'))"
    assert run_python(code).strip() == str(expected)


@pytest.mark.parametrize("imports", ["fastkd", "fastkd, fastkd.cli"])
def test_importing_it_loads_none_of_the_large_packages_and_hooks_into_no_import(imports):
    code = f"""
import sys
finders = list(sys.meta_path)
import {imports}
print([name for name in ("pydantic", "torch", "timm") if name in sys.modules])
print(sys.meta_path == finders)
"""
    assert run_python(code).split() == ["[]", "True"]


def test_the_operators_do_not_load_timm():
    assert run_python("import sys, fastkd.ops; print('timm' in sys.modules)").strip() == "False"


def test_every_public_name_is_there_and_documented():
    for name in fastkd.__all__:
        assert getattr(fastkd, name).__doc__, name
    assert set(fastkd.__all__) <= set(dir(fastkd))


def test_no_submodule_takes_the_place_of_a_public_function():
    code = """
import importlib, pkgutil, fastkd
for package in ("training", "analysis", "losses", "models"):
    folder = importlib.import_module(f"fastkd.{package}")
    for found in pkgutil.iter_modules(folder.__path__):
        importlib.import_module(f"fastkd.{package}.{found.name}")
functions = [name for name in fastkd.__all__ if name not in fastkd._PACKAGES]
print([name for name in functions if not callable(getattr(fastkd, name))])
"""
    assert run_python(code).strip() == "[]"


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'distil'"):
        fastkd.distil  # noqa: B018


# Every epsilon that has a value in the code, and where it stands.
EPSILONS = {
    ("fastkd/config.py", "adam_eps"): 1e-8,
    ("fastkd/losses/logit.py", "eps"): 1e-8,  # of DIST's correlations
    ("fastkd/losses/vkd.py", "WHITENING_EPS"): 1e-6,
    ("fastkd/ops/feature_kd/__init__.py", "eps"): 1e-8,  # of "cosine"
    ("fastkd/ops/feature_kd/reference.py", "eps"): 1e-8,
    ("fastkd/ops/lift_kd/reference.py", "LIFT_EPS"): 1e-5,
    ("fastkd/ops/lift_kd/reference.py", "COSINE_EPS"): 1e-8,
}
# Where the LayerNorm of Lift is computed or built.
LIFT_FILES = (
    *("fastkd/ops/lift_kd/*.py", "fastkd/losses/feature.py", "fastkd/losses/projectors.py"),
    *("fastkd/models/architectures.py", "fastkd/integrations/*.py"),
)


def number(node: ast.AST | None) -> float | None:
    """The positive number that stands in the code, maybe as a field's default."""
    if isinstance(node, ast.Call):
        node = next((k.value for k in node.keywords if k.arg == "default"), None)
    value = node.value if isinstance(node, ast.Constant) else None
    return value if isinstance(value, int | float) and value > 0 else None


def named_numbers(tree: ast.AST) -> Iterator[tuple[str, float]]:
    """Names that are assigned a number, have it by default, or are given it in a call."""
    for node in ast.walk(tree):
        pairs: list[tuple[str, ast.AST | None]] = []
        if isinstance(node, ast.arguments):
            positional = [*node.posonlyargs, *node.args]
            defaults = [None] * (len(positional) - len(node.defaults)) + node.defaults
            pairs = [(a.arg, d) for a, d in zip(positional, defaults, strict=True)]
            pairs += [(a.arg, d) for a, d in zip(node.kwonlyargs, node.kw_defaults, strict=True)]
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            pairs = [(ast.unparse(target), node.value) for target in targets]
        elif isinstance(node, ast.keyword):
            pairs = [(node.arg or "", node.value)]
        yield from ((name, n) for name, value in pairs if (n := number(value)) is not None)


def test_every_epsilon_has_one_home():
    found = {
        (path.relative_to(ROOT).as_posix(), name): value
        for room in ("fastkd", "bench", "examples")
        for path in (ROOT / room).rglob("*.py")
        for name, value in named_numbers(ast.parse(path.read_text(encoding="utf-8")))
        if re.search(r"(?i)(\b|_)eps(ilon)?\b", name)
    }
    assert found == EPSILONS


def test_lift_takes_its_epsilon_from_there():
    assert inspect.signature(fastkd.lift_kd).parameters["lift_eps"].default == LIFT_EPS
    assert inspect.signature(fastkd.lift).parameters["lift_eps"].default == LIFT_EPS
    assert Lift(4, 6).norm.eps == LiftKD(4, 6).projector.norm.eps == LIFT_EPS
    assert LiftKD(4, 6, lift_eps=1e-3).projector.operands()["lift_eps"] == 1e-3
    with torch.device("meta"):
        student = fastkd.create_student("test_vit", "lift", width=96)
    assert student.lift.norm.eps == LIFT_EPS


@pytest.mark.parametrize("pattern", LIFT_FILES)
def test_no_small_number_stands_inside_what_computes_lift(pattern):
    """Constants with names stand at the top of a module, where the test above finds them."""
    paths = list(ROOT.glob(pattern))
    assert paths
    for path in paths:
        inside = [
            node.value
            for statement in ast.parse(path.read_text(encoding="utf-8")).body
            if not isinstance(statement, ast.Assign | ast.AnnAssign)
            for node in ast.walk(statement)
            if isinstance(node, ast.Constant) and isinstance(node.value, float)
        ]
        assert [value for value in inside if 0 < value <= 1e-4] == [], path
