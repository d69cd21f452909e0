"""The protocol of token sources, and models as such sources."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fastkd.analysis.images import ImageSelection
from fastkd.data.readers import DataPair
from fastkd.data.transforms import InputSpec
from fastkd.inference.evaluate import evaluating
from fastkd.inference.loading import Model, names_a_file, open_model
from fastkd.inference.preprocessing import Preprocessing, parameter_count
from fastkd.models import LiftVisionTransformer, Taps, Teacher
from fastkd.models.taps import TapKey, model_name
from fastkd.utils.distributed import AMP_DTYPES, autocast
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

FINAL = "final"
LayerChoice = str | Sequence[int | str]


@dataclass(frozen=True)
class Layer:
    """One layer of a source.

    Attributes:
        name: ``"blocks.23"``, ``"stages.3"``, ``"final"`` (what a model's head pools), or a
            module's name; ``"layer.3"`` of saved tokens.
        index: its number among the blocks or stages (``"final"`` comes after them), or its place
            among the modules asked for by name.
        channels: D.
    """

    name: str
    index: int
    channels: int


@dataclass(frozen=True)
class Batch:
    """Tokens of some images.

    Attributes:
        places: of the images that were read, ascending.
        tokens: per layer [B, N, D] on the source's device, prefix tokens dropped, in the dtype that
            the model gives and with any strides; empty where no image of the batch was read.
        skipped: (place, image's name, reason) of the images that could not be read.
    """

    places: list[int]
    tokens: list[Tensor]
    skipped: list[tuple[int, str, str]]


class TokenSource(Protocol):
    """What the analysis loop needs to know of tokens.

    Attributes:
        name: as given by the user.
        weights: ``"pretrained"``, ``"untrained"``, ``"as given"``, a file's name, or ``"saved
            tokens"``.
        architecture: timm's name or a class name; ``""`` for saved tokens.
        parameters: how many the model has; None for saved tokens.
        input_size: (H, W) of the images fed in; None for saved tokens.
        layers: in depth order.
        images: how many were selected, readable or not.
    """

    name: str
    weights: str
    architecture: str
    parameters: int | None
    input_size: tuple[int, int] | None
    layers: list[Layer]
    images: int

    @property
    def fingerprint(self) -> dict[str, Any]:
        """What the tokens depend on, as plain values that JSON keeps: equal means equal tokens."""
        ...

    def batches(self, start: int = 0, stop: int | None = None) -> Iterator[Batch]:
        """Tokens of the images at places start..stop-1, in order."""
        ...


class ModelSource:
    """Tokens of a model's layers on a selection of images.

    The model is moved to the device. It runs in eval mode and without gradient; every module's mode
    is put back after each batch. One image of zeros is fed at the start, to see the layers.

    Args:
        subject: the model and how it sees its images.
        images: the selection.
        layers: ``"all"`` blocks or stages that timm counts, the ``"last"`` of them, or some by
            number (negative from the end) or name (``"0,5,23"`` and ``[0, 5, 23]`` are the same).
            Of a Lift student both words add ``"final"``, its lifted tokens, which of any other
            model must be asked for. Modules that are no blocks are read by name, alone, in the
            order given.
        batch_size: images per forward pass.
        workers: loader processes.
        device: where the model runs.
        amp: ``"none"``, ``"bf16"`` or ``"fp16"``: autocast of the forward pass.
        num_prefix: for modules by name: tokens at the front of a [B, N, D] output that are no
            patches.

    Raises:
        ValueError: a layer, precision or input that the model does not have.
    """

    def __init__(
        self,
        subject: Subject,
        images: ImageSelection,
        *,
        layers: LayerChoice = "all",
        batch_size: int = 64,
        workers: int = 4,
        device: str | torch.device = "cpu",
        amp: str = "none",
        num_prefix: int = 0,
    ) -> None:
        check_batch_size(batch_size)
        if amp != "none" and amp not in AMP_DTYPES:
            raise ValueError(f"amp: expected none, {' or '.join(AMP_DTYPES)}, got {amp!r}")
        self.name = subject.name
        self.weights = subject.weights
        self.architecture = subject.architecture
        self.parameters: int | None = parameter_count(subject.model)
        self.images = len(images)
        self._device = torch.device(device)
        self._model = subject.model.to(self._device)
        self._recipe = subject.preprocessing.recipe
        self._spec = subject.input_spec(images.data)
        self.input_size: tuple[int, int] | None = self._spec.size[1:]
        self._selection = images
        self._batch_size = batch_size
        self._workers = workers
        self._amp = amp
        self._num_prefix = num_prefix
        self._reader = _choose_reader(self._model, parse_layers(layers), num_prefix)
        if num_prefix and isinstance(self._reader, _StageReader):
            raise ValueError(
                f"num_prefix: it is of modules read by name; blocks and stages know their prefix "
                f"tokens, got num_prefix={num_prefix} with layers {layers!r}"
            )
        probe = self._tokens(torch.zeros(1, *self._spec.size))
        self.layers = [
            Layer(name, index, tokens.shape[2])
            for name, index, tokens in zip(
                self._reader.names, self._reader.numbers, probe, strict=True
            )
        ]

    @cached_property
    def fingerprint(self) -> dict[str, Any]:
        """Model, layers, selection and transform; hashes all weights once, on the CPU."""
        return {
            "architecture": self.architecture,
            "weights": weights_hash(self._model),
            "layers": [layer.name for layer in self.layers],
            "amp": self._amp,
            "num_prefix": self._num_prefix,
            "selection": self._selection.fingerprint,
            "transform": self._transform(),
        }

    def batches(self, start: int = 0, stop: int | None = None) -> Iterator[Batch]:
        """As `TokenSource.batches`; loader processes live as long as the iteration."""
        places = checked_places(start, stop, self.images)
        reading = self._selection.read(
            self._recipe,
            self._spec,
            places,
            batch_size=self._batch_size,
            workers=self._workers,
            device=self._device,
        )
        for read in reading:
            tokens = [] if read.images is None else self._tokens(read.images)
            skipped = [(p, self._selection.name(p), reason) for p, reason in read.skipped]
            yield Batch(read.places, tokens, skipped)

    def _tokens(self, images: Tensor) -> list[Tensor]:
        images = images.to(self._device, non_blocking=True)
        with torch.inference_mode(), evaluating(self._model), autocast(self._device, self._amp):
            return self._reader(images)

    def _transform(self) -> dict[str, Any]:
        spec, recipe = self._spec, self._recipe
        shared = {
            "size": list(spec.size),
            "mean": spec.mean and list(spec.mean),
            "std": spec.std and list(spec.std),
        }
        if self._selection.data.yields_tensors:
            return shared
        names = ("crop_pct", "crop_mode", "interpolation")
        return shared | {name: getattr(recipe, name) for name in names}


def parse_layers(layers: LayerChoice) -> str | list[int | str]:
    """Bring a choice of layers to one form."""
    if layers in ("all", "last"):
        return str(layers)
    items = layers.split(",") if isinstance(layers, str) else layers
    if not isinstance(items, Sequence) or any(
        isinstance(item, bool) or not isinstance(item, int | str) for item in items
    ):
        raise TypeError(f"layers: expected all, last, or numbers and names, got {layers!r}")
    if len(items) == 1 and items[0] in ("all", "last"):
        return str(items[0])
    chosen = [-1 if item == "last" else _number_or_name(item) for item in items]
    if not chosen or "" in chosen:
        raise ValueError(f"layers: expected all, last, or numbers and names, got {layers!r}")
    return chosen


def checked_places(start: int, stop: int | None, images: int) -> range:
    """The places that `TokenSource.batches` is asked for."""
    stop = images if stop is None else stop
    if not 0 <= start <= stop <= images:
        raise ValueError(f"batches: expected 0 <= start <= stop <= {images}, got {start}..{stop}")
    return range(start, stop)


def check_batch_size(batch_size: int) -> None:
    """Refuse batches of nothing."""
    if batch_size < 1:
        raise ValueError(f"batch_size: expected at least 1, got {batch_size}")


def weights_hash(module: nn.Module) -> str:
    """SHA-256 of a module's state: names, types, shapes and bytes. About a second a gigabyte."""
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        if isinstance(value, Tensor):
            digest.update(f"{name} {value.dtype} {list(value.shape)}".encode())
            data = value.detach().cpu().contiguous().reshape(-1)
            digest.update(data.view(torch.uint8).numpy().data)
        else:
            digest.update(f"{name} {value!r}".encode())
    return digest.hexdigest()


class _StageReader:
    """Blocks or stages as timm counts them, and what follows the last one."""

    def __init__(self, model: nn.Module, stages: list[str], numbers: list[int], final: bool):
        self._model_name = model_name(model)
        self._taps = Taps(model, numbers)
        self._keys = sorted(key for key in self._taps.indices if isinstance(key, int))
        self._final = final
        self._only_last = self._keys == [len(stages) - 1] and not final
        self.names = [stages[key] for key in self._keys] + [FINAL] * final
        self.numbers = self._keys + [len(stages)] * final

    def __call__(self, images: Tensor) -> list[Tensor]:
        if self._only_last:
            return [self._taps.last_block(images).data]
        output = self._taps(images)
        tokens = [output.tokens[key].data for key in self._keys]
        if not self._final:
            return tokens
        if output.final is None:
            raise ValueError(f"layers: {self._model_name} has no {FINAL!r} tokens")
        return [*tokens, output.final.data]


class _ModuleReader:
    """Any modules, by name."""

    def __init__(self, model: nn.Module, names: list[str], num_prefix: int):
        self._taps = Taps(model, names, num_prefix=num_prefix)
        self.names = [str(key) for key in self._taps.indices]
        self.numbers = list(range(len(self.names)))

    def __call__(self, images: Tensor) -> list[Tensor]:
        tokens = self._taps(images).tokens
        return [tokens[name].data for name in self.names]


def _choose_reader(
    model: nn.Module, layers: str | list[int | str], num_prefix: int
) -> _StageReader | _ModuleReader:
    stages = _stages(model)
    if isinstance(layers, str):
        return _reader_of_word(model, stages, layers)
    # What a report calls a block is the block, with its prefix tokens known, and no mere module.
    keys: list[TapKey] = [stages.index(key) if key in stages else key for key in layers]
    numbers = [key for key in keys if isinstance(key, int)]
    names = [key for key in keys if isinstance(key, str) and not (stages and key == FINAL)]
    final = len(numbers) + len(names) < len(keys)
    if not names:
        return _StageReader(model, stages, numbers, final)
    if numbers or final:
        raise ValueError(
            f"layers: blocks ({', '.join(map(str, numbers)) or FINAL}) and other modules "
            f"({', '.join(names)}) cannot be read in one pass; choose one kind"
        )
    return _ModuleReader(model, names, num_prefix)


def _reader_of_word(model: nn.Module, stages: list[str], word: str) -> _StageReader:
    if not stages:
        some = ", ".join([name for name, _ in model.named_modules() if name][:8])
        raise ValueError(
            f"layers: {model_name(model)} has no blocks or stages that timm counts, so {word!r} "
            f"says nothing; name modules, such as {some}"
        )
    numbers = list(range(len(stages))) if word == "all" else [len(stages) - 1]
    return _StageReader(model, stages, numbers, isinstance(model, LiftVisionTransformer))


def _stages(model: Any) -> list[str]:
    """Names of the blocks or stages in timm's count; none where the model has no such interface."""
    if not hasattr(model, "feature_info") or not hasattr(model, "forward_intermediates"):
        return []
    return [str(model.feature_info[i]["module"]) for i in range(len(model.feature_info))]


def _number_or_name(item: int | str) -> int | str:
    try:
        return int(item)
    except ValueError:
        return str(item).strip()


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
        """Size and statistics of the model's input for these data."""
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
    """Open a `Teacher`, or whatever `open_model` opens, to look at its tokens.

    ``untrained`` gives a timm name random weights, the same each time.
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
    with preserved_rng():
        seed_cpu(UNTRAINED_SEED)
        opened = open_model(
            subject,
            checkpoint=checkpoint,
            weights=weights,
            img_size=img_size,
            num_classes=num_classes,
            pretrained=not untrained,
            caller=_CALLER,
            alternative=_WAYS_OUT,
        )
    name = model_name(subject) if isinstance(subject, nn.Module) else str(subject)
    architecture, found = model_name(opened.network), _weights_of(opened)
    if kind == "a timm name" and checkpoint is None:
        found = "untrained" if untrained else "pretrained"
        architecture = (None if untrained else _published_name(opened.network)) or architecture
    return Subject(name, found, architecture, opened.network, opened.preprocessing)


def _kind(subject: Any) -> str:
    if isinstance(subject, nn.Module):
        return "a Teacher" if isinstance(subject, Teacher) else "a module"
    if not isinstance(subject, str | Path):
        raise TypeError(
            f"{_CALLER}: a model must be a timm name, a path or an nn.Module, got "
            f"{type(subject).__name__}"
        )
    return "a checkpoint" if names_a_file(_CALLER, subject) else "a timm name"


def _weights_of(opened: Model) -> str:
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
