"""fastkd: fused-kernel feature distillation of Vision Transformers.

Four things, each usable alone: operators (`fastkd.ops`), losses and students (`fastkd.losses`,
`fastkd.models`), measurements (`fastkd.analysis`) and a trainer (`fastkd.training`).
"""

from __future__ import annotations

import importlib
import importlib.metadata
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    __version__: str
    from fastkd import analysis, integrations, losses, models, ops, training
    from fastkd.analysis import Report, analyze
    from fastkd.inference.create_teacher import create_teacher
    from fastkd.models import create_student, load_released_checkpoint
    from fastkd.ops import backends, feature_kd, lift, lift_kd
    from fastkd.training import Recipe, Result, evaluate, export, predict, shard, train

# Where each public name lives; it is imported when it is first used.
_PUBLIC = {
    "train": "fastkd.training",
    "evaluate": "fastkd.training",
    "predict": "fastkd.training",
    "analyze": "fastkd.analysis",
    "Report": "fastkd.analysis",
    "export": "fastkd.training",
    "shard": "fastkd.data.shard_writer",
    "Recipe": "fastkd.config",
    "Result": "fastkd.training",
    "create_student": "fastkd.models",
    "create_teacher": "fastkd.inference.create_teacher",
    "load_released_checkpoint": "fastkd.models",
    "feature_kd": "fastkd.ops",
    "lift": "fastkd.ops",
    "lift_kd": "fastkd.ops",
    "backends": "fastkd.ops",
}

_PACKAGES = ("analysis", "integrations", "losses", "models", "ops", "training")

__all__ = [
    "Recipe",
    "Report",
    "Result",
    "analysis",
    "analyze",
    "backends",
    "create_student",
    "create_teacher",
    "evaluate",
    "export",
    "feature_kd",
    "integrations",
    "lift",
    "lift_kd",
    "load_released_checkpoint",
    "losses",
    "models",
    "ops",
    "predict",
    "shard",
    "train",
    "training",
]


if not TYPE_CHECKING:  # a type checker that saw this would take every name for one of fastkd's

    def __getattr__(name: str) -> Any:
        if name == "__version__":
            return importlib.metadata.version("fastkd")
        if name in _PACKAGES:
            return importlib.import_module(f"fastkd.{name}")
        if name not in _PUBLIC:
            raise AttributeError(f"module 'fastkd' has no attribute {name!r}")
        return getattr(importlib.import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_PUBLIC, *_PACKAGES])


if "timm" in sys.modules:  # registers the students there; else `import fastkd.models` does so
    importlib.import_module("fastkd.models")
