"""Answers of the operators in operators.py, the truth, and how far apart they may be."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from tests.harness.cases import (
    MAP_LAYOUTS,
    cosine,
    laid_out,
    nearest_dtype_error,
    relative_error,
    signed_bias,
)
from tests.ops.operators import OPERATORS, Tensors, measure


@functools.cache
def inputs_of(name: str, shape: str, case: str, dtype: torch.dtype, layout: str) -> Tensors:
    operator = OPERATORS[name]
    inputs = operator.draw(operator.shapes[shape], operator.cases[0] if case == "noise" else case)
    grid = operator.shapes[shape][1:3] if layout in MAP_LAYOUTS else (1, -1)
    for key in inputs if dtype == torch.float64 else (*operator.maps, *operator.parameters):
        inputs[key] = inputs[key].to(dtype)
    for key in operator.maps if layout != "tokens" else ():
        x = inputs[key]
        if x.ndim == 2:
            inputs[key] = laid_out(x[:, None, None], layout)[:, 0]
        else:
            inputs[key] = laid_out(x.unflatten(1, grid), layout)
    return inputs


def options_of(name: str, variant: str, shape: str = "small", layout: str = "tokens") -> dict:
    operator = OPERATORS[name]
    grid = operator.takes_grid and layout not in MAP_LAYOUTS
    return operator.variants[variant] | ({"grid": operator.shapes[shape][1:3]} if grid else {})


def answer(backend, name, inputs, options, **how):
    """Results and gradients, computed where the backend works, on the CPU."""
    inputs = {key: x.to(backend.device) for key, x in inputs.items()}
    results, gradients, written = backend.call(
        measure, name, inputs, options, backend=backend.name, **how
    )
    assert not written, f"written to: {written}"
    on_cpu = {key: None if x is None else x.cpu() for key, x in gradients.items()}
    return [x.cpu() for x in results], on_cpu


@functools.cache
def found(backend, name, variant, shape="small", case="noise", dtype=torch.float32, layout="tokens",
          **how):  # fmt: skip
    """`answer` to inputs of the table."""
    inputs = inputs_of(name, shape, case, dtype, layout)
    options = options_of(name, variant, shape, layout)
    try:
        return answer(backend, name, inputs, options, **how)
    except RuntimeError as error:
        if "cannot run" in str(error) and (shape, case, layout) != ("small", "noise", "tokens"):
            pytest.skip(str(error))
        raise


@functools.cache
def truth(name, variant, shape="small", case="noise", dtype=torch.float32, layout="tokens",
          precision=torch.float64, **how):  # fmt: skip
    """`by_reference` of inputs of the table, as they are in ``dtype``."""
    inputs = inputs_of(name, shape, case, dtype, layout)
    return by_reference(name, inputs, options_of(name, variant, shape, layout), precision, **how)


def by_reference(name, inputs, options, precision, **how):
    """Results, gradients, and what the value is made of, in ``precision``."""
    operator = OPERATORS[name]
    inputs = {key: x.to(precision) for key, x in inputs.items()}
    made_of = operator.products
    made_of = made_of and made_of(**{k: x.detach() for k, x in inputs.items()}, **options)
    return *operator.run(inputs, options, **how), made_of


def usual(name: str, backend) -> torch.dtype:
    """A dtype that the backend takes: CUDA C++ multiplies operands of half precision only."""
    half = OPERATORS[name].products is not None and backend.name == "cuda"
    return torch.bfloat16 if half else torch.float32


def compare(
    backend, name, variant, shape="small", case="noise", dtype=None, layout="tokens", **how
):
    """An operator's answer to inputs of the table with the truth."""
    dtype = usual(name, backend) if dtype is None else dtype
    key = (name, variant, shape, case, dtype, layout)
    references = [truth(*key, precision=x, **how) for x in precisions(name, dtype)]
    inputs = inputs_of(name, *key[2:])
    check(name, inputs, OPERATORS[name].variants[variant], found(backend, *key, **how), references)


def right(backend, name, inputs, options, **how):
    """An operator's answer, which must be as right as `check` asks for."""
    dtype = inputs[OPERATORS[name].maps[0]].dtype
    ours = answer(backend, name, inputs, options, **how)
    references = [by_reference(name, inputs, options, x, **how) for x in precisions(name, dtype)]
    check(name, inputs, options, ours, references)
    return ours


def precisions(name: str, dtype: torch.dtype) -> tuple[torch.dtype, ...]:
    """Of the truth, of eager PyTorch, and of single precision."""
    multiplies = OPERATORS[name].products is not None or dtype == torch.float64
    return torch.float64, dtype if multiplies else torch.float32, torch.float32


def check(name, inputs, options, ours, references) -> None:
    """Compare with the truth.

    Results are as right as float32 whatever the dtype, gradients as eager PyTorch in float32,
    rounded. Operators that multiply in the dtype of the maps: as eager PyTorch in that dtype,
    within twice its error.
    """
    operator = OPERATORS[name]
    dtype = inputs[operator.maps[0]].dtype
    results, gradients = ours
    exact, eager, single = references
    assert dtypes_of(results) == expected_dtypes(name, dtype, len(results))
    allowed = [operator.tolerance] * len(results)
    if dtype == torch.float64:
        allowed = [operator.exact] * len(results)
    elif operator.products is not None:
        plain, floors = ([*map(relative_error, x[0], exact[0])] for x in (eager, single))
        if results[0].ndim == 0:
            plain[0], floors[0] = (relative_error(x[2], exact[2]) for x in (eager, single))
        allowed = [limit_of(dtype, *pair) for pair in zip(plain, floors)]
    elif operator.as_eager:
        allowed = [max(operator.tolerance, 4 * e) for e in operator.errors(single[0], exact[0])]
    absolute = operator.absolute.get(options.get("loss"), 0.0)
    for place, error in enumerate(operator.errors(results, exact[0])):
        size = exact[0][place].abs().item() if absolute else 0.0
        assert error <= allowed[place] + absolute / (size or 1.0), f"result {place}"
    for key, gradient in gradients.items():
        true = exact[1][key]
        assert gradient.shape == true.shape and gradient.dtype == inputs[key].dtype
        if true.norm() < 1e-9:  # zero but for rounding
            assert gradient.abs().max() < 1e-6
            continue
        plain, floor = relative_error(eager[1][key].to(gradient.dtype), true), single[1][key]
        rounded_in = gradient.dtype if operator.products is None else dtype
        limit = limit_of(rounded_in, plain, relative_error(floor, true))
        assert relative_error(gradient, true) <= limit, f"gradient of {key}"
        if gradient.dtype == dtype:
            assert cosine(gradient, true) > 1 - 10 * limit
            assert signed_bias(gradient, true) <= limit


def limit_of(dtype: torch.dtype, plain: float, floor: float) -> float:
    if dtype == torch.float64:
        return 1e-12
    # float16 sums overflow in plain PyTorch, not here
    plain = 4 * torch.finfo(dtype).eps if plain != plain else plain
    return max(nearest_dtype_error(dtype, plain), 0.0 if floor != floor else 4 * floor)


def dtypes_of(results: list[Tensor]) -> list[torch.dtype]:
    return [x.dtype for x in results]


def expected_dtypes(name: str, dtype: torch.dtype, count: int) -> list[torch.dtype]:
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    named = {"wide": wide, "same": dtype}
    return [named.get(result, result) for result in OPERATORS[name].results[:count]]


def same_bits(first, second) -> None:
    for ours, theirs in zip((*first[0], *first[1].values()), (*second[0], *second[1].values())):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)


@contextmanager
def bfloat16_products() -> Iterator[None]:
    """Let torch multiply float32 operands as bfloat16."""
    setting = torch.backends.mkldnn.matmul
    before = setting.fp32_precision
    setting.fp32_precision = "bf16"
    try:
        yield
        assert setting.fp32_precision == "bf16"
    finally:
        setting.fp32_precision = before
