"""What the MODEL of an analysis means: a name, a run, a checkpoint or a module, made one thing.

Files and folders are opened as `evaluate` does; here are teachers, untrained models, and what to
call each. Knows nothing of layers or measurements.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from fastkd.data.datasets import DataPair
from fastkd.data.transforms import InputSpec
from fastkd.inference.loading import OpenedModel, names_a_file, open_model
from fastkd.inference.preprocessing import Preprocessing
from fastkd.models import Teacher
from fastkd.models.taps import model_name
from fastkd.models.zoo import build_timm_model, check_name
from fastkd.utils.random import preserved_rng, seed_cpu

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
        subject: a `Teacher`, or whatever `fastkd.evaluate` takes: a timm name or folder, a folder
            or checkpoint of a fastkd run, an exported student, a released Lift or WideLast
            checkpoint (`load_released_checkpoint`), any module. A file may be on the hub:
            ``hf_hub:OWNER/NAME/FILE``.
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
    kind = _kind(subject)
    options: dict[str, Any] = {
        "checkpoint": checkpoint,
        "untrained": untrained or None,
        "weights": None if weights == "auto" else weights,
        "img_size": img_size,
        "num_classes": num_classes,
    }
    given = {name for name, value in options.items() if value is not None}
    _refuse_without_effect(kind, given, checkpoint)
    if isinstance(subject, Teacher):
        return _from_teacher(subject)
    if kind == "a timm name" and checkpoint is None:
        return _from_name(str(subject), untrained, img_size, num_classes)
    resized = {} if img_size is None else {"img_size": img_size}
    opened = open_model(_CALLER, subject, checkpoint, weights, resized, num_classes)
    name = model_name(subject) if isinstance(subject, nn.Module) else str(subject)
    architecture = model_name(opened.network)
    return Subject(name, _weights_of(opened), architecture, opened.network, opened.preprocessing)


def _kind(subject: Any) -> str:
    if isinstance(subject, nn.Module):
        return "a Teacher" if isinstance(subject, Teacher) else "a module"
    if not isinstance(subject, str | Path):
        raise TypeError(
            f"{_CALLER}: a model must be a timm name, a path or an nn.Module, got "
            f"{type(subject).__name__}"
        )
    return "a checkpoint" if names_a_file(_CALLER, subject) else "a timm name"


def _weights_of(opened: OpenedModel) -> str:
    """Where weights come from, in a few words."""
    if opened.file is None:
        return opened.weights
    chosen = f" ({opened.weights})" if opened.weights in ("raw", "ema") else ""
    return opened.file.name + chosen


def _refuse_without_effect(kind: str, given: set[str], checkpoint: str | Path | None) -> None:
    with_effect = _OPTIONS[kind]
    if kind == "a timm name" and checkpoint is not None:
        with_effect += ("weights",)  # it may be a run's
    useless = sorted(given - set(with_effect))
    if useless:
        known = ", ".join(with_effect) or "none"
        raise ValueError(
            f"{_CALLER}: {useless[0]} has no effect on {kind}; options that have one: {known}"
        )


def _from_name(
    name: str, untrained: bool, img_size: int | None, num_classes: int | None
) -> Subject:
    check_name(_CALLER, name)
    options: dict[str, Any] = {"img_size": img_size, "num_classes": num_classes}
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


def _from_teacher(teacher: Teacher) -> Subject:
    preprocessing = Preprocessing.of_model(teacher.model)
    if teacher.mean is not None:
        preprocessing = preprocessing.override(mean=teacher.mean, std=teacher.std)
    return Subject(
        teacher.name, "as given", teacher.name, teacher.model, preprocessing, teacher.input_size
    )


def _as_timm_feeds_it(name: str, weights: str, model: nn.Module, img_size: int | None) -> Subject:
    preprocessing = Preprocessing.of_model(model)
    if img_size is not None:
        preprocessing = preprocessing.override(img_size=img_size)
    return Subject(name, weights, model_name(model), model, preprocessing)
