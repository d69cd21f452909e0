"""A model as a source of tokens: which layers are read, and how the model sees the images."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastkd.analysis.images import ImageSelection
from fastkd.analysis.study import Batch, Layer, Options, parse_layers
from fastkd.data.datasets import DataPair
from fastkd.data.loader import default_workers
from fastkd.data.transforms import InputSpec
from fastkd.inference.open_model import names_a_file, open_model
from fastkd.inference.preprocessing import Preprocessing, parameter_count
from fastkd.models import LiftVisionTransformer, Taps, Teacher
from fastkd.models.taps import TapKey, evaluating, model_name
from fastkd.utils.argument_checks import describe
from fastkd.utils.distributed import autocast
from fastkd.utils.random import preserved_rng, seed_cpu

UNTRAINED_SEED = 0
FINAL = "final"  # the tokens that a model's head pools


@dataclass(frozen=True)
class Subject:
    """A model to analyze."""

    name: str  # as given by the user; of a module, its architecture
    weights: str  # as in `ModelResult`; with (raw) or (ema) if a run has both kinds
    architecture: str  # timm's name, with the tag of published weights; or a class name
    model: nn.Module  # on the CPU, or where a module was
    preprocessing: Preprocessing
    input_size: tuple[int, int] | None = None  # (H, W) that a Teacher resizes its images to

    def input_spec(self, data: DataPair) -> InputSpec:
        """Return size and statistics of the model's input for these data."""
        spec = self.preprocessing.input_spec(self.model, data)
        if self.input_size is None or data.image_size is not None:
            return spec
        return replace(spec, size=(spec.size[0], *self.input_size))


def open_subject(
    model: str | Path | nn.Module,
    *,
    checkpoint: str | Path | None = None,
    untrained: bool = False,
    weights: str = "auto",
    img_size: int | None = None,
) -> Subject:
    """Open a model, or the one in a Teacher; untrained weights are the same each time."""
    has_weights = isinstance(model, nn.Module) or (untrained and names_a_file("analyze", model))
    if untrained and (has_weights or checkpoint is not None):
        raise ValueError(
            f"analyze: untrained=True needs a timm name without checkpoint, got {describe(model)} "
            f"and checkpoint={checkpoint}"
        )
    teacher = model if isinstance(model, Teacher) else None
    if teacher is not None and (checkpoint, weights, img_size) != (None, "auto", None):
        raise ValueError(
            "analyze: a Teacher has its weights and input size; expected no checkpoint, weights or "
            f"img_size, got checkpoint={checkpoint}, weights={weights!r}, img_size={img_size}"
        )
    with preserved_rng():
        seed_cpu(UNTRAINED_SEED)
        opened = open_model(
            model if teacher is None else teacher.model,
            checkpoint=checkpoint,
            weights=weights,
            img_size=img_size,
            pretrained=not untrained,
            caller="analyze",
            alternative="give local weights with --checkpoint FILE (checkpoint=), or look at "
            "random ones with --untrained (untrained=True)",
        )
    network, preprocessing = opened.network, opened.preprocessing
    name = model_name(network) if isinstance(model, nn.Module) else str(model)
    found, architecture = opened.weights, model_name(network)
    if opened.file is not None:
        found = opened.file.name + (f" ({found})" if found in ("raw", "ema") else "")
    elif not isinstance(model, nn.Module):
        found = "untrained" if untrained else "pretrained"
        config: dict[str, Any] = getattr(network, "pretrained_cfg", None) or {}
        if not untrained and config.get("architecture") and config.get("tag"):
            architecture = f"{config['architecture']}.{config['tag']}"
    if teacher is None:
        return Subject(name, found, architecture, network, preprocessing)
    if teacher.mean is not None:
        preprocessing = preprocessing.override(mean=teacher.mean, std=teacher.std)
    return Subject(name, found, architecture, network, preprocessing, teacher.input_size)


class ModelSource:
    """Tokens of a model's layers on a selection of images.

    The model is moved to the device and runs in eval mode without gradient; every module's mode is
    restored after each batch.
    """

    def __init__(
        self,
        subject: Subject,
        images: ImageSelection,
        options: Options,
        device: str | torch.device = "cpu",
    ) -> None:
        self.name = subject.name
        self.weights = subject.weights
        self.architecture = subject.architecture
        self.parameters: int | None = parameter_count(subject.model)
        self.images = len(images)
        self._device = torch.device(device)
        self._model = subject.model.to(self._device)
        self._config = subject.preprocessing.recipe
        self._spec = subject.input_spec(images.data)
        self.input_size: tuple[int, int] | None = self._spec.size[1:]
        self._selection = images
        self._options = options
        self._choice = _choose_layers(self._model, parse_layers(options.layers))
        if options.num_prefix and not self._choice.by_name:
            raise ValueError(
                "num_prefix: expected modules by name as layers, since the prefix tokens of blocks "
                f"and stages are known, got num_prefix={options.num_prefix} with layers "
                f"{options.layers!r}"
            )
        self._taps = Taps(self._model, self._choice.keys, num_prefix=options.num_prefix)
        # An image of zeros shows the widths.
        probe = self._tokens(torch.zeros(1, *self._spec.size))
        named = zip(self._choice.names, self._choice.numbers, probe, strict=True)
        self.layers = [Layer(name, index, tokens.shape[2]) for name, index, tokens in named]

    @cached_property
    def fingerprint(self) -> dict[str, Any]:
        """What the tokens depend on; hashes all weights once, on the CPU."""
        spec, config = self._spec, self._config
        statistics = [value and list(value) for value in (spec.mean, spec.std)]
        crop = [config.crop_pct, config.crop_mode, config.interpolation]
        return {
            "architecture": self.architecture,
            "weights": weights_hash(self._model),
            "layers": [layer.name for layer in self.layers],
            "amp": self._options.amp,
            "num_prefix": self._options.num_prefix,
            "selection": self._selection.fingerprint,
            "transform": [list(spec.size), *statistics, *crop],
        }

    def batches(self, start: int = 0, stop: int | None = None) -> Iterator[Batch]:
        """Yield tokens of the images at places start..stop-1, in order."""
        workers = self._options.workers
        reading = self._selection.read(
            self._config,
            self._spec,
            range(start, self.images if stop is None else stop),
            batch_size=self._options.batch_size,
            workers=default_workers() if workers is None else workers,
            device=self._device,
        )
        for read in reading:
            tokens = [] if read.images is None else self._tokens(read.images)
            skipped = [(p, self._selection.name(p), reason) for p, reason in read.skipped]
            yield Batch(read.places, tokens, skipped)

    def _tokens(self, images: Tensor) -> list[Tensor]:
        amp = autocast(self._device, self._options.amp)
        with torch.inference_mode(), evaluating(self._model), amp:
            output = self._taps(images.to(self._device, non_blocking=True))
        tokens = [output.tokens[key].data for key in self._choice.keys]
        if not self._choice.final:
            return tokens
        if output.final is None:
            raise ValueError(f"layers: {model_name(self._model)} has no {FINAL!r} tokens")
        return [*tokens, output.final.data]


class _Choice(NamedTuple):
    keys: list[TapKey]  # for `Taps`
    names: list[str]  # of all layers, with "final"
    numbers: list[int]  # `Layer.index`
    final: bool = False
    by_name: bool = False


def _choose_layers(model: Any, layers: str | list[int | str]) -> _Choice:
    stages = _stages(model)
    if isinstance(layers, str) and not stages:
        some = ", ".join([name for name, _ in model.named_modules() if name][:8])
        raise ValueError(
            f"layers: expected names of modules, such as {some}, since {model_name(model)} has no "
            f"blocks or stages in timm's count, got {layers!r}"
        )
    if isinstance(layers, str):
        last = [len(stages) - 1]
        final = [FINAL] if isinstance(model, LiftVisionTransformer) else []
        layers = [*(last if layers == "last" else range(len(stages))), *final]
    # Name a block of timm's count, and its prefix tokens are known.
    keys = [stages.index(key) if key in stages else key for key in layers]
    numbers = [key for key in keys if isinstance(key, int)]
    names = [key for key in keys if isinstance(key, str) and not (stages and key == FINAL)]
    final_too = len(numbers) + len(names) < len(keys)
    if not names:
        numbers = sorted(key for key in Taps(model, numbers).indices if isinstance(key, int))
        return _Choice(
            list(numbers),
            [stages[number] for number in numbers] + [FINAL] * final_too,
            numbers + [len(stages)] * final_too,
            final_too,
        )
    if numbers or final_too:
        raise ValueError(
            f"layers: blocks ({', '.join(map(str, numbers)) or FINAL}) and other modules "
            f"({', '.join(names)}) cannot be read in one pass; choose one kind"
        )
    names = list(dict.fromkeys(names))
    return _Choice(list(names), names, list(range(len(names))), by_name=True)


def _stages(model: Any) -> list[str]:
    """List the names of the blocks or stages in timm's count; none without timm's interface."""
    if not hasattr(model, "feature_info") or not hasattr(model, "forward_intermediates"):
        return []
    return [str(model.feature_info[i]["module"]) for i in range(len(model.feature_info))]


def weights_hash(module: nn.Module) -> str:
    """Hash names, types, shapes and bytes of a module's state; about a second a gigabyte."""
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        if isinstance(value, Tensor):
            digest.update(f"{name} {value.dtype} {list(value.shape)}".encode())
            data = value.detach().cpu().contiguous().reshape(-1)
            digest.update(data.view(torch.uint8).numpy().data)
        else:
            digest.update(f"{name} {value!r}".encode())
    return digest.hexdigest()
