"""Loads the compiled CUDA library once and keeps the reason when that fails.

The library is optional: nothing here raises. It registers implementations of operators whose
schemas are declared in Python. Knows nothing of who calls.
"""

from __future__ import annotations

import ctypes
import functools
import json
import re
from dataclasses import dataclass, field
from pathlib import Path

import torch

LIBRARY_STEM = "_C"
NOT_BUILT = "_not_built.txt"  # setup.py's reason


@dataclass(frozen=True)
class Extension:
    """The state of the compiled library.

    Attributes:
        path: the library file, or None where none was built.
        error: why it is not usable, or None where it is loaded.
        built: what it was built for: ``torch``, ``cuda`` (versions) and ``archs`` (a list).
    """

    path: Path | None
    error: str | None
    built: dict[str, str | list[str]] = field(default_factory=dict)

    def why_not_on(self, device: torch.device) -> str | None:
        """Why the library's kernels cannot run on a CUDA device; None where they can."""
        if self.error is not None:
            return self.error
        capability = torch.cuda.get_device_capability(device)
        archs = [str(arch) for arch in self.built.get("archs", [])]
        if any(_covers(arch, capability) for arch in archs):
            return None
        found = f"{torch.cuda.get_device_name(device)} (sm_{capability[0]}{capability[1]})"
        return f"the library was built for {', '.join(archs) or 'no GPU'}; found {found}"


def _covers(arch: str, capability: tuple[int, int]) -> bool:
    """Whether code for ``arch`` ("8.0", "9.0a", "10.0+PTX") runs on a device of ``capability``."""
    found = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", arch)
    if found is None:
        return False
    major, minor = int(found[1]), int(found[2])
    if found[3]:
        return (major, minor) == capability
    if found[4] and capability >= (major, minor):
        return True
    return capability[0] == major and capability[1] >= minor


def library_path() -> Path | None:
    """The compiled library beside the package, or None."""
    found = sorted(Path(__file__).parents[1].glob(f"{LIBRARY_STEM}*.so"))
    return found[0] if found else None


def load_library(path: Path) -> Extension:
    """Load one library and read what it was built for.

    Args:
        path: a shared library built from csrc.

    Returns:
        Its state; `Extension.error` names both what it was built for and what was found when
        loading failed.
    """
    try:
        raw = ctypes.CDLL(str(path))
        raw.fastkd_build_info.restype = ctypes.c_char_p
        built = json.loads(raw.fastkd_build_info())
        torch.ops.load_library(str(path))
    except (OSError, AttributeError, ValueError) as error:
        found = f"torch {torch.__version__} (CUDA {torch.version.cuda})"
        return Extension(path, f"{path.name} did not load into {found}: {error}")
    return Extension(path, None, built)


@functools.cache
def extension() -> Extension:
    """The compiled library, loaded at the first call."""
    path = library_path()
    if path is None:
        reason = Path(__file__).parents[1] / NOT_BUILT
        why = reason.read_text(encoding="utf-8").strip() if reason.exists() else "no install yet"
        return Extension(None, f"the CUDA library was not built: {why}")
    return load_library(path)
