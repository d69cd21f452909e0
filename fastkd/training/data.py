"""From data sets to batches of tensors.

Knows samples, transforms and loaders; neither where data lie nor models. Every sample's randomness
is seeded by what the sample is, so that batches do not depend on the number of workers.
"""

from __future__ import annotations

import signal
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from fastkd.training.augment import InputSpec, Transform, eval_transform, train_transform
from fastkd.training.datasets import DataPair
from fastkd.training.recipe import Recipe
from fastkd.training.samplers import EvalSampler, SampleKey, TrainBatchSampler
from fastkd.training.seeding import derive_seed, preserved_rng, seed_cpu


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
