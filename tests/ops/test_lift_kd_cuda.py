"""lift_kd's CUDA C++ alone: what its kernels need, where their tiles end, what they refuse.

On the GPU where there is one, else on the host.
"""

from __future__ import annotations

import subprocess

import pytest
import torch

from fastkd.ops.feature_kd.reference import LOSSES
from fastkd.ops.lift_kd import cuda, reference
from fastkd.ops.lift_kd.reference import LIFT_EPS, Inputs
from tests.harness import host, nvcc
from tests.harness.cases import BFLOAT16_FIRST, laid_out, relative_error
from tests.ops.answers import answer, right
from tests.ops.test_lift_kd import ALL, NORM, draw, options

ON_CUDA = pytest.mark.parametrize("backend", ["cuda"], indirect=True)
PAPER = (192, 384)  # DeiT-Tiny to CaiT-S24
HALVES = [torch.bfloat16, torch.float16]

# [B, H, W]: where tiles of 16 tokens end
GRIDS = {
    "one_token": (1, 1, 1),
    "a_tile_of_images": (21, 1, 1),
    "swin": (2, 7, 7),  # spectral: two rows a tile
    "deit": (1, 14, 14),
    "whole_tiles": (3, 2, 16),
    "odd_rows": (2, 3, 9),  # spectral: a row a tile, one half row
    "more_workers_than_tiles": (1, 2, 5),
    "several_stages": (2, 100, 16),  # of every run of rows that a block adds up for the weight
}


def sized(backend, *grid: int) -> tuple[int, ...]:
    """[B, H, W, Ds, Dt], narrow on the host."""
    return (*grid, *(PAPER if backend.device == "cuda" else (32, 64)))


@ON_CUDA
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
def test_tiles_may_end_anywhere(backend, grid, loss):
    shape = sized(backend, *grid)
    right(backend, "lift_kd", draw(shape), options(shape, loss, pool=True))


@ON_CUDA
@pytest.mark.parametrize("compute", HALVES, ids=str)
@pytest.mark.parametrize("loss", LOSSES)
def test_the_papers_widths(backend, loss, compute):
    shape = (2, 2, 14, *PAPER)
    right(backend, "lift_kd", draw(shape, dtype=compute), options(shape, loss, pool=True))


@ON_CUDA
@pytest.mark.parametrize("compute", BFLOAT16_FIRST[:2], ids=str)
@pytest.mark.parametrize("parts", [(), ("bias",), NORM, ALL], ids=len)
@pytest.mark.parametrize("teacher", [False, True], ids=["no_teacher", "teacher"])
def test_what_may_be_left_out(backend, teacher, parts, compute):
    shape = sized(backend, 2, 3, 7)
    inputs = draw(shape, parts, compute)
    if teacher:
        right(backend, "lift_kd", inputs, options(shape, pool=True))
    else:
        del inputs["teacher_tokens"]
        right(backend, "lift", {"tokens": inputs.pop("student_tokens"), **inputs}, {})


@ON_CUDA
@pytest.mark.parametrize("teacher_dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("token_dtype", HALVES, ids=str)
@pytest.mark.parametrize("layout", ["cls_sliced_off", "channels_first", "unaligned"])
def test_maps_of_any_dtype_and_layout(backend, layout, token_dtype, teacher_dtype):
    shape = sized(backend, 2, 3, 7)
    inputs, chosen = draw(shape, dtype=token_dtype), options(shape, pool=True)
    for name, dtype in (("student_tokens", token_dtype), ("teacher_tokens", teacher_dtype)):
        inputs[name] = laid_out(inputs[name].unflatten(1, shape[1:3]).to(dtype), layout)
    if inputs["student_tokens"].ndim == 4:
        del chosen["grid"]
    right(backend, "lift_kd", inputs, chosen)


@ON_CUDA
def test_float32_maps_under_autocast(backend):
    shape = sized(backend, 2, 4, 6)
    inputs = draw(shape, dtype=torch.float32)
    for loss in LOSSES:
        one, two = (
            answer(backend, "lift_kd", inputs, options(shape, loss, pool),
                   autocast=True, upstream=1.0, others=0.0)
            for pool in (False, True)
        )  # fmt: skip
        assert torch.equal(one[0][0], two[0][0])
        for name, gradient in one[1].items():
            assert relative_error(gradient, two[1][name]) < 8e-3


@ON_CUDA
def test_unscaled_float16_slopes_do_not_vanish_within_one_pass(backend):
    shape, needs = sized(backend, 4, 8, 16), [True, True, False, False, False]
    inputs = draw(shape, (), torch.float16)
    tokens, teacher = (
        (inputs[name] * 1e-2).unflatten(1, shape[1:3]).to(backend.device)
        for name in ("student_tokens", "teacher_tokens")
    )
    weight = inputs["weight"].float().to(backend.device)

    def one_pass(module, dtype, *tensors):
        tokens, weight, teacher = tensors
        lifter = weight, None, None, None, LIFT_EPS, dtype
        return module.one_pass(Inputs(tokens, *lifter, teacher, "mse", 1.0), needs)[1:3]

    gradients = one_pass(cuda, torch.float16, tokens.float(), weight, teacher)
    exact = (x.double() for x in (tokens, weight, teacher))
    truths = one_pass(reference, torch.float64, *exact)
    for ours, truth in zip(gradients, truths):
        assert relative_error(ours, truth) < 4e-3


@ON_CUDA
def test_slopes_in_many_chunks_give_the_same_gradients(backend, monkeypatch):
    shape = sized(backend, 5, 4, 7)
    inputs, chosen = draw(shape), options(shape, pool=True)
    whole = answer(backend, "lift_kd", inputs, chosen)
    monkeypatch.setattr(cuda, "SLOPE_BYTES", 3 * cuda.TILE_ROWS * shape[4] * 2)
    _, gradients = right(backend, "lift_kd", inputs, chosen)
    for name, gradient in gradients.items():
        assert relative_error(gradient, whole[1][name]) < 8e-3


@pytest.mark.parametrize(
    ("grid", "widths", "compute", "loss", "reason"),
    [
        ((1, 2, 2), (40, 72), torch.bfloat16, "mse", "not 40 to 72"),
        ((1, 2, 2), PAPER, torch.float32, "mse", "not torch.float32"),
        ((1, 2, 17), PAPER, torch.bfloat16, "spectral", "up to 16 tokens, got 17"),
        ((1, 2, 17), PAPER, torch.bfloat16, "mse", None),
        ((1 << 20, 1 << 7, 1), PAPER, torch.bfloat16, "mse", "32 bits"),
    ],
)
def test_what_it_refuses_it_names(grid, widths, compute, loss, reason):
    narrow, wide = widths
    tokens = torch.empty(1, dtype=compute).expand(*grid, narrow)
    weight = torch.empty(1, dtype=compute).expand(wide, narrow)
    lifter = weight, None, None, None, LIFT_EPS, compute
    found = cuda.refuses(Inputs(tokens, *lifter, tokens, loss, 1.0))
    assert found is None if reason is None else reason in found


@pytest.mark.parametrize(
    ("constant", "name"),
    [
        (cuda.TILE_ROWS, "kLiftTileRows"),
        (cuda.WORKERS, "kLiftWorkers"),
        (cuda.WEIGHT_SPLITS, "kWeightSplits"),
    ],
)
def test_buffers_are_cut_as_in_the_header(constant, name):
    header = (host.CSRC / "lift_kd.h").read_text()
    assert f"constexpr int {name} = {constant};" in header


@pytest.mark.slow
@pytest.mark.skipif(nvcc.why_not() is not None, reason=str(nvcc.why_not()))
@pytest.mark.parametrize("arch", nvcc.ARCHS)
def test_kernels_fit_without_spilling(arch):
    kernels = nvcc.compile_source("lift_kd.cu", arch)
    # Two dtypes of products: forward and gradients, with 16-bit and float32 teachers; the weight's
    # gradient; preparation. And three final sums.
    assert len(kernels) == 2 * (4 + 1 + 1) + 3
    for kernel in kernels if nvcc.is_gated() else ():
        assert kernel.stack == 0 and kernel.spills == 0, kernel


@pytest.mark.slow
@pytest.mark.skipif(host.why_not() is not None, reason=str(host.why_not()))
def test_kernels_have_no_race_within_a_block():
    main = host.ROOT / "tests" / "ops" / "lift_kd_race.cpp"
    program = host.build_program(main, [host.CSRC / "lift_kd.cu"], sanitizer="thread")
    done = subprocess.run([program], capture_output=True, text=True)
    assert done.returncode == 0 and "WARNING: ThreadSanitizer" not in done.stderr, done.stderr
