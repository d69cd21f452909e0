"""ManifoldKD against its definition by cosines, and what it may hold in memory."""

import math

import pytest
import torch
import torch.nn.functional as F

from bench.harness import peak_extra_bytes
from fastkd.losses.manifold import ManifoldKD


def tokens(seed: int, dim: int = 5, batch: int = 3, count: int = 4) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, count, dim, generator=generator, dtype=torch.float64)


def cosines(x: torch.Tensor) -> torch.Tensor:
    """[M, D] -> [M, M]."""
    return F.cosine_similarity(x[:, None], x[None], dim=-1)


def relation_error(student, teacher) -> torch.Tensor:
    errors = [(cosines(s) - cosines(t)).square().mean() for s, t in zip(student, teacher)]
    return sum(errors) / len(errors)


def definition(student, teacher, intra, inter, random, drawn) -> torch.Tensor:
    chosen = [torch.stack([x[i // 4, i % 4] for i in drawn])[None] for x in (student, teacher)]
    return (
        intra * relation_error(student, teacher)
        + inter * relation_error(student.unbind(1), teacher.unbind(1))
        + random * relation_error(*chosen)
    )


@pytest.mark.parametrize("weights", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (4, 0.1, 0.2)])
def test_it_is_the_weighted_sum_of_three_relations(weights):
    student, teacher = tokens(0).requires_grad_(), tokens(1, dim=7)
    distance = ManifoldKD(*weights, patches=7)
    torch.manual_seed(3)
    value = distance(student, teacher)
    torch.manual_seed(3)
    expected = definition(student, teacher, *weights, distance.draw(student).tolist())
    torch.testing.assert_close(value, expected)
    ours, theirs = (torch.autograd.grad(x, student)[0] for x in (value, expected))
    torch.testing.assert_close(ours, theirs)


def test_its_defaults_are_the_authors():
    distance = ManifoldKD()
    assert (distance.intra, distance.inter, distance.random, distance.patches) == (4, 0.1, 0.2, 192)


def test_turning_the_channels_and_scaling_tokens_changes_no_relation():
    student = tokens(0)
    turn, _ = torch.linalg.qr(tokens(2, batch=1, count=5)[0])
    scale = tokens(3, dim=1).abs() + 0.1
    assert ManifoldKD(patches=5)(student, scale * student @ turn) < 1e-25


def test_random_patches_are_different_and_of_the_whole_batch():
    drawn = ManifoldKD(patches=11).draw(tokens(0))
    assert drawn.unique().numel() == 11
    assert drawn.min() >= 0 and drawn.max() < 12
    assert ManifoldKD(patches=192).draw(tokens(0)).sort().values.tolist() == list(range(12))


def test_both_sides_take_the_same_random_patches():
    turn, _ = torch.linalg.qr(tokens(2, batch=1, count=5)[0])
    distance = ManifoldKD(0, 0, 1, patches=3)
    assert all(distance(tokens(0), tokens(0) @ turn) < 1e-25 for _ in range(5))


def test_random_patches_change_from_step_to_step_and_come_again_with_the_generator():
    distance = ManifoldKD(0, 0, 1, patches=3)
    state = torch.get_rng_state()
    first, second = (distance(tokens(0), tokens(1)) for _ in range(2))
    torch.set_rng_state(state)
    assert first != second
    assert distance(tokens(0), tokens(1)) == first


def test_without_random_patches_the_generator_is_left_alone():
    state = torch.get_rng_state()
    ManifoldKD(random=0)(tokens(0), tokens(1))
    assert torch.equal(torch.get_rng_state(), state)


def test_evaluation_takes_the_same_patches_each_time_and_leaves_the_generator_alone():
    state = torch.get_rng_state()
    distance = ManifoldKD(0, 0, 1, patches=5).eval()
    assert distance(tokens(0), tokens(1)) == distance(tokens(0), tokens(1))
    assert torch.equal(torch.get_rng_state(), state)
    assert distance.draw(tokens(0)).tolist() == [0, 2, 4, 7, 9]  # of 12
    assert ManifoldKD(patches=192).eval().draw(tokens(0)).tolist() == list(range(12))


def test_a_token_of_zeros_is_like_no_other_and_gets_no_gradient():
    student, teacher = tokens(0), tokens(1)
    student[1, 2] = 0
    student.requires_grad_()
    distance = ManifoldKD(1, 0, 0)
    value = distance(student, teacher)
    # F.cosine_similarity takes zeros for like nothing, too.
    torch.testing.assert_close(value, relation_error(student.detach(), teacher))
    value.backward()
    assert student.grad[1, 2].abs().max() == 0
    assert student.grad[1, 1].abs().max() > 0


def test_upstream_gradients_scale_it():
    student, teacher = tokens(0).requires_grad_(), tokens(1)
    distance = ManifoldKD(random=0)
    (once,) = torch.autograd.grad(distance(student, teacher), student)
    (thrice,) = torch.autograd.grad(3 * distance(student, teacher), student)
    torch.testing.assert_close(thrice, 3 * once)


def test_a_loss_scale_saves_small_gradients_from_underflowing_in_float16():
    student = tokens(0, batch=8, count=64).half().requires_grad_()
    teacher = tokens(1, batch=8, count=64).half()
    value = 1e-3 * ManifoldKD(0, 1, 0)(student, teacher)
    (plain,) = torch.autograd.grad(value, student, retain_graph=True)
    (scaled,) = torch.autograd.grad(2.0**16 * value, student)
    exact = student.detach().double().requires_grad_()
    truth = torch.autograd.grad(1e-3 * ManifoldKD(0, 1, 0)(exact, teacher.double()), exact)[0]
    errors = [
        (g.double() / s - truth).norm() / truth.norm() for g, s in ((plain, 1), (scaled, 2**16))
    ]
    assert errors[1] < 1e-3 < errors[0]


@pytest.mark.parametrize("weights", [(-1, 1, 1), (1, 1, -1), (0, 0, 0), (1, math.inf, 1)])
def test_weights_that_leave_nothing_are_refused(weights):
    with pytest.raises(ValueError, match=r"must be (finite and >= 0|positive), got"):
        ManifoldKD(*weights)


def test_no_patches_are_refused():
    with pytest.raises(ValueError, match="patches must be at least 1, got 0"):
        ManifoldKD(patches=0)


SHAPES = {
    "many_tokens": (4, 400, 8),  # an image's relations are 16 times its tokens
    "many_images": (400, 4, 8),
}


@pytest.mark.parametrize("name", SHAPES)
def test_no_relation_matrix_outlives_its_chunk(name):
    batch, count, dim = SHAPES[name]
    limit = 1 << 18
    student = tokens(0, dim, batch, count).float().requires_grad_()
    teacher = tokens(1, dim, batch, count).float()
    distance = ManifoldKD(patches=16, chunk_bytes=limit)
    peak = peak_extra_bytes(lambda: torch.autograd.grad(distance(student, teacher), student), "cpu")
    assert peak < student.nbytes + 2 * limit
    relations = batch * count * (batch + count) * 4  # bytes of one side's
    assert peak < relations / 2


def test_unit_vectors_of_wide_tokens_are_those_of_a_chunk():
    limit = 1 << 16
    student = tokens(0, 256, 200, 4).float().requires_grad_()
    distance = ManifoldKD(inter=0, patches=4, chunk_bytes=limit)
    teacher = tokens(1, 256, 200, 4).float()
    peak = peak_extra_bytes(lambda: torch.autograd.grad(distance(student, teacher), student), "cpu")
    assert peak < student.nbytes + 2 * limit
