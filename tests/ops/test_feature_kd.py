"""feature_kd: what it computes, on every backend, against the float64 definition."""

from __future__ import annotations

import logging
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastkd.ops import feature_kd, self_check
from fastkd.ops.backend import Implementation
from fastkd.ops.feature_kd import BACKENDS, reference
from fastkd.ops.feature_kd.reference import LOSSES, definition
from tests.harness.cases import FINITE, laid_out, relative_error, slow

UPSTREAM = 0.2

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def loss_and_gradients(
    student: Tensor,
    teacher: Tensor,
    wanted: tuple[bool, bool] = (True, False),
    upstream: float = UPSTREAM,
    **options,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """One forward and backward; also runs in the interpreter's process."""
    inputs = [x.detach().requires_grad_(w) for x, w in zip((student, teacher), wanted)]
    value = feature_kd(*inputs, **options)
    if any(wanted):
        value.backward(torch.full_like(value, upstream))
    return value.detach(), inputs[0].grad, inputs[1].grad


def defined(
    student: Tensor,
    teacher: Tensor,
    loss: str,
    dtype: torch.dtype = torch.float64,
    upstream: float = UPSTREAM,
    **options,
) -> tuple[Tensor, Tensor, Tensor]:
    """The same by autograd through the definition, on [B, H, W, D] maps."""
    inputs = [x.detach().to(dtype).requires_grad_() for x in (student, teacher)]
    value = definition(*inputs, loss, **options)
    gradients = torch.autograd.grad(value, inputs, torch.full_like(value, upstream))
    return value.detach(), *gradients


def pair(case: str, shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    batch, height, width, channels = shape
    maps = FINITE[case]((batch, height * width, channels))
    return tuple(x.unflatten(1, (height, width)).to(dtype) for x in maps)


def as_maps(x: Tensor, height: int, width: int) -> Tensor:
    return x.permute(0, 2, 3, 1) if x.ndim == 4 else x.unflatten(1, (height, width))


@pytest.mark.parametrize("grid", [(14, 14), (7, 7), (16, 16), (14, 13), (1, 2), (1, 1), (3, 1)])
def test_spectral_equals_the_fft_of_both_maps(grid):
    student, teacher = (torch.randn(2, 3, *grid, dtype=torch.float64) for _ in range(2))
    student.requires_grad_()
    spectra = [torch.fft.rfft2(x, norm="ortho") for x in (student, teacher)]
    stacked = [torch.stack((x.real, x.imag)) for x in spectra]
    expected = F.mse_loss(*stacked)
    (expected_gradient,) = torch.autograd.grad(expected, student)
    value = feature_kd(student, teacher, "spectral")
    (gradient,) = torch.autograd.grad(value, student)
    assert relative_error(value, expected) < 1e-12
    assert relative_error(gradient, expected_gradient) < 1e-12


def summed_by_triton(partials: Tensor) -> Tensor:
    from fastkd.ops.feature_kd import triton

    total = torch.empty((), device=partials.device)
    triton.finish_launch(partials, total, 0.5).run()
    return total


@pytest.mark.parametrize("count", [1, 255, 256, 257, 1000])
def test_triton_adds_all_partial_sums(backend, count):
    if backend.name != "triton":
        pytest.skip("the others are covered by many_images")
    partials = torch.arange(count, dtype=torch.float32, device=backend.device)
    total = backend.call(summed_by_triton, partials)
    assert total.item() == partials.sum().item() / 2


@pytest.mark.slow
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("student_layout", ["channels_first", "channels_last_map", "cropped"])
@pytest.mark.parametrize("teacher_layout", ["channels_first", "channels_last_map", "cropped"])
def test_student_and_teacher_may_differ_in_layout(backend, student_layout, teacher_layout, loss):
    student, teacher = pair("noise", (2, 4, 6, 16), torch.float32)
    inputs = laid_out(student, student_layout), laid_out(teacher, teacher_layout)
    value, gradient, other = backend.call(
        loss_and_gradients,
        *(x.to(backend.device) for x in inputs),
        (True, True),
        loss=loss,
        backend=backend.name,
    )
    truth = defined(student, teacher, loss)
    found = value, *(x.cpu().permute(0, 2, 3, 1) for x in (gradient, other))
    for ours, expected in zip(found, truth):
        assert relative_error(ours.cpu(), expected) < 1e-5


@pytest.mark.parametrize("wide", [80, 120, 57])  # ratios 2, 3, and overlapping windows
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("layout", ["tokens", pytest.param("channels_first", marks=slow)])
@pytest.mark.parametrize("pool", ["teacher", "student"])
def test_channel_pooling_equals_adaptive_avg_pool3d(backend, pool, layout, loss, wide):
    narrow = torch.randn(2, 4, 6, 40, dtype=torch.float64)
    broad = torch.randn(2, 4, 6, wide, dtype=torch.float64)
    student, teacher = (narrow, broad) if pool == "teacher" else (broad, narrow)
    inputs = [laid_out(x.float(), layout).to(backend.device) for x in (student, teacher)]
    grid = (4, 6) if layout == "tokens" else None
    options = {"loss": loss, "pool": pool, "grid": grid, "backend": backend.name}
    value, gradient, other = backend.call(loss_and_gradients, *inputs, (True, True), **options)

    student, teacher = student.float().double(), teacher.float().double()
    student.requires_grad_(), teacher.requires_grad_()
    maps = [
        F.adaptive_avg_pool3d(x.permute(0, 3, 1, 2), (40, 4, 6)).permute(0, 2, 3, 1)
        for x in (student, teacher)
    ]
    truth = definition(*maps, loss)
    expected = torch.autograd.grad(truth, (student, teacher), torch.full_like(truth, UPSTREAM))
    assert relative_error(value.cpu(), truth.detach()) < 1e-5
    for found, wanted in zip((gradient, other), expected):
        assert relative_error(as_maps(found.cpu(), 4, 6), wanted) < 1e-5


@pytest.mark.parametrize("beta", [0.0, 0.25, 2.0])
def test_smooth_l1_takes_its_threshold(backend, beta):
    student, teacher = pair("noise", (2, 4, 6, 16), torch.float32)
    student[0, 0] = teacher[0, 0]  # at zero the gradient is zero, also where beta is
    value, gradient, _ = backend.call(
        loss_and_gradients,
        *(x.flatten(1, 2).to(backend.device) for x in (student, teacher)),
        loss="smooth_l1",
        beta=beta,
        backend=backend.name,
    )
    truth, expected, _ = defined(student, teacher, "smooth_l1", beta=beta)
    assert relative_error(value.cpu(), truth) < 1e-5
    assert relative_error(gradient.cpu().view_as(expected), expected) < 1e-5


def test_cosine_of_a_directionless_token_is_zero_without_gradient(backend):
    student, teacher = torch.randn(1, 4, 8), torch.randn(1, 4, 8)
    student[0, 1], teacher[0, 2] = 0, 0
    value, gradient, _ = backend.call(
        loss_and_gradients,
        student.to(backend.device),
        teacher.to(backend.device),
        loss="cosine",
        backend=backend.name,
    )
    directed = F.cosine_similarity(student[0, ::3], teacher[0, ::3], dim=-1)
    assert relative_error(value.cpu(), 1 - directed.sum() / 4) < 1e-5
    assert gradient[0, 1].eq(0).all() and gradient[0, 2].eq(0).all()
    assert gradient[0, 0].ne(0).all()


def test_the_gradient_keeps_the_layout_of_a_channels_last_map():
    student = torch.randn(2, 8, 4, 6).to(memory_format=torch.channels_last).requires_grad_()
    feature_kd(student, torch.randn(2, 8, 4, 6)).backward()
    assert student.grad.is_contiguous(memory_format=torch.channels_last)


def test_an_image_that_spans_too_much_memory_for_int32_is_refused_by_triton():
    triton = pytest.importorskip("fastkd.ops.feature_kd.triton")
    far = torch.empty(1, 8, device="meta").expand(2, 8).as_strided((2, 4, 10, 8), (8, 2**30, 16, 1))
    near = torch.empty(2, 4, 10, 8, device="meta")
    assert "2^31" in triton.refuses(near, far, "mse")
    assert triton.refuses(near, near, "mse") is None


def test_a_row_too_long_for_a_tile_is_refused_by_triton():
    triton = pytest.importorskip("fastkd.ops.feature_kd.triton")
    long = torch.empty(1, 2, 300, 8, device="meta")
    assert "at most 256 tokens, got 300" in triton.refuses(long, long, "spectral")
    assert triton.refuses(long, long, "mse") is None


def test_cosine_takes_its_eps(backend):
    student = (
        F.normalize(torch.randn(1, 4, 8), dim=-1) * torch.tensor([1, 0.009, 0.011, 1])[:, None]
    )
    teacher = F.normalize(torch.randn(1, 4, 8), dim=-1) * torch.tensor([1, 1, 1, 0.009])[:, None]
    value, gradient, _ = backend.call(
        loss_and_gradients,
        student.to(backend.device),
        teacher.to(backend.device),
        loss="cosine",
        eps=0.01,
        backend=backend.name,
    )
    directed = F.cosine_similarity(student[0, ::2], teacher[0, ::2], dim=-1)
    assert relative_error(value.cpu(), 1 - directed.sum() / 4) < 1e-5
    assert gradient[0].ne(0).any(dim=-1).tolist() == [True, False, True, False]


@pytest.mark.parametrize("layout", ["tokens", "channels_first"])
@pytest.mark.parametrize("loss", LOSSES)
def test_autocast_changes_nothing(loss, layout):
    student, teacher = (torch.randn(2, 4, 6, channels) for channels in (40, 57))
    inputs = laid_out(student, layout), laid_out(teacher, layout)
    options = {"loss": loss, "pool": "teacher", "grid": (4, 6)}
    plain = loss_and_gradients(*inputs, (True, True), **options)
    with torch.autocast("cpu", torch.bfloat16):
        cast = loss_and_gradients(*inputs, (True, True), **options)
    for found, expected in zip(cast, plain):
        assert torch.equal(found, expected)


@pytest.fixture
def changed_matmul_precision():
    before = torch.backends.mkldnn.matmul.fp32_precision
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"
    yield
    torch.backends.mkldnn.matmul.fp32_precision = before


@pytest.mark.parametrize("loss", LOSSES)
def test_the_users_matmul_precision_changes_nothing(loss, changed_matmul_precision):
    student, teacher = (torch.randn(2, 14, 14, channels) for channels in (40, 57))
    inputs = (laid_out(x, "channels_first") for x in (student, teacher))
    value, gradient, other = loss_and_gradients(*inputs, (True, True), loss=loss, pool="teacher")
    truth = defined(student, teacher, loss)
    found = value, *(x.permute(0, 2, 3, 1) for x in (gradient, other))
    for ours, expected in zip(found, truth):
        assert relative_error(ours, expected) < 1e-5


A = torch.zeros(8, 196, 384)

BAD_INPUTS = {
    "cls_left_in": ((A, torch.zeros(8, 197, 384)), {}, r"\[8, 196, 384\].*\[8, 197, 384\].*CLS"),
    "widths": ((A[..., :192], A), {}, r"pool='teacher'"),
    "wrong_pool": ((A[..., :192], A), {"pool": "student"}, r"192 and the other 384"),
    "loss": ((A, A), {"loss": "l2"}, r"'mse', 'spectral'.*got 'l2'"),
    "pool": ((A, A), {"pool": "max"}, r"pool must be one of.*got 'max'"),
    "grid": ((A, A), {"grid": (14, 13)}, r"grid \(14, 13\) does not match 196 tokens"),
    "no_square": ((A[:, :195], A[:, :195]), {"loss": "spectral"}, r"195 tokens"),
    "dims": ((A[0], A[0]), {}, r"\[B, N, D\] or \[B, D, H, W\], got \[196, 384\]"),
    "mixed_dims": ((A, A.unflatten(1, (14, 14))), {}, r"both"),
    "no_channels": ((A[..., :0], A[..., :0]), {}, r"only the batch may be empty"),
    "beta": ((A, A), {"beta": -1.0}, r"beta must be finite and >= 0, got -1"),
    "eps": ((A, A), {"eps": float("nan")}, r"eps must be finite"),
    "backend": ((A, A), {"backend": "jax"}, r"backend must be one of.*got 'jax'"),
}


@pytest.mark.parametrize(("inputs", "options", "message"), BAD_INPUTS.values(), ids=BAD_INPUTS)
def test_bad_inputs_are_named(inputs, options, message):
    with pytest.raises(ValueError, match=f"feature_kd: .*{message}"):
        feature_kd(*inputs, **options)


def self_checked(name: str, device: str, dtypes, loss: str) -> str | None:
    maps = (torch.zeros(1, 1, 1, 8, dtype=dtype, device=device) for dtype in dtypes)
    return self_check.failure(BACKENDS, name, (*maps, loss))


@pytest.mark.slow
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_backend_passes_its_self_check(backend, dtype, loss):
    dtypes = (dtype, torch.float32)
    assert backend.call(self_checked, backend.name, backend.device, dtypes, loss) is None


def test_a_wrong_kernel_is_switched_off_with_one_warning(backend, caplog):
    if backend.name != "cuda":
        pytest.skip("one fused backend that runs in this process is enough")

    def wrong(*inputs):
        value, stats = reference.forward(*inputs)
        return value * 1.01, stats

    broken = Implementation(wrong, reference.backward)
    torch_path = BACKENDS.implementations["torch"]
    implementations = {"cuda": broken, "torch": torch_path}
    backends = replace(BACKENDS, implementations=implementations, verdicts={})
    x = torch.randn(1, 2, 2, 8, device=backend.device)
    with caplog.at_level(logging.INFO, logger="fastkd"):
        assert backends.select("auto", x, x, "mse") is torch_path
        assert backends.select("auto", x, x, "mse") is torch_path
    warnings = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert len(warnings) == 1
    assert "disagrees with the reference" in warnings[0]
    assert "error 0.01, allowed 1e-05" in warnings[0]
    with pytest.raises(RuntimeError, match="disagrees with the reference"):
        backends.select("cuda", x, x, "mse")


SIZES = [1e-20, 1.8e19, 1e25, 1e33]  # norms whose squares float32 does not hold


@pytest.mark.parametrize("eps", [1e-8, 0.0])
@pytest.mark.parametrize(
    "sizes", [(s, 1.0) for s in SIZES] + [(1.0, s) for s in SIZES] + [(1e25,) * 2]
)
def test_cosine_is_right_for_tokens_of_any_size(backend, sizes, eps):
    if eps > 0:
        sizes = tuple(max(size, 1.0) for size in sizes)
    noise = (x.clamp(-3, 3).unflatten(1, (2, 3)) for x in FINITE["noise"]((2, 6, 40)))
    student, teacher = (x * size for x, size in zip(noise, sizes))
    student[0, 0] /= sizes[0]  # a token of ordinary size among them
    value, gradient, other = backend.call(
        loss_and_gradients,
        *(x.flatten(1, 2).to(backend.device) for x in (student, teacher)),
        (True, True),
        loss="cosine",
        eps=eps,
        backend=backend.name,
    )
    truth, *slopes = defined(student, teacher, "cosine", eps=eps)
    assert relative_error(value.cpu(), truth) < 1e-5
    for found, expected in zip((gradient, other), slopes):
        for token, right in zip(
            found.cpu().view_as(expected).flatten(0, 2), expected.flatten(0, 2)
        ):
            assert relative_error(token, right) < 1e-5
    assert abs(definition(student, teacher, "cosine", eps=eps) - truth) < 1e-5


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("side", [0, 1])
def test_a_token_that_is_not_finite_shows_beside_one_of_zeros(backend, side, bad):
    inputs = [torch.zeros(1, 4, 8), torch.zeros(1, 4, 8)]
    inputs[side][0, 2, 3] = bad
    value, *_ = backend.call(
        loss_and_gradients,
        *(x.to(backend.device) for x in inputs),
        loss="cosine",
        backend=backend.name,
    )
    assert value.isnan()
    assert definition(*(x.unsqueeze(1) for x in inputs), "cosine").isnan()


def test_float64_tokens_have_cosines_of_any_size():
    student, teacher = (x.double() for x in FINITE["noise"]((1, 4, 8)))
    expected = feature_kd(student, teacher, "cosine")
    for size in (1e200, 1e-200):
        found = feature_kd(size * student, teacher / size, "cosine", eps=0.0)
        torch.testing.assert_close(found, expected)
