"""The README's snippets run as they stand; only ImageNet and its teacher are replaced."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest
import torch
from timm.models import VisionTransformer
from torch.utils.data import TensorDataset

import fastkd
from fastkd.training import Recipe

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
SNIPPETS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def tiny_vit(width: int, depth: int = 2) -> VisionTransformer:
    return VisionTransformer(8, 4, 1, 3, embed_dim=width, depth=depth, num_heads=2)


@pytest.fixture
def without_imagenet(monkeypatch, tmp_path):
    """`fastkd.train` with the arguments checked, and then tiny models on tiny images instead."""
    train = fastkd.train

    def tiny_train(*arguments, **options):
        bound = inspect.signature(train).bind(*arguments, **options)
        assert Recipe.load(bound.arguments["recipe"]).teacher == bound.arguments["teacher"]
        images, labels = torch.rand(24, 1, 8, 8), torch.arange(24) % 3
        data = (TensorDataset(images, labels),) * 2
        return train(
            tiny_vit(16),
            tiny_vit(32),
            data,
            tmp_path / "run",
            **bound.arguments.get("overrides", {}),
            projector="linear",
            pairs=((-1, -1),),
            epochs=1,
            warmup_epochs=0,
            batch_size=12,
            augment="none",
            workers=0,
            amp="none",
            quiet=True,
        )

    monkeypatch.setattr(fastkd, "train", tiny_train, raising=False)
    monkeypatch.chdir(tmp_path)


def test_the_readme_has_its_snippets():
    assert len(SNIPPETS) >= 4


@pytest.mark.parametrize("snippet", SNIPPETS, ids=range(len(SNIPPETS)))
def test_the_snippet_runs(snippet, without_imagenet):
    exec(compile(snippet, "README.md", "exec"), {})


def test_every_command_of_the_readme_exists():
    from fastkd.cli import main

    commands = set(
        re.findall(r"\bfastkd ([\w-]+)", " ".join(re.findall(r"```bash\n(.*?)```", README, re.S)))
    )
    assert {"demo", "train", "evaluate", "env", "recipes"} <= commands
    for command in commands:
        with pytest.raises(SystemExit) as ended:
            main([command, "--help"])
        assert ended.value.code == 0


def test_every_file_the_readme_links_to_is_there():
    root = Path(__file__).parents[1]
    links = re.findall(r"\]\((?!http|#)([^)#]+)\)", README)
    assert links
    for link in links:
        assert (root / link).exists(), link
