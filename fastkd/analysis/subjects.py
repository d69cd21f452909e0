"""What the MODEL of an analysis means: a name, a run, a checkpoint or a module, made one thing.

Knows where models come from and how each sees its images; nothing of layers or measurements.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

from fastkd.models import Teacher, create_teacher, load_released_checkpoint
from fastkd.models.hub import fetched
from fastkd.models.taps import model_name
from fastkd.models.weights import FASTKD_FORMAT, read_weights, short_misfit
from fastkd.models.zoo import build_timm_model, check_name
from fastkd.training.augment import InputSpec
from fastkd.training.checkpoint import LAST
from fastkd.training.datasets import DataPair
from fastkd.training.seeding import preserved_rng, seed_cpu
from fastkd.training.setup import Preprocessing, change_input_size, load_student

UNTRAINED_SEED = 0
_CALLER = "analyze"
_WAYS_OUT = (
    "give local weights with --checkpoint FILE (checkpoint=), or look at random ones with "
    "--untrained (untrained=True)"
)

# Which options mean something for which kind of subject.
_OPTIONS = {
    "a Teacher": (),
    "a module": ("checkpoint", "weights", "img_size"),
    "a checkpoint": ("weights", "img_size"),
    "a timm name": ("checkpoint", "untrained", "img_size", "num_classes"),
}


@dataclass(frozen=True)
class Subject:
    """A model to analyse.

    Attributes:
        name: as given; a module's architecture.
        weights: ``"pretrained"``, ``"untrained"``, ``"as given"`` (a module's), or the name of a
            file, with ``(raw)`` or ``(ema)`` where a run has both kinds.
        architecture: timm's name, with the tag of published weights; or a class name.
        model: on the CPU, or where a module was.
        preprocessing: how its images are resized, cropped and normalised.
        input_size: (H, W) that a `Teacher` resizes its images to; None: as ``preprocessing`` says.
    """

    name: str
    weights: str
    architecture: str
    model: nn.Module
    preprocessing: Preprocessing
    input_size: tuple[int, int] | None = None

    def input_spec(self, data: DataPair) -> InputSpec:
        """Size and statistics of the model's input for these data.

        Raises:
            ValueError: the model takes no images of that size or number of channels.
        """
        spec = self.preprocessing.input_spec(self.model, data)
        if self.input_size is None or data.image_size is not None:
            return spec
        return replace(spec, size=(spec.size[0], *self.input_size))


def resolve(
    subject: str | Path | nn.Module,
    *,
    checkpoint: str | Path | None = None,
    untrained: bool = False,
    weights: str = "auto",
    img_size: int | None = None,
    num_classes: int | None = None,
) -> Subject:
    """Make a model of what a user calls one.

    Args:
        subject: a timm name, a folder or checkpoint of a fastkd run, a released Lift or WideLast
            checkpoint (`load_released_checkpoint`), a `Teacher`, or any module. A file may be on
            the hub: ``hf_hub:OWNER/NAME/FILE``.
        checkpoint: weights for a timm name or a module (which takes them in place), likewise.
        untrained: give a timm name random weights, the same each time, instead of published ones.
        weights: ``"raw"``, ``"ema"`` or ``"auto"`` of a run, as in `fastkd.evaluate`.
        img_size: pixels a side of the input; models from a name or a file are built for it.
        num_classes: of a timm name's head, which nothing measures; None: as published.

    Returns:
        The model and how it sees its images.

    Raises:
        ValueError: no such model, options that do not apply to it, or weights that do not fit.
        FileNotFoundError: there is no such file.
        RuntimeError: published weights cannot be downloaded; names the ways out.
        TypeError: ``subject`` is neither a name, a path nor a module.
    """
    if weights not in ("auto", "raw", "ema"):
        raise ValueError(f"{_CALLER}: weights must be auto, raw or ema, got {weights!r}")
    if untrained and checkpoint is not None:
        raise ValueError(f"{_CALLER}: untrained weights and a checkpoint exclude each other")
    checkpoint = None if checkpoint is None else fetched(_CALLER, checkpoint)
    if not isinstance(subject, nn.Module):
        name, subject = str(subject), fetched(_CALLER, subject)
    kind = _kind(subject)
    options: dict[str, Any] = {
        "checkpoint": checkpoint,
        "untrained": untrained or None,
        "weights": None if weights == "auto" else weights,
        "img_size": img_size,
        "num_classes": num_classes,
    }
    _refuse_without_effect(kind, {name for name, value in options.items() if value is not None})
    if isinstance(subject, Teacher):
        return _from_teacher(subject)
    if isinstance(subject, nn.Module):
        return _from_module(subject, checkpoint, weights, img_size)
    if kind == "a checkpoint":
        path = Path(subject)
        file = path / LAST if path.is_dir() else path
        return _from_file(file, name, weights, img_size)
    return _from_name(name, checkpoint, untrained, img_size, num_classes)


def _kind(subject: Any) -> str:
    if isinstance(subject, nn.Module):
        return "a Teacher" if isinstance(subject, Teacher) else "a module"
    if not isinstance(subject, str | Path):
        raise TypeError(
            f"{_CALLER}: a model must be a timm name, a path or an nn.Module, got "
            f"{type(subject).__name__}"
        )
    path = Path(subject)
    if path.is_file() or (path / LAST).is_file():
        return "a checkpoint"
    if path.is_dir() and not timm.is_model(str(subject)):  # it may only be called like a model
        files = ", ".join(sorted(file.name for file in path.glob("*.pth"))[:3])
        hint = f"; there is {files}: give the file" if files else ""
        raise ValueError(
            f"{_CALLER}: the folder {path} is no run of fastkd: it has no {LAST}{hint}"
        )
    return "a timm name"


def _refuse_without_effect(kind: str, given: set[str]) -> None:
    useless = sorted(given - set(_OPTIONS[kind]))
    if useless:
        known = ", ".join(_OPTIONS[kind]) or "none"
        raise ValueError(
            f"{_CALLER}: {useless[0]} has no effect on {kind}; options that have one: {known}"
        )


def _from_name(
    name: str,
    checkpoint: str | Path | None,
    untrained: bool,
    img_size: int | None,
    num_classes: int | None,
) -> Subject:
    check_name(_CALLER, name)
    options: dict[str, Any] = {"img_size": img_size, "num_classes": num_classes}
    if checkpoint is not None:
        model = create_teacher(name, checkpoint=checkpoint, **options).model
        return _as_timm_feeds_it(name, Path(checkpoint).name, model, img_size)
    if untrained:
        with preserved_rng():
            seed_cpu(UNTRAINED_SEED)
            model = build_timm_model(_CALLER, name, **options)
        return _as_timm_feeds_it(name, "untrained", model, img_size)
    model = build_timm_model(_CALLER, name, pretrained=True, alternative=_WAYS_OUT, **options)
    subject = _as_timm_feeds_it(name, "pretrained", model, img_size)
    return replace(subject, architecture=_published_name(model) or subject.architecture)


def _published_name(model: Any) -> str | None:
    """``architecture.tag``: which of several published sets of weights timm has loaded."""
    config = getattr(model, "pretrained_cfg", None) or {}
    architecture, tag = config.get("architecture"), config.get("tag")
    return f"{architecture}.{tag}" if architecture and tag else None


def _from_module(
    module: nn.Module, checkpoint: str | Path | None, weights: str, img_size: int | None
) -> Subject:
    name = model_name(module)
    if checkpoint is not None and _is_fastkd_checkpoint(checkpoint):
        return _from_run(Path(checkpoint), name, weights, img_size, module)
    if weights != "auto":
        raise _no_choice(weights, checkpoint or "a module")
    if checkpoint is None:
        return _as_timm_feeds_it(name, "as given", module, img_size)
    try:
        module.load_state_dict(_read(checkpoint, read_weights))
    except RuntimeError as error:
        raise ValueError(
            f"{_CALLER}: {checkpoint} does not fit {name}: {short_misfit(error)}"
        ) from error
    return _as_timm_feeds_it(name, Path(checkpoint).name, module, img_size)


def _from_teacher(teacher: Teacher) -> Subject:
    preprocessing = Preprocessing.of_model(teacher.model)
    if teacher.mean is not None:
        preprocessing = preprocessing.override(mean=teacher.mean, std=teacher.std)
    return Subject(
        teacher.name, "as given", teacher.name, teacher.model, preprocessing, teacher.input_size
    )


def _from_run(
    checkpoint: Path,
    name: str,
    weights: str,
    img_size: int | None,
    module: nn.Module | None = None,
) -> Subject:
    loaded = load_student(checkpoint, weights, module, img_size=img_size)
    preprocessing = _resized(Preprocessing.of_run(loaded), img_size)
    used = f"{checkpoint.name} ({loaded.weights})"
    return Subject(name, used, model_name(loaded.model), loaded.model, preprocessing)


def _from_file(path: Path, name: str, weights: str, img_size: int | None) -> Subject:
    if _is_fastkd_checkpoint(path):
        return _from_run(path, name, weights, img_size)
    if weights != "auto":
        raise _no_choice(weights, path)
    try:
        model = load_released_checkpoint(path)
    except ValueError as error:
        raise ValueError(
            f"{_CALLER}: {path} is no checkpoint of a fastkd run, and as a released one it is "
            f"refused ({error}); for weights of a timm model give the model's name and "
            f"--checkpoint {path}"
        ) from error
    if img_size is not None:
        change_input_size(model, (img_size, img_size))
    return _as_timm_feeds_it(name, path.name, model, img_size)


def _as_timm_feeds_it(name: str, weights: str, model: nn.Module, img_size: int | None) -> Subject:
    preprocessing = _resized(Preprocessing.of_model(model), img_size)
    return Subject(name, weights, model_name(model), model, preprocessing)


def _resized(preprocessing: Preprocessing, img_size: int | None) -> Preprocessing:
    return preprocessing if img_size is None else preprocessing.override(img_size=img_size)


def _is_fastkd_checkpoint(path: str | Path) -> bool:
    state = _read(path, _read_state) if Path(path).suffix != ".safetensors" else None
    return isinstance(state, Mapping) and state.get("format") == FASTKD_FORMAT


def _read_state(path: str | Path) -> Any:
    return torch.load(path, map_location="cpu", weights_only=True)


def _read(path: str | Path, read: Callable[[str | Path], Any]) -> Any:
    if not Path(path).is_file():
        raise FileNotFoundError(f"{_CALLER}: there is no checkpoint {str(path)!r}")
    try:
        return read(path)
    except PermissionError:
        raise
    except Exception as error:  # bytes that are no checkpoint fail in any way
        reason = " ".join(str(error).split())[:160]
        raise ValueError(
            f"{_CALLER}: {path} cannot be read as weights: torn, no checkpoint, or more than plain "
            f"state, which is not loaded for safety ({reason})"
        ) from error


def _no_choice(weights: str, where: object) -> ValueError:
    return ValueError(f"{_CALLER}: weights={weights!r} chooses in a run of fastkd, got {where}")
