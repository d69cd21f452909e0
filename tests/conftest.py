"""Fixtures shared by all tests: backends, on the GPU where there is one, else emulated."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from fastkd.ops import backend as backends
from tests.harness import host, interpreter

GPU = torch.cuda.is_available()
REQUIRED = os.environ.get("FASTKD_REQUIRE", "").split(",")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """FASTKD_SHARD=i/n keeps every n-th test: several processes then compile kernels at once."""
    shard, _, shards = os.environ.get("FASTKD_SHARD", "").partition("/")
    if shards:
        kept = items[int(shard) :: int(shards)]
        config.hook.pytest_deselected(items=[item for item in items if item not in kept])
        items[:] = kept


def skip_or_fail(what: str, reason: str) -> None:
    """Skip a test that lacks something; fail it where FASTKD_REQUIRE (a,b,c) says it must be there.

    Args:
        what: ``"triton"``, ``"cuda"`` (a backend, emulated or not) or ``"library"``.
        reason: why it is not there.
    """
    if what in REQUIRED:
        pytest.fail(f"{what} is required: {reason}")
    pytest.skip(reason)


@dataclass(frozen=True)
class Backend:
    """A backend under test: ``call(function, ...)`` runs a module-level function where it works.

    Attributes:
        name: to hand to an operator.
        device: where the operator's tensors must be.
    """

    name: str
    device: str
    call: Callable[..., Any]


def _direct(function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    return function(*arguments, **options)


@functools.cache
def _load_host_library() -> None:
    torch.ops.load_library(str(host.build_library()))


@pytest.fixture(params=["torch", "triton", "cuda"])
def backend(request: pytest.FixtureRequest) -> Iterator[Backend]:
    """Every backend: on the GPU, or interpreted (Triton) and compiled for the host (CUDA C++)."""
    name = request.param
    if name == "torch" or GPU:
        device = "cuda" if GPU else "cpu"
        reason = backends.unavailable(name, torch.device(device))
        if reason is not None:
            skip_or_fail(name, f"backend {name!r}: {reason}")
        yield Backend(name, device, _direct)
        return
    if name == "triton":
        if (reason := interpreter.why_not()) is not None:
            skip_or_fail(name, reason)
        yield Backend(name, "cpu", interpreter.run_interpreted)
        return
    if (reason := host.why_not()) is not None:
        skip_or_fail(name, f"backend 'cuda' on the host: {reason}")
    _load_host_library()
    backends.EMULATED.add("cuda")
    yield Backend(name, "cpu", _direct)
    backends.EMULATED.discard("cuda")  # "auto" must not find it in other tests
