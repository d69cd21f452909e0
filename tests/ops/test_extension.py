"""The compiled library: it loads, registers, needs only torch's stable ABI, or says why not."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch

from fastkd.ops.backend import Extension, _covers, extension, library_path, load_library
from tests.conftest import skip_or_fail

ROOT = Path(__file__).parents[2]


@pytest.fixture
def library() -> Path:
    path = library_path()
    if path is None:
        skip_or_fail("library", "the CUDA library was not built")
    return path


def outside_environment() -> dict[str, str]:
    """This process's environment without what steers a build."""
    steering = ("FASTKD_BUILD", "CUDA_HOME", "CUDA_PATH")
    return {name: value for name, value in os.environ.items() if name not in steering}


def test_it_loads_without_a_gpu_and_registers_its_kernels(library):
    assert extension().error is None
    for operator in ("_feature_kd_forward", "_feature_kd_backward"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"fastkd::{operator}", "CUDA")


def test_it_knows_what_it_was_built_for(library):
    known = extension().built
    assert known["torch"] and known["archs"]
    assert re.fullmatch(r"\d+\.\d+", known["cuda"])


def test_it_uses_no_symbol_outside_the_stable_abi(library):
    symbols = subprocess.check_output(
        ["nm", "--dynamic", "--undefined-only", "--demangle", library], text=True
    )
    assert "aoti_torch_" in symbols  # the scan sees torch's symbols at all
    assert not re.findall(r".*\b(?:c10|at|torch|caffe2)::.*", symbols)


def test_it_needs_no_cuda_library_to_load(library):
    dynamic = subprocess.check_output(["readelf", "--dynamic", library], text=True)
    needed = re.findall(r"NEEDED.*\[(.+?)\]", dynamic)
    assert "libtorch_cpu.so" in needed
    assert not [name for name in needed if "cuda" in name]


def test_a_library_that_does_not_load_says_what_was_found(tmp_path):
    broken = tmp_path / "_C.so"
    broken.write_bytes(b"not a library")
    error = load_library(broken).error
    assert f"did not load into torch {torch.__version__}" in error


def test_a_gpu_it_was_not_built_for_is_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    library = Extension(None, None, {"archs": ["8.0", "9.0a"]})
    reason = library.why_not_on(torch.device("cuda", 0))
    assert reason == "the library was built for 8.0, 9.0a; found Tesla T4 (sm_75)"


@pytest.mark.parametrize(
    ("arch", "capability", "runs"),
    [
        ("8.0", (8, 0), True),
        ("8.0", (8, 9), True),  # code of a minor version runs on later ones
        ("8.6", (8, 0), False),
        ("8.0", (9, 0), False),
        ("9.0a", (9, 0), True),
        ("9.0a", (10, 0), False),  # architecture-specific code runs nowhere else
        ("10.0+PTX", (12, 0), True),  # PTX is compiled for whatever is newer
        ("10.0+PTX", (9, 0), False),
        ("Hopper", (9, 0), False),  # torch takes such names; better refused than a crash
    ],
)
def test_which_devices_an_architecture_covers(arch, capability, runs):
    assert _covers(arch, capability) == runs


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"FASTKD_BUILD": "none"}, "no CUDA library is built .*FASTKD_BUILD=none.*Triton"),
        ({"PATH": "/nowhere", "CUDA_HOME": "/nowhere"}, "nvcc was not found.*Triton and PyTorch"),
    ],
)
def test_without_nvcc_the_build_says_so_in_one_line_and_goes_on(environment, message):
    if torch.version.cuda is None and "CUDA_HOME" in environment:
        message = "built without CUDA"
    done = subprocess.run(
        [sys.executable, "setup.py", "--name"],
        cwd=ROOT,
        env={**outside_environment(), **environment},
        capture_output=True,
        text=True,
    )
    lines = [line for line in done.stderr.splitlines() if line.startswith("fastkd:")]
    assert done.returncode == 0
    assert len(lines) == 1 and re.search(message, lines[0])


def test_a_build_that_is_asked_for_but_impossible_stops():
    environment = {"FASTKD_BUILD": "cuda", "PATH": "/nowhere", "CUDA_HOME": "/nowhere"}
    done = subprocess.run(
        [sys.executable, "setup.py", "--name"],
        cwd=ROOT,
        env={**outside_environment(), **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0 and "FASTKD_BUILD=cuda, but" in done.stderr


def test_a_source_distribution_holds_what_a_build_needs(tmp_path):
    done = subprocess.run(
        [
            sys.executable,
            "setup.py",
            "--quiet",
            "egg_info",
            "--egg-base",
            tmp_path,
            "sdist",
            "--dist-dir",
            tmp_path,
        ],
        cwd=ROOT,
        env={**outside_environment(), "FASTKD_BUILD": "none"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    with tarfile.open(next(tmp_path.glob("*.tar.gz"))) as archive:
        held = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    needed = [path for folder in ("csrc", "tests") for path in (ROOT / folder).rglob("*.*")]
    needed = [path for path in needed if path.suffix in (".cu", ".cuh", ".h", ".cpp", ".py")]
    assert {str(path.relative_to(ROOT)) for path in needed} <= held
