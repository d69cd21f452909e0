"""The smallest kernel with a runtime loop: does Triton's interpreter work here at all?"""

import torch
import triton
import triton.language as tl


@triton.jit
def _count(result, steps):
    total = 0
    for _ in range(0, steps):
        total += 1
    tl.store(result, total)


def probe() -> int:
    """3, counted by a kernel; to be run in the interpreter's process."""
    result = torch.zeros(1, dtype=torch.int32)
    _count[(1,)](result, 3)
    return int(result)
