"""lift_kd's CUDA C++ alone: what its kernels need, where their tiles end, what they refuse.

That it computes what the others do is in test_lift_kd.py. Here it is called directly, without
autograd, on the GPU where there is one, else on the host.
"""

from __future__ import annotations

import subprocess
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from fastkd.ops.feature_kd.reference import LOSSES
from fastkd.ops.lift_kd import cuda, reference
from fastkd.ops.lift_kd.reference import LIFT_EPS, Inputs
from tests.harness import host, nvcc
from tests.harness.cases import laid_out, nearest_dtype_error, relative_error

PAPER = (192, 384)  # DeiT-Tiny to CaiT-S24
SMALL = (32, 64)  # on the host only
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


@pytest.fixture(autouse=True)
def _cuda_only(backend):
    if backend.name != "cuda":
        pytest.skip("about the CUDA C++ backend")


@dataclass
class Problem:
    """Inputs as implementations get them, and the gradients that arrive."""

    inputs: Inputs
    upstream: Tensor
    pooled_upstream: Tensor | None

    @property
    def parameters(self) -> list[Tensor | None]:
        return [self.inputs.weight, *self.inputs.vectors]

    @property
    def needs(self) -> list[bool]:
        return [True, *(x is not None for x in self.parameters)]

    def gradients(self, **changes):
        upstreams = self.upstream, self.pooled_upstream
        needs = changes.get("needs", self.needs)
        return cuda.backward(*upstreams, self.inputs, torch.empty(0), needs)

    def by_autograd(self, dtype: torch.dtype):
        """Value, pooled tokens and gradients by the definition, all in ``dtype``."""
        inputs = in_dtype(self.inputs, dtype)
        leaves = [inputs.tokens, inputs.weight, *inputs.vectors]
        leaves = [x.requires_grad_() for x in leaves if x is not None]
        value, pooled = reference.definition(inputs)
        total = value * self.upstream.to(dtype) if inputs.teacher is not None else 0
        total = total + (pooled * self.pooled_upstream.to(dtype)).sum()
        return value.detach(), pooled.detach(), torch.autograd.grad(total, leaves)


def in_dtype(inputs: Inputs, dtype: torch.dtype) -> Inputs:
    """Copies of all tensors in a dtype, also that of the products."""
    tensors = {
        name: x.detach().to(dtype, copy=True)
        for name, x in vars(inputs).items()
        if isinstance(x, Tensor)
    }
    return replace(inputs, compute=dtype, **tensors)


def draw(
    grid,
    widths=SMALL,
    loss="mse",
    compute=torch.bfloat16,
    norm=True,
    bias=True,
    teacher=True,
    layout=None,
    token_dtype=None,
    teacher_dtype=None,
    device="cpu",
) -> Problem:
    narrow, wide = PAPER if device == "cuda" else widths
    generator = torch.Generator().manual_seed(1)

    def noise(*shape, dtype=None):
        return torch.randn(shape, generator=generator).to(device, dtype or compute)

    def view(x):
        if layout is None:
            return x
        x = laid_out(x, layout)
        return x.permute(0, 2, 3, 1) if x.ndim == 4 else x.unflatten(1, grid[1:])

    weight = noise(wide, narrow) * narrow**-0.5
    norms = (1 + 0.3 * noise(wide), noise(wide)) if norm else (None, None)
    lifter = weight, noise(wide) if bias else None, *norms, LIFT_EPS, compute
    tokens = view(noise(*grid, narrow, dtype=token_dtype))
    maps = view(noise(*grid, wide, dtype=teacher_dtype)) if teacher else None
    upstream = torch.full((), float(tokens.shape[:3].numel()), device=device)
    inputs = Inputs(tokens, *lifter, maps, loss, 1.0)
    return Problem(inputs, upstream, noise(grid[0], wide, dtype=torch.float32))


def check(problem: Problem) -> None:
    """Both passes within twice the error of eager PyTorch in the dtype of the products."""
    compute, loss = problem.inputs.compute, problem.inputs.loss
    value, pooled, _ = cuda.forward(problem.inputs, True)
    found = [value, pooled, *(g for g in problem.gradients() if g.numel())]
    true_value, true_pooled, truths = problem.by_autograd(torch.float64)
    # torch has no half-precision FFT on the CPU: the other losses' slope is no less exact.
    inputs = replace(problem.inputs, loss="mse" if loss == "spectral" else loss)
    eager = replace(problem, inputs=inputs)
    _, exact_pooled, exact = eager.by_autograd(torch.float64)
    _, plain_pooled, plain = eager.by_autograd(compute)
    errors = [relative_error(a, b) for a, b in zip((plain_pooled, *plain), (exact_pooled, *exact))]
    for ours, truth, error in zip(
        found, (true_value, true_pooled, *truths), [torch.finfo(compute).eps / 2, *errors]
    ):
        assert relative_error(ours, truth) <= nearest_dtype_error(compute, error)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
def test_tiles_may_end_anywhere(backend, grid, loss):
    check(draw(grid, loss=loss, device=backend.device))


@pytest.mark.parametrize("compute", HALVES, ids=str)
@pytest.mark.parametrize("loss", LOSSES)
def test_the_papers_widths(backend, loss, compute):
    check(draw((2, 2, 14), PAPER, loss, compute, device=backend.device))


@pytest.mark.parametrize("compute", HALVES, ids=str)
@pytest.mark.parametrize("bias", [False, True], ids=["no_bias", "bias"])
@pytest.mark.parametrize("norm", [False, True], ids=["no_norm", "norm"])
@pytest.mark.parametrize("teacher", [False, True], ids=["no_teacher", "teacher"])
def test_what_may_be_left_out(backend, teacher, norm, bias, compute):
    check(
        draw(
            (2, 3, 7),
            norm=norm,
            bias=bias,
            teacher=teacher,
            compute=compute,
            device=backend.device,
        )
    )


@pytest.mark.parametrize("teacher_dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("token_dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("layout", ["cls_sliced_off", "channels_first", "unaligned"])
def test_maps_of_any_dtype_and_layout(backend, layout, token_dtype, teacher_dtype):
    problem = draw(
        (2, 3, 7),
        PAPER,
        layout=layout,
        token_dtype=token_dtype,
        teacher_dtype=teacher_dtype,
        device=backend.device,
    )
    gradient = problem.gradients()[0]
    assert gradient.dtype == token_dtype
    assert gradient.stride() == torch.empty_like(problem.inputs.tokens).stride()
    check(problem)


@pytest.mark.parametrize("loss", LOSSES)
def test_one_pass_gives_what_two_passes_give(backend, loss):
    problem = draw((2, 4, 6), loss=loss, token_dtype=torch.float32, device=backend.device)
    problem.upstream, problem.pooled_upstream = torch.ones_like(problem.upstream), None
    value, *gradients = cuda.one_pass(problem.inputs, problem.needs)
    assert torch.equal(value, cuda.forward(problem.inputs, False)[0])
    for ours, other in zip(gradients, problem.gradients(), strict=True):
        assert relative_error(ours, other) < 8e-3


def test_unscaled_float16_slopes_do_not_vanish_within_one_pass(backend):
    problem = draw((4, 8, 16), compute=torch.float16, norm=False, device=backend.device)
    inputs = replace(
        problem.inputs,
        tokens=problem.inputs.tokens.float() * 1e-2,
        weight=problem.inputs.weight.float(),
        bias=None,
        teacher=problem.inputs.teacher * 1e-2,
    )
    needs = [True, True, False, False, False]
    _, *gradients = cuda.one_pass(inputs, needs)
    _, *truths = reference.one_pass(in_dtype(inputs, torch.float64), needs)
    for ours, truth in zip(gradients[:2], truths[:2]):
        assert relative_error(ours, truth) < 4e-3


@pytest.mark.parametrize("only", range(5), ids=["tokens", "weight", "bias", "norm", "norm_bias"])
def test_each_gradient_alone_is_bitwise_the_same(backend, only):
    problem = draw((3, 3, 7), device=backend.device)
    everything = problem.gradients()
    needs = [place == only for place in range(5)]
    for place, gradient in enumerate(problem.gradients(needs=needs)):
        if place == only:
            assert torch.equal(gradient, everything[place])
        else:
            assert gradient.numel() == 0


@pytest.mark.parametrize("loss", LOSSES)
def test_a_second_run_is_bitwise_equal(backend, loss):
    problem = draw((3, 5, 7), loss=loss, device=backend.device)
    runs = []
    for _ in range(2):
        value, pooled, _ = cuda.forward(problem.inputs, True)
        runs.append((value, pooled, *problem.gradients()))
    assert all(torch.equal(first, second) for first, second in zip(*runs))


def test_slopes_in_many_chunks_give_the_same_gradients(backend, monkeypatch):
    problem = draw((5, 4, 7), device=backend.device)
    whole = problem.gradients()
    tile = cuda.TILE_ROWS * problem.inputs.width * 2
    monkeypatch.setattr(cuda, "SLOPE_BYTES", 3 * tile)
    for ours, other in zip(problem.gradients(), whole, strict=True):
        assert relative_error(ours, other) < 8e-3
    check(problem)


def test_inputs_are_not_written_to(backend):
    problem = draw((2, 3, 7), device=backend.device)
    tensors = [x for x in vars(problem.inputs).values() if isinstance(x, Tensor)]
    before = [x.clone() for x in tensors]
    cuda.forward(problem.inputs, True)
    problem.gradients()
    assert all(torch.equal(now, then) for now, then in zip(tensors, before))


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
