"""The paper's numbers, and which of them a measured model can be compared with.

A match is never better than what is known about the weights, so every match carries its caveats.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from typing import Any

import yaml

from fastkd.analysis.results import UNTRAINED, ModelResult

_PRETRAINED = "pretrained"


@dataclass(frozen=True)
class PublishedModel:
    """One row of the paper's tables.

    Attributes:
        name: as the paper prints it.
        timm: the timm name of its weights, ``architecture.tag``.
        training: ``"supervised"``, ``"self-supervised"`` or ``"multimodal"``.
        channels: D of the last block.
        image_ranks: level -> rank in each image's own basis, 99th percentile over images.
        dataset_ranks: level -> rank in the basis of all images, 99th percentile over images.
        bandwidths: level -> SEP bandwidth d/D, full order.
        note: what a reader must know about this row; "" for most.
    """

    name: str
    timm: str
    training: str
    channels: int
    image_ranks: dict[float, int]
    dataset_ranks: dict[float, int]
    bandwidths: dict[float, float]
    note: str = ""

    @property
    def architecture(self) -> str:
        """The timm name without the tag of the weights."""
        return self.timm.partition(".")[0]

    @property
    def tag(self) -> str:
        """The tag that timm gives the weights."""
        return self.timm.partition(".")[2]


@dataclass(frozen=True)
class Published:
    """The paper's tables.

    Attributes:
        source: title, arXiv number, tables, data and settings they were measured with.
        models: in the order of the paper.
    """

    source: dict[str, Any]
    models: tuple[PublishedModel, ...]


@dataclass(frozen=True)
class Match:
    """A model beside its row of the paper.

    Attributes:
        model: ours.
        published: theirs; None if the paper has no such model.
        notes: why a difference need not mean anything, or why there is no match.
    """

    model: ModelResult
    published: PublishedModel | None
    notes: tuple[str, ...]


@functools.cache
def published() -> Published:
    """The numbers of arXiv 2511.15572, from the package's ``published.yaml``."""
    text = resources.files("fastkd.analysis").joinpath("published.yaml").read_text("utf-8")
    content = yaml.safe_load(text)
    levels, bandwidth_levels = content["levels"], content["bandwidth_levels"]
    models = tuple(_model(row, levels, bandwidth_levels) for row in content["models"])
    return Published(content["source"], models)


def match(model: ModelResult, settings: Mapping[str, Any]) -> Match:
    """Find the paper's row for a model, by timm architecture and, where it is known, the tag.

    Args:
        model: what was analysed.
        settings: of the report; ``"centred"`` is read.

    Returns:
        The row and its caveats, or no row and the reason.
    """
    architecture, tag = _timm_name(model)
    rows = [row for row in published().models if row.architecture == architecture]
    if not rows:
        return Match(model, None, ("not in the paper",))
    row = next((row for row in rows if row.tag == tag), None)
    if row is None and (tag or len(rows) > 1):
        listed = " and ".join(row.timm for row in rows)
        got = f"these are the weights {tag}" if tag else "which weights these are is not recorded"
        return Match(model, None, (f"the paper has {listed}; {got}",))
    row = row or rows[0]
    notes = (*_weights_notes(model, tag, row), *_measurement_notes(model, settings, row))
    return Match(model, row, notes)


def _model(
    row: dict[str, Any], levels: list[float], bandwidth_levels: list[float]
) -> PublishedModel:
    bins = row["bandwidth_bins"]
    return PublishedModel(
        name=row["name"],
        timm=row["timm"],
        training=row["training"],
        channels=row["channels"],
        image_ranks=dict(zip(levels, row["image_ranks"], strict=True)),
        dataset_ranks=dict(zip(levels, row["dataset_ranks"], strict=True)),
        bandwidths={
            level: number / row["channels"]
            for level, number in zip(bandwidth_levels, bins, strict=True)
        },
        note=row.get("note", ""),
    )


def _timm_name(model: ModelResult) -> tuple[str, str]:
    """Architecture and tag ("" if unknown), without a hub's prefix."""
    given = model.name.rpartition("/")[2]
    architecture, _, tag = (model.architecture or given).rpartition("/")[2].partition(".")
    if not tag and given.partition(".")[0] == architecture:
        tag = given.partition(".")[2]
    return architecture, tag


def _weights_notes(model: ModelResult, tag: str, row: PublishedModel) -> list[str]:
    if model.weights == UNTRAINED:
        return [f"untrained weights: the differences say nothing about {row.name}"]
    if not model.architecture:
        return [f"matched by name only; the paper's weights are {row.timm}"]
    if model.weights != _PRETRAINED:
        return [
            f"matched by architecture only: the weights are {model.weights}, the paper's are "
            f"{row.timm}"
        ]
    if not tag:
        return [
            f"matched by architecture only: which pretrained weights these are is not recorded, "
            f"the paper's are {row.timm}"
        ]
    return []


def _measurement_notes(
    model: ModelResult, settings: Mapping[str, Any], row: PublishedModel
) -> list[str]:
    source, notes = published().source, []
    if model.last.channels != row.channels:
        notes.append(f"{model.last.channels} channels, the paper's model has {row.channels}")
    if model.input_size is not None and list(model.input_size) != source["input_size"]:
        size = "{} x {}".format(*model.input_size)
        notes.append("images of {}, the paper's of {} x {}".format(size, *source["input_size"]))
    if model.images != source["images"]:
        notes.append(f"{model.images:,} images, the paper's {source['images']:,}")
    if settings.get("centred"):
        notes.append("tokens were centred, the paper's were not")
    if model.last.sep is not None and model.last.sep.convention != source["convention"]:
        notes.append(f"SEP is {model.last.sep.convention}, the paper's {source['convention']}")
    if row.note:
        notes.append(row.note)
    return notes
