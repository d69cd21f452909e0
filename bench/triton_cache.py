"""Compile for one GPU, without one, what bench/gpu.sh launches through Triton, and pack the cache.

python bench/triton_cache.py --arch 90 --output build/gpu/triton_cache.tar.xz

Triton's cache is keyed by its own build too: use the Python and Triton of the machine that the
cache is for. There, unpack it and set TRITON_CACHE_DIR to the folder.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tarfile
import tempfile
import time
from argparse import Namespace
from pathlib import Path
from typing import Any

LIMIT_BYTES = 40 << 20  # of the archive
ROOT = Path(__file__).parents[1]
OPERATORS = ("lift_kd", "feature_kd", "second_moment")


def pretend(arch: int) -> None:
    """Make Triton compile for a GPU that is not here, and launch nothing."""
    import torch
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    from fastkd.ops import backend
    from fastkd.ops.operator import KernelLaunch

    class Driver:
        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, device: int) -> int:
            return 0

        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", arch, 32)

        def get_active_torch_device(self) -> torch.device:
            return torch.device("cpu")

    def compile_only(self: KernelLaunch) -> None:
        self.kernel.warmup(**self.arguments, **self.constants, **self.options, grid=self.grid)

    driver.set_active(Driver())
    KernelLaunch.run = compile_only  # type: ignore[method-assign]
    backend.EMULATED.add("triton")
    os.environ["FASTKD_SELF_CHECK"] = "0"  # nothing computed here is right


def compile_first_contact(operator: str) -> None:
    """The launches of bench/first_contact.py."""
    from first_contact import DTYPES, OPERATORS, Case

    cases, _ = OPERATORS[operator]
    for dtype in ("bfloat16", "float16", "float32"):
        made: list[Case] = list(cases("triton", DTYPES[dtype], "cpu", 160))
        for case in made:
            case.launch()
        print(f"{operator} {dtype}: {len(made)} cases", flush=True)


def compile_benchmark(operator: str) -> None:
    """The launches of the operator's benchmark in quick mode."""
    import importlib

    benchmark = importlib.import_module(operator)
    count = 0
    for case in benchmark.cases(Namespace(device="cpu", smoke=False, quick=True)):
        for provider in case.providers:
            if provider.name == "fastkd (triton)":
                provider.run()
                count += 1
    print(f"{operator}: {count} cases of its benchmark", flush=True)


def compile_tests(shard: str) -> None:
    """The launches of the operators' tests; what they compare is not looked at."""
    import pytest

    from tests.harness import interpreter

    class Direct:
        @pytest.hookimpl(tryfirst=True)
        def pytest_configure(self, config: Any) -> None:
            interpreter.why_not = lambda: None
            interpreter.run_interpreted = lambda function, *args, **options: function(
                *args, **options
            )

    files = [f"tests/ops/test_{name}.py" for name in ("conformance", *OPERATORS, "sep")]
    arguments = ["-q", "--tb=no", "-p", "no:cacheprovider", "--backends", "triton"]
    sys.exit(pytest.main([*arguments, "--shard", shard, *files], plugins=[Direct()]))


def pack(folder: Path, output: Path) -> None:
    """Pack what Triton needs to load a kernel."""
    output.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(output, "w:xz", preset=6) as archive:
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                archive.add(path, path.relative_to(folder))
    size = output.stat().st_size
    print(f"{output}: {size / 2**20:.1f} MB, {len(list(folder.iterdir()))} entries")
    if size > LIMIT_BYTES:
        raise SystemExit(f"{output} is over {LIMIT_BYTES >> 20} MB; try --without-tests")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", type=int, default=90, help="compute capability times ten")
    parser.add_argument("--output", type=Path, required=True, help="a .tar.xz")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes at once")
    parser.add_argument("--without-tests", action="store_true")
    parser.add_argument("--smoke", action="store_true", help="one operator's benchmark alone")
    parser.add_argument("--part", help="compile this part in this process, into TRITON_CACHE_DIR")
    options = parser.parse_args()
    if options.part:
        pretend(options.arch)
        kind, _, argument = options.part.partition(":")
        globals()[f"compile_{kind}"](argument)
        return
    parts = [f"{kind}:{name}" for name in OPERATORS for kind in ("first_contact", "benchmark")]
    if not options.without_tests:
        parts += [f"tests:{number}/8" for number in range(8)]
    if options.smoke:
        parts = ["benchmark:second_moment"]
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "TRITON_CACHE_DIR": folder, "PYTHONPATH": str(ROOT)}
        running: dict[str, subprocess.Popen[bytes]] = {}
        failed = []
        while parts or running:
            for part in [name for name, process in running.items() if process.poll() is not None]:
                code = running.pop(part).returncode
                # A test that compares what was not computed fails; a crash is another matter.
                if code != 0 and not (part.startswith("tests:") and code == 1):
                    failed.append(f"{part} (exit {code})")
            while parts and len(running) < options.jobs:
                part = parts.pop(0)
                command = [sys.executable, __file__, *sys.argv[1:], "--part", part]
                running[part] = subprocess.Popen(command, cwd=ROOT, env=environment)
            time.sleep(0.2)
        if failed or not any(Path(folder).iterdir()):
            raise SystemExit(f"not compiled: {', '.join(failed) or 'anything'}")
        print(f"compiled in {time.monotonic() - start:.0f} s")
        pack(Path(folder), options.output)


if __name__ == "__main__":
    main()
