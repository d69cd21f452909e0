"""Load a model from a timm name, the hub, a run, a checkpoint, an export or an nn.Module."""

from __future__ import annotations

import contextlib
import copy
import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import timm
from timm.data import ImageNetInfo, infer_imagenet_subset
from torch import nn

from fastkd.checkpoint import LAST, CheckpointError, load_checkpoint
from fastkd.config import MODULE_PREFIX, Recipe, StudentConfig
from fastkd.data.classes import Classes
from fastkd.data.transforms import InputSpec
from fastkd.inference.preprocessing import LoadedStudent, Preprocessing, Shape, change_input_size
from fastkd.models import Teacher, create_student
from fastkd.models.factory import registered_name
from fastkd.models.hub import fetched, hub_name, is_hub_name
from fastkd.models.pretrained import (
    LOCAL,
    build_exported,
    build_from_checkpoint,
    build_timm_model,
    check_head,
    check_published_head,
    fill,
    fixed_input_size,
    input_channels,
    is_export,
    read_description,
)
from fastkd.models.released import read_released
from fastkd.models.taps import model_name
from fastkd.models.weights import (
    FileKind,
    Run,
    UnreadableError,
    better_weights,
    checked,
    file_kind,
    read_file,
    reading,
    run_weights,
    short_misfit,
    verifies,
    verifying,
)
from fastkd.utils.arguments import LARGEST_IMAGE, check_numbers, refuse_blank

Source = str | Path | nn.Module
Size = int | tuple[int, int]
Statistics = Sequence[float]


@dataclass(frozen=True)
class Model:
    """A model to feed images.

    Attributes:
        network: on the CPU, or where a module was.
        preprocessing: how its images are resized, cropped and normalized.
        name: by which timm builds it, or ``module:ClassName``.
        arguments: that `timm.create_model` needs beside the name, as far as the source has them.
        weights: ``"raw"`` or ``"ema"`` of a run, else ``"as given"``.
        classes: names of its classes by label, where the source has them.
        num_classes: of its head; None where neither source nor module says it.
        trained_on: size and statistics of its images, where a run or an exported student says them;
            None leaves them to timm's configuration.
        file: its weights came from, the file or timm's folder; None for published ones and modules.
    """

    network: nn.Module
    preprocessing: Preprocessing
    name: str
    arguments: dict[str, Any] = field(default_factory=dict)
    weights: str = "as given"
    classes: tuple[str, ...] | None = None
    num_classes: int | None = None
    trained_on: InputSpec | None = None
    file: Path | None = None

    @property
    def named(self) -> Classes:
        """Its classes, to match a data set's with them."""
        return classes_of(self.network, self.classes, self.num_classes)


def open_model(
    source: Source,
    *,
    checkpoint: str | Path | None = None,
    weights: str = "auto",
    img_size: Size | None = None,
    num_classes: int | None = None,
    pretrained: bool = True,
    caller: str = "open_model",
    alternative: str = "give local weights with checkpoint=PATH",
    **timm_kwargs: Any,
) -> Model:
    """Open whatever a user calls a model; every function that takes one opens it here.

    Args:
        source: a timm name; ``hf_hub:OWNER/NAME`` or ``local-dir:FOLDER`` in timm's layout; a run's
            folder or checkpoint; a student that `export` wrote, the folder or the safetensors file;
            a checkpoint that the authors of arXiv 2511.15572 released; or a module, which is not
            copied. A file may be ``hf_hub:OWNER/NAME/FILE``.
        checkpoint: weights for a timm name or, in place, for a module: any of these files. Of a run
            or an exported student, what it was fed and its classes come with them.
        weights: ``"raw"``, ``"ema"`` or ``"auto"`` of a run; auto takes those that the run measured
            to be better.
        img_size: pixels a side, or (H, W), to build a model for; position embeddings are resampled.
            Of a module, only its preprocessing changes.
        num_classes: of the head; None takes that of the weights, 0 leaves it out.
        pretrained: load published weights of a name; False leaves them random.
        caller: the public function that asks, named in errors.
        alternative: what to do without published weights, for errors about them.
        **timm_kwargs: of the timm model, where a name is built.
    """
    refuse_blank(caller, model=source, checkpoint=checkpoint)
    sides = img_size if isinstance(img_size, tuple | list) else (img_size,)
    for side in sides:
        check_numbers(caller, img_size=(side, 1, LARGEST_IMAGE), num_classes=(num_classes, 0))
    options = {name: value for name, value in timm_kwargs.items() if value is not None}
    if isinstance(source, nn.Module):
        refuse_for_modules(caller, {"num_classes": num_classes, **options})
        file = None if checkpoint is None else _existing(caller, checkpoint)
        with contextlib.nullcontext() if file is None else reading(caller, file):
            opened = _of_module(caller, source, file, weights)
    elif isinstance(source, str | Path):
        opener = _Opener(caller, str(source), weights, img_size, num_classes, alternative, options)
        foreign = source if checkpoint is None else checkpoint
        known = foreign is source and timm.is_model(str(source).partition(".")[0])
        with contextlib.nullcontext() if known else reading(caller, foreign):
            opened = opener.open(checkpoint, pretrained)
    else:
        raise TypeError(
            f"{caller}: a model must be a timm name, a file or an nn.Module, got "
            f"{type(source).__name__}"
        )
    if isinstance(img_size, int):
        opened = replace(opened, preprocessing=opened.preprocessing.override(img_size=img_size))
    return opened


def refuse_for_modules(caller: str, options: Mapping[str, Any]) -> None:
    """Refuse options that are not None where the model is built already."""
    given = [name for name, value in options.items() if value is not None]
    if given:
        raise TypeError(
            f"{caller}: {', '.join(given)} apply where a model is built from a timm name, got a "
            "module"
        )


def names_a_file(caller: str, source: str | Path) -> bool:
    """Whether a source is a file or a folder with weights, not a timm name; downloads nothing."""
    match = hub_name(source)
    if match is not None:
        return match["file"] is not None
    return _is_there(caller, _local_path(source))


def starts_from_weights(caller: str, source: str | Path) -> bool:
    """Whether a student given by this source has weights to start from; a timm name has none."""
    return is_hub_name(source) or str(source).startswith(LOCAL) or names_a_file(caller, source)


def weights_to_choose(
    caller: str, source: str | Path, checkpoint: str | Path | None = None
) -> tuple[str, ...]:
    """Return ``("raw",)`` or ``("raw", "ema")`` of a run, nothing where there is no choice."""
    path = _local_path(fetched(caller, source if checkpoint is None else checkpoint))
    if not (_is_there(caller, path) and _is_run(path)):
        return ()
    return tuple(run_weights(_load_run(path)))


def _local_path(source: str | Path) -> Path:
    """Where a source lies, if it is a file or a folder; else a path that is not there."""
    folder = Path(str(source).removeprefix(LOCAL))
    return folder if folder.is_dir() else Path(source)


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
    """Whether a path is a run's, or unreadable: then `load_checkpoint` tells what is wrong."""
    if path.is_dir():
        return not _is_timm_folder(path)
    return file_kind(path) in (FileKind.RUN, FileKind.UNREADABLE)


def _is_timm_folder(path: Path) -> bool:
    return (path / "config.json").is_file() and not (path / LAST).exists()


def _existing(caller: str, checkpoint: str | Path) -> Path:
    """The file of a checkpoint: itself, a run's ``last.pth``, or the weights in timm's folder."""
    path = _local_path(fetched(caller, checkpoint))
    if path.is_dir() and _is_there(caller, path):
        path = path / ("model.safetensors" if _is_timm_folder(path) else LAST)
    if not path.is_file():
        raise FileNotFoundError(f"{caller}: there is no checkpoint {str(checkpoint)!r}")
    return path


def _of_module(caller: str, module: nn.Module, file: Path | None, weights: str) -> Model:
    if file is not None and _is_run(file):
        return _of_run(load_student(file, weights, module), file)
    _refuse_choice(caller, weights)
    if file is None:
        return _as_timm_feeds_it(module)
    fill(caller, module, file)
    described = read_description(file)
    if described is None:
        return _as_timm_feeds_it(module, file)
    return _as_its_file_says(module, described.config, file)


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
        path = _local_path(fetched(self.caller, self.name))
        if _is_there(self.caller, path):
            if checkpoint is not None:
                raise ValueError(
                    f"{self.caller}: checkpoint has no effect: {self.name} is a checkpoint itself"
                )
            if path.is_dir() and _is_timm_folder(path):
                return self._of_timm_folder(path, pretrained)
            if not pretrained:
                raise ValueError(
                    f"{self.caller}: pretrained=False has no effect: {self.name} holds weights"
                )
            return self._of_file(path)
        file = None if checkpoint is None else _existing(self.caller, checkpoint)
        if file is None:
            return self._of_timm_name(pretrained)
        return self._of_checkpoint(file)

    def _of_file(self, path: Path) -> Model:
        """A run, an exported student or a released checkpoint, which say all themselves."""
        if _is_run(path):
            return self._finished(_of_run(load_student(path, self.weights), path))
        _refuse_choice(self.caller, self.weights)
        if is_export(path):
            return self._of_exported_file(path)
        try:
            released = read_released(path)
        except UnreadableError as error:
            raise type(error)(f"{self.caller}: {error}") from error
        except ValueError as error:
            raise ValueError(
                f"{self.caller}: {path} is no released checkpoint and was not written by fastkd "
                f"({error}); for weights of a timm model give the model's name, and the file with "
                "checkpoint="
            ) from error
        opened = _as_timm_feeds_it(released.model, path)
        arguments = dict(released.arguments)
        return self._finished(replace(opened, name=released.architecture, arguments=arguments))

    def _of_exported_file(self, path: Path) -> Model:
        described = read_description(path)
        network = build_exported(self.caller, path, described)
        assert described is not None
        opened = _as_its_file_says(network, described.config, path)
        return self._finished(
            replace(opened, name=described.architecture, arguments=dict(described.arguments))
        )

    def _of_timm_folder(self, path: Path, pretrained: bool) -> Model:
        _refuse_choice(self.caller, self.weights)
        network = self._build(f"{LOCAL}{path}", pretrained)
        opened = _as_timm_feeds_it(network, path)
        if is_export(path) and pretrained:
            config = network.pretrained_cfg
            opened = _as_its_file_says(network, config, path, self.img_size)
            described = read_description(path / "model.safetensors")
            if described is not None:
                opened = replace(opened, arguments=dict(described.arguments))
                ours, theirs = described.config, config.get  # tuples, and timm's lists
                others = [n for n in ours if json.dumps(ours[n]) != json.dumps(theirs(n))]
                if others and verifies():
                    raise ValueError(
                        f"{self.caller}: config.json and model.safetensors in {path} differ in "
                        f"{', '.join(others)}: one is damaged, or was changed; verify=False "
                        "(--no-verify) takes config.json"
                    )
        return opened

    def _of_timm_name(self, pretrained: bool) -> Model:
        _refuse_choice(self.caller, self.weights)
        if pretrained:
            overlay = self.timm_kwargs.get("pretrained_cfg_overlay")
            check_published_head(self.caller, self.name, self.num_classes, overlay)
        return _as_timm_feeds_it(self._build(self.name, pretrained))

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
            # timm leaves out a head of another size: its configuration may contradict itself.
            check_head(self.caller, name, found, _num_classes(network))
        return network

    def _of_checkpoint(self, file: Path) -> Model:
        """Weights of a file for a timm name."""
        if _is_run(file) and (opened := self._of_named_run(file)) is not None:
            return opened
        if not is_export(file):
            _refuse_choice(self.caller, self.weights)
            options = {**self.timm_kwargs, "num_classes": self.num_classes}
            network = build_from_checkpoint(
                self.caller, self.name, file, img_size=self.img_size, **options
            )
            return _as_timm_feeds_it(network, file)
        described = read_description(file)
        if described is not None and self.name.partition(".")[0] != described.architecture:
            raise ValueError(
                f"{self.caller}: {file} holds a student of {described.architecture}, not of "
                f"{self.name}: give it alone"
            )
        return self._of_file(file)

    def _of_named_run(self, file: Path) -> Model | None:
        """A run says all itself; the name helps where its student was given as a module."""
        if file_kind(file) is FileKind.RUN and "recipe" not in read_file(file, "meta"):
            return None  # only a part of a run's checkpoint, whose weights are read as any others
        state = _load_run(file)
        recipe = recipe_of(file, state)
        if recipe.model is not None and not recipe.model.startswith(MODULE_PREFIX):
            registered, _ = registered_name(recipe.model, recipe.variant, recipe.width)
            names = {name.partition(".")[0] for name in (recipe.model, registered)}
            if self.name.partition(".")[0] not in names:
                raise ValueError(
                    f"{self.caller}: {file} is of a run of {recipe.model}, not of {self.name}: "
                    "give it alone"
                )
            return self._of_file(file)
        options: dict[str, Any] = {key: state[key] for key in ("num_classes", "img_size")}
        if (channels := input_of(state).size[0]) != 3:
            options["in_chans"] = channels
        network = build_timm_model(self.caller, self.name, **options | dict(self.timm_kwargs))
        opened = _of_run(load_student(file, self.weights, network), file)
        return self._finished(opened, refuse_options=False)

    def _finished(self, opened: Model, refuse_options: bool = True) -> Model:
        """A model that its file builds: without its head, or in another size, if asked for."""
        network: Any = opened.network
        given = dict(self.timm_kwargs)
        if given.get("in_chans") == input_channels(network):
            del given["in_chans"]
        if given and refuse_options:
            raise ValueError(
                f"{self.caller}: {next(iter(given))} has no effect: {self.name} says all itself"
            )
        if self.num_classes is not None and opened.num_classes is not None:
            check_head(self.caller, self.name, opened.num_classes, self.num_classes)
        if self.num_classes == 0:
            network.reset_classifier(0)
            opened = replace(opened, num_classes=0, classes=None)
        if self.img_size is None:
            return opened
        size = _pair(self.img_size)
        assert size is not None
        if opened.trained_on is not None:
            channels = opened.trained_on.size[0]
            opened = replace(opened, trained_on=replace(opened.trained_on, size=(channels, *size)))
        change_input_size(network, size)
        return opened


def _of_run(student: LoadedStudent, file: Path) -> Model:
    recipe = student.recipe
    opened = _as_timm_feeds_it(student.model, file / LAST if file.is_dir() else file)
    name: str = opened.name
    arguments: dict[str, Any] = {}
    if recipe.model is not None and not recipe.model.startswith(MODULE_PREFIX):
        name, arguments = registered_name(recipe.model, recipe.variant, recipe.width)
    if student.img_size is not None:
        arguments = arguments | {"img_size": student.img_size}
    return replace(
        opened,
        preprocessing=Preprocessing.of_run(student),
        name=name,
        arguments=arguments,
        weights=student.weights,
        classes=student.classes,
        num_classes=student.num_classes or opened.num_classes,
        trained_on=student.spec,
    )


def _as_its_file_says(
    network: nn.Module, config: Mapping[str, Any], file: Path, img_size: Size | None = None
) -> Model:
    """An exported student: timm's configuration of it is its own, not its architecture's."""
    channels, height, width = config["input_size"]
    mean, std = tuple(config["mean"]), tuple(config["std"])
    names = ("crop_pct", "crop_mode", "interpolation")
    recipe = Recipe(mean=mean, std=std, **{name: config[name] for name in names if name in config})
    if height == width:
        recipe = recipe.override(img_size=height)
    size = _pair(img_size) or (height, width)
    return replace(
        _as_timm_feeds_it(network, file),
        preprocessing=Preprocessing(recipe),
        classes=_class_names(config),
        trained_on=InputSpec((channels, *size), mean, std),
    )


def _as_timm_feeds_it(network: nn.Module, file: Path | None = None) -> Model:
    config = getattr(network, "pretrained_cfg", None) or {}
    return Model(
        network,
        Preprocessing.of_model(network),
        name=str(config.get("architecture") or f"{MODULE_PREFIX}{type(network).__name__}"),
        classes=_class_names(config),
        num_classes=_num_classes(network),
        file=file,
    )


def _num_classes(network: nn.Module) -> int | None:
    found = getattr(network, "num_classes", None)
    return found if isinstance(found, int) else None


def classes_of(
    network: nn.Module, names: Sequence[str] | None = None, count: int | None = None
) -> Classes:
    """The classes of a model, by the names that it was given or that its configuration has.

    Without any, those of the ImageNet that has as many classes are a guess.
    """
    config = getattr(network, "pretrained_cfg", None) or {}
    count = _num_classes(network) if count is None else count
    sources = [names] if names else [config.get("label_names") or (), _class_names(config) or ()]
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


def _class_names(config: Mapping[str, Any]) -> tuple[str, ...] | None:
    """Class names for a reader, of an exported or published model's configuration."""
    names: Sequence[str] = config.get("label_names") or ()
    descriptions = config.get("label_descriptions") or {}
    if not isinstance(descriptions, Mapping):
        return tuple(descriptions)
    return tuple(descriptions.get(name, name) for name in names) or None


def _refuse_choice(caller: str, weights: str) -> None:
    if weights != "auto":
        raise ValueError(
            f"{caller}: weights={weights!r} chooses in a fastkd checkpoint, got a model "
            "without EMA weights to choose from"
        )


def create_teacher(
    source: Source,
    *,
    checkpoint: str | Path | None = None,
    weights: str = "auto",
    pretrained: bool = True,
    num_classes: int | None = None,
    mean: Statistics | None = None,
    std: Statistics | None = None,
    input_size: Size | None = None,
    verify: bool = True,
    **timm_kwargs: Any,
) -> Teacher:
    """Open a model and freeze it as a teacher that is fed what it was trained on.

    Args:
        source: a timm name; ``hf_hub:OWNER/NAME`` or ``local-dir:FOLDER`` in timm's layout; a run's
            folder or checkpoint; a student that `fastkd.export` wrote, the folder or the
            safetensors file; a Lift or WideLast checkpoint as the authors of arXiv 2511.15572
            released them; or a module, which is frozen in place. A file may be
            ``hf_hub:OWNER/NAME/FILE``.
        checkpoint: weights for a name or a module: a path or ``hf_hub:OWNER/NAME/FILE`` (.pth,
            .safetensors; a state dict or a training checkpoint that holds one), read without
            unpickling code. For timm names, the formats that timm converts (original DINOv2, Swin
            ...) load too, and position embeddings are resampled.
        weights: ``"raw"``, ``"ema"`` or ``"auto"`` of a fastkd run; auto takes those that the run
            measured to be better.
        pretrained: without ``checkpoint``, load timm's published weights for a name; for a module
            there is nothing to load. False leaves a name's weights random, which is for tests.
        num_classes: of the head; None takes the checkpoint's or timm's own; 0 leaves the head out,
            for features alone.
        mean: per channel, what the teacher's images are normalized with; None takes what a run or
            an exported student was fed, else timm's ``pretrained_cfg``, if the model has one.
        std: per channel, given together with ``mean``.
        input_size: what images are resized to, (H, W) or a side; None takes the size that a run or
            an exported student was fed, or that the model is fixed to, if it is. To run a timm
            model at another size than its own, pass ``img_size``.
        verify: as in `fastkd.evaluate`.
        **timm_kwargs: of the timm model. With ``img_size``, images are resized to it, also for
            models that are not built for a size; it is the only one for a file that says itself
            what it holds.

    Returns:
        The teacher, on the CPU unless ``device`` is among ``timm_kwargs``.

    Raises:
        ValueError: an unknown name, weights that do not exist or do not fit, or a head that the
            weights do not have.
        FileNotFoundError: there is no file ``checkpoint``, or none that ``source`` is the path of.
        RuntimeError: the pretrained weights cannot be downloaded.
        TypeError: ``source`` is neither, or options of timm are given for a module.
    """
    if isinstance(source, nn.Module):
        refuse_for_modules("create_teacher", {"num_classes": num_classes, **timm_kwargs})
    with verifying(verify):
        opened = open_model(
            source,
            checkpoint=checkpoint,
            weights=weights,
            num_classes=num_classes,
            pretrained=pretrained,
            caller="create_teacher",
            **timm_kwargs,
        )
    img_size = timm_kwargs.get("img_size")
    return as_teacher(opened, mean=mean, std=std, input_size=input_size, built_for=img_size)


def as_teacher(
    opened: Model,
    *,
    mean: Statistics | None = None,
    std: Statistics | None = None,
    input_size: Size | None = None,
    built_for: Size | None = None,
) -> Teacher:
    """Freeze an open model; ``built_for`` is the size that it was asked to be built for."""
    model, fed = opened.network, opened.trained_on
    if mean is None and std is None:
        # A run on tensors was fed them as they came: its statistics are None, not timm's.
        mean, std = _own_statistics(model) if fed is None else (fed.mean, fed.std)
    if built_for is None and fed is not None:
        built_for = fed.size[-2:]
    wanted, fixed = _pair(input_size), _fixed_size(model, built_for)
    if wanted is not None and fixed is not None and wanted != fixed:
        raise ValueError(
            f"create_teacher: {model_name(model)} is fixed to images of {fixed}, got "
            f"input_size={input_size}; build it for another size with img_size={input_size}"
        )
    size = wanted or fixed or _pair(built_for)
    return Teacher(model, mean=mean, std=std, input_size=size, classes=opened.classes)


def _own_statistics(model: nn.Module) -> tuple[Statistics | None, Statistics | None]:
    """Timm's statistics, unless the model was built for another number of channels."""
    cfg = getattr(model, "pretrained_cfg", None) or {}
    mean, std = cfg.get("mean"), cfg.get("std")
    channels = getattr(model, "in_chans", None)
    if mean is None or std is None or (channels is not None and channels != len(mean)):
        return None, None
    return mean, std


def _fixed_size(model: nn.Module, built_for: Size | None) -> tuple[int, int] | None:
    """The one input size a timm model runs at, or None where it runs at any."""
    if hasattr(getattr(model, "patch_embed", None), "strict_img_size"):
        return fixed_input_size(model)
    cfg = getattr(model, "pretrained_cfg", None) or {}
    if not cfg.get("fixed_input_size"):
        return None
    return _pair(built_for) or _pair(tuple(cfg["input_size"][-2:]))


def _pair(size: Size | None) -> tuple[int, int] | None:
    if size is None:
        return None
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))


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
    state = _load_run(checkpoint)
    taken = taken_weights(checkpoint, state, weights)
    recipe, spec = recipe_of(checkpoint, state), input_of(state)
    if model is None:
        model = build_student(recipe, Shape(state["num_classes"], spec.size[0], state["img_size"]))
    elif img_size is not None:
        model = copy.deepcopy(model)
    try:
        model.load_state_dict(state[run_weights(state)[taken]])
    except RuntimeError as error:
        raise ValueError(
            f"student: {checkpoint} does not fit the given model: {short_misfit(error)}"
        ) from None
    if img_size is not None:
        spec = replace(spec, size=(spec.size[0], img_size, img_size))
        change_input_size(model, (img_size, img_size))
    classes = state.get("classes")
    return LoadedStudent(
        model.eval(),
        spec,
        recipe,
        taken,
        tuple(classes) if classes else None,
        state["num_classes"],
        state["img_size"],
    )


def _load_run(checkpoint: str | Path) -> dict[str, Any]:
    """A checkpoint of a run that has all that its student needs."""
    state = load_checkpoint(checkpoint)
    file = Path(checkpoint) / LAST if Path(checkpoint).is_dir() else checkpoint
    checked(Run, state, f"checkpoint: {file}")
    return state


def taken_weights(checkpoint: str | Path, state: Mapping[str, Any], weights: str) -> str:
    """Which of a checkpoint's weights ``"raw"``, ``"ema"`` or ``"auto"`` means."""
    if weights not in ("auto", "raw", "ema"):
        raise ValueError(f"weights: expected auto, raw or ema, got {weights!r}")
    held = run_weights(state)
    if weights != "auto" and weights not in held:
        kind = {"ema": "EMA"}.get(weights, weights)
        raise ValueError(f"weights: {checkpoint} has no {kind} weights, only {', '.join(held)}")
    return better_weights(state) if weights == "auto" else weights


def recipe_of(checkpoint: str | Path, state: Mapping[str, Any]) -> Recipe:
    """The recipe in a checkpoint; the path is for messages."""
    try:
        return Recipe(**state["recipe"])
    except (ValueError, TypeError) as error:
        file = Path(checkpoint) / LAST if Path(checkpoint).is_dir() else checkpoint
        raise CheckpointError(
            f"checkpoint: {file} holds a recipe that this fastkd cannot read: {error}"
        ) from error


def input_of(state: Mapping[str, Any]) -> InputSpec:
    """What the student in a checkpoint was trained on."""
    size, mean, std = (state["input"][name] for name in ("size", "mean", "std"))
    return InputSpec(tuple(size), mean and tuple(mean), std and tuple(std))
