"""Compiles Triton launches for GPUs that are not there and reads what they would need."""

from __future__ import annotations

import functools
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from fastkd.ops.operator import KernelLaunch

_slow, _nightly = pytest.mark.slow, pytest.mark.nightly
ARCHS = (
    pytest.param(80, marks=_slow),
    90,
    pytest.param(100, marks=[_slow, _nightly]),
)  # to parametrize over
SHARED_BYTES = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # that a program can have
_VECTOR_LOAD = re.compile(r"ld\.global[\w.:]*?(?:\.v(\d))?\.[bfsu](\d+)")
_ASYNC_COPY = re.compile(r"cp\.async\.c[ag]\.shared\.global.*?, (0x[0-9a-f]+|\d+)")
_TYPES = {
    torch.float64: "*fp64",
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
}
_DIVISIBLE = [["tt.divisibility", 16]]


@dataclass(frozen=True)
class Compiled:
    """What a kernel needs on one architecture.

    Attributes:
        shared: bytes of shared memory per program.
        ptx: the assembly, to look for instructions in.
        cubin: the machine code.
    """

    shared: int
    ptx: str
    cubin: bytes

    @property
    def registers(self) -> int:
        """Registers per thread."""
        return _resources(self.cubin)[0]

    @property
    def stack(self) -> int:
        """Bytes of local memory per thread; above 0: a spill or an indexed array."""
        return _resources(self.cubin)[1]

    @property
    def load_bytes(self) -> int:
        """Bytes of the widest load from global memory that a thread makes; bulk copies: 128."""
        if "cp.async.bulk" in self.ptx:
            return 128
        loads = [int(v or 1) * int(bits) // 8 for v, bits in _VECTOR_LOAD.findall(self.ptx)]
        copies = [int(size, 0) for size in _ASYNC_COPY.findall(self.ptx)]
        return max([0, *loads, *copies])


def compile_launch(launch: KernelLaunch, arch: int) -> Compiled:
    """Compile a launch as it would be specialised for its actual arguments.

    Args:
        launch: with tensors on any device, also ``"meta"``.
        arch: compute capability times ten: 80, 90 or 100.

    Returns:
        Its resource usage and PTX.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = launch.kernel.arg_names
    general = {param.name for param in launch.kernel.params if param.do_not_specialize}
    signature: dict[str, str] = {}
    constants = dict(launch.constants)
    attributes = {}
    for place, name in enumerate(names):
        if name in constants:
            signature[name] = "constexpr"
            continue
        value = launch.arguments[name]
        if isinstance(value, torch.Tensor):
            signature[name] = _TYPES[value.dtype]
            if value.storage_offset() * value.element_size() % 16 == 0:
                attributes[(place,)] = _DIVISIBLE
        elif isinstance(value, float):
            signature[name] = "fp32"
        elif value == 1 and name not in general:
            signature[name], constants[name] = "constexpr", 1
        else:
            signature[name] = "i32" if abs(value) < 2**31 else "i64"
            if value % 16 == 0 and name not in general:
                attributes[(place,)] = _DIVISIBLE
    source = ASTSource(launch.kernel, signature, constants, attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=launch.options)
    return Compiled(compiled.metadata.shared, compiled.asm["ptx"], compiled.asm["cubin"])


@functools.cache
def _resources(cubin: bytes) -> tuple[int, int]:
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = subprocess.check_output([tool, "--dump-resource-usage", file.name], text=True)
    registers, stack, local = (
        int(re.search(rf"{key}:(\d+)", usage).group(1)) for key in ("REG", "STACK", "LOCAL")
    )
    return registers, max(stack, local)
