"""second_moment's Triton kernels, compiled for GPUs that need not be there: their resources."""

from __future__ import annotations

import pytest
import torch

from fastkd.ops.second_moment import EXAMPLE_SHAPES
from fastkd.ops.second_moment.reference import WEIGHTS
from tests.harness import gates
from tests.harness.aot import ARCHS, compile_launch

triton = pytest.importorskip("fastkd.ops.second_moment.triton")

HALVES = [torch.bfloat16, torch.float16]

WIDTHS = [192, 384, 1040, 219, 1001, 4096]

# D and dtype of the tiles that 384 channels do not take, and of those that are cut off.
OTHERS = {
    "small tiles": (192, torch.bfloat16),
    "not 16-byte aligned": (219, torch.bfloat16),
    "not 16-byte aligned, float32": (219, torch.float32),
    "large tiles cut off": (1040, torch.bfloat16),
}


def launches(channels: int, weight: str, dtype: torch.dtype, *, cls_token: bool = False):
    """Everything that the second moment of a batch starts, each kernel once."""
    tokens = torch.empty(256, 196 + cls_token, channels, dtype=dtype, device="meta")
    moment = torch.empty(channels, channels, dtype=torch.float64, device="meta")
    started = triton.launches(tokens[:, int(cls_token) :], weight, moment)
    assert len(started) == 4 + (weight == "row_norm")  # two bands
    return started


def products(*arguments, **options):
    return next(x for x in launches(*arguments, **options) if x.kernel is triton.tile_moments)


def case_name(channels: int, weight: str, dtype: torch.dtype) -> str:
    return f"second_moment {channels} {weight} {str(dtype).removeprefix('torch.')}"


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_every_kernel_needs_what_was_recorded(dtype, weight, arch):
    gates.check(case_name(384, weight, dtype), launches(384, weight, dtype), arch)


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize(("channels", "dtype"), OTHERS.values(), ids=OTHERS)
def test_the_products_of_other_widths_need_what_was_recorded(channels, dtype, weight, arch):
    launch = products(channels, weight, dtype)
    gates.check(case_name(channels, weight, dtype), [launch], arch)


@pytest.mark.parametrize("weight", WEIGHTS)
def test_float16_needs_what_was_recorded(weight):
    gates.check(case_name(384, weight, torch.float16), launches(384, weight, torch.float16), 90)


@pytest.mark.parametrize("channels", [192, 384])
@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_products_run_on_the_tensor_cores_of_an_h100(dtype, weight, channels):
    launch = products(channels, weight, dtype)
    (compiled,) = gates.check(case_name(channels, weight, dtype), [launch], 90)
    if gates.is_recorded():
        assert "wgmma.mma_async" in compiled.ptx


def test_tokens_come_in_16_bytes_at_once_without_a_copy_of_a_sliced_off_class_token():
    weights, moments, _, *_ = launches(384, "row_norm", torch.bfloat16, cls_token=True)
    name = f"{case_name(384, 'row_norm', torch.bfloat16)}, class token sliced off"
    for compiled in gates.check(name, [weights, moments], 90):
        assert compiled.load_bytes >= 16


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 1, 24), (5, 1, 24), (1, 5, 1)], ids=str)
def test_sizes_of_one_which_triton_takes_for_constants_compile(shape):
    tokens = torch.empty(shape, device="meta")
    moment = torch.empty(shape[2], shape[2], dtype=torch.float64, device="meta")
    for launch in triton.launches(tokens, "row_norm", moment):
        assert compile_launch(launch, 90).ptx


def test_bands_share_one_compilation():
    _, first, _, second, _ = launches(384, "row_norm", torch.bfloat16)
    assert first.constants == second.constants
    assert first.arguments["first_row"] == 0 < second.arguments["first_row"]
    general = {x.name for x in triton.tile_moments.params if x.do_not_specialize}
    assert general == {"first_row"}


@pytest.mark.parametrize("channels", WIDTHS)
@pytest.mark.parametrize("tokens", [1, 255, 50_000, 200_000])
def test_every_token_is_in_one_split_and_no_sum_is_too_long_or_large(tokens, channels):
    images = torch.empty(1, tokens, channels, dtype=torch.bfloat16, device="meta")
    moment = torch.empty(channels, channels, dtype=torch.float64, device="meta")
    covered = 0
    for launch in triton.launches(images, "none", moment)[::2]:
        assert launch.arguments["first_row"] == covered
        splits, split_rows = launch.grid[2], launch.arguments["split_rows"]
        assert split_rows <= triton.SPLIT_ROWS and splits <= triton.MAX_SPLITS
        assert splits == 1 or splits * channels**2 * 4 <= triton.PARTIAL_BYTES
        assert covered + (splits - 1) * split_rows < tokens  # none is empty
        covered += splits * split_rows
    assert covered >= tokens


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
def test_the_self_check_has_a_sum_as_long_as_they_get(dtype):
    tokens = torch.empty(EXAMPLE_SHAPES[-1], dtype=dtype, device="meta")
    assert triton.Cut.of(tokens, "none").split_rows == triton.SPLIT_ROWS
