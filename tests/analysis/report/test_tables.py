"""Tables: the right numbers in the right cells, in three notations."""

import csv
import dataclasses
import io

import numpy as np
import pytest

from fastkd.analysis import results as readings
from fastkd.analysis.report import tables
from fastkd.analysis.report.text import (
    BESIDE,
    INTERVAL,
    MISSING,
    SPREAD,
    STATISTICS,
    Column,
    Table,
)
from tests.analysis import made_results as made


@pytest.fixture(scope="module")
def model():
    return made.model()


def with_last(model, **changes):
    last = dataclasses.replace(model.last, **changes)
    return dataclasses.replace(model, layers=[*model.layers[:-1], last])


def as_dicts(table):
    return list(csv.DictReader(io.StringIO(table.to_csv())))


def small(*columns, rows, **extra):
    return Table("small_table", "Small", "For tests.", columns, rows, **extra)


def shown(column, cell):
    return small(column, rows=[(cell,)]).to_markdown().splitlines()[-1].strip("| ")


def test_last_layer_ranks_hold_every_statistic_of_both_bases(model):
    rows = as_dicts(tables.last_layer_ranks([model]))

    bases = [("own", model.last.ranks), ("shared", model.last.shared.ranks)]
    expected = [(basis, level, ranks.distribution(level)) for basis, ranks in bases
                for level in ranks.levels]  # fmt: skip
    assert len(rows) == len(expected)
    for row, (basis, level, found) in zip(rows, expected):
        assert row["Basis"] == basis
        assert float(row["Energy (%)"]) == pytest.approx(100 * level)
        assert float(row["Rank, mean"]) == found.mean
        assert float(row["Rank, standard deviation"]) == found.std
        assert float(row["Rank, median"]) == found.median
        assert float(row["Rank, 99th percentile"]) == found.percentile_99


def test_images_without_a_rank_are_not_counted(model):
    values = model.last.ranks.values.copy()
    values[:3] = 0
    ranks = dataclasses.replace(model.last.ranks, values=values)

    rows = as_dicts(tables.last_layer_ranks([with_last(model, ranks=ranks)]))

    assert rows[0]["Images"] == str(model.images - 3)


def test_layer_table_has_a_row_for_every_layer_of_every_model(model):
    other = made.model("other", layers=2, seed=1)

    rows = as_dicts(tables.layer_ranks([model, other]))

    assert [(row["Model"], row["Layer"]) for row in rows] == [
        (one.name, layer.name) for one in (model, other) for layer in one.layers
    ]
    assert float(rows[-1]["Effective rank, mean"]) == pytest.approx(
        other.last.effective_rank.mean(), rel=1e-6
    )


def test_sep_rows_stand_beside_white_noise_with_bootstrap_intervals(model):
    ours, noise = as_dicts(tables.sep_bandwidths([model]))

    assert float(ours["b(60 %)"]) == model.last.sep.bandwidths[1]
    assert float(ours["b(60 %), lower end"]) == model.last.sep_test.observed_interval[1, 0]
    assert noise["Signal"] == "white noise"
    assert float(noise["b(50 %)"]) == 0.5
    assert noise["b(50 %), lower end"] == ""


def test_sep_of_a_model_without_test_has_no_interval(model):
    cell = tables.sep_bandwidths([with_last(model, sep_test=None)]).rows[0][-1]

    assert cell == (model.last.sep.bandwidths[-1], None, None)


def test_half_the_energy_is_explained_only_where_order_is_full(model):
    folded = with_last(model, sep=dataclasses.replace(model.last.sep, convention="folded"))

    assert "0.5 by construction" in tables.sep_bandwidths([model]).explanation
    assert "0.5 by construction" not in tables.sep_bandwidths([folded]).explanation


def test_permutation_test_shows_shift_interval_and_p(model):
    test = model.last.sep_test

    row = as_dicts(tables.sep_permutations([model]))[2]

    assert float(row["Shift"]) == test.shift[2]
    assert float(row["Shift, upper end"]) == test.shift_interval[2, 1]
    assert float(row["p"]) == test.p_value[2]
    assert int(row["Permutations"]) == len(test.permuted)


def test_rotation_leaves_out_images_of_low_rank_and_says_so(model):
    rotation = model.last.shared.rotation[0]
    overlap = rotation.overlap_shared.copy()
    overlap[:4] = np.nan
    shared = dataclasses.replace(
        model.last.shared, rotation=[dataclasses.replace(rotation, overlap_shared=overlap)]
    )

    table = tables.rotation([with_last(model, shared=shared)])
    row = as_dicts(table)[0]

    assert row["Images"] == str(model.images - 4)
    assert float(row["Overlap with shared, mean"]) == pytest.approx(np.nanmean(overlap), rel=1e-6)
    assert f"4 images of rank below k = {rotation.k}" in table.notes[0]


def test_excess_is_measured_from_random_subspaces():
    assert readings.excess_overlap(0.25, 0.25) == 0
    assert readings.excess_overlap(1.0, 0.25) == 1
    assert readings.excess_overlap(0.625, 0.25) == 0.5
    assert np.isnan(readings.excess_overlap(1.0, 1.0))


def test_rotation_without_pairs_shows_missing_cells(model):
    rotation = [
        dataclasses.replace(r, overlap_pairs=np.empty(0), angles_pairs=np.empty(0))
        for r in model.last.shared.rotation
    ]
    shared = dataclasses.replace(model.last.shared, rotation=rotation)

    line = tables.rotation([with_last(model, shared=shared)]).to_markdown().splitlines()[2]

    assert line.count(f" {MISSING} ") == 3  # overlap, excess and angles between pairs
    assert line.endswith("| 0 |")


def test_comparison_puts_excess_overlap_and_bandwidth_of_all_models_side_by_side(model):
    bare = with_last(made.model("bare"), shared=None, sep=None, sep_test=None)

    with_all, without = as_dicts(tables.comparison([model, bare]))

    rotation = model.last.shared.rotation[1]
    mean = rotation.overlap_shared.mean()
    excess = float(with_all[f"Excess overlap with shared, k = {rotation.k}, mean"])
    assert excess == pytest.approx(
        (mean - rotation.overlap_random) / (1 - rotation.overlap_random), rel=1e-6
    )
    assert float(with_all["b(90 %)"]) == model.last.sep.bandwidths[-1]
    assert without["b(90 %)"] == ""
    assert without["rank@99, shared basis, mean"] == ""


@pytest.mark.parametrize(
    ("changes", "missing"),
    [
        ({"sep": None, "sep_test": None}, {"sep_bandwidths", "sep_permutations"}),
        ({"sep_test": None}, {"sep_permutations"}),
        ({"shared": None}, {"rotation"}),
    ],
)
def test_tables_without_content_are_left_out(model, changes, missing):
    everything = {table.name for table in tables.all_tables([model], {})}

    found = {table.name for table in tables.all_tables([with_last(model, **changes)], {})}

    assert everything - found == missing


def test_a_second_pass_over_all_layers_fills_the_tables_in_depth():
    model = made.model(layers=3, shared="all")

    found = {table.name: table for table in tables.all_tables([model], {})}

    names = [layer.name for layer in model.layers]
    assert [row["Layer"] for row in as_dicts(found["shared_ranks_by_layer"])] == names
    for name in ("rotation", "sep_permutations"):
        assert list(dict.fromkeys(row["Layer"] for row in as_dicts(found[name]))) == names


def test_sep_of_every_layer_has_a_row(model):
    rows = as_dicts(tables.sep_by_layer([model]))

    assert [float(row["b(90 %)"]) for row in rows] == [
        layer.sep.bandwidths[-1] for layer in model.layers
    ]


def test_skipped_images_are_listed_by_name_and_reason():
    model = made.model(skipped=[("n01/a.JPEG", "truncated"), ("n02/b.JPEG", "not an image")])

    rows = as_dicts(tables.skipped_images([model]))

    assert [(row["Image"], row["Reason"]) for row in rows] == model.skipped


@pytest.mark.parametrize(
    ("column", "cell", "expected"),
    [
        (Column("median"), 34.0, "34"),
        (Column("median"), 34.5, "34.5"),
        (Column("mean", 1, SPREAD), (34.0, 4.123), "34.0 ± 4.1"),
        (Column("count", 0), 12345, "12,345"),
        (Column("b", 3, INTERVAL), (0.5, 0.49, 0.51), "0.500 [0.490, 0.510]"),
        (Column("b", 3, INTERVAL), (0.5, None, None), "0.500"),
        (Column("rank", 1, STATISTICS), (3.25, 3.0, 9.0), "3.2 / 3 / 9"),
        (Column("beside", 1, BESIDE, signed=True), (14.0, 15, -1.0), "14 / 15 / \u22121"),
        (Column("signed", 3, signed=True), -0.0001, "+0.000"),
        (Column("nothing"), float("nan"), MISSING),
        (Column("nothing", 1, SPREAD), (None, None), MISSING),
        (Column("text", text=True), None, MISSING),
    ],
)  # fmt: skip
def test_cells_are_rounded_for_readers(column, cell, expected):
    assert shown(column, cell) == expected


def test_csv_keeps_full_precision_and_leaves_missing_values_empty():
    table = small(Column("x", 1, SPREAD), rows=[((0.1 + 0.2, float("nan")),)])

    assert table.to_csv() == '"x, mean","x, standard deviation"\n0.30000000000000004,\n'


def test_repeated_groups_are_blank_for_readers_only():
    columns = (Column("m", text=True, group=True), Column("D", 0, group=True), Column("k", 0))
    table = small(*columns, rows=[("a", 8, 1), ("a", 8, 2), ("b", 8, 1)])

    assert table.to_markdown().splitlines()[2:] == ["| a | 8 | 1 |", "|  |  | 2 |", "| b | 8 | 1 |"]
    assert table.to_csv().splitlines()[2] == "a,8,2"


def test_names_of_models_are_no_formulas_and_steer_nothing():
    columns = (Column("model", text=True), Column("difference", signed=True))
    table = Table("t", "Title", "What.", columns, [("=HYPERLINK(1)\x1b[2J", -0.5)])
    assert table.to_csv().splitlines()[1] == r"'=HYPERLINK(1)\x1b[2J,-0.5"
    for text in (table.to_markdown(), table.to_latex()):
        assert "\x1b" not in text


def test_markdown_escapes_what_would_break_a_table():
    assert shown(Column("m", text=True), "a|b<c>\n*d*") == r"a\|b&lt;c&gt; \*d\*"


def test_latex_escapes_its_special_characters():
    table = small(Column("100 %", text=True), rows=[("a_b & c#1 $x$ {y} 5 ± 1\\",)])

    text = table.to_latex()

    assert r"a\_b \& c\#1 \$x\$ \{y\} 5 $\pm$ 1\textbackslash{} \\" in text
    assert r"100 \% \\" in text


def test_latex_is_a_booktabs_table_with_caption_and_label():
    text = small(Column("m", text=True), Column("D", 0), rows=[("a", 8)], notes=["n"]).to_latex()

    for part in (r"\begin{tabular}{lr}", r"\toprule", r"\midrule", r"\bottomrule"):
        assert part in text
    assert r"\caption{Small. For tests. n.}" in text
    assert r"\label{tab:small-table}" in text
