"""analyze: what measuring every layer of a model costs on top of its forward passes.

python bench/analyze.py --output bench/results/analyze_cpu.json
"""

from __future__ import annotations

import resource
import time
from pathlib import Path
from typing import Any

import harness
import numpy as np
import timm
import torch
from torch import Tensor

import fastkd
from fastkd.models import Taps

MODEL = "cait_s24_224"
SVD_IMAGES = 6  # that the decompositions are timed on


class Noise:
    """Images of noise, as tensors: reading them costs nothing."""

    def __init__(self, images: int, size: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.images = torch.randn(images, 3, size, size, generator=generator)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.images[index], 0


def resident_megabytes() -> float:
    """Most memory that this process has held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def decomposition_seconds(model: torch.nn.Module, images: Tensor) -> float:
    """SVD with vectors of every layer's tokens, per image, as the released scripts do it."""
    with torch.inference_mode():
        output = Taps(model, range(len(model.feature_info)))(images)
    layers = [tokens.data.numpy() for tokens in output.tokens.values()]
    begin = time.perf_counter()
    for tokens in layers:
        for image in tokens:
            np.linalg.svd(image, full_matrices=False)
    return (time.perf_counter() - begin) / len(images)


def main() -> None:
    parser = harness.arguments(__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=400)
    options = parser.parse_args()
    name, size, images = (MODEL, 224, options.images)
    if options.smoke:
        name, size, images = "deit_tiny_patch16_224", 32, 4
    model = timm.create_model(name, pretrained=False, img_size=size).eval()
    data = Noise(images, size)
    with torch.inference_mode():
        model(data.images[:16])  # what a forward pass of a batch takes
    decomposed = decomposition_seconds(model, data.images[:SVD_IMAGES])
    before = resident_megabytes()
    report = fastkd.analyze(
        model, data, images=images, device=options.device, quiet=True, figures=False
    )
    held = resident_megabytes() - before
    (result,) = report.models
    layers = len(result.layers)
    seconds = {
        "forward passes": result.seconds["forward"] / images,
        "fastkd: spectra, SEP, data-set view": result.seconds["analysis"] / images,
        "numpy.linalg.svd, with vectors": decomposed,
    }
    rows = _rows(f"{name}, {layers} layers, {size} px, per image", seconds, held)
    print(f"{rows[0].case} on {harness.machine(options.device)}")
    for row in rows:
        ratio = "" if row.speedup is None else f"{row.speedup:8.1f}x"
        print(f"  {row.provider:<42}{row.milliseconds:>10.1f} ms{ratio}")
    print(f"  memory above model and forward pass: {held:.0f} MB")
    if options.output is not None:
        harness.save(Path(options.output), "analyze", options.device, 0.0, {}, rows)
        print(f"wrote {options.output}")


def _rows(case: str, seconds: dict[str, float], held: float) -> list[harness.Row]:
    ours, theirs = "fastkd: spectra, SEP, data-set view", "numpy.linalg.svd, with vectors"
    unmeasured: dict[str, Any] = {"gigabytes_per_second": 0.0, "roofline_percent": 0.0}
    return [
        harness.Row(
            case=case,
            provider=name,
            milliseconds=value * 1e3,
            lower_quartile=value * 1e3,
            upper_quartile=value * 1e3,
            peak_megabytes=held if name == ours else 0.0,
            speedup=seconds[theirs] / value if name == ours else None,
            **unmeasured,
        )
        for name, value in seconds.items()
    ]


if __name__ == "__main__":
    main()
