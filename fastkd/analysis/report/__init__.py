"""`Report`: results, what they were measured on, and the folder that holds them."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import hashlib
import io
import json
import logging
import math
import os
import re
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fastkd.analysis.report.tables import all_tables
from fastkd.analysis.report.text import render
from fastkd.analysis.results import (
    UNTRAINED,
    Distribution,
    LayerResult,
    ModelResult,
    Ranks,
    decode,
    encode,
    percent,
    same,
)
from fastkd.utils.io import read_json, replacing, write_text

FORMAT = "fastkd-analysis"
VERSION = 1

_log = logging.getLogger(__name__)

# Settings without which two numbers of the same name are different quantities.
_DEFINING = ("levels", "bandwidth_levels", "convention", "centered")
# Key of the settings in which the models of a merged report differ.
_BY_MODEL = "by_model"


@dataclass(frozen=True, eq=False)
class Report:
    """Results of an analysis, and what they were measured on.

    Attributes:
        models: one result per model, in the order asked for.
        settings: plain values. ``"data"``, ``"images"``, ``"seed"``, ``"levels"``,
            ``"bandwidth_levels"``, ``"convention"``, ``"centered"``, ``"permutations"``,
            ``"compare_paper"`` and ``"command"`` are read here; others are only shown.
        environment: versions and machine.

    Raises:
        ValueError: there is no model.
    """

    models: list[ModelResult]
    settings: dict[str, Any]
    environment: dict[str, str]

    def __post_init__(self) -> None:
        if not self.models:
            raise ValueError("Report: models must hold at least one result, got none")

    def __eq__(self, other: object) -> bool:
        """Compare all numbers and arrays; NaN equals NaN."""
        return isinstance(other, Report) and same(self, other)

    def __repr__(self) -> str:
        return f"Report({', '.join(model.name for model in self.models)})"

    def save(self, folder: str | os.PathLike[str], figures: bool = True) -> Path:
        """Write everything into a folder; each file is written completely or not at all.

        Args:
            folder: made if needed. Files of an earlier report are replaced or removed; files that
                no report has listed stay.
            figures: draw them. Without matplotlib, a warning is logged instead.

        Returns:
            The path of ``report.md``.
        """
        target = Path(folder)
        before = _listed_files(target)
        (target / "tables").mkdir(parents=True, exist_ok=True)
        self._save_results(target)  # first: an error in the figures leaves them complete
        compare_paper = bool(self.settings.get("compare_paper", False))
        tables = all_tables(self.models, self.settings, compare_paper)
        for table in tables:
            write_text(target / "tables" / f"{table.name}.csv", table.to_csv())
            write_text(target / "tables" / f"{table.name}.tex", table.to_latex())
        drawn = _draw(self.models, target / "figures") if figures else {}
        text = render(self.models, self.settings, self.environment, tables, drawn)
        write_text(target / "report.md", text)
        for name in before - _listed_files(target):
            (target / name).unlink(missing_ok=True)
        return target / "report.md"

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> Report:
        """Read a report that `save` wrote.

        Args:
            folder: with ``report.json`` and ``arrays.npz``.

        Returns:
            A report equal to the saved one.

        Raises:
            ValueError: a file is missing, torn, from another report or of another kind.
        """
        source = Path(folder) / "report.json"
        with _reading(source):
            content = read_json(source)
        if content.get("format") != FORMAT:
            raise ValueError(f"Report.load: {source} is no report of fastkd analyze")
        if content.get("version") != VERSION:
            raise ValueError(
                f"Report.load: {source} must be of version {VERSION}, got "
                f"{content.get('version')!r} (written by another release of fastkd?)"
            )
        path = Path(folder) / "arrays.npz"
        with _reading(path):
            data = path.read_bytes()
            if hashlib.sha256(data).hexdigest() != content.get("arrays_sha256"):
                raise ValueError(
                    "it is torn or belongs to another report.json (run the analysis again, or copy "
                    "both files)"
                )
            with np.load(io.BytesIO(data), allow_pickle=False) as found:
                arrays = dict(found)
        try:
            return decode(cls, content.get("results"), arrays)
        except ValueError as error:
            raise ValueError(f"Report.load: {source} is damaged: {error}") from error

    @classmethod
    def merged(cls, reports: Sequence[Report]) -> Report:
        """Join the models of several reports.

        Settings in which the models differ are kept per model. The second of two models of the same
        name gets " (2)".

        Args:
            reports: at least one.

        Returns:
            One report of all their models, in order.

        Raises:
            ValueError: no report, or reports of different quantities.
        """
        if not reports:
            raise ValueError("Report.merged: reports must hold at least one report, got none")
        check_comparable("Report.merged", [report.settings for report in reports])
        seen: collections.Counter[str] = collections.Counter()
        models, settings = [], []
        for report in reports:
            for model in report.models:
                seen[model.name] += 1
                count = seen[model.name]
                name = model.name if count == 1 else f"{model.name} ({count})"
                models.append(dataclasses.replace(model, name=name))
                settings.append((name, _settings_of(report, model.name)))
        environment: dict[str, list[str]] = {}
        for report in reports:
            for key, value in report.environment.items():
                environment.setdefault(key, []).append(value)
        joined = {key: "; ".join(dict.fromkeys(found)) for key, found in environment.items()}
        return cls(models, _joined(settings), joined)

    def to_dict(self) -> dict[str, Any]:
        """Return the numbers as plain values for JSON, without arrays; NaN becomes None."""
        return {
            "settings": encode(self.settings, {}, "settings"),
            "environment": dict(self.environment),
            "models": [_model_numbers(model) for model in self.models],
        }

    def summary(self) -> str:
        """Return a few lines for each model, as printed at the end of a run."""
        return "\n".join(line for model in self.models for line in _summary_lines(model))

    def _save_results(self, folder: Path) -> None:
        arrays: dict[str, np.ndarray] = {}
        results = encode(self, arrays, "results")
        buffer = io.BytesIO()
        np.savez_compressed(buffer, **arrays)  # type: ignore[arg-type]
        with replacing(folder / "arrays.npz") as file:
            file.write(buffer.getvalue())
        content = {
            "format": FORMAT,
            "version": VERSION,
            # Two files cannot be replaced in one step: the hash shows whether they belong together.
            "arrays_sha256": hashlib.sha256(buffer.getvalue()).hexdigest(),
            **self.to_dict(),
            "results": results,
        }
        text = json.dumps(content, indent=1, allow_nan=False, ensure_ascii=False)
        write_text(folder / "report.json", text + "\n")


def check_comparable(caller: str, settings: Sequence[Mapping[str, Any]]) -> None:
    """Raise if the settings make numbers of the same name different quantities."""
    for name in _DEFINING:
        found = [plain.get(name) for plain in settings]
        if not all(same(found[0], value) for value in found):
            got = " and ".join(sorted({repr(value) for value in found}))
            raise ValueError(f"{caller}: reports must have the same {name}, got {got}")


def _listed_files(folder: Path) -> set[str]:
    """Return the tables and figures that the report.md in a folder lists."""
    path = folder / "report.md"
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    stems = re.findall(r"^- `((?:tables|figures)/[\w-]+)\.\w+`, `\.\w+`", text, re.MULTILINE)
    return {stem + suffix for stem in stems for suffix in (".csv", ".tex", ".png", ".pdf")}


def _draw(models: Sequence[ModelResult], folder: Path) -> dict[str, list[str]]:
    """Draw figures: kind -> file stems; none without matplotlib."""
    try:
        from fastkd.analysis.report import plots
    except ModuleNotFoundError as error:
        _log.warning("no figures: %s (pip install matplotlib)", error)
        return {}
    return plots.save_figures(models, folder)


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise ValueError(f"Report.load: {path} cannot be read: {error}") from error


def _settings_of(report: Report, model: str) -> dict[str, Any]:
    """Return the settings of one model in a report that may be merged already."""
    common = {name: value for name, value in report.settings.items() if name != _BY_MODEL}
    by_model = report.settings.get(_BY_MODEL, {})
    return common | {name: values[model] for name, values in by_model.items() if model in values}


def _joined(settings: list[tuple[str, dict[str, Any]]]) -> dict[str, Any]:
    """Keep settings that all models share as they are, and the others by model."""
    common: dict[str, Any] = {}
    by_model: dict[str, dict[str, Any]] = {}
    for name in dict.fromkeys(name for _, own in settings for name in own):
        values = [own.get(name) for _, own in settings]
        if all(same(values[0], value) for value in values):
            common[name] = values[0]
        else:
            by_model[name] = {model: own[name] for model, own in settings if name in own}
    return common | ({_BY_MODEL: by_model} if by_model else {})


def _model_numbers(model: ModelResult) -> dict[str, Any]:
    plain = ("name", "weights", "architecture", "parameters", "images", "non_finite")
    return {
        **{name: getattr(model, name) for name in plain},
        "skipped": len(model.skipped),
        "layers": [_layer_numbers(layer) for layer in model.layers],
    }


def _layer_numbers(layer: LayerResult) -> dict[str, Any]:
    numbers: dict[str, Any] = {
        "name": layer.name,
        "tokens": layer.tokens,
        "channels": layer.channels,
        "ranks": _rank_numbers(layer.ranks),
        "effective_rank": _statistics(layer.effective_rank),
        "stable_rank": _statistics(layer.stable_rank),
    }
    if layer.sep:
        numbers["sep"] = {
            "convention": layer.sep.convention,
            "bandwidths": _by_level(layer.sep.levels, layer.sep.bandwidths),
            "white_noise": _by_level(layer.sep.levels, layer.sep.white_noise_bandwidths),
        }
    if layer.sep_test:
        numbers["sep_test"] = {
            "shift": _by_level(layer.sep_test.levels, layer.sep_test.shift),
            "p_value": _by_level(layer.sep_test.levels, layer.sep_test.p_value),
        }
    if layer.shared:
        numbers["shared_ranks"] = _rank_numbers(layer.shared.ranks)
        numbers["rotation"] = [
            {
                "k": found.k,
                "overlap_shared": _statistics(found.overlap_shared),
                "overlap_pairs": _statistics(found.overlap_pairs),
                "overlap_random": found.overlap_random,
            }
            for found in layer.shared.rotation
        ]
    return numbers


def _rank_numbers(ranks: Ranks) -> dict[str, Any]:
    return {f"{level:g}": _statistics(ranks.at(level)) for level in ranks.levels}


def _statistics(values: np.ndarray) -> dict[str, float | None]:
    return _plain(dataclasses.asdict(Distribution.of(values)))


def _by_level(levels: Sequence[float], values: np.ndarray) -> dict[str, float | None]:
    pairs = zip(levels, values.tolist(), strict=True)
    return _plain({f"{level:g}": value for level, value in pairs})


def _plain(named: Mapping[str, float]) -> dict[str, float | None]:
    return {name: value if math.isfinite(value) else None for name, value in named.items()}


def _summary_lines(model: ModelResult) -> Iterable[str]:
    last = model.last
    weights = "UNTRAINED weights" if model.weights == UNTRAINED else model.weights
    yield (
        f"{model.name} ({weights}): {model.images:,} images, {last.name} with N = {last.tokens}, "
        f"D = {last.channels}"
    )
    level = max(last.ranks.levels)
    own = _rank_text(last.ranks, level)
    shared = f"; in the shared basis {_rank_text(last.shared.ranks, level)}" if last.shared else ""
    yield f"  rank@{percent(level)}, mean (p99) over images: {own}{shared}"
    if last.rotation:
        yield "  overlap with the shared subspace (random): " + ", ".join(
            f"k = {found.k}: {Distribution.of(found.overlap_shared).mean:.3f} "
            f"({found.overlap_random:.3f})"
            for found in last.rotation
        )
    if last.sep:
        noise = last.sep.white_noise_bandwidths
        yield f"  SEP bandwidth, {last.sep.convention} (white noise): " + ", ".join(
            f"{percent(level)} %: {width:.3f} ({white:.3f})"
            for level, width, white in zip(last.sep.levels, last.sep.bandwidths, noise, strict=True)
        )
    if model.skipped or model.non_finite:
        skipped = f"images skipped: {len(model.skipped):,}"
        yield f"  {skipped}; with a NaN or infinity: {model.non_finite:,}"


def _rank_text(ranks: Ranks, level: float) -> str:
    found = ranks.distribution(level)
    return f"{found.mean:.1f} ({found.percentile_99:.1f})"
