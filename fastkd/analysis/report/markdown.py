"""The text of report.md: tables and figures in order, with headings, captions and settings."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from fastkd.analysis.report.table import Table, escaped_markdown
from fastkd.analysis.results import UNTRAINED, ModelResult
from fastkd.utils.io import printable

# Heading, names of tables, kinds of figures; a section without tables is left out.
_SECTIONS: tuple[tuple[str, tuple[str, ...], tuple[str, ...]], ...] = (
    (
        "How many dimensions an image needs, alone and in the basis of all",
        ("ranks_last_layer",),
        ("shared_basis", "rank_histograms"),
    ),
    (
        "Layer by layer",
        ("ranks_by_layer", "shared_ranks_by_layer", "sep_by_layer"),
        ("layerwise_rank",),
    ),
    (
        "How far subspaces rotate from image to image",
        ("rotation",),
        ("rotation", "layerwise_rotation"),
    ),
    (
        "How tokens spread their energy over channels",
        ("sep_bandwidths", "sep_permutations"),
        ("sep",),
    ),
    ("Side by side", ("comparison",), ("comparison",)),
    ("Beside the paper", ("paper_ranks", "paper_bandwidths"), ()),
    ("Skipped images", ("skipped_images",), ()),
)

# Settings that change no number.
_OF_THE_RUN = ("command", "compare_paper")

_CAPTIONS = {
    "shared_basis": "Mean cumulated energy over dimensions, in each image's own basis and in the "
    "shared one. Bands are one standard deviation over images; dots mark the dimension at which "
    "the mean curve reaches each level.",
    "rank_histograms": "Number of images by rank at each level, last layer.",
    "layerwise_rank": "Rank at the highest level by layer: mean, quartiles (band) and 99th "
    "percentile over images.",
    "rotation": "Left: overlap of top-k subspaces, with that of random subspaces (boxes: "
    "quartiles, whiskers: 5th and 95th percentile). Right: mean principal angles.",
    "layerwise_rotation": "Mean excess overlap of images' own top-k subspaces with the shared one, "
    "layer by layer.",
    "sep": "Mean cumulated energy over channel frequency; below, its difference from white noise, "
    "with the range of 95 % of the channel permutations.",
    "comparison": "Last layers side by side.",
}


def render(
    models: Sequence[ModelResult],
    settings: Mapping[str, Any],
    environment: Mapping[str, str],
    tables: Sequence[Table],
    figures: Mapping[str, Sequence[str]],
) -> str:
    """Write a report; ``figures`` lists the stems of the files in figures/ by kind."""
    by_name = {table.name: table for table in tables}
    blocks = [
        *_head(models, settings),
        "## What was measured",
        *_table(by_name["models"]),
        *_differences(settings),
        _listed("Settings", _shown_settings(settings)),
        _listed("Versions and machine", environment),
        *_sections(by_name, figures),
        "## Files",
        *_files(tables, figures),
        "## How to reproduce it",
        *_reproduce(settings),
    ]
    return "\n\n".join(block.strip("\n") for block in blocks) + "\n"


def _head(models: Sequence[ModelResult], settings: Mapping[str, Any]) -> Iterable[str]:
    names = [escaped_markdown(model.name) for model in models]
    title = f"{len(names)} models" if len(names) > 3 else ", ".join(names)
    yield f"# Feature analysis of {title}"
    untrained = [escaped_markdown(model.name) for model in models if model.weights == UNTRAINED]
    if untrained:
        yield (
            f"> **Untrained weights: {', '.join(untrained)}.** These numbers describe a random "
            "initialization. They do not show the features that this architecture learns."
        )
    if settings.get("centred"):
        yield (
            "> **Centered**: the shared basis (ranks in it, captured energy, rotation) is measured "
            "on tokens minus the dataset's mean token. Each image's own spectrum is not centered, "
            "so the two are not measured on the same tokens."
        )


def _differences(settings: Mapping[str, Any]) -> Iterable[str]:
    lines = [
        f"- {name}: " + "; ".join(f"{escaped_markdown(m)}: {_code(v)}" for m, v in values.items())
        for name, values in settings.get("by_model", {}).items()
        if name not in _OF_THE_RUN
    ]
    if lines:
        yield (
            "**The models were not all measured alike**, which may explain differences between "
            "them:"
        )
        yield "\n".join(lines)


def _shown_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {name: v for name, v in settings.items() if name not in ("by_model", *_OF_THE_RUN)}


def _listed(title: str, values: Mapping[str, Any]) -> str:
    return "\n".join([f"{title}:\n", *(f"- {name}: {_code(v)}" for name, v in values.items())])


def _sections(tables: Mapping[str, Table], figures: Mapping[str, Sequence[str]]) -> Iterable[str]:
    for heading, names, kinds in _SECTIONS:
        present = [tables[name] for name in names if name in tables]
        if not present:
            continue
        yield f"## {heading}"
        for table in present:
            yield from _table(table)
        for kind in kinds:
            for stem in figures.get(kind, ()):
                yield f"![{kind.replace('_', ' ')}](figures/{stem}.png)"
            if figures.get(kind):
                yield f"*{_CAPTIONS[kind]}*"


def _table(table: Table) -> Iterable[str]:
    yield f"**{table.title}.** {escaped_markdown(table.explanation)}"
    yield table.to_markdown()
    if table.notes:
        yield "\n".join(f"- {escaped_markdown(note)}" for note in table.notes)


def _files(tables: Sequence[Table], figures: Mapping[str, Sequence[str]]) -> Iterable[str]:
    # `Report.save` removes files that the list of an earlier report names.
    yield "\n".join(
        [
            "- `report.json`: all numbers; `fastkd.analysis.Report.load` reads it with the arrays",
            "- `arrays.npz`: per-image ranks and curves, spectra, angles; `report.json` names each",
            *(f"- `tables/{table.name}.csv`, `.tex`: {table.title}" for table in tables),
            *(f"- `figures/{stem}.png`, `.pdf`" for found in figures.values() for stem in found),
        ]
    )


def _reproduce(settings: Mapping[str, Any]) -> Iterable[str]:
    earlier = settings.get("by_model", {}).get("command", {}).values()
    commands = [command for command in (*earlier, settings.get("command")) if command]
    if commands:
        yield "```bash\n" + "\n".join(dict.fromkeys(commands)) + "\n```"
    yield "All settings:"
    lines = (f"  {_json(name)}: {_json(value)}" for name, value in settings.items())
    yield "```json\n{\n" + ",\n".join(lines) + "\n}\n```"


def _json(value: Any) -> str:
    return json.dumps(value, default=str, ensure_ascii=False)


def _code(value: Any) -> str:
    return "`" + printable(str(value).replace("`", "'").replace("\n", " ")) + "`"
