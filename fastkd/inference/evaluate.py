"""Measure the accuracy of a model on an evaluation set."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
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
from fastkd.data.loader import default_workers, eval_loader
from fastkd.data.open_data import Data, open_data
from fastkd.data.transforms import InputSpec
from fastkd.inference.open_model import classes_of, open_for_images
from fastkd.models.taps import evaluating
from fastkd.models.weights import verifying
from fastkd.utils.argument_checks import MOST_WORKERS, check_numbers
from fastkd.utils.distributed import World, autocast, world
from fastkd.utils.hints import suggestion
from fastkd.utils.progress import Progress

BAR_AFTER = 2.0  # seconds; shorter work needs no bar
SHOWN = 3  # names of unreadable images in a message

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
    quiet: bool = False,
    verify: bool = True,
    classes_by: Literal["name", "number"] = "name",
    **options: Unpack[EvaluateOptions],
) -> dict[str, Any]:
    """Measure accuracy on an evaluation set, every image once.

    Args:
        model: a timm name, ``hf_hub:OWNER/NAME`` or ``local-dir:FOLDER``; a run's folder or
            checkpoint; an exported folder or safetensors file; a checkpoint that the authors of
            arXiv 2511.15572 released; or a module. A file may be ``hf_hub:OWNER/NAME/FILE``.
        data: what `train` takes, of which the evaluation set is used; one dataset; or a folder of
            class folders.
        checkpoint: weights for a timm name or, in place, for a module. A run's checkpoint and an
            exported student also define the preprocessing.
        weights: ``"raw"``, ``"ema"`` or ``"auto"`` of a run; auto takes the EMA weights if they had
            the higher top-1 in its last evaluation.
        device: ``"cpu"``, ``"cuda"``, ``"cuda:1"``; None: CUDA if there is a device.
        amp: autocast type.
        batch_size: images per step and process.
        workers: dataloader processes; None: up to four, at most one per CPU.
        quiet: show no progress.
        verify: refuse weights whose checksum is wrong or missing.
        classes_by: ``"name"`` maps labels to the model's classes of the same name (WordNet's ids
            and descriptions both count), and warns where it can only take them by ``"number"``.
        **options: ``img_size``, ``crop_pct``, ``crop_mode``, ``interpolation``, ``mean``, ``std``,
            ``data_root`` as in a recipe; by default those of the run, or timm's for evaluation.

    Returns:
        ``top1`` and ``top5`` in % (``top5`` None below five classes), ``loss`` (cross-entropy),
        ``count`` of images, ``unreadable`` and ``nonfinite`` ones (NaN or infinite logits), which
        count as wrong and have no loss, and ``weights`` (``"raw"``, ``"ema"`` or ``"as given"``).

    Raises:
        ValueError: options, data, classes, labels or a checkpoint that do not fit.
        OSError: no image can be read.
    """
    check_options("evaluate", options, (*IMAGE_OPTIONS, "data_root"))
    check_numbers("evaluate", batch_size=(batch_size, 1), workers=(workers, 0, MOST_WORKERS))
    opened = open_data(data, options.get("data_root"), need_train=False)
    if opened.yields_tensors:
        refuse_image_options(options)
    with world(device) as peers, verifying(verify):
        subject = open_for_images("evaluate", model, checkpoint, weights, options)
        spec = subject.preprocessing.input_spec(subject.network, opened)
        network = subject.network.to(peers.device)
        named = subject.named
        if named.count is None:
            named = classes_of(network, subject.classes, _count_logits(network, spec, peers, amp))
        own = Classes.of_data(opened.val, opened.num_classes)
        numbers = match_classes(own, named, by=classes_by, quiet=not peers.is_main)
        workers = default_workers() if workers is None else workers
        recipe = subject.preprocessing.recipe.override(eval_batch_size=batch_size, workers=workers)
        if recipe.num_classes is None:
            recipe = recipe.override(num_classes=opened.num_classes or named.count or None)
        loader = eval_loader(replace(opened, numbers=numbers), recipe, spec, peers)
        images = opened.val.num_samples or 0 if opened.streams else len(opened.val)
        shows = peers.is_main and not quiet and images > 0  # a stream may not know its length
        share = math.ceil(images / peers.size)
        with Progress("evaluate", share, delay=BAR_AFTER, shows=shows) as progress:
            measured = evaluate_model(network, loader, peers, amp, progress=progress)
    return measured | {"weights": subject.weights}


def check_options(caller: str, options: Mapping[str, Any], known: Sequence[str]) -> None:
    """Refuse unknown keyword arguments."""
    for name in set(options).difference(known):
        hint = suggestion(name, ("batch_size", "checkpoint", "top", "workers", "weights", *known))
        raise ValueError(f"{caller}: unknown option {name!r}{hint}; expected one of {known}")


def check_output(caller: str, path: str | Path | None, endings: Sequence[str] = ()) -> None:
    """Refuse an output file that cannot be written, before any work is done for it."""
    if path is None:
        return
    folder = Path(path).absolute().parent
    if endings and Path(path).suffix.lower() not in endings:
        raise ValueError(f"{caller}: output must end in {' or '.join(endings)}, got {str(path)!r}")
    if Path(path).is_dir():
        raise ValueError(f"{caller}: output must be a file, but {str(path)!r} is a folder")
    if not folder.is_dir():
        raise FileNotFoundError(f"{caller}: output: there is no folder {str(folder)!r}")
    if not os.access(folder, os.W_OK):
        raise PermissionError(f"{caller}: output: {str(folder)!r} is not writable")


def compute_logits(network: nn.Module, images: Tensor, device: torch.device, amp: str) -> Any:
    """Run a model under autocast; name the dtypes if its weights have another than the images."""
    images = images.to(device, non_blocking=True)
    try:
        with autocast(device, amp):
            return network(images)
    except RuntimeError as error:
        dtype = next((p.dtype for p in network.parameters() if p.is_floating_point()), images.dtype)
        if dtype == images.dtype or isinstance(error, torch.OutOfMemoryError):
            raise
        raise ValueError(
            f"model: its weights must be {images.dtype}, as the images are, got {dtype}: give "
            "model.float(); amp computes in fewer bits"
        ) from error


@torch.no_grad()
def _count_logits(network: nn.Module, spec: InputSpec, peers: World, amp: str) -> int:
    """Run a module without ``num_classes`` on one black image."""
    with evaluating(network):
        return compute_logits(network, torch.zeros(1, *spec.size), peers.device, amp).shape[-1]


@torch.no_grad()
def evaluate_model(
    model: nn.Module,
    loader: Iterable[Batch],
    world: World,
    amp: str = "none",
    warn: Callable[[str], None] = logger.warning,  # called on the main process
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Return what `evaluate` does, but ``weights``; synchronizes with all processes at the end."""
    sums = torch.zeros(5, dtype=torch.float64, device=world.device)
    faults: list[Fault] = []
    classes = 0
    with evaluating(model):
        for batch in loader:
            faults += batch.faults
            if len(batch.labels):
                target = batch.labels.to(world.device, non_blocking=True)
                logits = compute_logits(model, batch.images, world.device, amp)
                classes = logits.shape[-1]
                sums += _scores(logits.float(), target)
            if progress is not None:
                progress.advance(len(batch.labels) + len(batch.faults), len(batch.faults))
    known = sums.new_tensor([len(faults), classes >= 5])
    *totals, unreadable, has_top5 = world.sum(torch.cat([sums, known])).tolist()
    top1, top5, loss, finite, read = totals
    count, nonfinite = int(read + unreadable), int(read - finite)
    check_readable(loader, faults, int(unreadable), count, world, warn)
    if nonfinite and world.is_main:
        warn(
            f"{nonfinite:,} of {count:,} evaluation images have NaN or infinite logits: they count "
            "as wrong, and have no loss"
        )
    return {
        "top1": 100 * top1 / max(count, 1),
        "top5": 100 * top5 / max(count, 1) if has_top5 else None,
        "loss": loss / finite if finite else math.nan,
        "count": count,
        "unreadable": int(unreadable),
        "nonfinite": nonfinite,
    }


def check_readable(
    loader: Any,
    faults: list[Fault],  # of this process
    unreadable: int,  # images of all processes, as is count
    count: int,
    world: World,
    warn: Callable[[str], None],
) -> None:
    """Warn of unreadable images; raise if nothing was read, or not all that the dataset lists."""
    source = getattr(getattr(loader, "dataset", None), "source", None)
    if source is not None and source.num_samples not in (None, count):  # a torn stream ends early
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
