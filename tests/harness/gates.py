"""Gates on compiled kernels: their resources against those recorded for each minor Triton.

What ptxas and Triton make of a kernel differs between versions, so a number is compared with the
one recorded for the same minor version; in another patch of it, a difference is a warning. Where
none is recorded, a gate checks that the kernel compiles, its tile and the width of its loads, and
warns that this was all.

`pytest --record-compiled tests/ops -k compiled -m ""` records for the installed version.
"""

from __future__ import annotations

import functools
import json
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastkd.ops.operator import KernelLaunch
from tests.harness.aot import SHARED_BYTES, Compiled, compile_launch

RECORDS = Path(__file__).parent / "compiled_kernels.json"
RECORDED_WITH = {"3.6": "3.6.0", "3.7": "3.7.1", "3.8": "3.8.0", "3.9": "3.9.0"}
REGISTERS = 65536  # of a multiprocessor
REGISTER_UNIT = 8  # registers of a thread are allocated in steps of this
TILE = re.compile(r"BLOCK|RESIDENT|SLAB")  # constants that say how the work is cut

recording = False  # set by --record-compiled


class UnrecordedTritonWarning(UserWarning):
    """Resources of kernels were not compared, or differ in a version that is not the recorded."""


@functools.cache
def version() -> str:
    """The installed Triton, as "3.8.0"."""
    import triton

    return triton.__version__


def minor_version() -> str:
    """The installed Triton, as "3.8"."""
    return ".".join(version().split(".")[:2])


@functools.cache
def _records() -> dict[str, dict[str, Any]]:
    return json.loads(RECORDS.read_text()) if RECORDS.exists() else {}


def is_recorded() -> bool:
    """Whether resources are recorded for the installed Triton; warns where not."""
    if minor_version() in RECORDED_WITH or recording:
        return True
    known = list(RECORDED_WITH)
    warnings.warn(
        f"Triton {minor_version()}: resources of kernels are recorded for {', '.join(known)} only;"
        " checked here: that kernels compile, their tiles, the width of their loads",
        UnrecordedTritonWarning,
        stacklevel=2,
    )
    return False


def check(case: str, launches: Sequence[KernelLaunch], arch: int) -> list[Compiled]:
    """Compile launches and compare each with its record.

    Args:
        case: names operator, shape, dtype and options; part of the record's key.
        launches: of one call; a kernel that occurs twice with the same code is taken once.
        arch: compute capability times ten.

    Returns:
        The compiled kernels, in the order of the launches.

    Raises:
        AssertionError: a kernel needs more than was recorded, does not fit a multiprocessor, has
            another tile or narrower loads, or has no record.
    """
    compiled, seen = [], {}
    for launch in launches:
        kernel = compile_launch(launch, arch)
        compiled.append(kernel)
        name = launch.kernel.__name__
        same = seen.setdefault(name, [])
        if kernel.cubin in same:
            continue
        same.append(kernel.cubin)
        number = f" {len(same)}" if len(same) > 1 else ""
        key = f"{case}, sm_{arch}: {name}{number}"
        if recording:
            _record(key, launch, kernel)
        _compare(key, launch, kernel, arch)
    return compiled


def _compare(key: str, launch: KernelLaunch, kernel: Compiled, arch: int) -> None:
    record = _records().get(key)
    if record is None and not is_recorded():
        return  # another Triton may make two kernels of what was one
    assert record is not None, f"{key}: not recorded; see --record-compiled"
    assert tile_of(launch) == record["tile"], key
    by_version = record["triton"]
    if not is_recorded():
        narrowest = min(width for *_, width in by_version.values())
        assert kernel.load_bytes >= narrowest, f"{key}: loads {kernel.load_bytes} bytes at once"
        return
    assert minor_version() in by_version, f"{key}: not recorded for Triton {minor_version()}"
    problem = _difference(key, launch, kernel, arch, *by_version[minor_version()])
    if problem is not None and version() != RECORDED_WITH[minor_version()]:
        warnings.warn(f"Triton {version()}: {problem}", UnrecordedTritonWarning, stacklevel=3)
        return
    assert problem is None, problem


def _difference(
    key: str,
    launch: KernelLaunch,
    kernel: Compiled,
    arch: int,
    registers: int,
    stack: int,
    shared: int,
    width: int,
) -> str | None:
    """What a kernel needs more than recorded, or more than there is."""
    allocated = -(-registers // REGISTER_UNIT) * REGISTER_UNIT
    found = f"{key}: {kernel.registers} registers, {kernel.stack} B stack, {kernel.shared} B shared"
    if kernel.registers > allocated:
        return f"{found}; recorded: {registers} registers"
    if kernel.stack > stack:
        return f"{found}; recorded: {stack} B stack"
    if kernel.shared > shared:
        return f"{found}; recorded: {shared} B shared"
    if kernel.load_bytes < width:
        return f"{key}: loads {kernel.load_bytes} bytes at once; recorded: {width}"
    threads = 32 * launch.num_warps
    if kernel.registers * threads > REGISTERS or kernel.shared > SHARED_BYTES[arch]:
        return f"{found}: more than a multiprocessor has"
    return None


def tile_of(launch: KernelLaunch) -> str:
    """How a launch is cut: block sizes, warps and stages."""
    blocks = [f"{name}={value}" for name, value in launch.constants.items() if TILE.search(name)]
    return " ".join([*blocks, f"warps={launch.num_warps}", f"stages={launch.num_stages}"])


def _record(key: str, launch: KernelLaunch, kernel: Compiled) -> None:
    assert RECORDED_WITH.get(minor_version()) == version(), f"name {version()} in RECORDED_WITH"
    records = _records()
    record = records.setdefault(key, {"triton": {}})
    record["tile"] = tile_of(launch)
    numbers = [kernel.registers, kernel.stack, kernel.shared, kernel.load_bytes]
    record["triton"][minor_version()] = numbers


def save() -> None:
    """Write the records, a kernel a line."""
    lines = []
    for key, record in sorted(_records().items()):
        versions = sorted(record["triton"].items(), key=lambda item: _as_numbers(item[0]))
        ordered = {"tile": record["tile"], "triton": dict(versions)}
        lines.append(f" {json.dumps(key)}: {json.dumps(ordered)}")
    RECORDS.write_text("{\n" + ",\n".join(lines) + "\n}\n")


def _as_numbers(version: str) -> tuple[int, ...]:
    return tuple(map(int, version.split(".")))
