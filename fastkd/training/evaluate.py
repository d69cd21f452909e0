"""`evaluate`: accuracy of any model, checkpoint or module on any data.

Knows how a name becomes a model and its input; the counting is the engine's.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastkd.models import create_teacher
from fastkd.training.augment import InputSpec
from fastkd.training.data import Data, DataPair, eval_loader, open_data
from fastkd.training.distributed import world
from fastkd.training.engine import evaluate_model
from fastkd.training.recipe import Recipe
from fastkd.training.setup import Shape, class_count, input_spec, load_student

# Recipe fields that say how an evaluation sees its images.
OPTIONS = ("img_size", "crop_pct", "interpolation", "mean", "std", "data_root")


def evaluate(
    model: str | Path | nn.Module,
    data: Data,
    *,
    checkpoint: str | Path | None = None,
    weights: str = "auto",
    device: str | torch.device | None = None,
    amp: str = "none",
    batch_size: int = 256,
    workers: int = 4,
    **options: Any,
) -> dict[str, Any]:
    """Measure accuracy on an evaluation set, every image once.

    Args:
        model: a timm name (pretrained, or with ``checkpoint``), a checkpoint or folder of a fastkd
            run, or a module.
        data: as in `train`, of which the evaluation set is used; or one data set, or a folder of
            class folders.
        checkpoint: for a timm name, local weights; for a module, a fastkd checkpoint to load.
        weights: ``"raw"``, ``"ema"`` or ``"auto"`` (EMA where there is one) of a fastkd checkpoint.
        device: as in `train`.
        amp: ``"none"``, ``"bf16"`` or ``"fp16"``.
        batch_size: images per step and process.
        workers: loader processes.
        **options: ``img_size``, ``crop_pct``, ``interpolation``, ``mean``, ``std``, ``data_root``
            as in a recipe; what is not given comes from the run's recipe or timm's configuration.

    Returns:
        ``top1`` and ``top5`` in % (``top5`` None below five classes), ``loss`` (plain
        cross-entropy), ``count`` (images), ``weights`` (``"raw"``, ``"ema"`` or ``"as given"``).

    Raises:
        ValueError: options or data that do not fit, or a checkpoint that cannot be used.
    """
    unknown = set(options) - set(OPTIONS)
    if unknown:
        raise ValueError(f"evaluate: unknown option {sorted(unknown)[0]!r}; there are {OPTIONS}")
    if not isinstance(model, nn.Module) and Path(model).exists() and checkpoint is not None:
        raise ValueError(f"evaluate: {model} is a checkpoint itself; checkpoint= has no effect")
    opened = open_data(data, options.get("data_root"), need_train=False)
    with world(device) as peers:
        network, recipe, spec, used = _resolve(model, checkpoint, weights, opened, options)
        class_count(network, Shape(opened.num_classes, spec.size[0], None))
        recipe = recipe.override(eval_batch_size=batch_size, workers=workers)
        loader = eval_loader(opened, recipe, spec, peers.device, peers.rank, peers.size)
        return evaluate_model(network.to(peers.device), loader, peers, amp) | {"weights": used}


def _resolve(
    model: str | Path | nn.Module,
    checkpoint: str | Path | None,
    weights: str,
    data: DataPair,
    options: dict[str, Any],
) -> tuple[nn.Module, Recipe, InputSpec, str]:
    """The network, the recipe and input by which it is evaluated, and which weights it has."""
    run = model if not isinstance(model, nn.Module) and Path(model).exists() else None
    if isinstance(model, nn.Module) and checkpoint is not None:
        run = checkpoint
    if run is None:
        if weights != "auto":
            raise ValueError(f"evaluate: weights={weights!r} chooses in a fastkd checkpoint")
        network = model if isinstance(model, nn.Module) else _from_timm(str(model), checkpoint)
        recipe = _own_recipe(network).override(**options)
        return network, recipe, input_spec(network, recipe, data), "as given"
    loaded = load_student(run, weights, model if isinstance(model, nn.Module) else None)
    recipe = loaded.recipe.override(**{"mean": loaded.spec.mean, "std": loaded.spec.std, **options})
    return loaded.model, recipe, input_spec(loaded.model, recipe, data), loaded.weights


def _from_timm(name: str, checkpoint: str | Path | None) -> nn.Module:
    return create_teacher(name, checkpoint=checkpoint).model


def _own_recipe(network: nn.Module) -> Recipe:
    """Crop and interpolation that a timm model was published with."""
    config = getattr(network, "pretrained_cfg", None) or {}
    known = {name: config[name] for name in ("crop_pct", "interpolation") if config.get(name)}
    return Recipe().override(**known)
