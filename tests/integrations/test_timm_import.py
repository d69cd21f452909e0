"""A timm that is too old for the integration says so, and takes nothing else of fastkd with it."""

import importlib
import subprocess
import sys

import pytest


def test_a_timm_without_training_tasks_is_refused_with_the_version_needed(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm.task", None)
    monkeypatch.delitem(sys.modules, "fastkd.integrations.timm", raising=False)
    with pytest.raises(ImportError, match=r"timm >= 1\.0\.31, found timm \d"):
        importlib.import_module("fastkd.integrations.timm")


def test_importing_fastkd_does_not_import_its_integrations():
    listed = "[name for name in sys.modules if name.startswith('fastkd.integr')]"
    script = f"import fastkd, fastkd.training, sys; print({listed})"
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert found.stdout.strip() == "[]", found.stderr
