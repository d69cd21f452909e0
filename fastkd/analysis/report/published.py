"""The paper's numbers, which of them a measured model matches, and tables of both."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from typing import Any, NamedTuple

import yaml

from fastkd.analysis.report.text import BESIDE, Column, Table
from fastkd.analysis.results import UNTRAINED, ModelResult, percent


class PublishedModel(NamedTuple):
    """One row of the paper's tables."""

    name: str  # as the paper prints it
    timm: str  # timm's name of its weights, "architecture.tag"
    channels: int  # D of the last block
    image_ranks: dict[float, int]  # level -> 99th percentile over images, in their own bases
    dataset_ranks: dict[float, int]  # level -> 99th percentile, in the basis of all images
    bandwidths: dict[float, float]  # level -> SEP bandwidth d/D, full order
    note: str  # caveat about this row; "" for most


class Published(NamedTuple):
    """The paper's tables."""

    source: dict[str, Any]  # arXiv number, data and settings
    models: tuple[PublishedModel, ...]


class Match(NamedTuple):
    """A model beside its row of the paper."""

    model: ModelResult
    published: PublishedModel | None  # None if the paper has no such model
    notes: tuple[str, ...]  # caveats about a difference, or why there is no match


@functools.cache
def published() -> Published:
    """Read the numbers of arXiv 2511.15572 from the package's published.yaml."""
    text = resources.files("fastkd.analysis").joinpath("published.yaml").read_text("utf-8")
    content = yaml.safe_load(text)
    levels, bandwidth_levels = content["levels"], content["bandwidth_levels"]
    models = tuple(
        PublishedModel(
            name=row["name"],
            timm=row["timm"],
            channels=row["channels"],
            image_ranks=dict(zip(levels, row["image_ranks"], strict=True)),
            dataset_ranks=dict(zip(levels, row["dataset_ranks"], strict=True)),
            bandwidths={
                level: bins / row["channels"]
                for level, bins in zip(bandwidth_levels, row["bandwidth_bins"], strict=True)
            },
            note=row.get("note", ""),
        )
        for row in content["models"]
    )
    return Published(content["source"], models)


def match(model: ModelResult, settings: Mapping[str, Any]) -> Match:
    """Find the paper's row for a model, by timm architecture and, where it is known, the tag."""
    architecture, tag = _timm_name(model)
    rows = [row for row in published().models if row.timm.partition(".")[0] == architecture]
    if not rows:
        return Match(model, None, ("not in the paper",))
    row = next((row for row in rows if row.timm.partition(".")[2] == tag), None)
    if row is None and (tag or len(rows) > 1):
        listed = " and ".join(row.timm for row in rows)
        got = f"these are the weights {tag}" if tag else "which weights these are is not recorded"
        return Match(model, None, (f"the paper has {listed}; {got}",))
    row = row or rows[0]
    return Match(model, row, tuple(_caveats(model, tag, row, settings)))


def paper_ranks(models: Sequence[ModelResult], settings: Mapping[str, Any]) -> Table:
    """Our ranks beside the paper's."""
    matches = [match(model, settings) for model in models]
    levels = list(published().models[0].image_ranks)
    rows: list[tuple[Any, ...]] = []
    for model, row, _ in matches:
        if row is None:
            rows.append((model.name, "no", None, *_beside({}, None, levels)))
            continue
        for basis, ranks in model.last.bases():
            theirs = row.image_ranks if basis == "own" else row.dataset_ranks
            ours = {level: ranks.distribution(level).percentile_99 for level in ranks.levels}
            rows.append((model.name, row.name, basis, *_beside(ours, theirs, levels)))
    source = published().source
    return Table(
        "paper_ranks",
        f"Ranks beside arXiv {source['arxiv']}",
        "99th percentile over images: ours / published / ours minus published. Published: "
        f"{source['images']:,} images of {source['data']}.",
        (
            Column("Model", text=True, group=True),
            Column("In the paper", text=True, group=True),
            Column("Basis", text=True),
            *(Column(f"rank@{percent(level)}", 1, BESIDE, signed=True) for level in levels),
        ),
        rows,
        _notes(matches),
    )


def paper_bandwidths(models: Sequence[ModelResult], settings: Mapping[str, Any]) -> Table:
    """Our SEP bandwidths beside the paper's."""
    matches = [match(model, settings) for model in models]
    levels = list(published().models[0].bandwidths)
    rows = []
    for model, row, _ in matches:
        name, theirs = (row.name, row.bandwidths) if row else ("no", None)
        rows.append((model.name, name, *_beside(model.last.bandwidths(), theirs, levels)))
    return Table(
        "paper_bandwidths",
        f"SEP bandwidths beside arXiv {published().source['arxiv']}",
        "Bandwidth d/D of the mean token: ours / published / ours minus published, full order.",
        (
            Column("Model", text=True),
            Column("In the paper", text=True),
            *(Column(f"b({percent(level)} %)", 3, BESIDE, signed=True) for level in levels),
        ),
        rows,
        _notes(matches),
    )


def _timm_name(model: ModelResult) -> tuple[str, str]:
    """Return architecture and tag ("" if unknown), without a hub's prefix."""
    given = model.name.rpartition("/")[2]
    architecture, _, tag = (model.architecture or given).rpartition("/")[2].partition(".")
    if not tag and given.partition(".")[0] == architecture:
        tag = given.partition(".")[2]
    return architecture, tag


def _caveats(
    model: ModelResult, tag: str, row: PublishedModel, settings: Mapping[str, Any]
) -> Iterable[str]:
    if model.weights == UNTRAINED:
        yield f"untrained weights: the differences are no measure of {row.name}"
    elif not model.architecture:
        yield f"matched by name only; the paper's weights are {row.timm}"
    elif model.weights != "pretrained":
        yield (
            f"matched by architecture only: the weights are {model.weights}, the paper's are "
            f"{row.timm}"
        )
    elif not tag:
        yield (
            "matched by architecture only: which pretrained weights these are is not recorded, "
            f"the paper's are {row.timm}"
        )
    source, last = published().source, model.last
    if last.channels != row.channels:
        yield f"{last.channels} channels, the paper's model has {row.channels}"
    if model.input_size is not None and list(model.input_size) != source["input_size"]:
        sizes = (*model.input_size, *source["input_size"])
        yield "images of {} x {}, the paper's of {} x {}".format(*sizes)
    if model.images != source["images"]:
        yield f"{model.images:,} images, the paper's {source['images']:,}"
    if settings.get("centered"):
        yield "tokens were centered, the paper's were not"
    if last.sep is not None and last.sep.convention != source["convention"]:
        yield f"SEP is {last.sep.convention}, the paper's {source['convention']}"
    if row.note:
        yield row.note


def _beside(
    ours: Mapping[float, float], theirs: Mapping[float, float] | None, levels: Iterable[float]
) -> list[tuple[float | None, ...]]:
    """Make cells of ours, theirs and the difference."""
    if theirs is None:
        return [(None,) * 3 for _ in levels]
    return [(ours.get(q), theirs[q], ours[q] - theirs[q] if q in ours else None) for q in levels]


def _notes(matches: Iterable[Match]) -> list[str]:
    return [f"{found.model.name}: {'; '.join(found.notes)}" for found in matches if found.notes]
