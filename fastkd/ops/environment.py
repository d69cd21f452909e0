"""Versions, GPUs, usable backends and environment variables, for a bug report."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections.abc import Collection

import torch

from fastkd.ops import backends
from fastkd.ops.backend import extension

PACKAGES = ("torchvision", "timm", "triton", "numpy")
# What `fastkd env --variables` lists, by heading.
VARIABLES = {
    "use": {
        "FASTKD_BACKEND": "cuda, triton or torch: the backend of every operator; auto by default",
        "FASTKD_SELF_CHECK": "0 skips the comparison of a backend with torch at its first use",
        "FASTKD_UNPROVEN": "1 lets kernels run that no GPU has been tested with",
        "FASTKD_DEBUG": "1 shows the traceback of an error of the command line",
    },
    "installation": {
        "FASTKD_BUILD": "cuda or none: build the CUDA library, or not; by default if nvcc is found",
    },
    "tests and benchmarks": {
        "FASTKD_REQUIRE": "triton,cuda,library,...: fail tests that would be skipped without these",
        "FASTKD_TIMM_TESTS": "path of timm's tests/test_models.py, to run on fastkd's students",
        "FASTKD_PYTHON": "Python that .ci/nightly uses, instead of a new virtual environment",
        "FASTKD_COMMIT": "commit that benchmarks record, where git cannot tell it",
    },
}


def version(package: str) -> str:
    """The installed version of a package, or "not installed"."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def gpus() -> list[str]:
    """The GPUs that torch sees, as "NVIDIA H100 80GB HBM3, sm_90, 79 GiB"."""
    found = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        memory = properties.total_memory / 2**30
        found.append(
            f"{properties.name}, sm_{properties.major}{properties.minor}, {memory:.0f} GiB"
        )
    return found


def report() -> str:
    """The environment as text, one fact per line."""
    library = extension()
    built = library.built
    if library.error is not None:
        library_state = library.error
    else:
        archs = ", ".join(built["archs"])
        library_state = f"built for torch {built['torch']}, CUDA {built['cuda']}, {archs}; loads"
    rows = [
        ("python", f"{platform.python_version()} on {platform.platform()}"),
        ("fastkd", version("fastkd")),
        ("torch", torch.__version__),
        *((package, version(package)) for package in PACKAGES),
        ("CUDA of torch", torch.version.cuda or "none (a CPU build)"),
        ("GPU", "; ".join(gpus()) or "none"),
        ("CPU threads", str(torch.get_num_threads())),
        ("CUDA library", library_state),
        *((f"backend {name}", reason or "usable") for name, reason in backends().items()),
        *(
            (name, os.environ[name])
            for name in (*VARIABLES["use"], *VARIABLES["installation"], "TORCH_CUDA_ARCH_LIST")
            if name in os.environ
        ),
    ]
    return _table(rows)


def variables() -> str:
    """The environment variables of fastkd as text, one per line under headings."""
    blocks = [f"{heading}:\n{_table(group.items())}" for heading, group in VARIABLES.items()]
    return "\n\n".join(blocks)


def _table(rows: Collection[tuple[str, str]]) -> str:
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)
