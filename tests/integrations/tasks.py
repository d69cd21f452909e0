"""Tasks for timm's train loop on tiny models: what its tests start from.

Importing it skips a test module where timm is too old to have training tasks.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.conftest import REQUIRED
from tests.harness.tiny import vit

try:
    from fastkd.integrations.timm import FeatureMapDistillationTask
except ImportError as error:
    if "integrations" in REQUIRED:
        raise
    pytest.skip(str(error), allow_module_level=True)

IMAGES = torch.randn(8, 1, 8, 8, generator=torch.Generator().manual_seed(3))
TARGET = torch.tensor([0, 1, 2, 3, 4, 5, 0, 1])
LINEAR = {"projector": "linear", "alpha": 0.5, "tau": 2.0, "feature_loss": "spectral"}
LIFT = {"projector": "lift", "alpha": 0.9, "feature_loss": "spectral"}


def make_task(student, teacher, **options):
    """A task that logs nothing, with plain cross-entropy."""
    options = {"criterion": nn.CrossEntropyLoss(), "verbose": False} | options
    return FeatureMapDistillationTask(student, teacher, **options)


def projected_task(**options):
    """A ViT of 16 channels after one of 24, with a linear projector that is always the same."""
    torch.manual_seed(5)
    return make_task(vit(), vit(24, seed=1), **LINEAR | options)


def with_statistics(model, mean, std):
    """Say what a model's images of one channel are normalized with."""
    model.pretrained_cfg = {"mean": (mean,), "std": (std,)}
    return model
