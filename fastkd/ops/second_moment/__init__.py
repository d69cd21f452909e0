"""`second_moment`: the sum over tokens of their outer products."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fastkd.ops import checks
from fastkd.ops.backend import Backend, Backends, Implementation, check_backend
from fastkd.ops.operator import operator
from fastkd.ops.second_moment import reference
from fastkd.ops.second_moment.reference import WEIGHTS, Weight
from fastkd.ops.self_check import Draw

__all__ = ["check_tokens", "second_moment"]


def second_moment(tokens: Tensor, weight: Weight = "none", *, backend: Backend = "auto") -> Tensor:
    r"""Sum of the tokens' outer products, uncentered.

    - ``"none"``: sum_t x_t x_t^T.
    - ``"row_norm"``: sum_t x_t x_t^T / \|\|x_t\|\|^2; a token of zeros counts as nothing. Its trace
      is the number of the other tokens.

    It is a sum, not a mean, and float64, so that it can be added up over batches. Products are
    summed in float32 over fixed stretches of tokens (float64 for float64 tokens), and the stretches
    in float64 in a fixed order: bitwise reproducible on one device. Float32 products never use
    TensorFloat-32 alone, whatever torch is set to. Allocates chunks of a few thousand tokens, or in
    a kernel up to 32 matrices [D, D] in up to 128 MB (one, if it is larger). Only the first call on
    a device model and dtype waits for the GPU, to check the kernel. It has no gradient: call it in
    `torch.no_grad`, or detach the tokens.

    Args:
        tokens: [..., D], any leading dimensions, any strides (a sliced-off class token costs no
            copy); float16, bfloat16, float32 or float64. A NaN or an infinity makes its rows and
            columns NaN or infinite, with ``"row_norm"`` everything NaN.
        weight: ``"none"``, where squares of float32 and bfloat16 tokens must be within float32's
            range, or ``"row_norm"``, which takes tokens of any size.
        backend: ``"auto"``, ``"triton"`` or ``"torch"``; see `fastkd.ops.backends`.

    Returns:
        [D, D] float64, exactly symmetric; zeros where there are no tokens.

    Raises:
        TypeError: ``tokens`` is no floating-point tensor.
        ValueError: it has no channels, requires a gradient, or ``weight`` is unknown.
        RuntimeError: ``backend`` names one that cannot run here, and why.
    """
    check_tokens("second_moment", tokens)
    checks.check_choice("second_moment", "weight", weight, WEIGHTS)
    check_backend("second_moment", backend)
    result: Tensor = _second_moment(reference.as_images(tokens), weight, backend)
    return result


def check_tokens(function: str, tokens: Tensor) -> None:
    """Raise unless they are [..., D] of a float dtype, of which no gradient is wanted."""
    checks.check_tensor(function, "tokens", tokens)
    if tokens.ndim == 0 or tokens.shape[-1] == 0:
        raise ValueError(
            f"{function}: tokens must be [..., D] with at least one channel, "
            f"got {list(tokens.shape)}"
        )
    if tokens.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            f"{function}: tokens must not require a gradient, as a measurement has none, got "
            "requires_grad=True (pass tokens.detach(), or call it in torch.no_grad())"
        )


# [B, N, D]: a tile and a step that are cut off; several of each; equal channels, whose parts of a
# norm are the smallest there are; and sums as long as they get, which only tensor cores cut off.
EXAMPLE_SHAPES = ((2, 5, 24), (3, 197, 136), (1, 5, 768), (32, 1024, 72))


def _example(run: Implementation, draw: Draw, tokens: Tensor, weight: str) -> Iterator[Any]:
    for shape in EXAMPLE_SHAPES if tokens.is_cuda else EXAMPLE_SHAPES[:-1]:
        drawn = draw(*shape, like=tokens)
        if shape[-1] == 768:
            drawn = draw.rounded(1.7 * drawn.sign(), tokens.dtype)
        yield "value", run.forward(drawn, weight)


def _implementations() -> dict[str, Implementation]:
    implementations = {"torch": Implementation(reference.forward)}
    if importlib.util.find_spec("triton") is not None:
        from fastkd.ops.second_moment import triton

        implementations["triton"] = Implementation(
            triton.forward, refuses=triton.refuses, proven=False
        )
    return implementations


BACKENDS = Backends(
    "second_moment", _implementations(), ("triton", "torch"), ("tokens", "weight"), _example
)


@operator("second_moment", BACKENDS)
def _second_moment(tokens: Tensor, weight: str) -> Tensor:
    return tokens.new_empty((tokens.shape[-1],) * 2, dtype=torch.float64)
