"""Read a sample, transform it, and stack samples into a `Batch`."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Mapping, Sequence
from multiprocessing import popen_fork
from multiprocessing.context import ForkContext, ForkProcess
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import default_collate, get_worker_info

from fastkd.config import DataConfig
from fastkd.data.gpu_augment import Planned, plan_transform
from fastkd.data.images import refuse_deep, refuse_thin
from fastkd.data.readers import DataPair, Fault
from fastkd.data.transforms import (
    InputSpec,
    Transform,
    eval_transform,
    resized_size,
    train_transform,
)

# What a loop over a loader may see of a process that died.
DEATHS = (RuntimeError, ConnectionError, EOFError)

TORCH_SECONDS = 2.0  # within which torch hears of it
END, END_SECONDS = signal.SIGUSR2, 2.0  # ends a loader process that is not stuck

SHOWN_PIDS = re.compile(r"DataLoader worker \(pid(?:\(s\))? ([\d, ]+)\)")

PID, SAMPLE = 0, 1  # columns of the shared notes

NO_LABEL = -1
ANY_CLASS = 2**62  # more classes than there can be
MODES = {1: "L", 3: "RGB", 4: "RGBA"}


class Sample(NamedTuple):
    """One image on its way into a batch."""

    image: Tensor  # [C, H, W]; float32, or uint8 where the device augments
    label: Any = None  # a whole number, or None
    sample: int = -1  # index in the dataset of what was asked for
    plan: dict[str, Tensor] | None = None  # what the device does to the image
    faults: tuple[Fault, ...] = ()  # images that could not be read on the way to this one


class SampleTransform:
    """(image, label) as a dataset yields them -> `Sample`."""

    def __init__(
        self,
        transform: Transform | None = None,  # image -> tensor or `Planned`; None for tensors
        mode: str | None = None,  # PIL mode that images are brought to; None for tensors
        resized: tuple[int, int, bool] | None = None,  # as in `resized_size`; None: crops first
    ) -> None:
        self.transform = transform
        self.mode = mode
        self.resized = resized

    def decode(self, image: Any) -> Any:
        """Decode an image that its dataset only opened, and bring it to the mode."""
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
        if isinstance(made, Planned):
            return Sample(made.image, label, sample, made.plan, faults)
        return Sample(made, label, sample, None, faults)


class Collate:
    """Stack samples, and list faults; normalize the batch where the dataset yields tensors."""

    def __init__(
        self,
        mean: tuple[float, ...] | None = None,  # per channel; None leaves tensors as they are
        std: tuple[float, ...] | None = None,
        classes: int | None = None,  # labels must lie below it; None does not look at them
        numbers: Mapping[int, int] | None = None,  # labels of the data set -> of the model
    ) -> None:
        self.classes = classes
        self.numbers = numbers
        self.statistics = None
        if mean is not None and std is not None:
            self.statistics = torch.tensor(mean).view(-1, 1, 1), torch.tensor(std).view(-1, 1, 1)

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


def train_sample_transform(config: DataConfig, spec: InputSpec, data: DataPair) -> SampleTransform:
    """What happens to a training image before it is stacked."""
    if data.yields_tensors:
        if config.augment in ("cpu", "gpu"):
            raise ValueError(
                f"augment: {config.augment!r} transforms PIL images, but the data set yields "
                "tensors: set augment='none', or 'dataset' where the data set itself augments at "
                "random"
            )
        return SampleTransform()
    make = plan_transform if config.augment == "gpu" else train_transform
    resized = None if config.augment in ("cpu", "gpu") else resized_size(config, spec)
    return SampleTransform(make(config, spec), _mode(spec), resized)


def eval_sample_transform(
    config: DataConfig, spec: InputSpec, data: DataPair | None
) -> SampleTransform:
    """What happens to an evaluation image before it is stacked."""
    if data is not None and data.yields_tensors:
        return SampleTransform()
    return SampleTransform(eval_transform(config, spec), _mode(spec), resized_size(config, spec))


def collate(
    data: DataPair,
    spec: InputSpec,
    classes: int | None = None,
    numbers: Mapping[int, int] | None = None,
) -> Collate:
    """How a dataset's samples are stacked: PIL images were normalized by their transform."""
    statistics = (spec.mean, spec.std) if data.yields_tensors else (None, None)
    return Collate(*statistics, classes, numbers)


def label_bound(data: DataPair, num_classes: int | None, labelled: bool) -> int | None:
    """What labels must lie below; None if labels are not used."""
    return (num_classes or data.num_classes or ANY_CLASS) if labelled else None


def _mode(spec: InputSpec) -> str:
    if spec.size[0] not in MODES:
        raise ValueError(f"data: PIL images have 1, 3 or 4 channels, the student {spec.size[0]}")
    return MODES[spec.size[0]]


class Batch(NamedTuple):
    """Samples of one rank and one slice of an update."""

    images: Tensor  # [B, C, H, W]; float32 and normalized, or uint8 where the device augments
    labels: Tensor  # [B] int64; -1 where a sample has none
    samples: Tensor  # [B] int64, indices asked for; of a stream positions, -1 in its evaluation
    plan: dict[str, Tensor] | None = None  # what the device does to each image, [B, ...] by name
    faults: tuple[Fault, ...] = ()  # what could not be read; replaced in training, else left out


class WorkerNotes:
    """What every loader process is working on, in memory that outlives the process."""

    def __init__(self, workers: int) -> None:
        self.rows = torch.full((workers, 2), -1, dtype=torch.int64).share_memory_()

    def note(self, sample: int) -> None:
        """Say, in a loader process, which sample is next; does nothing in the main process."""
        worker = get_worker_info()
        if worker is not None and worker.id < len(self.rows):
            self.rows[worker.id, SAMPLE] = sample
            self.rows[worker.id, PID] = os.getpid()

    def samples(self, pids: Sequence[int]) -> dict[int, int]:
        """What processes were last working on."""
        noted = {int(pid): int(sample) for pid, sample in self.rows.tolist()}
        return {pid: noted[pid] for pid in pids if pid in noted}


def describe_worker_death(loaders: Sequence[Any], error: BaseException) -> str | None:
    """Name the file that a loader process died over."""
    found = SHOWN_PIDS.search(str(_as_torch_tells(error)))
    if found is None:
        return None
    pids = [int(pid) for pid in found.group(1).split(",")]
    for loader in loaders:
        notes = getattr(loader.dataset, "notes", None)
        if notes is None or not (samples := notes.samples(pids)):
            continue
        deaths = (
            f"loader process {pid} died over {loader.dataset.name(sample)} (sample {sample})"
            for pid, sample in samples.items()
        )
        return "data: " + "; ".join(deaths)
    return None


def _as_torch_tells(error: BaseException) -> BaseException:
    """Torch's error for a dead process, where its closed socket was noticed first.

    SIGCHLD reaches torch after the process's sockets were closed, and torch's handler raises in
    whatever code runs then: wait for it here.
    """
    if not isinstance(error, (ConnectionError, EOFError)):
        return error
    end = time.monotonic() + TORCH_SECONDS
    try:
        while time.monotonic() < end:
            time.sleep(0.02)
    except RuntimeError as told:
        return told
    return error


def default_workers() -> int:
    """Up to four loader processes, as many as there are CPUs: torch warns of more."""
    return min(4, len(os.sched_getaffinity(0)))


def loader_options(workers: int, device: torch.device) -> dict[str, Any]:
    """How every `DataLoader` here runs its workers; an iteration draws from no global generator."""
    return {
        "num_workers": workers,
        "multiprocessing_context": _LoaderContext() if workers > 0 else None,
        "pin_memory": device.type == "cuda",
        "persistent_workers": workers > 0,
        "worker_init_fn": _leave_signals_to_the_main_process,
        "generator": torch.Generator(),  # its own: the global one would be drawn from at the start
    }


def _leave_signals_to_the_main_process(_: int) -> None:
    """Let the main process finish its update and end this one; it may get the signal, too.

    torchrun, SLURM and a terminal's Ctrl-C signal all processes; a loader that loses its own cannot
    finish the update after which all ranks stop.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(END, lambda *_: os._exit(0))


class _Killable(popen_fork.Popen):
    """A child that ignores SIGTERM, by which multiprocessing ends those that are left."""

    def terminate(self) -> None:
        os.kill(self.pid, END)  # torch raises an error for a process that dies by a signal
        if self.wait(END_SECONDS) is None:
            self.kill()


class _LoaderProcess(ForkProcess):
    _Popen = staticmethod(_Killable)


class _LoaderContext(ForkContext):
    Process = _LoaderProcess
