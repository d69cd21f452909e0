"""The package as a whole: what importing it does, and what it makes public."""

from __future__ import annotations

import subprocess
import sys

import pytest

import fastkd


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
