"""Runs functions in a process where Triton interprets its kernels on CPU tensors.

bfloat16 can be trusted here only in kernels that convert to float32 before they add or multiply:
the interpreter's own bfloat16 sums are silently wrong, and its stores truncate. So are its bfloat16
dots, which the worker therefore replaces.

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
    _mend_bfloat16_dots()
    torch.set_num_threads(1)
    backend.EMULATED.add("triton")


def _mend_bfloat16_dots() -> None:
    """Widen bfloat16 operands, which the interpreter holds as integers, before it multiplies."""
    import numpy
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    multiply = InterpreterBuilder.create_dot

    def widened(handle: Any) -> Any:
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        bits = handle.data.astype(numpy.uint32) << 16
        return TensorHandle(bits.view(numpy.float32), tl.float32)

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return multiply(self, widened(a), widened(b), *rest)

    InterpreterBuilder.create_dot = create_dot


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
