"""Per-image spectra: ranks, curves, and what is left out."""

import math

import numpy as np
import pytest
import torch

from fastkd.analysis import LEVELS, ImageSpectra
from tests.analysis.made_tokens import deficient, in_plane, normal


def result_of(*batches, levels=LEVELS):
    spectra = ImageSpectra(levels)
    for batch in batches:
        spectra.update(batch)
    return spectra.result()


def ranks_by_svd(x, levels=LEVELS):
    energies = torch.linalg.svdvals(x.double()).square().numpy()
    parts = energies.cumsum(axis=1) / energies.sum(axis=1, keepdims=True)
    return np.stack([[np.argmax(p >= q * (1 - 1e-12)) + 1 for q in levels] for p in parts])


@pytest.mark.parametrize(
    "tokens",
    [
        normal(5, 20, 7),
        normal(5, 7, 20),
        normal(5, 1, 9),
        deficient(5, 16, 24),
        normal(2, 9, 9).half(),
    ],
    ids=["tall", "wide", "one token", "deficient", "half"],
)
def test_ranks_curves_and_measures_are_those_of_an_svd(tokens):
    result = result_of(tokens)
    values = torch.linalg.svdvals(tokens.double()).numpy()
    energies = values**2
    parts = energies.cumsum(axis=1) / energies.sum(axis=1, keepdims=True)
    weights = values / values.sum(axis=1, keepdims=True)
    entropy = -(weights * np.log(np.maximum(weights, 1e-300))).sum(axis=1)
    assert (result.ranks.values == ranks_by_svd(tokens)).all()
    np.testing.assert_allclose(result.curve.mean, parts.mean(axis=0), atol=1e-6)
    np.testing.assert_allclose(result.curve.std, parts.std(axis=0), atol=1e-5)
    np.testing.assert_allclose(result.stable_rank, energies.sum(1) / energies[:, 0], rtol=1e-5)
    # A missing singular value comes out of a float32 Gram matrix as one of up to 3e-4.
    np.testing.assert_allclose(result.effective_rank, np.exp(entropy), rtol=2e-2)


def test_images_of_known_rank_have_it():
    batch = torch.stack([in_plane(range(k)) for k in (1, 4, 10)])
    result = result_of(batch)
    expected = [[math.ceil(q * k - 1e-9) for q in LEVELS] for k in (1, 4, 10)]
    # 16 tokens do not share out evenly among 10 channels: 6 of them hold two each.
    expected[2] = [7, 9, 10, 10]
    assert result.ranks.values.tolist() == expected
    assert result.stable_rank[:2].tolist() == pytest.approx([1, 4])
    assert result.effective_rank[:2].tolist() == pytest.approx([1, 4], rel=1e-2)


def test_images_without_energy_and_not_finite_ones_have_no_rank_and_are_counted():
    batch = normal(6, 4, 6)
    batch[1] = 0
    batch[2, 3, 3] = torch.nan
    batch[4, 0, 0] = torch.inf
    result = result_of(batch)
    assert (len(result.finite), result.without_energy, (~result.finite).sum()) == (6, 1, 2)
    assert (result.ranks.values[:, 0] == 0).tolist() == [False, True, True, False, True, False]
    assert np.isnan(result.effective_rank).tolist() == [False, True, True, False, True, False]
    clean = result_of(batch[[0, 3, 5]])
    np.testing.assert_allclose(result.curve.mean, clean.curve.mean)


def test_batches_merging_and_states_give_what_one_batch_gives_in_order_of_places():
    batch = normal(9, 5, 8)
    whole = result_of(batch)
    first, second, restored = ImageSpectra(), ImageSpectra(), ImageSpectra()
    second.update(batch[[7, 0, 3]], [7, 0, 3])
    first.update(batch[[8, 1]], [8, 1])
    first.update(batch[[2, 4, 5, 6]], [2, 4, 5, 6])
    restored.restore(second.state())
    first.merge(restored)
    assert (first.result().ranks.values == whole.ranks.values).all()
    np.testing.assert_allclose(first.result().curve.mean, whole.curve.mean)
    np.testing.assert_allclose(first.result().effective_rank, whole.effective_rank)


def test_images_of_different_sizes_share_one_result():
    batches = normal(2, 3, 8), normal(2, 6, 8, seed=1), normal(2, 4, 8)
    result = result_of(*batches)
    assert result.ranks.largest == 6
    alone = [result_of(batch).curve.mean for batch in batches]
    extended = [np.pad(curve, (0, 6 - len(curve)), constant_values=1) for curve in alone]
    np.testing.assert_allclose(result.curve.mean, np.mean(extended, axis=0), atol=1e-7)


def test_other_widths_levels_and_kinds_are_refused():
    spectra = ImageSpectra()
    spectra.update(normal(1, 3, 4))
    with pytest.raises(ValueError, match="must have 4 channels as before, got 5"):
        spectra.update(normal(1, 3, 5))
    with pytest.raises(ValueError, match=r"ImageSpectra\.merge: .*got a ImageSpectra with"):
        spectra.merge(ImageSpectra((0.5,)))
    with pytest.raises(ValueError, match="no image was seen"):
        ImageSpectra().result()
    for levels in ((), (0.0,), (1.1,)):
        with pytest.raises(ValueError, match="levels must be in"):
            ImageSpectra(levels)
    with pytest.raises(ValueError, match=r"\[B, N, D\].*batch dimension"):
        spectra.update(normal(3, 4))
    with pytest.raises(TypeError, match="tokens must have a float dtype"):
        spectra.update(torch.ones(1, 2, 4, dtype=torch.int64))
