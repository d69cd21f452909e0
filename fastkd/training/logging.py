"""What a run reports: log.jsonl, epochs.csv, trackers, result.json and the progress bar."""

from __future__ import annotations

import contextlib
import csv
import importlib
import io
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol, TextIO

import torch
from torch import Tensor

from fastkd.utils.io import write_text
from fastkd.utils.progress import Progress

RESULT = "result.json"

NAMES = {"tensorboard": ("tensorboard",), "wandb": ("wandb",), "both": ("tensorboard", "wandb")}

_MODULES = {"tensorboard": "torch.utils.tensorboard", "wandb": "wandb"}

LOG = "log.jsonl"
EPOCHS = "epochs.csv"


class RunLogger:
    """Writes the run's logs and shows its progress.

    Args:
        output: the run's folder; None writes no files.
        total_updates: of the whole run, for the bar and its ETA.
        quiet: show nothing.
        enabled: False makes an object that does nothing, for ranks other than the main one.
        stream: where progress goes; standard error by default.
        open_trackers: makes the trackers, given the finished updates, when the run starts.
    """

    def __init__(
        self,
        output: Path | None,
        total_updates: int,
        *,
        quiet: bool = False,
        enabled: bool = True,
        stream: TextIO | None = None,
        open_trackers: Callable[[int], Sequence[Tracker]] | None = None,
    ) -> None:
        self.output = output if enabled else None
        self.stream = stream or sys.stderr
        self.total_updates = total_updates
        self.shows = enabled and not quiet
        self.progress = Progress(
            unit="update", lines=False, leave=True, shows=self.shows, stream=self.stream
        )
        self._log: TextIO | None = None
        self._open_trackers = open_trackers if enabled else None
        self._trackers: Sequence[Tracker] = ()

    def mend(self, updates: int, history: list[dict[str, Any]]) -> None:
        """Make the files say what a checkpoint says: no more, and no epoch less.

        A kill between two writes, or a run continued in a new folder, leaves them different.
        """
        if self.output is None:
            return
        _mend_log(self.output / LOG, updates, history)
        if history:
            _write_csv(self.output / EPOCHS, history)
        else:
            (self.output / EPOCHS).unlink(missing_ok=True)

    def start(self, updates: int) -> None:
        """Open the log, the bar and the trackers."""
        if self.output is not None:
            self._log = open(self.output / LOG, "a", encoding="utf-8")  # noqa: SIM115
        if self._open_trackers is not None:
            self._trackers = self._open_trackers(updates)
        self.progress.start("", self.total_updates, updates)

    def message(self, text: str) -> None:
        """Show a line of text."""
        self.progress.write(text)

    def advance(self) -> None:
        """Count one update on the bar."""
        self.progress.advance()

    def interval(self, record: dict[str, Any]) -> None:
        """Log the means since the last line."""
        self._write_line({"kind": "interval", **record})
        self._track("train", record)
        self.progress.note(
            f"epoch {record['epoch']}, loss {record['loss']:.4g}, "
            f"{record['images_per_second']:.0f} images/s, data wait {record['data_wait']:.0f}%"
        )

    def epoch(self, record: dict[str, Any], history: list[dict[str, Any]], epochs: int) -> None:
        """Log an epoch, rewrite the table of epochs, and say how it went."""
        self._write_line({"kind": "epoch", **record})
        self._track("epoch", record)
        if self.output is not None:
            with self._surviving(EPOCHS):
                _write_csv(self.output / EPOCHS, history)
        if not self.progress.has_bar or "eval_loss" in record:
            self.message(_epoch_line(record, epochs))

    def event(self, kind: str, record: dict[str, Any], text: str) -> None:
        """Log and show something that should not happen, and that the run survived."""
        self._write_line({"kind": kind, **record})
        self.message(text)

    def close(self) -> None:
        """Close the files, the trackers and the bar."""
        for tracker in self._trackers:
            tracker.close()
        self._trackers = ()
        if self._log is not None:
            self._log.close()
            self._log = None
        self.progress.close()

    def _track(self, group: str, record: dict[str, Any]) -> None:
        numbers = {f"{group}/{n}": v for n, v in record.items() if isinstance(v, int | float)}
        for tracker in self._trackers:
            with self._surviving(type(tracker).__name__):
                tracker.log(numbers, record["update"])

    def _write_line(self, record: dict[str, Any]) -> None:
        if self._log is None:
            return
        with self._surviving(LOG):
            self._log.write(json.dumps(record) + "\n")
            self._log.flush()

    @contextlib.contextmanager
    def _surviving(self, what: str) -> Iterator[None]:
        """A run is worth more than a line of its logs: on a full disk it goes on without."""
        try:
            yield
        except OSError as error:
            self.message(f"{what} could not be written ({error})")


def _mend_log(path: Path, updates: int, history: list[dict[str, Any]]) -> None:
    """Drop lines that will be written again or that a kill tore; add epochs that are missing."""
    kept = [record for record in _whole_records(path) if record["update"] <= updates]
    written = {record["epoch"] for record in kept if record.get("kind") == "epoch"}
    missing = [{"kind": "epoch", **r} for r in history if r["epoch"] not in written]
    # Stable, so that an epoch's line stays behind the last interval's.
    records = sorted(kept + missing, key=lambda record: record["update"])
    if path.exists() or records:
        write_text(path, "".join(json.dumps(record) + "\n" for record in records))


def _whole_records(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    records = []
    for line in path.read_text(encoding="utf-8").splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            records.append(json.loads(line))
    return records


def _write_csv(path: Path, history: list[dict[str, Any]]) -> None:
    columns = list(dict.fromkeys(name for record in history for name in record))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(history)
    write_text(path, text.getvalue())


def _epoch_line(record: dict[str, Any], epochs: int) -> str:
    parts = [f"epoch {record['epoch'] + 1}/{epochs}", f"loss {record['loss']:.4f}"]
    if "top1" in record:
        parts.append(f"top-1 {record['top1']:.2f} %")
    elif "eval_loss" in record:
        parts.append(f"evaluation loss {record['eval_loss']:.4f}")
    if "ema_top1" in record:
        parts.append(f"EMA top-1 {record['ema_top1']:.2f} %")
    parts.append(f"{record['images_per_second']:.0f} images/s")
    parts.append(f"data wait {record['data_wait']:.0f} %")
    if "gpu_memory" in record:
        parts.append(f"{record['gpu_memory']:.1f} GiB")
    if record.get("skipped_updates"):
        parts.append(f"{record['skipped_updates']} updates skipped")
    return ", ".join(parts)


class Tracker(Protocol):
    """Something that takes metrics."""

    def log(self, values: dict[str, float], step: int) -> None:
        """Take metrics by name at an update."""

    def close(self) -> None:
        """Write what is left."""


def check_trackers(track: str | None, output: Path | None) -> None:
    """Refuse a tracker that could not run, before the run begins."""
    for name in NAMES.get(track or "", ()):
        if output is None:
            raise ValueError(f"track: {name} keeps its files in the run's folder: give an output")
        try:
            importlib.import_module(_MODULES[name])
        except ImportError as error:
            raise ValueError(
                f"track: {name} is asked for and cannot be imported ({error}); "
                f"pip install {name}, or track=None"
            ) from None


def open_trackers(
    track: str | None, output: Path, config: dict[str, Any], updates: int
) -> list[Tracker]:
    """Start or continue the trackers of a run."""
    kinds: dict[str, Callable[[Path, dict[str, Any], int], Tracker]] = {
        "tensorboard": _TensorBoard,
        "wandb": _WandB,
    }
    return [kinds[name](output, config, updates) for name in NAMES.get(track or "", ())]


class _TensorBoard:
    def __init__(self, output: Path, config: dict[str, Any], updates: int) -> None:
        writer: Any = importlib.import_module(_MODULES["tensorboard"]).SummaryWriter
        self.writer = writer(str(output / "tensorboard"), purge_step=updates + 1)

    def log(self, values: dict[str, float], step: int) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        self.writer.close()


class _WandB:
    """One run of Weights & Biases a folder: its id is kept there, so that it goes on."""

    def __init__(self, output: Path, config: dict[str, Any], updates: int) -> None:
        wandb = importlib.import_module(_MODULES["wandb"])
        file = output / "wandb_id.txt"
        resumed = updates > 0 and file.exists()
        known = file.read_text(encoding="utf-8").strip() if resumed else None
        self.run = wandb.init(
            project="fastkd",
            name=output.name,
            dir=str(output),
            config=config,
            id=known,
            resume="allow",
        )
        if known is None:
            write_text(file, f"{self.run.id}\n")

    def log(self, values: dict[str, float], step: int) -> None:
        self.run.log(values, step=step)

    def close(self) -> None:
        self.run.finish()


@dataclass(frozen=True)
class Result:
    """What `fastkd.train` measured on the evaluation set; accuracies in %.

    Attributes:
        top1: of the raw weights after the last epoch; None where the evaluation set has no labels.
        top5: likewise; None below five classes.
        ema_top1: of the averaged weights after the last epoch; None without EMA.
        ema_top5: likewise.
        best_top1: the highest top-1 that `best_rule` saw; None where it goes by the loss.
        best_epoch: the epoch it belongs to, from 1.
        best_rule: how the best epoch was picked.
        epochs: epochs trained.
        images: images in the evaluation set.
        parameters: of the student, without projectors that are dropped at inference.
        eval_loss: after the last epoch: plain cross-entropy, or the objective where accuracy is not
            what the best epoch is picked by.
        output: the run's folder; None where nothing was written.
        last: the checkpoint after the last epoch; None where none was written.
        best: the checkpoint of the best epoch; None likewise.
        history: one record per epoch, as in epochs.csv.
    """

    top1: float | None
    top5: float | None
    ema_top1: float | None
    ema_top5: float | None
    best_top1: float | None
    best_epoch: int
    best_rule: str
    epochs: int
    images: int
    parameters: int
    eval_loss: float | None = None
    output: str | None = None
    last: str | None = None
    best: str | None = None
    history: list[dict[str, Any]] = field(default_factory=list, repr=False)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the result as JSON, atomically.

        Args:
            path: the file.
        """
        write_text(Path(path), json.dumps(asdict(self), indent=2) + "\n")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Result:
        """Read a result that `save` wrote.

        Args:
            path: the file, or the folder of a run.

        Returns:
            The result.
        """
        path = Path(path)
        file = path / RESULT if path.is_dir() else path
        return cls(**json.loads(file.read_text(encoding="utf-8")))

    def summary(self) -> str:
        """Say in plain lines what was measured, on what, and how the best epoch was picked."""
        lines = []
        if self.top1 is not None:
            lines.append(
                f"top-1 after epoch {self.epochs}: {_accuracies(self.top1, self.top5)} (raw "
                f"weights, {self.images:,} evaluation images)"
            )
        if self.ema_top1 is not None:
            lines.append(f"with EMA weights: {_accuracies(self.ema_top1, self.ema_top5)}")
        if self.best_top1 is None:
            lines.append(
                f"loss after epoch {self.epochs}: {self.eval_loss:.4f} ({self.images:,} evaluation "
                f"images)"
            )
            lines.append(f"best: epoch {self.best_epoch} ({self.best_rule})")
        else:
            best = f"{self.best_top1:.2f} % at epoch {self.best_epoch}"
            lines.append(f"best: {best} ({self.best_rule})")
        lines.append(f"student: {self.parameters:,} parameters")
        if self.output is not None:
            lines.append(f"files: {self.output}")
        return "\n".join(lines)


def _accuracies(top1: float, top5: float | None) -> str:
    return f"{top1:.2f} %" if top5 is None else f"{top1:.2f} % (top-5 {top5:.2f} %)"


class Meter:
    """Sums of every term over the updates of an epoch, and how many updates were skipped.

    Args:
        names: what is summed, in order.
        device: where the sums are kept.
    """

    def __init__(self, names: tuple[str, ...], device: torch.device) -> None:
        self.names = names
        self.count = 0
        self.sums = torch.zeros(len(names), dtype=torch.float64, device=device)
        # Skipped updates of the epoch, skipped ones in a row until now, and the longest such row.
        self.skips = torch.zeros(3, dtype=torch.float64, device=device)

    def add(self, values: Tensor, applied: Tensor) -> None:
        """Count an update; one that was skipped adds nothing to the sums. Does not synchronise."""
        self.sums += torch.where(applied, values.to(self.sums.dtype), 0)
        skipped = (~applied).to(self.skips.dtype)
        total, row, longest = self.skips.unbind()
        row = (row + 1) * skipped
        self.skips = torch.stack([total + skipped, row, torch.maximum(longest, row)])
        self.count += 1

    def reset(self) -> None:
        """Start an epoch: all at zero but the row of skipped updates, which may go on."""
        self.sums.zero_()
        row = self.skips[1]
        self.skips = torch.stack([torch.zeros_like(row), row, row])
        self.count = 0

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps, so that a resumed epoch reports means of the whole epoch."""
        return {"sums": self.sums, "skips": self.skips, "count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put back what `state_dict` gave."""
        self.sums.copy_(state["sums"])
        self.skips.copy_(state["skips"])
        self.count = state["count"]


@dataclass(frozen=True)
class Reading:
    """A meter's sums on the host, over all processes.

    Attributes:
        sums: of every term by name, mean over processes.
        applied: updates that were applied.
        skipped: updates that were skipped.
        longest_row: the most updates skipped in a row.
    """

    sums: dict[str, float]
    applied: int = 0
    skipped: int = 0
    longest_row: int = 0

    def means(self, since: Reading | None = None) -> dict[str, float]:
        """Means over the updates applied, since an earlier reading or in all; 0 of none."""
        before = Reading(dict.fromkeys(self.sums, 0.0)) if since is None else since
        count = max(1, self.applied - before.applied)
        return {name: (total - before.sums[name]) / count for name, total in self.sums.items()}


@dataclass
class Throughput:
    """Images and seconds, and how many of those were spent waiting for data."""

    images: int = 0
    seconds: float = 0.0
    waited: float = 0.0

    def record(self) -> dict[str, float]:
        """Images a second and the part of the time that data were waited for, in %."""
        seconds = max(self.seconds, 1e-9)
        return {
            "images_per_second": self.images / seconds,
            "data_wait": 100 * self.waited / seconds,
        }

    def since(self, earlier: Throughput) -> Throughput:
        """The difference to an earlier reading."""
        return Throughput(
            self.images - earlier.images,
            self.seconds - earlier.seconds,
            self.waited - earlier.waited,
        )
