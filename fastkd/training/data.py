"""From what a user calls data to batches of tensors.

Knows data sets, transforms and loaders; neither models nor losses. Every sample's randomness is
seeded by what the sample is, so that batches do not depend on the number of workers.
"""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from timm.data import ImageDataset, create_dataset
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, default_collate

from fastkd.training.augment import InputSpec, Transform, eval_transform, train_transform
from fastkd.training.recipe import Recipe
from fastkd.training.samplers import EvalSampler, SampleKey, TrainBatchSampler
from fastkd.training.seeding import derive_seed, preserved_rng, seed_cpu

VALIDATION_FOLDERS = ("val", "validation")
PROBED = 8  # samples that are tried, to see what a data set yields
Data = str | Path | Sequence[Any]


@dataclass(frozen=True)
class DataPair:
    """A training and an evaluation set, both map-style and yielding (image, label).

    Attributes:
        train: None where only evaluation is asked for.
        val: the evaluation set.
        num_classes: None where the data do not say.
        yields_tensors: whether images are float tensors [C, H, W] instead of PIL images.
        image_size: (C, H, W) of the first image that can be read, where it is a tensor.
    """

    train: Any
    val: Any
    num_classes: int | None
    yields_tensors: bool
    image_size: tuple[int, int, int] | None


def open_data(data: Data, root: str | None = None, *, need_train: bool = True) -> DataPair:
    """Open a folder, a timm data set name, or a pair of data sets.

    Args:
        data: a folder with ``train`` and ``val`` (or ``validation``) image folders, a timm data set
            name with its scheme (``"hfds/..."``, ``"torch/cifar100"``), or (train, val) map-style
            data sets yielding (PIL image or float tensor, label).
        root: where a named data set keeps its files.
        need_train: False opens the evaluation set alone; then ``data`` may also be one data set,
            or a folder that holds the classes' folders itself.

    Returns:
        Both sets and what they say of themselves.

    Raises:
        ValueError: nothing there, a streaming data set, or samples of another form.
    """
    if isinstance(data, str | Path):
        train, val = _open_named(str(data), root, need_train)
    else:
        train, val = _open_given(data, need_train)
    for dataset in (train, val):
        _check_map_style(dataset)
    first = val if train is None else train
    # What reads image files is known to yield PIL images, even where the first file is broken.
    probe = None if isinstance(first, ReadableImages) else _probe(first)
    return DataPair(
        train=train,
        val=val,
        num_classes=_num_classes(first),
        yields_tensors=isinstance(probe, Tensor),
        image_size=tuple(probe.shape) if isinstance(probe, Tensor) else None,  # type: ignore[arg-type]
    )


def _open_named(data: str, root: str | None, need_train: bool) -> tuple[Any, Any]:
    folder = Path(data)
    if folder.is_dir():
        return _open_folder(folder, need_train)
    if "/" not in data or folder.is_absolute() or data.startswith("."):
        raise ValueError(f"data: no folder {data!r}, and a timm data set name has a scheme: hfds/x")
    train = _opened(data, root=root, split="train") if need_train else None
    return train, _opened(data, root=root, split="validation")


def _open_folder(folder: Path, need_train: bool) -> tuple[Any, Any]:
    val_folder = next((folder / n for n in VALIDATION_FOLDERS if (folder / n).is_dir()), None)
    if not need_train and not (folder / "train").is_dir():
        return None, _opened("", root=str(val_folder or folder), search_split=False)
    missing = [] if (folder / "train").is_dir() else ["train"]
    if val_folder is None:
        missing.append("val (or validation)")
    if missing:
        raise ValueError(f"data: {folder} has no folder {' and no folder '.join(missing)}")
    train = _opened("", root=str(folder / "train"), search_split=False)
    classes = train.reader.class_to_idx
    strangers = sorted({p.name for p in val_folder.iterdir() if p.is_dir()} - set(classes))  # type: ignore[union-attr]
    if strangers:
        raise ValueError(
            f"data: {val_folder} has classes that {folder / 'train'} lacks: {strangers[:5]}"
        )
    # The training set's numbering, so that a class without validation images shifts no label.
    val = _opened("", root=str(val_folder), search_split=False, class_map=classes)
    return (train if need_train else None), val


def _opened(name: str, **options: Any) -> Any:
    """Timm's data set; one that reads image files stops at those it cannot read."""
    dataset = create_dataset(name, **options)
    return ReadableImages(dataset.reader) if type(dataset) is ImageDataset else dataset


class ReadableImages(Dataset):
    """The images of a timm reader; one that cannot be read is an error.

    timm's own data set takes the next image in its place, with that one's label, and a warning: an
    accuracy would be counted on other images, and a batch would not be what its seed says.

    Args:
        reader: timm's: gives (binary file, label) by index, and file names.
    """

    def __init__(self, reader: Any) -> None:
        self.reader = reader

    def __len__(self) -> int:
        return len(self.reader)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        """Image and label; -1 where there is none.

        Raises:
            OSError: naming the file, which is missing, cut short or no image.
        """
        try:
            file, label, *_ = self.reader[index]
            with file:
                image = Image.open(file)
                image.load()
        except (OSError, SyntaxError, ValueError) as error:  # Pillow's, for broken files
            name = self.reader.filename(index, absolute=True)
            raise OSError(f"data: cannot read {name} (sample {index}): {error}") from error
        return image, -1 if label is None else label


def _open_given(data: Any, need_train: bool) -> tuple[Any, Any]:
    if isinstance(data, tuple | list) and len(data) == 2:
        return (data[0] if need_train else None), data[1]
    if not need_train and hasattr(data, "__getitem__") and hasattr(data, "__len__"):
        return None, data
    raise ValueError(
        f"data: expected a folder, a timm data set name or (train, val) data sets, got "
        f"{type(data).__name__}"
    )


def _check_map_style(dataset: Any) -> None:
    if isinstance(dataset, IterableDataset):
        raise ValueError(
            f"data: {type(dataset).__name__} streams its samples; exact resume and sharding need a "
            f"data set with __getitem__ and __len__"
        )
    if dataset is not None and len(dataset) == 0:
        raise ValueError(f"data: {type(dataset).__name__} is empty")


def _probe(dataset: Any) -> Any:
    """The first image that can be read, without leaving a trace in the random generators."""
    with preserved_rng():
        sample = _first_readable(dataset)
    if not isinstance(sample, tuple | list) or len(sample) != 2:
        raise ValueError(f"data: samples must be (image, label), got {type(sample).__name__}")
    image = sample[0]
    if isinstance(image, Image.Image):
        return image
    if isinstance(image, Tensor) and image.is_floating_point() and image.ndim == 3:
        return image
    got = f"{image.dtype} {list(image.shape)}" if isinstance(image, Tensor) else type(image)
    raise ValueError(f"data: images must be PIL images or float tensors [C, H, W], got {got}")


def _first_readable(dataset: Any) -> Any:
    """One broken file says nothing of the data set; a few in a row, that it is not there."""
    for index in range(min(len(dataset), PROBED) - 1):
        with contextlib.suppress(OSError):
            return dataset[index]
    return dataset[min(len(dataset), PROBED) - 1]


def _num_classes(dataset: Any) -> int | None:
    reader = getattr(dataset, "reader", None)
    for classes in (getattr(reader, "class_to_idx", None), getattr(dataset, "classes", None)):
        if classes:
            return len(classes)
    return None


class SampleDataset(Dataset):
    """A data set addressed by `SampleKey`, its randomness seeded by (seed, epoch, sample, copy).

    The process' own generators are left as they were, so that loading in the main process
    (``workers=0``) and in workers are the same thing.

    Args:
        dataset: map-style, yielding (image, label).
        transform: image -> tensor; None where the data set yields tensors.
        mode: PIL mode that images are brought to; None where they are tensors.
        seed: the run's seed; None where nothing is random, which saves seeding every sample.
    """

    def __init__(
        self,
        dataset: Any,
        transform: Transform | None = None,
        mode: str | None = None,
        seed: int | None = None,
    ) -> None:
        self.dataset = dataset
        self.transform = transform
        self.mode = mode
        self.seed = seed

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: SampleKey) -> tuple[Any, Any]:
        return self.__getitems__([key])[0]

    def __getitems__(self, keys: list[SampleKey]) -> list[tuple[Any, Any]]:
        """Fetch a batch, as torch's loader asks for it."""
        if self.seed is None:
            return [self._sample(key.sample) for key in keys]
        samples = []
        with preserved_rng():
            for key in keys:
                seed_cpu(derive_seed("sample", self.seed, *key))
                samples.append(self._sample(key.sample))
        return samples

    def _sample(self, index: int) -> tuple[Any, Any]:
        image, label = self.dataset[index]
        if self.mode is not None and image.mode != self.mode:
            image = image.convert(self.mode)
        return (image if self.transform is None else self.transform(image)), label


class Collate:
    """Stack samples; normalise the batch where the data set yields tensors.

    Args:
        mean: per channel; None feeds tensors as they are.
        std: per channel.
    """

    def __init__(
        self, mean: tuple[float, ...] | None = None, std: tuple[float, ...] | None = None
    ) -> None:
        self.statistics = None
        if mean is not None and std is not None:
            self.statistics = torch.tensor(mean).view(-1, 1, 1), torch.tensor(std).view(-1, 1, 1)

    def __call__(self, samples: list[tuple[Any, Any]]) -> tuple[Tensor, Tensor]:
        """Stack samples to images [B, C, H, W] and labels [B]."""
        images, labels = default_collate(samples)
        if self.statistics is not None:
            images = (images - self.statistics[0]) / self.statistics[1]
        return images, labels


def train_loader(
    data: DataPair,
    recipe: Recipe,
    spec: InputSpec,
    device: torch.device,
    rank: int = 0,
    world_size: int = 1,
) -> DataLoader:
    """Batches of one rank; its ``batch_sampler`` is a `TrainBatchSampler`.

    Args:
        data: the opened data.
        recipe: augmentation, batch size, seed, workers.
        spec: what the student takes in.
        device: pinned memory is used for an accelerator.
        rank: this process.
        world_size: number of processes.

    Returns:
        A loader of (images [B, C, H, W], labels [B]).

    Raises:
        ValueError: the global batch cannot be shared out evenly, or ``augment="cpu"`` is asked of
            tensors.
    """
    if data.yields_tensors and recipe.augment == "cpu":
        raise ValueError(
            "augment: 'cpu' transforms PIL images, but the data set yields tensors: set "
            "augment='none', or 'dataset' where the data set itself augments at random"
        )
    sampler = TrainBatchSampler(
        len(data.train),
        slice_size(recipe, world_size),
        seed=recipe.seed,
        accumulation=recipe.accumulation,
        repeats=recipe.repeated_aug,
        rank=rank,
        world_size=world_size,
    )
    seed = None if recipe.augment == "none" else recipe.seed
    dataset = _sample_dataset(data.train, data, spec, lambda: train_transform(recipe, spec), seed)
    return _loader(dataset, data, spec, recipe.workers, device, batch_sampler=sampler)


def eval_loader(
    data: DataPair,
    recipe: Recipe,
    spec: InputSpec,
    device: torch.device,
    rank: int = 0,
    world_size: int = 1,
) -> DataLoader:
    """This rank's share of the evaluation set, no sample twice.

    Args:
        data: the opened data.
        recipe: evaluation options and workers.
        spec: what the student takes in.
        device: pinned memory is used for an accelerator.
        rank: this process.
        world_size: number of processes.

    Returns:
        A loader of (images [B, C, H, W], labels [B]).
    """
    dataset = eval_samples(data, recipe, spec)
    sampler = EvalSampler(len(data.val), rank, world_size)
    return _loader(
        dataset,
        data,
        spec,
        recipe.workers,
        device,
        sampler=sampler,
        batch_size=recipe.eval_batch_size,
    )


def eval_samples(
    data: DataPair, recipe: Recipe, spec: InputSpec, seed: int | None = None
) -> SampleDataset:
    """The evaluation set as a model takes it in; float tensors are not normalised yet.

    Args:
        data: the opened data.
        recipe: evaluation options.
        spec: what the model takes in.
        seed: of what a data set draws at random itself; None where nothing is random.

    Returns:
        A data set of (image [C, H, W], label), addressed by `SampleKey`.

    Raises:
        ValueError: no PIL image has as many channels as the model takes.
    """
    return _sample_dataset(data.val, data, spec, lambda: eval_transform(recipe, spec), seed)


def loader_options(workers: int, device: torch.device) -> dict[str, Any]:
    """How every `DataLoader` here runs its workers; an iteration draws from no global generator.

    Args:
        workers: loader processes; they leave interrupts to the main process.
        device: pinned memory is used for an accelerator.

    Returns:
        Keyword arguments of the loader.
    """
    return {
        "num_workers": workers,
        "pin_memory": device.type == "cuda",
        "persistent_workers": workers > 0,
        "worker_init_fn": _leave_interrupts_to_the_main_process,
        "generator": torch.Generator(),  # its own: the global one would be drawn from at the start
    }


def slice_size(recipe: Recipe, world_size: int) -> int:
    """Images that one rank sees in one slice of an update.

    Args:
        recipe: its ``batch_size``, ``accumulation`` and mixing.
        world_size: number of processes.

    Returns:
        batch_size / (world_size * accumulation).

    Raises:
        ValueError: that is no whole number, or an odd one with Mixup.
    """
    shares = world_size * recipe.accumulation
    if recipe.batch_size % shares:
        raise ValueError(
            f"batch_size: {recipe.batch_size} images cannot be shared by {world_size} processes x "
            f"{recipe.accumulation} slices"
        )
    size = recipe.batch_size // shares
    if recipe.mixes and size % 2:
        raise ValueError(f"batch_size: Mixup pairs images, but a slice holds {size}, an odd number")
    return size


def _sample_dataset(
    dataset: Any,
    data: DataPair,
    spec: InputSpec,
    make_transform: Callable[[], Transform],
    seed: int | None,
) -> SampleDataset:
    if data.yields_tensors:
        return SampleDataset(dataset, seed=seed)
    mode = {1: "L", 3: "RGB", 4: "RGBA"}.get(spec.size[0])
    if mode is None:
        raise ValueError(f"data: PIL images have 1, 3 or 4 channels, the student {spec.size[0]}")
    return SampleDataset(dataset, make_transform(), mode, seed)


def _loader(
    dataset: SampleDataset,
    data: DataPair,
    spec: InputSpec,
    workers: int,
    device: torch.device,
    **batching: Any,
) -> DataLoader:
    # PIL images were normalised by their transform.
    statistics = (spec.mean, spec.std) if data.yields_tensors else (None, None)
    return DataLoader(
        dataset, collate_fn=Collate(*statistics), **loader_options(workers, device), **batching
    )


def _leave_interrupts_to_the_main_process(_: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
