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
from tests.harness import gates, host, interpreter

GPU = torch.cuda.is_available()
REQUIRED = os.environ.get("FASTKD_REQUIRE", "").split(",")


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("fastkd")
    group.addoption("--shard", metavar="I/N", help="run every N-th test, from the I-th (from 0) on")
    group.addoption(
        "--backends",
        metavar="A,B",
        help="run only tests that take the fixture backend, and these of its values",
    )
    group.addoption(
        "--record-compiled",
        action="store_true",
        help="record the resources of compiled kernels for the installed Triton",
    )


def pytest_configure(config: pytest.Config) -> None:
    gates.recording = config.getoption("record_compiled")


def pytest_unconfigure(config: pytest.Config) -> None:
    if gates.recording:
        gates.save()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    kept = list(items)
    if backends := config.getoption("backends"):
        kept = [item for item in kept if _backend_of(item) in backends.split(",")]
    if shard := config.getoption("shard"):
        first, count = map(int, shard.split("/"))
        kept = kept[first::count]
    if len(kept) < len(items):
        chosen = set(kept)
        config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
        items[:] = kept


@pytest.fixture(autouse=True)
def _no_figures(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "draws" not in request.keywords:
        monkeypatch.setattr("fastkd.training.trainer.plot_run", lambda *_: None)


def _backend_of(item: pytest.Item) -> str | None:
    callspec = getattr(item, "callspec", None)
    return None if callspec is None else callspec.params.get("backend")


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


@pytest.fixture
def data():
    """A training and an evaluation set of tiny images."""
    from tests.harness.tiny import tensor_data  # imports timm, which tests of operators need not

    return tensor_data()


@pytest.fixture
def fast():
    """Recipe fields of a run that takes a moment."""
    from tests.harness.tiny import FAST

    return dict(FAST)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
