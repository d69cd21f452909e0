"""feature_kd: what is its alone; what all operators do is in test_conformance.py."""

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
from tests.harness.cases import FINITE, MAP_LAYOUTS, laid_out, relative_error, slow
from tests.ops.answers import answer, bfloat16_products, by_reference, right, same_bits
from tests.ops.operators import OPERATORS, distance

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SHAPE = (2, 4, 6, 16)


def maps(*shapes: tuple[int, ...]) -> dict[str, Tensor]:
    """[B, H, W, D] noise for student and teacher."""
    student, teacher = shapes * (3 - len(shapes))
    return {"student": torch.randn(student), "teacher": torch.randn(teacher)}


def tokens(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: x.flatten(1, 2) for name, x in inputs.items()}


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
@pytest.mark.parametrize("student_layout", MAP_LAYOUTS)
@pytest.mark.parametrize("teacher_layout", MAP_LAYOUTS)
def test_student_and_teacher_may_differ_in_layout(backend, student_layout, teacher_layout, loss):
    inputs = maps(SHAPE)
    inputs["student"] = laid_out(inputs["student"], student_layout)
    inputs["teacher"] = laid_out(inputs["teacher"], teacher_layout)
    right(backend, "feature_kd", inputs, {"loss": loss})


def pooled_reference(student: Tensor, teacher: Tensor, loss: str, **_: object) -> Tensor:
    sides = [x.flatten(2).mT if x.ndim == 4 else x for x in (student, teacher)]
    channels = min(x.shape[2] for x in sides)
    sides = [F.adaptive_avg_pool1d(x, channels).unflatten(1, (4, 6)) for x in sides]
    return distance(*sides, loss)


@pytest.fixture
def by_pooling(monkeypatch):
    """Compare with torch's own pooling."""
    operator = replace(OPERATORS["feature_kd"], reference=pooled_reference)
    monkeypatch.setitem(OPERATORS, "feature_kd", operator)


# Ratios 3 and 2, and overlapping windows.
@pytest.mark.parametrize("wide", [120, pytest.param(80, marks=slow), 57])
@pytest.mark.parametrize(
    "loss", [pytest.param(x, marks=slow if x == "smooth_l1" else ()) for x in LOSSES]
)
@pytest.mark.parametrize("layout", ["tokens", pytest.param("channels_first", marks=slow)])
@pytest.mark.parametrize("pool", ["teacher", "student"])
def test_channel_pooling_equals_adaptive_avg_pool(backend, by_pooling, pool, layout, loss, wide):
    shapes = [(2, 4, 6, 40), (2, 4, 6, wide)]
    inputs = maps(*shapes if pool == "teacher" else shapes[::-1])
    inputs = {name: laid_out(x, layout) for name, x in inputs.items()}
    grid = {"grid": (4, 6)} if layout == "tokens" else {}
    right(backend, "feature_kd", inputs, {"loss": loss, "pool": pool, **grid})


@pytest.mark.parametrize("layout", ["tokens", "channels_first"])
@pytest.mark.parametrize("loss", LOSSES)
def test_neither_autocast_nor_the_users_precision_changes_pooling(loss, layout):
    inputs = maps((2, 4, 6, 40), (2, 4, 6, 57))
    inputs = {name: laid_out(x, layout) for name, x in inputs.items()}
    chosen = {"loss": loss, "pool": "teacher"}
    chosen |= {"grid": (4, 6)} if layout == "tokens" else {}
    operator = OPERATORS["feature_kd"]
    expected = operator.run(inputs, chosen, backend="torch")
    same_bits(operator.run(inputs, chosen, backend="torch", autocast=True), expected)
    with bfloat16_products():
        found = operator.run(inputs, chosen, backend="torch")
    exact = pooled_reference(*(x.double() for x in inputs.values()), loss)
    assert relative_error(found[0][0], exact) < 1e-5
    for name, gradient in found[1].items():
        assert relative_error(gradient, expected[1][name]) < 1e-5


@pytest.mark.parametrize("beta", [0.0, 0.25, 2.0])
def test_smooth_l1_takes_its_threshold(backend, beta):
    inputs = maps(SHAPE)
    inputs["student"][0, 0] = inputs["teacher"][0, 0]  # at zero the gradient is zero for any beta
    right(backend, "feature_kd", tokens(inputs), {"loss": "smooth_l1", "beta": beta})


def test_cosine_of_a_directionless_token_is_zero_without_gradient(backend):
    inputs = {name: torch.randn(1, 4, 8) for name in ("student", "teacher")}
    inputs["student"][0, 1], inputs["teacher"][0, 2] = 0, 0
    (value,), gradients = answer(backend, "feature_kd", inputs, {"loss": "cosine"})
    student, teacher = (x[0, ::3] for x in inputs.values())
    directed = F.cosine_similarity(student, teacher, dim=-1)
    assert relative_error(value, 1 - directed.sum() / 4) < 1e-5
    assert gradients["student"][0].ne(0).any(dim=-1).tolist() == [True, False, False, True]


def test_cosine_takes_its_eps(backend):
    student, teacher = (F.normalize(torch.randn(1, 4, 8), dim=-1) for _ in range(2))
    student *= torch.tensor([1, 0.009, 0.011, 1])[:, None]
    teacher *= torch.tensor([1, 1, 1, 0.009])[:, None]
    inputs = {"student": student, "teacher": teacher}
    (value,), gradients = answer(backend, "feature_kd", inputs, {"loss": "cosine", "eps": 0.01})
    directed = F.cosine_similarity(student[0, ::2], teacher[0, ::2], dim=-1)
    assert relative_error(value, 1 - directed.sum() / 4) < 1e-5
    assert gradients["student"][0].ne(0).any(dim=-1).tolist() == [True, False, True, False]


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


A = torch.zeros(8, 196, 384)

BAD_INPUTS = {
    "cls_left_in": ((A, torch.zeros(8, 197, 384)), {}, r"\[8, 196, 384\].*\[8, 197, 384\].*CLS"),
    "widths": ((A[..., :192], A), {}, r"pool='teacher'"),
    "wrong_pool": ((A[..., :192], A), {"pool": "student"}, r"192 and the other 384"),
    "no_square": ((A[:, :195], A[:, :195]), {"loss": "spectral"}, r"195 tokens"),
    "dims": ((A[0], A[0]), {}, r"\[B, N, D\] or \[B, D, H, W\], got \[196, 384\]"),
    "mixed_dims": ((A, A.unflatten(1, (14, 14))), {}, r"both"),
    "no_channels": ((A[..., :0], A[..., :0]), {}, r"only the batch may be empty"),
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
    inputs = {"student": sizes[0], "teacher": sizes[1]}
    noise = dict(zip(inputs, FINITE["noise"]((2, 6, 40))))
    inputs = {name: noise[name].clamp(-3, 3) * size for name, size in inputs.items()}
    inputs["student"][0, 0] /= sizes[0]  # a token of ordinary size among them
    chosen = {"loss": "cosine", "eps": eps}
    (value,), gradients = answer(backend, "feature_kd", inputs, chosen)
    (truth,), slopes, _ = by_reference("feature_kd", inputs, chosen, torch.float64)
    assert relative_error(value, truth) < 1e-5
    for name, gradient in gradients.items():
        for token, right_one in zip(gradient.flatten(0, 1), slopes[name].flatten(0, 1)):
            assert relative_error(token, right_one) < 1e-5
    as_map = (x.unsqueeze(1) for x in inputs.values())
    assert abs(definition(*as_map, "cosine", eps=eps) - truth) < 1e-5


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("side", ["student", "teacher"])
def test_a_token_that_is_not_finite_shows_beside_one_of_zeros(backend, side, bad):
    inputs = {"student": torch.zeros(1, 4, 8), "teacher": torch.zeros(1, 4, 8)}
    inputs[side][0, 2, 3] = bad
    assert answer(backend, "feature_kd", inputs, {"loss": "cosine"})[0][0].isnan()
    assert definition(*(x.unsqueeze(1) for x in inputs.values()), "cosine").isnan()


def test_float64_tokens_have_cosines_of_any_size():
    student, teacher = (x.double() for x in FINITE["noise"]((1, 4, 8)))
    expected = feature_kd(student, teacher, "cosine")
    for size in (1e200, 1e-200):
        found = feature_kd(size * student, teacher / size, "cosine", eps=0.0)
        torch.testing.assert_close(found, expected)
