"""Tables as Markdown, LaTeX and CSV, and the text of report.md around them."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fastkd.analysis.results import UNTRAINED, ModelResult
from fastkd.utils.io import csv_text, printable

MISSING = "\u2013"  # an en dash
_MINUS = "\u2212"
_LATEX = str.maketrans(
    {
        "\\": r"\textbackslash{}",
        **{sign: f"\\{sign}" for sign in "&%$#_{}"},
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        "<": r"\textless{}",
        ">": r"\textgreater{}",
        "|": r"\textbar{}",
        "±": r"$\pm$",
        _MINUS: r"$-$",
        "°": r"$^\circ$",
        "θ": r"$\theta$",
        MISSING: "--",
    }
)
_MARKDOWN = str.maketrans(
    {"|": r"\|", "*": r"\*", "`": r"\`", "<": "&lt;", ">": "&gt;", "\n": " ", "\r": " "}
)


@dataclass(frozen=True)
class Form:
    """How the parts of one cell are shown."""

    pattern: str = "{}"  # in Markdown and LaTeX, with a pair of braces for each part
    parts: tuple[str, ...] = ("",)  # in CSV, each part is a column of this name
    legend: str = ""  # follows the column's title in Markdown and LaTeX


PLAIN = Form()
SPREAD = Form("{} ± {}", ("mean", "standard deviation"), "mean ± std")
INTERVAL = Form("{} [{}, {}]", ("", "lower end", "upper end"))
STATISTICS = Form("{} / {} / {}", ("mean", "median", "99th percentile"), "mean / median / p99")
BESIDE = Form("{} / {} / {}", ("ours", "published", "difference"))
ANGLES = Form("{} / {} / {}", ("first", "median", "last"), "first / median / last")


@dataclass(frozen=True)
class Column:
    """Title and number format of a column."""

    title: str
    digits: int = 1  # after the decimal point; with 0 and 1, whole numbers have none
    form: Form = PLAIN
    text: bool = False  # cells are strings or None
    group: bool = False  # blank where this and all columns to the left repeat the row above
    signed: bool = False  # show the sign; with BESIDE, only that of the difference


@dataclass(frozen=True)
class Table:
    """A table with caption and notes."""

    name: str  # of its files, and its label in LaTeX
    title: str
    explanation: str
    columns: tuple[Column, ...]
    rows: list[tuple[Any, ...]]  # cells: text, a number, None, or a tuple with the form's parts
    notes: list[str] = field(default_factory=list)

    def to_markdown(self) -> str:
        """Return the table alone, without title, explanation and notes."""
        titles = [escaped_markdown(_title(column)) for column in self.columns]
        rules = [":--" if column.text else "--:" for column in self.columns]
        body = [[escaped_markdown(cell) for cell in row] for row in self._shown()]
        return "".join("| " + " | ".join(line) + " |\n" for line in (titles, rules, *body))

    def to_csv(self) -> str:
        """Return comma-separated values in full precision, with a column for each part."""
        titles = [
            f"{column.title}, {part}" if part else column.title
            for column in self.columns
            for part in column.form.parts
        ]
        rows = [
            [
                "" if _is_missing(part) else str(part)
                for column, cell in zip(self.columns, row, strict=True)
                for part in _parts(column, cell)
            ]
            for row in self.rows
        ]
        return csv_text([titles, *rows])

    def to_latex(self) -> str:
        """Return a ``table`` environment for the booktabs package."""
        titles = [_escaped_latex(_title(column)) for column in self.columns]
        body = [[_escaped_latex(cell) for cell in row] for row in self._shown()]
        notes = " ".join(f"{note}." for note in self.notes)
        caption = _escaped_latex(f"{self.title}. {self.explanation} {notes}".strip())
        lines = [
            r"\begin{table}",
            r"\centering",
            rf"\caption{{{caption}}}",
            rf"\label{{tab:{self.name.replace('_', '-')}}}",
            r"\begin{tabular}{" + "".join("l" if c.text else "r" for c in self.columns) + "}",
            r"\toprule",
            " & ".join(titles) + r" \\",
            r"\midrule",
            *(" & ".join(row) + r" \\" for row in body),
            r"\bottomrule",
            r"\end{tabular}",
            r"\end{table}",
        ]
        return "\n".join(lines) + "\n"

    def _shown(self) -> list[list[str]]:
        """Round cells, and blank those of groups that repeat."""
        shown = []
        above: list[str] = [""] * len(self.columns)
        for row in self.rows:
            cells = [_shown(column, cell) for column, cell in zip(self.columns, row, strict=True)]
            repeated = 0
            for column, cell, before in zip(self.columns, cells, above, strict=True):
                if not column.group or cell != before:
                    break
                repeated += 1
            shown.append([""] * repeated + cells[repeated:])
            above = cells
        return shown


def escaped_markdown(text: str) -> str:
    """Escape text so that Markdown shows it as it is."""
    return printable(text.translate(_MARKDOWN))


def _escaped_latex(text: str) -> str:
    return printable(text.replace("\n", " ")).translate(_LATEX)


def _title(column: Column) -> str:
    return f"{column.title} ({column.form.legend})" if column.form.legend else column.title


def _parts(column: Column, cell: Any) -> Sequence[Any]:
    return cell if isinstance(cell, tuple) else (cell,) * len(column.form.parts)


def _shown(column: Column, cell: Any) -> str:
    parts = _parts(column, cell)
    if all(map(_is_missing, parts)):
        return MISSING
    if column.text:
        return str(cell)
    if column.form is INTERVAL and _is_missing(parts[1]):
        return _number(parts[0], column, column.signed)
    numbers = [
        _number(part, column, column.signed and (column.form is not BESIDE or name == "difference"))
        for name, part in zip(column.form.parts, parts, strict=True)
    ]
    return column.form.pattern.format(*numbers)


def _number(value: Any, column: Column, signed: bool) -> str:
    if _is_missing(value):
        return MISSING
    rounded = round(float(value), column.digits) + 0.0  # + 0.0: no minus before a zero
    # A median of 34 is no 34.0, but 34 beside a standard deviation of 4.1 would look exact.
    whole = column.digits <= 1 and column.form is not SPREAD and rounded.is_integer()
    digits = 0 if whole else column.digits
    return f"{rounded:{'+' if signed else ''},.{digits}f}".replace("-", _MINUS)


def _is_missing(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))


# Heading -> names of tables, kinds of figures; a section without tables is left out.
_SECTIONS = {
    "How many dimensions an image needs, alone and in the basis of all": (
        ("ranks_last_layer",),
        ("shared_basis", "rank_histograms"),
    ),
    "Layer by layer": (
        ("ranks_by_layer", "shared_ranks_by_layer", "sep_by_layer"),
        ("layerwise_rank",),
    ),
    "How far subspaces rotate from image to image": (
        ("rotation",),
        ("rotation", "layerwise_rotation"),
    ),
    "How tokens spread their energy over channels": (
        ("sep_bandwidths", "sep_permutations"),
        ("sep",),
    ),
    "Side by side": (("comparison",), ("comparison",)),
    "Beside the paper": (("paper_ranks", "paper_bandwidths"), ()),
    "Skipped images": (("skipped_images",), ()),
}

_OF_THE_RUN = ("command", "compare_paper")  # settings that change no number
_HIDDEN = (*_OF_THE_RUN, "by_model")

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
        _listed("Settings", {name: v for name, v in settings.items() if name not in _HIDDEN}),
        _listed("Versions and machine", environment),
        *_sections(by_name, figures),
        "## Files",
        _files(tables, figures),
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
    if settings.get("centered"):
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


def _listed(title: str, values: Mapping[str, Any]) -> str:
    return "\n".join([f"{title}:\n", *(f"- {name}: {_code(v)}" for name, v in values.items())])


def _sections(tables: Mapping[str, Table], figures: Mapping[str, Sequence[str]]) -> Iterable[str]:
    for heading, (names, kinds) in _SECTIONS.items():
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


def _files(tables: Sequence[Table], figures: Mapping[str, Sequence[str]]) -> str:
    # `Report.save` removes files that the list of an earlier report names.
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
    yield "All settings:"
    lines = (f"  {_json(name)}: {_json(value)}" for name, value in settings.items())
    yield "```json\n{\n" + ",\n".join(lines) + "\n}\n```"


def _json(value: Any) -> str:
    return json.dumps(value, default=str, ensure_ascii=False)


def _code(value: Any) -> str:
    return "`" + printable(str(value).replace("`", "'").replace("\n", " ")) + "`"
