"""Classify image files, and write the predictions as CSV or JSON."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from timm.data import ImageNetInfo, infer_imagenet_subset
from torch import Tensor, nn
from typing_extensions import Unpack

from fastkd.config import IMAGE_OPTIONS, ImageOptions
from fastkd.data.batches import Batch, Fault
from fastkd.data.loader import default_workers
from fastkd.inference.evaluate import evaluating, have_finite_logits
from fastkd.inference.images import Images, find_images, image_loader, open_files
from fastkd.inference.loading import open_model
from fastkd.models.weights import verifying
from fastkd.utils.arguments import MOST_WORKERS, check_numbers
from fastkd.utils.distributed import World, autocast, world
from fastkd.utils.hints import suggestion
from fastkd.utils.io import csv_text, writable, write_text
from fastkd.utils.progress import Progress

BAR_AFTER = 2.0  # seconds: what is done sooner needs no bar
_SYNSET = re.compile(r"n\d{8}")

_WITH_EVERY_SYNSET = ("imagenet1k", "imagenet22k")  # the former has some that the latter has not

FORMATS = (".csv", ".json")


@dataclass(frozen=True)
class Guess:
    """One class that an image may be of.

    Attributes:
        index: of the logit.
        name: of the class; its number where no name is known.
        probability: softmax over all classes.
    """

    index: int
    name: str
    probability: float


@dataclass(frozen=True)
class Prediction:
    """The classes that an image may be of.

    Attributes:
        image: its file; bytes of its name that are no UTF-8 as ``\\xff``.
        guesses: the most probable first.
    """

    image: str
    guesses: tuple[Guess, ...]


@dataclass(frozen=True)
class Predictions:
    """What `predict` found.

    Attributes:
        images: in the order in which they were given or found.
        unreadable: what could not be read or has no finite logits, and why; likewise.
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
    images: Images,
    model: str | Path | nn.Module,
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
    """Classify images, read and transformed as in `evaluate`.

    Under torchrun the processes share the images; the main one writes ``output``.

    Args:
        images: files and folders. A folder stands for the images in it and below, but hidden ones,
            as in `evaluate`: .jpg, .jpeg, .png, .webp, .bmp, .gif, .tif, .tiff, .ppm and .pgm;
            ``timm.data.readers.add_img_extensions`` adds endings. Pipes and devices are unreadable.
            A file that is named may be JPEG, PNG, WebP, GIF, BMP, PPM, TIFF, JPEG 2000 or
            AVIF by its content, of at most 1.5 times PIL.Image.MAX_IMAGE_PIXELS, which is 134
            million pixels (a JPEG of up to 179 million is read at half size). Images are brought
            to as many channels as the model takes, and not turned by their EXIF orientation, as in
            training. Grayscale of more than 8 bits counts as unreadable: no value in it means
            white.
        model: as in `evaluate`.
        checkpoint: as in `evaluate`.
        weights: as in `evaluate`.
        top: number of classes given for an image.
        output: a ``.csv`` or ``.json`` file to write as well, see `Predictions.save`.
        device: as in `evaluate`.
        amp: as in `evaluate`.
        batch_size: images per step and process.
        workers: loader processes, where there is more than one batch; None: up to four, as many
            as there are CPUs.
        quiet: show no progress.
        verify: as in `evaluate`.
        **options: ``img_size``, ``crop_pct``, ``crop_mode``, ``interpolation``, ``mean``, ``std``.

    Returns:
        The predictions, and what could not be read, on every process. Class names are those of the
        run's data; else timm's where there are as many classes as in an ImageNet; else numbers.

    Raises:
        ValueError: no images, options that do not fit, or a model that cannot be used.
        TypeError: an argument of the wrong type.
        FileNotFoundError: there is no such model, or no folder for ``output``.
    """
    check_numbers(
        "predict", top=(top, 1), batch_size=(batch_size, 1), workers=(workers, 0, MOST_WORKERS)
    )
    unknown = sorted(set(options) - set(IMAGE_OPTIONS))
    if unknown:
        hint = suggestion(
            unknown[0], ("batch_size", "checkpoint", "top", "workers", *IMAGE_OPTIONS)
        )
        raise ValueError(f"predict: unknown option {unknown[0]!r}{hint}; there are {IMAGE_OPTIONS}")
    _check_output(output)
    files, empty_folders = find_images(images)
    with world(device) as peers, verifying(verify):
        opened = open_model(
            model,
            checkpoint=checkpoint,
            weights=weights,
            img_size=options.get("img_size"),
            caller="predict",
        )
        if getattr(opened.network, "num_classes", None) == 0:
            name = type(opened.network).__name__
            raise ValueError(f"predict: the model, a {name}, has no classes")
        preprocessing, data = opened.preprocessing.override(**options), open_files(files)
        share = range(peers.rank, len(files), peers.size)
        loader = image_loader(
            data,
            preprocessing.recipe,
            preprocessing.input_spec(opened.network, data),
            share,
            batch_size=batch_size,
            workers=default_workers() if workers is None else workers,
            device=peers.device,
        )
        shows = peers.is_main and not quiet
        with (
            Progress(
                "predict", len(share), lost="passed over", delay=BAR_AFTER, shows=shows
            ) as progress,
            evaluating(opened.network.to(peers.device)) as network,
        ):
            shares = peers.gather(_classified(network, loader, files, peers, amp, top, progress))
        # In the order of the files, whichever process had them.
        found = sorted(one for share in shares for one in share.found)
        faults = sorted(fault for share in shares for fault in share.faults)
        classes = class_descriptions(opened.classes, max(share.classes for share in shares))
        predictions = Predictions(
            tuple(_prediction(files[one.sample], one, classes) for one in found),
            (*empty_folders, *faults),
            opened.weights,
        )
        if output is not None and peers.is_main:
            predictions.save(output)
    return predictions


def _check_output(output: str | Path | None) -> None:
    if output is None:
        return
    _format(output)
    if Path(output).is_dir():
        raise ValueError(f"predict: output must be a file, but {str(output)!r} is a folder")
    if not Path(output).absolute().parent.is_dir():
        raise FileNotFoundError(f"predict: there is no folder {str(Path(output).parent)!r}")


def _format(path: str | Path) -> str:
    suffix = Path(path).suffix.lower()
    if suffix not in FORMATS:
        raise ValueError(f"predict: output must end in .csv or .json, got {str(path)!r}")
    return suffix


@dataclass
class _Share:
    """The results of one process, and the number of classes."""

    found: list[Likeliest] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    classes: int = 0


def _classified(
    network: nn.Module,
    loader: Iterable[tuple[Batch | None, list[Fault]]],
    files: list[str],
    peers: World,
    amp: str,
    top: int,
    progress: Progress,
) -> _Share:
    share, reason = _Share(), "its logits are not finite"
    if amp == "fp16":
        reason += " (with amp='fp16' numbers overflow easily: try 'bf16' or 'none')"
    for batch, faults in loader:
        found: list[Likeliest] = []
        if batch is not None:
            found, share.classes = likeliest(network, batch, peers, amp, top)
        overflown = [
            Fault(one.sample, writable(files[one.sample]), reason)
            for one in found
            if not one.classes
        ]
        share.found += [one for one in found if one.classes]
        share.faults += faults + overflown
        progress.advance(len(found) + len(faults), len(faults) + len(overflown))
    return share


def _prediction(file: str, found: Likeliest, names: tuple[str, ...]) -> Prediction:
    guesses = zip(found.classes, found.probabilities, strict=True)
    return Prediction(
        writable(file),
        tuple(Guess(index, names[index], probability) for index, probability in guesses),
    )


def class_descriptions(names: Iterable[str] | None, count: int) -> tuple[str, ...]:
    """A name for every logit."""
    known = _imagenet(count) if names is None else _readable([writable(name) for name in names])
    return tuple(known[:count] + [str(number) for number in range(len(known), count)])


def _imagenet(count: int) -> list[str]:
    subset = infer_imagenet_subset({"num_classes": count})
    return [] if subset is None else ImageNetInfo(subset).label_descriptions()


def _readable(names: list[str]) -> list[str]:
    if not all(_SYNSET.fullmatch(name) for name in names):
        return names
    described: dict[str, str] = {}
    for subset in _WITH_EVERY_SYNSET:
        described |= ImageNetInfo(subset).label_descriptions(as_dict=True)
    return [described.get(name, name) for name in names]


class Likeliest(NamedTuple):
    """The classes that an image may be of, the most probable first.

    Attributes:
        sample: index of the image.
        classes: k indices of logits; none where the image's logits are not finite.
        probabilities: k values of the softmax over all classes.
    """

    sample: int
    classes: tuple[int, ...]
    probabilities: tuple[float, ...]


@torch.no_grad()
def likeliest(
    network: nn.Module, batch: Batch, peers: World, amp: str, top: int
) -> tuple[list[Likeliest], int]:
    """Classify a batch; synchronizes once. Of [B, classes] logits, [B, k] numbers are kept."""
    images = batch.images.to(peers.device, non_blocking=True)
    with autocast(peers.device, amp):
        logits = _logits(network, images)
    finite = have_finite_logits(logits)
    probabilities, classes = logits.float().softmax(-1).topk(min(top, logits.shape[-1]))
    rows = zip(
        batch.samples.tolist(), classes.tolist(), probabilities.tolist(), finite.tolist(),
        strict=True,
    )  # fmt: skip
    found = [
        Likeliest(sample, tuple(indices), tuple(values)) if usable else Likeliest(sample, (), ())
        for sample, indices, values, usable in rows
    ]
    return found, logits.shape[-1]


def _logits(network: nn.Module, images: Tensor) -> Tensor:
    try:
        logits = network(images)
    except RuntimeError as error:
        dtype = _dtype(network)
        if dtype == images.dtype or isinstance(error, torch.OutOfMemoryError):
            raise
        raise ValueError(
            f"predict: the model's weights must be float32, as images are, got {dtype}: hand over "
            "model.float(); amp computes in fewer bits"
        ) from error
    if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != len(images):
        raise ValueError(
            f"predict: the model's logits must be [B, classes] with B = {len(images)}, got "
            f"{_described(logits)}"
        )
    return logits


def _dtype(network: nn.Module) -> torch.dtype:
    floating = (p.dtype for p in network.parameters() if p.is_floating_point())
    return next(floating, torch.float32)


def _described(output: Any) -> str:
    if isinstance(output, Tensor):
        return str(list(output.shape))
    return f"a {type(output).__name__}"
