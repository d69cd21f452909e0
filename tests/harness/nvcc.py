"""Compiles one CUDA C++ source with nvcc and reads what ptxas says its kernels need."""

from __future__ import annotations

import functools
import re
import shutil
import subprocess
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.harness.host import CSRC

_nightly = pytest.mark.nightly
ARCHS = (pytest.param("80", marks=_nightly), "90a", pytest.param("100", marks=_nightly))
GATED = ("13.0",)  # versions whose registers and spills the gates hold for


@dataclass(frozen=True)
class Kernel:
    """What one kernel needs: registers per thread, bytes of stack per thread, bytes of spills."""

    name: str
    registers: int
    stack: int
    spills: int


def why_not() -> str | None:
    """What is missing; None where nothing is."""
    return None if shutil.which("nvcc") else "nvcc is not installed"


@functools.cache
def version() -> str:
    """The installed nvcc, as "13.0"."""
    output = subprocess.check_output(["nvcc", "--version"], text=True)
    return re.search(r"release (\d+\.\d+)", output).group(1)


def is_gated() -> bool:
    """Whether registers and spills hold for the installed nvcc; warns where not."""
    if version() in GATED:
        return True
    warnings.warn(
        f"nvcc {version()}: registers and spills are known for {', '.join(GATED)} only; "
        "checked here: that kernels compile",
        stacklevel=2,
    )
    return False


def compile_source(source: str, arch: str) -> list[Kernel]:
    """Compile csrc/``source`` for one architecture ("90a") and list its kernels."""
    with tempfile.TemporaryDirectory() as folder:
        command = ["nvcc", "-std=c++20", "-O3", "-Xptxas=-v", f"-I{CSRC}"]
        command += [f"-gencode=arch=compute_{arch},code=sm_{arch}", "-cubin"]
        command += ["-o", str(Path(folder) / "kernel.cubin"), str(CSRC / source)]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"nvcc failed on {source} for sm_{arch}:\n{done.stderr[-4000:]}")
    pattern = (
        r"entry function '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, "
        r"(\d+) bytes spill loads.*?Used (\d+) registers"
    )
    return [
        Kernel(name, int(registers), int(stack), int(stores) + int(loads))
        for name, stack, stores, loads, registers in re.findall(pattern, done.stderr, re.DOTALL)
    ]
