"""The demo's images: scikit-learn's 1,797 digits of 8 x 8 pixels, split and augmented."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import TensorDataset

CLASSES = 10
SIDE = 8
HELD_OUT = 500
_SPLIT_SEED = 0
_AUGMENTATION_SEED = 0

# Wider ranges turn one digit into another, or push it out of the 8 x 8 pixels.
_ROTATION = math.radians(12)
_SCALE = 0.1
_SHIFT = 0.5  # pixels


@dataclass(frozen=True)
class Digits:
    """Data sets of (float32 [1, 8, 8], label), normalized by the training pixels."""

    train: TensorDataset  # 1,297 images, for students
    augmented: TensorDataset  # rotated, scaled and shifted copies of them, for the teacher
    held_out: TensorDataset  # 500 images, stratified by digit; never trained on


def load_digits(copies: int) -> Digits:
    """Split and normalize the digits; the same split and copies on every call."""
    from sklearn.datasets import load_digits as sklearn_digits
    from sklearn.model_selection import train_test_split

    pixels, labels = sklearn_digits(return_X_y=True)
    parts = train_test_split(
        pixels, labels, test_size=HELD_OUT, stratify=labels, random_state=_SPLIT_SEED
    )
    train, held_out = (torch.from_numpy(p).float().view(-1, 1, SIDE, SIDE) / 16 for p in parts[:2])
    train_labels, held_out_labels = (torch.from_numpy(part).long() for part in parts[2:])
    mean, std = train.mean(), train.std()

    def dataset(images: Tensor, labels: Tensor) -> TensorDataset:
        return TensorDataset((images - mean) / std, labels)

    return Digits(
        dataset(train, train_labels),
        dataset(shaken(train, copies), train_labels.repeat(copies)),
        dataset(held_out, held_out_labels),
    )


def shaken(images: Tensor, copies: int) -> Tensor:
    """Copy images under small, seeded random rotations, scalings and shifts."""
    images = images.repeat(copies, 1, 1, 1)
    generator = torch.Generator().manual_seed(_AUGMENTATION_SEED)

    def uniform(limit: float) -> Tensor:
        return (2 * torch.rand(len(images), generator=generator) - 1) * limit

    angle, scale = uniform(_ROTATION), 1 + uniform(_SCALE)
    # affine_grid measures in half images.
    shift_x, shift_y = uniform(2 * _SHIFT / SIDE), uniform(2 * _SHIFT / SIDE)
    cos, sin = scale * angle.cos(), scale * angle.sin()
    matrices = torch.stack([cos, -sin, shift_x, sin, cos, shift_y], dim=1).view(-1, 2, 3)
    grid = F.affine_grid(matrices, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, align_corners=False)
