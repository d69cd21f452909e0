"""Devices that this machine need not have, by what they refuse."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode


class NoFloat64(TorchFunctionMode):
    """Fail where a tensor on a device gets float64, as Apple's ``"mps"`` does.

    Args:
        device: its type; beneath `FakeTensorMode` it may be one that torch was not built for.
    """

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device = device

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call the function and look at what it gives."""
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.device.type == self.device:
            assert result.itemsize < 8 or not result.is_floating_point(), f"{func}: float64"
        return result
