"""Timing shared by all benchmarks: fair rounds, bytes against the machine's own copy speed, JSON.

A benchmark makes `Case`s, each with several `Provider`s of the same result. On a GPU every provider
is timed twice: as a CUDA graph with a cold L2 cache, and called eagerly, with the host's part. On a
CPU providers take turns, so that a drifting machine drifts for all of them. Every file written
names machine, versions and commit.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from fastkd.ops.environment import gpus, version

ROOT = Path(__file__).parents[1]
L2_FLUSH_BYTES = 256 << 20  # more than the L2 cache of any GPU so far
QUICK_ROUNDS = 9


@dataclass
class Provider:
    """One way to compute a case; ``run`` does forward and backward once.

    Attributes:
        name: column in the table.
        run: the work to time, without arguments.
        baseline: whether ours are compared against it.
        capturable: whether a CUDA graph can hold it; what synchronizes cannot be, and is timed from
            an idle GPU to an idle GPU instead, the host's part included.
    """

    name: str
    run: Callable[[], object]
    baseline: bool = False
    capturable: bool = True


@dataclass
class Case:
    """One row group of the table.

    Attributes:
        name: what is computed, on which shape.
        bytes: least traffic of the scheme in use; its formula stands where the case is made.
        providers: the competitors.
        flops: of the scheme's matrix products, where they may be what limits it.
        dtype: of the products' operands.
    """

    name: str
    bytes: int
    providers: list[Provider] = field(default_factory=list)
    flops: int = 0
    dtype: torch.dtype = torch.float32


@dataclass
class Row:
    """A result: milliseconds, traffic, share of the roofline, peak extra memory, speed-up.

    The roofline is the longer of the times that a plain copy would take for the bytes and a large
    matrix product for the flops. Rates are of the median; the quartiles say how quiet the machine
    was.
    """

    case: str
    provider: str
    milliseconds: float
    lower_quartile: float
    upper_quartile: float
    gigabytes_per_second: float
    roofline_percent: float
    peak_megabytes: float
    speedup: float | None
    eager_milliseconds: float | None = None  # on a GPU: wall time of a call, host included


def arguments(description: str, quick: bool = False) -> argparse.ArgumentParser:
    """The options that every benchmark has; ``quick`` for those that bench/gpu.sh runs."""
    parser = argparse.ArgumentParser(description=description)
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=default, help=f"default here: {default}")
    parser.add_argument(
        "--smoke", action="store_true", help="tiny shapes, two rounds: does it run?"
    )
    if quick:
        parser.add_argument(
            "--quick", action="store_true", help="the few cases that bench/gpu.sh has time for"
        )
    parser.add_argument("--rounds", type=int, default=21, help="timed runs of each provider")
    parser.add_argument("--output", type=Path, help="write the rows as JSON here")
    return parser


def run(title: str, cases: Sequence[Case], options: argparse.Namespace) -> list[Row]:
    """Time all cases, print the table, and write JSON where asked to."""
    rounds = 2 if options.smoke else options.rounds
    if getattr(options, "quick", False):
        rounds = min(rounds, QUICK_ROUNDS)
    bandwidth = copy_bandwidth(options.device, options.smoke)
    print(f"{title} on {machine(options.device)}; copy bandwidth {bandwidth / 1e9:.0f} GB/s")
    eager = f"{'eager ms':>10}" if options.device == "cuda" else ""
    print(f"{'':44}{'ms':>10}{'GB/s':>8}{'roofline':>10}{'peak MB':>9}{'speed-up':>10}{eager}")
    rows = []
    products: dict[torch.dtype, float] = {}
    for case in cases:
        print(case.name)
        torch._dynamo.reset()  # or its limit on recompilations makes late cases eager
        limit = case.bytes / bandwidth
        if case.flops:
            rate = product_rate(case.dtype, options.device, options.smoke)
            products[case.dtype] = rate
            limit = max(limit, case.flops / rate)
        for row in _run_case(case, options.device, rounds, limit):
            rows.append(row)
            ratio = "" if row.speedup is None else f"{row.speedup:.2f}x"
            if row.eager_milliseconds is not None:
                ratio = f"{ratio:>10}{row.eager_milliseconds:>10.3f}"
            print(
                f"  {row.provider:<42}{row.milliseconds:>10.3f}{row.gigabytes_per_second:>8.0f}"
                f"{row.roofline_percent:>9.0f}%{row.peak_megabytes:>9.1f}{ratio:>10}",
                flush=True,
            )
        if options.output is not None:  # after every case: a run that is cut short leaves rows
            save(options.output, title, options.device, bandwidth, products, rows)
    print("speed-up: against the fastest baseline of the same case")
    unsteady = [row for row in rows if row.upper_quartile > 1.3 * row.lower_quartile]
    if unsteady and not options.smoke:
        print(f"UNSTEADY: {len(unsteady)} of {len(rows)} rows have quartiles 30 % apart or more")
    if options.output is not None:
        print(f"wrote {options.output}")
    return rows


def _run_case(case: Case, device: str, rounds: int, limit: float) -> list[Row]:
    runs = {provider.name: provider.run for provider in case.providers}
    peaks = {name: peak_extra_bytes(work, device) for name, work in runs.items()}
    if device == "cuda":
        times = time_cuda(runs, rounds, [p.name for p in case.providers if not p.capturable])
        # What cannot be captured has its host's part in `times` already.
        eager = time_eager({p.name: p.run for p in case.providers if p.capturable})
    else:
        eager = {}
        times = time_cpu(runs, rounds)
    quartiles = {name: statistics.quantiles(values, n=4) for name, values in times.items()}
    baselines = [quartiles[provider.name][1] for provider in case.providers if provider.baseline]
    rows = []
    for provider in case.providers:
        lower, seconds, upper = quartiles[provider.name]
        ratio = min(baselines) / seconds if baselines and not provider.baseline else None
        rows.append(
            Row(
                case=case.name,
                provider=provider.name,
                milliseconds=seconds * 1e3,
                lower_quartile=lower * 1e3,
                upper_quartile=upper * 1e3,
                gigabytes_per_second=case.bytes / seconds / 1e9,
                roofline_percent=100 * limit / seconds,
                peak_megabytes=peaks[provider.name] / 1e6,
                speedup=ratio,
                eager_milliseconds=eager[provider.name] * 1e3 if provider.name in eager else None,
            )
        )
    return rows


def time_cpu(runs: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each run, in turns; an untimed run before each gives it its own caches."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, work in runs.items():
            work()
            start = time.perf_counter()
            work()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def time_cuda(
    runs: dict[str, Callable[[], object]], rounds: int, uncaptured: Sequence[str] = ()
) -> dict[str, list[float]]:
    """Seconds of each run, in turns, with the L2 cache flushed before.

    As a CUDA graph, but for those in ``uncaptured``.
    """
    flush = torch.empty(L2_FLUSH_BYTES, dtype=torch.int8, device="cuda")
    graphs = {n: work if n in uncaptured else _captured(work) for n, work in runs.items()}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, replay in graphs.items():
            flush.zero_()
            if name in uncaptured:
                torch.cuda.synchronize()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            replay()
            end.record()
            end.synchronize()
            seconds[name].append(start.elapsed_time(end) / 1e3)
    return seconds


def time_eager(
    runs: dict[str, Callable[[], object]], rounds: int = 5, calls: int = 10
) -> dict[str, float]:
    """Median seconds of a call among ``calls`` in a row, from an idle GPU to an idle GPU.

    What a training loop sees that is not captured: the longer of the host's and the GPU's part.
    """
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, work in runs.items():
            torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(calls):
                work()
            torch.cuda.synchronize()
            seconds[name].append((time.perf_counter() - start) / calls)
    return {name: statistics.median(values) for name, values in seconds.items()}


def _captured(work: Callable[[], object]) -> Callable[[], object]:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # compilation and autotuning happen before the capture
        for _ in range(3):
            work()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay


def peak_extra_bytes(work: Callable[[], object], device: str) -> int:
    """Most memory that one run holds beyond what was there before; warms up first."""
    work()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        work()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def copy_bandwidth(device: str, smoke: bool = False) -> float:
    """Bytes read and written per second by a plain copy: the roofline of memory-bound work."""
    elements = 1 << (20 if smoke else 28 if device == "cuda" else 26)
    source = torch.ones(elements, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    copies = {"copy": lambda: target.copy_(source)}
    copies["copy"]()
    timer = time_cuda if device == "cuda" else time_cpu
    return 2 * source.nbytes / statistics.median(timer(copies, 5)["copy"])


@functools.cache
def product_rate(dtype: torch.dtype, device: str, smoke: bool = False) -> float:
    """Floating-point operations per second of a large matrix product."""
    size = 256 if smoke else 8192 if device == "cuda" else 2048
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    products = {"product": lambda: left @ right}
    products["product"]()
    timer = time_cuda if device == "cuda" else time_cpu
    return 2 * size**3 / statistics.median(timer(products, 5)["product"])


def machine(device: str) -> str:
    """The processor that was measured."""
    if device == "cuda":
        return gpus()[torch.cuda.current_device()]
    model = platform.processor() or platform.machine()
    names = Path("/proc/cpuinfo")
    if names.exists():
        lines = [line for line in names.read_text().splitlines() if line.startswith("model name")]
        model = lines[0].split(":", 1)[1].strip() if lines else model
    return f"{model}, {torch.get_num_threads()} threads"


def commit() -> str:
    """FASTKD_COMMIT, or the checked-out commit, marked where files differ from it."""
    if given := os.environ.get("FASTKD_COMMIT"):
        return given
    try:
        name, dirty = (
            subprocess.check_output(["git", *words], cwd=ROOT, text=True).strip()
            for words in (["rev-parse", "HEAD"], ["status", "--porcelain", "-uno"])
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return f"{name} with changes" if dirty else name


def save(
    path: Path,
    title: str,
    device: str,
    bandwidth: float,
    products: dict[torch.dtype, float],
    rows: list[Row],
) -> None:
    """Write rows with everything needed to read them later."""
    record = {
        "benchmark": title,
        "machine": machine(device),
        "device": device,
        "versions": {
            "python": platform.python_version(),
            "cuda": torch.version.cuda,
            **{package: version(package) for package in ("fastkd", "torch", "triton")},
        },
        "commit": commit(),
        "command": " ".join(["python", *sys.argv]),
        "copy_gigabytes_per_second": bandwidth / 1e9,
        "product_teraflops_per_second": {
            str(dtype).removeprefix("torch."): rate / 1e12 for dtype, rate in products.items()
        },
        "load_average": os.getloadavg()[0],
        "rows": [asdict(row) for row in rows],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(record, indent=1) + "\n")
    partial.replace(path)
