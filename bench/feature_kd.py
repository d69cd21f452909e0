"""feature_kd, forward + backward: eager, SpectralKD's rfft2 formulation, torch.compile, and ours.

python bench/feature_kd.py --output bench/results/feature_kd_cpu.json
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import harness
import torch
import torch.nn.functional as F
from torch import Tensor

from fastkd.ops import backends, feature_kd

Loss = Callable[[Tensor, Tensor], Tensor]


def rfft2_formulation(student: Tensor, teacher: Tensor) -> Tensor:
    """SpectralKD as published: the MSE of stacked real and imaginary parts, [B, C, H, W]."""
    # half-precision FFTs need power-of-two grids
    spectra = [torch.fft.rfft2(x.float(), norm="ortho") for x in (student, teacher)]
    stacked = [torch.stack((spectrum.real, spectrum.imag), dim=-1) for spectrum in spectra]
    return F.mse_loss(*stacked)


def eager_spectral(student: Tensor, teacher: Tensor) -> Tensor:
    """The same without an FFT, left to autograd: the strongest plain PyTorch form."""
    d = (student - teacher).float()
    batch, channels, height, width = d.shape
    halves = 2 if width % 2 == 0 else 1
    rows = d.unflatten(3, (width // halves, halves)).sum(dim=3)
    total = d.square().sum() + rows.square().sum() * (halves / width)
    return total / (4 * batch * channels * height * (width // 2 + 1))


def eager_cosine(student: Tensor, teacher: Tensor) -> Tensor:
    return 1 - F.cosine_similarity(student.float(), teacher.float(), dim=1).mean()


EAGER: dict[str, Loss] = {
    "mse": lambda s, t: F.mse_loss(s.float(), t.float()),
    "smooth_l1": lambda s, t: F.smooth_l1_loss(s.float(), t.float()),
    "spectral": eager_spectral,
    "cosine": eager_cosine,
}

RAW: dict[str, Loss] = {"mse": F.mse_loss, "smooth_l1": F.smooth_l1_loss}


def step(loss: Loss, student: Tensor, teacher: Tensor) -> Callable[[], object]:
    return lambda: torch.autograd.grad(loss(student, teacher), student)


def case(
    loss: str,
    shape: tuple[int, ...],
    layout: str,
    dtype: torch.dtype,
    device: str,
    tune: bool = False,
) -> harness.Case:
    """One loss on one [B, C, H, W] shape.

    ``layout`` is how it lies in memory; ``tune`` adds max-autotune, which compiles slowly.
    """
    memory = torch.channels_last if layout == "tokens" else torch.contiguous_format
    student, teacher = (
        torch.randn(shape, device=device).to(dtype).contiguous(memory_format=memory)
        for _ in range(2)
    )
    student.requires_grad_()
    # forward: read both; backward: read both, write the gradient
    traffic = 5 * student.numel() * student.element_size()
    name = f"{loss} {list(shape)} {str(dtype).removeprefix('torch.')}, {layout}"
    baselines = {"eager": EAGER[loss]}
    if dtype != torch.float32 and loss in RAW:
        baselines["eager, in half precision"] = RAW[loss]
    if loss == "spectral":
        baselines["rfft2 formulation"] = rfft2_formulation
    baselines["torch.compile"] = torch.compile(EAGER[loss], dynamic=False)
    if tune:
        mode = "max-autotune-no-cudagraphs"  # the harness captures the graph
        baselines["torch.compile, max-autotune"] = torch.compile(
            EAGER[loss], dynamic=False, mode=mode
        )
    providers = [
        harness.Provider(name, step(baseline, student, teacher), True)
        for name, baseline in baselines.items()
    ]
    for backend, reason in backends(device).items():
        if reason is None:
            ours = step(lambda s, t, b=backend: feature_kd(s, t, loss, backend=b), student, teacher)
            providers.append(harness.Provider(f"fastkd ({backend})", ours))
    return harness.Case(name, traffic, providers)


def cases(options: Any) -> list[harness.Case]:
    device, layouts = options.device, ("channels first", "tokens")
    if options.smoke:
        shapes, dtypes = [(2, 16, 4, 4)], [torch.float32]
    elif options.quick:
        shapes, dtypes, layouts = [(512, 384, 14, 14)], [torch.bfloat16], ("tokens",)
    elif device == "cuda":
        shapes = [(256, 384, 14, 14), (512, 384, 14, 14), (512, 768, 7, 7)]
        dtypes = [torch.bfloat16, torch.float32]
    else:
        shapes, dtypes = [(64, 384, 14, 14)], [torch.float32]
    tune = device == "cuda" and not options.quick
    return [
        case(loss, shape, layout, dtype, device, tune)
        for shape in shapes
        for dtype in dtypes
        for loss in EAGER
        for layout in layouts
    ]


def main() -> None:
    options = harness.arguments(__doc__.splitlines()[0], quick=True).parse_args()
    harness.run("feature_kd", cases(options), options)


if __name__ == "__main__":
    main()
