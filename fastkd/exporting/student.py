"""The student to export: weights, timm name and input, and the check of what was written."""

from __future__ import annotations

import contextlib
import inspect
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from timm.data import resolve_data_config
from torch import Tensor, nn

from fastkd.checkpoint import CheckpointError, load_checkpoint
from fastkd.config import MODULE_PREFIX, Recipe
from fastkd.data.transforms import InputSpec
from fastkd.inference.loading import input_of, load_student, recipe_of, taken_weights
from fastkd.inference.preprocessing import change_input_size
from fastkd.models.factory import registered_name
from fastkd.models.hub import fetched
from fastkd.models.released import read_released
from fastkd.models.weights import VERSION_KEY, FileKind, file_kind

BATCHES = (2, 5)  # of two sizes, neither of them 1: a size that was built in would show


@dataclass(frozen=True)
class Student:
    """A student without anything of its training.

    Attributes:
        state: its weights by name, on the CPU.
        model: with these weights, in eval mode; None where only its author has the module.
        architecture: what timm calls it, or ``module:ClassName`` where timm does not know it.
        model_args: what `timm.create_model` needs beside the name.
        num_classes: of its head.
        label_names: of the classes, in order; None where the run does not know them.
        weights: ``"raw"``, ``"ema"`` or ``"released"``.
        data_config: what it takes in, under timm's names: ``input_size`` (C, H, W), ``mean``,
            ``std``, ``interpolation``, ``crop_pct``, ``crop_mode``.
        handed_over: whether the model is its author's, and timm's of that name perhaps another.
    """

    state: dict[str, Tensor]
    model: nn.Module | None
    architecture: str
    model_args: dict[str, Any]
    num_classes: int | None
    label_names: tuple[str, ...] | None
    weights: str
    data_config: dict[str, Any]
    handed_over: bool = False

    def required_model(self, format: str) -> nn.Module:
        """The module, for a format that has to run it."""
        if self.model is None:
            raise ValueError(
                f"export: the run's student is {self.architecture}, which only its author can "
                f"build; the format {format} needs it (model=, from Python), safetensors does not"
            )
        return self.model

    def timm_arguments(self) -> dict[str, Any]:
        """What `timm.create_model` needs beside the name and a file of the weights."""
        channels = self.data_config["input_size"][0]
        arguments = {"num_classes": self.num_classes} | self.model_args
        return arguments if channels == 3 else {"in_chans": channels} | arguments

    def metadata(self) -> dict[str, str]:
        """What a file says of itself, as text; what is no string is JSON."""
        described = {
            "architecture": self.architecture,
            "model_args": self.model_args,
            "num_classes": self.num_classes,
            "label_names": self.label_names,
            "weights": self.weights,
            VERSION_KEY: _version(),
            **self.data_config,
        }
        return {
            name: value if isinstance(value, str) else json.dumps(value)
            for name, value in described.items()
            if value is not None
        }


def open_student(
    run: str | Path, weights: str, img_size: int | None, model: nn.Module | None
) -> Student:
    """Take the student out of a run, a checkpoint, or a released checkpoint of the paper."""
    if weights not in ("auto", "raw", "ema"):
        raise ValueError(f"export: weights must be auto, raw or ema, got {weights!r}")
    run = fetched("export", run)
    kind = file_kind(run)
    if kind is FileKind.EXPORT:
        raise CheckpointError(
            f"checkpoint: {run} is an exported student itself: give its run, the folder or a "
            "checkpoint"
        )
    if kind is FileKind.WEIGHTS:
        return _released(run, weights, img_size, model)
    state = load_checkpoint(run)
    if model is None and _is_module(state["recipe"]["model"]):
        return _weights_alone(run, state, weights, img_size)
    return _of_run(run, state, weights, img_size, model)


def _is_module(name: str | None) -> bool:
    return name is not None and name.startswith(MODULE_PREFIX)


def _of_run(
    run: str | Path,
    state: Mapping[str, Any],
    weights: str,
    img_size: int | None,
    model: nn.Module | None,
) -> Student:
    loaded = load_student(run, weights, model, img_size=img_size)
    if img_size is not None:
        _build_for(loaded.model, (img_size, img_size))
    architecture, arguments = _timm_name(loaded.model, loaded.recipe)
    return Student(
        state=_plain(loaded.model.state_dict()),
        model=loaded.model,
        architecture=architecture,
        model_args=arguments | _size_argument(loaded.model, state["img_size"]),
        num_classes=state["num_classes"] or getattr(loaded.model, "num_classes", None),
        label_names=_label_names(state),
        weights=loaded.weights,
        data_config=_data_config(loaded.spec, loaded.recipe),
        handed_over=model is not None,
    )


def _build_for(model: nn.Module, size: tuple[int, int]) -> None:
    """Resample position embeddings once where a model that takes any size does so in every pass."""
    own = getattr(getattr(model, "patch_embed", None), "img_size", None)
    if own not in (None, size) and hasattr(model, "set_input_size"):
        model.set_input_size(img_size=size)  # type: ignore[operator]


def _timm_name(model: nn.Module, recipe: Recipe) -> tuple[str, dict[str, Any]]:
    """A run's student in timm; of a module, timm's own record, if timm made it."""
    published = getattr(model, "pretrained_cfg", None) or {}
    architecture = str(published.get("architecture", recipe.model))
    if recipe.variant == "plain" or _is_module(recipe.model):
        return architecture, {}
    return registered_name(str(recipe.model), recipe.variant, recipe.width)


def _size_argument(model: nn.Module, built_for: Any = None) -> dict[str, Any]:
    """The size that a model is made for, even where it takes others, too."""
    size = getattr(getattr(model, "patch_embed", None), "img_size", None)
    if size is None and "img_size" in inspect.signature(type(model)).parameters:
        size = built_for
    return {} if size is None else {"img_size": [size] * 2 if isinstance(size, int) else list(size)}


def _weights_alone(
    run: str | Path, state: Mapping[str, Any], weights: str, img_size: int | None
) -> Student:
    """Of a module that is not here, what needs no module."""
    if img_size is not None:
        raise ValueError(
            f"export: img_size={img_size} changes a model, and this run's student, "
            f"{state['recipe']['model']}, can only be built by its author (model=, from Python)"
        )
    taken, recipe = taken_weights(run, state, weights), recipe_of(run, state)
    return Student(
        state=_plain(state["student" if taken == "raw" else "ema"]),
        model=None,
        architecture=str(recipe.model),
        model_args={},
        num_classes=state["num_classes"],
        label_names=_label_names(state),
        weights=taken,
        data_config=_data_config(input_of(state), recipe),
    )


def _released(
    path: str | Path, weights: str, img_size: int | None, model: nn.Module | None
) -> Student:
    try:
        released = read_released(path)
    except (ValueError, SafetensorError) as error:
        raise CheckpointError(
            f"checkpoint: {path} was not written by fastkd's trainer; nor is it a released one: "
            f"{error}"
        ) from error
    if weights != "auto":
        raise ValueError(
            f"export: weights={weights!r}: {path} is a released checkpoint, without EMA weights to "
            "choose from"
        )
    if model is not None:
        raise ValueError(
            f"export: model has no effect: {path} is a released checkpoint, whose student is known"
        )
    student = released.model.eval()
    config = resolve_data_config({}, model=student)
    if img_size is not None:
        change_input_size(student, (img_size, img_size))
    names = ("mean", "std", "interpolation", "crop_pct", "crop_mode")
    height, width = student.patch_embed.img_size  # type: ignore[union-attr,misc]
    return Student(
        state=_plain(student.state_dict()),
        model=student,
        architecture=released.architecture,
        model_args=released.arguments | _size_argument(student),
        num_classes=released.arguments["num_classes"],
        label_names=None,
        weights="released",
        data_config={
            "input_size": (released.arguments["in_chans"], height, width),
            **{name: config[name] for name in names},
        },
    )


def _plain(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Each tensor in memory of its own and in plain order, as safetensors wants them."""
    return {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, tensor in state.items()
    }


def _label_names(state: Mapping[str, Any]) -> tuple[str, ...] | None:
    """Classes that the data named; a head that is wider has logits without a name."""
    names = state.get("classes")
    return tuple(names) if names and len(names) == state["num_classes"] else None


def _data_config(spec: InputSpec, recipe: Recipe) -> dict[str, Any]:
    channels = spec.size[0]
    return {
        "input_size": tuple(spec.size),
        # Fed as they came is normalised with these.
        "mean": tuple(spec.mean or (0.0,) * channels),
        "std": tuple(spec.std or (1.0,) * channels),
        # "random" is of training crops; evaluation then takes the other.
        "interpolation": "bilinear" if recipe.interpolation == "random" else recipe.interpolation,
        "crop_pct": recipe.crop_pct,
        "crop_mode": recipe.crop_mode,
    }


def _version() -> str:
    try:
        return version("fastkd")
    except PackageNotFoundError:
        return "unknown"


def largest_difference(
    model: nn.Module, input_size: tuple[int, ...], compute: Callable[[Tensor], Tensor]
) -> float:
    """How far another way of computing the logits is from the model's."""
    generator = torch.Generator().manual_seed(0)
    largest = 0.0
    for batch in BATCHES:
        images = torch.randn(batch, *input_size, generator=generator)
        with torch.no_grad():
            expected = model(images)
            difference = (compute(images) - expected).abs().max().item()
        if not difference <= 1e-4 * max(1.0, expected.abs().max().item()):  # NaN is refused, too
            raise RuntimeError(
                f"export: what was written computes something else: logits differ by "
                f"{difference:.1e} from the student's on a random batch of {batch}"
            )
        largest = max(largest, difference)
    return largest


def check_output(
    target: Path, default: str, overwrite: bool, is_export: Callable[[Path], bool]
) -> None:
    """Refuse an output that would replace something which was not meant."""
    if not target.absolute().parent.is_dir():
        raise FileNotFoundError(f"export: there is no folder {str(target.parent)!r}")
    suffix = Path(default).suffix
    fits = not suffix or target.suffix == suffix
    if not os.path.lexists(target):
        if not fits:
            raise ValueError(f"export: the output must end in {suffix}, got {str(target)!r}")
        return
    if not suffix and target.is_dir() and not any(target.iterdir()):
        return
    if not overwrite:
        raise FileExistsError(
            f"export: {target} exists: choose another output, or set overwrite (--overwrite)"
        )
    if not (fits and is_export(target)):
        kind = f"{suffix} file" if suffix else "folder"
        raise FileExistsError(
            f"export: {target} is not replaced: it is no {kind} that fastkd exported"
        )


@contextlib.contextmanager
def replacing_file(target: Path) -> Iterator[Path]:
    """Make a file that takes the place of ``target`` when the block ends without an error.

    Unlike `fastkd.utils.io.replacing`, the new file can be read by its name before: it has
    the ending that readers go by.
    """
    folder = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    shutil.rmtree(folder, ignore_errors=True)  # of a process of this number, killed in here
    folder.mkdir()
    try:
        yield folder / target.name
        os.replace(folder / target.name, target)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def replacing_folder(target: Path) -> Iterator[Path]:
    """Make a folder that takes the place of ``target`` when the block ends without an error.

    Folders cannot be exchanged in one step: the older one is set aside as ``.NAME.old``, the new
    one is renamed, and the older one removed. A process that is killed in between leaves both.
    """
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    aside = target.with_name(f".{target.name}.old")
    shutil.rmtree(temporary, ignore_errors=True)  # of a process of this number, killed in here
    temporary.mkdir()
    try:
        yield temporary
        with _set_aside(target, aside):
            temporary.rename(target)
        shutil.rmtree(aside, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def _set_aside(target: Path, aside: Path) -> Iterator[None]:
    """Free the name of a folder, which gets it back where the block fails."""
    if not target.exists():
        yield
        return
    shutil.rmtree(aside, ignore_errors=True)  # older still, of a process that was killed
    target.rename(aside)
    try:
        yield
    except BaseException:
        aside.rename(target)
        raise
