"""The figures of a report, in columns or at a page's width, in colors for most eyes."""

from __future__ import annotations

import io
import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

# Without pyplot: its backend and state belong to the caller.
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator
from matplotlib.transforms import ScaledTranslation

from fastkd.analysis.results import (
    UNTRAINED,
    Curve,
    LayerResult,
    ModelResult,
    Sep,
    SepTest,
    Subspaces,
    bandwidth_levels_of,
    bandwidths,
    has_shared_depth,
    measured,
    percent,
    subspace_sizes_of,
)
from fastkd.utils.io import printable, replacing

# Okabe and Ito's colors, which color-blind readers can tell apart.
_OWN, _SHARED, _PAIRS, _WARNING = "#0072B2", "#E69F00", "#009E73", "#D55E00"
_BASELINE = "#555555"
# Color and marker of the first, second, ... level or subspace.
_COLORS = ("#0072B2", "#56B4E9", "#009E73", "#E69F00", "#D55E00", "#CC79A7", "#000000")
_SERIES = list(zip(_COLORS, "osD^vPX", strict=True))

_PANEL_WIDTH = 3.5  # inches: one column of a two-column page
_STYLE: dict[Any, Any] = {
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.labelsize": 8,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "legend.fontsize": 7,
    "axes.linewidth": 0.6,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "pdf.fonttype": 42,  # TrueType: text can be searched, and journals accept it
}


def save_figures(models: Sequence[ModelResult], folder: Path) -> dict[str, list[str]]:
    """Save all figures as PNG and PDF; return the stems of the files by kind."""
    folder.mkdir(parents=True, exist_ok=True)
    saved: dict[str, list[str]] = {}
    with matplotlib.rc_context(_STYLE):
        for kind, stem, figure in drawings(models):
            _save(figure, folder / stem)
            saved.setdefault(kind, []).append(stem)
    return saved


def drawings(models: Sequence[ModelResult]) -> Iterator[tuple[str, str, Figure]]:
    """Draw the figures that the results have data for: kind, stem of the file, figure."""
    for draw, per_page, is_wanted in _KINDS:
        kind = draw.__name__
        shown = [model for model in models if is_wanted(model)]
        for page, start in enumerate(range(0, len(shown), per_page)):
            stem = kind if page == 0 else f"{kind}_{page + 1}"
            yield kind, stem, draw(shown[start : start + per_page])
    if len(models) > 1:
        yield "comparison", "comparison", comparison(models)


def layerwise_rank(models: Sequence[ModelResult]) -> Figure:
    """rank@q of the highest level over layers: mean, quartiles and 99th percentile over images."""
    return _in_panels(models, _draw_layers, height=2.4, sharey=True)


def layerwise_rotation(models: Sequence[ModelResult]) -> Figure:
    """Excess overlap with the shared subspace over layers, mean over images, for every k."""
    return _in_panels(models, _draw_layer_rotation, height=2.4, sharey=True)


def shared_basis(models: Sequence[ModelResult]) -> Figure:
    """Energy over dimensions, in each image's own basis and in the shared one."""
    return _in_panels(models, _draw_energy, height=2.6)


def rank_histograms(models: Sequence[ModelResult]) -> Figure:
    """Images by rank, last layer, at every level, in their own and in the shared basis."""
    figure, rows = _subfigures(models, 1.75, in_rows=True)
    for row, model in zip(rows, models, strict=True):
        levels = model.last.ranks.levels
        panels = row.subplots(1, len(levels), squeeze=False)[0]
        for axes, level in zip(panels, levels, strict=True):
            _draw_histogram(axes, model.last, level)
        panels[0].set_ylabel("images")
    _legend(figure)
    return figure


def sep(models: Sequence[ModelResult]) -> Figure:
    """Energy of the mean token over channel frequency, and its difference from white noise."""
    figure, cells = _subfigures(models, 3.4)
    for cell, model in zip(cells, models, strict=True):
        if model.last.sep is not None:
            upper, lower = cell.subplots(2, 1, sharex=True, height_ratios=(3, 2))
            _draw_sep(upper, lower, model.last.sep, model.last.sep_test)
    _legend(figure)
    return figure


def rotation(models: Sequence[ModelResult]) -> Figure:
    """Overlaps of subspaces for every k, and the principal angles of the largest k."""
    figure, rows = _subfigures(models, 2.5, in_rows=True)
    for row, model in zip(rows, models, strict=True):
        left, right = row.subplots(1, 2)
        _draw_overlaps(left, model.last.rotation)
        _draw_angles(right, model.last.rotation)
    _legend(figure)
    return figure


def comparison(models: Sequence[ModelResult]) -> Figure:
    """All models side by side: ranks over width, rotation, bandwidths."""
    layers = [model.last for model in models]
    draws: list[Callable[[Axes, Sequence[LayerResult]], None]] = [_compare_ranks]
    if subspace_sizes_of(layers):
        draws.append(_compare_rotation)
    if bandwidth_levels_of(layers):
        draws.append(_compare_bandwidths)
    figure = _figure(2 * _PANEL_WIDTH, 1.3 + 0.42 * len(models))
    panels = figure.subplots(1, len(draws), sharey=True, squeeze=False)[0]
    for axes, draw in zip(panels, draws, strict=True):
        draw(axes, layers)
        axes.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", "0.25", "0.5", "0.75", "1"])
        _clean(axes, grid="x")
        _legend_below(axes, figure, columns=1 if draw is _compare_ranks else 3)
    panels[0].set_yticks(range(len(models)), [_row_label(model) for model in models])
    for label, model in zip(panels[0].get_yticklabels(), models, strict=True):
        label.set_color(_name_color(model))
    panels[0].set_ylim(len(models) - 0.4, -0.6)
    return figure


def _draw_layers(axes: Axes, model: ModelResult) -> None:
    layers = model.layers
    level = max(model.last.ranks.levels)
    found = [layer.ranks.distribution(level) for layer in layers]
    places = np.arange(len(layers))
    lower, upper = [f.lower_quartile for f in found], [f.upper_quartile for f in found]
    tails = [f.percentile_99 for f in found]
    axes.fill_between(places, lower, upper, color=_OWN, alpha=0.22, linewidth=0, label="quartiles")
    if len(layers) == 1:
        axes.vlines(places, lower, upper, color=_OWN, alpha=0.22, linewidth=6)
    _line(axes, places, [f.mean for f in found], _OWN, "mean", marker="o")
    _line(
        axes, places, tails, _OWN, "99th percentile", linestyle="--", linewidth=0.7,
        marker="_" if len(layers) == 1 else "",
    )  # fmt: skip
    if has_shared_depth(model):
        at = np.array([place for place, layer in enumerate(layers) if layer.shared])
        means = [x.shared.ranks.distribution(level).mean for x in layers if x.shared]
        _line(axes, at, means, _SHARED, "mean, shared basis")
    # Panels share this axis: a limit that no image comes near must not flatten them.
    top = max(axes.get_ylim()[1], 1.12 * max([1.0, *measured(np.asarray(tails))]))
    largest = [layer.ranks.largest for layer in layers]
    if min(largest) < top:
        _line(axes, places, largest, _BASELINE, "largest: min(N, D)", linestyle=":", linewidth=0.8)
    axes.set(ylim=(0, top), ylabel=f"rank@{percent(level)} (dimensions)")
    _depth_axis(axes, layers)


def _draw_layer_rotation(axes: Axes, model: ModelResult) -> None:
    axes.axhline(0, color=_BASELINE, linestyle="--", linewidth=0.9, label="random subspaces")
    for size, (color, marker) in _styles(subspace_sizes_of(model.layers)).items():
        found = [(at, r) for at, x in enumerate(model.layers) for r in x.rotation if r.k == size]
        means = [rotated.mean_excess(rotated.overlap_shared) for _, rotated in found]
        places = np.array([place for place, _ in found])
        _line(axes, places, means, color, f"k = {size}", marker=marker)
    axes.set(ylim=(-0.05, 1.02), ylabel="excess overlap with shared\n(0: random, 1: same)")
    _depth_axis(axes, model.layers)


def _depth_axis(axes: Axes, layers: Sequence[LayerResult]) -> None:
    kinds = {layer.name.partition(".")[0] for layer in layers}
    label = {"blocks": "block", "stages": "stage"}.get("/".join(kinds), "layer")
    axes.set(xlim=(-0.5, len(layers) - 0.5), xlabel=label)
    step = -(-len(layers) // 12)
    axes.set_xticks(range(0, len(layers), step), [str(layer.index) for layer in layers[::step]])
    _clean(axes, grid="y")


def _draw_histogram(axes: Axes, layer: LayerResult, level: float) -> None:
    bases = zip(layer.bases(), (_OWN, _SHARED), strict=False)
    found = [(name, color, ranks.at(level)) for (name, ranks), color in bases]
    shown = [basis for basis in found if len(basis[2])]
    longest = max((int(values.max()) for _, _, values in shown), default=1)
    width = -(-max(longest, 12) // 40)
    edges = np.arange(0.5, max(longest, 12) + width + 0.5, width)
    for name, color, values in shown:
        counts, _ = np.histogram(values, edges)
        # Transparent areas with outlines: equal histograms stay visible as two.
        axes.stairs(counts, edges, fill=True, color=color, alpha=0.35, label=f"{name} basis")
        axes.stairs(counts, edges, color=color, linewidth=0.9)
    medians = ", ".join(f"{np.median(values):g} {name}" for name, _, values in shown)
    below = f"median {medians}" if shown else "no image has a rank"
    axes.set_title(f"rank@{percent(level)}\n{below}", fontsize=6.5)
    axes.set(xlim=(0, edges[-1]), xlabel="dimensions")
    axes.locator_params(nbins=4, integer=True)
    _clean(axes, grid="y")


def _draw_energy(axes: Axes, model: ModelResult) -> None:
    layer = model.last
    curves = [("own basis (SVD)", _OWN, layer.curve, 1)]
    if layer.shared:
        curves.append(("shared basis (all images)", _SHARED, layer.shared.curve, -1))
    levels = layer.ranks.levels
    for level in levels:
        axes.axhline(100 * level, color="#cccccc", linewidth=0.5, zorder=0)
    for name, color, curve, side in curves:
        if len(curve.mean) == 0 or not np.isfinite(curve.mean).all():
            continue
        _band(axes, np.arange(1, len(curve.mean) + 1), curve, color, name)
        for level in levels:
            _mark_level(axes, curve.mean, level, color, side)
    room = (0.7, layer.channels * 1.5)  # for the numbers of the first and last dots
    axes.set(xscale="log", xlim=room, xlabel="dimensions (log)")
    axes.set(ylim=(0, 104), ylabel="energy held (%)")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter("")
    ticks = [0, 0.2, 0.4, 0.6, *levels]
    axes.set_yticks([100 * tick for tick in ticks], [percent(tick) for tick in ticks])
    _clean(axes)


def _mark_level(axes: Axes, mean: np.ndarray, level: float, color: str, side: int) -> None:
    """Mark and number the dimension at which a mean curve reaches a level."""
    dimension = round(float(bandwidths(mean, [level])[0]) * len(mean))
    height = 100 * mean[dimension - 1]
    axes.plot([dimension], [height], marker="o", markersize=3, color=color)
    # Left of the steep curve, right of and below the other.
    axes.annotate(
        f"{dimension}", (dimension, height), xytext=(-3 * side, 2 * side),
        textcoords="offset points", ha="right" if side > 0 else "left",
        va="bottom" if side > 0 else "top", fontsize=6.5, color=color,
        path_effects=[withStroke(linewidth=1.5, foreground="white")],
    )  # fmt: skip


def _draw_sep(upper: Axes, lower: Axes, found: Sep, test: SepTest | None) -> None:
    count = len(found.white_noise)
    parts = np.arange(1, count + 1) / count
    _band(upper, parts, found.curve, _OWN, "mean token", linewidth=2.4)
    noise = 100 * found.white_noise
    _line(upper, parts, noise, "black", "white noise", linestyle="--", linewidth=0.9)
    upper.text(0.03, 0.97, f"{found.tokens:,} tokens", transform=upper.transAxes, va="top")
    upper.set(ylim=(0, 104), ylabel="energy held (%)")
    difference = 100 * (found.curve.mean - found.white_noise)
    lower.axhline(0, color=_BASELINE, linestyle="--", linewidth=0.9)
    lower.plot(parts, difference, color=_OWN, linewidth=1.0)
    if test is not None:
        _draw_permutations(lower, found, test)
    largest = float(np.nanmax(np.abs(difference), initial=0))
    reach = 1.25 * max(largest, *map(abs, lower.get_ylim()), 1e-3) if largest else 1.0
    unique = "D" if found.convention == "full" else "(D // 2 + 1)"
    lower.set(xlim=(0, 1), xlabel=f"channel frequency / {unique}, {found.convention} order")
    lower.set(ylim=(-reach, reach), ylabel="minus white\nnoise (% points)")
    for axes in (upper, lower):
        _clean(axes, grid="y")


def _draw_permutations(axes: Axes, found: Sep, test: SepTest) -> None:
    """Draw, at each level, the range of the curve under 95 % of the permutations."""
    count = len(found.white_noise)
    parts = np.arange(1, count + 1) / count
    for index, observed in enumerate(test.observed):
        place = round(float(observed) * count) - 1
        here = found.curve.mean[place] - found.white_noise[place]
        ends = np.percentile(test.permuted[:, index], (2.5, 97.5))
        # Bandwidths are whole bins and the curve is not, so the curve is moved by their difference.
        moved = np.interp(ends, parts, found.white_noise) - found.white_noise[place]
        label = "95 % of channel permutations" if index == 0 else ""
        low, high = 100 * (here - moved)
        axes.vlines(observed, low, high, color=_WARNING, linewidth=1.6, label=label)


def _draw_overlaps(axes: Axes, found: Sequence[Subspaces]) -> None:
    for place, one in enumerate(found):
        _box(axes, one.overlap_shared, place - 0.18, _OWN)
        _box(axes, one.overlap_pairs, place + 0.18, _PAIRS)
        axes.hlines(one.overlap_random, place - 0.4, place + 0.4, color=_BASELINE, linestyle="--")
    axes.set_xticks(range(len(found)), [str(one.k) for one in found])
    axes.set(xlim=(-0.6, len(found) - 0.4), xlabel="k, dimensions of the subspaces")
    axes.set(ylim=(0, 1.02), ylabel=r"overlap $\|V_i^\top V_j\|_F^2 \,/\, k$")
    if found:  # more than at larger k, where some images have too small a rank
        images, pairs = measured(found[0].overlap_shared), measured(found[0].overlap_pairs)
        axes.set_title(f"images: {len(images):,}, pairs: {len(pairs):,}", fontsize=7)
    _clean(axes, grid="y")


def _box(axes: Axes, values: np.ndarray, place: float, color: str) -> None:
    if len(values := measured(values)) == 0:
        return
    line = {"color": color, "linewidth": 0.9}
    axes.boxplot(
        values, positions=[place], widths=0.28, whis=(5, 95), showfliers=False,
        manage_ticks=False, patch_artist=True, medianprops={**line, "linewidth": 1.6},
        boxprops={"facecolor": color, "alpha": 0.35, "linewidth": 0}, whiskerprops=line,
        capprops=line,
    )  # fmt: skip


def _draw_angles(axes: Axes, found: Sequence[Subspaces]) -> None:
    if found:
        # Subspaces of all channels are equal: they have no angle to show.
        largest = ([one for one in found if one.overlap_random < 1] or found)[-1]
        places = np.arange(1, largest.k + 1)
        for name, angles, color, style, marker in (
            ("image and shared subspace", largest.angles_shared, _OWN, "-", "o"),
            ("pairs of images", largest.angles_pairs, _PAIRS, "-", "s"),
            ("random subspaces", largest.angles_random, _BASELINE, "--", ""),
        ):
            at = places[: len(angles)]
            _line(axes, at, angles, color, name, linestyle=style, marker=marker)
        axes.set_title(f"principal angles of k = {largest.k}", fontsize=7)
        axes.set_xlim(0.5, largest.k + 0.5)
    axes.set(ylim=(0, 92), yticks=range(0, 91, 15), ylabel="mean angle (degrees)")
    axes.set_xlabel("angle, from the smallest")
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))
    _clean(axes, grid="y")


def _compare_ranks(axes: Axes, layers: Sequence[LayerResult]) -> None:
    level = max(layers[0].ranks.levels)
    styles = ((_OWN, "o", -0.12), (_SHARED, "s", 0.12))
    for row, layer in enumerate(layers):
        for (name, ranks), (color, marker, offset) in zip(layer.bases(), styles, strict=False):
            found = ranks.distribution(level)
            mean, tail = found.mean / layer.channels, found.percentile_99 / layer.channels
            axes.hlines(row + offset, mean, tail, color=color, linewidth=0.9)
            _dot(axes, mean, row + offset, marker, color, f"{name} basis (line: mean to p99)")
    axes.set(xlim=(0, 1.03), xlabel=f"rank@{percent(level)} / D")


def _compare_rotation(axes: Axes, layers: Sequence[LayerResult]) -> None:
    sizes = subspace_sizes_of(layers)
    styles = _styles(sizes)
    axes.axvline(0, color=_BASELINE, linestyle="--", linewidth=0.9)
    for row, layer in enumerate(layers):
        for found in layer.rotation:
            color, marker = styles[found.k]
            place = row + 0.5 * ((sizes.index(found.k) + 0.5) / len(sizes) - 0.5)
            with_shared = found.mean_excess(found.overlap_shared)
            between_pairs = found.mean_excess(found.overlap_pairs)
            _dot(axes, with_shared, place, marker, color, f"k = {found.k}")
            _dot(axes, between_pairs, place, marker, color, hollow=True)
    label = "excess overlap, 0 is random\n(filled: shared, open: pairs)"
    axes.set(xlim=(-0.05, 1.03), xlabel=label)


def _compare_bandwidths(axes: Axes, layers: Sequence[LayerResult]) -> None:
    styles = _styles(bandwidth_levels_of(layers))
    for row, layer in enumerate(layers):
        if layer.sep is not None:
            noise = layer.sep.white_noise_bandwidths
            axes.vlines(noise, row - 0.3, row + 0.3, color=_BASELINE, linewidth=0.9)
        for level, width in layer.bandwidths().items():
            color, marker = styles[level]
            _dot(axes, width, row, marker, color, f"{percent(level)} %")
    conventions = sorted({layer.sep.convention for layer in layers if layer.sep})
    label = f"SEP bandwidth, {'/'.join(conventions)} order\n(bars: white noise)"
    axes.set(xlim=(0, 1.03), xlabel=label)


def _styles(values: Sequence[float]) -> dict[float, tuple[str, str]]:
    """Return a color and a marker for each level or subspace size."""
    return dict(zip(values, itertools.cycle(_SERIES), strict=False))


def _dot(
    axes: Axes, x: float, y: float, marker: str, color: str, label: str = "", hollow: bool = False
) -> None:
    axes.plot(
        [x], [y], marker, color=color, markersize=4, markerfacecolor="white" if hollow else color,
        markeredgewidth=0.8, linestyle="", label=label, zorder=3,
    )  # fmt: skip


def _line(axes: Axes, x: np.ndarray, y: Any, color: str, label: str, **style: Any) -> None:
    every = max(1, len(x) // 12) if len(x) > 30 else 1  # markers must not hide a long line
    style = {"linewidth": 1.3, "markersize": 2.5, "markevery": every} | style
    axes.plot(x, y, color=color, label=label, **style)


def _band(axes: Axes, x: np.ndarray, curve: Curve, color: str, name: str, **style: Any) -> None:
    """Draw a mean curve in percent, with its standard deviation clipped to 0 to 100."""
    mean, std = curve.mean, curve.std
    if std is not None:
        lower, upper = np.clip(mean - std, 0, 1), np.clip(mean + std, 0, 1)
        axes.fill_between(x, 100 * lower, 100 * upper, color=color, alpha=0.22, linewidth=0)
    marker = "o" if len(x) == 1 else ""  # a single point has no line
    _line(axes, x, 100 * mean, color, name, **{"linewidth": 1.4, "marker": marker} | style)


def _figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height))
    figure.set_layout_engine("constrained", w_pad=0.06, h_pad=0.05)
    return figure


def _in_panels(
    models: Sequence[ModelResult],
    draw: Callable[[Axes, ModelResult], None],
    height: float,
    sharey: bool = False,
) -> Figure:
    """Draw every model into a panel, up to two in a row."""
    columns = min(2, len(models))
    rows = -(-len(models) // columns)
    figure = _figure(columns * _PANEL_WIDTH, rows * height + 0.25)
    panels = list(figure.subplots(rows, columns, sharey=sharey, squeeze=False).flat)
    for axes, model in zip(panels, models, strict=False):
        draw(axes, model)
        text = f"{_shortened(model.name, 50)}\n{_details(model)}"
        axes.set_title(text, loc="left", fontsize=7.5, color=_name_color(model))
    for axes in panels[len(models) :]:
        axes.set_visible(False)
    _legend(figure)
    return figure


def _subfigures(
    models: Sequence[ModelResult], height: float, in_rows: bool = False
) -> tuple[Figure, list[SubFigure]]:
    """Make a part under each model's name: a row at page width, or up to two in a row."""
    columns = 1 if in_rows else min(2, len(models))
    rows = -(-len(models) // columns)
    figure = _figure((2 if in_rows else columns) * _PANEL_WIDTH, rows * height + 0.25)
    parts = list(figure.subfigures(rows, columns, squeeze=False).flat)[: len(models)]
    for part, model in zip(parts, models, strict=True):
        name = f"{_shortened(model.name, 56)}: " if in_rows else f"{_shortened(model.name, 50)}\n"
        text = f"{name}{_details(model)}"
        part.suptitle(text, x=0.02, ha="left", fontsize=8, color=_name_color(model))
    return figure, parts


def _name_color(model: ModelResult) -> str:
    return _WARNING if model.weights == UNTRAINED else "black"


def _details(model: ModelResult) -> str:
    is_untrained = model.weights == UNTRAINED
    weights = "UNTRAINED WEIGHTS" if is_untrained else _shortened(model.weights, 24)
    return f"{weights}, N = {model.last.tokens}, D = {model.last.channels}, {_images(model)}"


def _row_label(model: ModelResult) -> str:
    weights = "UNTRAINED WEIGHTS\n" if model.weights == UNTRAINED else ""
    return f"{_shortened(model.name, 30)}\n{weights}D = {model.last.channels}, {_images(model)}"


def _images(model: ModelResult) -> str:
    return f"{model.images:,} image" + "s" * (model.images != 1)


def _shortened(name: str, width: int) -> str:
    """Drop the middle of a long name, since models differ at either end; escape the rest."""
    name = " ".join(name.split())
    if len(name) > width:
        tail = width // 2 - 1
        name = f"{name[: width - tail - 1]}…{name[-tail:]}"
    return printable(name).replace("$", r"\$")  # matplotlib reads $ as mathematics


def _legend(figure: Figure) -> None:
    """Put one legend for all panels below them, in two columns if one row would not fit."""
    entries: dict[str, Any] = {}
    for axes in figure.axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            entries.setdefault(label, handle)
    inches = sum(0.5 + 0.06 * len(label) for label in entries)
    if entries:
        figure.legend(
            list(entries.values()), list(entries), loc="outside lower center",
            ncols=len(entries) if inches < figure.get_figwidth() else 2, frameon=False,
            handlelength=1.6, columnspacing=1.2,
        )  # fmt: skip


def _legend_below(axes: Axes, figure: Figure, columns: int) -> None:
    """Put a panel's own legend at a fixed distance below it."""
    handles = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    below = axes.transAxes + ScaledTranslation(0, -0.5, figure.dpi_scale_trans)
    axes.legend(
        list(handles.values()), list(handles), loc="upper center", ncols=columns,
        bbox_to_anchor=(0.5, 0), bbox_transform=below, frameon=False, handletextpad=0.1,
        columnspacing=0.5, fontsize=6.5,
    )  # fmt: skip


def _clean(axes: Axes, grid: str | None = None) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    if grid:
        axes.grid(axis=grid, color="#e2e2e2", linewidth=0.5)  # type: ignore[arg-type]
    axes.set_axisbelow(True)


def _save(figure: Figure, path: Path) -> None:
    options: dict[str, dict[str, Any]] = {
        "png": {"dpi": 150},
        "pdf": {"metadata": {"CreationDate": None}},  # equal results give equal files
    }
    for suffix, extra in options.items():
        image = io.BytesIO()
        figure.savefig(image, format=suffix, **extra)
        # The first file has fixed the layout; to compute it again takes half of the time.
        figure.set_layout_engine("none")
        with replacing(path.with_suffix(f".{suffix}")) as file:
            file.write(image.getvalue())


# The function of a figure, models on a page, and which models have data for it.
_KINDS: tuple[tuple[Any, int, Callable[[ModelResult], bool]], ...] = (
    (layerwise_rank, 6, lambda model: True),
    (layerwise_rotation, 6, has_shared_depth),
    (rank_histograms, 4, lambda model: True),
    (shared_basis, 6, lambda model: True),
    (sep, 4, lambda model: model.last.sep is not None),
    (rotation, 3, lambda model: bool(model.last.rotation)),
)
