"""A table as Markdown, LaTeX and CSV; CSV keeps full precision."""

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
