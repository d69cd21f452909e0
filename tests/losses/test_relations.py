"""What attention transfer, RKD, CRD and manifold distillation have in common."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from bench.harness import peak_extra_bytes
from fastkd.losses.attention import AttentionTransfer
from fastkd.losses.crd import CRD
from fastkd.losses.manifold import ManifoldKD
from fastkd.losses.relations import chunk_limit, directions
from fastkd.losses.rkd import RKD
from fastkd.ops.operator import gradient_in_forward

B, N, DS, DT = 4, 6, 5, 7
WIDTHS = {"student": DS, "teacher": DT}


def crd(student_dim: int = DS, teacher_dim: int = DT, **options) -> CRD:
    torch.manual_seed(0)
    return CRD(student_dim, teacher_dim, dim=8, **options)


OPERATORS = {"rkd": RKD, "crd": crd, "manifold": ManifoldKD}  # gradient in the forward, in chunks
DISTANCES = {"attention": AttentionTransfer, **OPERATORS}


@pytest.fixture(params=DISTANCES)
def distance(request) -> nn.Module:
    return DISTANCES[request.param]()


def pair(dtype=torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    student = torch.randn(B, N, DS, generator=generator, dtype=torch.float64)
    teacher = torch.randn(B, N, DT, generator=generator, dtype=torch.float64)
    return student.to(dtype).requires_grad_(), teacher.to(dtype)


def value_and_gradient(distance, student, teacher):
    torch.manual_seed(2)  # of the random patches
    value = distance(student, teacher)
    return value, *torch.autograd.grad(value, student)


def test_the_teacher_gets_no_gradient(distance):
    student, teacher = pair(torch.float32)
    teacher.requires_grad_()
    distance(student, teacher).backward()
    assert student.grad.abs().sum() > 0
    assert teacher.grad is None


def test_maps_are_taken_as_their_tokens(distance):
    student, teacher = pair(torch.float32)
    torch.manual_seed(2)
    expected = distance(student, teacher)
    maps = [x.mT.reshape(B, -1, 2, 3) for x in (student, teacher)]
    torch.manual_seed(2)
    torch.testing.assert_close(distance(*maps), expected)


def test_an_image_of_zeros_gives_a_finite_value_and_gradient(distance):
    student, teacher = pair(torch.float32)
    value, gradient = value_and_gradient(
        distance, torch.zeros_like(student).requires_grad_(), teacher
    )
    assert value.isfinite() and gradient.isfinite().all()


def test_one_image_gives_a_finite_value_and_gradient(distance):
    student, teacher = pair(torch.float32)
    value, gradient = value_and_gradient(distance, student[:1], teacher[:1])
    assert value.isfinite() and gradient.isfinite().all()


def test_a_nan_of_the_teacher_shows(distance):
    student, teacher = pair(torch.float32)
    teacher[0, 0, 0] = torch.nan
    distance = ManifoldKD(patches=B * N) if isinstance(distance, ManifoldKD) else distance
    assert distance(student, teacher).isnan()


@pytest.mark.parametrize("name", ["attention", "rkd", "manifold"])
def test_a_student_like_its_teacher_has_neither_value_nor_gradient(name):
    student, _ = pair(torch.float32)
    value, gradient = value_and_gradient(DISTANCES[name](), student, student.detach().clone())
    assert value.item() == 0
    assert gradient.abs().max() == 0


def test_unequal_counts_of_tokens_are_refused(distance):
    student, teacher = pair(torch.float32)
    with pytest.raises(ValueError, match=r"teacher must be \[4, 6, 7\].*got \[4, 5, 7\].*CLS"):
        distance(student, teacher[:, 1:])


@pytest.mark.parametrize("chunk_bytes", [1, 100, 777])
@pytest.mark.parametrize("name", OPERATORS)
def test_chunks_of_any_size_give_the_same(name, chunk_bytes):
    student, teacher = pair()
    whole, cut = (OPERATORS[name](chunk_bytes=size).double() for size in (1 << 30, chunk_bytes))
    torch.testing.assert_close(
        value_and_gradient(cut, student, teacher), value_and_gradient(whole, student, teacher)
    )


@pytest.mark.parametrize("name", OPERATORS)
def test_chunks_of_no_size_are_refused(name):
    with pytest.raises(ValueError, match="chunk_bytes must be at least 1, got 0"):
        OPERATORS[name](chunk_bytes=0)


def test_products_stay_in_float32_where_the_user_allows_less():
    seen = []

    @gradient_in_forward("what_precision_for_a_test")
    def probe(x: torch.Tensor, needs_gradient: bool) -> tuple[torch.Tensor, torch.Tensor]:
        seen.append((torch.backends.cuda.matmul.fp32_precision, torch.is_autocast_enabled("cpu")))
        return x.sum(), torch.ones_like(x)

    setting = torch.backends.cuda.matmul
    before, setting.fp32_precision = setting.fp32_precision, "tf32"
    try:
        with torch.autocast("cpu", torch.bfloat16):
            probe(torch.zeros(2))
        assert seen == [("ieee", False)]
        assert setting.fp32_precision == "tf32"
    finally:
        setting.fp32_precision = before


class Returned(TorchDispatchMode):
    """What fastkd's operators have returned."""

    def __init__(self) -> None:
        super().__init__()
        self.results = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        results = func(*args, **(kwargs or {}))
        if func.namespace == "fastkd":
            self.results.append(results)
        return results


@pytest.mark.parametrize(("grad_enabled", "required"), [(False, True), (True, False), (True, True)])
@pytest.mark.parametrize("name", OPERATORS)
def test_gradients_are_made_only_where_somebody_wants_them(name, grad_enabled, required):
    student, teacher = pair(torch.float32)
    distance = OPERATORS[name]()
    distance.requires_grad_(required)
    with torch.set_grad_enabled(grad_enabled), Returned() as returned:
        distance(student.detach().requires_grad_(required), teacher)
    sizes = [gradient.numel() for _, *gradients in returned.results for gradient in gradients]
    assert sizes
    assert all(size > 0 if grad_enabled and required else size == 0 for size in sizes)


def test_the_backward_uses_the_gradient_up_where_nobody_can_ask_again():
    student = torch.randn(8, 64, 96, requires_grad=True)
    teacher = torch.randn(8, 64, 96)

    def peak_of_backward(retain_graph: bool) -> int:
        values = [2 * ManifoldKD(inter=0, random=0)(student, teacher) for _ in range(2)]
        work = lambda: torch.autograd.grad(  # noqa: E731
            values.pop(), student, retain_graph=retain_graph
        )
        return peak_extra_bytes(work, "cpu")

    assert peak_of_backward(False) < 0.1 * student.nbytes
    # No zeros are made for the gradients' own gradients, either.
    assert peak_of_backward(True) < 1.1 * student.nbytes


def test_gradients_come_in_batches(distance):
    student, teacher = pair(torch.float32)
    value = distance(student, teacher)
    upstream = torch.tensor([1.0, -2.0])
    (batch,) = torch.autograd.grad(
        value, student, upstream, is_grads_batched=True, retain_graph=True
    )
    (once,) = torch.autograd.grad(value, student)
    torch.testing.assert_close(batch, torch.stack((once, -2 * once)))


def test_the_default_chunk_is_small_on_a_cpu_and_larger_elsewhere():
    batch = 1024
    student, teacher = (torch.randn(batch, 8) for _ in range(2))
    distance = crd(8, 8).eval()
    peak = peak_extra_bytes(lambda: distance(student.requires_grad_(), teacher), "cpu")
    assert peak < 2.5 * 2**20 < batch**2 * 4
    assert chunk_limit(torch.device("cuda"), None) == 64 * 2**20


def test_shorter_vectors_than_rounding_leaves_have_no_direction():
    x = torch.tensor([[3e-13, 0.0], [0.0, 2e-12]])
    unit, inverse = directions(x, torch.float32)
    torch.testing.assert_close(unit, torch.tensor([[0.0, 0.0], [0.0, 1.0]]))
    assert inverse[0] == 0 < inverse[1]


def test_counters_of_flops_see_the_products():
    images, places, dim = 8, 6, 8
    tokens = {name: torch.randn(images, places, width) for name, width in WIDTHS.items()}

    def count(distance: nn.Module, needs_gradient: bool) -> int:
        student = tokens["student"].clone().requires_grad_(needs_gradient)
        with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(needs_gradient):
            distance(student, tokens["teacher"])
        return counter.get_total_flops()

    # Each side's product, and with a gradient a third, of the student's width.
    widths = {False: DS + DT, True: 2 * DS + DT}
    for needs_gradient, width in widths.items():
        similarities = images * places**2 + places * images**2 + 5**2
        assert count(ManifoldKD(patches=5), needs_gradient) == 2 * similarities * width
        assert count(ManifoldKD(random=0, inter=0), needs_gradient) == 2 * 8 * 6**2 * width
        angles = 2 * images**3 * width
        assert count(RKD(0, 1), needs_gradient) == angles
        pulls = 2 * 2 * images**2 * DS if needs_gradient else 0
        assert count(RKD(), needs_gradient) == angles + pulls
        heads = 2 * images * dim * (DS + DT)
        logits = 2 * 2 * images**2 * dim * (3 if needs_gradient else 1)
        assert count(crd(), needs_gradient) == heads + logits
        assert count(AttentionTransfer(), needs_gradient) == 0


@pytest.mark.parametrize("size", [1e20, 1e30])
@pytest.mark.parametrize("name", ["manifold", "crd", "rkd normalized"])
def test_directions_of_vectors_whose_squares_float32_cannot_hold(name, size):
    made = {"manifold": ManifoldKD, "crd": crd, "rkd normalized": lambda: RKD(normalize=True)}
    distance = made[name]()
    if name == "crd":
        torch.nn.init.zeros_(distance.student_head.bias)  # a direction then has no scale
    student, teacher = pair(torch.float32)
    value, gradient = value_and_gradient(distance, student, teacher)
    large = (size * student.detach()).requires_grad_()
    found, slope = value_and_gradient(distance, large, teacher)
    torch.testing.assert_close(found, value)
    torch.testing.assert_close(size * slope, gradient, rtol=1e-3, atol=1e-5)
