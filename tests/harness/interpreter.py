"""Runs functions in a process where Triton interprets its kernels on CPU tensors.

The interpreter holds bfloat16 as integers: its own dots of them are silently wrong and its casts
truncate, so the worker replaces both. Its sums stay wrong: kernels must add in float32.

Triton decides between compiling and interpreting when a kernel is decorated, so both cannot live in
one process. The worker starts once and stays.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any


def _prepare() -> None:
    import numpy
    import torch

    from fastkd.ops import backend

    numpy.seterr(all="ignore")  # a GPU divides by zero in masked lanes without a word, too
    os.environ["FASTKD_SELF_CHECK"] = "0"  # slow here, and the tests compare more
    _mend_bfloat16()
    torch.set_num_threads(1)
    backend.EMULATED.add("triton")


def _mend_bfloat16() -> None:
    """Casts that round to nearest even, as a GPU's do, and dots of what the bits stand for."""
    import numpy
    import triton.language as tl
    from triton.runtime import interpreter

    convert = interpreter._convert_float
    multiply = interpreter.InterpreterBuilder.create_dot

    def widened(bits: Any) -> Any:
        return (bits.view(numpy.uint16).astype(numpy.uint32) << 16).view(numpy.float32)

    def rounded(values: Any) -> Any:
        bits = numpy.ascontiguousarray(values).view(numpy.uint32)
        nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return numpy.where(numpy.isnan(values), 0x7FC0, nearest).astype(numpy.uint16)

    def convert_float(values: Any, source: Any, target: Any, rounding: Any) -> Any:
        if (source, target) == (tl.float32, tl.bfloat16):
            return rounded(values)
        if (source, target) == (tl.bfloat16, tl.float32):
            return widened(values)
        return convert(values, source, target, rounding)

    def operand(handle: Any) -> Any:
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        return interpreter.TensorHandle(widened(handle.data), tl.float32)

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return multiply(self, operand(a), operand(b), *rest)

    interpreter._convert_float = convert_float
    interpreter.InterpreterBuilder.create_dot = create_dot


@functools.cache
def _worker() -> ProcessPoolExecutor:
    os.environ["TRITON_INTERPRET"] = "1"
    try:
        pool = ProcessPoolExecutor(
            1, mp_context=multiprocessing.get_context("spawn"), initializer=_prepare
        )
        pool.submit(int).result()  # the process inherits the variable when it starts
    finally:
        del os.environ["TRITON_INTERPRET"]
    return pool


@functools.cache
def why_not() -> str | None:
    """Why Triton's interpreter is of no use here; None where it works."""
    try:
        import numpy
        import triton

        from tests.harness.interpreter_probe import probe

        if run_interpreted(probe) == 3:
            return None
        return "Triton's interpreter counts wrongly"
    except ImportError:
        return "triton is not installed"
    except Exception as error:  # triton 3.6 with numpy >= 2.4, for one
        versions = f"triton {triton.__version__} with numpy {numpy.__version__}"
        return f"Triton's interpreter does not work ({versions}): {error}"


def run_interpreted(function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """Call a module-level function in the interpreting process; arguments are copied there."""
    return _worker().submit(function, *arguments, **options).result()
