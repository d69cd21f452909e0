"""An ImageNet-like folder of made JPEGs, for trying a trainer where there is no ImageNet.

    python examples/make_jpegs.py FOLDER

A class is a shape, a texture and two colors, its own and its background's; place, size, angle and
light vary from image to image. Texture and sensor noise make a file of 500 x 375 pixels about as
large as one of ImageNet, so that reading and decoding cost what they cost there.
"""

from __future__ import annotations

import argparse
import colorsys
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Plane = NDArray[np.floating[Any]]  # [H, W]

SPLITS = ("train", "val")
_GOLDEN_RATIO = (math.sqrt(5) - 1) / 2  # steps of it around the color circle never come close
_LARGEST_ANGLE = math.radians(25)  # beyond it stripes of one class look like another's
_OCTAVES = 8
_SENSOR_NOISE = 16.0  # of 255 levels: about 90 kB a file of 500 x 375 at quality 90


# How far inside a shape of radius 1 a point lies; negative outside.
_SHAPES: dict[str, Callable[[Plane, Plane], Plane]] = {
    "disc": lambda x, y: 1 - np.hypot(x, y),
    "square": lambda x, y: 0.85 - np.maximum(abs(x), abs(y)),
    "triangle": lambda x, y: np.minimum(0.5 - y, 0.5 + y / 2 - abs(x) * 0.866),
    "ring": lambda x, y: 0.3 - abs(np.hypot(x, y) - 0.7),
    "cross": lambda x, y: np.minimum(
        1 - np.maximum(abs(x), abs(y)), 0.35 - np.minimum(abs(x), abs(y))
    ),
}

# Brightness in [-1, 1]. Their number has no divisor in common with that of the shapes, so that 20
# classes pass before a pair of both comes back, in another color.
_TEXTURES: dict[str, Callable[[Plane, Plane], Plane]] = {
    "plain": lambda x, y: np.zeros_like(x),
    "stripes": lambda x, y: np.sin(14 * x),
    "checks": lambda x, y: np.sign(np.sin(9 * x) * np.sin(9 * y)),
    "dots": lambda x, y: 2 * np.cos(8 * x) ** 2 * np.cos(8 * y) ** 2 - 1,
}


@dataclass(frozen=True)
class Look:
    """What all images of one class have in common.

    Attributes:
        name: of its folder; sorts by the class's number.
        shape: key of the shapes: disc, square, triangle, ring or cross.
        texture: key of the textures: plain, stripes, checks or dots.
        hue: of the shape, in [0, 1); the background's lies opposite.
    """

    name: str
    shape: str
    texture: str
    hue: float

    @classmethod
    def of(cls, number: int) -> Look:
        """The look of class ``number``, whatever the number of classes."""
        shape = list(_SHAPES)[number % len(_SHAPES)]
        texture = list(_TEXTURES)[number % len(_TEXTURES)]
        return cls(f"{number:03}_{shape}_{texture}", shape, texture, number * _GOLDEN_RATIO % 1)


def make_jpegs(
    root: str | Path,
    *,
    classes: int = 8,
    train: int = 20,
    val: int = 6,
    size: tuple[int, int] = (500, 375),
    quality: int = 90,
    seed: int = 0,
) -> Path:
    """Write ``root/{train,val}/<class>/<number>.jpg``; the same files from the same seed.

    An image depends on the seed, its split, its class and its number alone: a folder with more
    images or more classes holds the same ones first. 500 x 375 pixels take about 20 ms an image.

    Args:
        root: folder to fill; made if needed.
        classes: how many.
        train: images of each class in ``train``.
        val: images of each class in ``val``.
        size: (width, height) in pixels.
        quality: of the JPEGs, 1 to 95.
        seed: of everything random.

    Returns:
        ``root``.

    Raises:
        FileExistsError: ``root`` is a file, or a folder that is not empty.
        ValueError: no class, an image count below 0, a side below 1 or a quality that JPEG has not.
    """
    root = Path(root)
    _check(classes, (train, val), size, quality)
    _check_empty(root)
    for split, (split_name, count) in enumerate(zip(SPLITS, (train, val), strict=True)):
        for number in range(classes):
            look = Look.of(number)
            folder = root / split_name / look.name
            folder.mkdir(parents=True)
            for image in range(count):
                rng = np.random.default_rng([seed, split, number, image])
                pixels = draw(look, size, rng)
                Image.fromarray(pixels).save(folder / f"{image:05}.jpg", quality=quality)
    return root


def draw(look: Look, size: tuple[int, int], rng: np.random.Generator) -> NDArray[np.uint8]:
    """One image of a class.

    Args:
        look: of the class.
        size: (width, height) in pixels.
        rng: what varies from image to image is drawn from it.

    Returns:
        [height, width, 3] uint8.
    """
    width, height = size
    radius = min(size) * rng.uniform(0.3, 0.48)
    x, y = _coordinates(size, radius, rng)
    inside = np.clip(_SHAPES[look.shape](x, y) * radius + 0.5, 0, 1)[..., None]

    relief = _relief(size, rng)
    light = rng.uniform(0.75, 1.1)
    shape_light = light * (0.8 + 0.3 * _TEXTURES[look.texture](x, y) + 0.15 * relief)
    background_light = light * (0.55 + 0.2 * relief)
    shape = shape_light[..., None] * _color(look.hue, 0.8, rng)
    background = background_light[..., None] * _color(look.hue + 0.5, 0.35, rng)

    pixels = 255 * (inside * shape + (1 - inside) * background)
    pixels += _SENSOR_NOISE * rng.standard_normal((height, width, 3), dtype=np.float32)
    return np.clip(pixels, 0, 255).astype(np.uint8)


def _coordinates(
    size: tuple[int, int], radius: float, rng: np.random.Generator
) -> tuple[Plane, Plane]:
    """Of every pixel, in radii from the shape's center along its own, turned axes."""
    width, height = size
    center = (rng.uniform(0.35, 0.65) * width, rng.uniform(0.4, 0.6) * height)
    angle = rng.uniform(-_LARGEST_ANGLE, _LARGEST_ANGLE)
    across = (np.arange(width, dtype=np.float32) - center[0])[None, :] / radius
    down = (np.arange(height, dtype=np.float32) - center[1])[:, None] / radius
    cos, sin = np.float32(math.cos(angle)), np.float32(math.sin(angle))
    return cos * across + sin * down, cos * down - sin * across


def _relief(size: tuple[int, int], rng: np.random.Generator) -> Plane:
    """[H, W] noise of every scale, finer scales weaker, as in photographs; of unit order."""
    width, height = size
    total = np.zeros((height, width), dtype=np.float32)
    for octave in range(1, _OCTAVES + 1):
        coarse = rng.standard_normal((2**octave, 2**octave), dtype=np.float32)
        total += np.asarray(Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)) / octave
    return total


def _color(hue: float, saturation: float, rng: np.random.Generator) -> NDArray[np.float32]:
    hue = (hue + rng.normal(0, 0.015)) % 1
    return np.array(colorsys.hsv_to_rgb(hue, saturation, 1.0), dtype=np.float32)


def _check(classes: int, counts: tuple[int, int], size: tuple[int, int], quality: int) -> None:
    for name, value, least in (
        ("classes", classes, 1),
        ("train", counts[0], 0),
        ("val", counts[1], 0),
        ("size", min(size), 1),
    ):
        if value < least:
            raise ValueError(f"make_jpegs: {name} must be at least {least}, got {value}")
    if not 1 <= quality <= 95:
        raise ValueError(f"make_jpegs: quality must be 1 to 95, got {quality}")


def _check_empty(root: Path) -> None:
    if root.exists() and not root.is_dir():
        raise FileExistsError(f"make_jpegs: {root} is a file")
    if root.is_dir() and any(root.iterdir()):
        raise FileExistsError(f"make_jpegs: {root} is not empty; name another folder")


def main() -> None:
    """Parse the arguments and write the images."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--classes", type=int, default=8, help="(default: 8)")
    parser.add_argument("--train", type=int, default=20, help="images of each class (default: 20)")
    parser.add_argument("--val", type=int, default=6, help="images of each class (default: 6)")
    parser.add_argument(
        "--size",
        type=int,
        nargs=2,
        default=(500, 375),
        metavar=("WIDTH", "HEIGHT"),
        help="in pixels (default: 500 375)",
    )
    parser.add_argument("--quality", type=int, default=90, help="of the JPEGs (default: 90)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    try:
        make_jpegs(
            options.folder,
            classes=options.classes,
            train=options.train,
            val=options.val,
            size=tuple(options.size),
            quality=options.quality,
            seed=options.seed,
        )
    except (OSError, ValueError) as error:
        parser.error(str(error))
    written = options.classes * (options.train + options.val)
    print(f"{options.folder}: {written} images of {options.classes} classes")


if __name__ == "__main__":
    main()
