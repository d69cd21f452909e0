"""The choice of an operator's backend, and the compiled library."""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import json
import logging
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar, get_args

import torch
from torch import Tensor

from fastkd.ops import checks, self_check

LIBRARY_STEM = "_C"

NOT_BUILT = "_not_built.txt"  # setup.py's reason

logger = logging.getLogger("fastkd")

Backend = Literal["auto", "cuda", "triton", "torch"]
NAMES: tuple[Backend, ...] = get_args(Backend)
ENVIRONMENT_CHOICE = "FASTKD_BACKEND"
ENVIRONMENT_UNPROVEN = "FASTKD_UNPROVEN"

# Set by the test harness only: fused kernels then accept CPU tensors, because Triton runs in its
# interpreter, or because the CUDA sources were compiled for the host.
EMULATED: set[str] = set()


@dataclass(frozen=True)
class Implementation:
    """One operator on one backend."""

    forward: Callable[..., Any]
    backward: Any = None  # as callable as ``forward`` where the operator has a gradient
    # Why it cannot run these inputs, but for device, float64 and missing software; or None.
    refuses: Callable[..., str | None] = lambda *inputs: None
    proven: bool = True  # by a GPU; if not, it runs only with FASTKD_UNPROVEN=1


AnyImplementation = TypeVar("AnyImplementation", bound=Implementation)


@dataclass
class Backends(Generic[AnyImplementation]):
    """The implementations of an operator.

    Attributes:
        name: the operator's, as users know it, for messages.
        implementations: by backend name; must hold ``"torch"``.
        order: backends as ``"auto"`` tries them, fastest first.
        looks_at: names of the operator's arguments that decide, for `Implementation.refuses`;
            where the first tensor has no elements, no backend runs.
        example: what the self-check runs, see `fastkd.ops.self_check`.
    """

    name: str
    implementations: dict[str, AnyImplementation]
    order: tuple[str, ...]
    looks_at: tuple[str, ...]
    example: Callable[..., Iterator[tuple[str, Tensor]]]
    verdicts: dict[Any, str | None] = field(default_factory=dict)
    _logged: set[tuple[str, str]] = field(default_factory=set)

    def select(self, requested: str, *inputs: Any) -> AnyImplementation:
        """Choose the implementation for the arguments that ``looks_at`` names, None if missing.

        FASTKD_BACKEND overrides ``"auto"``. A backend asked for by name raises if it cannot run.
        """
        if requested == "auto" and ENVIRONMENT_CHOICE in os.environ:
            requested = os.environ[ENVIRONMENT_CHOICE]
            check_backend(self.name, requested)
        if requested != "auto":
            reason = self.why_not(requested, *inputs)
            if reason is not None:
                raise RuntimeError(f"{self.name}: backend {requested!r} cannot run: {reason}")
            return self.implementations[requested]
        for name in self.order[:-1]:
            reason = self.why_not(name, *inputs)
            if reason is None:
                return self.implementations[name]
            if (name, reason) not in self._logged:
                self._logged.add((name, reason))
                logger.info("%s: not using backend %r: %s", self.name, name, reason)
        return self.implementations["torch"]

    def why_not(self, name: str, *inputs: Any) -> str | None:
        """Why a backend cannot run these inputs; None where it can."""
        if name == "torch":
            return None
        implementation = self.implementations.get(name)
        if implementation is None:
            return "not implemented for this operator"
        device = next(checks.tensors_of(inputs)).device
        reason = unavailable(name, device) or _unproven(name, implementation)
        if reason is not None:
            return reason
        if any(x.dtype == torch.float64 for x in checks.tensors_of(inputs)):
            return "float64 runs on 'torch' only"
        return implementation.refuses(*inputs) or self_check.failure(self, name, inputs)


def check_backend(function: str, backend: object) -> None:
    """Raise unless it is a backend's name."""
    checks.check_choice(function, "backend", backend, NAMES)


def unavailable(name: str, device: torch.device) -> str | None:
    """Why a backend cannot run on a device, whatever the operator; None where it can."""
    if name == "torch" or name in EMULATED:
        return None
    if device.type != "cuda":
        return _needs_cuda(device.type)
    return _unavailable_on_gpu(name, device.index or 0)


@functools.cache
def _needs_cuda(device: str) -> str:
    seen = "" if torch.cuda.is_available() else ", and torch sees no GPU"
    return f"it needs CUDA tensors, got {device}{seen}"


def _unproven(name: str, implementation: Implementation) -> str | None:
    allowed = name in EMULATED or os.environ.get(ENVIRONMENT_UNPROVEN) == "1"
    if implementation.proven or allowed:
        return None
    return f"no GPU has verified it yet; {ENVIRONMENT_UNPROVEN}=1 runs it all the same"


@functools.cache
def _unavailable_on_gpu(name: str, index: int) -> str | None:
    if not torch.cuda.is_available():
        return _needs_cuda("cuda")
    device = torch.device("cuda", index)
    if name == "cuda":
        return extension().why_not_on(device)
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 0):
        return f"it needs compute capability 8.0, found {capability[0]}.{capability[1]}"
    return None


def backends(device: torch.device | str | None = None) -> dict[str, str | None]:
    """The backends, each with the reason why it cannot run here, or None where it can.

    Args:
        device: where the tensors would live; the default is the GPU where there is one.

    Returns:
        ``{"cuda": reason or None, "triton": reason or None, "torch": None}``.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return {name: unavailable(name, torch.device(device)) for name in NAMES if name != "auto"}


@dataclass(frozen=True)
class Extension:
    """The state of the compiled library."""

    path: Path | None
    error: str | None  # why it is not usable
    built: dict[str, str | list[str]] = field(default_factory=dict)  # for which torch, cuda, archs

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
    """Load a library built from csrc and read what it was built for."""
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
