"""The tests' own tools: gates on compiled kernels, shards and backends, failures as they go."""

from __future__ import annotations

import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest

from fastkd.ops.operator import KernelLaunch
from tests.harness import gates
from tests.harness.aot import Compiled

ROOT = Path(__file__).parents[1]
LAUNCH = KernelLaunch(SimpleNamespace(__name__="forward"), (1,), {}, {"BLOCK_M": 64}, num_warps=8)
NEEDED = SimpleNamespace(registers=100, stack=8, shared=1024, load_bytes=16, cubin=b"a")
TILE = "BLOCK_M=64 warps=8 stages=2"


@pytest.fixture
def compiled(monkeypatch):
    """Sets what a compilation gives, and the versions that are recorded."""

    def set_result(result: SimpleNamespace, tile: str = TILE, **versions: list[int]) -> None:
        records = {"case, sm_90: forward": {"tile": tile, "triton": versions}}
        monkeypatch.setattr(gates, "compile_launch", lambda launch, arch: result)
        monkeypatch.setattr(gates, "_records", lambda: records)
        monkeypatch.setattr(gates, "recording", False)
        monkeypatch.setattr(gates, "version", lambda: "3.8.0")
        monkeypatch.setattr(gates, "RECORDED_WITH", {minor: f"{minor}.0" for minor in versions})

    return set_result


def test_what_was_recorded_passes(compiled):
    compiled(NEEDED, **{"3.8": [100, 8, 1024, 16]})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert gates.check("case", [LAUNCH, LAUNCH], 90) == [NEEDED, NEEDED]


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ([96, 8, 1024, 16], "100 registers.*recorded: 96"),
        ([100, 0, 1024, 16], "8 B stack.*recorded: 0"),
        ([100, 8, 512, 16], "1024 B shared.*recorded: 512"),
        ([100, 8, 1024, 32], "loads 16 bytes"),
    ],
)
def test_more_than_was_recorded_fails(compiled, limits, message):
    compiled(NEEDED, **{"3.8": limits, "3.6": [255, 64, 9999, 1]})
    with pytest.raises(AssertionError, match=message):
        gates.check("case", [LAUNCH], 90)


def test_registers_are_compared_as_they_are_allocated(compiled):
    compiled(NEEDED, **{"3.8": [97, 8, 1024, 16]})  # 104 either way
    gates.check("case", [LAUNCH], 90)


def test_another_patch_of_a_recorded_version_warns(compiled, monkeypatch):
    compiled(NEEDED, **{"3.8": [96, 8, 1024, 16]})
    monkeypatch.setattr(gates, "version", lambda: "3.8.1")
    with pytest.warns(gates.UnrecordedTritonWarning, match=r"3\.8\.1: .*recorded: 96"):
        gates.check("case", [LAUNCH], 90)


def test_an_unknown_version_is_checked_for_tile_and_loads_and_says_so(compiled):
    compiled(NEEDED, **{"3.6": [10, 0, 0, 16]})
    with pytest.warns(gates.UnrecordedTritonWarning, match=r"Triton 3\.8.*recorded for 3\.6 only"):
        gates.check("case", [LAUNCH], 90)


@pytest.mark.parametrize(
    ("tile", "width", "message"),
    [("BLOCK_M=32 warps=8 stages=2", 16, "forward"), (TILE, 32, "loads 16 bytes")],
)
def test_an_unknown_version_fails_with_another_tile_or_narrower_loads(
    compiled, tile, width, message
):
    compiled(NEEDED, tile, **{"3.6": [10, 0, 0, width]})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(AssertionError, match=message):
            gates.check("case", [LAUNCH], 90)


def test_a_kernel_without_a_record_fails(compiled):
    compiled(NEEDED, **{"3.8": [100, 8, 1024, 16]})
    with pytest.raises(AssertionError, match="not recorded"):
        gates.check("another case", [LAUNCH], 90)


def test_a_kernel_that_only_an_unknown_version_makes_passes_with_the_warning(compiled):
    compiled(NEEDED, **{"3.6": [10, 0, 0, 16]})
    with pytest.warns(gates.UnrecordedTritonWarning):
        gates.check("another case", [LAUNCH], 90)


def test_nothing_is_recorded_for_a_version_that_is_not_named(compiled, monkeypatch):
    compiled(NEEDED, **{"3.6": [10, 0, 0, 16]})
    monkeypatch.setattr(gates, "recording", True)
    with pytest.raises(AssertionError, match=r"name 3\.8\.0 in RECORDED_WITH"):
        gates.check("case", [LAUNCH], 90)


@pytest.mark.parametrize(
    ("ptx", "width"),
    [
        ("ld.global.v4.b32 {%r1}, [%rd1];", 16),
        ("ld.global.L1::evict_last.v2.b64 {%r1}, [%rd1];", 16),
        ("ld.global.b16 %r1, [%rd1]; ld.global.b64 %r1, [%rd1];", 8),
        ("cp.async.cg.shared.global [ %r1 + 0 ], [ %rd1 + 0 ], 0x10, %r2;", 16),
        ("cp.async.ca.shared.global [ %r1 + 0 ], [ %rd1 + 0 ], 4, %r2;", 4),
        ("ld.shared.v4.b32 {%r1}, [%r2];", 0),
        ("cp.async.bulk.tensor.2d.shared::cluster.global [%r1], [%rd1];", 128),
    ],
)
def test_the_widest_load_is_read_from_the_assembly(ptx, width):
    assert Compiled(0, ptx, b"").load_bytes == width


def run_pytest(file: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *arguments, str(file)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_failures_are_printed_as_they_go_and_a_lost_gpu_ends_the_run(tmp_path):
    file = tmp_path / "test_made.py"
    file.write_text(
        "def test_wrong():\n    assert 1 == 2, 'one is not two'\n"
        "def test_lost():\n    raise RuntimeError('CUDA error: an illegal memory access was')\n"
        "def test_never():\n    pass\n"
    )
    done = run_pytest(file, "-v", "-p", "tests.harness.as_it_goes")
    first = done.stdout.index("one is not two")
    assert first < done.stdout.index("test_lost")
    assert "the GPU is lost in" in done.stdout and "test_never PASSED" not in done.stdout


@pytest.mark.slow
def test_shards_have_every_test_of_the_wanted_backends_once():
    file = ROOT / "tests" / "ops" / "test_spectrum.py"
    found = []
    for shard in range(3):
        done = run_pytest(
            file, "-q", "--collect-only", "--backends", "cuda", "--shard", f"{shard}/3"
        )
        found.append({line for line in done.stdout.splitlines() if "::" in line})
    whole = run_pytest(file, "-q", "--collect-only", "--backends", "cuda")
    assert all(found)
    assert set.union(*found) == {line for line in whole.stdout.splitlines() if "::" in line}
    assert sum(map(len, found)) == len(set.union(*found))
    assert all("[cuda" in name or "-cuda" in name for name in set.union(*found))
