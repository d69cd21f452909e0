"""lift_kd and lift: what is theirs alone; what all operators do is in test_conformance.py."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from bench.harness import peak_extra_bytes
from fastkd.ops import lift, lift_kd, self_check
from fastkd.ops.feature_kd.reference import LOSSES
from fastkd.ops.lift_kd import BACKENDS, LIFT_EPS
from fastkd.ops.lift_kd import reference as torch_path
from fastkd.ops.lift_kd.reference import Inputs
from tests.harness.cases import BFLOAT16_FIRST, laid_out, relative_error
from tests.ops.answers import answer, by_reference, right
from tests.ops.operators import LIFTED, OPERATORS, Tensors, layers, measure

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SMALL = LIFTED["small"]
# Widths that the CUDA C++ kernels take, too: on a GPU only the paper's.
WIDE = (2, 2, 3, 192, 384) if torch.cuda.is_available() else (2, 2, 3, 32, 64)
OPTIONS = {
    "norm": ("norm_weight", "norm_bias"),
    "norm_without_bias": ("norm_weight",),
    "bias": ("bias",),
    "bias_and_norm": ("bias", "norm_weight", "norm_bias"),
    "linear": (),
}
NORM, ALL = OPTIONS["norm"], OPTIONS["bias_and_norm"]
BOTH_FORMS = pytest.mark.parametrize("pool", [False, True], ids=["one_pass", "pooled"])


def draw(shape, parts=ALL, dtype=torch.bfloat16, case: str = "noise") -> Tensors:
    """Inputs of lift_kd, with some of the parameters."""
    inputs = OPERATORS["lift_kd"].draw(shape, case)
    kept = ("student_tokens", "teacher_tokens", "weight", *parts)
    return {name: x.to(dtype) for name, x in inputs.items() if name in kept}


def options(shape=SMALL, loss="mse", pool=False, **others):
    return {"loss": loss, "pool": pool, "grid": shape[1:3], **others}


@BOTH_FORMS
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("parts", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("shape", LIFTED.values(), ids=LIFTED)
def test_float64_with_any_parameters(shape, parts, loss, pool):
    inputs, chosen = draw(shape, parts, torch.float64), options(shape, loss, pool)
    found = OPERATORS["lift_kd"].run(inputs, chosen, backend="torch")
    truth = by_reference("lift_kd", inputs, chosen, torch.float64)
    assert set(found[1]) == {"student_tokens", "weight", *parts}
    for ours, exact in zip((*found[0], *found[1].values()), (*truth[0], *truth[1].values())):
        assert relative_error(ours, exact) < 1e-12


@pytest.mark.parametrize(
    ("loss", "pool"),
    [
        ("mse", False),
        ("cosine", True),
        pytest.param("mse", True, marks=pytest.mark.slow),
        pytest.param("cosine", False, marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("parts", [x for x in OPTIONS.values() if x != ALL], ids=len)
@pytest.mark.parametrize("dtype", BFLOAT16_FIRST, ids=str)
def test_bias_and_norm_are_optional(backend, parts, loss, pool, dtype):
    if backend.name == "cuda" and dtype == torch.float32:
        pytest.skip("half precision only")
    right(backend, "lift_kd", draw(SMALL, parts, dtype), options(loss=loss, pool=pool))


@pytest.mark.parametrize("dtype", BFLOAT16_FIRST, ids=str)
@pytest.mark.parametrize("loss", LOSSES)
def test_a_teacher_like_the_lifted_student_is_at_no_distance(backend, loss, dtype):
    if backend.name == "cuda" and dtype == torch.float32:
        pytest.skip("half precision only")
    inputs = draw(SMALL, NORM, dtype)
    exact = {name: x.double() for name, x in inputs.items() if name != "teacher_tokens"}
    lifted = layers(exact.pop("student_tokens"), **exact).flatten(1, 2)
    inputs["teacher_tokens"] = lifted.to(dtype)
    (value, _), _ = answer(backend, "lift_kd", inputs, options(loss=loss, pool=True))
    eager = by_reference("lift_kd", inputs, options(loss=loss), dtype)[0][0]
    assert value.item() <= 2 * eager.item() + 1e-6


@pytest.mark.parametrize("beta", [0.0, 0.25, 2.0])
def test_smooth_l1_takes_its_threshold(backend, beta):
    right(backend, "lift_kd", draw(SMALL), options(loss="smooth_l1", beta=beta, pool=True))


@BOTH_FORMS
@pytest.mark.parametrize("lift_eps", [0.0, 0.5])
def test_the_layer_norm_takes_its_eps(backend, lift_eps, pool):
    inputs = draw((1, *WIDE[1:]), NORM)
    inputs["student_tokens"] *= 0.5  # eps is a part of the variance that cannot be missed
    (value, *_), _ = right(backend, "lift_kd", inputs, options(WIDE, pool=pool, lift_eps=lift_eps))
    default = by_reference("lift_kd", inputs, options(WIDE), torch.float64)[0][0]
    assert relative_error(value, default) > (1e-6 if lift_eps == 0 else 1e-2)


@pytest.mark.parametrize("size", [1e20, 1e30])
def test_cosines_of_teachers_of_any_size(backend, size):
    inputs, chosen = draw(WIDE, NORM), options(WIDE, "cosine")
    inputs["teacher_tokens"][0] *= size  # beside an image of ordinary size
    if backend.name == "cuda":  # it has no registers left to scale tokens, and gives NaN
        assert answer(backend, "lift_kd", inputs, chosen)[0][0].isnan()
    else:
        right(backend, "lift_kd", inputs, chosen)


@BOTH_FORMS
def test_parameters_may_lie_in_memory_any_way(backend, pool):
    inputs = draw(SMALL)
    expected = answer(backend, "lift_kd", inputs, options(pool=pool))
    inputs["weight"] = inputs["weight"].mT.contiguous().mT
    for name in ALL:
        inputs[name] = torch.stack([inputs[name]] * 3, dim=1)[:, 1]
    found = answer(backend, "lift_kd", inputs, options(pool=pool))
    assert torch.equal(found[0][0], expected[0][0])
    for name, gradient in found[1].items():
        assert torch.equal(gradient, expected[1][name]), name


@pytest.mark.parametrize("used", ["loss", "pooled"])
def test_either_output_may_be_used_alone(backend, used):
    arriving = {"upstream": float(used == "loss"), "others": float(used == "pooled")}
    right(backend, "lift_kd", draw(SMALL), options(loss="spectral", pool=True), **arriving)


def gradient_alone(inputs: Tensors, used: str, backend: str) -> Tensor:
    tokens = inputs["student_tokens"].detach().requires_grad_()
    inputs = inputs | {"student_tokens": tokens}
    value, pooled = lift_kd(**inputs, pool=True, loss="spectral", backend=backend)
    # The gradient of the second half of a concatenation is a view that starts anywhere.
    joined = torch.cat([pooled.new_zeros(3), pooled.flatten()])
    weights = torch.cos(torch.arange(len(joined), device=joined.device)).to(joined.dtype)
    used_alone = {"loss": value, "pooled": pooled.sum(), "odd": value + (joined * weights).sum()}
    return torch.autograd.grad(used_alone[used], tokens)[0]


@pytest.mark.parametrize("used", ["loss", "pooled", "odd"])
def test_outputs_may_be_unused_and_the_pooled_gradient_start_at_any_address(backend, used):
    inputs = draw(SMALL, ("norm_weight",))
    moved = {name: x.to(backend.device) for name, x in inputs.items()}
    found = backend.call(gradient_alone, moved, used, backend.name)
    exact = {name: x.double() for name, x in inputs.items()}
    assert relative_error(found.cpu(), gradient_alone(exact, used, "torch")) < 2e-2


@BOTH_FORMS
def test_scaled_float16_gradients_do_not_vanish(backend, pool):
    inputs = draw(SMALL, ("norm_weight",), torch.float16)
    inputs["student_tokens"] *= 20  # the norm makes gradients small
    _, unscaled = answer(
        backend, "lift_kd", inputs, options(pool=pool), upstream=2.0**-7, others=0.0
    )
    scaled = {"upstream": 2.0**13, "others": 0.0}
    right(backend, "lift_kd", inputs, options(pool=pool), **scaled)
    truth = by_reference("lift_kd", inputs, options(), torch.float64, **scaled)[1]
    found = unscaled["student_tokens"].double() * 2.0**20
    assert relative_error(found, truth["student_tokens"]) > 0.02  # without scaling they do


def lifted_with_gradients(inputs: Tensors, wanted: bool, **how):
    leaves = {name: x.detach().requires_grad_(wanted) for name, x in inputs.items()}
    result = lift(**leaves, **how)
    if wanted:
        count = torch.arange(result.numel(), device=result.device)
        result.backward(torch.cos(count).view_as(result).to(result.dtype))
    return result.detach(), {name: x.grad for name, x in leaves.items()}


@pytest.mark.parametrize("parts", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize(
    "layout", ["channels_first", pytest.param("cls_sliced_off", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("wanted", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("pool", [False, True], ids=["map", "pooled"])
def test_lift_equals_linear_and_layer_norm(backend, pool, wanted, layout, parts):
    if wanted and not pool and backend.name != "torch":
        pytest.skip("training on the map goes through torch's own layers, and says so")
    # Their half precision is not ours to test.
    dtype = torch.float32 if wanted and not pool else torch.bfloat16
    inputs = draw(SMALL, parts, dtype)
    inputs.pop("teacher_tokens")
    maps = inputs.pop("student_tokens").unflatten(1, SMALL[1:3])
    inputs = {"tokens": laid_out(maps, layout), **inputs}
    moved = {name: x.to(backend.device) for name, x in inputs.items()}
    found, gradients = backend.call(
        lifted_with_gradients, moved, wanted, pool=pool, backend=backend.name
    )
    exact = {name: x.double() for name, x in inputs.items()}
    truth, truths = lifted_with_gradients(exact, True, pool=pool, backend="torch")
    plain = layers(**exact)
    plain = plain.flatten(1, 2).mean(dim=1) if pool else plain
    if not pool:
        plain = plain.permute(0, 3, 1, 2) if layout == "channels_first" else plain.flatten(1, 2)
    assert found.dtype == dtype and found.shape == plain.shape
    assert relative_error(truth, plain) < 1e-12
    assert relative_error(found.cpu(), plain) < 1e-2
    for name, gradient in gradients.items() if wanted else ():
        assert relative_error(gradient.cpu(), truths[name]) < 2e-2, name


def in_small_bands(*inputs, **how):
    """Several bands and splits, as only training batches have them."""
    from fastkd.ops.lift_kd import triton

    before = triton.BAND_TOKENS
    triton.BAND_TOKENS = 128
    try:
        return measure(*inputs, **how)
    finally:
        triton.BAND_TOKENS = before


@pytest.mark.slow
@BOTH_FORMS
@pytest.mark.parametrize("loss", ["mse", "spectral"])
@pytest.mark.parametrize("backend", ["triton"], indirect=True)
def test_triton_adds_up_all_bands(backend, loss, pool):
    shape = (9, 6, 7, 33, 57)
    inputs, chosen = draw(shape, dtype=torch.float32), options(shape, loss, pool)
    moved = {name: x.to(backend.device) for name, x in inputs.items()}
    results, gradients, _ = backend.call(in_small_bands, "lift_kd", moved, chosen, backend="triton")
    truth = by_reference("lift_kd", inputs, chosen, torch.float64)
    for ours, exact in zip((*results, *gradients.values()), (*truth[0], *truth[1].values())):
        assert relative_error(ours.cpu(), exact) < 1e-5


@BOTH_FORMS
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("grid", [(2, 3), (5, 6), (1, 30), (3, 12)])
def test_the_torch_path_is_right_however_it_is_cut(monkeypatch, loss, grid, pool):
    monkeypatch.setattr(torch_path, "CHUNK_BYTES", 57 * 4 * 10)  # ten tokens
    shape = (3, *grid, 33, 57)
    inputs, chosen = draw(shape, dtype=torch.float32), options(shape, loss, pool)
    results, gradients = OPERATORS["lift_kd"].run(inputs, chosen, backend="torch")
    truth = by_reference("lift_kd", inputs, chosen, torch.float64)
    for ours, exact in zip((*results, *gradients.values()), (*truth[0], *truth[1].values())):
        assert relative_error(ours, exact) < 1e-5


def test_on_a_cpu_it_takes_a_quarter_of_eagers_memory_however_many_tokens():
    def peaks(batch: int) -> tuple[int, int]:
        inputs = draw((batch, 14, 14, 192, 384), NORM, torch.float32)
        wanted = [x.requires_grad_() for name, x in inputs.items() if name != "teacher_tokens"]
        reference = OPERATORS["lift_kd"].reference
        own, eager = (
            peak_extra_bytes(lambda f=f: torch.autograd.grad(f(**inputs), wanted), "cpu")
            for f in (lift_kd, reference)
        )
        return own - inputs["student_tokens"].nbytes, eager  # the gradient is a result

    small, _ = peaks(16)
    large, eager = peaks(64)
    assert large < 1.05 * small
    assert large + 64 * 196 * 192 * 4 <= eager / 4


FLAT = (torch.randn(2, 9, 8), torch.randn(12, 8), torch.randn(2, 9, 12))


@BOTH_FORMS
def test_flop_counters_see_what_they_see_of_the_layers(pool):
    inputs = draw((2, 3, 3, 8, 12), (), torch.float32)
    leaves = [inputs[name].requires_grad_() for name in ("student_tokens", "weight")]

    def count(step) -> int:
        with FlopCounterMode(display=False) as counter:
            torch.autograd.grad(step(), leaves)
        return counter.get_total_flops()

    def fused():
        result = lift_kd(**inputs, pool=pool)
        return result[0] + result[1].sum() if pool else result

    assert count(fused) == count(lambda: F.linear(*leaves).sum()) > 0


def test_a_float64_teacher_changes_no_dtype():
    tokens, weight, teacher = FLAT
    value, pooled = lift_kd(tokens, weight, teacher.double(), pool=True)
    assert value.dtype == pooled.dtype == torch.float32
    assert torch.equal(value, lift_kd(tokens, weight, teacher))


def test_a_gradient_of_the_lifted_map_has_no_backend_of_its_own():
    tokens, weight, _ = FLAT
    with pytest.raises(RuntimeError, match=r"lift: backend 'triton' cannot run: .*torch's own"):
        lift(tokens, weight.clone().requires_grad_(), backend="triton")


S, W, T = torch.zeros(8, 196, 192), torch.zeros(384, 192), torch.zeros(8, 196, 384)
V = torch.zeros(384)

BAD_INPUTS = {
    "cls_in_teacher": (
        (S, W, torch.zeros(8, 197, 384)),
        {},
        r"teacher_tokens must be \[8, 196, 384\].*got \[8, 197, 384\] \(a CLS token left in\?\)",
    ),
    "cls_in_student": (
        (torch.zeros(8, 197, 192), W, T),
        {},
        r"got \[8, 196, 384\] \(a CLS token left in student_tokens\?\)",
    ),
    "teacher_width": ((S, W, S), {}, r"teacher_tokens must be \[8, 196, 384\].*\[8, 196, 192\]"),
    "weight": ((S, W.mT, T), {}, r"weight must be \[Dt, 192\].*got \[192, 384\]"),
    "bias": ((S, W, T), {"bias": V[:3]}, r"bias must be \[384\].*got \[3\]"),
    "norm": ((S, W, T), {"norm_bias": V}, r"norm_bias needs norm_weight"),
    "no_square": ((S[:, 1:], W, T[:, 1:]), {"loss": "spectral"}, r"195 tokens"),
    "dims": ((S[0], W, T[0]), {}, r"\[B, N, D\] or \[B, D, H, W\], got \[196, 192\]"),
    "mixed": ((S, W, torch.zeros(8, 384, 14, 14)), {}, r"both"),
    "no_tokens": ((S[:, :0], W, T[:, :0]), {}, r"only the batch of student_tokens may be empty"),
    "device": ((S, W.to("meta"), T), {}, r"weight must be on cpu like the tokens, got meta"),
    "teacher_gradient": (
        (S, W, T.clone().requires_grad_()),
        {},
        r"teacher_tokens requires a gradient.*detach",
    ),
}


@pytest.mark.parametrize(("inputs", "options", "message"), BAD_INPUTS.values(), ids=BAD_INPUTS)
def test_bad_inputs_are_named(inputs, options, message):
    with pytest.raises(ValueError, match=f"lift_kd: .*{message}"):
        lift_kd(*inputs, **options)


def test_lift_names_its_own_arguments():
    with pytest.raises(ValueError, match=r"lift: weight must be \[Dt, 192\].*got \[192, 384\]"):
        lift(S, W.mT)


def self_checked(name: str, device: str, dtypes, loss: str, compute, normed: bool) -> str | None:
    tokens, weight, teacher = (torch.zeros(1, dtype=dtype, device=device) for dtype in dtypes)
    norm_weight = weight if normed else None
    lifter = weight, None, norm_weight, None, LIFT_EPS, compute
    inputs = Inputs(tokens, *lifter, teacher, loss, 1.0)
    return self_check.failure(BACKENDS, name, (inputs,))


@pytest.mark.slow
@pytest.mark.parametrize("normed", [True, False], ids=["norm", "linear"])
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize(
    "compute",
    [pytest.param(d, marks=[] if d is torch.bfloat16 else pytest.mark.nightly) for d in DTYPES],
    ids=str,
)
def test_every_backend_passes_its_self_check(backend, compute, loss, normed):
    if backend.name == "cuda" and compute == torch.float32:
        pytest.skip("half precision only")
    dtypes = (torch.float32, torch.float32, torch.bfloat16)
    options = dtypes, loss, compute, normed
    assert backend.call(self_checked, backend.name, backend.device, *options) is None


def test_an_unproven_backend_runs_only_where_it_is_asked_for(monkeypatch):
    from fastkd.ops import backend as backends

    monkeypatch.setattr(backends, "unavailable", lambda name, device: None)
    monkeypatch.setattr(backends, "EMULATED", set())
    monkeypatch.setenv("FASTKD_SELF_CHECK", "0")
    monkeypatch.delenv("FASTKD_UNPROVEN", raising=False)
    inputs = (torch.zeros(2, 6, 6, 32), torch.zeros(64, 32), torch.zeros(2, 6, 6, 64))
    tokens, weight, teacher = (x.bfloat16() for x in inputs)
    lifter = weight, None, None, None, LIFT_EPS, torch.bfloat16
    inputs = Inputs(tokens, *lifter, teacher, "mse", 1.0)
    assert not BACKENDS.implementations["cuda"].proven
    reason = BACKENDS.why_not("cuda", inputs)
    assert "no GPU has verified it yet" in reason
    monkeypatch.setenv("FASTKD_UNPROVEN", "1")
    reason = BACKENDS.why_not("cuda", inputs)
    assert reason is None or "verified" not in reason
