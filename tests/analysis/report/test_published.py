"""The paper's numbers: as printed, and beside the right models."""

import csv
import dataclasses
import io

import numpy as np
import pytest
import timm

from fastkd.analysis.report.published import (
    match,
    paper_bandwidths,
    paper_ranks,
    published,
)
from fastkd.analysis.report.text import MISSING
from tests.analysis import made_results as made

CAIT = "cait_s24_224.fb_dist_in1k"


def by_name():
    return {row.name: row for row in published().models}


def beside(model, **settings):
    return match(model, {**made.SETTINGS, **settings})


def paper_like(name=CAIT, **changes):
    """A model with nothing that sets it apart from the paper's CaiT-S24 but its values."""
    model = made.model(name, layers=1, tokens=2, channels=384, images=1, sizes=(1,))
    return dataclasses.replace(model, images=1000, **changes)


def test_rows_are_the_papers():
    rows = by_name()

    assert len(rows) == 14
    assert rows["CaiT-S24"].image_ranks == {0.8: 14, 0.9: 34, 0.95: 61, 0.99: 121}
    assert rows["CaiT-S24"].dataset_ranks[0.99] == 359
    assert rows["ViT-Tiny"].image_ranks[0.99] == 52
    assert rows["ViT-Large (CLIP)"].dataset_ranks[0.8] == 230


@pytest.mark.parametrize(
    ("name", "printed"),
    [
        ("CaiT-S24", [0.500, 0.599, 0.703, 0.805, 0.901]),
        ("ViT-Tiny", [0.505, 0.604, 0.703, 0.797, 0.901]),
        ("DeiT-Small", [0.503, 0.602, 0.701, 0.797, 0.901]),
        ("Swin-Small", [0.501, 0.599, 0.701, 0.799, 0.901]),
        ("ViT-Huge (MAE)", [0.494, 0.593, 0.695, 0.800, 0.901]),
    ],
)
def test_bandwidths_round_to_what_is_printed(name, printed):
    assert [round(width, 3) for width in by_name()[name].bandwidths.values()] == printed


def test_ranks_grow_with_the_level_and_the_shared_basis_never_needs_fewer():
    for row in published().models:
        own, shared = list(row.image_ranks.values()), list(row.dataset_ranks.values())
        assert own == sorted(own)
        assert shared == sorted(shared)
        assert all(a <= b <= row.channels for a, b in zip(own, shared)), row.name


def test_timm_has_the_weights_of_every_row():
    pretrained = set(timm.list_pretrained())

    assert {row.timm for row in published().models} <= pretrained


def test_pretrained_weights_of_the_paper_match_without_reservation():
    found = beside(paper_like())

    assert found.published.name == "CaiT-S24"
    assert found.notes == ()


@pytest.mark.parametrize(
    ("model", "note"),
    [
        (paper_like("cait_s24_224"), "which pretrained weights these are is not recorded"),
        (paper_like(weights="untrained"), "untrained weights"),
        (paper_like(weights="run/best.safetensors"), "the weights are run/best.safetensors"),
        (paper_like(architecture="", weights="saved tokens"), "matched by name only"),
        (dataclasses.replace(paper_like(), images=300), "300 images, the paper's 1,000"),
        (paper_like(input_size=(384, 384)), "images of 384 x 384, the paper's of 224 x 224"),
        (paper_like(name="deit_small_patch16_224.fb_in1k"), None),
    ],
)
def test_a_match_carries_its_caveats(model, note):
    found = beside(model)

    assert found.published is not None
    if note is None:
        assert found.notes == ()
    else:
        assert note in "; ".join(found.notes)


def test_centered_tokens_and_folded_patterns_are_noted():
    model = paper_like()
    folded = dataclasses.replace(model.last.sep, convention="folded")
    last = dataclasses.replace(model.last, sep=folded)

    notes = "; ".join(beside(dataclasses.replace(model, layers=[last]), centered=True).notes)

    assert "tokens were centered" in notes
    assert "SEP is folded" in notes


@pytest.mark.parametrize("prefix", ["", "timm/", "hf_hub:timm/"])
def test_a_hub_prefix_does_not_hide_a_model(prefix):
    assert beside(paper_like(prefix + CAIT)).published.name == "CaiT-S24"


def test_other_weights_of_the_same_architecture_do_not_match():
    found = beside(paper_like("vit_base_patch16_224.augreg2_in21k_ft_in1k"))

    assert found.published is None
    assert "vit_base_patch16_224.dino and vit_base_patch16_224.mae" in found.notes[0]


def test_an_architecture_that_the_paper_has_twice_needs_its_tag():
    assert beside(paper_like("vit_base_patch16_224")).published is None
    assert beside(paper_like("vit_base_patch16_224.dino")).published.name == "ViT-Base (DINO)"


def test_models_outside_the_paper_are_listed_as_such():
    table = paper_ranks([made.model("my_model", layers=1)], made.SETTINGS)

    assert table.rows[0][:3] == ("my_model", "no", None)
    assert table.notes == ["my_model: not in the paper"]
    assert table.to_markdown().count(MISSING) == 5


def test_the_table_holds_ours_theirs_and_the_difference():
    model = paper_like()
    values = np.tile(np.array([[20, 30, 60, 130]], dtype=np.int32), (3, 1))
    ranks = dataclasses.replace(model.last.ranks, values=values)
    model = dataclasses.replace(model, layers=[dataclasses.replace(model.last, ranks=ranks)])

    rows = list(csv.DictReader(io.StringIO(paper_ranks([model], {}).to_csv())))

    assert [row["Basis"] for row in rows] == ["own", "shared"]
    found = [float(rows[0][f"rank@99, {part}"]) for part in ("ours", "published", "difference")]
    assert found == [130, 121, 9]


def test_bandwidths_stand_beside_the_papers():
    model = paper_like()

    (row,) = paper_bandwidths([model], {}).rows

    ours, theirs, difference = row[-1]
    assert ours == model.last.sep.bandwidths[-1]
    assert theirs == 346 / 384
    assert difference == pytest.approx(ours - theirs)


def test_levels_that_were_not_measured_stay_empty():
    model = paper_like()
    ranks = dataclasses.replace(
        model.last.ranks, levels=(0.5,), values=model.last.ranks.values[:, :1]
    )
    model = dataclasses.replace(
        model, layers=[dataclasses.replace(model.last, ranks=ranks, shared=None)]
    )

    (row,) = paper_ranks([model], {}).rows

    assert row[3] == (None, 14, None)
