"""The data-set view: second moment, captured energy, rotation."""

import math

import numpy as np
import pytest
import torch

from fastkd.analysis import InSharedBasis, SecondMoment, captured_energies
from fastkd.analysis.accumulators.shared_basis import random_angles
from fastkd.ops import energy_curve
from tests.analysis.made_tokens import deficient, in_plane, normal


def basis_of(*batches, centered=False):
    moment = SecondMoment(centered)
    for batch in batches:
        moment.update(batch)
    return moment.result()


def view_of(batch, subspaces=(1, 4), basis=None, sizes=None):
    view = InSharedBasis(basis_of(batch) if basis is None else basis, subspaces=subspaces)
    for part in batch.split(sizes or len(batch)):
        view.update(part)
    return view.result()


def test_second_moment_is_uncentered_and_decomposed_in_descending_order():
    batch = normal(6, 5, 4) + 3
    rows = batch.double().flatten(0, 1)
    shared = basis_of(batch[:4], batch[4:])
    rebuilt = shared.vectors @ shared.energies.diag() @ shared.vectors.mT
    torch.testing.assert_close(rebuilt, rows.mT @ rows / 30, rtol=1e-6, atol=1e-6)
    assert (shared.energies.diff() <= 0).all()
    assert (shared.tokens, shared.mean) == (30, None)
    alone = SecondMoment()
    alone.update(batch)
    torch.testing.assert_close(alone.energies(), shared.energies, rtol=1e-5, atol=1e-5)


def test_a_centered_moment_is_the_covariance():
    batch = normal(6, 5, 4) + 3
    shared = basis_of(batch[:4], batch[4:], centered=True)
    expected = torch.from_numpy(np.cov(batch.flatten(0, 1).double().numpy().T, bias=True))
    rebuilt = shared.vectors @ shared.energies.diag() @ shared.vectors.mT
    torch.testing.assert_close(rebuilt, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(shared.mean, batch.double().mean(dim=(0, 1)))


def test_images_are_seen_from_the_mean_where_the_moment_is_centered():
    batch = normal(6, 5, 4) + 100
    centered = view_of(batch, basis=basis_of(batch, centered=True))
    around = batch - batch.mean(dim=(0, 1))
    expected = view_of(around)
    np.testing.assert_allclose(centered.curve.mean, expected.curve.mean, atol=1e-4)
    assert view_of(batch).curve.mean[0] > 0.99 > centered.curve.mean[0]


def test_a_bad_image_stays_out_of_the_centered_view():
    batch = normal(4, 6, 8) + 5
    batch[2, 0, 0] = torch.nan
    view = view_of(batch, basis=basis_of(batch, centered=True))
    assert (view.ranks.values[:, 0] > 0).tolist() == [True, True, False, True]
    assert np.isnan(view.rotation[0].overlap_shared).tolist() == [False, False, True, False]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_mean_is_subtracted_in_float32(dtype):
    batch = (normal(6, 5, 4) + 30).to(dtype)
    ours = view_of(batch, basis=basis_of(batch, centered=True))
    truth = view_of(batch.double(), basis=basis_of(batch.double(), centered=True))
    np.testing.assert_allclose(ours.curve.mean, truth.curve.mean, atol=1e-5)


def test_a_huge_value_in_one_image_does_not_spoil_the_basis_of_the_others():
    batch = normal(4, 6, 8)
    expected = basis_of(batch[:3]).energies
    batch[3, 0, 0] = 1e20
    shared = basis_of(batch)
    torch.testing.assert_close(shared.energies, expected)
    assert shared.non_finite == 1


def test_autocast_does_not_reach_captured_energies():
    tokens, basis = normal(2, 6, 8), torch.eye(8)
    with torch.autocast("cpu", torch.bfloat16):
        inside = captured_energies(tokens, basis)
    assert torch.equal(inside, captured_energies(tokens, basis))


def test_a_waiting_image_keeps_its_own_subspace_alone():
    view = InSharedBasis(basis_of(normal(4, 6, 10)), subspaces=(2,))
    view.update(normal(4, 6, 10), [0, 2, 4, 6])
    (first, *_) = view._waiting.values()
    assert first.untyped_storage().nbytes() == 10 * 2 * 8


def test_moments_merge_and_leave_out_images_that_are_not_finite():
    batch = normal(6, 5, 4)
    left, right = SecondMoment(), SecondMoment()
    left.update(batch[:1])
    spoiled = torch.cat([batch[1:], batch[:1] * torch.nan])
    right.update(spoiled)
    left.merge(right)
    torch.testing.assert_close(left.result().energies, basis_of(batch).energies)
    assert (left.result().tokens, left.result().non_finite) == (30, 1)
    with pytest.raises(ValueError, match="no token was seen"):
        SecondMoment().result()


@pytest.mark.parametrize("shape", [(4, 20, 7), (4, 7, 20), (4, 1, 9)], ids=str)
def test_captured_energy_is_the_norm_of_the_projection(shape):
    tokens = normal(*shape)
    basis = basis_of(tokens).vectors
    curve = energy_curve(captured_energies(tokens, basis))
    x = tokens.double()
    for d in (1, basis.shape[1] // 2 + 1, basis.shape[1]):
        expected = (x @ basis[:, :d]).norm(dim=(1, 2)) ** 2 / x.norm(dim=(1, 2)) ** 2
        torch.testing.assert_close(curve[:, d - 1], expected.float(), rtol=1e-5, atol=1e-6)


def test_weak_directions_are_captured_beside_a_dominant_one():
    tokens = normal(3, 16, 24) + 1e3 * normal(3, 16, 1, seed=1) * normal(24, seed=2)
    basis = basis_of(tokens).vectors
    ours = captured_energies(tokens, basis).double()
    truth = captured_energies(tokens.double(), basis)
    assert ((ours - truth).abs() / truth.sum(dim=1, keepdim=True)).max() < 1e-6
    # Not only to the total: the second direction has a millionth of it.
    assert ((ours - truth).abs() / truth)[:, 1].max() < 1e-2


def test_images_in_different_planes_share_more_dimensions_than_any_needs():
    batch = torch.stack([in_plane(range(8 * i, 8 * i + 8)) for i in range(4)])
    view = view_of(batch, subspaces=())
    assert view.ranks.largest == 32
    # Equal energies: which of the planes comes first is arbitrary; one image needs the last one.
    assert view.ranks.at(0.99).max() == 32
    assert view.rotation == []


def test_rotation_of_images_in_the_shared_plane_and_out_of_it():
    """Six images lie in one plane, which is the shared one, two in another: at right angles."""
    inside, outside = in_plane(range(4), scale=2.0), in_plane(range(4, 8))
    batch = torch.stack([inside] * 3 + [outside] + [inside] * 3 + [outside])
    (plane,) = view_of(batch, subspaces=(4,)).rotation
    assert plane.overlap_shared.tolist() == pytest.approx([1, 1, 1, 0, 1, 1, 1, 0], abs=1e-6)
    assert plane.overlap_pairs.tolist() == pytest.approx([1, 0, 1, 0], abs=1e-6)
    assert plane.angles_shared.tolist() == pytest.approx([90 / 4] * 4, abs=1e-4)
    assert plane.angles_pairs.tolist() == pytest.approx([45] * 4, abs=1e-4)
    assert plane.overlap_random == 4 / 32


def test_rotation_by_a_known_angle():
    angle = math.radians(30)
    batch = torch.stack([in_plane([0])] * 7 + [in_plane([0])])
    batch[7] = batch[7] * math.cos(angle) + in_plane([1]) * math.sin(angle)
    (line,) = view_of(batch[[0, 7]], subspaces=(1,), basis=basis_of(batch[:7])).rotation
    assert line.overlap_shared.tolist() == pytest.approx([1, 0.75], abs=1e-6)
    assert line.overlap_pairs.tolist() == pytest.approx([0.75], abs=1e-6)
    assert line.angles_shared.tolist() == pytest.approx([15], abs=1e-4)


def test_an_image_of_lower_rank_has_no_subspace_and_leaves_the_angles_alone():
    batch = torch.cat([deficient(1, 16, 24, rank=2), normal(3, 16, 24)])
    one, four = view_of(batch).rotation
    assert np.isfinite(one.overlap_shared).all()
    assert np.isnan(four.overlap_shared).tolist() == [True, False, False, False]
    assert np.isnan(four.overlap_pairs).tolist() == [True, False]
    without = view_of(batch[1:], basis=basis_of(batch)).rotation[1]
    np.testing.assert_allclose(four.angles_shared, without.angles_shared)


def test_subspaces_larger_than_an_image_are_left_out():
    rotation = view_of(normal(4, 3, 8), subspaces=(2, 4, 9)).rotation
    assert [plane.k for plane in rotation] == [2]


def test_zero_and_bad_images_have_no_rank_and_no_subspace():
    batch = normal(4, 6, 8)
    batch[1] = 0
    batch[2, 0, 0] = torch.nan
    view = view_of(batch)
    assert (view.ranks.values[:, 0] > 0).tolist() == [True, False, False, True]
    assert np.isfinite(view.curve.mean).all()
    assert np.isnan(view.rotation[0].overlap_shared).tolist() == [False, True, True, False]


def test_pairs_meet_across_batches_processes_and_interruptions():
    batch = normal(8, 6, 10)
    basis = basis_of(batch)
    whole = view_of(batch, basis=basis)
    odd = view_of(batch, basis=basis, sizes=3)
    first, second = InSharedBasis(basis, subspaces=(1, 4)), InSharedBasis(basis, subspaces=(1, 4))
    first.update(batch[[0, 2, 3]], [0, 2, 3])
    restored = first.with_state(first.state())
    restored.update(batch[[1, 4]], [1, 4])
    second.update(batch[5:], range(5, 8))
    restored.merge(second)
    for view in (odd, restored.result()):
        for ours, truth in zip(view.rotation, whole.rotation, strict=True):
            np.testing.assert_allclose(ours.overlap_pairs, truth.overlap_pairs, atol=1e-6)
            np.testing.assert_allclose(ours.angles_pairs, truth.angles_pairs, atol=1e-4)
        np.testing.assert_allclose(view.curves, whole.curves, atol=1e-6)


def test_a_missing_partner_makes_no_pair():
    view = InSharedBasis(basis_of(normal(4, 6, 10)), subspaces=(2,))
    view.update(normal(3, 6, 10), [0, 1, 2])
    assert view.result().rotation[0].overlap_pairs.shape == (1,)


def test_random_subspaces_have_the_angles_of_random_subspaces():
    (angle,) = random_angles(3, 1, samples=4000)
    assert angle == pytest.approx(math.degrees(1), rel=0.02)  # the mean over a sphere is 1 radian
    wide = random_angles(64, 4)
    assert (np.diff(wide) > 0).all() and wide[-1] < 90


def test_what_does_not_fit_is_refused():
    basis = basis_of(normal(2, 3, 4))
    with pytest.raises(ValueError, match="must have 4 channels as before, got 5"):
        InSharedBasis(basis).update(normal(2, 3, 5))
    with pytest.raises(ValueError, match="another layer"):
        captured_energies(normal(1, 2, 3), torch.eye(4))
    with pytest.raises(ValueError, match="subspaces must be >= 1"):
        InSharedBasis(basis, subspaces=(0,))
    with pytest.raises(ValueError, match=r"InSharedBasis\.merge"):
        InSharedBasis(basis).merge(InSharedBasis(basis_of(normal(2, 3, 4, seed=1))))
