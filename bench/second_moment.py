"""second_moment and sep: products and FFTs in eager PyTorch, torch.compile, and ours.

python bench/second_moment.py --output bench/results/second_moment_cpu.json
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import harness
import torch
import torch.nn.functional as F
from torch import Tensor

from fastkd.ops import backends
from fastkd.ops.second_moment import second_moment
from fastkd.ops.sep import sep

Measure = Callable[[Tensor], Any]


def moment_in(dtype: torch.dtype, weight: str) -> Measure:
    """The second moment as everybody writes it, in a dtype."""

    def measure(tokens: Tensor) -> Tensor:
        rows = tokens.flatten(0, 1).to(dtype)
        if weight == "row_norm":
            rows = F.normalize(rows, dim=-1)
        return rows.mT @ rows

    return measure


def fft_per_token(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and std of the full-order curve, as the paper defines them."""
    energy = torch.fft.fft(tokens.flatten(0, 1).float()).abs().square()
    curves = energy.cumsum(dim=-1) / energy.sum(dim=-1, keepdim=True)
    return curves.mean(dim=0), curves.std(dim=0, correction=0)


def rfft_per_token(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """The same from the half spectrum, mirrored: the strongest plain PyTorch form."""
    half = torch.view_as_real(torch.fft.rfft(tokens.flatten(0, 1).float())).square().sum(dim=-1)
    paired = half[:, 1 : (tokens.shape[-1] + 1) // 2]
    curves = torch.cat([half, paired.flip(-1)], dim=-1).cumsum(dim=-1)
    curves = curves / curves[:, -1:]
    return curves.mean(dim=0), curves.std(dim=0, correction=0)


def rfft_mean(tokens: Tensor) -> Tensor:
    """The mean alone: cumulated after the mean over tokens."""
    half = torch.view_as_real(torch.fft.rfft(tokens.flatten(0, 1).float())).square().sum(dim=-1)
    paired = half[:, 1 : (tokens.shape[-1] + 1) // 2]
    total = half.sum(dim=-1) + paired.sum(dim=-1)
    mean = (half / total[:, None]).mean(dim=0)
    return torch.cat([mean, mean[1 : 1 + paired.shape[1]].flip(0)]).cumsum(dim=0)


def baselines(kind: str, dtype: torch.dtype) -> dict[str, Measure]:
    if kind == "sep mean":
        return {"rfft per token": rfft_mean, "torch.compile of it": compiled(rfft_mean)}
    if kind == "sep mean and std":
        return {
            "fft per token": fft_per_token,
            "rfft per token": rfft_per_token,
            "torch.compile of it": compiled(rfft_per_token),
        }
    weight = kind.removeprefix("moment ")
    float32 = moment_in(torch.float32, weight)
    found = {
        "eager float64": moment_in(torch.float64, weight),
        "eager float32": float32,
        "torch.compile of it": compiled(float32),
    }
    if dtype != torch.float32:  # wrong by 1e-3, and shown all the same
        found["eager, in half precision"] = moment_in(dtype, weight)
    return found


def compiled(measure: Measure) -> Measure:
    return torch.compile(measure, dynamic=False)


def ours(kind: str, backend: str) -> Measure:
    if kind.startswith("sep"):
        return lambda tokens: sep(tokens, std=kind.endswith("std"), backend=backend)
    weight = kind.removeprefix("moment ")
    return lambda tokens: second_moment(tokens, weight, backend=backend)


def case(kind: str, shape: tuple[int, int, int], dtype: torch.dtype, device: str) -> harness.Case:
    tokens = torch.randn(shape, device=device).to(dtype)
    providers = [
        harness.Provider(name, lambda run=run: run(tokens), True)
        for name, run in baselines(kind, dtype).items()
    ]
    for backend, reason in backends(device).items():
        if reason is None and backend != "cuda":  # there are no kernels in CUDA C++
            run = ours(kind, backend)
            providers.append(harness.Provider(f"fastkd ({backend})", lambda run=run: run(tokens)))
    channels = shape[2]
    return harness.Case(
        f"{kind} {list(shape)} {str(dtype).removeprefix('torch.')}",
        # tokens are read once, the moment is written in float64
        tokens.nbytes + 8 * channels**2,
        providers,
        # the upper triangle of the products
        tokens.shape[:2].numel() * channels * (channels + 1),
        dtype,
    )


def cases(options: Any) -> list[harness.Case]:
    device = options.device
    if options.smoke:
        shapes, dtypes = [(2, 16, 24)], [torch.float32]
    elif options.quick:
        shapes, dtypes = [(512, 196, 384)], [torch.bfloat16]
    elif device == "cuda":
        shapes = [(512, 196, channels) for channels in (192, 384, 768)]
        dtypes = [torch.bfloat16, torch.float32]
    else:
        shapes = [(64, 196, channels) for channels in (192, 384, 768)]
        dtypes = [torch.float32]
    kinds = ("moment none", "moment row_norm", "sep mean", "sep mean and std")
    return [
        case(kind, shape, dtype, device) for shape in shapes for dtype in dtypes for kind in kinds
    ]


def main() -> None:
    options = harness.arguments(__doc__.splitlines()[0], quick=True).parse_args()
    harness.run("second_moment", cases(options), options)


if __name__ == "__main__":
    main()
