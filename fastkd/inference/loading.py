"""What MODEL means to `evaluate`, `predict`, `analyze` and as a teacher, made one thing.

Knows where models come from and how each sees its images; not what is then done with them.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import timm
from torch import nn

from fastkd.checkpoint import LAST, CheckpointError, load_checkpoint
from fastkd.config import MODULE_PREFIX, Recipe
from fastkd.data.transforms import InputSpec
from fastkd.inference.preprocessing import LoadedStudent, Preprocessing, Shape, change_input_size
from fastkd.models import create_student
from fastkd.models.factory import registered_name
from fastkd.models.hub import fetched
from fastkd.models.pretrained import (
    LOCAL,
    build_pretrained,
    build_timm_model,
    fill,
    read_description,
)
from fastkd.models.weights import FileKind, better_weights, file_kind, short_misfit

# Recipe fields that say how a model sees its images.
IMAGE_OPTIONS = ("img_size", "crop_pct", "crop_mode", "interpolation", "mean", "std")


@dataclass(frozen=True)
class OpenedModel:
    """A model to feed images.

    Attributes:
        network: on the CPU, or where a module was.
        preprocessing: how its images are resized, cropped and normalised.
        weights: ``"raw"`` or ``"ema"`` of a run, else ``"as given"``.
        classes: names of its classes by label, where its run had them.
        trained_on: size and statistics of its images, where a run or an exported student says them;
            None leaves them to timm's configuration.
        file: its weights came from, the file or timm's folder; None for published ones and modules.
    """

    network: nn.Module
    preprocessing: Preprocessing
    weights: str = "as given"
    classes: tuple[str, ...] | None = None
    trained_on: InputSpec | None = None
    file: Path | None = None


def open_model(
    caller: str,
    model: str | Path | nn.Module,
    checkpoint: str | Path | None,
    weights: str,
    options: Mapping[str, Any],
    num_classes: int | None = None,
) -> OpenedModel:
    """Make a model of what a user calls one.

    Args:
        caller: the public function that asks, named in errors.
        model: a timm name (``hf_hub:...`` and ``local-dir:...`` too), a timm folder as `export`
            writes it, a run's folder, a checkpoint of a run, a student exported as safetensors, a
            checkpoint that the authors of arXiv 2511.15572 released (files also as
            ``hf_hub:OWNER/NAME/FILE``), or a module.
        checkpoint: weights for a timm name or, in place, for a module: any of these files. Of a run
            or an exported student, what it was fed and its classes come with them.
        weights: ``"raw"``, ``"ema"`` or ``"auto"`` of a run's checkpoint.
        options: by the names of `IMAGE_OPTIONS`; others are let alone.
        num_classes: of the head of a timm name with a checkpoint; None takes the weights'.

    Returns:
        The model, and how it sees its images with these options.

    Raises:
        ValueError: options that do not fit the model, or a checkpoint that cannot be used.
        FileNotFoundError: there is no such file.
        RuntimeError: weights cannot be downloaded.
    """
    changes = {name: options[name] for name in IMAGE_OPTIONS if name in options}
    size = changes.get("img_size")
    file = None if checkpoint is None else Path(fetched(caller, checkpoint))
    if isinstance(model, nn.Module):
        opened = _of_module(caller, model, file, weights)
    else:
        source = _source(caller, model)
        opened = _of_name(caller, str(model), source, file, weights, size, num_classes)
    return replace(opened, preprocessing=opened.preprocessing.override(**changes))


def names_a_file(caller: str, model: str | Path) -> bool:
    """Whether what a user calls a model is a file or a folder with weights, not a timm name.

    Args:
        caller: as in `open_model`, as is the other.
        model: no module.

    Raises:
        CheckpointError: it is a folder without weights that this fastkd knows.
        RuntimeError: it cannot be downloaded.
    """
    return _is_there(caller, _source(caller, model))


def weights_to_choose(
    caller: str, model: str | Path, checkpoint: str | Path | None = None
) -> tuple[str, ...]:
    """Which weights there are of what a user calls a model.

    Args:
        caller: as in `open_model`, as are the others.
        model: no module.
        checkpoint: weights for a timm name.

    Returns:
        ``("raw",)`` or ``("raw", "ema")`` of a run; none where there is no choice.

    Raises:
        CheckpointError: a run's file cannot be used.
        RuntimeError: it cannot be downloaded.
    """
    source = _source(caller, model if checkpoint is None else checkpoint)
    return weights_in(source) if _is_there(caller, source) and _is_run(source) else ()


def _source(caller: str, model: str | Path) -> Path:
    """Where a model lies, if it is a file or a folder; else a path that is not there."""
    folder = Path(str(model).removeprefix(LOCAL))
    return folder if folder.is_dir() else Path(fetched(caller, model))


def _is_there(caller: str, path: Path) -> bool:
    if not path.is_dir():
        return path.exists()
    if (path / LAST).exists() or _is_timm_folder(path):
        return True
    if timm.is_model(str(path)):  # it is only called like a model
        return False
    files = ", ".join(sorted(file.name for file in path.glob("*.pth"))[:3])
    hint = f"; there is {files}: give the file" if files else ""
    raise CheckpointError(
        f"{caller}: the folder {path} is no run of fastkd: it has no {LAST}{hint}"
    )


def _is_run(path: Path) -> bool:
    """Whether what is there is a run's, or should be: who then loads it says what is wrong."""
    if path.is_dir():
        return not _is_timm_folder(path)
    return file_kind(path) in (FileKind.RUN, FileKind.UNREADABLE)


def _is_timm_folder(path: Path) -> bool:
    return (path / "config.json").is_file() and not (path / LAST).exists()


def _of_module(caller: str, module: nn.Module, file: Path | None, weights: str) -> OpenedModel:
    if file is None:
        _refuse_choice(caller, weights)
        return _as_timm_feeds_it(module)
    if not file.is_file() or _is_run(file):
        return _of_run(load_student(file, weights, module), file)
    _refuse_choice(caller, weights)
    fill(caller, module, file)
    described = read_description(file)
    if described is None:
        return _as_timm_feeds_it(module, file)
    return _as_its_file_says(module, described.config, file)


def _of_name(
    caller: str,
    name: str,
    source: Path,
    file: Path | None,
    weights: str,
    img_size: int | None,
    num_classes: int | None,
) -> OpenedModel:
    """A timm name, or a file or folder."""
    there = _is_there(caller, source)
    if there and file is not None:
        raise ValueError(f"{caller}: {name} is a checkpoint itself; checkpoint= has no effect")
    if there and _is_run(source):
        return _of_run(load_student(source, weights, img_size=img_size), source)
    if file is not None and _is_there(caller, file) and _is_run(file):
        return _of_named_run(caller, name, file, weights, img_size)
    _refuse_choice(caller, weights)
    given: str | Path = source if there else name
    if there and source.is_dir():
        given = f"{LOCAL}{source}"
    network: Any = build_pretrained(caller, given, file, img_size=img_size, num_classes=num_classes)
    held_in = source if there else file
    if held_in is not None and _is_export(held_in):
        return _as_its_file_says(network, network.pretrained_cfg, held_in, img_size)
    return _as_timm_feeds_it(network, held_in)


def _is_export(path: Path) -> bool:
    file = path / "model.safetensors" if path.is_dir() else path
    return file_kind(file) is FileKind.EXPORT


def _of_named_run(
    caller: str, name: str, checkpoint: Path, weights: str, img_size: int | None
) -> OpenedModel:
    """A run says all itself; a name helps where its student was given as a module."""
    state = load_checkpoint(checkpoint)
    recipe = recipe_of(checkpoint, state)
    network = None
    if recipe.model is None or recipe.model.startswith(MODULE_PREFIX):
        options: dict[str, Any] = {key: state[key] for key in ("num_classes", "img_size")}
        if (channels := input_of(state).size[0]) != 3:
            options["in_chans"] = channels
        network = build_timm_model(caller, name, **options)
    elif name.partition(".")[0] not in _names_of(recipe):
        raise ValueError(
            f"{caller}: {checkpoint} is of a run of {recipe.model}, not of {name}: give it alone"
        )
    return _of_run(load_student(checkpoint, weights, network, img_size=img_size), checkpoint)


def _names_of(recipe: Recipe) -> set[str]:
    """What a run's student may be called: by its recipe, or by timm's registry."""
    base = str(recipe.model)
    registered, _ = registered_name(base, recipe.variant, recipe.width)
    return {name.partition(".")[0] for name in (base, registered)}


def _of_run(student: LoadedStudent, file: Path) -> OpenedModel:
    return OpenedModel(
        student.model,
        Preprocessing.of_run(student),
        student.weights,
        student.classes,
        student.spec,
        file / LAST if file.is_dir() else file,
    )


def _as_its_file_says(
    network: nn.Module, config: Mapping[str, Any], file: Path, img_size: int | None = None
) -> OpenedModel:
    """An exported student: timm's configuration of it is its own, not its architecture's."""
    channels, height, width = config["input_size"]
    mean, std = tuple(config["mean"]), tuple(config["std"])
    names = ("crop_pct", "crop_mode", "interpolation")
    recipe = Recipe(mean=mean, std=std, **{name: config[name] for name in names if name in config})
    if height == width:
        recipe = recipe.override(img_size=height)
    size = (height, width) if img_size is None else (img_size, img_size)
    return OpenedModel(
        network,
        Preprocessing(recipe),
        classes=_class_names(config),
        trained_on=InputSpec((channels, *size), mean, std),
        file=file,
    )


def _as_timm_feeds_it(network: nn.Module, file: Path | None = None) -> OpenedModel:
    config = getattr(network, "pretrained_cfg", None) or {}
    preprocessing = Preprocessing.of_model(network)
    return OpenedModel(network, preprocessing, classes=_class_names(config), file=file)


def _class_names(config: Mapping[str, Any]) -> tuple[str, ...] | None:
    """What an exported or published model's configuration calls its classes, for a reader."""
    names: Sequence[str] = config.get("label_names") or ()
    descriptions = config.get("label_descriptions") or {}
    if not isinstance(descriptions, Mapping):
        return tuple(descriptions)
    return tuple(descriptions.get(name, name) for name in names) or None


def _refuse_choice(caller: str, weights: str) -> None:
    if weights != "auto":
        raise ValueError(f"{caller}: weights={weights!r} chooses in a fastkd checkpoint")


def build_student(recipe: Recipe, shape: Shape) -> nn.Module:
    """Create the student that a recipe names.

    Args:
        recipe: model, variant, width, drop_path.
        shape: classes and input.

    Returns:
        The student, on the CPU, initialised from torch's generator.

    Raises:
        ValueError: the recipe stands for a module that only its author has, or the number of
            classes is unknown; or it has no stochastic depth to set.
    """
    if recipe.model is None or recipe.model.startswith(MODULE_PREFIX):
        raise ValueError(f"student: the recipe's model is {recipe.model}: hand the module over")
    if shape.num_classes is None:
        raise ValueError(
            "num_classes: nobody says how many classes there are: give num_classes, or data that "
            "have classes"
        )
    options: dict[str, Any] = {
        "width": recipe.width,
        "num_classes": shape.num_classes,
        "img_size": shape.img_size,
    }
    if shape.channels != 3:
        options["in_chans"] = shape.channels
    create = functools.partial(create_student, recipe.model, recipe.variant, **options)
    try:
        return create(drop_path_rate=recipe.drop_path)  # 0, too: some models have another default
    except TypeError as error:
        if "drop_path_rate" not in str(error):
            raise
    if recipe.drop_path:
        raise ValueError(f"drop_path: {recipe.model} has no stochastic depth")
    return create()


def load_student(
    checkpoint: str | Path,
    weights: str = "auto",
    model: nn.Module | None = None,
    *,
    img_size: int | None = None,
) -> LoadedStudent:
    """Rebuild a student from a checkpoint of its run.

    Args:
        checkpoint: a checkpoint, or a run's folder, whose ``last.pth`` is taken.
        weights: ``"raw"``, ``"ema"``, or ``"auto"``: EMA where it had the higher top-1 when the run
            measured both last, else raw.
        model: takes the weights, in place; needed where the student was given as a module. With
            ``img_size``, a copy takes them.
        img_size: input size to change to (position embeddings are resampled); None keeps what it
            was trained on.

    Returns:
        The student, its input and its recipe.

    Raises:
        CheckpointError: the file cannot be used.
        ValueError: there are no EMA weights, they do not fit ``model``, or its size cannot change.
    """
    state = load_checkpoint(checkpoint)
    taken = taken_weights(checkpoint, state, weights)
    recipe, spec = recipe_of(checkpoint, state), input_of(state)
    if model is None:
        model = build_student(recipe, Shape(state["num_classes"], spec.size[0], state["img_size"]))
    elif img_size is not None:
        model = copy.deepcopy(model)
    try:
        model.load_state_dict(state["student" if taken == "raw" else "ema"])
    except RuntimeError as error:
        raise ValueError(
            f"student: {checkpoint} does not fit the given model: {short_misfit(error)}"
        ) from None
    if img_size is not None:
        spec = replace(spec, size=(spec.size[0], img_size, img_size))
        change_input_size(model, (img_size, img_size))
    classes = state.get("classes")
    return LoadedStudent(model.eval(), spec, recipe, taken, tuple(classes) if classes else None)


def taken_weights(checkpoint: str | Path, state: Mapping[str, Any], weights: str) -> str:
    """Which of a checkpoint's weights somebody means.

    Args:
        checkpoint: for messages.
        state: of the checkpoint.
        weights: ``"raw"``, ``"ema"`` or ``"auto"``, as in `load_student`.

    Returns:
        ``"raw"`` or ``"ema"``.

    Raises:
        ValueError: another word, or there are no EMA weights.
    """
    if weights not in ("auto", "raw", "ema"):
        raise ValueError(f"weights: expected auto, raw or ema, got {weights!r}")
    if weights == "ema" and state["ema"] is None:
        raise ValueError(f"weights: {checkpoint} has no EMA weights (ema_decay was none)")
    return better_weights(state) if weights == "auto" else weights


def recipe_of(checkpoint: str | Path, state: Mapping[str, Any]) -> Recipe:
    """The recipe in a checkpoint, in today's words.

    Args:
        checkpoint: for messages.
        state: of the checkpoint.

    Returns:
        The recipe; fields that came later have their defaults.

    Raises:
        CheckpointError: it has a field or a value that this fastkd does not know.
    """
    try:
        return Recipe(**state["recipe"])
    except (ValueError, TypeError) as error:
        file = Path(checkpoint) / LAST if Path(checkpoint).is_dir() else checkpoint
        raise CheckpointError(
            f"checkpoint: {file} holds a recipe that this fastkd cannot read: {error}"
        ) from error


def input_of(state: Mapping[str, Any]) -> InputSpec:
    """What the student in a checkpoint was trained on.

    Args:
        state: of the checkpoint.

    Returns:
        Size and statistics.
    """
    size, mean, std = (state["input"][name] for name in ("size", "mean", "std"))
    return InputSpec(tuple(size), mean and tuple(mean), std and tuple(std))


def weights_in(checkpoint: str | Path) -> tuple[str, ...]:
    """Which weights a checkpoint holds.

    Args:
        checkpoint: as in `load_student`.

    Returns:
        ``("raw",)`` or ``("raw", "ema")``.

    Raises:
        CheckpointError: the file cannot be used.
    """
    return ("raw",) if load_checkpoint(checkpoint)["ema"] is None else ("raw", "ema")
