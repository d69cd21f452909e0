"""The tables of a report: what their columns mean and what their rows hold."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from fastkd.analysis.report.published import paper_bandwidths, paper_ranks
from fastkd.analysis.report.text import (
    ANGLES,
    INTERVAL,
    SPREAD,
    STATISTICS,
    Column,
    Table,
)
from fastkd.analysis.results import (
    Distribution,
    LayerResult,
    ModelResult,
    Ranks,
    bandwidth_levels_of,
    excess_overlap,
    has_shared_depth,
    levels_of,
    measured,
    percent,
    subspace_sizes_of,
)

Row = tuple[Any, ...]

_MODEL = Column("Model", text=True, group=True)
_LAYER_COLUMNS = (_MODEL, Column("Layer", text=True), Column("N", 0), Column("D", 0))
_NONE = (None,) * 3  # a cell of three parts without a number


def all_tables(
    models: Sequence[ModelResult], settings: Mapping[str, Any], compare_paper: bool = False
) -> list[Table]:
    """Make every table that the results have rows for, in the order of a report."""
    tables = [
        models_table(models),
        last_layer_ranks(models),
        layer_ranks(models),
        sep_bandwidths(models),
        sep_permutations(models),
        rotation(models),
    ]
    # Of the last layer alone, these two would repeat tables above.
    if any(map(has_shared_depth, models)):
        tables.append(shared_layer_ranks(models))
    if any(layer.sep for model in models for layer in model.layers[:-1]):
        tables.append(sep_by_layer(models))
    if len(models) > 1:
        tables.append(comparison(models))
    if compare_paper:
        tables += [paper_ranks(models, settings), paper_bandwidths(models, settings)]
    tables.append(skipped_images(models))
    return [table for table in tables if table.rows]


def models_table(models: Sequence[ModelResult]) -> Table:
    """List the models, one row each."""
    columns = (
        Column("Model", text=True),
        Column("Weights", text=True),
        Column("Architecture", text=True),
        Column("Parameters (millions)", 2),
        Column("Input (pixels)", text=True),
        Column("Layers", 0),
        Column("Last layer", text=True),
        Column("Tokens N", 0),
        Column("Channels D", 0),
        Column("Images", 0),
        Column("Images with NaN or infinity", 0),
        Column("Images skipped", 0),
        Column("Forward (s)"),
        Column("Analysis (s)"),
    )
    rows = [
        (
            model.name,
            model.weights,
            model.architecture or None,
            _millions(model),
            "{} x {}".format(*model.input_size) if model.input_size else None,
            len(model.layers),
            model.last.name,
            model.last.tokens,
            model.last.channels,
            model.images,
            model.non_finite,
            len(model.skipped),
            model.seconds.get("forward"),
            model.seconds.get("analysis"),
        )
        for model in models
    ]
    return Table(
        "models",
        "Models analyzed",
        "At the last layer, an image has N tokens of D channels, without prefix tokens.",
        columns,
        rows,
    )


def last_layer_ranks(models: Sequence[ModelResult]) -> Table:
    """Ranks of the last layer in each image's own basis and in the shared one."""
    columns = (
        _MODEL,
        Column("N", 0, group=True),
        Column("D", 0, group=True),
        Column("Basis", text=True, group=True),
        Column("Energy (%)", 1),
        Column("Rank", 1, SPREAD),
        Column("Rank, median"),
        Column("Rank, 99th percentile"),
        Column("Images", 0),
    )
    rows = []
    for model in models:
        last = model.last
        for basis, ranks in last.bases():
            for level in ranks.levels:
                found = ranks.distribution(level)
                row = (model.name, last.tokens, last.channels, basis, 100 * level, _spread(found))
                count = len(ranks.at(level))
                rows.append((*row, found.median, found.percentile_99, count))
    return Table(
        "ranks_last_layer",
        "Ranks of the last layer",
        "Number of dimensions that hold a fraction of an image's energy, in the image's own best "
        "basis (SVD) and in the basis that all images share. Statistics are over images; the "
        "paper's tables print the 99th percentile.",
        columns,
        rows,
    )


def layer_ranks(models: Sequence[ModelResult]) -> Table:
    """Per-image ranks of every layer, with effective and stable rank."""
    levels = levels_of(layer for model in models for layer in model.layers)
    rows = [
        (
            *_layer_cells(model, layer),
            *(_statistics(layer.ranks, level) for level in levels),
            _spread(Distribution.of(layer.effective_rank)),
            _spread(Distribution.of(layer.stable_rank)),
        )
        for model in models
        for layer in model.layers
    ]
    return Table(
        "ranks_by_layer",
        "Per-image ranks by layer",
        "rank@q: number of dimensions that hold q % of an image's energy in its own basis. "
        "Effective rank: exponential of the entropy of the normalized singular values. Stable "
        "rank: total energy over the largest. Statistics are over images; p99 is the 99th "
        "percentile.",
        (
            *_LAYER_COLUMNS,
            *_rank_columns(levels),
            Column("Effective rank", 1, SPREAD),
            Column("Stable rank", 2, SPREAD),
        ),
        rows,
    )


def shared_layer_ranks(models: Sequence[ModelResult]) -> Table:
    """Ranks in the shared basis of every layer that has one."""
    found = [(model, one, one.shared) for model in models for one in model.layers if one.shared]
    levels = levels_of(layer for _, layer, _ in found)
    rows = [
        (*_layer_cells(model, layer), *(_statistics(shared.ranks, level) for level in levels))
        for model, layer, shared in found
    ]
    return Table(
        "shared_ranks_by_layer",
        "Ranks in the shared basis by layer",
        "rank@q: number of dimensions that hold q % of an image's energy in the basis that all "
        "images share at this layer. Statistics are over images; p99 is the 99th percentile.",
        (*_LAYER_COLUMNS, *_rank_columns(levels)),
        rows,
    )


def sep_by_layer(models: Sequence[ModelResult]) -> Table:
    """SEP bandwidths of every layer."""
    found = [(model, one, one.sep) for model in models for one in model.layers if one.sep]
    levels = bandwidth_levels_of(layer for _, layer, _ in found)
    rows = [
        (*_layer_cells(model, layer), sep.convention, *map(layer.bandwidths().get, levels))
        for model, layer, sep in found
    ]
    return Table(
        "sep_by_layer",
        "SEP bandwidths by layer",
        "b(q): fraction of the channel frequencies that holds q % of the mean token's energy.",
        (
            *_LAYER_COLUMNS,
            Column("Convention", text=True),
            *(Column(f"b({percent(level)} %)", 3) for level in levels),
        ),
        rows,
    )


def sep_bandwidths(models: Sequence[ModelResult]) -> Table:
    """SEP bandwidths of the last layer beside those of white noise."""
    found = [(model, model.last.sep) for model in models if model.last.sep]
    levels = bandwidth_levels_of(model.last for model, _ in found)
    columns = (
        _MODEL,
        Column("Convention", text=True, group=True),
        Column("D", 0, group=True),
        Column("Tokens", 0, group=True),
        Column("Signal", text=True),
        *(Column(f"b({percent(level)} %)", 3, INTERVAL) for level in levels),
    )
    rows: list[Row] = []
    for model, sep in found:
        test, ends = model.last.sep_test, {}
        if test is not None:
            ends = dict(zip(test.levels, test.observed_interval.tolist(), strict=True))
        noise = dict(zip(sep.levels, sep.white_noise_bandwidths.tolist(), strict=True))
        widths = model.last.bandwidths()
        ours = [(widths.get(q), *ends.get(q, (None, None))) for q in levels]
        start = (model.name, sep.convention, model.last.channels, sep.tokens)
        rows.append((*start, "tokens", *ours))
        rows.append((*start, "white noise", *((noise.get(q), None, None) for q in levels)))
    symmetric = (
        " In full order, the spectrum of a real signal is symmetric: b(50 %) is 0.5 by "
        "construction, apart from the energy of the mean over channels."
        if any(sep.convention == "full" for _, sep in found)
        else ""
    )
    return Table(
        "sep_bandwidths",
        "Token spectral energy patterns (SEP)",
        "b(q): fraction of the channel frequencies, from the lowest, that holds q % of the mean "
        "token's energy. White noise is what channels without any order give. Intervals are "
        "bootstrapped over images." + symmetric,
        columns,
        rows,
        [
            f"{model.name}: {sep.without_energy:,} tokens without energy left out"
            for model, sep in found
            if sep.without_energy
        ],
    )


def sep_permutations(models: Sequence[ModelResult]) -> Table:
    """SEP bandwidths under random permutations of the channels."""
    columns = (
        _MODEL,
        Column("Layer", text=True, group=True),
        Column("Energy (%)", 1),
        Column("b observed", 4, INTERVAL),
        Column("b permuted", 4, SPREAD),
        Column("Shift", 4, INTERVAL, signed=True),
        Column("p", 3),
        Column("Permutations", 0),
    )
    tested = [
        (model, one, one.sep_test) for model in models for one in model.layers if one.sep_test
    ]
    rows = [
        (
            model.name,
            layer.name,
            100 * level,
            (float(test.observed[index]), *test.observed_interval[index].tolist()),
            _spread(Distribution.of(test.permuted[:, index])),
            (float(test.shift[index]), *test.shift_interval[index].tolist()),
            float(test.p_value[index]),
            len(test.permuted),
        )
        for model, layer, test in tested
        for index, level in enumerate(test.levels)
    ]
    confidences = sorted({test.confidence for _, _, test in tested})
    shown = " and ".join(f"{100 * confidence:g} %" for confidence in confidences)
    return Table(
        "sep_permutations",
        "SEP bandwidths under random permutations of the channels",
        f"Shift: permuted minus observed, read between bins. Intervals hold {shown} of the "
        "bootstrap samples: over images for the observed bandwidth, over images and permutations "
        "for the mean shift. p: how often a single random order is as far from the mean of all as "
        "the observed one, at least 1 / (1 + permutations); a small p means that the order of the "
        "channels matters.",
        columns,
        rows,
    )


def rotation(models: Sequence[ModelResult]) -> Table:
    """How far images' own top-k subspaces are rotated against the shared one and each other."""
    columns = (
        _MODEL,
        Column("Layer", text=True, group=True),
        Column("D", 0, group=True),
        Column("k", 0),
        Column("Overlap with shared", 3, SPREAD),
        Column("Overlap between pairs", 3, SPREAD),
        Column("Random k/D", 3),
        Column("Excess with shared", 3, SPREAD),
        Column("Excess between pairs", 3, SPREAD),
        Column("Angles to shared (°)", 1, ANGLES),
        Column("Angles between pairs (°)", 1, ANGLES),
        Column("Angles at random (°)", 1, ANGLES),
        Column("Images", 0),
        Column("Pairs", 0),
    )
    rows, notes = [], []
    for model in models:
        for layer, found in ((one, found) for one in model.layers for found in one.rotation):
            overlaps = [measured(o) for o in (found.overlap_shared, found.overlap_pairs)]
            excesses = [np.asarray(excess_overlap(o, found.overlap_random)) for o in overlaps]
            angles = found.angles_shared, found.angles_pairs, found.angles_random
            row = (
                model.name,
                layer.name,
                layer.channels,
                found.k,
                *(_spread(Distribution.of(overlap)) for overlap in overlaps),
                found.overlap_random,
                *(_spread(Distribution.of(excess)) for excess in excesses),
                *map(_first_median_last, angles),
                *map(len, overlaps),
            )
            rows.append(row)
            if missing := int(np.isnan(found.overlap_shared).sum()):
                notes.append(
                    f"{model.name}, {layer.name}: {missing:,} images of rank below k = {found.k} "
                    "left out"
                )
    return Table(
        "rotation",
        "Rotation of subspaces",
        "Overlap: mean squared cosine of the principal angles between top-k right-singular "
        "subspaces, of each image with the subspace that all images share, and between random "
        "pairs of images; 1 for equal subspaces, k/D on average for random ones. The shared "
        "subspace is computed from the same images: with few images, the overlap with it is above "
        "k/D even for noise, unlike that between pairs. Excess: (overlap - k/D) / (1 - k/D). "
        "Angles are mean principal angles in degrees: first, median and last of the k.",
        columns,
        rows,
        notes,
    )


def comparison(models: Sequence[ModelResult]) -> Table:
    """All models side by side: width, ranks in both bases, rotation and bandwidth."""
    sizes = subspace_sizes_of(model.last for model in models)
    highest = max(levels_of(model.last for model in models))
    levels = bandwidth_levels_of(model.last for model in models)
    at = f"rank@{percent(highest)}"
    columns = (
        Column("Model", text=True),
        Column("Weights", text=True),
        Column("Parameters (millions)", 2),
        Column("D", 0),
        Column(f"{at}, own basis", 1, STATISTICS),
        Column(f"{at}, shared basis", 1, STATISTICS),
        Column("Effective rank, mean"),
        *(Column(f"Excess overlap with shared, k = {size}, mean", 3) for size in sizes),
        *(Column(f"Excess overlap between pairs, k = {size}, mean", 3) for size in sizes),
        *(Column(f"b({percent(level)} %)", 3) for level in levels),
    )
    rows = []
    for model in models:
        last = model.last
        excess = {found.k: found.mean_excess(found.overlap_shared) for found in last.rotation}
        between = {found.k: found.mean_excess(found.overlap_pairs) for found in last.rotation}
        row = (
            model.name,
            model.weights,
            _millions(model),
            last.channels,
            _statistics(last.ranks, highest),
            _statistics(last.shared.ranks, highest) if last.shared else _NONE,
            Distribution.of(last.effective_rank).mean,
            *map(excess.get, sizes),
            *map(between.get, sizes),
            *map(last.bandwidths().get, levels),
        )
        rows.append(row)
    return Table(
        "comparison",
        "Models side by side, last layer",
        "Ranks are over images; p99 is their 99th percentile. Excess overlap: 0 on average for "
        "random subspaces, 1 for equal ones; that with the shared subspace is above 0 even for "
        "noise if images are few. b(q): SEP bandwidth. D differs between models, and no rank is "
        "above D.",
        columns,
        rows,
    )


def skipped_images(models: Sequence[ModelResult]) -> Table:
    """Images that could not be read, by name."""
    return Table(
        "skipped_images",
        "Images that could not be read",
        "They are in none of the numbers.",
        (_MODEL, Column("Image", text=True), Column("Reason", text=True)),
        [(model.name, name, reason) for model in models for name, reason in model.skipped],
    )


def _layer_cells(model: ModelResult, layer: LayerResult) -> Row:
    return model.name, layer.name, layer.tokens, layer.channels


def _rank_columns(levels: Iterable[float]) -> Iterator[Column]:
    return (Column(f"rank@{percent(level)}", 1, STATISTICS) for level in levels)


def _millions(model: ModelResult) -> float | None:
    return None if model.parameters is None else model.parameters / 1e6


def _statistics(ranks: Ranks, level: float) -> tuple[float | None, ...]:
    if level not in ranks.levels:
        return _NONE
    found = ranks.distribution(level)
    return found.mean, found.median, found.percentile_99


def _spread(found: Distribution) -> tuple[float, float]:
    return found.mean, found.std


def _first_median_last(angles: np.ndarray) -> tuple[float | None, ...]:
    if len(angles) == 0:  # no pair of images was compared
        return _NONE
    return float(angles[0]), float(np.median(angles)), float(angles[-1])
