"""Pictures that exercise pixel operations, and timm's transform of one beside the device's."""

from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data.auto_augment import AugmentOp, RandAugment
from timm.data.transforms import RandomResizedCropAndInterpolation
from torchvision.transforms import Compose

from fastkd.data.gpu_augment import DeviceAugment, PlanTransform
from fastkd.utils.random import seed_cpu

HEIGHT, WIDTH = 45, 60
FILL = (124, 116, 104)


def photograph(seed: int = 0) -> Image.Image:
    """Smooth shading, edges, overexposed parts and sensor noise."""
    random = np.random.default_rng(seed)
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    waves = (np.sin(x / random.uniform(4, 12) + c) * np.cos(y / 9 - c) for c in range(3))
    pixels = 140 + 90 * np.stack(list(waves), axis=2)
    pixels[10:25, 15:40] = random.uniform(0, 255, 3)
    pixels[30:, 45:] = 270
    return _image(pixels + random.normal(0, 6, pixels.shape))


def one_color() -> Image.Image:
    return _image(np.full((HEIGHT, WIDTH, 3), (128, 7, 255)))


def two_levels() -> Image.Image:
    pixels = np.zeros((HEIGHT, WIDTH, 3))
    pixels[:, 20:] = 255
    return _image(pixels)


def nearly_white() -> Image.Image:
    """So few darker pixels that Pillow's equalisation leaves the range of levels."""
    pixels = np.full((HEIGHT, WIDTH, 3), 255)
    pixels[:13, :40] = np.arange(520).reshape(13, 40, 1) % 250
    return _image(pixels)


PICTURES = {
    "photograph": photograph,
    "one color": one_color,
    "two levels": two_levels,
    "nearly white": nearly_white,
}


def stages(name: str, magnitude: float, interpolation: Any = Image.Resampling.BICUBIC) -> list[Any]:
    """The whole picture, and one of timm's operations for certain."""
    whole = RandomResizedCropAndInterpolation(
        (HEIGHT, WIDTH), scale=(1, 1), ratio=(WIDTH / HEIGHT, WIDTH / HEIGHT)
    )
    hparams = {"translate_const": 20, "img_mean": FILL, "interpolation": interpolation}
    return [whole, RandAugment([AugmentOp(name, 1.0, magnitude, hparams)], num_layers=1)]


def by_timm(steps: list[Any], image: Image.Image, seed: int) -> torch.Tensor:
    """Gray levels [3, H, W] after timm's own transforms."""
    seed_cpu(seed)
    done = np.array(Compose(steps)(image), dtype=np.float32)
    return torch.from_numpy(done).permute(2, 0, 1)


def by_device(steps: list[Any], image: Image.Image, seed: int) -> torch.Tensor:
    """Gray levels [3, H, W] after planning and the device's operations."""
    plan = PlanTransform(steps, (3, HEIGHT, WIDTH))
    augment = DeviceAugment((0.0,) * 3, (1 / 255,) * 3, plan.fill)
    seed_cpu(seed)
    planned = plan(image)
    return augment(planned.image[None], {k: v[None] for k, v in planned.plan.items()})[0].round()


def _image(pixels: np.ndarray) -> Image.Image:
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
