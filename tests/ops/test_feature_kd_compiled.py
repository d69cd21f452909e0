"""feature_kd's kernels, compiled for GPUs that need not be there: their resources."""

from __future__ import annotations

import pytest
import torch

from fastkd.ops.feature_kd.reference import LOSSES, stats_shape
from tests.harness import aot, gates, host, nvcc

# [B, H, W, D] student and teacher; the shapes that matter: DeiT's tokens, Swin's last stage, the
# paper's pooled pair, and a map as CNNs produce it.
SHAPES = {
    "deit": ((64, 14, 14, 384), (64, 14, 14, 384)),
    "swin": ((64, 7, 7, 768), (64, 7, 7, 768)),
    "pooled": ((64, 14, 14, 192), (64, 14, 14, 384)),
    "overlapping": ((64, 14, 14, 219), (64, 14, 14, 384)),
}


def launches(shapes, loss, dtype, channels_first=False):
    triton = pytest.importorskip("fastkd.ops.feature_kd.triton")

    def on_meta(shape):
        if channels_first:
            batch, height, width, channels = shape
            x = torch.empty(batch, channels, height, width, dtype=dtype, device="meta")
            return x.permute(0, 2, 3, 1)
        return torch.empty(shape, dtype=dtype, device="meta")

    student, teacher = (on_meta(shape) for shape in shapes)
    scalar = torch.empty((), device="meta")
    stats = torch.empty(stats_shape(student, loss), device="meta")
    forward = triton.forward_launches(student, teacher, loss, 1.0, 1e-8, scalar, stats)
    gradient = torch.empty_like(student)
    backward = triton.backward_launch(scalar, student, teacher, stats, loss, 1.0, False, gradient)
    return [*forward, backward]


def case_name(shapes, loss, dtype, layout="tokens") -> str:
    return f"feature_kd {shapes} {loss} {str(dtype).removeprefix('torch.')}, {layout}"


@pytest.mark.parametrize("arch", aot.ARCHS)
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("shapes", SHAPES)
def test_triton_kernels_need_what_was_recorded(shapes, loss, arch):
    started = launches(SHAPES[shapes], loss, torch.bfloat16)
    gates.check(case_name(shapes, loss, torch.bfloat16), started, arch)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_triton_kernels_of_channels_first_maps_need_what_was_recorded(dtype):
    started = launches(SHAPES["deit"], "spectral", dtype, channels_first=True)
    gates.check(case_name("deit", "spectral", dtype, "channels first"), started, 90)


def test_triton_loads_16_bytes_at_once():
    started = launches(SHAPES["deit"], "mse", torch.bfloat16)
    forward, *_ = gates.check(case_name("deit", "mse", torch.bfloat16), started, 90)
    assert forward.load_bytes >= 16


@pytest.mark.slow
@pytest.mark.skipif(nvcc.why_not() is not None, reason=str(nvcc.why_not()))
@pytest.mark.parametrize("arch", nvcc.ARCHS)
def test_cuda_kernels_fit_without_spilling(arch):
    kernels = nvcc.compile_source("feature_kd.cu", arch)
    # 3 x 3 dtypes, packed or not, of the two forwards and the gradient; and the final sum.
    assert len(kernels) == 9 * 2 * 3 + 1
    for kernel in kernels if nvcc.is_gated() else ():
        assert kernel.stack == 0 and kernel.spills == 0, kernel
        assert kernel.registers <= 128, kernel  # at least 2 blocks of 256 threads per SM


@pytest.mark.slow
@pytest.mark.skipif(host.why_not() is not None, reason=str(host.why_not()))
def test_cuda_kernels_have_no_race_within_a_block():
    import subprocess

    main = host.ROOT / "tests" / "ops" / "feature_kd_race.cpp"
    program = host.build_program(main, [host.CSRC / "feature_kd.cu"], sanitizer="thread")
    done = subprocess.run([program], capture_output=True, text=True)
    assert done.returncode == 0 and "WARNING: ThreadSanitizer" not in done.stderr, done.stderr
