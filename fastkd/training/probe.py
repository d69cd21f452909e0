"""Take two images through a run's transforms, models and terms before its folder is touched."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch._subclasses import fake_tensor
from torch.utils.data import DataLoader

from fastkd.config import DataConfig, Recipe
from fastkd.data.batches import (
    Batch,
    Collate,
    Sample,
    SampleTransform,
    eval_sample_transform,
    train_sample_transform,
)
from fastkd.data.datasets import DataPair, ReadableImages
from fastkd.data.gpu_augment import device_augment
from fastkd.data.transforms import InputSpec
from fastkd.ops.backend import ENVIRONMENT_CHOICE
from fastkd.training.updates import Engine
from fastkd.utils.distributed import ALONE, World, autocast
from fastkd.utils.random import seeded

Taken = TypeVar("Taken")

IMAGES = 2
MADE_SIZE = (160, 120)  # pixels of a made image, width and height
DRAWS = 8  # of each made image: not every operation that timm draws takes every image

# What timm makes transforms from, each with a value that asks for nothing.
_DEFAULTS = ("ratio", "scale", "interpolation", "crop_pct", "crop_mode")
NEUTRAL: dict[str, Any] = {
    **{"auto_augment": None, "color_jitter": 0.0, "reprob": 0.0, "hflip": 0.0},
    **{name: DataConfig.model_fields[name].default for name in _DEFAULTS},
}

# Raised by passes that depend on values, which tensors without storage do not have.
NEEDS_VALUES = (
    fake_tensor.DataDependentOutputException,
    fake_tensor.DynamicOutputShapeException,
    fake_tensor.UnsupportedFakeTensorException,
    fake_tensor.UnsupportedOperatorException,
)
IMAGE_FILES = DataPair(None, None, None, yields_tensors=False, image_size=None)


@contextmanager
def naming(what: str, passing: tuple[type[Exception], ...] = ()) -> Iterator[None]:
    """Begin errors, which may be timm's or torch's own, with the fields that they come from."""
    try:
        yield
    except Exception as error:
        unchanged = (torch.OutOfMemoryError, *NEEDS_VALUES, *passing)
        if isinstance(error, unchanged) or type(error).__module__.startswith("fastkd."):
            raise
        kept = type(error) in (ValueError, TypeError, RuntimeError)
        kind = type(error) if kept else ValueError
        raise kind(f"{what}: {_reason(error)}") from error


def student_words(recipe: Recipe, size: Any) -> str:
    shape = " x ".join(map(str, size))
    return f"student: {recipe.model} on images of {shape} (img_size={recipe.img_size})"


def teacher_words(recipe: Recipe) -> str:
    return f"teacher: {recipe.teacher} (teacher_img_size={recipe.teacher_img_size})"


def terms_words(recipe: Recipe) -> str:
    used = ["logit_loss"] if recipe.alpha else []
    used += ["feature_loss", "pairs", "projector"] if recipe.feature_weight else []
    return ", ".join(f"{name}={getattr(recipe, name)!r}" for name in used) or "terms"


def check_inputs(config: DataConfig, spec: InputSpec, data: DataPair | None) -> None:
    """Take made images through the transforms of a run; needs neither data nor device."""
    if data is not None and data.yields_tensors:
        train_sample_transform(config, spec, data)  # refuses what has no meaning for tensors
        return
    data = data or IMAGE_FILES
    try:
        _transform(config, spec, data)
    except Exception as error:
        name = re.match(r"(\w+): ", str(error))
        if name is not None and name[1] in DataConfig.model_fields:
            raise
        used = [field for field in NEUTRAL if getattr(config, field) != NEUTRAL[field]]
        # Those without which it works; all of them where none is to blame alone.
        blamed = [field for field in used if _works_without(field, config, spec, data)] or used
        given = ", ".join(f"{field}: {getattr(config, field)!r}" for field in blamed)
        raise ValueError(f"{given or 'transforms'} cannot be used: {_reason(error)}") from error


def _works_without(field: str, config: DataConfig, spec: InputSpec, data: DataPair) -> bool:
    try:
        _transform(config.model_copy(update={field: NEUTRAL[field]}), spec, data)
    except Exception:
        return False
    return True


def _transform(config: DataConfig, spec: InputSpec, data: DataPair) -> None:
    with seeded(0, ALONE.device):
        Collate()(_made(eval_sample_transform(config, spec, data)))
        batch = Collate()(_made(train_sample_transform(config, spec, data), DRAWS))
        augment = device_augment(config, spec)
        if augment is not None:
            augment(batch.images, batch.plan or {})


def _made(transform: SampleTransform, draws: int = 1) -> list[Sample]:
    """Make two images of noise, each transformed as often as asked for."""
    noise = np.random.default_rng(0)
    shape = (IMAGES, MADE_SIZE[1], MADE_SIZE[0], 3)
    pixels = noise.integers(0, 256, shape, dtype=np.uint8)
    pictures = [transform.decode(Image.fromarray(array)) for array in pixels]
    return [transform(picture, 0, number) for number, picture in enumerate(pictures * draws)]


def _tensors(size: Any) -> Tensor:
    return torch.rand(IMAGES, *size, generator=torch.Generator().manual_seed(0))


def check_pass(engine: Engine, recipe: Recipe, loader: DataLoader[Any], data: DataPair) -> None:
    """Run student, teacher and terms once on two images, without gradient and without a trace.

    Called by all processes, of which none goes on where one of them cannot.
    """
    # In two steps, as a pass may itself wait for the other processes' embeddings.
    batch = _everywhere(engine.world, lambda: _first_images(loader, data))
    _everywhere(engine.world, lambda: _pass(engine, recipe, batch))


def _everywhere(peers: World, step: Callable[[], Taken]) -> Taken:
    """Take a step in all processes; all raise where one of them fails."""
    try:
        result = step()
    except Exception as error:
        peers.gather(str(error))
        raise
    for rank, text in enumerate(peers.gather(None)):
        if text is not None:
            raise ValueError(f"process {rank}: {text}")
    return result


def _first_images(loader: DataLoader[Any], data: DataPair) -> Batch:
    """A batch of the first two training images, or of made ones.

    A user's own dataset may draw from a generator of its own, and a stream may be far away.
    """
    dataset: Any = loader.dataset
    if isinstance(data.train, ReadableImages):
        numbers = [number % len(data.train) for number in range(IMAGES)]
        samples = dataset.__getitems__(numbers)
    elif data.image_size is not None:
        images = _tensors(data.image_size)
        samples = [Sample(image, 0, number) for number, image in enumerate(images)]
    else:
        samples = _made(dataset.transform)
    assert loader.collate_fn is not None
    return loader.collate_fn(samples)


def _pass(engine: Engine, recipe: Recipe, batch: Batch) -> None:
    # `forward`, which is not compiled: shapes that training never has would be compiled for.
    task, teacher, device = engine.task, engine.teacher, engine.world.device
    with _left_as_they_were(task, teacher), seeded(0, device), _no_kernels(), torch.no_grad():
        images, target = engine.inputs(batch)
        size = images.shape[1:]
        with autocast(device, recipe.amp):
            with naming(teacher_words(recipe)):
                output = None if teacher is None else teacher.forward(images)
            try:
                task.forward(images, target, output)
            except Exception:
                with naming(student_words(recipe, size)):
                    task.student.forward(images)
                with naming(terms_words(recipe)):
                    raise


@contextmanager
def _no_kernels() -> Iterator[None]:
    """Compile no kernels for two images, unless the user chooses the backend: then it is tried."""
    chosen = ENVIRONMENT_CHOICE in os.environ
    os.environ.setdefault(ENVIRONMENT_CHOICE, "torch")
    try:
        yield
    finally:
        if not chosen:
            del os.environ[ENVIRONMENT_CHOICE]


@contextmanager
def _left_as_they_were(*modules: nn.Module | None) -> Iterator[None]:
    """Put modules into eval mode, and give modes and buffers back."""
    parts = [part for module in modules if module is not None for part in module.modules()]
    modes = [(part, part.training) for part in parts]
    # A module may write into a buffer, and may put another in its place.
    buffers = [(part, dict(part._buffers)) for part in parts]
    held = [buffer for part in parts for buffer in part.buffers(recurse=False)]
    before = [buffer.clone() for buffer in held]
    try:
        for part in parts:
            part.training = False
        yield
    finally:
        for part, training in modes:
            part.training = training
        with torch.no_grad():
            for buffer, old in zip(held, before, strict=True):
                buffer.copy_(old)
        for part, own in buffers:
            part._buffers.update(own)


def _reason(error: Exception) -> str:
    return " ".join(str(error).split()) or f"{type(error).__name__} without a message"
