"""second_moment and sep where only a real GPU can answer: graphs, streams, synchronization."""

from __future__ import annotations

import pytest
import torch

from fastkd.ops.second_moment import reference, second_moment
from fastkd.ops.second_moment.reference import WEIGHTS
from fastkd.ops.sep import sep
from tests.harness.cases import relative_error

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

# There are no kernels in CUDA C++ for this.
on_every_backend = pytest.mark.parametrize("backend", ["torch", "triton"], indirect=True)

SHAPE = (64, 196, 384)


@pytest.fixture
def tokens(backend):
    tokens = torch.randn(SHAPE, device="cuda", dtype=torch.bfloat16)
    for weight in WEIGHTS:  # compiles, and makes the self-check, which synchronizes
        second_moment(tokens, weight, backend=backend.name)
    torch.cuda.synchronize()
    return tokens


@on_every_backend
@pytest.mark.parametrize("weight", WEIGHTS)
def test_a_captured_graph_replays_on_new_tokens(tokens, backend, weight):
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        moment = second_moment(tokens, weight, backend=backend.name)
    tokens.copy_(torch.randn_like(tokens))
    graph.replay()
    truth = reference.definition(tokens.double(), weight)
    assert relative_error(moment, truth) < 1e-5


@on_every_backend
@pytest.mark.parametrize("weight", WEIGHTS)
def test_it_runs_in_order_on_the_current_stream(tokens, backend, weight):
    expected = second_moment(tokens, weight, backend=backend.name)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        late = torch.zeros_like(tokens)
        torch.cuda._sleep(50_000_000)
        late.copy_(tokens)  # a kernel on another stream would see the zeros
        moment = second_moment(late, weight, backend=backend.name)
    stream.synchronize()
    assert torch.equal(moment, expected)


@on_every_backend
def test_it_never_waits_for_the_gpu(tokens, backend):
    torch.cuda.set_sync_debug_mode("error")
    try:
        second_moment(tokens, backend=backend.name)
        sep(tokens, std=True, backend=backend.name)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@on_every_backend
@pytest.mark.parametrize("weight", WEIGHTS)
def test_inductor_compiles_a_function_with_it(tokens, backend, weight):
    def measure(x):
        return second_moment(x * 0.5, weight, backend=backend.name)

    moment = torch.compile(measure, fullgraph=True)(tokens)
    assert relative_error(moment, measure(tokens)) < 1e-6  # half of a bfloat16 is exact


@on_every_backend
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize("channels", [192, 384, 768, 1000])
def test_a_large_batch_is_as_right_as_float32(backend, channels, weight, dtype):
    """Several bands, sums of equal signs on the diagonal, and a class token sliced off."""
    tokens = torch.randn(768, 197, channels, device="cuda", dtype=dtype)[:, 1:]
    moment = second_moment(tokens, weight, backend=backend.name)
    truth = reference.definition(tokens.double(), weight)
    assert relative_error(moment, truth) < 1e-5
    assert relative_error(moment.trace(), truth.trace()) < 1e-5
    assert torch.equal(moment, moment.mT)
    assert torch.equal(moment, second_moment(tokens, weight, backend=backend.name))


@on_every_backend
@pytest.mark.parametrize("weight", WEIGHTS)
def test_tensorfloat_is_not_used_whatever_the_user_allows(backend, weight):
    tokens = torch.randn(SHAPE, device="cuda")
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        moment = second_moment(tokens, weight, backend=backend.name)
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    assert relative_error(moment, reference.definition(tokens.double(), weight)) < 1e-5


@on_every_backend
def test_it_allocates_much_less_than_the_tokens(backend, tokens):
    tokens = torch.randn(1024, 196, 384, device="cuda", dtype=torch.bfloat16)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    second_moment(tokens, "row_norm", backend=backend.name)
    torch.cuda.synchronize()
    assert torch.cuda.max_memory_allocated() - before < tokens.nbytes / 2


@on_every_backend
def test_sep_equals_an_fft_per_token(tokens, backend):
    energy = torch.fft.fft(tokens.double()).abs().square().flatten(0, 1)
    curves = energy.cumsum(dim=-1) / energy.sum(dim=-1, keepdim=True)
    mean, std = sep(tokens, std=True, backend=backend.name)
    assert (mean - curves.mean(dim=0)).abs().max() < 1e-6
    assert (std - curves.std(dim=0, correction=0)).abs().max() < 1e-6
