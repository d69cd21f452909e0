"""Runs every kernel of a backend on small odd shapes, to be watched by compute-sanitizer.

compute-sanitizer --tool memcheck python bench/sanitize.py
"""

from __future__ import annotations

import argparse

import torch

from fastkd.ops import feature_kd, lift_kd, second_moment, spectral_ranks
from fastkd.ops.feature_kd.reference import LOSSES
from fastkd.ops.lift_kd import cuda

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


def run_lift_kd(device: str, backend: str) -> int:
    """The paper's widths, tokens that fill no tile, every loss, both forms.

    On few multiprocessors, so that small inputs take every loop more than once.
    """
    cuda.MAX_BLOCKS, cuda.SLOPE_BYTES = 2, 1 << 16
    runs = 0
    widths = [(192, 384)] if backend == "cuda" else [(192, 384), (300, 72)]
    for batch, height, width in ((3, 5, 7), (2, 14, 14), (20, 1, 1)):
        for narrow, wide in widths:
            for loss in LOSSES:
                for dtype in (torch.float16, torch.bfloat16):
                    for pool in (False, True):
                        tokens = torch.randn(batch, height * width, narrow, device=device)
                        teacher = torch.randn(batch, height * width, wide, device=device)
                        tokens, teacher = tokens.to(dtype), teacher.to(dtype)
                        weight = torch.randn(wide, narrow, device=device)
                        vectors = [torch.randn(wide, device=device) for _ in range(3)]
                        leaves = [x.requires_grad_() for x in (tokens, weight, *vectors)]
                        result = lift_kd(
                            tokens, weight, teacher, *vectors,
                            loss=loss, grid=(height, width), pool=pool, backend=backend,
                        )  # fmt: skip
                        total = result[0] + result[1].sum() if pool else result
                        torch.autograd.grad(total, leaves)
                        runs += 1
    return runs


def run_spectrum(device: str, backend: str) -> int:
    """Every size class of the kernel at its ends, a matrix of zeros and one that is not finite."""
    if backend == "triton":
        return 0
    sizes = (1, 2, 31, 32, 33, 49, 64, 65, 128, 129, 192, 193, 196, 197, 208, 209, 256, 257)
    for size in sizes:
        tokens = torch.randn(4, size, size + 3, device=device)
        tokens[1] = 0
        tokens[2, 0, 0] = torch.nan
        spectral_ranks(tokens, backend=backend)
    return len(sizes)


def run_second_moment(device: str, backend: str) -> int:
    """Whole tiles and cut ones, with and without a class token sliced off."""
    if backend == "cuda":
        return 0
    runs = 0
    for batch, tokens_each, channels in ((2, 5, 24), (3, 197, 136), (40, 197, 219)):
        for weight in ("none", "row_norm"):
            for dtype in (torch.float32, torch.float16, torch.bfloat16):
                tokens = torch.randn(batch, tokens_each, channels, device=device).to(dtype)
                for view in (tokens, tokens[:, 1:]):
                    second_moment(view, weight, backend=backend)
                    runs += 1
    return runs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--backend", help="cuda or triton; by default cuda on a GPU, else torch")
    options = parser.parse_args()
    backend = options.backend or ("cuda" if options.device == "cuda" else "torch")
    for operator in (run_lift_kd, run_spectrum, run_feature_kd, run_second_moment):
        name = operator.__name__.removeprefix("run_")
        runs = operator(options.device, backend)
        print(f"{name}: {runs} runs on backend {backend!r}", flush=True)


if __name__ == "__main__":
    main()
