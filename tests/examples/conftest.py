"""What the examples need and fastkd does not."""

from __future__ import annotations

import importlib
from typing import Any

import pytest

from tests.conftest import skip_or_fail


def _required(*packages: str) -> Any:
    """The first of them, where all are there."""
    try:
        found = [importlib.import_module(package) for package in packages]
    except ImportError as error:
        skip_or_fail("examples", f"pip install {' '.join(packages)} ({error})")
    return found[0]


@pytest.fixture
def lightning() -> Any:
    """The package, for the Lightning example."""
    return _required("lightning")


@pytest.fixture
def transformers(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The package, for the example with its `Trainer`; it downloads nothing."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return _required("transformers", "accelerate")
