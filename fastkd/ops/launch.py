"""A Triton launch as a value: what would run, on which grid, with which constants.

Operators build launches, `KernelLaunch.run` starts them, and the test harness compiles the very
same values ahead of time for GPUs that are not there.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class KernelLaunch:
    """One launch of one Triton kernel.

    Attributes:
        kernel: the ``@triton.jit`` function.
        grid: number of programs along up to three axes.
        arguments: runtime arguments by name: tensors, ints and floats.
        constants: ``tl.constexpr`` arguments by name.
        num_warps: warps per program.
        num_stages: depth of software pipelining.
    """

    kernel: Any
    grid: tuple[int, ...]
    arguments: Mapping[str, Tensor | int | float]
    constants: Mapping[str, Any]
    num_warps: int = 4
    num_stages: int = 2

    @property
    def options(self) -> dict[str, int | bool]:
        """Compiler options; fused multiply-add is named because Triton's default is changing."""
        return {
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
            "enable_fp_fusion": True,
        }

    def run(self) -> None:
        """Start the kernel on the device and current stream of its tensors; does not wait."""
        device = next(a.device for a in self.arguments.values() if isinstance(a, Tensor))
        guard = torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
        with guard:
            self.kernel[self.grid](**self.arguments, **self.constants, **self.options)
