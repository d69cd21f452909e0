"""Operators: fused functions of tensors. They know nothing of models.

Each lives in a folder of its own: the function a user calls and its declaration to torch
(``__init__.py``), the specification in plain PyTorch (``reference.py``), and its kernels
(``triton.py``; ``cuda.py`` with csrc).
"""

from fastkd.ops.backend import backends
from fastkd.ops.feature_kd import feature_kd
from fastkd.ops.lift_kd import lift, lift_kd

__all__ = ["backends", "feature_kd", "lift", "lift_kd"]
