"""Classify image files, and write the predictions as CSV or JSON."""

from __future__ import annotations

import json
import operator
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from timm.data import ImageNetInfo, infer_imagenet_subset
from torch import Tensor, nn
from typing_extensions import Unpack

from fastkd.config import IMAGE_OPTIONS, ImageOptions
from fastkd.data.batches import Batch, Fault
from fastkd.data.datasets import DataPair, FileReader, ReadableImages
from fastkd.data.image_files import LeftOut, image_endings, list_images, warn_left_out
from fastkd.data.loader import default_workers
from fastkd.inference.evaluate import (
    BAR_AFTER,
    check_options,
    check_output,
    compute_logits,
    have_finite_logits,
)
from fastkd.inference.open_model import open_for_images
from fastkd.inference.preprocessing import image_loader
from fastkd.models.taps import evaluating
from fastkd.models.weights import verifying
from fastkd.utils.argument_checks import MOST_WORKERS, check_numbers, describe
from fastkd.utils.distributed import World, world
from fastkd.utils.io import csv_text, writable, write_text
from fastkd.utils.progress import Progress

Images = str | os.PathLike[str] | Iterable[str | os.PathLike[str]]

FORMATS = (".csv", ".json")

_SYNSET = re.compile(r"n\d{8}")
_WITH_EVERY_SYNSET = ("imagenet1k", "imagenet22k")  # the former has some that the latter has not


@dataclass(frozen=True)
class Guess:
    """One class of an image."""

    index: int  # of the logit
    name: str  # of the class; its number where no name is known
    probability: float  # softmax over all classes


@dataclass(frozen=True)
class Prediction:
    """The most probable classes of an image."""

    image: str  # its file; bytes of the name that are no UTF-8 are written as \\xff
    guesses: tuple[Guess, ...]  # the most probable first


@dataclass(frozen=True)
class Predictions:
    """The result of `predict`."""

    images: tuple[Prediction, ...]  # in the order in which they were given or found
    unreadable: tuple[Fault, ...]  # also those without finite logits; each with its reason
    weights: str  # "raw" or "ema" of a run, else "as given"

    def save(self, path: str | Path) -> None:
        """Write a file atomically.

        Args:
            path: ``.csv``: a row for every guess; ``.json``: everything.

        Raises:
            ValueError: another ending.
        """
        check_output("predict", path, FORMATS)
        write_text(path, self._csv() if Path(path).suffix.lower() == ".csv" else self._json())

    def _csv(self) -> str:
        rows: list[tuple[Any, ...]] = [("image", "rank", "index", "name", "probability")]
        for prediction in self.images:
            for rank, guess in enumerate(prediction.guesses, start=1):
                probability = f"{guess.probability:.6g}"
                rows.append((prediction.image, rank, guess.index, guess.name, probability))
        return csv_text(rows)

    def _json(self) -> str:
        content = {
            "weights": self.weights,
            "images": [
                {"image": p.image, "guesses": [vars(guess) for guess in p.guesses]}
                for p in self.images
            ],
            "unreadable": [{"image": f.name, "reason": f.reason} for f in self.unreadable],
        }
        return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


def predict(
    model: str | Path | nn.Module,
    images: Images,
    *,
    checkpoint: str | Path | None = None,
    weights: Literal["auto", "raw", "ema"] = "auto",
    top: int = 5,
    output: str | Path | None = None,
    device: str | torch.device | None = None,
    amp: Literal["none", "bf16", "fp16"] = "none",
    batch_size: int = 64,
    workers: int | None = None,
    quiet: bool = False,
    verify: bool = True,
    **options: Unpack[ImageOptions],
) -> Predictions:
    """Classify images, preprocessed as `evaluate` does; processes of torchrun share them.

    Args:
        model: any source that `evaluate` takes.
        images: files and folders. A folder is searched for files with timm's image endings, but
            not for hidden ones; a file may have any ending. EXIF orientation is ignored, as in
            training; grayscale of more than 8 bits counts as unreadable.
        checkpoint: weights for a timm name or, in place, for a module.
        weights: ``"raw"``, ``"ema"`` or ``"auto"`` (the better ones) of a run.
        top: number of classes per image.
        output: a ``.csv`` or ``.json`` file to write as well, see `Predictions.save`.
        device: ``"cpu"``, ``"cuda"``, ``"cuda:1"``; None: CUDA if there is a device.
        amp: autocast type.
        batch_size: images per step and process.
        workers: dataloader processes if there is more than one batch; None: up to four.
        quiet: show no progress.
        verify: refuse weights whose checksum is wrong or missing.
        **options: ``img_size``, ``crop_pct``, ``crop_mode``, ``interpolation``, ``mean``, ``std``.

    Returns:
        The predictions, the same on every process. Classes have the names of the run's data; else
        timm's where there are as many classes as in an ImageNet; else numbers.

    Raises:
        ValueError: no images, options that do not fit, or a model that cannot be used.
        TypeError: an argument of the wrong type.
        FileNotFoundError: there is no such model, or no folder for ``output``.
    """
    check_numbers("predict", top=(top, 1), batch_size=(batch_size, 1))
    check_numbers("predict", workers=(workers, 0, MOST_WORKERS))
    check_options("predict", options, IMAGE_OPTIONS)
    check_output("predict", output, FORMATS)
    files, empty_folders = find_images(images)
    with world(device) as peers, verifying(verify):
        opened = open_for_images("predict", model, checkpoint, weights, options)
        network = opened.network.to(peers.device)
        if opened.num_classes == 0:
            raise ValueError(f"predict: the model, a {type(network).__name__}, has no classes")
        data = open_files(files)
        share = range(peers.rank, len(files), peers.size)
        loader = image_loader(
            data,
            opened.preprocessing.recipe,
            opened.preprocessing.input_spec(network, data),
            share,
            batch_size=batch_size,
            workers=default_workers() if workers is None else workers,
            device=peers.device,
        )
        shows = peers.is_main and not quiet
        with Progress("predict", len(share), delay=BAR_AFTER, shows=shows) as progress:
            mine = _classify(network, loader, files, opened.classes, peers, amp, top, progress)
        shares = peers.gather(mine)
        # In the order of the files, whichever process had them.
        found = sorted((one for found, _ in shares for one in found), key=operator.itemgetter(0))
        faults = sorted(fault for _, faults in shares for fault in faults)
        predictions = Predictions(
            tuple(prediction for _, prediction in found), (*empty_folders, *faults), opened.weights
        )
        if output is not None and peers.is_main:
            predictions.save(output)
    return predictions


def find_images(images: Images) -> tuple[list[str], list[Fault]]:
    """List the image files that are named, one by one or by their folders."""
    several = isinstance(images, Iterable) and not isinstance(images, str | bytes | os.PathLike)
    places: list[Any] = list(images) if several else [images]  # type: ignore[arg-type]
    files: list[str] = []
    faults = []
    for place in places:
        if not isinstance(place, str | os.PathLike):
            raise TypeError(f"predict: images must be paths, got {describe(place)}")
        left_out = LeftOut()
        found = list_images(Path(place), left_out) if Path(place).is_dir() else [str(Path(place))]
        warn_left_out(Path(place), left_out)
        files += found
        if not found:
            reason = f"a folder without images ({', '.join(image_endings())})"
            faults.append(Fault(-1, writable(place), reason))
    if not files and not faults:
        raise ValueError("predict: no images were given")
    return files, faults


def open_files(files: Sequence[str]) -> DataPair:
    """Open image files as an evaluation set without labels."""
    reader = FileReader("", [(file, None) for file in files], {})
    return DataPair(
        train=None,
        val=ReadableImages(reader, labeled=False),
        num_classes=None,
        yields_tensors=False,
        image_size=None,
        labeled_val=False,
    )


def _classify(
    network: nn.Module,
    loader: Iterable[Batch],
    files: list[str],
    classes: tuple[str, ...] | None,
    peers: World,
    amp: str,
    top: int,
    progress: Progress,
) -> tuple[list[tuple[int, Prediction]], list[Fault]]:
    """Classify this process' share; returns predictions by the index of their file, and faults."""
    found: list[tuple[int, Prediction]] = []
    lost: list[Fault] = []
    names: tuple[str, ...] = ()
    nonfinite = "its logits are not finite"
    if amp == "fp16":
        nonfinite += " (amp='fp16' overflows easily: try 'bf16' or 'none')"
    with evaluating(network):
        for batch in loader:
            before = len(lost)
            lost += batch.faults
            if len(batch.samples):
                best, count = _top_classes(network, batch.images, peers, amp, top)
                names = names or class_descriptions(classes, count)
                rows = zip(batch.samples.tolist(), best, strict=True)
                for index, ranked in rows:
                    image = writable(files[index])
                    guesses = tuple(Guess(label, names[label], value) for label, value in ranked)
                    if guesses:
                        found.append((index, Prediction(image, guesses)))
                    else:
                        lost.append(Fault(index, image, nonfinite))
            progress.advance(len(batch.samples) + len(batch.faults), len(lost) - before)
    return found, lost


@torch.no_grad()
def _top_classes(
    network: nn.Module, images: Tensor, peers: World, amp: str, top: int
) -> tuple[list[list[tuple[int, float]]], int]:
    """(class, probability) of each image, the most probable first, and the number of classes.

    An image without finite logits has none. The logits themselves are not kept.
    """
    logits = compute_logits(network, images, peers.device, amp)
    if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != len(images):
        raise ValueError(
            f"predict: the model's logits must be [B, classes] with B = {len(images)}, got "
            f"{describe(logits)}"
        )
    finite = have_finite_logits(logits).tolist()
    best = logits.float().softmax(-1).topk(min(top, logits.shape[-1]))
    rows = zip(best.indices.tolist(), best.values.tolist(), finite, strict=True)
    found = [list(zip(labels, values, strict=True)) if ok else [] for labels, values, ok in rows]
    return found, logits.shape[-1]


def class_descriptions(names: Iterable[str] | None, count: int) -> tuple[str, ...]:
    """A name for every logit."""
    if names is not None:
        known = _readable([writable(name) for name in names])
    else:
        subset = infer_imagenet_subset({"num_classes": count})
        known = [] if subset is None else ImageNetInfo(subset).label_descriptions()
    return tuple(known[:count] + [str(number) for number in range(len(known), count)])


def _readable(names: list[str]) -> list[str]:
    """Replace WordNet's ids by their descriptions."""
    if not all(_SYNSET.fullmatch(name) for name in names):
        return names
    described: dict[str, str] = {}
    for subset in _WITH_EVERY_SYNSET:
        described |= ImageNetInfo(subset).label_descriptions(as_dict=True)
    return [described.get(name, name) for name in names]
