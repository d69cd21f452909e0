"""Checks of arguments with the caller's names, [B, H, W, D] views of maps, and float32 products."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import is_dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fastkd.utils.argument_checks import check_number, describe

_SETTINGS: tuple[Any, ...] = (
    torch.backends.cuda.matmul,
    torch.backends.mkldnn.matmul,  # type: ignore[attr-defined]
)

_LOCK = threading.Lock()

_depth = 0

_before: list[tuple[Any, str]] = []


def check_map(function: str, name: str, x: object) -> None:
    """Raise unless it is a [B, N, D] or [B, D, H, W] tensor; see `check_tensor`."""
    check_tensor(function, name, x)
    assert isinstance(x, Tensor)
    if x.ndim not in (3, 4):
        raise ValueError(
            f"{function}: {name} must be [B, N, D] or [B, D, H, W], got {list(x.shape)}"
        )


def check_tensor(function: str, name: str, x: object) -> None:
    """Raise unless an operator can take it: a floating-point tensor outside of `torch.func`."""
    check_float(function, name, x)
    assert isinstance(x, Tensor)
    refuse_transforms(function, x)


def check_float(function: str, name: str, x: object) -> None:
    """Raise a TypeError unless it is a dense floating-point tensor of 16 bits or more."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{function}: {name} must be a tensor, got {describe(x)}")
    if not x.is_floating_point():
        raise TypeError(f"{function}: {name} must have a float dtype, got {x.dtype}")
    if x.itemsize < 2:  # torch promotes none of float8
        raise TypeError(f"{function}: {name} must have at least 16 bits a value, got {x.dtype}")
    if x.layout != torch.strided or x.is_nested:
        kind = "a nested tensor" if x.is_nested else x.layout
        raise TypeError(f"{function}: {name} must be a dense tensor, got {kind}")


def check_flag(function: str, name: str, value: object) -> None:
    """Raise unless it is True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{function}: {name} must be True or False, got {describe(value)}")


def check_choice(function: str, name: str, value: object, choices: Sequence[str]) -> None:
    """Raise unless it is one of the choices."""
    if not isinstance(value, str) or value not in choices:
        raise ValueError(
            f"{function}: {name} must be one of {tuple(choices)}, got {describe(value)}"
        )


def levels_of(function: str, q: object, name: str = "q") -> tuple[float, ...]:
    """Get parts of an energy, in (0, 1], as a tuple, be it one or several."""
    if isinstance(q, Tensor):
        q = q.tolist()
    given = tuple(q) if isinstance(q, Iterable) and not isinstance(q, str) else (q,)
    for level in given:
        check_number(function, name, level)
    levels = tuple(map(float, given))
    if not levels or not all(0 < level <= 1 for level in levels):
        raise ValueError(f"{function}: {name} must be in (0, 1], got {list(levels)}")
    return levels


def check_pair(function: str, names: tuple[str, str], student: Tensor, teacher: Tensor) -> None:
    """Refuse maps on different devices, of different kinds, or without tokens or channels."""
    if student.device != teacher.device:
        raise ValueError(
            f"{function}: {names[1]} must be on {student.device} like {names[0]}, "
            f"got {teacher.device}"
        )
    if student.ndim != teacher.ndim:
        raise ValueError(
            f"{function}: {names[0]} and {names[1]} must both be [B, N, D] or both [B, D, H, W], "
            f"got {list(student.shape)} and {list(teacher.shape)}"
        )
    if 0 in student.shape[1:] or 0 in teacher.shape[1:]:
        raise ValueError(
            f"{function}: only the batch may be empty, "
            f"got {list(student.shape)} and {list(teacher.shape)}"
        )


def grid_of(function: str, x: Tensor, grid: tuple[int, int] | None, rows: bool) -> tuple[int, int]:
    """The grid (H, W) of a map; without ``rows``, tokens without a grid are one row."""
    if grid is not None:
        listed = isinstance(grid, tuple | list)
        if not listed or [isinstance(n, int | torch.SymInt) for n in grid] != [True, True]:
            error, got = (ValueError, grid) if listed else (TypeError, describe(grid))
            raise error(f"{function}: grid must be (H, W), two integers, got {got}")
    if x.ndim == 4:
        if grid is not None and tuple(grid) != tuple(x.shape[2:]):
            raise ValueError(
                f"{function}: grid {tuple(grid)} does not match maps of {tuple(x.shape[2:])}"
            )
        return x.shape[2], x.shape[3]
    tokens = x.shape[1]
    if grid is None:
        side = round(tokens**0.5)  # not isqrt, which torch.compile cannot trace
        if rows and side * side != tokens:
            raise ValueError(
                f"{function}: loss='spectral' needs grid=(H, W) for {tokens} tokens, which are no "
                "square (a CLS token left in?)"
            )
        grid = (side, side) if rows else (1, tokens)
    if grid[0] * grid[1] != tokens or min(grid) < 1:
        raise ValueError(f"{function}: grid {tuple(grid)} does not match {tokens} tokens")
    return grid


def as_map(x: Tensor, grid: tuple[int, int]) -> Tensor:
    """[B, N, D] or [B, D, H, W] as a [B, H, W, D] view."""
    return x.permute(0, 2, 3, 1) if x.ndim == 4 else x.unflatten(1, grid)


def refuse_transforms(function: str, x: Tensor) -> None:
    """Refuse a tensor inside `torch.func` or with a tangent, which custom operators cannot take."""
    if torch.compiler.is_compiling():
        return
    if forward_ad._current_level >= 0 and forward_ad.unpack_dual(x).tangent is not None:
        # The result's tangent would silently be zero.
        raise NotImplementedError(
            f"{function}: has no forward-mode derivative (torch.func.jvp, "
            "torch.autograd.forward_ad); differentiate in reverse mode"
        )
    if torch._C._functorch.is_functorch_wrapped_tensor(x):
        raise NotImplementedError(
            f"{function}: torch.func's transforms (grad, vmap, ...) are not supported; take "
            "torch.autograd, and leading dimensions for batches"
        )


def tensors_of(inputs: Iterable[Any]) -> Iterator[Tensor]:
    """The tensors among arguments, and in their dataclasses."""
    for x in inputs:
        if isinstance(x, Tensor):
            yield x
        elif is_dataclass(x):
            yield from tensors_of(vars(x).values())


def wide_dtype(*tensors: Tensor) -> torch.dtype:
    """float64 if one of the tensors is, else float32."""
    return torch.float64 if any(x.dtype == torch.float64 for x in tensors) else torch.float32


def at_least_float32(tensor: Tensor) -> Tensor:
    """Half precision to float32, float32 and float64 as they are."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def power_of_two(x: Tensor) -> Tensor:
    """The largest that is no larger than a positive x; 1 for 0, NaN where x is not finite."""
    # A quotient that is a power of two is exact; torch.exp2 need not be.
    return (x / (2 * torch.frexp(x).mantissa)).masked_fill(x == 0, 1.0)


def in_float64(tensor: Tensor) -> Tensor:
    """Bring a tensor to float64: on its device, or on the CPU where that has none (``"mps"``)."""
    # Moved first, since a conversion on the way could be made on either device.
    return (tensor.cpu() if tensor.device.type == "mps" else tensor).double()


@contextmanager
def exact_float32() -> Iterator[None]:
    """Keep float32 matrix products in float32 inside the block.

    torch's settings are the process': they come back when the last thread has left its block. A
    product's setting that only followed ``torch.backends.fp32_precision`` follows it again.
    """
    global _depth
    with _LOCK:
        if _depth == 0:
            inexact = [setting for setting in _SETTINGS if setting.fp32_precision != "ieee"]
            _before[:] = [(setting, _own_precision(setting)) for setting in inexact]
            for setting in inexact:
                setting.fp32_precision = "ieee"
        _depth += 1
    try:
        yield
    finally:
        with _LOCK:
            _depth -= 1
            if _depth == 0:
                for setting, precision in _before:
                    setting.fp32_precision = precision


def _own_precision(setting: Any) -> str:
    """What has been set for products themselves, ``"none"`` where a wider setting decides.

    A setting reads as what is in force; only a look without its own can tell the two apart.
    """
    in_force: str = setting.fp32_precision
    setting.fp32_precision = "none"
    return "none" if setting.fp32_precision == in_force else in_force
