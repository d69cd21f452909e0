"""spectrum: energies and ranks of many token matrices, against the library's decompositions.

python bench/spectrum.py --output bench/results/spectrum_cpu.json
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import harness
import numpy as np
import torch
from torch import Tensor

from fastkd.ops import backends, rank_at, spectral_ranks, spectrum
from fastkd.ops.spectrum import LARGEST

LEVELS = (0.80, 0.90, 0.95, 0.99)


def svdvals(x: Tensor) -> Tensor:
    """Energies as a user writes them first."""
    return torch.linalg.svdvals(x.float()).square()


def eigvalsh(x: Tensor) -> Tensor:
    """Energies as eigenvalues of the smaller Gram matrix, which the library solves in batches."""
    x = x.float()
    gram = x @ x.mT if x.shape[1] <= x.shape[2] else x.mT @ x
    return torch.linalg.eigvalsh(gram).flip(-1).clamp_min(0)


def numpy_svd(x: Tensor) -> np.ndarray:
    """One decomposition with vectors after the other, as the paper's released scripts do it."""
    return np.stack([np.linalg.svd(image, full_matrices=False)[1] for image in x.float().numpy()])


def rank_case(
    shape: tuple[int, int, int], dtype: torch.dtype, device: str, svd: bool = True
) -> harness.Case:
    """Ranks at four thresholds; ``svd`` compares with svdvals, a slow loop on GPUs."""
    x = torch.randn(shape, device=device).to(dtype)
    size = min(shape[1:])
    providers = []
    if device == "cpu":
        decomposed = lambda: numpy_svd(x)  # noqa: E731
        providers.append(harness.Provider("numpy.linalg.svd, with vectors", decomposed, True))
    library = {"torch.linalg.svdvals": svdvals, "bmm + eigvalsh": eigvalsh}
    for name, energies in library.items():
        if name.endswith("svdvals") and not svd:
            continue
        run = lambda energies=energies: rank_at(energies(x), LEVELS)  # noqa: E731
        providers.append(harness.Provider(name, run, baseline=True, capturable=False))
    for backend in usable(size, device):
        run = lambda backend=backend: spectral_ranks(x, LEVELS, backend=backend)  # noqa: E731
        captured = backend == "cuda"
        providers.append(harness.Provider(f"fastkd ({backend})", run, capturable=captured))
    return harness.Case(
        f"ranks, {list(shape)} {str(dtype).removeprefix('torch.')}",
        # tokens read once; the Gram matrices written and read
        x.nbytes + 2 * 4 * shape[0] * size * size,
        providers,
        flops=2 * shape[0] * size * size * max(shape[1:]),
        dtype=dtype,
    )


def gradient_case(shape: tuple[int, int, int], device: str) -> harness.Case:
    """Forward and backward of a loss on the spectrum."""
    x = torch.randn(shape, device=device, requires_grad=True)

    def step(energies: Callable[[Tensor], Tensor]) -> Callable[[], object]:
        return lambda: torch.autograd.grad(energies(x).sqrt().sum(), x)

    providers = [
        harness.Provider("torch.linalg.svdvals", step(svdvals), True, capturable=False),
        harness.Provider("bmm + eigvalsh", step(eigvalsh), True, capturable=False),
    ]
    for backend in usable(min(shape[1:]), device):
        ours = step(lambda x, b=backend: spectrum(x, backend=b))
        providers.append(harness.Provider(f"fastkd ({backend})", ours, capturable=False))
    traffic = 3 * x.nbytes + 4 * 4 * shape[0] * min(shape[1:]) ** 2
    return harness.Case(f"gradient, {list(shape)} float32", traffic, providers)


def usable(size: int, device: str) -> list[str]:
    """Backends of this operator that run here."""
    names = [n for n, reason in backends(device).items() if reason is None and n != "triton"]
    return [name for name in names if name != "cuda" or size <= LARGEST]


def cases(options: Any) -> list[harness.Case]:
    device = options.device
    if options.smoke:
        return [rank_case((2, 9, 12), torch.float32, device), gradient_case((2, 9, 12), device)]
    if options.quick:
        shapes = [(1000, 196, 384), (1000, 49, 768)]
        made = [rank_case(shape, torch.bfloat16, device, svd=False) for shape in shapes]
        return [*made, rank_case((16, 196, 384), torch.bfloat16, device)]
    if device == "cuda":
        shapes = [(1000, 196, 384), (1000, 49, 768), (1000, 197, 192), (1000, 256, 1280)]
        made = [rank_case(shape, torch.bfloat16, device) for shape in shapes]
        made.append(rank_case((1000, 196, 384), torch.float32, device))
        return [*made, gradient_case((256, 196, 384), device)]
    shapes = [(64, 196, 384), (64, 49, 768), (64, 256, 1024)]
    made = [rank_case(shape, torch.float32, device) for shape in shapes]
    return [*made, gradient_case((64, 196, 384), device)]


def main() -> None:
    options = harness.arguments(__doc__.splitlines()[0], quick=True).parse_args()
    harness.run("spectrum", cases(options), options)


if __name__ == "__main__":
    main()
