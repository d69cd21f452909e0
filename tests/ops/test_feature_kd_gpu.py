"""feature_kd where only a real GPU can answer: graphs, streams, synchronization, compilation."""

from __future__ import annotations

import warnings

import pytest
import torch

from fastkd.ops import feature_kd
from fastkd.ops.feature_kd.reference import LOSSES
from tests.harness.cases import relative_error

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

SHAPE = (64, 196, 384)


@pytest.fixture
def maps(backend):
    student, teacher = (torch.randn(SHAPE, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    student.requires_grad_()
    for loss in LOSSES:  # compiles, and makes the self-check, which synchronizes
        step(student, teacher, loss, backend.name)
    torch.cuda.synchronize()
    return student, teacher


def step(student, teacher, loss, backend):
    value = feature_kd(student, teacher, loss, backend=backend)
    return value, *torch.autograd.grad(value, student)


@pytest.mark.parametrize("loss", LOSSES)
def test_a_captured_graph_replays_on_new_inputs(maps, backend, loss):
    student, teacher = maps
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        value, gradient = step(student, teacher, loss, backend.name)
    with torch.no_grad():
        student.copy_(torch.randn_like(student))
    graph.replay()
    expected_value, expected_gradient = step(student, teacher, loss, backend.name)
    assert torch.equal(value, expected_value)
    assert torch.equal(gradient, expected_gradient)


@pytest.mark.parametrize("loss", LOSSES)
def test_it_runs_in_order_on_the_current_stream(maps, backend, loss):
    student, teacher = maps
    expected, _ = step(student, teacher, loss, backend.name)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        late = torch.zeros_like(student)
        torch.cuda._sleep(50_000_000)
        late.copy_(student.detach())  # a kernel on another stream would see the zeros
        value = feature_kd(late, teacher, loss, backend=backend.name)
    stream.synchronize()
    assert torch.equal(value, expected.detach())


@pytest.mark.parametrize("loss", LOSSES)
def test_it_never_waits_for_the_gpu(maps, backend, loss):
    student, teacher = maps
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(student, teacher, loss, backend.name)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("loss", LOSSES)
def test_inductor_compiles_a_step_with_it(maps, backend, loss):
    student, teacher = maps
    compiled = torch.compile(
        lambda s, t: feature_kd(s * 0.5, t, loss, backend=backend.name), fullgraph=True
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        value = compiled(student, teacher)
    (gradient,) = torch.autograd.grad(value, student)
    expected = feature_kd(student * 0.5, teacher, loss, backend=backend.name)
    (expected_gradient,) = torch.autograd.grad(expected, student)
    assert relative_error(value, expected) < 1e-5
    assert relative_error(gradient, expected_gradient) < 1e-2


def test_the_forward_allocates_nothing_of_the_maps_size(maps, backend):
    if backend.name == "torch":
        pytest.skip("the PyTorch path works in chunks of 64 MB")
    student, teacher = maps
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    feature_kd(student, teacher, "spectral", (14, 14), backend=backend.name)
    torch.cuda.synchronize()
    assert torch.cuda.max_memory_allocated() - before < student.nbytes / 100


@pytest.mark.parametrize("layout", ["tokens", "channels_first"])
@pytest.mark.parametrize("loss", LOSSES)
def test_a_training_batch_is_right(backend, loss, layout):
    """Large enough that blocks and programs take several rounds."""
    maps = [torch.randn(512, 14, 14, 384, device="cuda").bfloat16() for _ in range(2)]
    if layout == "channels_first":
        maps = [x.permute(0, 3, 1, 2).contiguous() for x in maps]
    else:
        maps = [x.flatten(1, 2) for x in maps]
    student, teacher = maps
    value, gradient = step(student.requires_grad_(), teacher, loss, backend.name)
    exact = student.detach().double().requires_grad_()
    truth, expected = step(exact, teacher.double(), loss, "torch")
    assert relative_error(value, truth) < 1e-5
    assert relative_error(gradient, expected) < 4e-3  # half a unit of bfloat16's last place
