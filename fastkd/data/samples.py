"""Samples: reading one, transforming it, and stacking many to a `Batch`.

Knows images, labels and transforms; neither loaders nor the order of samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import default_collate

from fastkd.config import Recipe
from fastkd.data.datasets import DataPair
from fastkd.data.gpu_augment import Planned, plan_transform
from fastkd.data.readers import PILLOW_ERRORS, refuse_deep
from fastkd.data.transforms import InputSpec, Transform, eval_transform, train_transform

NO_LABEL = -1
ANY_CLASS = 2**62  # more classes than there can be
MODES = {1: "L", 3: "RGB", 4: "RGBA"}


class Sample(NamedTuple):
    """One image on its way into a batch.

    Attributes:
        image: [C, H, W]; float32, or uint8 where the device augments.
        label: a whole number, or None.
        sample: index in the data set of what was asked for; -1 where it has none.
        plan: what the device does to the image; None where nothing is left.
        faults: images that could not be read on the way to this one.
    """

    image: Tensor
    label: Any = None
    sample: int = -1
    plan: dict[str, Tensor] | None = None
    faults: tuple[Fault, ...] = ()


class SampleTransform:
    """(image, label) as a data set yields them -> `Sample`.

    Args:
        transform: image -> tensor or `Planned`; None where the data set yields tensors.
        mode: PIL mode that images are brought to; None where they are tensors.
    """

    def __init__(self, transform: Transform | None = None, mode: str | None = None) -> None:
        self.transform = transform
        self.mode = mode

    def decode(self, image: Any) -> Any:
        """Decode an image that its data set opened only, and bring it to the mode.

        Greyscale of more than 8 bits is refused: nothing in such a file says which value is white.

        Args:
            image: a PIL image, or a tensor, which is given back as it is.

        Returns:
            The image in memory.

        Raises:
            OSError: the file is cut short, no image, or greyscale of more than 8 bits.
        """
        if self.mode is None:
            return image
        try:
            image.load()
            refuse_deep(image)
            return image if image.mode == self.mode else image.convert(self.mode)
        except PILLOW_ERRORS as error:
            raise OSError(f"data: cannot decode an image: {error}") from error

    def __call__(
        self, image: Any, label: Any = None, sample: int = -1, faults: tuple[Fault, ...] = ()
    ) -> Sample:
        """Transform a decoded image; random numbers come from the process' own generators.

        Args:
            image: as `decode` gave it.
            label: a whole number, or None.
            sample: its index in the data set.
            faults: images that could not be read on the way to this one.

        Returns:
            The sample.
        """
        made = image if self.transform is None else self.transform(image)
        if isinstance(made, Planned):
            return Sample(made.image, label, sample, made.plan, faults)
        return Sample(made, label, sample, None, faults)


class Collate:
    """Stack samples; normalise the batch where the data set yields tensors.

    Args:
        mean: per channel; None feeds tensors as they are.
        std: per channel.
        classes: labels must lie below it; None does not look at them.
    """

    def __init__(
        self,
        mean: tuple[float, ...] | None = None,
        std: tuple[float, ...] | None = None,
        classes: int | None = None,
    ) -> None:
        self.classes = classes
        self.statistics = None
        if mean is not None and std is not None:
            self.statistics = torch.tensor(mean).view(-1, 1, 1), torch.tensor(std).view(-1, 1, 1)

    def __call__(self, samples: Sequence[tuple[Any, ...]]) -> Batch:
        """Stack samples.

        Args:
            samples: `Sample`s, or tuples of their first fields such as (image, label).

        Returns:
            The batch; a label that is missing is -1, a fault is told once.

        Raises:
            ValueError: a label that is missing or too large, where they are looked at.
        """
        parts = [Sample(*sample) for sample in samples]
        # default_collate: in a loader process it stacks into memory shared with the main process.
        images = default_collate([part.image for part in parts])
        if self.statistics is not None:
            images = (images - self.statistics[0]) / self.statistics[1]
        plans = [part.plan for part in parts if part.plan is not None]
        return Batch(
            images=images,
            labels=torch.tensor([self._class(part) for part in parts]),
            samples=torch.tensor([part.sample for part in parts]),
            plan=default_collate(plans) if plans else None,
            faults=tuple(dict.fromkeys(fault for part in parts for fault in part.faults)),
        )

    def _class(self, part: Sample) -> int:
        label = NO_LABEL if part.label is None else int(part.label)
        if self.classes is not None and not 0 <= label < self.classes:
            allowed = f"0 to {self.classes - 1}" if self.classes < ANY_CLASS else "0 or more"
            raise ValueError(
                f"data: the label of sample {part.sample} must be {allowed}, got {part.label}"
                + (" (labels=False trains without them)" if label == NO_LABEL else "")
            )
        return label


def train_sample_transform(recipe: Recipe, spec: InputSpec, data: DataPair) -> SampleTransform:
    """What happens to a training image before it is stacked.

    Args:
        recipe: its ``augment`` and the options of the data group.
        spec: what the student takes in.
        data: whether it yields tensors.

    Returns:
        (image, label) -> `Sample`; draws from the process' own generators.

    Raises:
        ValueError: ``augment`` asks for PIL images where there are tensors, for channels that no
            PIL image has, or for what the device does not do.
    """
    if data.yields_tensors:
        if recipe.augment in ("cpu", "gpu"):
            raise ValueError(
                f"augment: {recipe.augment!r} transforms PIL images, but the data set yields "
                "tensors: set augment='none', or 'dataset' where the data set itself augments at "
                "random"
            )
        return SampleTransform()
    make = plan_transform if recipe.augment == "gpu" else train_transform
    return SampleTransform(make(recipe, spec), _mode(spec))


def eval_sample_transform(
    recipe: Recipe, spec: InputSpec, data: DataPair | None
) -> SampleTransform:
    """What happens to an evaluation image before it is stacked.

    Args:
        recipe: evaluation options.
        spec: what the model takes in.
        data: whether it yields tensors. None stands for image files.

    Returns:
        (image, label) -> `Sample`.

    Raises:
        ValueError: no PIL image has as many channels as the model takes.
    """
    if data is not None and data.yields_tensors:
        return SampleTransform()
    return SampleTransform(eval_transform(recipe, spec), _mode(spec))


def collate(data: DataPair, spec: InputSpec, classes: int | None = None) -> Collate:
    """How a data set's samples are stacked: PIL images were normalised by their transform.

    Args:
        data: whether it yields tensors.
        spec: statistics of the input.
        classes: labels must lie below it, `ANY_CLASS` for as many as there are; None does not look
            at them.

    Returns:
        Samples -> `Batch`.
    """
    statistics = (spec.mean, spec.std) if data.yields_tensors else (None, None)
    return Collate(*statistics, classes)


def label_bound(data: DataPair, recipe: Recipe, labelled: bool) -> int | None:
    """What labels must lie below.

    Args:
        data: may say how many classes there are.
        recipe: may say it, too.
        labelled: whether labels are looked at.

    Returns:
        For `collate`.
    """
    return (recipe.num_classes or data.num_classes or ANY_CLASS) if labelled else None


def _mode(spec: InputSpec) -> str:
    if spec.size[0] not in MODES:
        raise ValueError(f"data: PIL images have 1, 3 or 4 channels, the student {spec.size[0]}")
    return MODES[spec.size[0]]


class Fault(NamedTuple):
    """A sample that could not be read, and was replaced.

    Attributes:
        sample: its index in the data set; -1 in a stream.
        name: its file, or whatever else the data set calls it.
        reason: what the reader said.
    """

    sample: int
    name: str
    reason: str


class Batch(NamedTuple):
    """Samples of one rank and one slice of an update.

    Attributes:
        images: [B, C, H, W]; float32 and normalised, or uint8 where the device augments.
        labels: [B] int64, -1 where a sample has none.
        samples: [B] int64, the indices in the data set that were asked for; of a stream, which has
            none, the positions in the epoch, and -1 in its evaluation.
        plan: what the device does to every image, [B, ...] by name; None where nothing is left.
        faults: samples of this batch that had to be replaced.
    """

    images: Tensor
    labels: Tensor
    samples: Tensor
    plan: dict[str, Tensor] | None = None
    faults: tuple[Fault, ...] = ()
