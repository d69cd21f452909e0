"""Real images without a download: crops of photographs that scikit-learn and scikit-image carry.

    python examples/make_photographs.py FOLDER

writes a folder of images, one class a photograph, for `fastkd analyze --data FOLDER`. Far too few
scenes to say anything about a model; enough to see what the tool does on natural images.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from PIL import Image

# Those that scikit-image's package holds itself; others would be downloaded.
SKIMAGE = (
    "astronaut",
    "chelsea",
    "coffee",
    "rocket",
    "retina",
    "hubble_deep_field",
    "immunohistochemistry",
)
PIXELS = 256
SMALLEST_CROP = 0.4  # of the shorter side


def photographs() -> dict[str, np.ndarray]:
    """The photographs by name.

    Returns:
        Name -> [H, W, 3] uint8.

    Raises:
        ImportError: scikit-learn or scikit-image is missing.
    """
    from skimage import data
    from sklearn.datasets import load_sample_images

    samples = load_sample_images()
    names = [Path(name).stem for name in samples.filenames]
    found = dict(zip(names, samples.images, strict=True))
    return found | {name: getattr(data, name)() for name in SKIMAGE}


def write_crops(folder: Path, crops: int = 12, seed: int = 0) -> int:
    """Write random square crops of every photograph.

    Args:
        folder: made if needed; a folder for each photograph is written in it.
        crops: of each photograph.
        seed: of places and sizes.

    Returns:
        How many were written.
    """
    rng = np.random.default_rng(seed)
    everything = photographs()
    for name, pixels in everything.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        for number in range(crops):
            crop = _random_square(pixels, rng)
            image = Image.fromarray(crop).resize((PIXELS, PIXELS), Image.Resampling.BICUBIC)
            image.save(folder / name / f"{number:02}.png")
    return crops * len(everything)


def _random_square(pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    height, width = pixels.shape[:2]
    side = int(min(height, width) * rng.uniform(SMALLEST_CROP, 1))
    top, left = (int(rng.integers(extent - side + 1)) for extent in (height, width))
    return pixels[top : top + side, left : left + side]


def main() -> None:
    """Parse the arguments and write the crops."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--crops", type=int, default=12, help="of each photograph (default: 12)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    try:
        written = write_crops(options.folder, options.crops, options.seed)
    except ImportError as error:
        parser.error(f"{error}: pip install scikit-learn scikit-image")
    print(f"{options.folder}: {written} crops")


if __name__ == "__main__":
    main()
