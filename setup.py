"""Builds fastkd's CUDA library where the machine can, and says in one line why where it cannot.

Everything else about the package is in pyproject.toml. What decides is whether torch is a CUDA
build and nvcc is found, never whether a GPU is present. FASTKD_BUILD=cuda|none forces the choice;
TORCH_CUDA_ARCH_LIST, MAX_JOBS and CUDA_HOME are respected.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent
STABLE_ABI_TARGET = "0x020b000000000000"  # torch 2.11: the oldest one a built library loads on
CSRC = ROOT / "csrc"
SOURCES = sorted(str(p.relative_to(ROOT)) for p in [*CSRC.glob("*.cu"), *CSRC.glob("*.cpp")])
NOT_BUILT = ROOT / "fastkd" / "_not_built.txt"  # read by fastkd.ops.backend
BUILD_COMMANDS = {"build", "build_ext", "build_py", "bdist_wheel", "editable_wheel", "develop"}


def find_toolkit():
    """Set CUDA_HOME from nvcc itself, which may be a wrapper outside the toolkit's folder."""
    nvcc = shutil.which("nvcc")
    if nvcc is None or "CUDA_HOME" in os.environ or "CUDA_PATH" in os.environ:
        return
    dry_run = subprocess.run(
        [nvcc, "--dryrun", "-E", "-x", "cu", os.devnull], capture_output=True, text=True
    )
    top = re.search(r"TOP=(.+)", dry_run.stderr)
    if top is not None:
        os.environ["CUDA_HOME"] = os.path.realpath(top.group(1).strip())


def nvcc_version(cuda_home):
    output = subprocess.check_output([f"{cuda_home}/bin/nvcc", "--version"], text=True)
    major, minor = re.search(r"release (\d+)\.(\d+)", output).groups()
    return int(major), int(minor)


def why_not_cuda():
    """What is missing for a CUDA build; None where nothing is."""
    if sys.platform != "linux":
        return f"it is for Linux only, this is {sys.platform}"
    find_toolkit()
    try:
        import torch
        from torch.utils.cpp_extension import CUDA_HOME
    except ImportError:
        return "torch is not installed in the build environment"
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA; install a CUDA build of torch"
    if CUDA_HOME is None or not Path(CUDA_HOME, "bin", "nvcc").exists():
        return f"nvcc was not found; install the CUDA toolkit {torch.version.cuda} or set CUDA_HOME"
    found = nvcc_version(CUDA_HOME)
    if found[0] != int(torch.version.cuda.split(".")[0]):
        found_text = ".".join(map(str, found))
        return (
            f"nvcc is {found_text}, but torch {torch.__version__} is for {torch.version.cuda}; "
            "pip install --no-build-isolation builds against the torch that is installed"
        )
    return None


def cuda_library():
    import torch
    from torch.utils.cpp_extension import CUDA_HOME, CUDAExtension

    default = "8.0;9.0a;10.0+PTX" if nvcc_version(CUDA_HOME) >= (12, 8) else "8.0;9.0a;9.0+PTX"
    archs = os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip() or default
    os.environ["TORCH_CUDA_ARCH_LIST"] = archs
    built = {
        "torch": torch.__version__,
        "cuda": ".".join(map(str, nvcc_version(CUDA_HOME))),
        "archs": re.split(r"[;,\s]+", archs),
    }
    info = json.dumps(built).replace('"', '\\"').replace(" ", "")
    # USE_CUDA uncovers the CUDA part of the stable ABI's header.
    defines = [f"-DTORCH_TARGET_VERSION={STABLE_ABI_TARGET}", "-DUSE_CUDA"]
    common = ["-std=c++20", *defines]
    library = CUDAExtension(
        "fastkd._C",
        SOURCES,
        include_dirs=[str(ROOT / "csrc")],
        extra_compile_args={
            "cxx": ["-O2", "-fvisibility=hidden", *common, f'-DFASTKD_BUILD_INFO="{info}"'],
            "nvcc": ["-O3", "--threads=2", "-Xcompiler=-fvisibility=hidden", *common],
        },
        extra_link_args=["-Wl,--no-as-needed", "-Wl,--exclude-libs,ALL"],
        py_limited_api=True,
    )
    # Linking torch_cuda or the shared CUDA runtime would keep the library from loading next to a
    # CPU build of torch; the one function it needs from there it looks up when it is called.
    library.libraries = ["torch_cpu", "cudart_static", "rt", "pthread", "dl"]
    return library


def remember(reason):
    """Leave the reason in the package: pip shows a build's output only with -v."""
    if reason is None:
        NOT_BUILT.unlink(missing_ok=True)
    else:
        NOT_BUILT.write_text(reason + "\n", encoding="utf-8")


def build_options():
    choice = os.environ.get("FASTKD_BUILD", "auto")
    if choice not in ("auto", "cuda", "none"):
        sys.exit(f"FASTKD_BUILD must be cuda or none, got {choice!r}")
    reason = "FASTKD_BUILD=none" if choice == "none" else why_not_cuda()
    if BUILD_COMMANDS & set(sys.argv):
        remember(reason)
    if reason is None:
        from torch.utils.cpp_extension import BuildExtension

        return {"ext_modules": [cuda_library()], "cmdclass": {"build_ext": BuildExtension}}
    if choice == "cuda":
        sys.exit(f"FASTKD_BUILD=cuda, but {reason}")
    print(
        f"fastkd: no CUDA library is built ({reason}); the Triton and PyTorch backends remain",
        file=sys.stderr,
    )
    return {}


setup(**build_options())
