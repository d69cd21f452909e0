"""spectrum's kernels, compiled for GPUs that need not be there: they fit and do not spill."""

from __future__ import annotations

import re
import subprocess

import pytest

from tests.harness import host, nvcc

REGISTERS = 65536  # of a multiprocessor
SHAPE = re.compile(r"ShapeILi(\d+)ELi(\d+)ELi(\d+)E")  # rows of threads, tiles, blocks per SM


@pytest.mark.slow
@pytest.mark.skipif(nvcc.why_not() is not None, reason=str(nvcc.why_not()))
@pytest.mark.parametrize("arch", nvcc.ARCHS)
def test_kernels_fit_without_spilling(arch):
    kernels = nvcc.compile_source("spectrum.cu", arch)
    assert len(kernels) == 4  # one per range of sizes
    for kernel in kernels if nvcc.is_gated() else ():
        assert kernel.stack == 0 and kernel.spills == 0, kernel
        rows, _, blocks = map(
            int, re.search(r"ShapeILi(\d+)ELi(\d+)ELi(\d+)E", kernel.name).groups()
        )
        assert kernel.registers * 16 * rows * blocks <= REGISTERS, kernel


@pytest.mark.slow
@pytest.mark.skipif(host.why_not() is not None, reason=str(host.why_not()))
def test_kernels_have_no_race_within_a_block():
    main = host.ROOT / "tests" / "ops" / "spectrum_race.cpp"
    program = host.build_program(main, [host.CSRC / "spectrum.cu"], sanitizer="thread")
    done = subprocess.run([program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "WARNING: ThreadSanitizer" not in done.stderr, done.stderr
