"""What a run reports: log.jsonl, epochs.csv, trackers, result.json and the progress bar."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import KW_ONLY, asdict, dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, TextIO

from fastkd.config import Recipe
from fastkd.data.batches import Fault
from fastkd.training.updates import Skipped
from fastkd.utils.distributed import ALONE, World
from fastkd.utils.io import csv_text, printable, read_json, write_text
from fastkd.utils.progress import Progress

LOG = "log.jsonl"
EPOCHS = "epochs.csv"
RESULT = "result.json"
PLOT = "results.png"

Tracker = tuple[Callable[..., Any], Callable[[], Any]]  # (log, close)

EMA_MOVED = 0.5  # the least that the EMA should have taken from the training at its end


def timestamp() -> str:
    return datetime.now().astimezone().isoformat("T", "seconds")


@dataclass(eq=False, repr=False)
class RunLogger:
    """Writes the run's logs and shows its progress; every process has one, the main one writes."""

    output: Path | None  # None writes no files
    recipe: Recipe
    updates_per_epoch: int
    _: KW_ONLY
    peers: World = ALONE
    unreadable: list[str] = field(default_factory=list)  # names of images; new ones are added
    quiet: bool = False
    stream: TextIO | None = None  # of progress; standard error by default

    def __post_init__(self) -> None:
        self.output = self.output if self.peers.is_main else None
        self.shows = self.peers.is_main and not self.quiet
        shown: Any = {"shows": self.shows, "stream": self.stream}
        self.progress = Progress(unit="update", lines=False, leave=True, **shown)
        self._log: TextIO | None = None
        self._trackers: list[Tracker] = []
        self._faults: list[tuple[int, Fault]] = []
        self._epochs = 0  # that are in the log
        self.total_updates = self.recipe.epochs * self.updates_per_epoch

    def mend(self, updates: int, history: list[dict[str, Any]], *, foreign: bool = False) -> None:
        """Rewrite the files to hold what a checkpoint holds; those of a ``foreign`` run go first.

        A kill between two writes, or a run continued in a new folder, leaves them different.
        """
        if self.output is None:
            return
        if foreign:
            for name in (RESULT, PLOT, LOG):
                (self.output / name).unlink(missing_ok=True)
        dropped = _mend_log(self.output / LOG, updates, history)
        if dropped:
            self.message(f"{LOG}: {dropped} line{'s'[: dropped - 1]} of no run left out")
        self._epochs = len(history)
        if history:
            _write_csv(self.output / EPOCHS, history)
        else:
            (self.output / EPOCHS).unlink(missing_ok=True)

    def start(self, updates: int) -> None:
        """Open the log, the bar and the trackers of a run with so many updates done."""
        if self.output is not None:
            (self.output / PLOT).unlink(missing_ok=True)  # of a part of the run
            self._log = open(self.output / LOG, "a", encoding="utf-8")  # noqa: SIM115
            config, names = self.recipe.to_dict(), _trackers_of(self.recipe.track)
            self._trackers = [_open_tracker(name, self.output, config, updates) for name in names]
        self.progress.start("", self.total_updates, updates)

    def reopen(self, updates: int, history: list[dict[str, Any]]) -> None:
        log, self._log = self._log, None
        if log is not None:
            with contextlib.suppress(OSError):
                log.close()
        self.mend(updates, history[: self._epochs])
        if self.output is not None and log is not None:
            self._log = open(self.output / LOG, "a", encoding="utf-8")  # noqa: SIM115

    def announce(self, values: dict[str, str], where: dict[str, int], torn: list[str]) -> None:
        """Show what is trained and how, where a resumed run stands, and what may surprise."""
        for reason in torn:
            self.event("torn", where | {"reason": reason}, reason)
        for heading, value in values.items():
            self.message(f"{heading}: {value}")
        if where["update"]:
            self.message(f"resumed after update {where['update']} (epoch {where['epoch']})")
        decay = self.recipe.ema_decay
        moved = 1.0 if decay is None or self.recipe.ema_warmup else 1 - decay**self.total_updates
        if moved < EMA_MOVED:
            self.message(
                f"EMA: after {self.total_updates:,} updates with ema_decay={decay}, the initial "
                f"weights still make up {100 * (1 - moved):.3g} % of the average (set ema_warmup)"
            )

    def message(self, text: str) -> None:
        stamp = "" if self.progress.has_bar else f"{timestamp()[:19].replace('T', ' ')} "
        self.progress.write(stamp + printable(text))

    def advance(self, faults: Iterable[Fault], update: int) -> None:
        """Count an update, and keep what could not be read for it until the next `report`."""
        self.progress.advance()
        self._faults.extend((update, fault) for fault in faults)

    @property
    def has_faults(self) -> bool:
        return bool(self._faults)

    def report(self, skipped: Sequence[Skipped]) -> None:
        """Log new unreadable images and skipped updates; all processes call it after one update."""
        if self.peers.size == 1 and not (self._faults or skipped):
            return
        shares = self.peers.gather((self._faults, skipped))
        events, names = [], dict.fromkeys(self.unreadable)
        for update, fault in (item for share, _ in shares for item in share):
            if fault.name not in names:
                names[fault.name] = None
                reason = f"cannot read {fault.name} ({fault.reason}); another image takes its place"
                events.append(("unreadable", update, fault._asdict(), f"data: {reason}"))
        for same in zip(*(theirs for _, theirs in shares), strict=True):
            what = {name: [getattr(one, name) for one in same] for name in Skipped._fields[1:]}
            text = f"update {same[0].update} was skipped: its gradient was not finite"
            events.append(("skipped", same[0].update, what, f"{text} (samples: see {LOG})"))
        for kind, update, what, text in sorted(events, key=lambda event: event[1]):
            epoch = (update - 1) // self.updates_per_epoch + 1
            self.event(kind, {"epoch": epoch, "update": update, **what}, text)
        # After they are written: an interrupt in between is followed by another report.
        self.unreadable[:], self._faults = names, []
        if len(self.unreadable) > self.recipe.max_unreadable:
            raise OSError(
                f"data: {len(self.unreadable)} training images cannot be read, more than "
                f"max_unreadable ({self.recipe.max_unreadable}); the last is {self.unreadable[-1]}"
            )

    def interval(self, record: dict[str, Any]) -> None:
        self._write_line({"kind": "interval", **record})
        self._track("train", record)
        if self.progress.has_bar:
            self.progress.note(
                f"epoch {record['epoch']}, loss {record['loss']:.4g}, "
                f"{record['images_per_second']:,.0f} images/s, data wait {record['data_wait']:.0f}%"
            )
        elif self.shows:
            self.message(self._interval_line(record))

    def epoch(self, record: dict[str, Any], history: list[dict[str, Any]]) -> None:
        """Log an epoch, rewrite the table of epochs, and print a line."""
        self._write_line({"kind": "epoch", **record})
        self._epochs = len(history)
        self._track("epoch", record)
        if self.output is not None:
            with self._surviving(EPOCHS):
                _write_csv(self.output / EPOCHS, history)
        if not self.progress.has_bar or "eval_loss" in record:
            self.message(_epoch_line(record, self.recipe.epochs))

    def event(self, kind: str, record: dict[str, Any], text: str) -> None:
        """Log and show something that should not happen, and that the run survived."""
        self._write_line({"kind": kind, **record, "time": timestamp()})
        self.message(text)

    def close(self) -> None:
        for _, close in self._trackers:
            close()
        self._trackers = []
        log, self._log = self._log, None
        if log is not None:
            with self._surviving(LOG):  # it writes what a full disk has kept back
                log.close()
        self.progress.close()

    def _interval_line(self, record: dict[str, Any]) -> str:
        done = record["update"] - (record["epoch"] - 1) * self.updates_per_epoch
        names = list(record)  # terms stand between the learning rate and the gradient's norm
        terms = names[names.index("lr") + 1 : names.index("grad_norm")]
        shown = ", ".join(f"{name} {record[name]:.4f}" for name in terms if name != "loss")
        parts = [
            f"epoch {record['epoch']}/{self.recipe.epochs}",
            f"update {done}/{self.updates_per_epoch}",
            f"loss {record['loss']:.4f}" + (f" ({shown})" if shown else ""),
            f"lr {record['lr']:.2e}",
            *_speed(record),
        ]
        if (left := self.progress.seconds_left) is not None:
            parts.append(f"ETA {timedelta(seconds=round(left))}")
        return ", ".join(parts)

    def _track(self, group: str, record: dict[str, Any]) -> None:
        numbers = {f"{group}/{n}": v for n, v in record.items() if isinstance(v, int | float)}
        for log, _ in self._trackers:
            with self._surviving("track"):
                log(numbers, step=record["update"])

    def _write_line(self, record: dict[str, Any]) -> None:
        if self._log is None:
            return
        with self._surviving(LOG):
            self._log.write(json.dumps(record) + "\n")
            self._log.flush()

    @contextlib.contextmanager
    def _surviving(self, what: str) -> Iterator[None]:
        """Go on without a line of the logs where the disk is full."""
        try:
            yield
        except OSError as error:
            self.message(f"{what} could not be written ({error})")


def _mend_log(path: Path, updates: int, history: list[dict[str, Any]]) -> int:
    """Drop lines that will be written again or that a kill tore; take epochs from the history.

    Returns how many lines are none of a log's.
    """
    records = whole_records(path)
    lines = path.read_bytes().count(b"\n") if path.exists() else 0  # a torn one has no end
    dropped = max(0, lines - len(records))
    done = range(1, len(history) + 1)
    kept = [
        record
        for record in records
        if record["update"] <= updates
        and record.get("kind") != "epoch"
        # An evaluation whose epoch is not in the history is done again.
        and not (record.get("kind") == "evaluation" and record.get("epoch") not in done)
    ]
    kept += [{"kind": "epoch", **record} for record in history]
    # Stable, so that an epoch's line stays behind the last interval's.
    records = sorted(kept, key=lambda record: record["update"])
    if path.exists() or records:
        write_text(path, "".join(json.dumps(record) + "\n" for record in records))
    return dropped


def whole_records(path: Path) -> list[dict[str, Any]]:
    """Read the lines of a log that no kill tore."""
    if not path.exists():
        return []
    records = []
    for line in path.read_bytes().split(b"\n"):
        with contextlib.suppress(ValueError, RecursionError):
            record = json.loads(line)
            known = isinstance(record, dict) and isinstance(record.get("kind", ""), str)
            if known and isinstance(record.get("update"), int):
                records.append(record)
    return records


def _write_csv(path: Path, history: list[dict[str, Any]]) -> None:
    columns = list(dict.fromkeys(name for record in history for name in record))
    rows = [[record.get(name) for name in columns] for record in history]
    write_text(path, csv_text([columns, *rows]))


def _epoch_line(record: dict[str, Any], epochs: int) -> str:
    parts = [f"epoch {record['epoch']}/{epochs}", f"loss {record['loss']:.4f}"]
    if "top1" in record:
        parts.append(f"top-1 {record['top1']:.2f} %")
    elif "eval_loss" in record:
        parts.append(f"evaluation loss {record['eval_loss']:.4f}")
    if "ema_top1" in record:
        parts.append(f"EMA top-1 {record['ema_top1']:.2f} %")
    parts += _speed(record)
    if record.get("skipped_updates"):
        parts.append(f"{record['skipped_updates']} updates skipped")
    return ", ".join(parts)


def _speed(record: dict[str, Any]) -> list[str]:
    parts = [
        f"{record['images_per_second']:,.0f} images/s",
        f"data wait {record['data_wait']:.0f} %",
    ]
    if "gpu_memory" in record:
        parts.append(f"{record['gpu_memory']:.1f} GiB")
    return parts


_TRACKERS = {"tensorboard": "torch.utils.tensorboard", "wandb": "wandb"}  # their modules


def _trackers_of(track: str | None) -> list[str]:
    return list(_TRACKERS) if track == "both" else [track] if track else []


def check_trackers(track: str | None, output: Path | None) -> None:
    for name in _trackers_of(track):
        if output is None:
            raise ValueError(f"track: {name} keeps its files in the run's folder: give an output")
        try:
            importlib.import_module(_TRACKERS[name])
        except ImportError as error:
            raise ValueError(
                f"track: {name} is asked for and cannot be imported ({error}); "
                f"pip install {name}, or track=None"
            ) from None


def _open_tracker(name: str, output: Path, config: dict[str, Any], updates: int) -> Tracker:
    module = importlib.import_module(_TRACKERS[name])
    if name == "tensorboard":
        writer = module.SummaryWriter(str(output / "tensorboard"), purge_step=updates + 1)

        def log(values: dict[str, float], step: int) -> None:
            for key, value in values.items():
                writer.add_scalar(key, value, step)

        return log, writer.close
    # One run of Weights & Biases a folder: its id is kept there, so that it goes on.
    file = output / "wandb_id.txt"
    resumed = updates > 0 and file.exists()
    known = file.read_text(encoding="utf-8").strip() if resumed else None
    options = {"name": output.name, "dir": str(output), "id": known, "config": config}
    run = module.init(project="fastkd", resume="allow", **options)
    if known is None:
        write_text(file, f"{run.id}\n")
    return run.log, run.finish


@dataclass(frozen=True)
class Result:
    """What `fastkd.train` measured on the evaluation set; accuracies in %."""

    top1: float | None  # raw weights, after the last epoch; None where there are no labels
    top5: float | None  # None below five classes
    ema_top1: float | None  # averaged weights; None without EMA
    ema_top5: float | None
    best_top1: float | None  # the highest by `best_rule`; None where it goes by the loss
    best_epoch: int  # from 1
    best_rule: str  # how the best epoch was picked
    epochs: int
    images: int  # in the evaluation set
    parameters: int  # of the student, without projectors that are dropped at inference
    # Plain cross-entropy, or the objective where accuracy does not pick the best epoch.
    eval_loss: float | None = None
    unreadable: int = 0  # evaluation images that count as wrong
    output: str | None = None  # the run's folder
    last: str | None = None  # the checkpoint after the last epoch
    best: str | None = None  # the checkpoint of the best epoch: raw or averaged (its ``weights``)
    history: list[dict[str, Any]] = field(default_factory=list, repr=False)  # as in epochs.csv

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

        Raises:
            ValueError: the file holds no result.
            OSError: it cannot be read.
        """
        path = Path(path)
        file = path / RESULT if path.is_dir() else path
        content = read_json(file)
        try:
            return cls(**content)
        except TypeError as error:
            raise ValueError(f"Result.load: {file} is no result of a run: {error}") from None

    def summary(self) -> str:
        """Summarize in lines what was measured, on what, and how the best epoch was picked."""
        lines, images = [], f"{self.images:,} evaluation images"
        if self.top1 is not None:
            top1 = _accuracies(self.top1, self.top5)
            lines.append(f"top-1 after epoch {self.epochs}: {top1} (raw weights, {images})")
        if self.ema_top1 is not None:
            lines.append(f"with EMA weights: {_accuracies(self.ema_top1, self.ema_top5)}")
        if self.best_top1 is None:
            lines.append(f"loss after epoch {self.epochs}: {self.eval_loss:.4f} ({images})")
        if self.unreadable:
            lines.append(f"evaluation images that cannot be read: {self.unreadable:,}")
        if self.best_epoch == 0:
            lines.append("best: none, since no epoch's logits or losses were finite")
        else:
            best = "" if self.best_top1 is None else f"{self.best_top1:.2f} % at "
            lines.append(f"best: {best}epoch {self.best_epoch} ({self.best_rule})")
        lines.append(f"parameters: {self.parameters:,}")
        if self.output is not None:
            lines.append(f"files: {self.output}")
        return "\n".join(lines)


def _accuracies(top1: float, top5: float | None) -> str:
    return f"{top1:.2f} %" if top5 is None else f"{top1:.2f} % (top-5 {top5:.2f} %)"


def result_of(
    history: list[dict[str, Any]], ranking: dict[str, Any], ranked_by: str, **known: Any
) -> Result:
    last, by_loss = history[-1], ranked_by == "eval_loss"
    weights = "EMA" if ranked_by == "ema_top1" else "raw"
    measure = f"{'lowest loss' if by_loss else 'highest top-1'} of the {weights} weights"
    known |= {name: last.get(name) for name in ("top1", "top5", "ema_top1", "ema_top5")}
    return Result(
        eval_loss=last["eval_loss"],
        best_top1=None if by_loss else ranking[ranked_by],
        best_epoch=ranking["epoch"],
        best_rule=f"{measure} on the evaluation set itself, earliest of equals",
        images=last["eval_images"],
        unreadable=last.get("eval_unreadable", 0),
        history=history,
        **known,
    )
