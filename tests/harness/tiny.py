"""Models and data small enough that a whole run takes a fraction of a second."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from timm.models.vision_transformer import VisionTransformer
from torch.utils.data import TensorDataset

from fastkd.checkpoint import save_checkpoint
from fastkd.models import LiftVisionTransformer, create_student
from fastkd.models.architectures import into_lift
from fastkd.training import Recipe

# A run on tensors, in this process, with a learning rate at which tiny models learn.
FAST: dict[str, Any] = {
    "epochs": 2,
    "warmup_epochs": 0,
    "batch_size": 16,
    "lr": 3e-3,
    "lr_scaling": False,
    "augment": "none",
    "workers": 0,
    "amp": "none",
    "ema_decay": 0.9,
    "device": "cpu",
    "quiet": True,
}


# AdamW, and two others: one that skips an update on the device, and one for which the host does.
each_optimizer = pytest.mark.parametrize(
    "opt", ["adamw", *(pytest.param(opt, marks=pytest.mark.slow) for opt in ("nesterov", "lamb"))]
)


class Interrupting(TensorDataset):
    """Calls ``action`` when the n-th sample is fetched; opening the data fetches the first."""

    def __init__(self, dataset: TensorDataset, at: int, action: Callable[[], None]) -> None:
        super().__init__(*dataset.tensors)
        self.left = at
        self.action = action

    def __getitem__(self, index: int) -> Any:
        self.left -= 1
        if self.left == 0:
            self.action()
        return super().__getitem__(index)


def vit(dim: int = 16, depth: int = 2, seed: int = 0, **options: Any) -> VisionTransformer:
    torch.manual_seed(seed)
    return VisionTransformer(
        **{
            "img_size": 8,
            "patch_size": 4,
            "in_chans": 1,
            "num_classes": 6,
            "embed_dim": dim,
            "depth": depth,
            "num_heads": 2,
            **options,
        }
    )


def lift(width: int = 24, **options: Any) -> LiftVisionTransformer:
    return into_lift(vit(**options), width)


def tensor_data(train: int = 70, val: int = 30) -> tuple[TensorDataset, TensorDataset]:
    """Six classes, each a pattern of its own under noise."""
    generator = torch.Generator().manual_seed(7)
    patterns = torch.randn(6, 1, 8, 8, generator=generator)

    def make(count: int) -> TensorDataset:
        labels = torch.arange(count) % 6
        noise = torch.randn(count, 1, 8, 8, generator=generator)
        return TensorDataset(patterns[labels] + 0.7 * noise, labels)

    return make(train), make(val)


def image_folder(root: Path, train: int = 12, val: int = 4, size: int = 40) -> Path:
    """JPEGs of three classes, each of its own color."""
    random = np.random.default_rng(0)
    for split, count in (("train", train), ("val", val)):
        for number, name in enumerate(("blue", "green", "red")):
            folder = root / split / name
            folder.mkdir(parents=True)
            for index in range(count):
                pixels = random.integers(0, 90, (size, size + 8, 3), dtype=np.uint8)
                pixels[..., 2 - number] += 150
                Image.fromarray(pixels).save(folder / f"{index}.jpg")
    return root


def made_run(
    folder: Path,
    variant: Any = "plain",
    width: int | None = None,
    *,
    name: str = "test_vit",
    ema: bool = True,
    classes: list[str] | None = None,
    **fields: Any,
) -> Path:
    """A run's folder whose student never trained; its averaged weights are others."""
    states = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        student = create_student(name, variant, width=width, num_classes=3, img_size=32)
        states.append(student.state_dict())
    recipe = Recipe(model=name, variant=variant, width=width, crop_pct=0.9, **fields)
    folder.mkdir()
    save_checkpoint(
        {
            "state_dict": states[0],
            "state_dict_ema": states[1] if ema else None,
            "recipe": recipe.to_dict(),
            "num_classes": 3,
            "img_size": 32,
            "classes": classes,
            "input": {"size": (3, 32, 32), "mean": (0.4, 0.5, 0.6), "std": (0.2, 0.3, 0.4)},
            "measured": {"top1": 50.0, "ema_top1": 60.0},
        },
        folder / "last.pth",
    )
    return folder
