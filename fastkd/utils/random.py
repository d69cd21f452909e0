"""Seeds and states of random generators.

Seeds derive from (seed, epoch, sample, copy) or (seed, update, rank): any number of workers, and a
run that was stopped anywhere, draw the same numbers.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

# What a derived seed is for, so that the streams of different purposes never coincide.
PURPOSES = ("model", "order", "sample", "mix", "update", "fingerprint", "stream")

_CPU = torch.device("cpu")


def derive_seed(purpose: str, *parts: int) -> int:
    """Hash a purpose and whole numbers >= 0 into a 32-bit seed."""
    return int(np.random.SeedSequence([PURPOSES.index(purpose), *parts]).generate_state(1)[0])


def seed_cpu(seed: int) -> None:
    """Seed python, numpy and torch's CPU generator; an accelerator's generator is left alone."""
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)


def seed_all(seed: int) -> None:
    """Seed python, numpy and torch, accelerators included; does not synchronize."""
    seed_cpu(seed)
    torch.manual_seed(seed)


@contextmanager
def preserved_rng(device: torch.device = _CPU) -> Iterator[None]:
    """Restore the generators of python, numpy, torch's CPU and a device after the block."""
    state = rng_state(device)
    try:
        yield
    finally:
        set_rng_state(state, device)


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Seed all generators inside the block, and restore them after it."""
    with preserved_rng(device):
        seed_all(seed)
        yield


def rng_state(device: torch.device) -> dict[str, Any]:
    """Return all generators' states, in types that ``torch.load(weights_only=True)`` reads."""
    _, keys, position, has_gauss, gauss = np.random.get_state()
    state: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": (torch.from_numpy(np.asarray(keys, dtype=np.int64)), position, has_gauss, gauss),
        "torch": torch.get_rng_state(),
    }
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_rng_state(state: dict[str, Any], device: torch.device) -> None:
    """Restore a state of `rng_state`."""
    version, keys, gauss = state["python"]
    random.setstate((version, tuple(keys), gauss))
    np_keys, position, has_gauss, np_gauss = state["numpy"]
    uint32_keys = np_keys.numpy().astype(np.uint32)
    np.random.set_state(("MT19937", uint32_keys, position, has_gauss, np_gauss))
    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)
