"""AttentionTransfer against its definition, image by image."""

import pytest
import torch

from fastkd.losses.attention import AttentionTransfer


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


@pytest.mark.parametrize("power", [1, 2, 2.5, 4])
def test_it_is_the_mean_squared_difference_of_normalised_energies(power):
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


@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_high_powers_neither_over_nor_underflow(scale):
    student, teacher = tokens(0).float(), tokens(1).float()
    distance = AttentionTransfer(8)
    torch.testing.assert_close(distance(scale * student, teacher), distance(student, teacher))


@pytest.mark.parametrize("power", [0.5, 0, float("inf"), float("nan")])
def test_powers_without_a_gradient_at_zero_are_refused(power):
    with pytest.raises(ValueError, match="power must be finite and >= 1"):
        AttentionTransfer(power)


def test_embeddings_are_refused_for_they_have_no_places():
    with pytest.raises(ValueError, match=r"student must be \[B, N, D\] or \[B, D, H, W\]"):
        AttentionTransfer()(tokens(0)[:, 0], tokens(1)[:, 0])
