"""`predict`: what a model takes pictures for.

Knows what is said of an image and how it is written down; how a name becomes a model is
`fastkd.training.loading`'s, how a file becomes its input `fastkd.training.image_files`'s.
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastkd.training.atomic import write_text
from fastkd.training.batch import Batch, Fault
from fastkd.training.class_names import class_descriptions
from fastkd.training.distributed import World, world
from fastkd.training.engine import autocast
from fastkd.training.image_files import Images, find_images, image_loader
from fastkd.training.loading import IMAGE_OPTIONS, open_model
from fastkd.training.progress import Bar

FORMATS = (".csv", ".json")
BAR_AFTER = 2.0  # seconds: what is done sooner needs no bar


@dataclass(frozen=True)
class Guess:
    """One class that an image may be of.

    Attributes:
        index: of the logit.
        name: of the class; its number where nobody knows one.
        probability: softmax over all classes.
    """

    index: int
    name: str
    probability: float


@dataclass(frozen=True)
class Prediction:
    """What a model takes an image for.

    Attributes:
        image: its file.
        guesses: the most probable first.
    """

    image: str
    guesses: tuple[Guess, ...]


@dataclass(frozen=True)
class Predictions:
    """What `predict` found.

    Attributes:
        images: in the order in which they were given or found.
        unreadable: what could not be read, and why.
        weights: of the model: ``"raw"`` or ``"ema"`` of a run, else ``"as given"``.
    """

    images: tuple[Prediction, ...]
    unreadable: tuple[Fault, ...]
    weights: str

    def save(self, path: str | Path) -> None:
        """Write a file atomically.

        Args:
            path: ``.csv``: a row for every guess; ``.json``: all there is.

        Raises:
            ValueError: another ending.
        """
        write_text(path, self._csv() if _format(path) == ".csv" else self._json())

    def _csv(self) -> str:
        text = io.StringIO()
        rows = csv.writer(text, lineterminator="\n")
        rows.writerow(("image", "rank", "index", "name", "probability"))
        for prediction in self.images:
            for rank, guess in enumerate(prediction.guesses, start=1):
                rows.writerow(
                    (prediction.image, rank, guess.index, guess.name, f"{guess.probability:.6g}")
                )
        return text.getvalue()

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
    images: Images,
    model: str | Path | nn.Module,
    *,
    checkpoint: str | Path | None = None,
    weights: str = "auto",
    top: int = 5,
    output: str | Path | None = None,
    device: str | torch.device | None = None,
    amp: str = "none",
    batch_size: int = 64,
    workers: int = 4,
    quiet: bool = False,
    **options: Any,
) -> Predictions:
    """Say what images show, as `evaluate` would feed them to the model.

    Args:
        images: files and folders; of a folder, all images in it and below (timm's extensions) but
            hidden ones. They are brought to as many channels as the model takes, and not turned by
            their EXIF orientation, as in training.
        model: as in `evaluate`, as are the others that are not described.
        checkpoint: likewise.
        weights: likewise.
        top: how many classes an image gets.
        output: a ``.csv`` or ``.json`` file to write, too, see `Predictions.save`.
        device: likewise.
        amp: likewise.
        batch_size: images per step.
        workers: loader processes, where there is more than one batch.
        quiet: show no progress.
        **options: ``img_size``, ``crop_pct``, ``crop_mode``, ``interpolation``, ``mean``, ``std``.

    Returns:
        The predictions, and what could not be read. Classes are called as the run's data called
        them; else as timm does where there are as many as in an ImageNet; else by their numbers.

    Raises:
        ValueError: no images, options that do not fit, or a model that cannot be used.
        FileNotFoundError: there is no such model, or no folder for ``output``.
        ArithmeticError: the model's logits are not finite.
    """
    _check(top, batch_size, output, options)
    files, faults = find_images(images)
    results: list[tuple[int, Tensor]] = []
    with world(device) as peers:
        opened = open_model("predict", model, checkpoint, weights, options)
        loader = image_loader(
            files,
            opened.network,
            opened.preprocessing,
            batch_size=batch_size,
            workers=workers,
            device=peers.device,
        )
        _check_classifies(opened.network)
        with _bar(len(files), quiet) as bar, _evaluating(opened.network.to(peers.device)) as net:
            for batch, unreadable in loader:
                faults += unreadable
                bar.update(len(unreadable))
                if batch is not None:
                    logits = _logits(net, batch, peers, amp)
                    results += zip(batch.samples.tolist(), logits, strict=True)
                    bar.update(len(logits))
    predictions = Predictions(
        _named(results, files, opened.classes, top), tuple(faults), opened.weights
    )
    if output is not None:
        predictions.save(output)
    return predictions


def _check(top: int, batch_size: int, output: str | Path | None, options: dict[str, Any]) -> None:
    unknown = set(options) - set(IMAGE_OPTIONS)
    if unknown:
        raise ValueError(
            f"predict: unknown option {sorted(unknown)[0]!r}; there are {IMAGE_OPTIONS}"
        )
    for name, value in (("top", top), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"predict: {name} must be at least 1, got {value}")
    if output is not None:
        _format(output)
        if not Path(output).absolute().parent.is_dir():
            raise FileNotFoundError(f"predict: there is no folder {str(Path(output).parent)!r}")


def _check_classifies(network: nn.Module) -> None:
    if getattr(network, "num_classes", None) == 0:
        raise ValueError(f"predict: the model, a {type(network).__name__}, has no classes")


def _format(path: str | Path) -> str:
    suffix = Path(path).suffix.lower()
    if suffix not in FORMATS:
        raise ValueError(f"predict: output must end in .csv or .json, got {str(path)!r}")
    return suffix


def _bar(total: int, quiet: bool) -> Bar:
    """Progress of what takes long; nothing where nobody looks."""
    disable = True if quiet else None  # None: where stderr is no terminal
    return Bar(total=total, unit="image", delay=BAR_AFTER, disable=disable, file=sys.stderr)


@contextlib.contextmanager
def _evaluating(network: nn.Module) -> Iterator[nn.Module]:
    was_training = network.training
    try:
        yield network.eval()
    finally:
        network.train(was_training)


@torch.no_grad()
def _logits(network: nn.Module, batch: Batch, peers: World, amp: str) -> Tensor:
    """[B, classes], float32, on the CPU."""
    with autocast(peers.device, amp):
        logits = network(batch.images.to(peers.device, non_blocking=True))
    return logits.float().cpu()


def _named(
    results: list[tuple[int, Tensor]],
    files: list[Path],
    classes: tuple[str, ...] | None,
    top: int,
) -> tuple[Prediction, ...]:
    if not results:
        return ()
    count = results[0][1].shape[-1]
    names = class_descriptions(classes, count)
    predictions = []
    for sample, logits in results:
        if not logits.isfinite().all():
            raise ArithmeticError(f"predict: the logits of {files[sample]} are not finite")
        best = logits.softmax(-1).topk(min(top, count))
        guesses = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        predictions.append(
            Prediction(
                str(files[sample]),
                tuple(Guess(index, names[index], value) for index, value in guesses),
            )
        )
    return tuple(predictions)
