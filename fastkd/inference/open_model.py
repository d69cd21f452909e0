"""Load a model from a timm name, the hub, a run, a checkpoint, an export or an nn.Module."""

from __future__ import annotations

import contextlib
import copy
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import timm
from torch import nn

from fastkd.checkpoint import LAST, CheckpointError, load_checkpoint
from fastkd.config import IMAGE_OPTIONS, MODULE_PREFIX, Recipe
from fastkd.data.classes import Classes
from fastkd.data.transforms import InputSpec
from fastkd.inference.preprocessing import (
    Preprocessing,
    Shape,
    build_student,
    change_input_size,
    class_names,
    classes_of,
    num_classes_of,
)
from fastkd.models.factory import registered_name
from fastkd.models.hub_download import fetched, hub_name, is_hub_name
from fastkd.models.paper_checkpoints import read_released
from fastkd.models.timm_models import (
    LOCAL,
    build_exported,
    build_from_checkpoint,
    build_timm_model,
    check_head,
    check_published_head,
    fill,
    input_channels,
    is_export,
    read_description,
)
from fastkd.models.weights import (
    FileKind,
    Run,
    UnreadableError,
    better_weights,
    checked,
    file_kind,
    reading,
    run_weights,
    short_misfit,
    verifies,
)
from fastkd.utils.argument_checks import LARGEST_IMAGE, check_numbers, refuse_blank

Source = str | Path | nn.Module
Size = int | tuple[int, int]

_WEIGHTS = "model.safetensors"  # in a folder in timm's layout


@dataclass(frozen=True)
class Model:
    """A model, and how its images are prepared."""

    network: nn.Module  # on the CPU, or where a module was
    preprocessing: Preprocessing
    name: str  # in timm, or module:ClassName
    arguments: dict[str, Any] = field(default_factory=dict)  # of timm.create_model, where known
    weights: str = "as given"  # "raw" or "ema" of a run
    classes: tuple[str, ...] | None = None  # names by label, where the source has them
    num_classes: int | None = None  # of the head, where known
    # Size and statistics of the images, where a run or an export holds them; else timm's count.
    trained_on: InputSpec | None = None
    file: Path | None = None  # of the weights, or timm's folder; None for published ones

    @property
    def named(self) -> Classes:
        """Its classes, to match a dataset's with them."""
        return classes_of(self.network, self.classes, self.num_classes)


def open_model(
    source: Source,
    *,
    checkpoint: str | Path | None = None,
    weights: str = "auto",
    img_size: Size | None = None,  # of a module, only its preprocessing changes
    num_classes: int | None = None,  # None: as the weights have; 0 removes the head
    pretrained: bool = True,  # False leaves the weights of a timm name random
    caller: str = "open_model",  # public function that is named in errors
    alternative: str = "give local weights with checkpoint=PATH",  # to published ones, for errors
    **timm_kwargs: Any,
) -> Model:
    """Open a model; the arguments are those of `create_teacher`."""
    refuse_blank(caller, model=source, checkpoint=checkpoint)
    sides = img_size if isinstance(img_size, tuple | list) else (img_size,)
    for side in sides:
        check_numbers(caller, img_size=(side, 1, LARGEST_IMAGE), num_classes=(num_classes, 0))
    options = {name: value for name, value in timm_kwargs.items() if value is not None}
    if not isinstance(source, str | Path | nn.Module):  # `reading` would blame a file
        raise TypeError(
            f"{caller}: a model must be a timm name, a file or an nn.Module, got "
            f"{type(source).__name__}"
        )
    file: Any = source if checkpoint is None else checkpoint
    built = isinstance(file, nn.Module)
    # A checkpoint is a file, even if it has the name of a model.
    named = checkpoint is None and timm.is_model(str(source).partition(".")[0])
    with contextlib.nullcontext() if built or named else reading(caller, file):
        if isinstance(source, nn.Module):
            refuse_for_modules(caller, {"num_classes": num_classes, **options})
            opened = _of_module(caller, source, checkpoint, weights)
        else:
            given = (weights, img_size, num_classes, alternative, options)
            opened = _Opener(caller, str(source), *given).open(checkpoint, pretrained)
    if isinstance(img_size, int):
        opened = replace(opened, preprocessing=opened.preprocessing.override(img_size=img_size))
    return opened


def open_for_images(
    caller: str, model: Source, checkpoint: str | Path | None, weights: str, options: Any
) -> Model:
    """Open a model; ``options`` override how its images are prepared."""
    fields = {name: value for name, value in options.items() if name in IMAGE_OPTIONS}
    size = fields.get("img_size")
    opened = open_model(model, checkpoint=checkpoint, weights=weights, img_size=size, caller=caller)
    return replace(opened, preprocessing=opened.preprocessing.override(**fields))


def names_a_file(caller: str, source: str | Path) -> bool:
    """Whether a source is a file or a folder with weights, not a timm name; downloads nothing."""
    match = hub_name(source)
    return _found(caller, source) is not None if match is None else match["file"] is not None


def starts_from_weights(caller: str, source: str | Path) -> bool:
    """Whether a student given by this source has weights to start from; a timm name has none."""
    return is_hub_name(source) or str(source).startswith(LOCAL) or names_a_file(caller, source)


def weights_to_choose(
    caller: str, source: str | Path, checkpoint: str | Path | None = None
) -> tuple[str, ...]:
    """Return ``("raw",)`` or ``("raw", "ema")`` of a run, ``()`` of any other source."""
    path = _found(caller, fetched(caller, source if checkpoint is None else checkpoint))
    return () if path is None or not _is_run(path) else tuple(run_weights(_load_run(path)))


def _found(caller: str, source: str | Path) -> Path | None:
    """A file, a run's ``last.pth`` or a folder in timm's layout; None of a timm name."""
    path = Path(source)
    if (folder := Path(str(source).removeprefix(LOCAL))).is_dir():
        path = folder
    if not path.is_dir():
        return path if path.exists() else None
    if (path / LAST).exists():
        return path / LAST
    if (path / "config.json").is_file():
        return path
    if timm.is_model(str(path)):  # a folder that happens to have the name of a model
        return None
    files = ", ".join(sorted(file.name for file in path.glob("*.pth"))[:3])
    hint = f"; there is {files}: give the file" if files else ""
    raise CheckpointError(
        f"{caller}: the folder {path} is no run of fastkd: it has no {LAST}{hint}"
    )


def _existing(caller: str, checkpoint: str | Path) -> Path:
    """The file of a checkpoint; of a folder in timm's layout, its weights."""
    path = _found(caller, fetched(caller, checkpoint))
    if path is not None and path.is_dir():
        path = path / _WEIGHTS
    if path is None or not path.is_file():
        raise FileNotFoundError(f"{caller}: there is no checkpoint {str(checkpoint)!r}")
    return path


def _is_run(path: Path) -> bool:
    """Whether a file is a run's, or unreadable: `load_checkpoint` then raises the reason."""
    return file_kind(path) in (FileKind.RUN, FileKind.UNREADABLE)


def refuse_for_modules(caller: str, options: Mapping[str, Any]) -> None:
    given = [name for name, value in options.items() if value is not None]
    if given:
        raise TypeError(
            f"{caller}: {', '.join(given)} apply where a model is built from a timm name, got a "
            "module"
        )


def _refuse_choice(caller: str, weights: str) -> None:
    if weights != "auto":
        raise ValueError(
            f"{caller}: weights={weights!r} chooses in a fastkd checkpoint, got a model "
            "without EMA weights to choose from"
        )


def _of_module(
    caller: str, module: nn.Module, checkpoint: str | Path | None, weights: str
) -> Model:
    file = None if checkpoint is None else _existing(caller, checkpoint)
    if file is not None and _is_run(file):
        return _of_run(file, weights, module)
    _refuse_choice(caller, weights)
    if file is None:
        return _of_network(module)
    fill(caller, module, file)
    described = read_description(file)
    if described is None:
        return _of_network(module, file)
    return _of_export(module, described.config, file)


@dataclass(frozen=True)
class _Opener:
    """A name, a file or a folder, and the options to open it with."""

    caller: str
    name: str
    weights: str
    img_size: Size | None
    num_classes: int | None
    alternative: str
    timm_kwargs: Mapping[str, Any]

    def open(self, checkpoint: str | Path | None, pretrained: bool) -> Model:
        path = _found(self.caller, fetched(self.caller, self.name))
        if path is None:
            if checkpoint is None:
                return self._of_timm_name(pretrained)
            return self._of_checkpoint(_existing(self.caller, checkpoint))
        if checkpoint is not None:
            raise ValueError(
                f"{self.caller}: checkpoint has no effect: {self.name} is a checkpoint itself"
            )
        if path.is_dir():
            return self._of_timm_folder(path, pretrained)
        if not pretrained:
            raise ValueError(
                f"{self.caller}: pretrained=False has no effect: {self.name} holds weights"
            )
        return self._of_file(path)

    def _of_timm_name(self, pretrained: bool) -> Model:
        _refuse_choice(self.caller, self.weights)
        if pretrained:
            overlay = self.timm_kwargs.get("pretrained_cfg_overlay")
            check_published_head(self.caller, self.name, self.num_classes, overlay)
        return _of_network(self._build(self.name, pretrained))

    def _of_timm_folder(self, path: Path, pretrained: bool) -> Model:
        _refuse_choice(self.caller, self.weights)
        network = self._build(f"{LOCAL}{path}", pretrained)
        if not (is_export(path) and pretrained):
            return _of_network(network, path)
        config = network.pretrained_cfg
        opened = _of_export(network, config, path, self.img_size)
        described = read_description(path / _WEIGHTS)
        if described is None:
            return opened
        ours, theirs = described.config, config.get  # tuples, and timm's lists
        differing = [n for n in ours if json.dumps(ours[n]) != json.dumps(theirs(n))]
        if differing and verifies():
            raise ValueError(
                f"{self.caller}: config.json and {_WEIGHTS} in {path} differ in "
                f"{', '.join(differing)}: one is damaged, or was changed; verify=False "
                "(--no-verify) takes config.json"
            )
        return replace(opened, arguments=dict(described.arguments))

    def _build(self, name: str, pretrained: bool) -> Any:
        network: Any = build_timm_model(
            self.caller,
            name,
            pretrained=pretrained,
            alternative=self.alternative,
            img_size=self.img_size,
            num_classes=self.num_classes,
            **self.timm_kwargs,
        )
        if pretrained and ":" in name:
            found = network.pretrained_cfg.get("num_classes", network.num_classes)
            check_head(self.caller, name, found, self.num_classes)
            # timm drops a head of another size: its configuration may contradict itself.
            check_head(self.caller, name, found, num_classes_of(network))
        return network

    def _of_file(self, path: Path) -> Model:
        """Open a run, an exported student or a released checkpoint: each defines its model."""
        if _is_run(path):
            return self._finished(_of_run(path, self.weights))
        _refuse_choice(self.caller, self.weights)
        if is_export(path):
            described = read_description(path)
            network = build_exported(self.caller, path, described)
            assert described is not None
            opened = _of_export(network, described.config, path)
            name, arguments = described.architecture, described.arguments
        else:
            try:
                network, name, arguments = read_released(path)
            except UnreadableError:
                raise
            except ValueError as error:
                raise ValueError(
                    f"{self.caller}: {path} is no released checkpoint and was not written by "
                    f"fastkd ({error}); for weights of a timm model give the model's name, and the "
                    "file with checkpoint="
                ) from error
            opened = _of_network(network, path)
        return self._finished(replace(opened, name=name, arguments=dict(arguments)))

    def _of_checkpoint(self, file: Path) -> Model:
        """Open weights in a file for a timm name; a run or an export defines its own model."""
        if _is_run(file):
            state = _load_run(file)
            recipe = recipe_of(file, state)
            registered = _registered(recipe)
            if registered is None:  # the student was given as a module, which the name now builds
                options = {"num_classes": state["num_classes"], "img_size": state["img_size"]}
                if (channels := state["input"]["size"][0]) != 3:
                    options["in_chans"] = channels
                options |= self.timm_kwargs
                network = build_timm_model(self.caller, self.name, **options)
                opened = _of_run(file, self.weights, network)
                return replace(self, timm_kwargs={})._finished(opened)
            names = [str(recipe.model), registered[0]]
        elif is_export(file):
            described = read_description(file)
            names = [] if described is None else [described.architecture]
        else:
            _refuse_choice(self.caller, self.weights)
            options = {**self.timm_kwargs, "num_classes": self.num_classes}
            size = self.img_size
            network = build_from_checkpoint(self.caller, self.name, file, img_size=size, **options)
            return _of_network(network, file)
        if names and self.name.partition(".")[0] not in {n.partition(".")[0] for n in names}:
            raise ValueError(
                f"{self.caller}: {file} is of {names[0]}, not of {self.name}: give it alone"
            )
        return self._of_file(file)

    def _finished(self, opened: Model) -> Model:
        """Apply the options to a model that its file has defined."""
        network: Any = opened.network
        for name, value in self.timm_kwargs.items():
            if (name, value) != ("in_chans", input_channels(network)):
                raise ValueError(f"{self.caller}: {name} has no effect: {self.name} defines it")
        if self.num_classes is not None and opened.num_classes is not None:
            check_head(self.caller, self.name, opened.num_classes, self.num_classes)
        if self.num_classes == 0:
            network.reset_classifier(0)
            opened = replace(opened, num_classes=0, classes=None)
        size = pair(self.img_size)
        if size is None:
            return opened
        change_input_size(network, size)
        if opened.trained_on is None:
            return opened
        channels = opened.trained_on.size[0]
        return replace(opened, trained_on=replace(opened.trained_on, size=(channels, *size)))


def _of_network(network: nn.Module, file: Path | None = None) -> Model:
    """Describe a model by its ``pretrained_cfg``, as timm evaluates it."""
    config = getattr(network, "pretrained_cfg", None) or {}
    return Model(
        network,
        Preprocessing.of_model(network),
        name=str(config.get("architecture") or f"{MODULE_PREFIX}{type(network).__name__}"),
        classes=class_names(config),
        num_classes=num_classes_of(network),
        file=file,
    )


def _of_export(
    network: nn.Module, config: Mapping[str, Any], file: Path, img_size: Size | None = None
) -> Model:
    """Describe an exported student, whose configuration is its own, not its architecture's."""
    channels, height, width = config["input_size"]
    mean, std = tuple(config["mean"]), tuple(config["std"])
    names = ("crop_pct", "crop_mode", "interpolation")
    recipe = Recipe(mean=mean, std=std, **{name: config[name] for name in names if name in config})
    if height == width:
        recipe = recipe.override(img_size=height)
    return replace(
        _of_network(network, file),
        preprocessing=Preprocessing(recipe),
        classes=class_names(config),
        trained_on=InputSpec((channels, *(pair(img_size) or (height, width))), mean, std),
    )


def _of_run(file: Path, weights: str, network: nn.Module | None = None) -> Model:
    """Rebuild the student of a run, or load its weights into ``network``."""
    state = _load_run(file)
    recipe, held = recipe_of(file, state), run_weights(state)
    if weights not in ("auto", "raw", "ema"):
        raise ValueError(f"weights: expected auto, raw or ema, got {weights!r}")
    if weights == "auto":
        weights = better_weights(state)
    if weights not in held:
        kind = {"ema": "EMA"}.get(weights, weights)
        raise ValueError(f"weights: {file} has no {kind} weights, only {', '.join(held)}")
    size, mean, std = (state["input"][name] for name in ("size", "mean", "std"))
    spec = InputSpec(tuple(size), mean and tuple(mean), std and tuple(std))
    num_classes, img_size = state["num_classes"], state["img_size"]
    if network is None:
        network = build_student(recipe, Shape(num_classes, spec.size[0], img_size))
    try:
        network.load_state_dict(state[held[weights]])
    except RuntimeError as error:
        raise ValueError(
            f"student: {file} does not fit the given model: {short_misfit(error)}"
        ) from None
    opened = _of_network(network.eval(), file)
    name, arguments = _registered(recipe) or (opened.name, {})
    return replace(
        opened,
        preprocessing=Preprocessing(recipe.override(mean=spec.mean, std=spec.std)),
        name=name,
        arguments=arguments if img_size is None else arguments | {"img_size": img_size},
        weights=weights,
        classes=tuple(state.get("classes") or ()) or None,
        num_classes=num_classes or opened.num_classes,
        trained_on=spec,
    )


def _registered(recipe: Recipe) -> tuple[str, dict[str, Any]] | None:
    """Timm's name and arguments of the student of a recipe; None of a module."""
    if recipe.model is None or recipe.model.startswith(MODULE_PREFIX):
        return None
    return registered_name(recipe.model, recipe.variant, recipe.width)


def _load_run(file: Path) -> dict[str, Any]:
    """Load a checkpoint of a run that has everything its student needs."""
    state = load_checkpoint(file)
    checked(Run, state, f"checkpoint: {file}")
    return state


def recipe_of(file: str | Path, state: Mapping[str, Any]) -> Recipe:
    """The recipe in a checkpoint; the path is for messages."""
    try:
        return Recipe(**state["recipe"])
    except (ValueError, TypeError) as error:
        raise CheckpointError(
            f"checkpoint: {file} holds a recipe that this fastkd cannot read: {error}"
        ) from error


def load_student(
    checkpoint: str | Path,
    weights: str = "auto",
    model: nn.Module | None = None,
    *,
    img_size: int | None = None,
) -> Model:
    """Rebuild the student of a run, in eval mode.

    Args:
        checkpoint: a checkpoint, or a run's folder, whose ``last.pth`` is taken.
        weights: ``"raw"``, ``"ema"`` or ``"auto"`` (the better ones).
        model: takes the weights, in place (with ``img_size``, a copy does); needed where the run's
            student was given as a module.
        img_size: input pixels a side to change to; None: as trained.

    Returns:
        An object with the student (``network``), the ``size``, ``mean`` and ``std`` of its input
        (``trained_on``), ``weights`` ("raw" or "ema"), ``classes`` and ``num_classes``.

    Raises:
        CheckpointError: the file cannot be used.
        ValueError: there are no such weights, they do not fit ``model``, or its size cannot change.
    """
    file = Path(checkpoint) / LAST if Path(checkpoint).is_dir() else Path(checkpoint)
    opened = _of_run(file, weights, model if img_size is None else copy.deepcopy(model))
    if img_size is None:
        return opened
    assert opened.trained_on is not None
    change_input_size(opened.network, (img_size, img_size))
    size = (opened.trained_on.size[0], img_size, img_size)
    return replace(opened, trained_on=replace(opened.trained_on, size=size))


def pair(size: Size | None) -> tuple[int, int] | None:
    if size is None:
        return None
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))
