"""What attention transfer, RKD, CRD and manifold distillation have in common."""

import pytest
import torch
from torch import nn

from fastkd.losses.attention import AttentionTransfer
from fastkd.losses.contrastive import CRD
from fastkd.losses.forward_gradient import gradient_in_forward
from fastkd.losses.manifold import ManifoldKD
from fastkd.losses.relational import RKD
from tests.harness import cases

B, N, DS, DT = 4, 6, 5, 7


def crd(student_dim: int = DS, teacher_dim: int = DT, **options) -> CRD:
    torch.manual_seed(0)
    return CRD(student_dim, teacher_dim, dim=8, **options)


DISTANCES = {"attention": AttentionTransfer, "rkd": RKD, "crd": crd, "manifold": ManifoldKD}
CHUNKED = ["rkd", "crd", "manifold"]


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


def test_the_gradient_is_that_of_the_value(distance):
    student, teacher = pair()
    distance.double()

    def seeded(x):
        torch.manual_seed(2)
        return distance(x, teacher)

    assert torch.autograd.gradcheck(seeded, (student,), fast_mode=True)


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


def test_tokens_need_not_be_contiguous(distance):
    student, teacher = pair(torch.float32)
    with_class_token = [torch.cat((x[:, :1], x), dim=1) for x in (student, teacher)]
    sliced = [x[:, 1:] for x in with_class_token]
    ours, theirs = (value_and_gradient(distance, student, t) for t in (teacher, sliced[1]))
    torch.testing.assert_close(ours, theirs)
    torch.manual_seed(2)
    torch.testing.assert_close(distance(*sliced), ours[0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_is_summed_in_float32(distance, dtype):
    student, teacher = pair(dtype)
    value, gradient = value_and_gradient(distance, student, teacher)
    truth = value_and_gradient(distance.double(), student.double(), teacher.double())
    assert value.dtype == torch.float32 and gradient.dtype == dtype
    torch.testing.assert_close(value.double(), truth[0], rtol=1e-5, atol=0)
    assert cases.relative_error(gradient, truth[1]) < torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", cases.FINITE)
@pytest.mark.parametrize("name", DISTANCES)
def test_hard_inputs_give_a_finite_value_and_gradient(name, case, dtype):
    student, teacher = (x.to(dtype) for x in cases.FINITE[case]((3, 8, 6)))
    distance = crd(6, 6) if name == "crd" else DISTANCES[name]()
    value, gradient = value_and_gradient(distance, student.requires_grad_(), teacher)
    exact = student.detach().double().requires_grad_()
    _, truth = value_and_gradient(distance.double(), exact, teacher.double())
    assert value.isfinite()
    # Directions of tiny tokens turn fast: such a slope may be none of float16's numbers.
    assert (gradient.isfinite() | (truth.abs() > torch.finfo(dtype).max)).all()


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


def test_no_image_is_a_distance_of_zero(distance):
    student, teacher = pair(torch.float32)
    assert distance(student[:0], teacher[:0]).item() == 0


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


def test_it_compiles_without_graph_breaks(distance):
    student, teacher = pair(torch.float32)
    compiled = torch.compile(distance, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(
        value_and_gradient(compiled, student, teacher),
        value_and_gradient(distance, student, teacher),
    )


def test_autocast_changes_nothing(distance):
    student, teacher = pair(torch.float32)
    expected = value_and_gradient(distance, student, teacher)
    torch.manual_seed(2)
    with torch.autocast("cpu", torch.bfloat16):
        value = distance(student, teacher)
    (gradient,) = torch.autograd.grad(value, student)
    torch.testing.assert_close((value, gradient), expected, rtol=0, atol=0)


def test_it_gives_the_same_bits_again(distance):
    student, teacher = pair(torch.float32)
    first, second = (value_and_gradient(distance, student, teacher) for _ in range(2))
    torch.testing.assert_close(first, second, rtol=0, atol=0)


def test_unequal_counts_of_tokens_are_refused(distance):
    student, teacher = pair(torch.float32)
    with pytest.raises(ValueError, match=r"teacher must be \[4, 6, 7\].*got \[4, 5, 7\].*CLS"):
        distance(student, teacher[:, 1:])


@pytest.mark.parametrize("chunk_bytes", [1, 100, 777])
@pytest.mark.parametrize("name", CHUNKED)
def test_chunks_of_any_size_give_the_same(name, chunk_bytes):
    student, teacher = pair()
    whole, cut = (DISTANCES[name](chunk_bytes=size).double() for size in (1 << 30, chunk_bytes))
    torch.testing.assert_close(
        value_and_gradient(cut, student, teacher), value_and_gradient(whole, student, teacher)
    )


@pytest.mark.parametrize("name", CHUNKED)
def test_chunks_of_no_size_are_refused(name):
    with pytest.raises(ValueError, match="chunk_bytes must be positive or None, got 0"):
        DISTANCES[name](chunk_bytes=0)


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


@pytest.mark.parametrize("name", CHUNKED)
def test_second_derivatives_are_refused(name):
    student, teacher = pair(torch.float32)
    value = DISTANCES[name]()(student, teacher)
    with pytest.raises(RuntimeError, match=r"cannot be differentiated again \(create_graph=True\)"):
        torch.autograd.grad(value, student, create_graph=True)


@pytest.mark.parametrize("name", CHUNKED)
def test_forward_mode_is_refused(name):
    student, teacher = pair(torch.float32)
    distance = DISTANCES[name]()
    with pytest.raises(NotImplementedError, match="forward"):
        torch.func.jvp(lambda x: distance(x, teacher), (student.detach(),), (student.detach(),))


@pytest.mark.parametrize("name", CHUNKED)
def test_without_a_gradient_the_value_is_the_same(name):
    student, teacher = pair(torch.float32)
    distance = DISTANCES[name]()
    expected, _ = value_and_gradient(distance, student, teacher)
    torch.manual_seed(2)
    with torch.no_grad():
        assert distance(student, teacher) == expected


@pytest.mark.parametrize("needs_gradient", [False, True])
def test_the_operators_pass_opcheck(needs_gradient):
    student, teacher = (x.detach().float() for x in pair())
    embeddings = student.mean(1), teacher.mean(1)
    drawn = torch.tensor([5, 0, 7])
    cases_ = {
        torch.ops.fastkd.manifold_kd: ((student,), (teacher, drawn, 4.0, 0.1, 0.2, 500)),
        torch.ops.fastkd.rkd_angles: (embeddings[:1], (embeddings[1], 500)),
        torch.ops.fastkd.info_nce: ((student[:2, 0], student[:, 1]), (1, 0.07, 50)),
    }
    for operator, (leaves, rest) in cases_.items():
        leaves = [x.requires_grad_(needs_gradient) for x in leaves]
        torch.library.opcheck(operator.default, (*leaves, *rest, needs_gradient))
