"""A table as Markdown, LaTeX and CSV; only the first two round."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from fastkd.utils.io import csv_text, printable

MISSING = "\u2013"  # an en dash
_MINUS = "\u2212"
_LATEX = str.maketrans(
    {
        "\\": r"\textbackslash{}",
        "&": r"\&",
        "%": r"\%",
        "$": r"\$",
        "#": r"\#",
        "_": r"\_",
        "{": r"\{",
        "}": r"\}",
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
    """How the parts of one cell are put together.

    Attributes:
        pattern: for readers, with a pair of braces for each part.
        parts: their names; programs get a column for each.
        legend: follows the column's title for readers.
    """

    pattern: str = "{}"
    parts: tuple[str, ...] = ("",)
    legend: str = ""


PLAIN = Form()
SPREAD = Form("{} ± {}", ("mean", "standard deviation"), "mean ± std")
INTERVAL = Form("{} [{}, {}]", ("", "lower end", "upper end"))
STATISTICS = Form("{} / {} / {}", ("mean", "median", "99th percentile"), "mean / median / p99")
BESIDE = Form("{} / {} / {}", ("ours", "published", "difference"))
ANGLES = Form("{} / {} / {}", ("first", "median", "last"), "first / median / last")


@dataclass(frozen=True)
class Column:
    """What one column holds.

    Attributes:
        title: with the unit in brackets, if it has one.
        digits: after the decimal point, for readers; with 1, whole numbers have none.
        form: how the parts of a cell are put together.
        text: cells are strings or None.
        group: for readers, left blank where this and all columns to the left repeat the row above.
        signed: numbers carry their sign; of numbers side by side, the difference does.
    """

    title: str
    digits: int = 1
    form: Form = PLAIN
    text: bool = False
    group: bool = False
    signed: bool = False


@dataclass(frozen=True)
class Table:
    """A table with its meaning.

    Attributes:
        name: of its files, and of its label in LaTeX.
        title: one line; the caption.
        explanation: a sentence or two: what the numbers are.
        columns: from left to right.
        rows: cells: text; a number or None; or a tuple of these, one for each part.
        notes: what a reader must know about single rows.
    """

    name: str
    title: str
    explanation: str
    columns: tuple[Column, ...]
    rows: list[tuple[Any, ...]]
    notes: list[str] = field(default_factory=list)

    def to_markdown(self) -> str:
        """A table of GitHub's Markdown, without title, explanation and notes."""
        titles = [escaped_markdown(_title(column)) for column in self.columns]
        rules = [":--" if column.text else "--:" for column in self.columns]
        body = [[escaped_markdown(cell) for cell in row] for row in self._shown()]
        return "".join("| " + " | ".join(line) + " |\n" for line in (titles, rules, *body))

    def to_csv(self) -> str:
        """Comma-separated values in full precision: a column for each part, no blanked groups."""
        rows = [[title for column in self.columns for title in _part_titles(column)]]
        for row in self.rows:
            pairs = zip(self.columns, row, strict=True)
            rows.append([_exact(p) for column, cell in pairs for p in _parts(column, cell)])
        return csv_text(rows)

    def to_latex(self) -> str:
        """A ``table`` environment for the booktabs package, with caption, label and notes."""
        titles = [_escaped_latex(_title(column)) for column in self.columns]
        body = [[_escaped_latex(cell) for cell in row] for row in self._shown()]
        notes = " ".join(f"{note}." for note in self.notes)
        caption = _escaped_latex(f"{self.title}. {self.explanation} {notes}".strip())
        return "\n".join(
            [
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
                "",
            ]
        )

    def _shown(self) -> list[list[str]]:
        """Cells as readers see them."""
        shown, above = [], None
        for row in self.rows:
            cells = [_shown(column, cell) for column, cell in zip(self.columns, row, strict=True)]
            shown.append(self._without_repeats(cells, above))
            above = cells
        return shown

    def _without_repeats(self, cells: list[str], above: list[str] | None) -> list[str]:
        kept, repeating = list(cells), above is not None
        for index, column in enumerate(self.columns):
            repeating = repeating and column.group and above is not None
            repeating = repeating and above is not None and cells[index] == above[index]
            if not repeating:
                break
            kept[index] = ""
        return kept


def escaped_markdown(text: str) -> str:
    """Text that Markdown shows as it is, in a table's cell as elsewhere."""
    return printable(text.translate(_MARKDOWN))


def _escaped_latex(text: str) -> str:
    return printable(text.replace("\n", " ")).translate(_LATEX)


def _title(column: Column) -> str:
    return f"{column.title} ({column.form.legend})" if column.form.legend else column.title


def _part_titles(column: Column) -> list[str]:
    return [f"{column.title}, {part}" if part else column.title for part in column.form.parts]


def _parts(column: Column, cell: Any) -> Sequence[Any]:
    return cell if isinstance(cell, tuple) else (cell,) * len(column.form.parts)


def _exact(value: Any) -> str:
    return "" if _absent(value) else str(value)


def _shown(column: Column, cell: Any) -> str:
    parts = _parts(column, cell)
    if all(map(_absent, parts)):
        return MISSING
    if column.text:
        return str(cell)
    if column.form is INTERVAL and _absent(parts[1]):
        return _number(parts[0], column, column.signed)
    # Of numbers side by side, only their difference has a sign worth showing.
    signed = [
        column.signed and (column.form is not BESIDE or part == "difference")
        for part in column.form.parts
    ]
    return column.form.pattern.format(
        *(_number(p, column, s) for p, s in zip(parts, signed, strict=True))
    )


def _number(value: Any, column: Column, signed: bool) -> str:
    if _absent(value):
        return MISSING
    rounded = round(float(value), column.digits) + 0.0  # + 0.0: no minus before a zero
    # A median of 34 is no 34.0, but 34 beside a standard deviation of 4.1 would look exact.
    whole = column.digits <= 1 and column.form is not SPREAD and rounded.is_integer()
    digits = 0 if whole else column.digits
    return f"{rounded:{'+' if signed else ''},.{digits}f}".replace("-", _MINUS)


def _absent(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))
