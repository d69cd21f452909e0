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
MIGRATION = README.split("## Coming from another code base")[1].split("\n## ")[0]
CODE_BASES = {  # by the summary that unfolds it
    re.sub(r"</?\w+>", "", summary): text
    for summary, text in re.findall(
        r"<details><summary>(.*?)</summary>(.*?)</details>", MIGRATION, re.DOTALL
    )
}
TIMM = "timm's own train.py"
COMMAND = re.compile(r"(?:^|`|-m )fastkd ([a-z][\w-]*)((?: +[^`#\n]+)?)", re.M)


def commands() -> list[tuple[str, list[str]]]:
    """(command, its flags) of every command line, in a block or in the text."""
    blocks = re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ")
    inline = "\n".join(re.findall(r"`fastkd [^`\n]+`", README))
    return [
        (command, re.findall(r"(?<!\S)--[\w-]+", rest))
        for command, rest in COMMAND.findall(f"{lines}\n{inline}")
    ]


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


@pytest.mark.parametrize("code_base", sorted(CODE_BASES.keys() - {TIMM}))
def test_every_code_base_is_shown_with_one_snippet_that_checks_itself(code_base):
    (snippet,) = re.findall(r"```python\n(.*?)```", CODE_BASES[code_base], re.DOTALL)
    assert snippet in SNIPPETS
    assert "# before" in snippet or "before =" in snippet
    assert "autograd.grad" in snippet and "assert_close" in snippet


def test_the_code_bases_that_people_come_from_are_there():
    assert len(CODE_BASES) == MIGRATION.count("<summary>") >= 5
    assert TIMM in CODE_BASES


def arguments_in(diff: str, marks: str) -> set[str]:
    """Names of the call's arguments, of lines that begin with one of the marks."""
    return set(re.findall(rf"^[{marks}] +(\w+)=", diff, re.M))


def test_the_change_of_timms_script_fits_both_tasks():
    tasks = pytest.importorskip("timm.task", reason="timm >= 1.0.31 has training tasks")
    from fastkd.integrations.timm import FeatureMapDistillationTask
    from fastkd.integrations.timm_terms import OF_TIMMS_TASKS

    (diff,) = re.findall(r"```diff\n(.*?)```", CODE_BASES[TIMM], re.DOTALL)
    old = inspect.signature(tasks.FeatureDistillationTask).parameters
    new = inspect.signature(FeatureMapDistillationTask).parameters
    assert arguments_in(diff, " -") <= old.keys()
    assert arguments_in(diff, " +") <= new.keys()
    removed = arguments_in(diff, "-")
    assert removed and removed <= OF_TIMMS_TASKS.keys(), "an argument that is refused, saying why"


@pytest.mark.parametrize("snippet", SNIPPETS, ids=range(len(SNIPPETS)))
def test_the_snippet_runs(snippet, without_imagenet):
    exec(compile(snippet, "README.md", "exec"), {})


def test_the_readme_shows_the_commands_that_one_begins_with():
    shown = {command for command, _ in commands()}
    assert {"demo", "train", "evaluate", "env", "recipes", "losses", "shard"} <= shown


@pytest.mark.parametrize("command", sorted({command for command, _ in commands()}))
def test_every_command_of_the_readme_exists_and_has_its_flags(command, capsys):
    from fastkd.cli import main

    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    assert ended.value.code == 0
    known = set(re.findall(r"--[\w-]+", capsys.readouterr().out))
    flags = {flag for name, flags in commands() for flag in flags if name == command}
    assert flags <= known, flags - known


def test_every_file_the_readme_links_to_is_there():
    root = Path(__file__).parents[1]
    links = re.findall(r"\]\((?!http|#)([^)#]+)\)", README)
    assert links
    for link in links:
        assert (root / link).exists(), link
