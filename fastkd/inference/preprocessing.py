"""What a model is fed: input size, statistics, classes, and how images are prepared."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from timm.data import resolve_data_config
from torch import nn

from fastkd.config import Recipe, StudentConfig
from fastkd.data.readers import DataPair
from fastkd.data.transforms import InputSpec
from fastkd.models.pretrained import fixed_input_size, input_channels


@dataclass(frozen=True)
class Shape:
    """What the student has to be built for.

    Attributes:
        num_classes: None if unknown.
        channels: of the images.
        img_size: None for the model's own.
    """

    num_classes: int | None
    channels: int
    img_size: int | tuple[int, int] | None


def student_shape(config: StudentConfig, data: DataPair) -> Shape:
    """What a student needs to be built for these data; the recipe's classes and size come first."""
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
            f"are not resized"
        )
    return Shape(num_classes, channels, (height, width))


def class_count(student: nn.Module, shape: Shape) -> int | None:
    """Number of the student's logits, as far as the student, recipe or data say."""
    own = getattr(student, "num_classes", None)
    if not isinstance(own, int):
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
    """Size and statistics of the student's input.

    The recipe's ``img_size``, ``mean`` and ``std`` come first. Float tensors have a size already,
    and are fed as they are unless the recipe has statistics; ``data=None`` stands for image files.
    ``use_test_size`` takes timm's size for evaluation, where it publishes one.
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
            f"images' size (timm: img_size=, or set_input_size)"
        )
    if spec.mean is not None and len(spec.mean) != channels:
        raise ValueError(
            f"mean: {len(spec.mean)} values for images of {channels} channels: give mean and std "
            f"with a value for each"
        )


@dataclass(frozen=True)
class LoadedStudent:
    """A student rebuilt from a checkpoint.

    Attributes:
        model: in eval mode, on the CPU.
        spec: what it was trained on.
        recipe: its run's.
        weights: ``"raw"`` or ``"ema"``.
        classes: names of the classes by label, where the run's data had them.
        num_classes: of the head, where the run knew them.
        img_size: that the student was built for; None for its own.
    """

    model: nn.Module
    spec: InputSpec
    recipe: Recipe
    weights: str
    classes: tuple[str, ...] | None = None
    num_classes: int | None = None
    img_size: int | tuple[int, int] | None = None


@dataclass(frozen=True)
class Preprocessing:
    """How a model sees the images it is evaluated on.

    Attributes:
        recipe: its ``img_size``, ``mean``, ``std``, ``crop_pct``, ``crop_mode``, ``interpolation``.
        use_test_size: without an ``img_size``, take timm's size for evaluation where it publishes
            one.
    """

    recipe: Recipe
    use_test_size: bool = False

    @classmethod
    def of_model(cls, model: nn.Module) -> Preprocessing:
        """How timm evaluates a model; timm's defaults for one that is not timm's."""
        config = resolve_data_config({}, model=model, use_test_size=True)
        names = ("crop_pct", "crop_mode", "interpolation")
        return cls(Recipe().override(**{name: config[name] for name in names}), True)

    @classmethod
    def of_run(cls, student: LoadedStudent) -> Preprocessing:
        """How a run evaluated its student."""
        return cls(student.recipe.override(mean=student.spec.mean, std=student.spec.std))

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
