"""What a bug report needs: versions, GPU, and which backends are usable and, if not, why."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys

import torch

from fastkd.ops import backends
from fastkd.ops.backend import extension

PACKAGES = ("torchvision", "timm", "triton", "numpy")
VARIABLES = ("FASTKD_BACKEND", "FASTKD_SELF_CHECK", "FASTKD_BUILD", "TORCH_CUDA_ARCH_LIST")


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
    """The environment as text, a fact a line."""
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
        *((name, os.environ[name]) for name in VARIABLES if name in os.environ),
    ]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


if __name__ == "__main__":
    sys.stdout.write(report() + "\n")
