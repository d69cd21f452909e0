"""The tables of a report and the meaning of their columns."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from fastkd.analysis import results as readings
from fastkd.analysis.report.published import Match, match, published
from fastkd.analysis.results import (
    Distribution,
    LayerResult,
    ModelResult,
    Ranks,
    Sep,
    SepTest,
    measured,
)
from fastkd.analysis.table import ANGLES, BESIDE, INTERVAL, SPREAD, STATISTICS, Column, Table

_LAYER_COLUMNS = (
    Column("Model", text=True, group=True),
    Column("Layer", text=True),
    Column("N", 0),
    Column("D", 0),
)


def all_tables(
    models: Sequence[ModelResult], settings: Mapping[str, Any], compare_paper: bool = False
) -> list[Table]:
    """Every table that the results have something for.

    Args:
        models: what was analysed.
        settings: of the report.
        compare_paper: put the paper's numbers beside ours.

    Returns:
        In the order of a report.
    """
    tables = [models_table(models), last_layer_ranks(models), layer_ranks(models)]
    optional: list[tuple[bool, Callable[[], Table]]] = [
        (any(model.last.sep for model in models), lambda: sep_bandwidths(models)),
        (any(model.last.sep_test for model in models), lambda: sep_permutations(models)),
        (any(model.last.shared for model in models), lambda: rotation(models)),
        (any(map(readings.has_shared_depth, models)), lambda: shared_layer_ranks(models)),
        (any(layer.sep for m in models for layer in m.layers[:-1]), lambda: sep_by_layer(models)),
        (len(models) > 1, lambda: comparison(models)),
        (compare_paper, lambda: paper_ranks(models, settings)),
        (compare_paper, lambda: paper_bandwidths(models, settings)),
        (any(model.skipped for model in models), lambda: skipped_images(models)),
    ]
    return tables + [make() for wanted, make in optional if wanted]


def models_table(models: Sequence[ModelResult]) -> Table:
    """What was analysed: one row for each model."""
    columns = (
        _text("Model"),
        _text("Weights"),
        _text("Architecture"),
        Column("Parameters (millions)", 2),
        _text("Input (pixels)"),
        Column("Layers", 0),
        _text("Last layer"),
        Column("Tokens N", 0),
        Column("Channels D", 0),
        Column("Images", 0),
        Column("Images with NaN or infinity", 0),
        Column("Images skipped", 0),
        Column("Forward (s)"),
        Column("Analysis (s)"),
    )
    return Table(
        "models",
        "Models analysed",
        "N tokens of D channels are what one image gives at the last layer, prefix tokens dropped.",
        columns,
        [_model_row(model) for model in models],
    )


def last_layer_ranks(models: Sequence[ModelResult]) -> Table:
    """Ranks of the last layer in each image's own basis and in the basis of all images."""
    columns = (
        _text("Model", group=True),
        Column("N", 0, group=True),
        Column("D", 0, group=True),
        _text("Basis", group=True),
        Column("Energy (%)", 1),
        Column("Rank", 1, SPREAD),
        Column("Rank, median"),
        Column("Rank, 99th percentile"),
        Column("Images", 0),
    )
    rows = [row for model in models for row in _rank_rows(model)]
    return Table(
        "ranks_last_layer",
        "Ranks of the last layer",
        "Dimensions that hold a part of an image's energy, in the image's own best basis (SVD) "
        "and in the one basis that all images share; statistics are over images, the paper's "
        "tables print the 99th percentile.",
        columns,
        rows,
    )


def layer_ranks(models: Sequence[ModelResult]) -> Table:
    """Per-image ranks of every layer, with effective and stable rank."""
    levels = readings.levels_of(layer for model in models for layer in model.layers)
    columns = (
        *_LAYER_COLUMNS,
        *(_rank_column(level) for level in levels),
        Column("Effective rank", 1, SPREAD),
        Column("Stable rank", 2, SPREAD),
    )
    rows = [
        (
            *_layer_cells(model, layer),
            *(_rank_statistics(layer.ranks, level) for level in levels),
            _spread(Distribution.of(layer.effective_rank)),
            _spread(Distribution.of(layer.stable_rank)),
        )
        for model in models
        for layer in model.layers
    ]
    return Table(
        "ranks_by_layer",
        "Per-image ranks by layer",
        "rank@q: dimensions that hold q % of an image's energy in its own basis. Effective rank: "
        "exponential of the entropy of the normalised singular values. Stable rank: total energy "
        "over the largest. Statistics are over images; p99 is the 99th percentile.",
        columns,
        rows,
    )


def shared_layer_ranks(models: Sequence[ModelResult]) -> Table:
    """Ranks in the shared basis of every layer that has one."""
    found = [(model, one, one.shared) for model in models for one in model.layers if one.shared]
    levels = readings.levels_of(layer for _, layer, _ in found)
    return Table(
        "shared_ranks_by_layer",
        "Ranks in the shared basis by layer",
        "rank@q: dimensions that hold q % of an image's energy in the basis that all images share "
        "at this layer. Statistics are over images; p99 is the 99th percentile.",
        (*_LAYER_COLUMNS, *(_rank_column(level) for level in levels)),
        [
            (
                *_layer_cells(model, layer),
                *(_rank_statistics(shared.ranks, level) for level in levels),
            )
            for model, layer, shared in found
        ],
    )


def sep_by_layer(models: Sequence[ModelResult]) -> Table:
    """SEP bandwidths of every layer."""
    found = [(model, one, one.sep) for model in models for one in model.layers if one.sep]
    levels = readings.bandwidth_levels_of(layer for _, layer, _ in found)
    return Table(
        "sep_by_layer",
        "SEP bandwidths by layer",
        "b(q): the part of the channel frequencies that holds q % of the mean token's energy.",
        (
            *_LAYER_COLUMNS,
            _text("Convention"),
            *(Column(f"b({readings.percent(level)} %)", 3) for level in levels),
        ),
        [
            (
                *_layer_cells(model, layer),
                sep.convention,
                *(_bandwidths(sep).get(level) for level in levels),
            )
            for model, layer, sep in found
        ],
    )


def sep_bandwidths(models: Sequence[ModelResult]) -> Table:
    """SEP bandwidths of the last layer beside those of white noise."""
    with_sep = [(model, model.last.sep) for model in models if model.last.sep]
    levels = readings.bandwidth_levels_of(model.last for model, _ in with_sep)
    columns = (
        _text("Model", group=True),
        _text("Convention", group=True),
        Column("D", 0, group=True),
        Column("Tokens", 0, group=True),
        _text("Signal"),
        *(Column(f"b({readings.percent(level)} %)", 3, INTERVAL) for level in levels),
    )
    rows = [row for model, sep in with_sep for row in _sep_rows(model, sep, levels)]
    symmetric = (
        " In full order b(50 %) is 0.5 by construction, but for the energy of the mean over "
        "channels: the spectrum of a real signal is symmetric."
        if any(sep.convention == "full" for _, sep in with_sep)
        else ""
    )
    return Table(
        "sep_bandwidths",
        "Token spectral energy patterns (SEP)",
        "b(q): the part of the channel frequencies that holds q % of the mean token's energy, "
        "counted from the lowest; white noise is what channels without any order give. Intervals "
        "are bootstrap intervals over images." + symmetric,
        columns,
        rows,
        [
            f"{model.name}: {sep.without_energy:,} tokens without energy left out"
            for model, sep in with_sep
            if sep.without_energy
        ],
    )


def sep_permutations(models: Sequence[ModelResult]) -> Table:
    """Does the order of the channels matter: SEP bandwidths under random permutations."""
    tested = [
        (model, one, one.sep_test) for model in models for one in model.layers if one.sep_test
    ]
    columns = (
        _text("Model", group=True),
        _text("Layer", group=True),
        Column("Energy (%)", 1),
        Column("b observed", 4, INTERVAL),
        Column("b permuted", 4, SPREAD),
        Column("Shift", 4, INTERVAL, signed=True),
        Column("p", 3),
        Column("Permutations", 0),
    )
    confidences = sorted({test.confidence for _, _, test in tested})
    shown = " and ".join(f"{100 * confidence:g} %" for confidence in confidences)
    return Table(
        "sep_permutations",
        "SEP bandwidths under random permutations of the channels",
        f"Shift: permuted minus observed, read between bins. Bootstrap intervals hold {shown}: of "
        "the observed bandwidth over images, of the shift over images and permutations: how well "
        "the mean shift is known. p is what tells whether the order of the channels matters: how "
        "often a single random order is as far from the mean of all, at least 1 / (1 + "
        "permutations).",
        columns,
        [
            (m.name, layer.name, *row)
            for m, layer, test in tested
            for row in _permutation_rows(test)
        ],
    )


def rotation(models: Sequence[ModelResult]) -> Table:
    """How far images' own top-k subspaces turn away from the shared one and from each other."""
    columns = (
        _text("Model", group=True),
        _text("Layer", group=True),
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
    return Table(
        "rotation",
        "Rotation of subspaces",
        "Overlap: mean squared cosine of the principal angles between top-k right-singular "
        "subspaces, of each image with the subspace that all images share, and between random "
        "pairs of images; 1 is the same subspace, k/D what random ones give. An image is part of "
        "what all share: with few images its overlap with that is above k/D even for noise, that "
        "of pairs is not. Excess: (overlap - k/D) / (1 - k/D). Angles are mean principal angles in "
        "degrees, first, median and last of the k.",
        columns,
        [row for model in models for row in _rotation_rows(model)],
        [
            f"{model.name}, {layer.name}: {missing:,} images of rank below k = {size} left out"
            for model in models
            for layer in model.layers
            for size, missing in _images_below(layer)
        ],
    )


def comparison(models: Sequence[ModelResult]) -> Table:
    """All models side by side: width, ranks in both bases, rotation and bandwidth."""
    sizes = readings.subspace_sizes_of(models)
    highest = max(readings.levels_of(model.last for model in models))
    levels = readings.bandwidth_levels_of(model.last for model in models)
    at = f"rank@{readings.percent(highest)}"
    columns = (
        _text("Model"),
        _text("Weights"),
        Column("Parameters (millions)", 2),
        Column("D", 0),
        Column(f"{at}, own basis", 1, STATISTICS),
        Column(f"{at}, shared basis", 1, STATISTICS),
        Column("Effective rank, mean"),
        *(Column(f"Excess overlap with shared, k = {size}, mean", 3) for size in sizes),
        *(Column(f"Excess overlap between pairs, k = {size}, mean", 3) for size in sizes),
        *(Column(f"b({readings.percent(level)} %)", 3) for level in levels),
    )
    return Table(
        "comparison",
        "Models side by side, last layer",
        "Ranks are over images, p99 is their 99th percentile. Excess overlap: 0 for subspaces that "
        "are turned at random against each other, 1 for equal ones; with the shared one it is "
        "above 0 even for noise where images are few. b(q): SEP bandwidth. D differs between "
        "models, and ranks can be no larger than D.",
        columns,
        [_comparison_row(model, highest, sizes, levels) for model in models],
    )


def paper_ranks(models: Sequence[ModelResult], settings: Mapping[str, Any]) -> Table:
    """Our ranks beside the paper's: 99th percentiles over images."""
    matches = [match(model, settings) for model in models]
    levels = list(published().models[0].image_ranks)
    columns = (
        _text("Model", group=True),
        _text("In the paper", group=True),
        _text("Basis"),
        *(Column(f"rank@{readings.percent(level)}", 1, BESIDE, signed=True) for level in levels),
    )
    return Table(
        "paper_ranks",
        f"Ranks beside arXiv {published().source['arxiv']}",
        "99th percentile over images: ours / published / ours minus published. Published: "
        f"{published().source['images']:,} images of {published().source['data']}.",
        columns,
        [row for found in matches for row in _paper_rank_rows(found, levels)],
        [_note(found) for found in matches if found.notes],
    )


def paper_bandwidths(models: Sequence[ModelResult], settings: Mapping[str, Any]) -> Table:
    """Our SEP bandwidths beside the paper's."""
    matches = [match(model, settings) for model in models]
    levels = list(published().models[0].bandwidths)
    columns = (
        _text("Model"),
        _text("In the paper"),
        *(Column(f"b({readings.percent(level)} %)", 3, BESIDE, signed=True) for level in levels),
    )
    return Table(
        "paper_bandwidths",
        f"SEP bandwidths beside arXiv {published().source['arxiv']}",
        "Bandwidth d/D of the mean token: ours / published / ours minus published, full order.",
        columns,
        [row for found in matches for row in _paper_bandwidth_rows(found, levels)],
        [_note(found) for found in matches if found.notes],
    )


def skipped_images(models: Sequence[ModelResult]) -> Table:
    """Images that could not be read, by name."""
    return Table(
        "skipped_images",
        "Images that could not be read",
        "They are in none of the numbers.",
        (_text("Model", group=True), _text("Image"), _text("Reason")),
        [(model.name, name, reason) for model in models for name, reason in model.skipped],
    )


def _layer_cells(model: ModelResult, layer: LayerResult) -> tuple[Any, ...]:
    return model.name, layer.name, layer.tokens, layer.channels


def _rank_column(level: float) -> Column:
    return Column(f"rank@{readings.percent(level)}", 1, STATISTICS)


def _model_row(model: ModelResult) -> tuple[Any, ...]:
    last = model.last
    return (
        model.name,
        model.weights,
        model.architecture or None,
        None if model.parameters is None else model.parameters / 1e6,
        "{} x {}".format(*model.input_size) if model.input_size else None,
        len(model.layers),
        last.name,
        last.tokens,
        last.channels,
        model.images,
        model.non_finite,
        len(model.skipped),
        model.seconds.get("forward"),
        model.seconds.get("analysis"),
    )


def _rank_rows(model: ModelResult) -> Iterable[tuple[Any, ...]]:
    last = model.last
    bases = [("own", last.ranks)]
    if last.shared:
        bases.append(("shared", last.shared.ranks))
    for basis, ranks in bases:
        for level in ranks.levels:
            found = ranks.distribution(level)
            yield (
                model.name,
                last.tokens,
                last.channels,
                basis,
                100 * level,
                _spread(found),
                found.median,
                found.percentile_99,
                len(ranks.at(level)),
            )


def _sep_rows(model: ModelResult, sep: Sep, levels: list[float]) -> Iterable[tuple[Any, ...]]:
    test = model.last.sep_test
    ends = {}
    if test is not None:
        ends = dict(zip(test.levels, test.observed_interval.tolist(), strict=True))
    ours = _bandwidths(sep)
    noise = dict(zip(sep.levels, readings.white_noise_bandwidths(sep).tolist(), strict=True))
    start = (model.name, sep.convention, model.last.channels, sep.tokens)
    yield (
        *start,
        "tokens",
        *((ours.get(level), *ends.get(level, (None, None))) for level in levels),
    )
    yield (*start, "white noise", *((noise.get(level), None, None) for level in levels))


def _permutation_rows(test: SepTest) -> Iterable[tuple[Any, ...]]:
    for index, level in enumerate(test.levels):
        ends = test.observed_interval[index].tolist()
        yield (
            100 * level,
            (float(test.observed[index]), *ends),
            _spread(Distribution.of(test.permuted[:, index])),
            (float(test.shift[index]), *test.shift_interval[index].tolist()),
            float(test.p_value[index]),
            len(test.permuted),
        )


def _rotation_rows(model: ModelResult) -> Iterable[tuple[Any, ...]]:
    for layer in model.layers:
        for found in layer.shared.rotation if layer.shared else []:
            overlaps = [measured(o) for o in (found.overlap_shared, found.overlap_pairs)]
            excesses = [readings.excess_overlap(o, found.overlap_random) for o in overlaps]
            yield (
                model.name,
                layer.name,
                layer.channels,
                found.k,
                *(_spread(Distribution.of(overlap)) for overlap in overlaps),
                found.overlap_random,
                *(_spread(Distribution.of(np.asarray(excess))) for excess in excesses),
                readings.first_median_last(found.angles_shared),
                readings.first_median_last(found.angles_pairs),
                readings.first_median_last(found.angles_random),
                *(len(overlap) for overlap in overlaps),
            )


def _images_below(layer: LayerResult) -> Iterable[tuple[int, int]]:
    """(k, images of rank below k) where there are any."""
    for found in layer.shared.rotation if layer.shared else []:
        missing = int(np.isnan(found.overlap_shared).sum())
        if missing:
            yield found.k, missing


def _comparison_row(
    model: ModelResult, highest: float, sizes: list[int], levels: list[float]
) -> tuple[Any, ...]:
    last, shared = model.last, model.last.shared
    rotations = {found.k: found for found in shared.rotation} if shared else {}
    widths = _bandwidths(last.sep)

    def excess(size: int, which: str) -> float | None:
        found = rotations.get(size)
        if found is None:
            return None
        mean = Distribution.of(getattr(found, which)).mean
        return float(readings.excess_overlap(mean, found.overlap_random))

    return (
        model.name,
        model.weights,
        None if model.parameters is None else model.parameters / 1e6,
        last.channels,
        _rank_statistics(last.ranks, highest),
        _rank_statistics(shared.ranks, highest) if shared else (None,) * 3,
        Distribution.of(last.effective_rank).mean,
        *(excess(size, "overlap_shared") for size in sizes),
        *(excess(size, "overlap_pairs") for size in sizes),
        *(widths.get(level) for level in levels),
    )


def _paper_rank_rows(found: Match, levels: list[float]) -> Iterable[tuple[Any, ...]]:
    last, row = found.model.last, found.published
    if row is None:
        nothing = ((None,) * 3,) * len(levels)
        yield (found.model.name, "no", None, *nothing)
        return
    bases = [("own", last.ranks, row.image_ranks)]
    if last.shared:
        bases.append(("shared", last.shared.ranks, row.dataset_ranks))
    for basis, ranks, theirs in bases:
        ours = {level: ranks.distribution(level).percentile_99 for level in ranks.levels}
        cells = (_beside(ours.get(level), theirs[level]) for level in levels)
        yield (found.model.name, row.name, basis, *cells)


def _paper_bandwidth_rows(found: Match, levels: list[float]) -> Iterable[tuple[Any, ...]]:
    sep, row = found.model.last.sep, found.published
    if row is None:
        yield (found.model.name, "no", *(((None,) * 3,) * len(levels)))
        return
    ours = _bandwidths(sep)
    cells = (_beside(ours.get(level), row.bandwidths[level]) for level in levels)
    yield (found.model.name, row.name, *cells)


def _note(found: Match) -> str:
    return f"{found.model.name}: {'; '.join(found.notes)}"


def _beside(ours: float | None, theirs: float) -> tuple[float | None, float, float | None]:
    return ours, theirs, None if ours is None else ours - theirs


def _rank_statistics(ranks: Ranks, level: float) -> tuple[float | None, ...]:
    if level not in ranks.levels:
        return (None,) * 3
    found = ranks.distribution(level)
    return found.mean, found.median, found.percentile_99


def _bandwidths(sep: Sep | None) -> dict[float, float]:
    """Level -> bandwidth; nothing without SEP."""
    return dict(zip(sep.levels, sep.bandwidths.tolist(), strict=True)) if sep else {}


def _spread(found: Distribution) -> tuple[float, float]:
    return found.mean, found.std


def _text(title: str, group: bool = False) -> Column:
    return Column(title, text=True, group=group)
