"""`Report`: results with what they were measured on, and the folder that holds them.

``report.json`` and ``arrays.npz`` are the results, complete; ``report.md``, ``tables/`` and
``figures/`` are made from them and can be made again.
"""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import io
import json
import logging
import math
import os
import re
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fastkd.analysis import results as codec
from fastkd.analysis import results as readings
from fastkd.analysis.report import markdown
from fastkd.analysis.report.tables import all_tables
from fastkd.analysis.results import Distribution, LayerResult, ModelResult, Ranks, Subspaces
from fastkd.utils.io import read_json, replacing, write_text

FORMAT = "fastkd-analysis"
VERSION = 1

_log = logging.getLogger(__name__)

# Settings without which two numbers of the same name are different quantities.
_DEFINING = ("levels", "bandwidth_levels", "convention", "centred")
# Where a joined report keeps the settings in which its models differ.
_BY_MODEL = "by_model"


@dataclass(frozen=True, eq=False)
class Report:
    """What an analysis found, and on what.

    Attributes:
        models: one result for each model, in the order asked for.
        settings: plain values; ``"data"``, ``"images"``, ``"seed"``, ``"levels"``,
            ``"bandwidth_levels"``, ``"convention"``, ``"centred"``, ``"permutations"``,
            ``"compare_paper"`` and ``"command"`` have a meaning here, others are shown as they are.
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
        """Equal in every number and array; NaN equals NaN."""
        return isinstance(other, Report) and codec.same(vars(self), vars(other))

    __hash__ = None  # type: ignore[assignment]

    def save(self, folder: str | os.PathLike[str], figures: bool = True) -> Path:
        """Write everything into a folder; each file is whole or not there.

        The results come first: whatever stops the figures leaves them complete.

        Args:
            folder: made if it is not there. Files of an earlier report are replaced, and those that
                this one has no like of removed; files that no report has listed stay.
            figures: draw them, if matplotlib is installed; a warning is logged if it is not.

        Returns:
            The path of ``report.md``.
        """
        target = Path(folder)
        before = _listed_files(target)
        (target / "tables").mkdir(parents=True, exist_ok=True)
        self._save_results(target)
        tables = all_tables(
            self.models, self.settings, bool(self.settings.get("compare_paper", False))
        )
        for table in tables:
            write_text(target / "tables" / f"{table.name}.csv", table.to_csv())
            write_text(target / "tables" / f"{table.name}.tex", table.to_latex())
        drawn = _draw(self.models, target / "figures") if figures else {}
        text = markdown.render(self.models, self.settings, self.environment, tables, drawn)
        write_text(target / "report.md", text)
        for name in before - _listed_files(target):
            (target / name).unlink(missing_ok=True)
        return target / "report.md"

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> Report:
        """Read what `save` wrote: a report equal to the saved one.

        Args:
            folder: with ``report.json`` and ``arrays.npz``.

        Returns:
            The report.

        Raises:
            ValueError: a file is missing, torn, of another report or of something else; the
                message names it.
        """
        source = Path(folder) / "report.json"
        content = _read_json(source)
        if content.get("format") != FORMAT:
            raise ValueError(f"Report.load: {source} is no report of fastkd analyze")
        if content.get("version") != VERSION:
            raise ValueError(
                f"Report.load: {source} must be of version {VERSION}, got "
                f"{content.get('version')!r} (written by another release of fastkd?)"
            )
        arrays = _read_arrays(Path(folder) / "arrays.npz", content.get("arrays_sha256"))
        try:
            return codec.decode(cls, content.get("results"), arrays, "results")
        except ValueError as error:
            raise ValueError(f"Report.load: {source} is damaged: {error}") from error

    @classmethod
    def merged(cls, reports: Sequence[Report]) -> Report:
        """Join the models of several reports.

        What the reports were measured on may differ and is then kept by model; the second of two
        models of the same name gets " (2)".

        Args:
            reports: at least one.

        Returns:
            One report of all their models, in order.

        Raises:
            ValueError: no report, or reports that measured different quantities.
        """
        if not reports:
            raise ValueError("Report.merged: reports must hold at least one report, got none")
        check_comparable("Report.merged", [report.settings for report in reports])
        names = iter(_distinct([model.name for report in reports for model in report.models]))
        renamed = [
            (report, model, dataclasses.replace(model, name=next(names)))
            for report in reports
            for model in report.models
        ]
        settings = _joined([(new.name, _settings_of(r, old.name)) for r, old, new in renamed])
        environment = _joined_text([report.environment for report in reports])
        return cls([new for _, _, new in renamed], settings, environment)

    def __repr__(self) -> str:
        """Names, not arrays."""
        return f"Report({', '.join(model.name for model in self.models)})"

    def to_dict(self) -> dict[str, Any]:
        """The numbers of the report as plain values for JSON; NaN becomes None, arrays stay out."""
        return {
            "settings": codec.encode(self.settings, {}, "settings"),
            "environment": dict(self.environment),
            "models": [_model_numbers(model) for model in self.models],
        }

    def summary(self) -> str:
        """The few lines to read at the end of a run: a few for each model."""
        return "\n".join(line for model in self.models for line in _summary_lines(model))

    def _save_results(self, folder: Path) -> None:
        arrays: dict[str, np.ndarray] = {}
        results = codec.encode(self, arrays, "results")
        buffer = io.BytesIO()
        np.savez_compressed(buffer, **arrays)  # type: ignore[arg-type]
        with replacing(folder / "arrays.npz") as file:
            file.write(buffer.getvalue())
        content = {
            "format": FORMAT,
            "version": VERSION,
            # Two files cannot be replaced in one step: this tells whether they belong together.
            "arrays_sha256": hashlib.sha256(buffer.getvalue()).hexdigest(),
            **self.to_dict(),
            "results": results,
        }
        text = json.dumps(content, indent=1, allow_nan=False, ensure_ascii=False)
        write_text(folder / "report.json", text + "\n")


def _listed_files(folder: Path) -> set[str]:
    """Tables and figures that the report in a folder lists as its own."""
    path = folder / "report.md"
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    stems = re.findall(r"^- `((?:tables|figures)/[\w-]+)\.\w+`, `\.\w+`", text, re.MULTILINE)
    return {stem + suffix for stem in stems for suffix in (".csv", ".tex", ".png", ".pdf")}


def check_comparable(caller: str, settings: Sequence[Mapping[str, Any]]) -> None:
    """Refuse settings under which numbers of the same name are different quantities.

    Args:
        caller: named in the error.
        settings: of several reports.

    Raises:
        ValueError: two of them differ; it names the setting.
    """
    for name in _DEFINING:
        found = [plain.get(name) for plain in settings]
        if not all(codec.same(found[0], value) for value in found):
            got = " and ".join(sorted({repr(value) for value in found}))
            raise ValueError(f"{caller}: reports must have the same {name}, got {got}")


def _draw(models: Sequence[ModelResult], folder: Path) -> dict[str, list[str]]:
    """Figures by kind: file stems; none without matplotlib."""
    try:
        from fastkd.analysis.report import plots
    except ModuleNotFoundError as error:
        _log.warning("no figures: %s (pip install matplotlib)", error)
        return {}
    return plots.save_figures(models, folder)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return read_json(path)
    except FileNotFoundError:
        raise ValueError(
            f"Report.load: {path} does not exist (not a folder that fastkd analyze wrote?)"
        ) from None
    except (OSError, ValueError) as error:
        raise ValueError(f"Report.load: {path} cannot be read: {error}") from error


def _read_arrays(path: Path, sha256: object) -> dict[str, np.ndarray]:
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise ValueError(f"Report.load: {path} does not exist") from None
    if hashlib.sha256(data).hexdigest() != sha256:
        raise ValueError(
            f"Report.load: {path} is torn or belongs to another report.json (run the analysis "
            f"again, or copy both files)"
        )
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
            return dict(arrays)
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise ValueError(f"Report.load: {path} cannot be read: {error}") from error


def _distinct(names: Iterable[str]) -> list[str]:
    seen: collections.Counter[str] = collections.Counter()
    distinct = []
    for name in names:
        seen[name] += 1
        distinct.append(name if seen[name] == 1 else f"{name} ({seen[name]})")
    return distinct


def _settings_of(report: Report, model: str) -> dict[str, Any]:
    """The settings that one model was measured with, in a report that may be joined already."""
    common = {name: value for name, value in report.settings.items() if name != _BY_MODEL}
    by_model = report.settings.get(_BY_MODEL, {})
    return common | {name: values[model] for name, values in by_model.items() if model in values}


def _joined(settings: list[tuple[str, dict[str, Any]]]) -> dict[str, Any]:
    """Settings that all models share as they are, the others by model."""
    names = dict.fromkeys(name for _, own in settings for name in own)
    common: dict[str, Any] = {}
    by_model: dict[str, dict[str, Any]] = {}
    for name in names:
        values = [own.get(name) for _, own in settings]
        if all(codec.same(values[0], value) for value in values):
            common[name] = values[0]
        else:
            by_model[name] = {model: own[name] for model, own in settings if name in own}
    return common | ({_BY_MODEL: by_model} if by_model else {})


def _joined_text(environments: Sequence[Mapping[str, str]]) -> dict[str, str]:
    names = dict.fromkeys(name for environment in environments for name in environment)
    return {
        name: "; ".join(dict.fromkeys(e[name] for e in environments if name in e)) for name in names
    }


def _model_numbers(model: ModelResult) -> dict[str, Any]:
    return {
        "name": model.name,
        "weights": model.weights,
        "architecture": model.architecture,
        "parameters": model.parameters,
        "images": model.images,
        "non_finite": model.non_finite,
        "skipped": len(model.skipped),
        "layers": [_layer_numbers(layer) for layer in model.layers],
    }


def _layer_numbers(layer: LayerResult) -> dict[str, Any]:
    numbers: dict[str, Any] = {
        "name": layer.name,
        "tokens": layer.tokens,
        "channels": layer.channels,
        "ranks": _rank_numbers(layer.ranks),
        "effective_rank": _plain(Distribution.of(layer.effective_rank)),
        "stable_rank": _plain(Distribution.of(layer.stable_rank)),
    }
    if layer.sep:
        widths = layer.sep.bandwidths.tolist()
        noise = readings.white_noise_bandwidths(layer.sep).tolist()
        numbers["sep"] = {
            "convention": layer.sep.convention,
            "bandwidths": _by_level(layer.sep.levels, widths),
            "white_noise": _by_level(layer.sep.levels, noise),
        }
    if layer.sep_test:
        numbers["sep_test"] = {
            "shift": _by_level(layer.sep_test.levels, layer.sep_test.shift.tolist()),
            "p_value": _by_level(layer.sep_test.levels, layer.sep_test.p_value.tolist()),
        }
    if layer.shared:
        numbers["shared_ranks"] = _rank_numbers(layer.shared.ranks)
        numbers["rotation"] = [_rotation_numbers(found) for found in layer.shared.rotation]
    return numbers


def _rank_numbers(ranks: Ranks) -> dict[str, Any]:
    return {f"{level:g}": _plain(ranks.distribution(level)) for level in ranks.levels}


def _rotation_numbers(found: Subspaces) -> dict[str, Any]:
    return {
        "k": found.k,
        "overlap_shared": _plain(Distribution.of(found.overlap_shared)),
        "overlap_pairs": _plain(Distribution.of(found.overlap_pairs)),
        "overlap_random": found.overlap_random,
    }


def _by_level(levels: Sequence[float], values: Sequence[float]) -> dict[str, float | None]:
    pairs = zip(levels, values, strict=True)
    return {f"{level:g}": value if math.isfinite(value) else None for level, value in pairs}


def _plain(found: Distribution) -> dict[str, float | None]:
    named = dataclasses.asdict(found)
    return {name: value if math.isfinite(value) else None for name, value in named.items()}


def _summary_lines(model: ModelResult) -> Iterable[str]:
    last, weights = model.last, model.weights
    if weights == readings.UNTRAINED:
        weights = "UNTRAINED weights"
    yield (
        f"{model.name} ({weights}): {model.images:,} images, {last.name} with N = {last.tokens}, "
        f"D = {last.channels}"
    )
    level = max(last.ranks.levels)
    own = _rank_text(last.ranks, level)
    shared = f"; in the shared basis {_rank_text(last.shared.ranks, level)}" if last.shared else ""
    yield f"  rank@{readings.percent(level)}, mean (p99) over images: {own}{shared}"
    if last.shared and last.shared.rotation:
        yield "  overlap with the shared subspace (random): " + ", ".join(
            f"k = {found.k}: {Distribution.of(found.overlap_shared).mean:.3f} "
            f"({found.overlap_random:.3f})"
            for found in last.shared.rotation
        )
    if last.sep:
        noise = readings.white_noise_bandwidths(last.sep)
        yield f"  SEP bandwidth, {last.sep.convention} (white noise): " + ", ".join(
            f"{readings.percent(level)} %: {width:.3f} ({white:.3f})"
            for level, width, white in zip(last.sep.levels, last.sep.bandwidths, noise, strict=True)
        )
    if model.skipped or model.non_finite:
        skipped = f"  images skipped: {len(model.skipped):,}"
        yield f"{skipped}; with a NaN or infinity: {model.non_finite:,}"


def _rank_text(ranks: Ranks, level: float) -> str:
    found = ranks.distribution(level)
    return f"{found.mean:.1f} ({found.percentile_99:.1f})"
