"""RKD against its definition, pair by pair and triple by triple."""

import itertools
import math

import pytest
import torch

from bench.harness import peak_extra_bytes
from fastkd.losses import rkd as relational
from fastkd.losses.rkd import RKD
from tests.harness.cases import relative_error


def embeddings(seed: int, dim: int = 3, batch: int = 5) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, dim, generator=generator, dtype=torch.float64)


def huber(x: torch.Tensor) -> torch.Tensor:
    return 0.5 * x**2 if abs(x) < 1 else abs(x) - 0.5


def distance_part(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    pairs = list(itertools.product(range(len(student)), repeat=2))

    def relative(x):
        lengths = {(i, j): (x[i] - x[j]).square().sum().sqrt() for i, j in pairs if i != j}
        mean = sum(lengths.values()) / len(lengths)
        return {**{(i, i): mean * 0 for i in range(len(x))}, **lengths}, mean

    (ours, our_mean), (theirs, their_mean) = relative(student), relative(teacher)
    return sum(huber(ours[p] / our_mean - theirs[p] / their_mean) for p in pairs) / len(pairs)


def angle_part(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    def cosine(x, i, j, k):
        a, b = x[j] - x[i], x[k] - x[i]
        return (a @ b) / (a @ a).sqrt() / (b @ b).sqrt() if i not in (j, k) else torch.zeros(())

    triples = list(itertools.product(range(len(student)), repeat=3))
    differences = [cosine(student, *t) - cosine(teacher, *t) for t in triples]
    return sum(huber(d) for d in differences) / len(triples)


@pytest.mark.parametrize("weights", [(25, 50), (1, 0), (0, 1), (0.5, 3)])
def test_it_is_the_weighted_sum_of_distances_and_angles(weights):
    student, teacher = embeddings(0).requires_grad_(), embeddings(1, dim=4)
    value = RKD(*weights)(student, teacher)
    expected = weights[0] * distance_part(student, teacher)
    expected = expected + weights[1] * angle_part(student, teacher)
    torch.testing.assert_close(value, expected)
    ours, theirs = (torch.autograd.grad(x, student)[0] for x in (value, expected))
    torch.testing.assert_close(ours, theirs)


def test_differences_above_one_count_linearly():
    line = torch.tensor([[0.0], [1.0], [2.0]], dtype=torch.float64)
    bent = torch.tensor([[0.0], [1.0], [-2.0]], dtype=torch.float64)
    # At image 0 the two others lie on opposite sides instead of the same, at image 1 the reverse:
    # four cosines of 27 differ by 2, and h(2) = 1.5.
    torch.testing.assert_close(RKD(0, 1)(bent, line).item(), 4 * 1.5 / 27)


def test_tokens_are_averaged_per_image():
    tokens = embeddings(0, batch=20).unflatten(0, (5, 4))
    teacher = embeddings(1, dim=6)
    torch.testing.assert_close(
        RKD()(tokens, teacher[:, None].expand(-1, 4, -1)), RKD()(tokens.mean(1), teacher)
    )


def test_moving_turning_and_scaling_all_images_changes_no_relation():
    student = embeddings(0)
    turn, _ = torch.linalg.qr(embeddings(2, dim=3, batch=3))
    assert RKD()(student, 3 * student @ turn + 1) < 1e-25


def test_one_image_has_no_relations():
    student = embeddings(0, batch=1).requires_grad_()
    value = RKD()(student, embeddings(1, batch=1))
    value.backward()
    assert value.item() == 0
    assert torch.equal(student.grad, torch.zeros(1, 3, dtype=torch.float64))


def test_equal_images_have_a_distance_of_zero_that_the_mean_leaves_out():
    student, teacher = embeddings(0, batch=3), embeddings(1, batch=3)
    twice = torch.cat((student, student[:1])).requires_grad_()
    value = RKD(1, 0)(twice, teacher[[0, 1, 2, 0]])
    lengths = {(i, j): (student[i] - student[j]).norm() for i, j in [(0, 1), (0, 2), (1, 2)]}
    goals = {(i, j): (teacher[i] - teacher[j]).norm() for i, j in lengths}
    # Of 16 pairs, those with image 0 are there twice.
    counts = {(0, 1): 4, (0, 2): 4, (1, 2): 2}
    mean, goal = (sum(counts[p] * x[p] for p in counts) / 10 for x in (lengths, goals))
    expected = sum(counts[p] * huber(lengths[p] / mean - goals[p] / goal) for p in counts) / 16
    torch.testing.assert_close(value, expected)


def test_equal_images_give_a_finite_gradient():
    student = embeddings(0)[[0, 1, 0, 2, 2]].requires_grad_()
    RKD()(student, embeddings(1)).backward()
    assert student.grad.isfinite().all()
    assert student.grad.abs().sum() > 0


def test_a_batch_of_one_image_repeated_gives_a_finite_gradient():
    student = embeddings(0)[[0, 0, 0]].requires_grad_()
    RKD()(student, embeddings(1)[:3]).backward()
    assert student.grad.isfinite().all()


def test_a_weight_of_zero_skips_its_part(monkeypatch):
    failing = lambda *_: pytest.fail("computed all the same")  # noqa: E731
    monkeypatch.setattr(relational, "_rkd_angles", failing)
    RKD(angle_weight=0)(embeddings(0), embeddings(1))
    monkeypatch.undo()
    monkeypatch.setattr(relational, "_rkd_distances", failing)
    RKD(distance_weight=0)(embeddings(0), embeddings(1))


@pytest.mark.parametrize("weights", [(-1, 1), (1, -1), (0, 0), (1, math.nan)])
def test_weights_that_leave_nothing_are_refused(weights):
    with pytest.raises(ValueError, match=r"_weight must be (finite and >= 0|positive), got"):
        RKD(*weights)


def test_normalized_embeddings_are_compared_at_unit_length():
    student, teacher = embeddings(0).requires_grad_(), embeddings(1, dim=4)
    student.data[0] *= 10
    at_unit_length = [x / x.square().sum(1, keepdim=True).sqrt() for x in (student, teacher)]
    expected = 25 * distance_part(*at_unit_length) + 50 * angle_part(*at_unit_length)
    value = RKD(normalize=True)(student, teacher)
    torch.testing.assert_close(value, expected)
    ours, theirs = (torch.autograd.grad(x, student)[0] for x in (value, expected))
    torch.testing.assert_close(ours, theirs)
    assert RKD()(student, teacher) > 1.1 * value


@pytest.mark.parametrize("offset", [0, 100])
def test_distances_of_close_images_keep_their_digits_and_gradient(offset):
    student, teacher = (embeddings(seed, dim, 16).float() for seed, dim in ((0, 48), (1, 64)))
    student[1] = student[0] + 1e-2 * student[2]
    student = (student + offset).requires_grad_()
    exact = student.detach().double().requires_grad_()
    distance = RKD(1, 0)
    found, truth = distance(student, teacher), distance(exact, teacher.double())
    torch.testing.assert_close(found.double(), truth, rtol=1e-5, atol=0)
    gradient, expected = (
        torch.autograd.grad(v, x)[0] for v, x in ((found, student), (truth, exact))
    )
    assert relative_error(gradient, expected) < 1e-5


PARTS = {"distances": (1, 0), "angles": (0, 1), "both": (25, 50)}


@pytest.mark.parametrize("part", PARTS)
def test_neither_square_nor_cube_of_the_batch_is_ever_there(part):
    batch, limit = 128, 1 << 14
    one_image = batch * (2 * batch + 3 * 4 + 2 * 6) * 4
    student = embeddings(0, 4, batch).float().requires_grad_()
    teacher = embeddings(1, 6, batch).float()
    distance = RKD(*PARTS[part], chunk_bytes=limit)
    peak = peak_extra_bytes(lambda: torch.autograd.grad(distance(student, teacher), student), "cpu")
    temporaries = limit if part == "distances" else max(limit, one_image)
    assert peak < temporaries + 12 * student.nbytes
    assert peak < (batch**2 if part == "distances" else batch**3) * 4
