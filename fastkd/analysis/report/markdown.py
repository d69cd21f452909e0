"""The report that a person reads: what was measured, then what was found.

Puts tables and figures in order; makes none of them and computes nothing.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastkd.analysis import results as readings
from fastkd.analysis.results import ModelResult
from fastkd.analysis.table import Table, escaped_markdown
from fastkd.utils.io import printable


@dataclass(frozen=True)
class _Section:
    heading: str
    tables: tuple[str, ...]
    figures: tuple[str, ...] = ()


_SECTIONS = (
    _Section(
        "How many dimensions an image needs, alone and in the basis of all",
        ("ranks_last_layer",),
        ("shared_basis", "rank_histograms"),
    ),
    _Section(
        "Layer by layer",
        ("ranks_by_layer", "shared_ranks_by_layer", "sep_by_layer"),
        ("layerwise_rank",),
    ),
    _Section(
        "How far subspaces turn from image to image",
        ("rotation",),
        ("rotation", "layerwise_rotation"),
    ),
    _Section(
        "How tokens spread their energy over channels",
        ("sep_bandwidths", "sep_permutations"),
        ("sep",),
    ),
    _Section("Side by side", ("comparison",), ("comparison",)),
    _Section("Beside the paper", ("paper_ranks", "paper_bandwidths")),
    _Section("Skipped images", ("skipped_images",)),
)

# Settings that change no number.
_OF_THE_RUN = ("command", "compare_paper")

_CAPTIONS = {
    "shared_basis": "Mean cumulated energy over dimensions, in each image's own basis and in the "
    "shared one; bands are one standard deviation over images, marks the dimensions at which the "
    "mean curve reaches each level.",
    "rank_histograms": "Number of images by rank at each level, last layer.",
    "layerwise_rank": "Rank at the highest level over layers: mean, band between the quartiles and "
    "99th percentile over images.",
    "rotation": "Left: overlap of top-k subspaces beside what random ones give (boxes: quartiles, "
    "whiskers: 5th and 95th percentile). Right: mean principal angles.",
    "layerwise_rotation": "Mean excess overlap of images' own top-k subspaces with the shared one, "
    "layer by layer.",
    "sep": "Mean cumulated energy over channel frequency; below, its difference from white noise "
    "and where 95 % of the channel permutations put it.",
    "comparison": "Last layers side by side.",
}


def render(
    models: Sequence[ModelResult],
    settings: Mapping[str, Any],
    environment: Mapping[str, str],
    tables: Sequence[Table],
    figures: Mapping[str, Sequence[str]],
) -> str:
    """Write a report as Markdown.

    Args:
        models: what was analysed.
        settings: of the report.
        environment: versions and machine.
        tables: those to show.
        figures: kind -> stems of its files in ``figures/``.

    Returns:
        The text; figures and files are linked relative to its folder.
    """
    by_name = {table.name: table for table in tables}
    blocks = [
        _heading(models),
        *_warning(models),
        *_centring(settings),
        "## What was measured",
        *_table(by_name["models"]),
        *_differences(settings),
        _listed("Settings", _shown_settings(settings)),
        _listed("Versions and machine", environment),
        *(block for section in _SECTIONS for block in _section(section, by_name, figures)),
        "## Files",
        _files(tables, figures),
        "## How to make it again",
        *_reproduce(settings),
    ]
    return "\n\n".join(block.strip("\n") for block in blocks) + "\n"


def _centring(settings: Mapping[str, Any]) -> list[str]:
    if not settings.get("centred"):
        return []
    return [
        "> **Centred**: what is said of the shared basis (ranks in it, captured energy, rotation) "
        "is of tokens minus the data set's mean token. Each image's own spectrum is not centred, "
        "so that the two are no longer measured on the same tokens."
    ]


def _heading(models: Sequence[ModelResult]) -> str:
    names = [escaped_markdown(model.name) for model in models]
    if len(names) > 3:
        return f"# Feature analysis of {len(names)} models"
    return "# Feature analysis of " + ", ".join(names)


def _warning(models: Sequence[ModelResult]) -> Iterable[str]:
    untrained = [m.name for m in models if m.weights == readings.UNTRAINED]
    if untrained:
        names = ", ".join(escaped_markdown(name) for name in untrained)
        yield (
            f"> **Untrained weights: {names}.** These numbers describe a random initialisation. "
            "They say nothing about the features that training gives this architecture."
        )


def _differences(settings: Mapping[str, Any]) -> Iterable[str]:
    different = {
        name: values
        for name, values in settings.get("by_model", {}).items()
        if name not in _OF_THE_RUN
    }
    if not different:
        return
    yield (
        "**The models were not all measured alike**; differences between them may come from that:"
    )
    yield "\n".join(
        f"- {name}: "
        + "; ".join(f"{escaped_markdown(model)}: {_code(value)}" for model, value in values.items())
        for name, values in different.items()
    )


def _shown_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {name: v for name, v in settings.items() if name not in ("by_model", *_OF_THE_RUN)}


def _listed(title: str, values: Mapping[str, Any]) -> str:
    return "\n".join([f"{title}:\n", *(f"- {name}: {_code(v)}" for name, v in values.items())])


def _section(
    section: _Section, tables: Mapping[str, Table], figures: Mapping[str, Sequence[str]]
) -> Iterable[str]:
    present = [tables[name] for name in section.tables if name in tables]
    if not present:
        return
    yield f"## {section.heading}"
    for table in present:
        yield from _table(table)
    for kind in section.figures:
        for stem in figures.get(kind, ()):
            yield f"![{kind.replace('_', ' ')}](figures/{stem}.png)"
        if figures.get(kind):
            yield f"*{_CAPTIONS[kind]}*"


def _table(table: Table) -> Iterable[str]:
    yield f"**{table.title}.** {escaped_markdown(table.explanation)}"
    yield table.to_markdown()
    if table.notes:
        yield "\n".join(f"- {escaped_markdown(note)}" for note in table.notes)


def _files(tables: Sequence[Table], figures: Mapping[str, Sequence[str]]) -> str:
    lines = [
        "- `report.json`: all numbers; `fastkd.analysis.Report.load` reads it with the arrays",
        "- `arrays.npz`: per-image ranks and curves, spectra, angles; `report.json` names each",
        *(f"- `tables/{table.name}.csv`, `.tex`: {table.title}" for table in tables),
        *(f"- `figures/{stem}.png`, `.pdf`" for found in figures.values() for stem in found),
    ]
    return "\n".join(lines)


def _reproduce(settings: Mapping[str, Any]) -> Iterable[str]:
    earlier = settings.get("by_model", {}).get("command", {}).values()
    commands = [command for command in (*earlier, settings.get("command")) if command]
    if commands:
        yield "```bash\n" + "\n".join(dict.fromkeys(commands)) + "\n```"
    lines = (f"  {_json(name)}: {_json(value)}" for name, value in settings.items())
    yield "The settings, complete:"
    yield "```json\n{\n" + ",\n".join(lines) + "\n}\n```"


def _json(value: Any) -> str:
    return json.dumps(value, default=str, ensure_ascii=False)


def _code(value: Any) -> str:
    return "`" + printable(str(value).replace("`", "'").replace("\n", " ")) + "`"
