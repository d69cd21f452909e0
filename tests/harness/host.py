"""Compiles csrc for the CPU: kernels on threads under the host shim, bindings on the CPU key."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch.utils import cpp_extension

ROOT = Path(__file__).parents[2]
CSRC = ROOT / "csrc"
SHIM = Path(__file__).parent / "shim"
STABLE_ABI_TARGET = "0x020b000000000000"


def cuda_headers() -> Path | None:
    """A folder with CUDA's type headers: the toolkit's, or those inside the triton package."""
    candidates = []
    if shutil.which("nvcc"):
        candidates.append(Path(os.path.realpath(shutil.which("nvcc"))).parents[1] / "include")
    candidates.append(Path("/usr/local/cuda/include"))
    try:
        import triton

        candidates.append(Path(triton.__file__).parent / "backends" / "nvidia" / "include")
    except ImportError:
        pass
    return next((path for path in candidates if (path / "cuda_fp16.h").exists()), None)


def why_not() -> str | None:
    """What is missing for a host build; None where nothing is."""
    if shutil.which("g++") is None:
        return "g++ is not installed"
    if cuda_headers() is None:
        return "no CUDA headers found (CUDA toolkit or the triton package)"
    return None


def _flags() -> list[str]:
    includes = [CSRC, SHIM, *cpp_extension.include_paths()]
    return [
        *("-std=c++20", "-O1", "-g", "-fPIC", "-pthread", "-Wall", "-Werror"),
        "-Wno-unknown-pragmas",  # unrolling is a matter for nvcc
        "-DFASTKD_HOST_SHIM",
        f"-DTORCH_TARGET_VERSION={STABLE_ABI_TARGET}",
        *(f"-isystem{path}" if path not in (CSRC, SHIM) else f"-I{path}" for path in includes),
        f"-isystem{cuda_headers()}",
    ]


def _cached(sources: list[Path], flags: list[str], stem: str) -> Path:
    """Where a build of exactly these inputs is kept."""
    digest = hashlib.sha256(" ".join([torch.__version__, *flags]).encode())
    headers = [*CSRC.rglob("*.h"), *CSRC.rglob("*.cuh"), *SHIM.rglob("*.h")]
    for path in sorted({*sources, *headers}):
        digest.update(path.read_bytes())
    folder = Path(tempfile.gettempdir()) / f"fastkd-host-{os.getuid()}"
    folder.mkdir(exist_ok=True)
    return folder / f"{stem}-{digest.hexdigest()[:16]}"


def _compile(source: Path, target: Path, flags: list[str]) -> Path:
    command = ["g++", *flags, "-x", "c++", "-c", str(source), "-o", str(target)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{source.name} does not compile for the host:\n{done.stderr[-4000:]}")
    return target


def _link(sources: list[Path], flags: list[str], link_flags: list[str], output: Path) -> Path:
    with tempfile.TemporaryDirectory() as folder:
        targets = [Path(folder) / f"{source.name}.o" for source in sources]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = list(pool.map(lambda pair: _compile(*pair, flags), zip(sources, targets)))
        partial = Path(folder) / "linked"
        subprocess.run(
            ["g++", *map(str, objects), "-pthread", *link_flags, "-o", str(partial)], check=True
        )
        shutil.move(partial, output)
    return output


def build_library() -> Path:
    """All of csrc as one library for CPU tensors; loads with ``torch.ops.load_library``."""
    sources = sorted([*CSRC.glob("*.cu"), *CSRC.glob("*.cpp")])
    flags = _flags()
    output = _cached(sources, flags, "libfastkd_host").with_suffix(".so")
    if not output.exists():
        torch_libraries = cpp_extension.library_paths()[0]
        _link(sources, flags, ["-shared", f"-L{torch_libraries}", "-ltorch_cpu"], output)
    return output


def build_program(main: Path, kernels: list[Path], sanitizer: str | None = None) -> Path:
    """A program of a main file and torch-free kernel sources, optionally under a sanitizer.

    Args:
        main: a C++ file with ``main``.
        kernels: .cu files of csrc.
        sanitizer: ``"thread"`` or ``"address"``.

    Returns:
        The executable.
    """
    sanitize = [f"-fsanitize={sanitizer}"] if sanitizer else []
    flags = [*_flags(), *sanitize]
    output = _cached([main, *kernels], flags, main.stem)
    if not output.exists():
        _link([main, *kernels], flags, sanitize, output)
    return output
