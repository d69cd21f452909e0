"""lift_kd where only a real GPU can answer: graphs, streams, synchronization, memory, tuning."""

from __future__ import annotations

import warnings

import pytest
import torch

from fastkd.ops import lift_kd
from fastkd.ops.feature_kd.reference import LOSSES
from tests.harness.cases import relative_error

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

BATCH, TOKENS, NARROW, WIDE = 160, 196, 192, 384  # 31,360 tokens: more than one band
FORMS = pytest.mark.parametrize("pool", [False, True], ids=["one_pass", "pooled"])


@pytest.fixture
def inputs(backend, monkeypatch):
    monkeypatch.setenv("FASTKD_UNPROVEN", "1")

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device="cuda").bfloat16()

    tokens, teacher = draw(BATCH, TOKENS, NARROW), draw(BATCH, TOKENS, WIDE)
    weight, norm_weight, norm_bias = draw(WIDE, NARROW) * 0.07, draw(WIDE), draw(WIDE)
    leaves = [x.requires_grad_() for x in (tokens, weight, norm_weight, norm_bias)]
    for loss in LOSSES:  # compiles, and makes the self-check, which synchronizes
        for pool in (False, True):
            step(leaves, teacher, loss, pool, backend.name)
    torch.cuda.synchronize()
    return leaves, teacher


def step(leaves, teacher, loss, pool, backend):
    tokens, weight, norm_weight, norm_bias = leaves
    result = lift_kd(
        tokens, weight, teacher, None, norm_weight, norm_bias,
        loss=loss, pool=pool, backend=backend,
    )  # fmt: skip
    total = result[0] * 0.2 + result[1].float().square().sum() if pool else result * 0.2
    return total.detach(), *torch.autograd.grad(total, leaves)


@FORMS
@pytest.mark.parametrize("loss", LOSSES)
def test_a_training_batch_is_right(inputs, backend, loss, pool):
    leaves, teacher = inputs
    found = step(leaves, teacher, loss, pool, backend.name)
    exact = [x.detach().double().requires_grad_() for x in leaves]
    truth = step(exact, teacher.double(), loss, pool, "torch")
    assert relative_error(found[0], truth[0]) < 3e-3
    for ours, expected in zip(found[1:], truth[1:]):
        assert relative_error(ours, expected) < 1e-2


@FORMS
@pytest.mark.parametrize("loss", LOSSES)
def test_a_second_run_is_bitwise_equal(inputs, backend, loss, pool):
    first, second = (step(*inputs, loss, pool, backend.name) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second))


@FORMS
@pytest.mark.parametrize("loss", LOSSES)
def test_a_captured_graph_replays_on_new_inputs(inputs, backend, loss, pool):
    leaves, teacher = inputs
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(leaves, teacher, loss, pool, backend.name)
    with torch.no_grad():
        leaves[0].copy_(torch.randn_like(leaves[0]))
    graph.replay()
    expected = step(leaves, teacher, loss, pool, backend.name)
    assert all(torch.equal(a, b) for a, b in zip(captured, expected))


@FORMS
@pytest.mark.parametrize("loss", ["mse", "spectral"])
def test_it_runs_in_order_on_the_current_stream(inputs, backend, loss, pool):
    leaves, teacher = inputs
    expected = step(leaves, teacher, loss, pool, backend.name)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        late = torch.zeros_like(teacher)
        torch.cuda._sleep(50_000_000)
        late.copy_(teacher)  # a kernel on another stream would see the zeros
        found = step(leaves, late, loss, pool, backend.name)
    stream.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(found, expected))


@FORMS
@pytest.mark.parametrize("loss", LOSSES)
def test_it_never_waits_for_the_gpu(inputs, backend, loss, pool):
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(*inputs, loss, pool, backend.name)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@FORMS
def test_inductor_compiles_a_step_with_it(inputs, backend, pool):
    leaves, teacher = inputs

    def loss(tokens, weight, norm_weight, norm_bias):
        result = lift_kd(
            tokens * 0.5, weight, teacher, None, norm_weight, norm_bias,
            loss="spectral", pool=pool, backend=backend.name,
        )  # fmt: skip
        return result[0] * 0.2 + result[1].float().square().sum() if pool else result * 0.2

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        value = torch.compile(loss, fullgraph=True)(*leaves)
    expected = loss(*leaves)
    assert relative_error(value, expected) < 1e-4
    for ours, truth in zip(
        torch.autograd.grad(value, leaves), torch.autograd.grad(expected, leaves)
    ):
        assert relative_error(ours, truth) < 1e-2


@FORMS
def test_it_allocates_no_lifted_map(inputs, backend, pool):
    if backend.name == "torch":
        pytest.skip("the PyTorch path works in chunks of 64 MB")
    leaves, teacher = inputs
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step(leaves, teacher, "spectral", pool, backend.name)
    torch.cuda.synchronize()
    results = sum(x.nbytes for x in leaves)
    # the slopes of one band, and partial sums; eager holds several maps of teacher.nbytes * 2
    assert torch.cuda.max_memory_allocated() - before - results < 32 << 20
