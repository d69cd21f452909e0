"""Runs every CUDA C++ kernel once on small odd shapes, to be watched by compute-sanitizer.

compute-sanitizer --tool memcheck python bench/sanitize.py
"""

from __future__ import annotations

import argparse

import torch

from fastkd.ops import feature_kd
from fastkd.ops.feature_kd.reference import LOSSES

# [B, H, W, Ds], Dt: whole packs, odd everything, pooled by two, pooled with overlapping windows
SHAPES = [((2, 4, 6, 16), 16), ((3, 5, 7, 33), 33), ((2, 3, 4, 20), 40), ((2, 3, 5, 20), 33)]


def run_feature_kd(device: str, backend: str) -> int:
    runs = 0
    for shape, teacher_channels in SHAPES:
        for loss in LOSSES:
            for dtype in (torch.float32, torch.float16, torch.bfloat16):
                student = torch.randn(shape, device=device).to(dtype).flatten(1, 2)
                teacher = torch.randn((*shape[:3], teacher_channels), device=device).to(dtype)
                teacher = teacher.flatten(1, 2)
                inputs = student.requires_grad_(), teacher.requires_grad_()
                options = {"grid": shape[1:3], "pool": "teacher", "backend": backend}
                feature_kd(*inputs, loss, **options).backward()
                runs += 1
    return runs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    options = parser.parse_args()
    backend = "cuda" if options.device == "cuda" else "torch"
    print(f"feature_kd: {run_feature_kd(options.device, backend)} runs on backend {backend!r}")


if __name__ == "__main__":
    main()
