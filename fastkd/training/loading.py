"""What MODEL means to `evaluate` and `predict`: a name, a file, a run or a module, made one thing.

Knows where models come from and how each sees its images; not what is then done with them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from fastkd.models.hub import fetched
from fastkd.models.pretrained import build_pretrained
from fastkd.models.weights import is_foreign
from fastkd.training.checkpoint import LAST
from fastkd.training.setup import LoadedStudent, Preprocessing, load_student, weights_in

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
    """

    network: nn.Module
    preprocessing: Preprocessing
    weights: str = "as given"
    classes: tuple[str, ...] | None = None


def open_model(
    caller: str,
    model: str | Path | nn.Module,
    checkpoint: str | Path | None,
    weights: str,
    options: dict[str, Any],
) -> OpenedModel:
    """Make a model of what a user calls one.

    Args:
        caller: the public function that asks, named in errors.
        model: a timm name (``hf_hub:...`` and ``local-dir:...`` too), a timm folder as `export`
            writes it, a run's folder, a checkpoint of a run, a checkpoint that the authors of arXiv
            2511.15572 released (a path or ``hf_hub:OWNER/NAME/FILE``), or a module.
        checkpoint: weights for a timm name; for a module, a checkpoint of a run.
        weights: ``"raw"``, ``"ema"`` or ``"auto"`` of a run's checkpoint.
        options: by the names of `IMAGE_OPTIONS`; others are let alone.

    Returns:
        The model, and how it sees its images with these options.

    Raises:
        ValueError: options that do not fit the model, or a checkpoint that cannot be used.
        FileNotFoundError: there is no such file.
        RuntimeError: weights cannot be downloaded.
    """
    changes = {name: options[name] for name in IMAGE_OPTIONS if name in options}
    if isinstance(model, nn.Module):
        opened = _of_module(caller, model, checkpoint, weights)
    else:
        source = Path(fetched(caller, model))
        if checkpoint is not None and source.exists():
            raise ValueError(f"{caller}: {model} is a checkpoint itself; checkpoint= has no effect")
        if _is_run(source):
            opened = _of_run(load_student(source, weights, img_size=changes.get("img_size")))
        else:
            _refuse_choice(caller, weights)
            opened = _from_elsewhere(caller, model, source, checkpoint, changes.get("img_size"))
    return replace(opened, preprocessing=opened.preprocessing.override(**changes))


def weights_to_choose(caller: str, model: str | Path) -> tuple[str, ...]:
    """Which weights there are of what a user calls a model.

    Args:
        caller: as in `open_model`, as are the others.
        model: no module.

    Returns:
        ``("raw",)`` or ``("raw", "ema")`` of a run; none where there is no choice.

    Raises:
        CheckpointError: a run's file cannot be used.
        RuntimeError: it cannot be downloaded.
    """
    source = Path(fetched(caller, model))
    return weights_in(source) if _is_run(source) else ()


def _is_run(path: Path) -> bool:
    """Whether what is there is a run's, or should be."""
    return path.exists() and not _is_timm_folder(path) and not is_foreign(path)


def _is_timm_folder(path: Path) -> bool:
    return (path / "config.json").is_file() and not (path / LAST).exists()


def _of_module(
    caller: str, module: nn.Module, checkpoint: str | Path | None, weights: str
) -> OpenedModel:
    if checkpoint is not None:
        return _of_run(load_student(fetched(caller, checkpoint), weights, module))
    _refuse_choice(caller, weights)
    return _as_timm_feeds_it(module)


def _from_elsewhere(
    caller: str,
    model: str | Path,
    source: Path,
    checkpoint: str | Path | None,
    img_size: int | None,
) -> OpenedModel:
    """A timm name, or a file or folder that is no run's."""
    name: str | Path = source if source.exists() else str(model)
    if source.is_dir():
        name = f"local-dir:{source}"
    return _as_timm_feeds_it(build_pretrained(caller, name, checkpoint, img_size=img_size))


def _of_run(student: LoadedStudent) -> OpenedModel:
    preprocessing = Preprocessing.of_run(student)
    return OpenedModel(student.model, preprocessing, student.weights, student.classes)


def _as_timm_feeds_it(network: nn.Module) -> OpenedModel:
    return OpenedModel(network, Preprocessing.of_model(network), classes=_published(network))


def _published(network: nn.Module) -> tuple[str, ...] | None:
    """Names of the classes that an exported or published model carries in timm's configuration."""
    names: Sequence[str] | None = (getattr(network, "pretrained_cfg", None) or {}).get(
        "label_names"
    )
    return tuple(names) if names else None


def _refuse_choice(caller: str, weights: str) -> None:
    if weights != "auto":
        raise ValueError(f"{caller}: weights={weights!r} chooses in a fastkd checkpoint")
