"""Transform samples and stack them into batches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import default_collate

from fastkd.config import DataConfig
from fastkd.data.classes import NO_LABEL
from fastkd.data.datasets import DataPair
from fastkd.data.gpu_augment import Planned, plan_transform
from fastkd.data.image_files import refuse_deep, refuse_thin
from fastkd.data.transforms import (
    InputSpec,
    Transform,
    eval_transform,
    resized_size,
    train_transform,
)

ANY_CLASS = 2**62  # more classes than there can be
MODES = {1: "L", 3: "RGB", 4: "RGBA"}


class Fault(NamedTuple):
    """A sample that could not be read."""

    sample: int  # its index in the dataset; -1 in a stream
    name: str  # its file, or whatever else the dataset calls it
    reason: str  # the reader's error


class Sample(NamedTuple):
    """One image on its way into a batch."""

    image: Tensor  # [C, H, W]; float32, or uint8 where the device augments
    label: Any = None  # a whole number, or None
    sample: int = -1  # index in the dataset of what was asked for
    plan: dict[str, Tensor] | None = None  # what the device does to the image
    faults: tuple[Fault, ...] = ()  # images that could not be read on the way to this one


class Batch(NamedTuple):
    """Samples of one rank and one slice of an update."""

    images: Tensor  # [B, C, H, W]; float32 and normalized, or uint8 where the device augments
    labels: Tensor  # [B] int64; -1 where a sample has none
    samples: Tensor  # [B] int64, indices asked for; of a stream positions, -1 in its evaluation
    plan: dict[str, Tensor] | None = None  # what the device does to each image, [B, ...] by name
    faults: tuple[Fault, ...] = ()  # what could not be read; replaced in training, else left out


class SampleTransform:
    """(image, label) as a dataset yields them -> `Sample`."""

    def __init__(
        self,
        transform: Transform | None = None,  # image -> tensor or `Planned`; None for tensors
        mode: str | None = None,  # PIL mode that images are converted to; None for tensors
        resized: tuple[int, int, bool] | None = None,  # as in `resized_size`; None: crops first
    ) -> None:
        self.transform, self.mode, self.resized = transform, mode, resized

    def decode(self, image: Any) -> Any:
        """Decode an image that its dataset only opened, and convert it to the mode."""
        if self.mode is None or not isinstance(image, Image.Image):
            return image
        try:
            if self.resized is not None:
                refuse_thin(image, *self.resized)
            image.load()
            refuse_deep(image)
            return image if image.mode == self.mode else image.convert(self.mode)
        except Exception as error:  # what Pillow and its plugins raise has no common base
            raise OSError(f"data: cannot decode an image: {error}") from error

    def __call__(
        self, image: Any, label: Any = None, sample: int = -1, faults: tuple[Fault, ...] = ()
    ) -> Sample:
        """Transform a decoded image; random numbers come from the process' own generators."""
        made = image if self.transform is None else self.transform(image)
        image, plan = made if isinstance(made, Planned) else (made, None)
        return Sample(image, label, sample, plan, faults)


def train_sample_transform(config: DataConfig, spec: InputSpec, data: DataPair) -> SampleTransform:
    """Create the transform of training images."""
    if config.augment not in ("cpu", "gpu"):
        return eval_sample_transform(config, spec, data)
    if data.yields_tensors:
        raise ValueError(
            f"augment: {config.augment!r} transforms PIL images, but the data set yields "
            "tensors: set augment='none', or 'dataset' if it augments at random itself"
        )
    make = plan_transform if config.augment == "gpu" else train_transform
    return SampleTransform(make(config, spec), _mode(spec))


def eval_sample_transform(
    config: DataConfig, spec: InputSpec, data: DataPair | None
) -> SampleTransform:
    """Create the transform of evaluation images."""
    if data is not None and data.yields_tensors:
        return SampleTransform()
    return SampleTransform(eval_transform(config, spec), _mode(spec), resized_size(config, spec))


def _mode(spec: InputSpec) -> str:
    if spec.size[0] not in MODES:
        raise ValueError(f"data: PIL images have 1, 3 or 4 channels, the student {spec.size[0]}")
    return MODES[spec.size[0]]


class Collate:
    """Stack samples, and list faults; normalize the batch where the dataset yields tensors."""

    def __init__(
        self,
        spec: InputSpec | None = None,  # its mean and std normalize tensors; None: as they are
        classes: int | None = None,  # labels must lie below it; None: labels are not used
        numbers: Mapping[int, int] | None = None,  # labels of the data set -> of the model
    ) -> None:
        self.classes, self.numbers = classes, numbers
        self.statistics = None
        if spec is not None and spec.mean is not None and spec.std is not None:
            self.statistics = [torch.tensor(part).view(-1, 1, 1) for part in (spec.mean, spec.std)]

    def __call__(self, samples: Sequence[tuple[Any, ...]]) -> Batch:
        """Stack samples; images are [0] where there are only faults."""
        unreadable = [part for part in samples if isinstance(part, Fault)]
        parts = [Sample(*part) for part in samples if not isinstance(part, Fault)]
        # default_collate: in a loader process it stacks into memory shared with the main process.
        images = default_collate([part.image for part in parts]) if parts else torch.empty(0)
        if parts and self.statistics is not None:
            images = (images - self.statistics[0]) / self.statistics[1]
        plans = [part.plan for part in parts if part.plan is not None]
        return Batch(
            images=images,
            labels=torch.tensor([self._class(part) for part in parts], dtype=torch.int64),
            samples=torch.tensor([part.sample for part in parts], dtype=torch.int64),
            plan=default_collate(plans) if plans else None,
            faults=(*dict.fromkeys(f for part in parts for f in part.faults), *unreadable),
        )

    def _class(self, part: Sample) -> int:
        label = NO_LABEL if part.label is None else int(part.label)
        if self.classes is None:
            return label
        unnamed = self.numbers is not None and label not in self.numbers
        if unnamed or not 0 <= label < self.classes:
            allowed = f"0 to {self.classes - 1}" if self.classes < ANY_CLASS else "0 or more"
            raise ValueError(
                f"data: the label of sample {part.sample} must be {allowed}, got {part.label}"
                + (" (labels=False trains without them)" if label == NO_LABEL else "")
            )
        return label if self.numbers is None else self.numbers[label]
