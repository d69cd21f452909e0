"""What is exported: a student's weights, the name it has in timm, and what it takes in."""

from __future__ import annotations

import contextlib
import copy
import inspect
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastkd.checkpoint import LAST, load_checkpoint
from fastkd.config import MODULE_PREFIX, DataConfig
from fastkd.data.transforms import InputSpec
from fastkd.inference.loading import (
    Model,
    Source,
    input_of,
    open_model,
    recipe_of,
    taken_weights,
)
from fastkd.inference.preprocessing import change_input_size
from fastkd.models.factory import rebuilt_by, registered_name
from fastkd.models.hub import fetched
from fastkd.models.weights import VERSION_KEY, FileKind, file_kind, run_weights

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
        weights: ``"raw"``, ``"ema"``, ``"released"`` or ``"as given"``.
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
    source: Source, weights: str, img_size: int | None, model: Source | None
) -> Student:
    """Take the student out of whatever `open_model` opens; arguments as in `export`."""
    if weights not in ("auto", "raw", "ema"):
        raise ValueError(f"export: weights must be auto, raw or ema, got {weights!r}")
    path = None if isinstance(source, nn.Module) else Path(fetched("export", source))
    kind = None if path is None else file_kind(path)
    if model is not None and (path is None or kind is FileKind.WEIGHTS):
        raise ValueError(f"export: model has no effect: {source} is a model itself")
    if path is not None and model is None and (kind is FileKind.RUN or (path / LAST).is_file()):
        state = load_checkpoint(path)
        if (state["recipe"]["model"] or "").startswith(MODULE_PREFIX):
            return _weights_alone(path, state, weights, img_size)
    checkpoint = None if model is None else path
    opening: Any = source if model is None else model
    if isinstance(opening, nn.Module) and (img_size is not None or model is None):
        opening = copy.deepcopy(opening)  # the caller's keeps its size and mode
    opened = open_model(
        opening, checkpoint=checkpoint, weights=weights, img_size=img_size, caller="export"
    )
    released = kind is FileKind.WEIGHTS
    return _student(opened, img_size, released, handed_over=isinstance(opening, nn.Module))


def _student(opened: Model, img_size: int | None, released: bool, handed_over: bool) -> Student:
    network = opened.network.eval()
    recipe, spec = opened.preprocessing.recipe, opened.trained_on
    if img_size is not None:
        _change_size(network, (img_size, img_size))
    if spec is None:
        spec = opened.preprocessing.input_spec(network, None)
    elif img_size is not None:
        spec = replace(spec, size=(spec.size[0], img_size, img_size))
    name, arguments = opened.name, dict(opened.arguments)
    if handed_over and (fields := rebuilt_by(network)) is not None:
        name, known = registered_name(fields["model"], fields["variant"], fields["width"])
        arguments |= known
    size = _size_argument(network, arguments.pop("img_size", None))
    if not released:  # `timm_arguments` adds them
        arguments = {k: v for k, v in arguments.items() if k not in ("num_classes", "in_chans")}
    classes, count = opened.classes, opened.num_classes
    return Student(
        state=_plain(network.state_dict()),
        model=network,
        architecture=name,
        model_args=arguments | size,
        num_classes=count,
        label_names=classes if classes is not None and len(classes) == count else None,
        weights="released" if released else opened.weights,
        data_config=_data_config(spec, recipe),
        handed_over=handed_over,
    )


def _change_size(model: nn.Module, size: tuple[int, int]) -> None:
    """Build a model in another size, also where it resamples position embeddings in every pass."""
    change_input_size(model, size)
    own = getattr(getattr(model, "patch_embed", None), "img_size", None)
    if own not in (None, size) and hasattr(model, "set_input_size"):
        model.set_input_size(img_size=size)  # type: ignore[operator]


def _size_argument(model: nn.Module, built_for: Any) -> dict[str, Any]:
    """The size that a model is made for, even where it takes others, too.

    A patch embedding knows it; of other models, ``built_for`` says it, if they are made for one.
    """
    size = getattr(getattr(model, "patch_embed", None), "img_size", None)
    if size is None and "img_size" in inspect.signature(type(model)).parameters:
        size = built_for
    return {} if size is None else {"img_size": [size] * 2 if isinstance(size, int) else list(size)}


def _weights_alone(
    run: Path, state: Mapping[str, Any], weights: str, img_size: int | None
) -> Student:
    """Of a module that is not here, what needs no module."""
    if img_size is not None:
        raise ValueError(
            f"export: img_size={img_size} changes a model, and this run's student, "
            f"{state['recipe']['model']}, can only be built by its author (model=, from Python)"
        )
    taken, recipe = taken_weights(run, state, weights), recipe_of(run, state)
    names, count = state.get("classes"), state["num_classes"]
    return Student(
        state=_plain(state[run_weights(state)[taken]]),
        model=None,
        architecture=str(recipe.model),
        model_args={},
        num_classes=count,
        label_names=tuple(names) if names and len(names) == count else None,
        weights=taken,
        data_config=_data_config(input_of(state), recipe),
    )


def _plain(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Each tensor in memory of its own and in plain order, as safetensors wants them."""
    return {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, tensor in state.items()
    }


def _data_config(spec: InputSpec, config: DataConfig) -> dict[str, Any]:
    channels = spec.size[0]
    return {
        "input_size": tuple(spec.size),
        # Fed as they came is normalised with these.
        "mean": tuple(spec.mean or (0.0,) * channels),
        "std": tuple(spec.std or (1.0,) * channels),
        # "random" is of training crops; evaluation then takes the other.
        "interpolation": "bilinear" if config.interpolation == "random" else config.interpolation,
        "crop_pct": config.crop_pct,
        "crop_mode": config.crop_mode,
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
