"""SEP over a data set: known frequencies, the permutation test, and merging."""

import numpy as np
import pytest
import torch

from fastkd.analysis import TokenPattern
from fastkd.ops import sep
from tests.analysis.made_tokens import normal, waves


def pattern_of(*batches, convention="full", detailed=False):
    pattern = TokenPattern(convention, detailed)
    for batch in batches:
        pattern.update(batch)
    return pattern


@pytest.mark.parametrize("detailed", [False, True])
@pytest.mark.parametrize("frequency", [0, 1, 5, 15])
def test_the_bandwidth_of_waves_is_their_frequency(frequency, detailed):
    tokens = torch.stack([waves(frequency), waves(frequency) * 3])
    full = pattern_of(tokens, detailed=detailed).result()
    first, second = (frequency + 1) / 32, (32 - frequency + 1) / 32 if frequency else 1 / 32
    assert full.bandwidths.tolist() == pytest.approx([first] + [second] * 4)
    folded = pattern_of(tokens, convention="folded", detailed=detailed).result()
    assert folded.bandwidths.tolist() == pytest.approx([(frequency + 1) / 17] * 5)


@pytest.mark.parametrize("dim", [24, 25, 800])
@pytest.mark.parametrize("convention", ["full", "folded"])
def test_mean_and_std_over_batches_are_those_of_all_tokens(convention, dim):
    tokens = normal(5, 6, dim) * torch.linspace(1, 3, dim)
    mean, std = sep(tokens, convention, std=True)
    for detailed in (False, True):
        found = pattern_of(
            tokens[:2], tokens[2:], convention=convention, detailed=detailed
        ).result()
        np.testing.assert_allclose(found.curve.mean, mean, atol=1e-6)
        assert (found.curve.std is None) != detailed
        if detailed:
            np.testing.assert_allclose(found.curve.std, std, atol=1e-5)
        assert len(found.white_noise) == len(mean) and found.tokens == 30


def test_tokens_without_energy_and_bad_images_are_left_out_and_counted():
    tokens = normal(4, 6, 16)
    clean = pattern_of(tokens[:3], detailed=True).result()
    tokens = torch.cat([tokens, torch.zeros(1, 6, 16)])
    tokens[3, 2, 2] = torch.nan
    found = pattern_of(tokens, detailed=True).result()
    assert (found.tokens, found.without_energy) == (18, 6)
    np.testing.assert_allclose(found.curve.mean, clean.curve.mean)
    np.testing.assert_allclose(found.curve.std, clean.curve.std)


def test_the_permutation_test_tells_waves_from_noise():
    low = pattern_of(torch.stack([waves(f) for f in (1, 2, 3, 2)]), detailed=True)
    test = low.permutation_test(permutations=50)
    assert test.permuted.shape == (50, 5)
    assert test.shift[1] < -0.1 and test.p_value[1] == pytest.approx(1 / 51)
    assert (test.shift_interval[:, 0] <= test.shift).all()
    assert (test.shift <= test.shift_interval[:, 1]).all()
    assert (test.observed_interval[:, 0] <= test.observed).all()
    noise = pattern_of(normal(30, 16, 32), detailed=True).permutation_test(permutations=50)
    assert (noise.p_value > 0.05).all()


def test_the_interval_of_the_shift_holds_none_where_there_is_none():
    held = 0
    for seed in range(10):
        pattern = pattern_of(normal(30, 8, 24, seed=seed), detailed=True)
        interval = pattern.permutation_test(permutations=40, seed=seed).shift_interval
        held += ((interval[:, 0] <= 0) & (interval[:, 1] >= 0)).sum()
    assert held >= 0.85 * 50


def test_images_count_by_their_tokens_in_the_interval():
    tokens = torch.stack([waves(2)] + [waves(9)] * 9)
    tokens[1:, 1:] = 0  # one token each, beside sixteen
    test = pattern_of(tokens, detailed=True).permutation_test(permutations=5, levels=(0.25,))
    assert test.observed[0] == pytest.approx(3 / 32)
    assert test.observed_interval[0, 0] == pytest.approx(3 / 32)


def test_permutations_are_those_of_the_tokens_channels():
    tokens = torch.stack([waves(1), waves(4)])
    test = pattern_of(tokens, detailed=True).permutation_test(permutations=2, seed=3)
    generator = torch.Generator().manual_seed(3)
    for found in test.permuted:
        order = torch.randperm(32, generator=generator)
        permuted = pattern_of(tokens[..., order]).result()
        assert found.tolist() == pytest.approx(permuted.bandwidths.tolist())


def test_merging_and_states_give_what_one_pass_gives():
    tokens = normal(6, 5, 12)
    whole = pattern_of(tokens, detailed=True)
    left = TokenPattern(detailed=True)
    left.update(tokens[3:], [3, 4, 5])
    right = TokenPattern(detailed=True)
    right.update(tokens[:3], [0, 1, 2])
    left.merge(right.with_state(right.state()))
    np.testing.assert_allclose(left.result().curve.mean, whole.result().curve.mean)
    ours, truth = (p.permutation_test(permutations=5) for p in (left, whole))
    np.testing.assert_allclose(ours.permuted, truth.permuted)
    np.testing.assert_allclose(ours.observed_interval, truth.observed_interval)


def test_what_cannot_be_answered_is_refused():
    with pytest.raises(ValueError, match="convention must be one of"):
        TokenPattern("half")
    with pytest.raises(ValueError, match="no token with energy was seen"):
        pattern_of(torch.zeros(1, 2, 4)).result()
    with pytest.raises(ValueError, match="needs detailed=True"):
        pattern_of(normal(2, 3, 4)).permutation_test()
    with pytest.raises(ValueError, match=r"TokenPattern\.merge"):
        TokenPattern("full").merge(TokenPattern("folded"))
