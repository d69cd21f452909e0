"""Ranks, curves and subspaces: answers that are known without computing them."""

from __future__ import annotations

import math

import pytest
import torch

from fastkd.ops.spectrum import (
    effective_rank,
    energy_curve,
    overlap,
    principal_angles,
    rank_at,
    singular_values,
    stable_rank,
    subspace,
)


def axes(*numbers: int, dim: int = 6) -> torch.Tensor:
    return torch.eye(dim, dtype=torch.float64)[:, list(numbers)]


def rotated(angle: float) -> torch.Tensor:
    """A line at an angle to the first axis."""
    return axes(0) * math.cos(angle) + axes(1) * math.sin(angle)


def test_rank_at_is_the_first_position_that_reaches_the_part():
    energies = torch.tensor([70.0, 20.0, 9.0, 1.0])
    assert rank_at(energies, (0.69, 0.70, 0.71, 0.9, 0.99, 1.0)).tolist() == [1, 1, 2, 2, 3, 4]


def test_rank_at_one_level_has_no_dimension_for_it():
    assert rank_at(torch.ones(3, 4, 10), 0.8).shape == (3, 4)
    assert rank_at(torch.ones(3, 10), (0.8,)).shape == (3, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_k_of_n_equal_energies_hold_k_parts_of_n(dtype):
    for n in (10, 49, 196, 257):
        energies = torch.full((n,), 0.1, dtype=dtype)
        levels = [k / n for k in range(1, n + 1)]
        assert rank_at(energies, levels).tolist() == list(range(1, n + 1))


def test_a_matrix_without_energy_or_with_nan_has_rank_zero():
    energies = torch.tensor([[0.0, 0.0], [torch.nan, 1.0], [torch.inf, 1.0], [1.0, 0.0]])
    assert rank_at(energies, 0.9).tolist() == [0, 0, 0, 1]


def test_ranks_in_any_basis_take_energies_in_its_order():
    assert rank_at(torch.tensor([1.0, 0.0, 9.0]), 0.9).item() == 3


def test_the_energy_curve_ends_at_one():
    curve = energy_curve(torch.tensor([[3.0, 1.0], [0.0, 0.0], [torch.nan, 1.0]]))
    assert curve[0].tolist() == [0.75, 1.0]
    assert curve[1].tolist() == [0.0, 0.0]
    assert curve[2].isnan().all()


def test_effective_and_stable_rank_of_k_equal_energies_are_k():
    for k in (1, 3, 8):
        energies = torch.zeros(8)
        energies[:k] = 5.0
        assert effective_rank(energies).item() == pytest.approx(k, rel=1e-6)
        assert stable_rank(energies).item() == pytest.approx(k, rel=1e-6)


def test_effective_rank_is_of_singular_values_not_of_energies():
    p = [0.75, 0.25]  # singular values 3 and 1
    expected = math.exp(-sum(x * math.log(x) for x in p))
    assert effective_rank(torch.tensor([9.0, 1.0])).item() == pytest.approx(expected, rel=1e-6)


def test_measures_without_energy_are_zero_and_nan_stays_nan():
    energies = torch.tensor([[0.0, 0.0], [torch.nan, 1.0]])
    for measure in (effective_rank, stable_rank):
        zero, nan = measure(energies).tolist()
        assert zero == 0 and math.isnan(nan)


def test_gradients_are_finite_where_energies_vanish():
    energies = torch.tensor([[4.0, 0.0, 0.0], [0.0, 0.0, 0.0]], requires_grad=True)
    for measure in (effective_rank, stable_rank, energy_curve):
        (gradient,) = torch.autograd.grad(measure(energies).sum(), energies)
        assert gradient.isfinite().all()
    x = torch.zeros(1, 2, 3, requires_grad=True)
    singular_values(x).sum().backward()
    assert (x.grad == 0).all()


@pytest.mark.parametrize("measure", [rank_at, energy_curve, effective_rank, stable_rank])
def test_what_is_no_spectrum_is_refused(measure):
    with pytest.raises(TypeError, match=f"{measure.__name__}: energies must have a float dtype"):
        measure(torch.ones(3, dtype=torch.long))
    with pytest.raises(ValueError, match=r"energies must be \[\.\.\., n\]"):
        measure(torch.ones(3, 0))


@pytest.mark.parametrize("shape", [(3, 7, 12), (3, 12, 7)])
def test_a_subspace_spans_the_leading_right_singular_vectors(shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    found = subspace(x, 4)
    truth = torch.linalg.svd(x.double()).Vh[:, :4].mT
    assert found.shape == (3, shape[-1], 4)
    assert (found.mT @ found - torch.eye(4)).abs().max() < 1e-12
    assert (found @ found.mT - truth @ truth.mT).abs().max() < 1e-10


@pytest.mark.parametrize("shape", [(7, 12), (12, 7)])
def test_weak_directions_are_found_beside_a_dominant_one(shape):
    left, _, right = torch.linalg.svd(
        torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0)),
        full_matrices=False,
    )
    values = torch.logspace(0, -4, 7, dtype=torch.float64)
    found = subspace((left * values) @ right, 5)
    assert overlap(found, right[:5].mT).item() == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("shape", [(4, 6), (6, 4)])
def test_directions_past_the_rank_are_zero(shape):
    x = torch.zeros(shape)
    x[0, 0] = 3.0
    found = subspace(x, 3)
    assert found[:, 0].abs().tolist() == axes(0, dim=shape[1])[:, 0].tolist()
    assert (found[:, 1:] == 0).all()


def test_a_subspace_of_nan_is_nan_and_spoils_no_other():
    x = torch.randn(2, 4, 6)
    clean = subspace(x, 2)
    x[0, 0, 0] = torch.nan
    found = subspace(x, 2)
    assert found[0].isnan().all() and torch.equal(found[1], clean[1])
    assert overlap(found, clean).isnan().tolist() == [True, False]
    assert principal_angles(found, clean).isnan().all(dim=-1).tolist() == [True, False]


def test_angles_between_lines_are_the_angles():
    for angle in (1e-4, 0.3, 1.0, math.pi / 2):
        assert principal_angles(axes(0), rotated(angle)).item() == pytest.approx(angle, abs=1e-7)
        assert overlap(axes(0), rotated(angle)).item() == pytest.approx(
            math.cos(angle) ** 2, abs=1e-12
        )


def test_angles_ascend_and_overlap_is_their_mean_squared_cosine():
    a, b = axes(0, 1, 2), axes(0, 3, 4)
    angles = principal_angles(a, b)
    assert angles.tolist() == pytest.approx([0, math.pi / 2, math.pi / 2], abs=1e-7)
    assert overlap(a, b).item() == pytest.approx(1 / 3)


def test_subspaces_of_different_dimensions_compare_the_smaller_one():
    assert principal_angles(axes(0), axes(0, 1, 2)).tolist() == pytest.approx([0], abs=1e-7)
    assert overlap(axes(0), axes(0, 1, 2)).item() == pytest.approx(1)


def test_one_subspace_compares_with_many():
    many = torch.stack([axes(0, 1), axes(2, 3)])
    assert overlap(many, axes(0, 1)).tolist() == [1, 0]


def test_random_subspaces_overlap_by_k_over_d():
    noise = torch.randn(400, 40, 5, generator=torch.Generator().manual_seed(0))
    bases = torch.linalg.qr(noise.double()).Q
    assert overlap(bases[:200], bases[200:]).mean().item() == pytest.approx(5 / 40, rel=0.05)


def test_bad_subspaces_are_refused():
    x = torch.randn(4, 6)
    with pytest.raises(ValueError, match=r"subspace: k must be from 1 to min\(N, D\) of \[4, 6\]"):
        subspace(x, 5)
    with pytest.raises(ValueError, match=r"overlap: a and b must be \[\.\.\., D, k\] with one D"):
        overlap(axes(0, dim=5), axes(0, dim=6))
    with pytest.raises(RuntimeError, match="subspace: x requires a gradient"):
        subspace(x.requires_grad_(), 2)
    with pytest.raises(TypeError, match="principal_angles: b must be a tensor, got int"):
        principal_angles(axes(0), 3)


def with_values(shape: tuple[int, int], values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A float64 matrix of given singular values, and its right singular vectors as columns."""
    generator = torch.Generator().manual_seed(3)
    size = min(shape)
    left, right = (
        torch.linalg.qr(torch.randn(n, size, dtype=torch.float64, generator=generator)).Q
        for n in shape
    )
    return (left * values) @ right.mT, right


SMALLEST = [1e-3, 1e-4, 1e-5, 1e-6, 2e-7]


@pytest.mark.parametrize("smallest", SMALLEST)
@pytest.mark.parametrize("shape", [(12, 20), (20, 12), (16, 16)])
def test_weak_directions_are_orthonormal_and_where_they_are(shape, smallest):
    values = torch.logspace(0, math.log10(smallest), min(shape), dtype=torch.float64)
    x, right = with_values(shape, values)
    for k in (3, min(shape) - 1, min(shape)):
        found = subspace(x, k)
        assert (found.mT @ found - torch.eye(k, dtype=torch.float64)).abs().max() < 1e-12
        beyond = found - right[:, :k] @ (right[:, :k].mT @ found)  # sines of the angles
        assert torch.linalg.matrix_norm(beyond, 2) < 1e-6
        assert 1 - 1e-12 < overlap(found, right[:, :k]) <= 1
        assert principal_angles(found, right[:, :k]).max() < 1e-6
    in_float32 = subspace(x.float(), min(shape))
    held = in_float32[:, in_float32.ne(0).any(0)]
    assert (held.mT @ held - torch.eye(held.shape[1])).abs().max() < 1e-6


def test_weak_matrices_in_a_batch_change_no_other():
    strong, _ = with_values((8, 12), torch.linspace(2, 1, 8, dtype=torch.float64))
    weak, _ = with_values((8, 12), torch.logspace(0, -6, 8, dtype=torch.float64))
    empty = torch.zeros_like(weak)
    found = subspace(torch.stack([strong, weak, empty]), 8)
    for ours, alone in zip(found, (strong, weak, empty)):
        torch.testing.assert_close(ours @ ours.mT, subspace(alone, 8) @ subspace(alone, 8).mT)
    assert (found[2] == 0).all()


def test_a_subspace_overlaps_with_itself_by_one_and_not_more():
    for seed in range(20):
        x = torch.randn(9, 30, generator=torch.Generator().manual_seed(seed))
        own = subspace(x * torch.logspace(0, -6, 30), 9)
        assert 1 - 1e-12 < overlap(own, own).item() <= 1
        assert overlap(own.float(), own.float()).item() <= 1


@pytest.mark.parametrize("measure", [overlap, principal_angles])
def test_columns_that_are_not_orthonormal_have_no_overlap(measure):
    """Features themselves, say, whose overlap would be any number."""
    features = torch.randn(30, 9, generator=torch.Generator().manual_seed(0))
    assert measure(features, axes(0, 1, dim=30)).isnan().all()
    assert measure(axes(0, 1, dim=30), 1.1 * axes(0, 1, dim=30)).isnan().all()
    assert measure(axes(0, 1, dim=30).half(), axes(0, 1, dim=30)).isfinite().all()


def test_stable_rank_of_energies_whose_sum_float32_cannot_hold():
    assert stable_rank(torch.full((4,), 3e38)).item() == pytest.approx(4)
