"""The tables of a report: what their columns mean and what their rows hold."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from fastkd.analysis.report.published import paper_bandwidths, paper_ranks
from fastkd.analysis.report.text import ANGLES, INTERVAL, SPREAD, STATISTICS, Column, Table
from fastkd.analysis.results import (
    Distribution,
    LayerResult,
    ModelResult,
    Ranks,
    bandwidth_levels_of,
    excess_overlap,
    has_shared_depth,
    measured,
    percent,
    subspace_sizes_of,
)

ColumnOfCells = tuple[Column, Sequence[Any]]

_MODEL = Column("Model", text=True, group=True)
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
    sizes = ["{} x {}".format(*m.input_size) if m.input_size else None for m in models]
    columns: list[ColumnOfCells] = [
        (Column("Model", text=True), [model.name for model in models]),
        (Column("Weights", text=True), [model.weights for model in models]),
        (Column("Architecture", text=True), [model.architecture or None for model in models]),
        (Column("Parameters (millions)", 2), [_millions(model) for model in models]),
        (Column("Input (pixels)", text=True), sizes),
        (Column("Layers", 0), [len(model.layers) for model in models]),
        (Column("Last layer", text=True), [model.last.name for model in models]),
        (Column("Tokens N", 0), [model.last.tokens for model in models]),
        (Column("Channels D", 0), [model.last.channels for model in models]),
        (Column("Images", 0), [model.images for model in models]),
        (Column("Images with NaN or infinity", 0), [model.non_finite for model in models]),
        (Column("Images skipped", 0), [len(model.skipped) for model in models]),
        (Column("Forward (s)"), [model.seconds.get("forward") for model in models]),
        (Column("Analysis (s)"), [model.seconds.get("analysis") for model in models]),
    ]
    return _table(
        "models",
        "Models analyzed",
        "At the last layer, an image has N tokens of D channels, without prefix tokens.",
        columns,
    )


def last_layer_ranks(models: Sequence[ModelResult]) -> Table:
    """Ranks of the last layer in each image's own basis and in the shared one."""
    found = [
        (model, basis, 100 * level, ranks.distribution(level), len(ranks.at(level)))
        for model in models
        for basis, ranks in model.last.bases()
        for level in ranks.levels
    ]
    columns: list[ColumnOfCells] = [
        (_MODEL, [model.name for model, *_ in found]),
        (Column("N", 0, group=True), [model.last.tokens for model, *_ in found]),
        (Column("D", 0, group=True), [model.last.channels for model, *_ in found]),
        (Column("Basis", text=True, group=True), [basis for _, basis, *_ in found]),
        (Column("Energy (%)", 1), [energy for _, _, energy, *_ in found]),
        (Column("Rank", 1, SPREAD), [_spread(ranks) for *_, ranks, _ in found]),
        (Column("Rank, median"), [ranks.median for *_, ranks, _ in found]),
        (Column("Rank, 99th percentile"), [ranks.percentile_99 for *_, ranks, _ in found]),
        (Column("Images", 0), [count for *_, count in found]),
    ]
    return _table(
        "ranks_last_layer",
        "Ranks of the last layer",
        "Number of dimensions that hold a fraction of an image's energy, in the image's own best "
        "basis (SVD) and in the basis that all images share. Statistics are over images; the "
        "paper's tables print the 99th percentile.",
        columns,
    )


def layer_ranks(models: Sequence[ModelResult]) -> Table:
    """Per-image ranks of every layer, with effective and stable rank."""
    found = [(model, layer) for model in models for layer in model.layers]
    layers = [layer for _, layer in found]
    effective = [_spread(Distribution.of(layer.effective_rank)) for layer in layers]
    stable = [_spread(Distribution.of(layer.stable_rank)) for layer in layers]
    return _table(
        "ranks_by_layer",
        "Per-image ranks by layer",
        "rank@q: number of dimensions that hold q % of an image's energy in its own basis. "
        "Effective rank: exponential of the entropy of the normalized singular values. Stable "
        "rank: total energy over the largest. Statistics are over images; p99 is the 99th "
        "percentile.",
        [
            *_layer_columns(found),
            *_rank_columns([layer.ranks for layer in layers]),
            (Column("Effective rank", 1, SPREAD), effective),
            (Column("Stable rank", 2, SPREAD), stable),
        ],
    )


def shared_layer_ranks(models: Sequence[ModelResult]) -> Table:
    """Ranks in the shared basis of every layer that has one."""
    found = [(model, layer) for model in models for layer in model.layers if layer.shared]
    ranks = [layer.shared.ranks for _, layer in found if layer.shared]
    return _table(
        "shared_ranks_by_layer",
        "Ranks in the shared basis by layer",
        "rank@q: number of dimensions that hold q % of an image's energy in the basis that all "
        "images share at this layer. Statistics are over images; p99 is the 99th percentile.",
        [*_layer_columns(found), *_rank_columns(ranks)],
    )


def sep_by_layer(models: Sequence[ModelResult]) -> Table:
    """SEP bandwidths of every layer."""
    found = [(model, layer) for model in models for layer in model.layers if layer.sep]
    layers = [layer for _, layer in found]
    conventions = [layer.sep.convention for layer in layers if layer.sep]
    return _table(
        "sep_by_layer",
        "SEP bandwidths by layer",
        "b(q): fraction of the channel frequencies that holds q % of the mean token's energy.",
        [
            *_layer_columns(found),
            (Column("Convention", text=True), conventions),
            *_bandwidth_columns(layers),
        ],
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
    rows: list[tuple[Any, ...]] = []
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
    found = [
        (model, layer, layer.sep_test, index)
        for model in models
        for layer in model.layers
        if layer.sep_test
        for index in range(len(layer.sep_test.levels))
    ]
    tests = [(test, index) for _, _, test, index in found]
    observed = [(float(t.observed[i]), *t.observed_interval[i].tolist()) for t, i in tests]
    permuted = [_spread(Distribution.of(test.permuted[:, index])) for test, index in tests]
    shifts = [(float(t.shift[i]), *t.shift_interval[i].tolist()) for t, i in tests]
    columns: list[ColumnOfCells] = [
        (_MODEL, [model.name for model, *_ in found]),
        (Column("Layer", text=True, group=True), [layer.name for _, layer, *_ in found]),
        (Column("Energy (%)", 1), [100 * test.levels[index] for test, index in tests]),
        (Column("b observed", 4, INTERVAL), observed),
        (Column("b permuted", 4, SPREAD), permuted),
        (Column("Shift", 4, INTERVAL, signed=True), shifts),
        (Column("p", 3), [float(test.p_value[index]) for test, index in tests]),
        (Column("Permutations", 0), [len(test.permuted) for test, _ in tests]),
    ]
    confidences = sorted({test.confidence for test, _ in tests})
    shown = " and ".join(f"{100 * confidence:g} %" for confidence in confidences)
    return _table(
        "sep_permutations",
        "SEP bandwidths under random permutations of the channels",
        f"Shift: permuted minus observed, read between bins. Intervals hold {shown} of the "
        "bootstrap samples: over images for the observed bandwidth, over images and permutations "
        "for the mean shift. p: how often a single random order is as far from the mean of all as "
        "the observed one, at least 1 / (1 + permutations); a small p means that the order of the "
        "channels matters.",
        columns,
    )


def rotation(models: Sequence[ModelResult]) -> Table:
    """How far images' own top-k subspaces are rotated against the shared one and each other."""
    found = [(m, layer, one) for m in models for layer in m.layers for one in layer.rotation]
    subspaces = [one for _, _, one in found]
    with_shared = [measured(one.overlap_shared) for one in subspaces]
    between = [measured(one.overlap_pairs) for one in subspaces]

    def spreads(overlaps: list[np.ndarray]) -> list[Any]:
        return [_spread(Distribution.of(overlap)) for overlap in overlaps]

    def excesses(overlaps: list[np.ndarray]) -> list[Any]:
        pairs = zip(overlaps, subspaces, strict=True)
        return spreads([np.asarray(excess_overlap(o, one.overlap_random)) for o, one in pairs])

    columns: list[ColumnOfCells] = [
        (_MODEL, [model.name for model, _, _ in found]),
        (Column("Layer", text=True, group=True), [layer.name for _, layer, _ in found]),
        (Column("D", 0, group=True), [layer.channels for _, layer, _ in found]),
        (Column("k", 0), [one.k for one in subspaces]),
        (Column("Overlap with shared", 3, SPREAD), spreads(with_shared)),
        (Column("Overlap between pairs", 3, SPREAD), spreads(between)),
        (Column("Random k/D", 3), [one.overlap_random for one in subspaces]),
        (Column("Excess with shared", 3, SPREAD), excesses(with_shared)),
        (Column("Excess between pairs", 3, SPREAD), excesses(between)),
        (Column("Angles to shared (°)", 1, ANGLES), [_ends(o.angles_shared) for o in subspaces]),
        (Column("Angles between pairs (°)", 1, ANGLES), [_ends(o.angles_pairs) for o in subspaces]),
        (Column("Angles at random (°)", 1, ANGLES), [_ends(o.angles_random) for o in subspaces]),
        (Column("Images", 0), [len(overlap) for overlap in with_shared]),
        (Column("Pairs", 0), [len(overlap) for overlap in between]),
    ]
    notes = []
    for model, layer, one in found:
        if missing := int(np.isnan(one.overlap_shared).sum()):
            left_out = f"{missing:,} images of rank below k = {one.k} left out"
            notes.append(f"{model.name}, {layer.name}: {left_out}")
    return _table(
        "rotation",
        "Rotation of subspaces",
        "Overlap: mean squared cosine of the principal angles between top-k right-singular "
        "subspaces, of each image with the subspace that all images share, and between random "
        "pairs of images; 1 for equal subspaces, k/D on average for random ones. The shared "
        "subspace is computed from the same images: with few images, the overlap with it is above "
        "k/D even for noise, unlike that between pairs. Excess: (overlap - k/D) / (1 - k/D). "
        "Angles are mean principal angles in degrees: first, median and last of the k.",
        columns,
        notes,
    )


def comparison(models: Sequence[ModelResult]) -> Table:
    """All models side by side: width, ranks in both bases, rotation and bandwidth."""
    layers = [model.last for model in models]
    sizes = subspace_sizes_of(layers)
    highest = max(layers[0].ranks.levels)
    own = [_statistics(x.ranks, highest) for x in layers]
    shared = [_statistics(x.shared.ranks, highest) if x.shared else _NONE for x in layers]
    by_size = [{found.k: found for found in layer.rotation} for layer in layers]
    excess = "Excess overlap with shared", "Excess overlap between pairs"

    def mean_excess(name: str, size: int) -> list[float | None]:
        found = [rotations.get(size) for rotations in by_size]
        return [None if one is None else one.mean_excess(getattr(one, name)) for one in found]

    columns: list[ColumnOfCells] = [
        (Column("Model", text=True), [model.name for model in models]),
        (Column("Weights", text=True), [model.weights for model in models]),
        (Column("Parameters (millions)", 2), [_millions(model) for model in models]),
        (Column("D", 0), [layer.channels for layer in layers]),
        (Column(f"rank@{percent(highest)}, own basis", 1, STATISTICS), own),
        (Column(f"rank@{percent(highest)}, shared basis", 1, STATISTICS), shared),
        (Column("Effective rank, mean"), [Distribution.of(x.effective_rank).mean for x in layers]),
        *(
            (Column(f"{title}, k = {size}, mean", 3), mean_excess(name, size))
            for title, name in zip(excess, ("overlap_shared", "overlap_pairs"), strict=True)
            for size in sizes
        ),
        *_bandwidth_columns(layers),
    ]
    return _table(
        "comparison",
        "Models side by side, last layer",
        "Ranks are over images; p99 is their 99th percentile. Excess overlap: 0 on average for "
        "random subspaces, 1 for equal ones; that with the shared subspace is above 0 even for "
        "noise if images are few. b(q): SEP bandwidth. D differs between models, and no rank is "
        "above D.",
        columns,
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


def _table(
    name: str,
    title: str,
    explanation: str,
    columns: Iterable[ColumnOfCells],
    notes: Sequence[str] = (),
) -> Table:
    heads, cells = zip(*columns, strict=True)
    return Table(name, title, explanation, heads, list(zip(*cells, strict=True)), list(notes))


def _layer_columns(found: Sequence[tuple[ModelResult, LayerResult]]) -> list[ColumnOfCells]:
    return [
        (_MODEL, [model.name for model, _ in found]),
        (Column("Layer", text=True), [layer.name for _, layer in found]),
        (Column("N", 0), [layer.tokens for _, layer in found]),
        (Column("D", 0), [layer.channels for _, layer in found]),
    ]


def _rank_columns(ranks: Sequence[Ranks]) -> list[ColumnOfCells]:
    return [
        (Column(f"rank@{percent(q)}", 1, STATISTICS), [_statistics(one, q) for one in ranks])
        for q in (ranks[0].levels if ranks else ())  # the same in a whole report
    ]


def _bandwidth_columns(layers: Sequence[LayerResult]) -> list[ColumnOfCells]:
    return [
        (Column(f"b({percent(q)} %)", 3), [layer.bandwidths().get(q) for layer in layers])
        for q in bandwidth_levels_of(layers)
    ]


def _millions(model: ModelResult) -> float | None:
    return None if model.parameters is None else model.parameters / 1e6


def _statistics(ranks: Ranks, level: float) -> tuple[float | None, ...]:
    found = ranks.distribution(level)
    return found.mean, found.median, found.percentile_99


def _spread(found: Distribution) -> tuple[float, float]:
    return found.mean, found.std


def _ends(angles: np.ndarray) -> tuple[float | None, ...]:
    """Return the first, median and last angle."""
    if len(angles) == 0:  # no pair of images was compared
        return _NONE
    return float(angles[0]), float(np.median(angles)), float(angles[-1])
