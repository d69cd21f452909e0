"""Ranks against float64 singular values, on spectra that real features have."""

import json

import numpy as np
import pytest
import torch

from fastkd.analysis import (
    LEVELS,
    DatasetRank,
    ImageRank,
    SecondMoment,
    captured_energy,
    image_energies,
    rank_at,
)


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def dominated(batch, tokens, dim):
    """One direction a thousand times the others, as in MAE's last block."""
    return normal(batch, tokens, dim) + 1e3 * normal(batch, tokens, 1, seed=1) * normal(dim, seed=2)


def deficient(batch, tokens, dim, rank=3):
    return normal(batch, tokens, rank) @ normal(batch, rank, dim, seed=1)


CASES = {
    "more_tokens_than_channels": normal(5, 20, 7),
    "more_channels_than_tokens": normal(5, 7, 20),
    "one_token": normal(5, 1, 9),
    "one_channel": normal(5, 9, 1),
    "dominant_direction": dominated(5, 16, 24),
    "rank_deficient": deficient(5, 16, 24),
    "half_precision": normal(5, 16, 24).half(),
}


@pytest.fixture(params=CASES.values(), ids=CASES.keys())
def tokens(request):
    return request.param


def ranks_by_svd(x, levels=LEVELS):
    """[B, levels] straight from the definition."""
    energies = torch.linalg.svdvals(x.double()).square().numpy()
    parts = energies.cumsum(axis=1) / energies.sum(axis=1, keepdims=True)
    return np.stack([[np.argmax(p >= q * (1 - 1e-12)) + 1 for q in levels] for p in parts])


def summary_of(accumulator, *batches):
    for batch in batches:
        accumulator.update(batch)
    return accumulator.result()


def ranks_in(summary, level):
    histogram = summary.histograms[level]
    return np.repeat(np.arange(len(histogram)), histogram)


def basis_of(*batches):
    moment = SecondMoment()
    for batch in batches:
        moment.update(batch)
    return moment.result()


def test_image_energies_are_squared_singular_values(tokens):
    expected = torch.linalg.svdvals(tokens.double()).square()
    scale = expected[:, :1]
    torch.testing.assert_close(
        image_energies(tokens) / scale, expected / scale, rtol=1e-6, atol=1e-12
    )


def test_image_ranks_equal_their_definition_by_svd(tokens):
    summary = summary_of(ImageRank(), tokens)
    expected = ranks_by_svd(tokens)
    for column, level in enumerate(LEVELS):
        assert ranks_in(summary, level).tolist() == sorted(expected[:, column].tolist())


def test_rank_of_a_deficient_image_does_not_exceed_it():
    summary = summary_of(ImageRank(levels=(1.0,)), deficient(4, 16, 24).double())
    assert ranks_in(summary, 1.0).max() <= 16
    assert ranks_in(summary_of(ImageRank(), deficient(4, 16, 24)), 0.99).max() <= 3


def test_equal_energies_reach_a_level_exactly_in_spite_of_rounding():
    rotation = torch.linalg.qr(normal(10, 10, dtype=torch.float64)).Q
    summary = summary_of(ImageRank(levels=(0.7, 0.8, 0.9)), rotation[None])
    assert [int(ranks_in(summary, q)[0]) for q in (0.7, 0.8, 0.9)] == [7, 8, 9]


@pytest.mark.parametrize(
    "make", [ImageRank, lambda: DatasetRank(torch.eye(6))], ids=["own", "shared"]
)
def test_images_without_energy_and_not_finite_ones_are_left_out_and_counted(make):
    batch = normal(6, 4, 6)
    batch[1] = 0
    batch[2, 3, 3] = float("nan")
    batch[4, 0, 0] = float("inf")
    summary = summary_of(make(), batch)
    assert (summary.images, summary.without_energy, summary.non_finite) == (3, 1, 2)
    assert all(histogram.sum() == 3 for histogram in summary.histograms.values())


def test_a_result_without_images_is_refused():
    accumulator = ImageRank()
    accumulator.update(torch.zeros(2, 3, 4))
    with pytest.raises(ValueError, match=r"ImageRank\.result: no image .*2 without energy"):
        accumulator.result()


def test_statistics_are_those_of_the_ranks_over_images():
    batch = torch.cat([deficient(3, 16, 24, rank=2), normal(40, 16, 24)])
    summary = summary_of(ImageRank(), batch)
    ranks = ranks_by_svd(batch)[:, LEVELS.index(0.95)]
    found = summary.statistics[0.95]
    assert found.mean == pytest.approx(ranks.mean())
    assert found.std == pytest.approx(ranks.std())
    assert [found.lower_quartile, found.median, found.upper_quartile, found.percentile_99] == (
        pytest.approx(np.percentile(ranks, [25, 50, 75, 99]).tolist())
    )


def test_batches_and_merging_give_what_one_batch_gives():
    batch = normal(9, 5, 8)
    whole = summary_of(ImageRank(), batch)
    first, second = ImageRank(), ImageRank()
    first.update(batch[:2])
    first.update(batch[2:3])
    second.update(batch[3:])
    first.merge(second)
    assert first.result().to_dict() == whole.to_dict()


def test_images_of_different_sizes_share_one_summary():
    summary = summary_of(ImageRank(), normal(2, 3, 8), normal(2, 6, 8, seed=1), normal(2, 4, 8))
    assert summary.images == 6
    assert summary.largest_possible == 6


def test_merging_with_other_levels_or_another_basis_is_refused():
    with pytest.raises(ValueError, match=r"ImageRank\.merge"):
        ImageRank((0.9,)).merge(ImageRank((0.8,)))
    with pytest.raises(ValueError, match="another basis"):
        DatasetRank(torch.eye(3)).merge(DatasetRank(torch.eye(3).flip(0)))


def test_second_moment_is_uncentred_and_decomposed_in_descending_order():
    batch = normal(6, 5, 4) + 3
    rows = batch.double().flatten(0, 1)
    shared = basis_of(batch[:4], batch[4:])
    rebuilt = shared.vectors @ shared.energies.diag() @ shared.vectors.mT
    torch.testing.assert_close(rebuilt, rows.mT @ rows / 30, rtol=1e-10, atol=1e-12)
    assert (shared.energies.diff() <= 0).all()
    assert shared.tokens == 30


def test_second_moments_merge():
    batch = normal(6, 5, 4)
    left, right = SecondMoment(), SecondMoment()
    left.update(batch[:1])
    right.update(batch[1:])
    left.merge(right)
    torch.testing.assert_close(left.result().energies, basis_of(batch).energies)


def test_second_moment_leaves_out_images_that_are_not_finite():
    batch = normal(3, 5, 4)
    expected = basis_of(batch[:2]).energies
    batch[2, 0, 0] = float("nan")
    shared = basis_of(batch)
    torch.testing.assert_close(shared.energies, expected)
    assert (shared.tokens, shared.non_finite) == (10, 1)


def test_second_moment_of_nothing_is_refused():
    with pytest.raises(ValueError, match="no token was seen"):
        SecondMoment().result()


def test_second_moment_refuses_another_width():
    moment = SecondMoment()
    moment.update(normal(2, 3, 4))
    with pytest.raises(ValueError, match="4 channels as before, got 5"):
        moment.update(normal(2, 3, 5))


def test_captured_energy_is_the_norm_of_the_projection(tokens):
    basis = basis_of(tokens).vectors
    curve = captured_energy(tokens, basis)
    x = tokens.double()
    for d in (1, basis.shape[1] // 2 + 1, basis.shape[1]):
        expected = (x @ basis[:, :d]).norm(dim=(1, 2)) ** 2 / x.norm(dim=(1, 2)) ** 2
        torch.testing.assert_close(curve[:, d - 1], expected, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(curve[:, -1], torch.ones(len(tokens), dtype=torch.float64))


def test_an_image_needs_no_fewer_shared_dimensions_than_its_own(tokens):
    shared = DatasetRank(basis_of(tokens).vectors)
    shared.update(tokens)
    for one in range(len(tokens)):
        own, common = ImageRank(), DatasetRank(shared.basis)
        own.update(tokens[one : one + 1])
        common.update(tokens[one : one + 1])
        for level in LEVELS:
            assert ranks_in(common.result(), level)[0] >= ranks_in(own.result(), level)[0]


def test_images_in_different_planes_share_more_dimensions_than_any_needs():
    batch = torch.zeros(4, 6, 8)
    for image in range(4):
        batch[image, :, 2 * image : 2 * image + 2] = normal(6, 2, seed=image)
    own = summary_of(ImageRank(), batch)
    shared = summary_of(DatasetRank(basis_of(batch).vectors), batch)
    assert own.statistics[0.99].percentile_99 <= 2
    assert shared.statistics[0.99].percentile_99 > 6


def test_rank_at_is_past_the_end_where_a_level_is_never_reached():
    assert rank_at(torch.tensor([[0.2, 0.6, 0.7]]), (0.6, 0.9)).tolist() == [[2, 4]]


@pytest.mark.parametrize("levels", [(), (0.0,), (1.1,)], ids=str)
def test_levels_outside_the_unit_interval_are_refused(levels):
    with pytest.raises(ValueError, match="levels must lie in"):
        ImageRank(levels)


def test_other_shapes_and_integers_are_refused():
    with pytest.raises(ValueError, match=r"\[B, N, D\].*batch dimension"):
        ImageRank().update(normal(3, 4))
    with pytest.raises(TypeError, match="floating-point"):
        SecondMoment().update(torch.ones(1, 2, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match="another layer"):
        captured_energy(normal(1, 2, 3), torch.eye(4))
    with pytest.raises(ValueError, match=r"basis must be \[D, D\]"):
        DatasetRank(torch.ones(4, 2))


def test_a_summary_is_plain_values_for_json():
    summary = summary_of(ImageRank(), normal(3, 4, 5))
    assert json.loads(json.dumps(summary.to_dict()))["statistics"]["0.99"]["mean"] > 0
