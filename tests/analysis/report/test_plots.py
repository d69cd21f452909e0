"""Figures: they show the numbers, name what they show, and survive whatever results hold."""

import dataclasses
import subprocess
import sys
import warnings

import numpy as np
import pytest
from matplotlib.text import Text

from fastkd.analysis.report import plots
from tests.analysis import made_results as made

KINDS = ["layerwise_rank", "rank_histograms", "shared_basis", "sep", "rotation"]


def with_last(model, **changes):
    last = dataclasses.replace(model.last, **changes)
    return dataclasses.replace(model, layers=[*model.layers[:-1], last])


def without_pairs(model):
    rotation = [
        dataclasses.replace(
            found,
            overlap_shared=np.full_like(found.overlap_shared, np.nan),
            overlap_pairs=np.empty(0, np.float32),
            angles_shared=np.full(found.k, np.nan),
            angles_pairs=np.full(found.k, np.nan),
        )
        for found in model.last.shared.rotation
    ]
    return with_last(model, shared=dataclasses.replace(model.last.shared, rotation=rotation))


def without_ranks(model):
    def none(ranks):
        return dataclasses.replace(ranks, values=np.zeros_like(ranks.values))

    nowhere = np.full(model.last.ranks.largest, np.nan)
    layers = [
        dataclasses.replace(layer, ranks=none(layer.ranks), curve=made.Curve(nowhere, nowhere))
        for layer in model.layers
    ]
    shared = dataclasses.replace(model.last.shared, ranks=none(model.last.shared.ranks))
    return with_last(dataclasses.replace(model, layers=layers), shared=shared)


ODD = {
    "one layer, one image, D = 8, k = D": made.model(
        layers=1, images=1, channels=8, tokens=4, sizes=(1, 8)
    ),
    "no pairs, a very long name": without_pairs(made.model("$a_{b|<c>\\" + "x" * 300)),
    "no image has a rank": without_ranks(made.model(weights="untrained")),
    "nothing optional": with_last(made.model(), sep=None, sep_test=None, shared=None),
    "no std, no test": with_last(
        made.model(), sep=made.sep(np.random.default_rng(0), 9, 24), sep_test=None
    ),
}


def texts(figure):
    return " ".join(text.get_text() for text in figure.findobj(Text))


def line(axes, label):
    (found,) = [found for found in axes.get_lines() if found.get_label() == label]
    return found


def test_every_kind_is_saved_as_png_and_pdf(tmp_path):
    saved = plots.save_figures([made.model(), made.model("other", seed=1)], tmp_path)

    assert saved == {kind: [kind] for kind in [*KINDS, "comparison"]}
    for kind in saved:
        assert (tmp_path / f"{kind}.png").read_bytes().startswith(b"\x89PNG")
        assert (tmp_path / f"{kind}.pdf").read_bytes().startswith(b"%PDF")
    assert len(list(tmp_path.iterdir())) == 2 * len(saved)


@pytest.mark.parametrize("name", ODD)
def test_odd_results_are_drawn_without_a_warning(name):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _, _, figure in plots.drawings([ODD[name]]):
            figure.draw_without_rendering()


def test_odd_results_are_compared_without_a_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plots.comparison(list(ODD.values())).draw_without_rendering()


def test_figures_without_content_are_left_out():
    drawn = [kind for kind, _, _ in plots.drawings([ODD["nothing optional"]])]

    assert drawn == ["layerwise_rank", "rank_histograms", "shared_basis"]


def test_many_models_go_on_several_pages():
    small = with_last(made.model(layers=1, images=2), sep=None, sep_test=None, shared=None)
    models = [dataclasses.replace(small, name=f"model {number}") for number in range(7)]

    stems = [stem for _, stem, _ in plots.drawings(models)]

    assert stems == [
        "layerwise_rank",
        "layerwise_rank_2",
        "rank_histograms",
        "rank_histograms_2",
        "shared_basis",
        "shared_basis_2",
        "comparison",
    ]


def test_every_figure_names_model_images_and_untrained_weights():
    models = [made.model("my_model", weights="untrained"), made.model("other", seed=1)]

    for kind, _, figure in plots.drawings(models):
        shown = texts(figure)
        for part in ("my_model", "UNTRAINED WEIGHTS", "20 images", "D = 24"):
            assert part in shown, kind


def test_sep_figures_name_the_convention():
    model = made.model()
    folded = with_last(model, sep=dataclasses.replace(model.last.sep, convention="folded"))

    assert "folded order" in texts(plots.sep([folded]))
    assert "folded/full order" in texts(plots.comparison([folded, model]))


def test_layerwise_rank_shows_the_mean_of_every_layer():
    model = made.model(layers=5)

    (axes,) = plots.layerwise_rank([model]).axes

    expected = [layer.ranks.distribution(0.99).mean for layer in model.layers]
    np.testing.assert_allclose(line(axes, "mean").get_ydata(), expected)


def test_layers_with_a_shared_basis_show_their_ranks_and_rotation_in_depth():
    model = made.model(layers=4, shared="all")

    drawn = {kind: figure for kind, _, figure in plots.drawings([model])}

    ranks = line(drawn["layerwise_rank"].axes[0], "mean, shared basis").get_ydata()
    expected = [layer.shared.ranks.distribution(0.99).mean for layer in model.layers]
    np.testing.assert_allclose(ranks, expected)
    for k in (2, 4):
        assert len(line(drawn["layerwise_rotation"].axes[0], f"k = {k}").get_ydata()) == 4


def test_histograms_count_every_image_in_both_bases():
    model = made.model(images=30)

    panels = plots.rank_histograms([model]).axes

    assert len(panels) == len(model.last.ranks.levels)
    for axes in panels:
        areas = [steps for steps in axes.patches if steps.get_fill()]
        assert [steps.get_data().values.sum() for steps in areas] == [model.images] * 2


def test_energy_curves_mark_the_dimensions_that_reach_each_level():
    model = made.model()

    (axes,) = plots.shared_basis([model]).axes

    mean = model.last.curve.mean
    expected = [int((mean < level).sum()) + 1 for level in model.last.ranks.levels]
    numbers = [int(text.get_text()) for text in axes.texts]
    assert numbers[: len(expected)] == expected


@pytest.mark.parametrize("later", [0, 2])
def test_permutations_lie_below_the_curve_by_as_much_as_they_reach_a_level_later(later):
    model = made.model()
    test = model.last.sep_test
    channels = model.last.channels
    moved = dataclasses.replace(test, permuted=np.tile(test.observed + later / channels, (5, 1)))

    _, lower = plots.sep([with_last(model, sep_test=moved)]).axes

    difference = 100 * (model.last.sep.curve.mean - model.last.sep.white_noise)
    bins = np.round(test.observed * channels).astype(int) - 1
    expected = difference[bins] - 100 * later / channels
    ends = np.array([bar.get_segments()[0][:, 1] for bar in lower.collections])
    np.testing.assert_allclose(ends, np.stack([expected, expected], axis=1), atol=1e-9)


def test_rotation_draws_random_subspaces_beside_the_measured_ones():
    model = made.model(sizes=(2, 4))

    left, right = plots.rotation([model]).axes

    heights = [bar.get_segments()[0][0, 1] for bar in left.collections]
    assert heights == [2 / 24, 4 / 24]
    angles = line(right, "random subspaces").get_ydata()
    np.testing.assert_array_equal(angles, model.last.shared.rotation[-1].angles_random)


def test_angles_are_drawn_of_the_largest_subspaces_that_have_any():
    (_, right) = plots.rotation([made.model(sizes=(4, 24))]).axes  # 24 are all channels

    assert right.get_title() == "principal angles of k = 4"


def test_long_names_lose_their_middle():
    figure = plots.comparison([made.model("teacher_" + "x" * 80 + "_a"), made.model("b")])

    assert "teacher_" in texts(figure)
    assert "_a\n" in texts(figure)
    assert "x" * 40 not in texts(figure)


@pytest.mark.slow
def test_reports_are_read_without_matplotlib():
    code = "import sys, fastkd.analysis.report; sys.exit('matplotlib' in sys.modules)"

    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
