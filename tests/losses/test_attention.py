"""AttentionTransfer against its definition, image by image."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastkd.losses.attention import AttentionTransfer
from tests.harness import cases


def tokens(seed: int, dim: int = 5, batch: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 6, dim, generator=generator, dtype=torch.float64)


def definition(student: torch.Tensor, teacher: torch.Tensor, power: float) -> torch.Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for one, other in zip(student, teacher):
        maps = []
        for x in (one, other):
            energy = torch.stack([sum(v.abs() ** power for v in token) for token in x])
            maps.append(energy / sum(e**2 for e in energy) ** 0.5)
        total = total + sum((a - b) ** 2 for a, b in zip(*maps))
    return total / (student.shape[0] * student.shape[1])


@pytest.mark.parametrize("power", [1, 2, 2.5, 4, 40])
def test_it_is_the_mean_squared_difference_of_normalized_energies(power):
    student, teacher = tokens(0).requires_grad_(), tokens(1, dim=7)
    value, expected = (
        AttentionTransfer(power)(student, teacher),
        definition(student, teacher, power),
    )
    torch.testing.assert_close(value, expected)
    ours, theirs = (torch.autograd.grad(x, student)[0] for x in (value, expected))
    torch.testing.assert_close(ours, theirs)


def test_only_where_the_energy_lies_matters():
    student = tokens(0)
    other = (-3 * student).roll(1, dims=2).repeat(1, 1, 2)
    assert AttentionTransfer()(student, other) < 1e-30


def test_energy_at_different_places_is_two_over_the_number_of_places():
    student, teacher = torch.zeros(1, 6, 5), torch.zeros(1, 6, 5)
    student[0, 2], teacher[0, 4] = 1, 1
    torch.testing.assert_close(AttentionTransfer()(student, teacher), torch.tensor(2 / 6))


@pytest.mark.parametrize("power", [8, 1000])
@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_high_powers_neither_over_nor_underflow(scale, power):
    student, teacher = tokens(0).float().requires_grad_(), tokens(1).float()
    distance = AttentionTransfer(power)
    scaled = (scale * student.detach()).requires_grad_()
    value, expected = distance(scaled, teacher), distance(student, teacher)
    torch.testing.assert_close(value, expected, rtol=1e-3, atol=0)
    slopes = [torch.autograd.grad(v, x)[0] for v, x in ((value, scaled), (expected, student))]
    torch.testing.assert_close(scale * slopes[0], slopes[1], rtol=2e-2, atol=1e-6)


@pytest.mark.parametrize("power", [1, 2, 5])
def test_an_image_of_zeros_has_an_empty_map_and_no_gradient(power):
    student, teacher = tokens(0), tokens(1)
    student[1] = 0
    student.requires_grad_()
    value = AttentionTransfer(power)(student, teacher)
    kept = [0, 2]
    others = definition(student[kept], teacher[kept], power) * 2 / 3
    torch.testing.assert_close(value, others + 1 / (3 * 6))  # the teacher's map is of unit length
    value.backward()
    assert student.grad[1].abs().max() == 0
    assert student.grad[0].abs().max() > 0


@pytest.mark.parametrize("power", [1, 2, 3, 40])
@pytest.mark.parametrize("case", cases.FINITE)
def test_float32_is_the_float64_formula_on_hard_inputs(case, power):
    student, teacher = cases.FINITE[case]((3, 8, 6))
    leaf, exact = student.clone().requires_grad_(), student.double().requires_grad_()
    value = AttentionTransfer(power)(leaf, teacher)
    truth = definition_of_batches(exact, teacher.double(), power)
    torch.testing.assert_close(value.double(), truth, rtol=1e-4, atol=1e-9)
    found, expected = torch.autograd.grad(value, leaf)[0], torch.autograd.grad(truth, exact)[0]
    assert cases.relative_error(found, expected) < 1e-4 or expected.norm() < 1e-6


def definition_of_batches(student: Tensor, teacher: Tensor, power: float) -> Tensor:
    """The authors' formula in float64, at a scale at which that holds every power here."""
    student, teacher = (x / x.detach().abs().max() for x in (student, teacher))
    maps = (F.normalize(x.abs().pow(power).mean(2), dim=1, eps=1e-300) for x in (student, teacher))
    one, other = maps
    return (one - other).square().mean()


def test_a_second_derivative_is_that_of_the_formula():
    student, teacher = tokens(0).requires_grad_(), tokens(1, dim=7)
    assert torch.autograd.gradgradcheck(lambda x: AttentionTransfer()(x, teacher), student)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("side", [0, 1])
def test_what_is_not_finite_shows(side, bad):
    pair = tokens(0), tokens(1)
    pair[side][0, 0, 0] = bad
    assert AttentionTransfer()(*pair).isnan()


@pytest.mark.parametrize("power", [0.5, 0, float("inf"), float("nan")])
def test_powers_without_a_gradient_at_zero_are_refused(power):
    with pytest.raises(ValueError, match="power must be finite and >= 1"):
        AttentionTransfer(power)


def test_embeddings_are_refused_for_they_have_no_places():
    with pytest.raises(ValueError, match=r"student must be \[B, N, D\] or \[B, D, H, W\]"):
        AttentionTransfer()(tokens(0)[:, 0], tokens(1)[:, 0])
