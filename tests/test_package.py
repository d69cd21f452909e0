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


@pytest.mark.parametrize("imports", ["import fastkd, timm", "import timm, fastkd"])
def test_importing_it_registers_the_students_in_timm_in_any_order(imports):
    code = f"{imports}; print(timm.list_models('deit_tiny_*lift*'), timm.is_model('fastkd') )"
    assert "deit_tiny_lift_patch16_224" in run_python(code)


def test_importing_it_and_its_command_line_loads_neither_torch_nor_timm():
    code = "import sys, fastkd, fastkd.cli; print('torch' in sys.modules, 'timm' in sys.modules)"
    assert run_python(code).split() == ["False", "False"]


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
