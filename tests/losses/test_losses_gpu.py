"""Every loss where only a real GPU can answer: values, graphs, streams, synchronization."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from fastkd.losses import create_feature_loss, create_logit_loss, registry
from fastkd.tokens import Tokens
from tests.harness.cases import relative_error

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

LOGIT = registry.names(registry.LOGIT_LOSSES)
FEATURE = [
    *((loss.name, "none" if loss.projects else "linear") for loss in registry.FEATURE_LOSSES),
    ("rkd", "none"),
    ("manifold", "none"),
    ("vkd", "orthogonal"),
    ("mse", "mlp"),
]
CASES = [*((name, None) for name in LOGIT), *FEATURE]
BATCH, GRID, STUDENT, TEACHER = 64, (14, 14), 192, 384
Step = Callable[[Tensor, Tensor], Tensor]


def step_of(name: str, projector: str | None) -> tuple[nn.Module, Step]:
    """The term, and its loss of a student's and a teacher's tokens or logits."""
    torch.manual_seed(0)
    if projector is None:
        term = create_logit_loss(name)
        labels = torch.arange(BATCH, device="cuda")
        return term, lambda s, t: term(s, t, labels.to(s.device))
    built = create_feature_loss(
        name,
        ((0, 0),),
        projector=projector,
        student_dims={0: STUDENT},
        teacher_dims={0: TEACHER},
    ).cuda()
    return built, lambda s, t: built({0: Tokens(s, GRID)}, {0: Tokens(t, GRID)})


def inputs(projector: str | None, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator("cuda").manual_seed(1)
    shapes = [(BATCH, 1000)] * 2
    if projector is not None:
        shapes = [(BATCH, 196, dim) for dim in (STUDENT, TEACHER)]
    student, teacher = (
        torch.randn(shape, device="cuda", dtype=dtype, generator=generator) for shape in shapes
    )
    return student.requires_grad_(), teacher


def draws(step: Step, student: Tensor, teacher: Tensor) -> bool:
    """Whether a loss draws random numbers."""
    before = torch.cuda.get_rng_state()
    step(student, teacher)
    return not torch.equal(torch.cuda.get_rng_state(), before)


def value_and_gradients(term: nn.Module, step: Step, student: Tensor, teacher: Tensor):
    value = step(student, teacher)
    return value, *torch.autograd.grad(value, [student, *term.parameters()])


def warm_up(term: nn.Module, step: Step, student: Tensor, teacher: Tensor) -> None:
    """On a stream of its own, as capture asks for; makes self-checks, which synchronize."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            value_and_gradients(term, step, student, teacher)
    torch.cuda.synchronize()


@pytest.mark.parametrize(("name", "projector"), CASES)
def test_value_and_gradients_are_those_of_float64_on_the_cpu(name, projector):
    term, step = step_of(name, projector)
    student, teacher = inputs(projector)
    if draws(step, student, teacher):
        pytest.skip("devices draw differently")
    ours = value_and_gradients(term, step, student, teacher)
    exact = (student.detach().double().cpu().requires_grad_(), teacher.double().cpu())
    truth = value_and_gradients(term.double().cpu(), step, *exact)
    assert relative_error(ours[0].cpu(), truth[0]) < 1e-4
    largest = max(gradient.norm() for gradient in truth[1:])  # a bias before distances has none
    for one, other in zip(ours[1:], truth[1:], strict=True):
        assert (one.cpu() - other).norm() < 1e-4 * largest


@pytest.mark.parametrize(("name", "projector"), CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_second_run_is_bitwise_the_first(name, projector, dtype):
    term, step = step_of(name, projector)
    student, teacher = inputs(projector, dtype)
    runs = []
    for _ in range(2):
        torch.manual_seed(2)
        runs.append(value_and_gradients(term, step, student, teacher))
    for one, other in zip(*runs, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(("name", "projector"), CASES)
def test_it_never_waits_for_the_gpu(name, projector):
    term, step = step_of(name, projector)
    student, teacher = inputs(projector)
    warm_up(term, step, student, teacher)
    torch.cuda.set_sync_debug_mode("error")
    try:
        value_and_gradients(term, step, student, teacher)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(("name", "projector"), CASES)
def test_a_captured_graph_replays_on_new_inputs(name, projector):
    term, step = step_of(name, projector)
    student, teacher = inputs(projector)
    warm_up(term, step, student, teacher)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = value_and_gradients(term, step, student, teacher)
    with torch.no_grad():
        student.copy_(torch.randn_like(student))
    graph.replay()
    torch.cuda.synchronize()
    if draws(step, student, teacher):  # other patches at each replay
        assert all(torch.isfinite(x).all() for x in captured)
        return
    for one, other in zip(captured, value_and_gradients(term, step, student, teacher), strict=True):
        assert relative_error(one, other) < 1e-6


@pytest.mark.parametrize(("name", "projector"), CASES)
def test_it_runs_in_order_on_the_current_stream(name, projector):
    _term, step = step_of(name, projector)
    student, teacher = inputs(projector)
    torch.manual_seed(2)
    expected = step(student, teacher).detach()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    torch.manual_seed(2)
    with torch.cuda.stream(stream):
        late = torch.zeros_like(student)
        torch.cuda._sleep(50_000_000)
        late.copy_(student.detach())  # a kernel on another stream would see the zeros
        value = step(late, teacher)
    stream.synchronize()
    assert relative_error(value, expected) < 1e-6


@pytest.mark.parametrize(("name", "projector"), CASES)
def test_inductor_compiles_a_step_with_it(name, projector):
    torch._dynamo.reset()
    _term, step = step_of(name, projector)
    student, teacher = inputs(projector)
    compiled = torch.compile(step, fullgraph=True)
    torch.manual_seed(2)
    expected = step(student, teacher)
    torch.manual_seed(2)
    value = compiled(student, teacher)
    (gradient,) = torch.autograd.grad(value, student)
    assert torch.isfinite(gradient).all()
    if not draws(step, student, teacher):  # inductor draws its own numbers
        assert relative_error(value, expected) < 1e-4


def test_relations_keep_no_matrix_for_the_backward():
    term, step = step_of("manifold", "none")
    student, teacher = inputs("none")
    warm_up(term, step, student, teacher)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    value = step(student, teacher)
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() - before <= 1.1 * student.nbytes
    value.backward()
