"""Puts fastkd's students into timm's registry without importing timm, which takes seconds.

`timm.create_model("deit_tiny_lift_patch16_224")` works after ``import fastkd``, in whichever order
the two are imported, and who only uses the operators never waits for timm.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType


class _AfterTimm(MetaPathFinder):
    """Lets timm be found as always, and registers the students when it has been executed."""

    searching = False

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != "timm" or self.searching:
            return None
        self.searching = True
        try:
            spec = importlib.util.find_spec(name)
        finally:
            self.searching = False
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_register(module: ModuleType) -> None:
            sys.meta_path.remove(self)
            execute(module)
            importlib.import_module("fastkd.models")

        spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


def register_with_timm() -> None:
    """Register the students: now if timm is there, else as soon as someone imports it."""
    if "timm" in sys.modules:
        importlib.import_module("fastkd.models")
    else:
        sys.meta_path.insert(0, _AfterTimm())
