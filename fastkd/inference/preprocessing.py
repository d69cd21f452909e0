"""Input and output of a model: size, statistics and crop of its images, and its classes."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from timm.data import ImageNetInfo, infer_imagenet_subset, resolve_data_config
from torch import nn
from torch.utils.data import DataLoader, Dataset

from fastkd.config import MODULE_PREFIX, DataConfig, Recipe, StudentConfig
from fastkd.data.batches import Collate, Fault, Sample
from fastkd.data.classes import Classes
from fastkd.data.datasets import DataPair
from fastkd.data.image_files import reason_of, without_pillow_warnings
from fastkd.data.loader import SampleDataset, eval_samples, loader_options
from fastkd.data.transforms import InputSpec
from fastkd.models import create_student
from fastkd.models.timm_models import fixed_input_size, input_channels


@dataclass(frozen=True)
class Shape:
    """Input and output of a student that is to be built."""

    num_classes: int | None  # None: unknown
    channels: int  # of the images
    img_size: int | tuple[int, int] | None  # None: the model's own


def student_shape(config: StudentConfig, data: DataPair) -> Shape:
    """The shape of a student for these data; the recipe's classes and size take precedence."""
    known = data.num_classes
    if config.num_classes is not None and known is not None and config.num_classes < known:
        raise ValueError(f"num_classes: {config.num_classes}, but the data have {known} classes")
    num_classes = config.num_classes or known
    if data.image_size is None:
        return Shape(num_classes, 3, config.img_size)
    channels, height, width = data.image_size
    if config.img_size is not None and (height, width) != (config.img_size,) * 2:
        raise ValueError(
            f"img_size: {config.img_size}, but the data are tensors of {height} x {width}, which "
            "are not resized"
        )
    return Shape(num_classes, channels, (height, width))


def build_student(config: StudentConfig, shape: Shape) -> nn.Module:
    """Create the student that a recipe names, on the CPU, initialized from torch's generator."""
    if config.model is None or config.model.startswith(MODULE_PREFIX):
        raise ValueError(f"student: the recipe's model is {config.model}: hand the module over")
    if shape.num_classes is None:
        raise ValueError("num_classes is required: the dataset does not define classes")
    options: dict[str, Any] = {
        "width": config.width,
        "num_classes": shape.num_classes,
        "img_size": shape.img_size,
        "init_weights": config.init_weights,
    }
    if shape.channels != 3:
        options["in_chans"] = shape.channels
    create = functools.partial(create_student, config.model, config.variant, **options)
    try:
        return create(drop_path_rate=config.drop_path)  # 0, too: some models have another default
    except TypeError as error:
        if "drop_path_rate" not in str(error):
            raise
    if config.drop_path:
        raise ValueError(f"drop_path: {config.model} has no stochastic depth")
    return create()


def num_classes_of(network: nn.Module) -> int | None:
    found = getattr(network, "num_classes", None)
    return found if isinstance(found, int) else None


def classes_of(
    network: nn.Module, names: Sequence[str] | None = None, count: int | None = None
) -> Classes:
    """The classes of a model, by the given names or those of its configuration.

    Without any, a model with as many classes as an ImageNet is guessed to have its classes.
    """
    config = getattr(network, "pretrained_cfg", None) or {}
    count = num_classes_of(network) if count is None else count
    sources = [names] if names else [config.get("label_names") or (), class_names(config) or ()]
    known: dict[int, tuple[str, ...]] = {}
    for source in sources:
        if count is None or len(source) <= count:  # else they are another head's
            for label, name in enumerate(source):
                known[label] = (*known.get(label, ()), str(name))
    subset = infer_imagenet_subset({"num_classes": count})
    if known or subset is None:
        return Classes(known, count)
    guess = ImageNetInfo(subset).label_names()
    return Classes({label: (name,) for label, name in enumerate(guess)}, count, guessed=True)


def class_names(config: Mapping[str, Any]) -> tuple[str, ...] | None:
    """Class names for a reader: descriptions, where a configuration has them."""
    names: Sequence[str] = config.get("label_names") or ()
    descriptions = config.get("label_descriptions") or {}
    if not isinstance(descriptions, Mapping):
        return tuple(descriptions)
    return tuple(descriptions.get(name, name) for name in names) or None


def class_count(student: nn.Module, shape: Shape) -> int | None:
    """Number of the student's logits, as far as the student, recipe or data define it."""
    own = num_classes_of(student)
    if own is None:
        return shape.num_classes
    if shape.num_classes is not None and own < shape.num_classes:
        raise ValueError(
            f"student: {own} logits for data of {shape.num_classes} classes: create it with "
            f"num_classes={shape.num_classes}"
        )
    return own


def input_spec(
    student: nn.Module, recipe: Recipe, data: DataPair | None, *, use_test_size: bool = False
) -> InputSpec:
    """Size and statistics of the student's input; those of the recipe take precedence.

    Float tensors have a size, and are only normalized if the recipe has statistics; ``data=None``
    stands for image files. ``use_test_size`` takes timm's size for evaluation, if there is one.
    """
    if data is not None and data.image_size is not None:
        spec = InputSpec(data.image_size, recipe.mean, recipe.std)
    else:
        config = resolve_data_config({}, model=student)
        size = recipe.img_size
        height, width = _own_size(student, use_test_size) if size is None else (size, size)
        spec = InputSpec(
            (input_channels(student), height, width),
            recipe.mean or tuple(config["mean"]),
            recipe.std or tuple(config["std"]),
        )
    _check_input(student, spec)
    return spec


def _own_size(student: nn.Module, use_test_size: bool) -> tuple[int, int]:
    """(H, W) that a student is fixed to, or that it was built or published for."""
    published = getattr(student, "pretrained_cfg", None) or {}
    built = getattr(getattr(student, "patch_embed", None), "img_size", None)
    if use_test_size and published.get("test_input_size") and fixed_input_size(student) is None:
        built = published["test_input_size"][-2:]
    height, width = built or resolve_data_config({}, model=student)["input_size"][-2:]
    return height, width


def _check_input(student: nn.Module, spec: InputSpec) -> None:
    channels, height, width = spec.size
    fixed = fixed_input_size(student)
    if fixed is not None and (height, width) != fixed:
        raise ValueError(
            f"img_size: the images are {height} x {width}, but the student, a "
            f"{type(student).__name__}, is built for {fixed[0]} x {fixed[1]}: build it for the "
            "images' size (timm: img_size=, or set_input_size)"
        )
    if spec.mean is not None and len(spec.mean) != channels:
        raise ValueError(
            f"mean: {len(spec.mean)} values for images of {channels} channels: give mean and std "
            "with a value for each"
        )


@dataclass(frozen=True)
class Preprocessing:
    """How images are prepared for a model's evaluation."""

    recipe: Recipe  # img_size, mean, std, crop_pct, crop_mode and interpolation count
    use_test_size: bool = False  # without an img_size, take timm's size for evaluation, if any

    @classmethod
    def of_model(cls, model: nn.Module) -> Preprocessing:
        """How timm evaluates a model; timm's defaults for one that is not timm's."""
        config = resolve_data_config({}, model=model, use_test_size=True)
        names = ("crop_pct", "crop_mode", "interpolation")
        return cls(Recipe().override(**{name: config[name] for name in names}), True)

    def override(self, **options: Any) -> Preprocessing:
        """Change fields of the recipe; ValueError and TypeError as `Recipe.override`."""
        return replace(self, recipe=self.recipe.override(**options))

    def input_spec(self, model: nn.Module, data: DataPair | None) -> InputSpec:
        """Size and statistics of the model's input for these data, as `input_spec`."""
        return input_spec(model, self.recipe, data, use_test_size=self.use_test_size)


def change_input_size(model: nn.Module, size: tuple[int, int]) -> None:
    """Change the (H, W) that a timm model is fixed to; position embeddings are resampled.

    A model that runs at any size is left as it is.
    """
    if fixed_input_size(model) in (None, size):
        return
    if not hasattr(model, "set_input_size"):
        raise ValueError(
            f"img_size: {type(model).__name__} is built for one size and timm cannot change it"
        )
    model.set_input_size(img_size=size)  # type: ignore[operator]


def parameter_count(module: nn.Module) -> int:
    """Number of parameters."""
    return sum(parameter.numel() for parameter in module.parameters())


class SamplesAndFaults(Dataset[Sample | Fault]):
    """The samples of an evaluation set, and faults in the place of those that cannot be read."""

    def __init__(self, samples: SampleDataset, size: tuple[int, int, int]) -> None:
        self.samples = samples
        self.size = size

    def __getitem__(self, index: int) -> Sample | Fault:
        try:
            # Pillow reads large pictures and odd palettes, and the user meant them.
            with without_pillow_warnings():
                (sample,) = self.samples.__getitems__([index])
        except Exception as error:  # what datasets raise has no common base
            return Fault(index, self.samples.name(index), reason_of(error))
        if isinstance(sample, Fault):
            return sample
        shape = tuple(sample.image.shape)
        if shape != self.size:
            reason = f"is {list(shape)}, expected {list(self.size)}"
            return Fault(index, self.samples.name(index), reason)
        return sample._replace(label=None)


def image_loader(
    data: DataPair,
    config: DataConfig,
    spec: InputSpec,
    samples: Sequence[int],
    *,
    batch_size: int,
    workers: int,
    device: torch.device,
    seed: int | None = None,
) -> DataLoader[Any]:
    """Load samples of an evaluation set, by index; a batch without readable ones is empty."""
    return DataLoader(
        SamplesAndFaults(eval_samples(data, config, spec, seed), spec.size),
        batch_size,
        sampler=samples,
        collate_fn=Collate(spec if data.yields_tensors else None),
        **loader_options(workers if len(samples) > batch_size else 0, device),
    )
