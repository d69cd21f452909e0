"""The snippets, commands, links and generated tables of README.md and docs/ are right."""

from __future__ import annotations

import functools
import importlib.util
import inspect
import re
from pathlib import Path

import pytest
import torch
from timm.models import VisionTransformer
from torch.utils.data import TensorDataset

import fastkd
from fastkd.training import Recipe

ROOT = Path(__file__).parents[1]
PAGES = {
    str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
    for path in [ROOT / "README.md", *sorted(ROOT.glob("docs/**/*.md"))]
}
SNIPPETS = [
    pytest.param(snippet, id=f"{page}:{text[: text.index(snippet)].count(chr(10)) + 1}")
    for page, text in PAGES.items()
    for snippet in re.findall(r"```python\n(.*?)```", text, re.DOTALL)
]
MIGRATION = sorted(page for page in PAGES if page.startswith("docs/migrate/"))
TIMM = "docs/migrate/timm.md"
COMMAND = re.compile(r"(?:^|`|-m |\$\()fastkd ([a-z][\w-]*)((?: +[^`#)\n]+)?)", re.M)


def commands() -> list[tuple[str, list[str]]]:
    """(command, its flags) of every command line, in a block or in the text."""
    text = "\n".join(PAGES.values())
    blocks = re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ")
    inline = "\n".join(re.findall(r"`fastkd [^`\n]+`", text))
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


@pytest.mark.parametrize("snippet", SNIPPETS)
def test_the_snippet_runs(snippet, without_imagenet):
    exec(compile(snippet, "snippet", "exec"), {})


@pytest.mark.parametrize("page", [page for page in MIGRATION if page != TIMM])
def test_every_migration_page_has_one_snippet_that_checks_itself(page):
    (snippet,) = re.findall(r"```python\n(.*?)```", PAGES[page], re.DOTALL)
    assert "# before" in snippet or "before =" in snippet
    assert "autograd.grad" in snippet and "assert_close" in snippet


def test_migration_pages_for_the_code_bases_that_people_come_from():
    names = {Path(page).stem for page in MIGRATION}
    assert names >= {"deit", "spectralkd", "fitnets", "torchdistill", "timm"}


def arguments_in(diff: str, marks: str) -> set[str]:
    """Names of the call's arguments, of lines that begin with one of the marks."""
    return set(re.findall(rf"^[{marks}] +(\w+)=", diff, re.M))


def test_the_change_of_timms_script_fits_both_tasks():
    tasks = pytest.importorskip("timm.task", reason="timm >= 1.0.31 has training tasks")
    from fastkd.integrations.timm import FeatureMapDistillationTask
    from fastkd.integrations.timm_arguments import OF_TIMMS_TASKS

    (diff,) = re.findall(r"```diff\n(.*?)```", PAGES[TIMM], re.DOTALL)
    old = inspect.signature(tasks.FeatureDistillationTask).parameters
    new = inspect.signature(FeatureMapDistillationTask).parameters
    assert arguments_in(diff, " -") <= old.keys()
    assert arguments_in(diff, " +") <= new.keys()
    removed = arguments_in(diff, "-")
    assert removed and removed <= OF_TIMMS_TASKS.keys(), "an argument that is refused, saying why"


def test_every_command_is_documented():
    from fastkd.cli import COMMANDS

    assert {command for command, _ in commands()} == set(COMMANDS)


@pytest.mark.parametrize("command", sorted({command for command, _ in commands()}))
def test_every_documented_command_exists_and_has_its_flags(command, capsys):
    from fastkd.cli import main

    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    assert ended.value.code == 0
    known = set(re.findall(r"--[\w-]+", capsys.readouterr().out))
    flags = {flag for name, flags in commands() for flag in flags if name == command}
    assert flags <= known, flags - known


@functools.cache
def anchors(path: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.M)
    words = (re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings)
    return {text.replace(" ", "-") for text in words}


@pytest.mark.parametrize("page", [*PAGES, "CONTRIBUTING.md", "CHANGELOG.md", "bench/NOTES.md"])
def test_every_link_of_a_page_resolves(page):
    path = ROOT / page
    text = re.sub(r"```.*?```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
    for link in re.findall(r"\]\((?!https?:)([^)]+)\)", text):
        file, _, anchor = link.partition("#")
        target = (path.parent / file).resolve() if file else path
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_every_page_of_the_documentation_is_in_its_index():
    index = PAGES["docs/README.md"]
    missing = [page for page in PAGES if page.startswith("docs/") and page != "docs/README.md"]
    assert [page for page in missing if f"({page.removeprefix('docs/')})" not in index] == []


def test_the_tables_that_come_from_the_code_are_current():
    spec = importlib.util.spec_from_file_location("tables", ROOT / ".ci" / "tables.py")
    tables = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tables)
    stale = [page for page, text in PAGES.items() if tables.with_tables(text) != text]
    assert stale == [], "run python .ci/tables.py"


def test_the_readme_stays_short():
    assert PAGES["README.md"].count("\n") <= 230
