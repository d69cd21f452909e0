"""spectrum: energies, ranks and gradients of every backend, against float64 decompositions."""

from __future__ import annotations

import os
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from bench.first_contact import ranks_near
from fastkd.ops import backend as backends
from fastkd.ops import parallel, self_check
from fastkd.ops.backend import Implementation
from fastkd.ops.checks import exact_float32
from fastkd.ops.spectrum import (
    LEVELS,
    SOLVERS,
    effective_rank,
    gram,
    reference,
    singular_values,
    spectral_ranks,
    spectrum,
    subspace,
)
from tests.harness.cases import SPECTRA, relative_error

EVERY_BACKEND = pytest.mark.parametrize("backend", ["torch", "cuda"], indirect=True)
HALF = (torch.float16, torch.bfloat16)
ENERGY_TOLERANCE = 1e-6  # of the total


def true_energies(x: Tensor) -> Tensor:
    return torch.from_numpy(np.linalg.svd(x.double().numpy(), compute_uv=False) ** 2)


def error_of_total(found: Tensor, x: Tensor) -> float:
    truth = true_energies(x)
    total = truth.sum(dim=-1, keepdim=True).clamp_min(1e-300)
    return ((found.cpu().double() - truth).abs() / total).max().item()


@EVERY_BACKEND
@pytest.mark.parametrize("case", ["power_law", "dominant_value", "repeated_token"])
@pytest.mark.parametrize("size", [196, 257])
def test_energies_of_the_papers_sizes(size, case, backend):
    x = SPECTRA[case]((1, size, 264))
    energies, ranks = spectral_ranks(x.to(backend.device), backend=backend.name)
    assert error_of_total(energies, x) < ENERGY_TOLERANCE
    assert ranks_near(true_energies(x), ranks.cpu(), LEVELS)


@EVERY_BACKEND
def test_leading_dimensions_and_strides_change_nothing(backend):
    x = SPECTRA["noise_matrix"]((6, 9, 15)).to(backend.device)
    flat = spectrum(x, backend=backend.name)
    assert torch.equal(spectrum(x.view(2, 3, 9, 15), backend=backend.name), flat.view(2, 3, 9))
    assert torch.equal(spectrum(x[0], backend=backend.name), flat[0])
    padded = torch.cat([x[:, :1] * 9, x], dim=1)[:, 1:]
    assert relative_error(spectrum(padded, backend=backend.name), flat) < 1e-6
    assert relative_error(spectrum(x.mT, backend=backend.name), flat) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *HALF])
def test_gram_is_of_the_smaller_side_and_accumulated_in_float32(dtype):
    x = SPECTRA["near_half_limit"]((2, 5, 8)).to(dtype)
    truth = x.double() @ x.double().mT
    for given in (x, x.mT):
        product = gram(given)
        assert product.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert relative_error(product, truth) < 1e-6


def test_gram_is_float32_whatever_products_torch_is_set_to():
    x = torch.randn(2, 64, 96)
    exact = gram(x)
    torch.set_float32_matmul_precision("medium")
    try:
        assert torch.equal(gram(x), exact)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")


def test_many_images_in_half_precision_go_through_in_chunks(monkeypatch):
    monkeypatch.setattr(reference, "CHUNK_BYTES", 8 * 6 * 8 * 2)
    x = SPECTRA["noise_matrix"]((5, 6, 8)).bfloat16()
    assert error_of_total(spectrum(x), x) < ENERGY_TOLERANCE


def test_on_a_cpu_weak_energies_are_right_beside_strong_ones():
    x = SPECTRA["noise_matrix"]((2, 12, 20)) * torch.logspace(0, -5, 20)
    truth = true_energies(x)
    assert ((spectrum(x) - truth) / truth).abs().max() < 1e-5
    assert effective_rank(spectrum(SPECTRA["repeated_token"]((1, 49, 64)))).item() < 1 + 1e-5


def test_the_bits_do_not_depend_on_the_number_of_threads(monkeypatch):
    monkeypatch.setattr(parallel, "_WORTH_SHARING", 0)
    x = SPECTRA["noise_matrix"]((7, 9, 12))
    before = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(spectrum(x))
            assert torch.get_num_threads() == count
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_shared_work_goes_with_inference_mode_and_with_gradients(monkeypatch):
    monkeypatch.setattr(parallel, "_WORTH_SHARING", 0)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    x = SPECTRA["noise_matrix"]((5, 6, 9))
    expected = true_energies(x)
    with torch.inference_mode():
        assert relative_error(spectrum(x * 1), expected) < 1e-6
        assert gram(x * 1).shape == (5, 6, 6) and subspace(x * 1, 2).shape == (5, 9, 2)
    x.requires_grad_()
    (spectrum(x).sum() + gram(x).diagonal(dim1=1, dim2=2).sum()).backward()
    assert relative_error(x.grad, 4 * x.detach()) < 1e-5


def test_a_forked_process_does_not_wait_for_its_parents_threads(monkeypatch):
    monkeypatch.setattr(parallel, "_WORTH_SHARING", 0)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    spectrum(torch.randn(4, 3, 3))
    assert parallel._POOLS
    child = os.fork()
    if child == 0:
        os._exit(len(parallel._POOLS))
    assert os.waitpid(child, 0)[1] == 0


def test_threads_that_are_exact_at_the_same_time_leave_the_setting_as_it_was():
    setting = torch.backends.cuda.matmul
    before = setting.fp32_precision
    first, second = exact_float32(), exact_float32()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert setting.fp32_precision == "ieee"
    second.__exit__(None, None, None)
    assert setting.fp32_precision == before


@EVERY_BACKEND
def test_every_solver_passes_its_self_check(backend):
    for size in (5, 33):
        x = torch.zeros(1, size, size, device=backend.device)
        assert self_check.failure(SOLVERS, backend.name, (x, size)) is None


def test_a_wrong_solver_fails_the_self_check():
    def wrong(product, levels):
        energies, ranks = reference.solve(product, levels)
        return energies, ranks + 1

    implementations = {**SOLVERS.implementations, "cuda": Implementation(wrong)}
    solvers = replace(SOLVERS, implementations=implementations, verdicts={})
    assert "disagrees" in self_check.failure(solvers, "cuda", (torch.zeros(1, 5, 5), 5))


def test_larger_matrices_than_the_kernel_takes_go_to_the_library(monkeypatch):
    monkeypatch.setattr(backends, "EMULATED", {"cuda"})
    x = torch.randn(1, 258, 260)
    assert SOLVERS.why_not("cuda", x, 258) == (
        "it takes matrices up to 257 on their smaller side, got 258"
    )
    assert error_of_total(spectrum(x), x) < ENERGY_TOLERANCE


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([1.0],), TypeError, "x must be a tensor, got list"),
        (
            (torch.ones(2, 3, dtype=torch.long),),
            TypeError,
            r"must have a float dtype, got torch\.int64",
        ),
        ((torch.ones(3),), ValueError, r"x must be \[\.\.\., N, D\].*got \[3\]"),
        ((torch.ones(2, 0, 3),), ValueError, r"got \[2, 0, 3\]"),
    ],
)
def test_bad_matrices_are_refused(arguments, error, message):
    for function in (spectrum, gram, singular_values, spectral_ranks):
        with pytest.raises(error, match=f"{function.__name__}: .*{message}"):
            function(*arguments)


def test_bad_levels_are_refused():
    x = torch.ones(2, 3, 4)
    with pytest.raises(ValueError, match=r"spectral_ranks: q must be in \(0, 1\], got \[99\.0\]"):
        spectral_ranks(x, (99,))
    assert spectral_ranks(x, np.float32(0.5))[1].shape == (2, 1)
    with pytest.raises(ValueError, match=r"q may hold 8 levels, got 9"):
        spectral_ranks(x, (0.5,) * 9)


@EVERY_BACKEND
@pytest.mark.parametrize("size", [1e20, 3e38])
def test_energies_that_float32_cannot_hold_are_nan_and_spoil_no_other(backend, size):
    x = SPECTRA["noise_matrix"]((3, 4, 6)).to(backend.device)
    clean = spectrum(x, backend=backend.name)
    x[1] = size
    x.requires_grad_()
    energies, ranks = spectral_ranks(x, backend=backend.name)
    assert energies[1].isnan().all() and (ranks[1] == 0).all()
    assert torch.equal(energies[[0, 2]], clean[[0, 2]])
    assert singular_values(x, backend=backend.name)[1].isnan().all()
    (gradient,) = torch.autograd.grad(energies[[0, 2]].sum(), x)
    assert gradient[[0, 2]].isfinite().all()


def test_float64_holds_the_energies_of_large_values():
    energies = spectrum(torch.full((1, 4, 4), 1e20, dtype=torch.float64))
    assert energies[0, 0].item() == pytest.approx(1.6e41)
