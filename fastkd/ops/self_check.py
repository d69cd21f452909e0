"""The comparison with the float64 reference that a fused kernel must pass before it is used."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator
from dataclasses import is_dataclass
from typing import Any

import torch
from torch import Tensor

from fastkd.ops.checks import tensors_of

logger = logging.getLogger("fastkd")

ENVIRONMENT_SELF_CHECK = "FASTKD_SELF_CHECK"
# Relative errors, by the coarsest dtype of a result and of the products that it is made of.
TOLERANCES = {
    "value": {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2},
    "gradient": {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 3e-2},
}


class Draw:
    """Example tensors; in float64 for the reference, after rounding to their own dtype."""

    def __init__(self, backend: str, device: torch.device, exact: bool) -> None:
        self.backend, self.device, self.exact = backend, device, exact
        self.generator = torch.Generator().manual_seed(0)
        self.products: list[torch.dtype] = []

    def __call__(self, *shape: int, like: Tensor | None) -> Tensor:
        """Draw noise of a tensor's dtype, of float32 without one."""
        noise = torch.randn(shape, generator=self.generator)
        return self.rounded(noise, torch.float32 if like is None else like.dtype)

    def rounded(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        x = x.to(self.device, dtype)
        return x.double() if self.exact else x

    def compute(self, dtype: torch.dtype) -> torch.dtype:
        """Give the dtype of products, whose rounding is allowed for."""
        self.products.append(dtype)
        return torch.float64 if self.exact else dtype


def failure(backends: Any, name: str, inputs: tuple[Any, ...]) -> str | None:
    """Compare a backend with the reference once per device, dtypes and options.

    ``backends`` is a `fastkd.ops.backend.Backends`. Its ``example(implementation, draw, *inputs)``
    yields pairs of "value" or "gradient" and a result, from drawn tensors with the dtypes and
    options of the inputs. Synchronizes.
    """
    if os.environ.get(ENVIRONMENT_SELF_CHECK, "1") == "0":
        return None
    device = next(tensors_of(inputs)).device
    key = name, device, *_kinds(inputs)
    if key in backends.verdicts:
        return backends.verdicts[key]
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return None  # a capture forbids to wait for the GPU; the next call checks
    try:
        verdict = _difference(backends, name, inputs, device)
    except torch.OutOfMemoryError:
        # For good: a backward must not run elsewhere than the forward whose results it gets.
        verdict = "no memory was left for its self-check"
    except Exception as error:
        verdict = f"it failed its self-check: {error}"
    backends.verdicts[key] = verdict
    if verdict is not None:
        logger.warning(
            "%s: backend %r is switched off in this process: %s (%s)",
            backends.name, name, verdict, ", ".join(map(str, key[1:])),
        )  # fmt: skip
    return verdict


def _kinds(inputs: Iterable[Any]) -> Iterator[Any]:
    for x in inputs:
        if is_dataclass(x):
            yield from _kinds(vars(x).values())
        else:
            yield x.dtype if isinstance(x, Tensor) else x


def _difference(
    backends: Any, name: str, inputs: tuple[Any, ...], device: torch.device
) -> str | None:
    rough, exact = (Draw(name, device, exact) for exact in (False, True))
    ours = backends.example(backends.implementations[name], rough, *inputs)
    truths = backends.example(backends.implementations["torch"], exact, *inputs)
    for (kind, found), (_, truth) in zip(ours, truths, strict=True):
        allowed = TOLERANCES[kind]
        dtypes = found.dtype, *rough.products
        tolerance = max(allowed.get(dtype, allowed[torch.float32]) for dtype in dtypes)
        error = (found.double() - truth).norm() / truth.norm()
        if not error <= tolerance:
            return (
                f"it disagrees with the reference in a {kind}: "
                f"error {error:.3g}, allowed {tolerance:g}"
            )
    return None
