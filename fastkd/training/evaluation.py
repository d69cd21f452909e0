"""`evaluate`: accuracy of any model, checkpoint or module on any data.

Knows how a name becomes a model and its input; the counting is the engine's.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastkd.models import create_teacher
from fastkd.training.data import eval_loader
from fastkd.training.datasets import Data, open_data
from fastkd.training.distributed import world
from fastkd.training.loop import evaluate_model
from fastkd.training.options import refuse_image_options
from fastkd.training.setup import Preprocessing, Shape, class_count, load_student

# Recipe fields that say how an evaluation sees its images.
OPTIONS = ("img_size", "crop_pct", "crop_mode", "interpolation", "mean", "std", "data_root")


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
        weights: ``"raw"``, ``"ema"`` or ``"auto"`` of a fastkd checkpoint; auto takes the EMA where
            its run measured it to be the better one.
        device: as in `train`.
        amp: ``"none"``, ``"bf16"`` or ``"fp16"``.
        batch_size: images per step and process.
        workers: loader processes.
        **options: ``img_size``, ``crop_pct``, ``crop_mode``, ``interpolation``, ``mean``, ``std``,
            ``data_root`` as in a recipe; what is not given comes from the run's recipe, or is
            timm's for evaluation. Models from a name or a run are built for ``img_size``.

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
    if opened.yields_tensors:
        refuse_image_options(options)
    with world(device) as peers:
        network, preprocessing, used = _resolve(model, checkpoint, weights, options)
        spec = preprocessing.input_spec(network, opened)
        class_count(network, Shape(opened.num_classes, spec.size[0], None))
        recipe = preprocessing.recipe.override(eval_batch_size=batch_size, workers=workers)
        loader = eval_loader(opened, recipe, spec, peers.device, peers.rank, peers.size)
        return evaluate_model(network.to(peers.device), loader, peers, amp) | {"weights": used}


def _resolve(
    model: str | Path | nn.Module,
    checkpoint: str | Path | None,
    weights: str,
    options: dict[str, Any],
) -> tuple[nn.Module, Preprocessing, str]:
    """The network, how it sees its images, and which weights it has."""
    run = model if not isinstance(model, nn.Module) and Path(model).exists() else None
    if isinstance(model, nn.Module) and checkpoint is not None:
        run = checkpoint
    if run is None:
        if weights != "auto":
            raise ValueError(f"evaluate: weights={weights!r} chooses in a fastkd checkpoint")
        size = options.get("img_size")
        network = model if isinstance(model, nn.Module) else _from_timm(model, checkpoint, size)
        return network, Preprocessing.of_model(network).override(**options), "as given"
    if isinstance(model, nn.Module):
        loaded = load_student(run, weights, model)
    else:
        loaded = load_student(run, weights, img_size=options.get("img_size"))
    return loaded.model, Preprocessing.of_run(loaded).override(**options), loaded.weights


def _from_timm(name: str | Path, checkpoint: str | Path | None, img_size: int | None) -> nn.Module:
    return create_teacher(str(name), checkpoint=checkpoint, img_size=img_size).model
