"""Accuracy of any model on any data."""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import Unpack

from fastkd.config import IMAGE_OPTIONS, EvaluateOptions, refuse_image_options
from fastkd.data.batches import Batch, Fault
from fastkd.data.classes import Classes, match_classes
from fastkd.data.datasets import Data, open_data
from fastkd.data.loader import default_workers, eval_loader
from fastkd.data.transforms import InputSpec
from fastkd.inference.loading import classes_of, open_model
from fastkd.models.weights import verifying
from fastkd.utils.arguments import MOST_WORKERS, check_numbers
from fastkd.utils.distributed import World, autocast, world
from fastkd.utils.hints import suggestion

OPTIONS = (*IMAGE_OPTIONS, "data_root")
SHOWN = 3  # names of unreadable images that are said

logger = logging.getLogger("fastkd")


def evaluate(
    model: str | Path | nn.Module,
    data: Data,
    *,
    checkpoint: str | Path | None = None,
    weights: Literal["auto", "raw", "ema"] = "auto",
    device: str | torch.device | None = None,
    amp: Literal["none", "bf16", "fp16"] = "none",
    batch_size: int = 256,
    workers: int | None = None,
    verify: bool = True,
    classes_by: Literal["name", "number"] = "name",
    **options: Unpack[EvaluateOptions],
) -> dict[str, Any]:
    """Measure accuracy on an evaluation set, every image once.

    Args:
        model: a timm name (pretrained, or with ``checkpoint``; ``hf_hub:OWNER/NAME`` and
            ``local-dir:FOLDER`` too), a folder that `export` wrote for timm, a checkpoint or folder
            of a fastkd run, a student exported as safetensors, a checkpoint that the authors of
            arXiv 2511.15572 released (a path, or ``hf_hub:OWNER/NAME/FILE``), or a module.
        data: as in `train`, of which the evaluation set is used; or one data set, or a folder of
            class folders.
        checkpoint: for a timm name or a module, weights in a file, which a module takes in place.
            A checkpoint of a run and an exported student bring what they were fed.
        weights: ``"raw"``, ``"ema"`` or ``"auto"`` of a fastkd checkpoint; auto takes the EMA where
            its run measured it to be the better one.
        device: as in `train`.
        amp: ``"none"``, ``"bf16"`` or ``"fp16"``.
        batch_size: images per step and process.
        workers: loader processes; None: up to four, as many as there are CPUs.
        verify: refuse weights whose checksum is wrong or was left out; formats without one are not
            checked.
        classes_by: ``"name"``: labels are the model's classes of the same names; for models of an
            ImageNet, WordNet's ids and their descriptions both count. Without names on a side, or
            if no class has one of ImageNet's, labels are taken by number, which a line says.
            ``"number"`` takes them so without asking.
        **options: ``img_size``, ``crop_pct``, ``crop_mode``, ``interpolation``, ``mean``, ``std``,
            ``data_root`` as in a recipe; what is not given comes from the run's recipe, or is
            timm's for evaluation. Models from a name or a run are built for ``img_size``.

    Returns:
        ``top1`` and ``top5`` in % (``top5`` None below five classes), ``loss`` (plain
        cross-entropy), ``count`` (images), ``unreadable`` (images that cannot be read),
        ``nonfinite`` (images whose logits are NaN or infinite), ``weights`` (``"raw"``, ``"ema"``
        or ``"as given"``). Those two kinds count as wrong, have no loss, and are warned of.

    Raises:
        ValueError: options or data that do not fit, classes that the model does not have, labels
            that are no whole numbers, or a checkpoint that cannot be used.
        OSError: no image can be read.
    """
    unknown = set(options) - set(OPTIONS)
    if unknown:
        name = sorted(unknown)[0]
        hint = suggestion(name, ("batch_size", "checkpoint", "workers", "weights", *OPTIONS))
        raise ValueError(f"evaluate: unknown option {name!r}{hint}; there are {OPTIONS}")
    check_numbers("evaluate", batch_size=(batch_size, 1), workers=(workers, 0, MOST_WORKERS))
    workers = default_workers() if workers is None else workers
    opened = open_data(data, options.get("data_root"), need_train=False)
    if opened.yields_tensors:
        refuse_image_options(options)
    with world(device) as peers, verifying(verify):
        subject = open_model(
            model,
            checkpoint=checkpoint,
            weights=weights,
            img_size=options.get("img_size"),
            caller="evaluate",
        )
        of_images: Any = {name: v for name, v in options.items() if name in IMAGE_OPTIONS}
        network, preprocessing = subject.network, subject.preprocessing.override(**of_images)
        spec = preprocessing.input_spec(network, opened)
        network = network.to(peers.device)
        named = subject.named
        if named.count is None:
            named = classes_of(network, subject.classes, _count_logits(network, spec, peers, amp))
        own = Classes.of_data(opened.val, opened.num_classes)
        numbers = match_classes(own, named, by=classes_by, quiet=not peers.is_main)
        recipe = preprocessing.recipe.override(eval_batch_size=batch_size, workers=workers)
        if recipe.num_classes is None:
            recipe = recipe.override(num_classes=opened.num_classes or named.count or None)
        loader = eval_loader(replace(opened, numbers=numbers), recipe, spec, peers)
        measured = evaluate_model(network, loader, peers, amp)
    return measured | {"weights": subject.weights}


@torch.no_grad()
def _count_logits(network: nn.Module, spec: InputSpec, peers: World, amp: str) -> int:
    """Run a module that does not say how many classes it has on one black image."""
    with evaluating(network), autocast(peers.device, amp):
        return network(torch.zeros(1, *spec.size, device=peers.device)).shape[-1]


@torch.no_grad()
def evaluate_model(
    model: nn.Module,
    loader: Iterable[Batch],
    world: World,
    amp: str = "none",
    warn: Callable[[str], None] = logger.warning,
) -> dict[str, Any]:
    """Accuracy and cross-entropy over the shares of all processes; synchronizes once, at the end.

    Returns what `evaluate` does, but ``weights``; ``warn`` takes its lines, on the main process.
    """
    sums = torch.zeros(5, dtype=torch.float64, device=world.device)
    faults: list[Fault] = []
    classes = 0
    with evaluating(model):
        for batch in loader:
            faults += batch.faults
            if not len(batch.labels):
                continue
            images = batch.images.to(world.device, non_blocking=True)
            target = batch.labels.to(world.device, non_blocking=True)
            with autocast(world.device, amp):
                logits = model(images)
            classes = logits.shape[-1]
            sums += _scores(logits.float(), target)
    known = sums.new_tensor([len(faults), classes >= 5])
    *totals, unreadable, has_top5 = world.sum(torch.cat([sums, known])).tolist()
    top1, top5, loss, finite, read = totals
    count, nonfinite = int(read + unreadable), int(read - finite)
    check_readable(loader, faults, int(unreadable), count, world, warn)
    if nonfinite and world.is_main:
        warn(
            f"{nonfinite:,} of {count:,} evaluation images have logits that are NaN or infinite: "
            "they count as wrong, and have no loss"
        )
    return {
        "top1": 100 * top1 / max(count, 1),
        "top5": 100 * top5 / max(count, 1) if has_top5 else None,
        "loss": loss / finite if finite else math.nan,
        "count": count,
        "unreadable": int(unreadable),
        "nonfinite": nonfinite,
    }


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[nn.Module]:
    """Run a model in eval mode, and put every module's mode back."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield model.eval()
    finally:
        for module, training in modes:
            module.training = training


def check_readable(
    loader: Any,
    faults: list[Fault],
    unreadable: int,
    count: int,
    world: World,
    warn: Callable[[str], None],
) -> None:
    """Name what no process could read, and refuse a figure of too few images to mean anything.

    ``faults`` are this process' own, ``unreadable`` and ``count`` of all.
    """
    source = getattr(getattr(loader, "dataset", None), "source", None)
    if source is not None and source.num_samples not in (None, count):  # streams can lose some
        raise ValueError(
            f"data: evaluated {count} of the {source.num_samples} images that {source} lists"
        )
    if not unreadable:
        return
    found = sorted(fault for share in world.gather(faults) for fault in share)
    named = "; ".join(f"{fault.name} ({fault.reason})" for fault in found[:SHOWN])
    rest = "; ..." if unreadable > SHOWN else ""
    line = f"{unreadable:,} of {count:,} evaluation images cannot be read"
    if unreadable == count:
        raise OSError(f"data: {line}: {named}{rest}")
    if world.is_main:
        warn(f"{line} and count as wrong: {named}{rest}")


def have_finite_logits(logits: Tensor) -> Tensor:
    """[B] bool: no NaN nor +inf, and not all -inf, which one masked class may be."""
    return logits.amax(dim=-1).isfinite()


def _scores(logits: Tensor, target: Tensor) -> Tensor:
    """[top-1 hits, top-5 hits, summed cross-entropy, finite, images] of a batch, float64."""
    finite = have_finite_logits(logits)
    ranked = logits.topk(min(5, logits.shape[-1]), dim=-1).indices
    hits = (ranked == target.unsqueeze(-1)) & finite.unsqueeze(-1)
    loss = F.cross_entropy(logits, target, reduction="none").where(finite, 0).sum()
    sums = hits[:, 0].sum(), hits.any(dim=-1).sum(), loss, finite.sum()
    return torch.stack([*sums, torch.full_like(loss, len(target))]).double()
