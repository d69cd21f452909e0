"""Fixtures shared by all tests: backends, on the GPU where there is one, else emulated."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from fastkd.ops import backend as backends
from tests.harness import host, interpreter

GPU = torch.cuda.is_available()


@dataclass(frozen=True)
class Backend:
    """A backend under test: ``call(function, ...)`` runs a module-level function where it works.

    Attributes:
        name: to hand to an operator.
        device: where the operator's tensors must be.
        runs_bfloat16: whether bfloat16 can be trusted there (Triton's interpreter gets it wrong).
    """

    name: str
    device: str
    runs_bfloat16: bool
    call: Callable[..., Any]


def _direct(function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    return function(*arguments, **options)


@pytest.fixture(scope="session", params=["torch", "triton", "cuda"])
def backend(request: pytest.FixtureRequest) -> Backend:
    """Every backend: on the GPU, or interpreted (Triton) and compiled for the host (CUDA C++)."""
    name = request.param
    if name == "torch" or GPU:
        device = "cuda" if GPU else "cpu"
        reason = backends.unavailable(name, torch.device(device))
        if reason is not None:
            pytest.skip(f"backend {name!r}: {reason}")
        return Backend(name, device, True, _direct)
    if name == "triton":
        if (reason := interpreter.why_not()) is not None:
            pytest.skip(reason)
        return Backend(name, "cpu", False, interpreter.run_interpreted)
    if (reason := host.why_not()) is not None:
        pytest.skip(f"backend 'cuda' on the host: {reason}")
    torch.ops.load_library(str(host.build_library()))
    backends.EMULATED.add("cuda")
    return Backend(name, "cpu", True, _direct)
