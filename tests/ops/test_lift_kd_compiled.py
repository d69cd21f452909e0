"""lift_kd's Triton kernels, compiled for GPUs that need not be there: their resources."""

from __future__ import annotations

import pytest
import torch

from fastkd.ops.feature_kd.reference import LOSSES
from fastkd.ops.lift_kd.reference import LIFT_EPS, Inputs
from tests.harness import gates
from tests.harness.aot import ARCHS

triton = pytest.importorskip("fastkd.ops.lift_kd.triton")

# Ds, Dt
WIDTHS = {
    "tiny": (192, 384),  # DeiT-Tiny to CaiT-S24, the paper's
    "small": (384, 768),  # tokens no longer stay for all outputs; gradient in two slabs
    "multiple_of_8": (200, 400),
    "uneven": (219, 1024),  # the last block is cut off, and rows are not 16-byte aligned
}


ALL = ("bias", "norm_weight", "norm_bias")


def on_meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def launches(widths, loss, dtype, arch, *, pool=True, parts=("norm_weight", "norm_bias")):
    """Everything that a forward and backward over a training batch start."""
    channels, width = widths
    tokens = on_meta(256, 14, 14, channels, dtype=dtype)
    teacher = on_meta(256, 14, 14, width, dtype=dtype)
    vectors = [on_meta(width) if name in parts else None for name in ALL]
    lifter = on_meta(width, channels), *vectors, LIFT_EPS, dtype
    inputs = Inputs(tokens, *lifter, teacher, loss, 1.0)
    cut = triton.Cut.of(inputs, arch)
    prepared, started = triton.prepare(inputs)
    stats, scalar = on_meta(*inputs.stats_shape), on_meta()
    pooled = on_meta(256, width if pool else 0)
    started += triton.forward_launches(prepared, scalar, pooled, stats, cut)
    needs = [True, True, *(vector is not None for vector in vectors)]
    upstream = None
    if pool:
        *upstream, projection = triton.pooled_gradient(pooled, prepared)
        started += projection
    work = triton.GradientWork(inputs, prepared, stats, needs, cut, scalar, upstream)
    return [*started, *work.launches(work.bands()[1]), *work.finish_launches()]


def case_name(widths, loss, dtype, parts=("norm_weight", "norm_bias"), pool=True) -> str:
    dtype = str(dtype).removeprefix("torch.")
    form = "pooled" if pool else "loss alone"
    return f"lift_kd {widths} {loss} {dtype}, {'+'.join(parts) or 'linear'}, {form}"


def check(widths, loss, dtype, arch, **options):
    name = case_name(widths, loss, dtype, **options)
    started = launches(WIDTHS[widths], loss, dtype, arch, **options)
    return started, gates.check(name, started, arch)


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("loss", LOSSES)
def test_every_kernel_needs_what_was_recorded(loss, arch):
    check("tiny", loss, torch.bfloat16, arch, parts=ALL)


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("widths", [x for x in WIDTHS if x != "tiny"])
def test_other_widths_need_what_was_recorded(widths, arch):
    check(widths, "spectral", torch.bfloat16, arch)


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_other_dtypes_need_what_was_recorded(dtype, arch):
    check("tiny", "spectral", dtype, arch, parts=ALL)


@pytest.mark.slow
@pytest.mark.parametrize("parts", [(), ("bias",), ("bias", "norm_weight")], ids=str)
def test_other_options_need_what_was_recorded(parts):
    check("tiny", "cosine", torch.bfloat16, 90, pool=False, parts=parts)


def test_products_run_on_the_tensor_cores_of_an_h100():
    started, compiled = check("tiny", "spectral", torch.bfloat16, 90, parts=ALL)
    products = {"forward", "token_gradient", "weight_gradient"}
    assert products <= {launch.kernel.__name__ for launch in started}
    for launch, kernel in zip(started, compiled, strict=True):
        if launch.kernel.__name__ in products and gates.is_recorded():
            assert "wgmma.mma_async" in kernel.ptx, launch.kernel.__name__


def test_tokens_and_teacher_come_in_16_bytes_at_once():
    started, compiled = check("tiny", "mse", torch.bfloat16, 90, parts=ALL)
    for launch, kernel in zip(started, compiled, strict=True):
        if launch.kernel.__name__ in ("forward", "token_gradient"):
            assert kernel.load_bytes >= 16
