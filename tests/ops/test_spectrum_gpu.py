"""spectrum where only a real GPU can answer: graphs, streams, synchronization, large batches."""

from __future__ import annotations

import pytest
import torch

from bench.first_contact import ranks_near
from fastkd.ops.spectrum import (
    LEVELS,
    gram,
    reference,
    spectral_ranks,
    spectrum,
    subspace,
)
from tests.harness.cases import SPECTRA, relative_error

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

on_every_backend = pytest.mark.parametrize("backend", ["torch", "cuda"], indirect=True)
# The library's solver reads its status back, which neither a capture nor sync debugging allows.
on_the_kernel = pytest.mark.parametrize("backend", ["cuda"], indirect=True)

SHAPE = (64, 196, 384)


@pytest.fixture
def tokens(backend):
    tokens = torch.randn(SHAPE, device="cuda", dtype=torch.bfloat16)
    spectral_ranks(tokens, backend=backend.name)  # the self-check, which synchronizes
    torch.cuda.synchronize()
    return tokens


def check(energies, ranks, tokens):
    truth = torch.linalg.svdvals(tokens.double().cpu()).square()
    total = truth.sum(dim=-1, keepdim=True)
    assert ((energies.cpu().double() - truth).abs() / total).max() < 1e-6
    assert ranks_near(truth, ranks.cpu(), LEVELS)


@on_the_kernel
def test_a_captured_graph_replays_on_new_tokens(tokens, backend):
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        energies, ranks = spectral_ranks(tokens, backend=backend.name)
    tokens.copy_(torch.randn_like(tokens) * torch.linspace(1, 9, 384, device="cuda"))
    graph.replay()
    check(energies, ranks, tokens)


@on_the_kernel
def test_it_never_waits_for_the_gpu(tokens, backend):
    torch.cuda.set_sync_debug_mode("error")
    try:
        spectral_ranks(tokens, backend=backend.name)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@on_every_backend
def test_it_runs_in_order_on_the_current_stream(tokens, backend):
    expected = spectrum(tokens, backend=backend.name)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        late = torch.zeros_like(tokens)
        torch.cuda._sleep(50_000_000)
        late.copy_(tokens)  # a kernel on another stream would see the zeros
        energies = spectrum(late, backend=backend.name)
    stream.synchronize()
    assert torch.equal(energies, expected)


@on_every_backend
@pytest.mark.parametrize("size", [1, 33, 49, 64, 128, 192, 196, 197, 208, 256, 257])
@pytest.mark.parametrize("case", SPECTRA)
def test_every_size_class_on_hard_spectra(backend, case, size):
    tokens = SPECTRA[case]((3, size, 260)).cuda()
    check(*spectral_ranks(tokens, backend=backend.name), tokens)


@on_every_backend
def test_thousands_of_matrices_at_once_and_again(backend):
    tokens = torch.randn(3000, 49, 768, device="cuda", dtype=torch.bfloat16)
    tokens[1234] = torch.nan
    energies, ranks = spectral_ranks(tokens, backend=backend.name)
    again, _ = spectral_ranks(tokens, backend=backend.name)
    assert torch.equal(energies.nan_to_num(-1), again.nan_to_num(-1))
    assert energies[1234].isnan().all() and (ranks[1234] == 0).all()
    check(
        energies[[0, 1233, 1235, 2999]], ranks[[0, 1233, 1235, 2999]], tokens[[0, 1233, 1235, 2999]]
    )


@on_every_backend
def test_inductor_compiles_a_function_with_it_and_its_gradient(tokens, backend):
    def loss(x):
        return spectrum(x * 0.5, backend=backend.name).sqrt().sum()

    x = tokens[:4].float().requires_grad_()
    (ours,) = torch.autograd.grad(torch.compile(loss, fullgraph=True)(x), x)
    (truth,) = torch.autograd.grad(torch.linalg.svdvals(x.double() * 0.5).sum(), x)
    assert relative_error(ours, truth) < 1e-3  # small singular values are rounding in float32


@on_every_backend
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_the_gram_matrix_is_in_float32_whatever_the_user_allows(backend, dtype):
    tokens = torch.randn(8, 196, 1024, device="cuda").to(dtype)
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        product = gram(tokens)
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    assert product.dtype == torch.float32
    assert relative_error(product, reference.gram(tokens.double(), torch.float64)) < 1e-5


@on_every_backend
def test_subspaces_on_the_gpu_are_those_on_the_cpu(tokens, backend):
    ours, truth = subspace(tokens[:2], 8), subspace(tokens[:2].cpu(), 8)
    assert relative_error((ours @ ours.mT).cpu(), truth @ truth.mT) < 1e-8
