"""spectrum's CUDA C++ alone: hard spectra, where its tiles end, what it refuses.

Called directly with Gram matrices, on the GPU where there is one, else on the host. That it
computes from tokens what the other backends do is in test_spectrum.py.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from bench.first_contact import ranks_near
from fastkd.ops.spectrum import LARGEST, LEVELS, MOST_LEVELS, SOLVERS, reference
from tests.harness import host

pytestmark = pytest.mark.parametrize("backend", ["cuda"], indirect=True)

TOLERANCE = 1e-6  # of the total

SIZES = [
    1,
    2,  # a single reflection
    3,
    16,  # one tile
    49,  # Swin's last stage
    64,  # fills the smallest kernel
    196,  # DeiT at 224
    197,
    256,
    257,  # ViT with patches of 14, with its CLS token
]
LAST_SIZES = [65, 128, 129, 200, 201]  # on both sides of where the next kernel takes over


def noise(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def gram_of(x: Tensor) -> Tensor:
    return x @ x.mT


def rotated(energies: Tensor) -> Tensor:
    """A matrix with these eigenvalues and random eigenvectors."""
    basis = torch.linalg.qr(noise(len(energies), len(energies))).Q
    return basis * energies @ basis.mT


def ramp(size: int, decades: float) -> Tensor:
    """From 1 down to 10^-decades."""
    return torch.logspace(0, -decades, size, dtype=torch.float64)


def blocks_of_four(size: int) -> Tensor:
    at = torch.arange(size) // 4
    return (at == at.unsqueeze(1)).double()


def dominant(size: int) -> Tensor:
    """s_1 is 1e3 times the rest."""
    return gram_of(0.03 * noise(size, 2 * size) + 30 * noise(1, 2 * size, seed=1))


SPECTRA = {
    "noise": lambda n: gram_of(noise(n, n + 2)),
    "dominant": dominant,
    "rank_deficient": lambda n: gram_of(noise(n, max(1, n // 4))),
    "rank_one": lambda n: torch.ones(n, n, dtype=torch.float64),
    "identity": lambda n: torch.eye(n, dtype=torch.float64),
    "repeated": lambda n: rotated(torch.ones(n, dtype=torch.float64)),
    "diagonal": lambda n: noise(n).square().diag(),
    "zero_couplings": blocks_of_four,
    "twelve_decades": lambda n: rotated(ramp(n, 12)),
    "tokens_of_falling_length": lambda n: gram_of(ramp(n, 6).unsqueeze(1) * noise(n, n + 2)),
    "tokens_of_rising_length": lambda n: gram_of(ramp(n, 6).flip(0).unsqueeze(1) * noise(n, n + 2)),
}


def draw(size: int, *cases: str) -> Tensor:
    """[B, n, n] float32, one matrix per case."""
    return torch.stack([SPECTRA[case](size) for case in cases]).float()


def solve(gram: Tensor, backend, levels=LEVELS) -> tuple[Tensor, Tensor]:
    energies, ranks = SOLVERS.implementations["cuda"].forward(gram.to(backend.device), levels)
    return energies.cpu(), ranks.cpu()


def true_energies(gram: Tensor) -> Tensor:
    """Of the lower triangle."""
    return torch.from_numpy(np.linalg.eigvalsh(gram.double().numpy())).flip(-1).clamp_min(0)


def check(gram: Tensor, backend) -> None:
    energies, ranks = solve(gram, backend)
    truth = true_energies(gram)
    error = (energies.double() - truth).abs() / truth.sum(dim=-1, keepdim=True)
    assert error.max() < TOLERANCE
    assert (energies >= 0).all() and (energies.diff(dim=-1) <= 0).all()
    assert ranks_near(truth, ranks, LEVELS)


@pytest.mark.parametrize("case", SPECTRA)
@pytest.mark.parametrize("size", SIZES)
def test_hard_spectra(backend, size, case):
    check(draw(size, case), backend)


@pytest.mark.parametrize("size", LAST_SIZES)
def test_matrices_may_end_anywhere(backend, size):
    check(draw(size, "noise"), backend)


@pytest.mark.parametrize("trace", [1e-30, 1e12, 1e30, 3e38])
@pytest.mark.parametrize("size", [3, 49])
def test_any_scale(backend, size, trace):
    gram = dominant(size)
    check((gram * (trace / gram.trace())).float().unsqueeze(0), backend)


def test_no_shift_stops_the_count_of_eigenvalues(backend):
    # Shifts that hit elements of a diagonal exactly make minors zero, one after another.
    values = torch.randint(0, 5, (8, 100), generator=torch.Generator().manual_seed(1))
    check(torch.diag_embed(values.float()), backend)


def test_zero_has_no_energy_and_no_rank(backend):
    energies, ranks = solve(torch.zeros(2, 5, 5), backend)
    assert (energies == 0).all() and (ranks == 0).all()


@pytest.mark.parametrize("place", [(0, 0), (9, 4), (69, 69), (69, 0)])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_matrix_that_is_not_finite_spoils_no_other(backend, bad, place):
    gram = draw(70, "noise", "dominant", "twelve_decades")
    clean_energies, clean_ranks = solve(gram, backend)
    gram[1][place] = bad
    energies, ranks = solve(gram, backend)
    assert energies[1].isnan().all() and (ranks[1] == 0).all()
    assert torch.equal(energies[[0, 2]], clean_energies[[0, 2]])
    assert torch.equal(ranks[[0, 2]], clean_ranks[[0, 2]])


def test_an_energy_beyond_float32_makes_all_nan_of_a_finite_matrix(backend):
    energies, ranks = solve(torch.full((1, 5, 5), 3e38), backend)  # one energy, of 1.5e39
    assert energies.isnan().all() and (ranks == 0).all()


@pytest.mark.parametrize("size", [49, 129])
def test_the_upper_triangle_is_not_read(backend, size):
    gram = draw(size, "noise")
    lower = gram.tril() + torch.full_like(gram, torch.nan).triu(1)
    assert torch.equal(solve(lower, backend)[0], solve(gram, backend)[0])


@pytest.mark.parametrize("size", [16, 70, 129])
def test_a_second_run_is_bitwise_equal(backend, size):
    gram = draw(size, "noise", "dominant")
    first, second = solve(gram, backend), solve(gram, backend)
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])


def test_the_gram_matrices_are_not_written_to(backend):
    gram = draw(70, "noise").to(backend.device)
    before = gram.clone()
    SOLVERS.implementations["cuda"].forward(gram, LEVELS)
    assert torch.equal(gram, before)


@pytest.mark.parametrize(
    "gram",
    [-torch.eye(7), torch.ones(7, 7) - 2 * torch.eye(7), 1 - torch.eye(7)],
    ids=["negative", "indefinite", "zero_trace"],
)
def test_a_matrix_that_is_no_gram_matrix_ends_too(backend, gram):
    energies, ranks = solve(gram.unsqueeze(0), backend)
    assert energies.isfinite().all() and (energies >= 0).all()
    assert (ranks >= 0).all() and (ranks <= 7).all()


@pytest.mark.parametrize("batch", [0, 2])
@pytest.mark.parametrize("levels", [(), (0.5,), (0.1, 0.3, 0.5, 0.7, 0.8, 0.9, 0.99, 1.0)])
def test_up_to_eight_levels(backend, levels, batch):
    energies, ranks = solve(draw(20, "noise", "dominant")[:batch], backend, levels)
    assert energies.shape == (batch, 20) and energies.dtype == torch.float32
    assert ranks.shape == (batch, len(levels)) and ranks.dtype == torch.int64
    assert torch.equal(ranks, reference.ranks_of(energies, levels))


def test_energies_that_are_equal_reach_their_share(backend):
    _, ranks = solve(draw(100, "identity"), backend, (0.25, 0.5, 0.75))
    assert ranks.tolist() == [[25, 50, 75]]


def test_more_than_eight_levels_are_refused(backend):
    with pytest.raises(RuntimeError, match="up to 8 levels"):
        solve(torch.eye(2).unsqueeze(0), backend, (0.5,) * 9)


@pytest.mark.parametrize(
    ("gram", "reason"),
    [
        (torch.eye(LARGEST + 1).unsqueeze(0), "n <= 257"),
        (torch.ones(1, 2, 3), "n <= 257"),
        (torch.ones(2, 3, 3).mT, "gram must be contiguous float32"),
    ],
    ids=["too_large", "not_square", "not_contiguous"],
)
def test_what_the_binding_refuses_it_names(backend, gram, reason):
    with pytest.raises(RuntimeError, match=reason):
        solve(gram, backend)


def test_the_binding_refuses_float64(backend):
    gram = torch.eye(3, dtype=torch.float64, device=backend.device).unsqueeze(0)
    energies = torch.empty(1, 3, device=backend.device)
    ranks = torch.empty(1, 0, dtype=torch.long, device=backend.device)
    with pytest.raises(RuntimeError, match="gram must be contiguous float32"):
        torch.ops.fastkd._spectrum_solve(gram, [], energies, ranks)


@pytest.mark.parametrize(
    ("constant", "name"),
    [(LARGEST, "kSpectrumLargest"), (MOST_LEVELS, "kSpectrumLevels")],
)
def test_limits_are_those_of_the_header(backend, constant, name):
    assert f"constexpr int {name} = {constant};" in (host.CSRC / "spectrum.h").read_text()
