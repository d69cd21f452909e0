"""The state of a run: what its checkpoints hold, how they are written, and how it resumes."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastkd import checkpoint
from fastkd.checkpoint import BEST, LAST, CheckpointError
from fastkd.config import Recipe
from fastkd.data.transforms import InputSpec
from fastkd.inference.open_model import recipe_of
from fastkd.models.weights import better_weights, short_misfit
from fastkd.training.updates import Engine, Position
from fastkd.utils.distributed import World
from fastkd.utils.io import remove_leftovers
from fastkd.utils.lock import FolderInUseError, FolderLock, holding
from fastkd.utils.random import rng_state, set_rng_state


@dataclass(frozen=True)
class Identity:
    """What makes a checkpoint this run's, and its student rebuildable."""

    recipe: Recipe  # resolved
    spec: InputSpec  # the student's input
    num_classes: int | None  # None: unknown
    img_size: int | tuple[int, int] | None  # what the student was built for
    classes: list[str] | None  # names by label; None where the data do not name them
    train_images: int  # samples of an epoch's one pass
    # (processes, loader processes of each) that share a stream, whose order depends on them; None
    # for data that are read by number.
    stream: tuple[int, int] | None
    updates_per_epoch: int


@contextmanager
def locked(output: Path | None, peers: World) -> Iterator[FolderLock | None]:
    """Hold the output on the main process; all raise where another run writes there."""
    if output is None:
        yield None
        return
    lock, error = None, None
    with ExitStack() as stack:
        if peers.is_main:
            try:
                lock = stack.enter_context(holding(output))
            except (OSError, FolderInUseError) as raised:
                error = raised
        if (error := peers.gather(error)[0]) is not None:
            raise error
        yield lock


@dataclass(eq=False, repr=False)
class RunState:
    """All of a run that changes, and its checkpoints."""

    engine: Engine
    identity: Identity
    output: Path | None  # None writes nothing
    # Evaluated figure that picks the best epoch: top1, ema_top1 (the highest) or eval_loss.
    ranked_by: str
    history: list[dict[str, Any]] = field(default_factory=list)  # a record of each finished epoch
    unreadable: list[str] = field(default_factory=list)  # names of training images
    torn: list[str] = field(default_factory=list)  # faults of checkpoints that were passed over
    unsaved: dict[str, OSError] = field(default_factory=dict)  # by file name
    lock: FolderLock | None = None  # on the process that writes into the output
    _saved: dict[str, int] | None = None  # position of last.pth
    _begun: Path | None = None  # the checkpoint that was resumed

    def __post_init__(self) -> None:
        self.student = self.engine.task.student
        # Epoch (from 1; 0: none yet) and figure, None before the first.
        self.best: dict[str, Any] = {"epoch": 0, self.ranked_by: None}

    @property
    def finished(self) -> bool:
        return self.engine.position.epoch >= self.identity.recipe.epochs

    @property
    def is_saved(self) -> bool:
        return self._saved == vars(self.engine.position)

    def is_in_output(self, path: Path | None) -> bool:
        """Check whether a run that resumes from this checkpoint goes on in its folder."""
        if path is None or self.output is None:
            return False
        return path.parent.resolve() == self.output.resolve()

    def where(self) -> dict[str, int]:
        """Return epoch (from 1) and number in the run of the last update, as logs have them."""
        position = self.engine.position
        begun = position.update > 0 or position.total == 0
        return {"epoch": position.epoch + begun, "update": position.total}

    def finish_epoch(self, record: dict[str, Any]) -> bool:
        """Add an epoch to the history; returns whether it is the best so far."""
        engine = self.engine
        improved = self._rank(record) > self._rank(self.best)
        engine.changing = True  # an interrupt in the middle must not be saved
        if improved:
            self.best = {"epoch": record["epoch"], self.ranked_by: record[self.ranked_by]}
        self.history.append(record)
        engine.position.epoch += 1
        engine.position.update = 0
        engine.meter.reset()
        # Until best.pth is written: last.pth must not name an epoch that is in no file.
        engine.changing = improved
        return improved

    def _rank(self, record: dict[str, Any]) -> float:
        value = record.get(self.ranked_by)
        broken = record.get("ema_nonfinite" if self.ranked_by == "ema_top1" else "eval_nonfinite")
        # Nothing was measured, or no image with finite logits was right.
        if value is None or math.isnan(value) or (broken and value == 0):
            return -math.inf
        return -value if self.ranked_by == "eval_loss" else value

    def save(self, name: str = LAST) -> OSError | None:
        """Write a checkpoint on all processes, or return the error: the next one may be written."""
        engine = self.engine
        engine.read()
        if not engine.is_finite():
            raise engine.non_finite("weights or moments of the optimizer are not finite")
        if self.output is None:
            engine.changing = False
            return None
        processes = engine.world.gather(engine.process_state())
        position = vars(engine.position).copy()
        try:
            if engine.world.is_main and name == BEST:
                checkpoint.save_checkpoint(self._best_state(), self.output / name)
            elif engine.world.is_main:
                keep = self.identity.recipe.keep_checkpoints
                checkpoint.save_checkpoint(self._state(processes), self.output / name, keep)
        except OSError as error:
            self.unsaved[name] = error
        else:
            self.unsaved.pop(name, None)
            self._saved = position if name == LAST else self._saved
        engine.changing = False
        return self.unsaved.get(name)

    def kept(self) -> str:
        """Describe which checkpoint holds how much of the run."""
        if self._saved is None or self.output is None:
            nothing = "Nothing of this run was saved"
            return nothing if self._begun is None else f"{nothing} since {self._begun}"
        return f"{self.output / LAST} holds the run after update {self._saved['total']}"

    def _student_state(self) -> dict[str, Any]:
        """Return what rebuilds the student, and its weights by the names that timm has."""
        identity, spec, ema = self.identity, self.identity.spec, self.engine.ema
        evaluated = [record for record in self.history if "top1" in record]
        last = evaluated[-1] if evaluated else {}
        return {
            "recipe": identity.recipe.to_dict(),
            "num_classes": identity.num_classes,
            "img_size": identity.img_size,
            "classes": identity.classes,
            "input": {"size": spec.size, "mean": spec.mean, "std": spec.std},
            "position": vars(self.engine.position).copy(),
            "best": self.best,
            "measured": {name: last[name] for name in ("top1", "ema_top1") if name in last},
            "state_dict": self.student.state_dict(),
            "state_dict_ema": None if ema is None else ema.module.state_dict(),
        }

    def _best_state(self) -> dict[str, Any]:
        """Return the better weights alone, and which of the two they are."""
        state = self._student_state()
        state["weights"] = better_weights(state)
        averaged = state.pop("state_dict_ema")
        return state | ({"state_dict": averaged} if state["weights"] == "ema" else {})

    def _state(self, processes: list[dict[str, Any]]) -> dict[str, Any]:
        engine, identity = self.engine, self.identity
        return {
            **self._student_state(),
            "terms": engine.task.terms.state_dict(),
            "optimizer": engine.optimizer.state_dict(),
            "scheduler": engine.scheduler.state_dict(),
            "scaler": engine.scaler.state_dict(),
            # Updates seed themselves; this is for what a user's modules draw outside of them.
            "rng": rng_state(engine.world.device),
            "train_images": identity.train_images,
            "stream": identity.stream,
            "processes": processes,
            "history": self.history,
            "unreadable": self.unreadable,
        }

    def resume(self, resume: str) -> Path | None:
        """Take up the run that ``resume`` names; returns its checkpoint, None to start afresh."""
        self._check_output(resume)
        found = self._find(resume)
        if found is not None:
            self._restore(*found)
        position = self.engine.position
        totals = self.engine.world.gather(position.total)
        if len(set(totals)) > 1:
            raise CheckpointError(
                f"resume: the processes found checkpoints of different updates ({totals}): do all "
                f"of them see the output's file system?"
            )
        path = self._begun = None if found is None else found[1]
        if path is not None and not self.engine.is_finite():
            raise CheckpointError(
                f"resume: {path} holds weights or moments that are not finite; without it the run "
                f"goes on from the checkpoint before"
            )
        if self.engine.world.is_main and self.output is not None:
            self.output.mkdir(parents=True, exist_ok=True)
            remove_leftovers(self.output)
            for file in (self.output / LAST, self.output / BEST):
                if file.is_dir():
                    aside = file.rename(f"{file}.folder")
                    self.torn.append(f"checkpoint: {file} was a folder and is {aside.name} now")
            if path is None:
                checkpoint.remove_checkpoints(self.output)
            checkpoint.move_best(path, self.output, self.best)
        if self.output is not None and path == self.output / LAST:
            self._saved = vars(position).copy()
        return path

    def _find(self, resume: str) -> tuple[dict[str, Any], Path] | None:
        if resume == "never" or (resume == "auto" and self.output is None):
            return None
        folder = self.output if resume == "auto" else Path(resume)
        if folder is not None and (resume == "auto" or folder.is_dir()):
            torn: list[str] = []
            found = checkpoint.load_latest(folder, torn.append)
            self.torn += [f"{reason}; the checkpoint before it is taken" for reason in torn]
            if found is not None or resume == "auto":
                return found
        path = Path(resume) / LAST if Path(resume).is_dir() else Path(resume)
        return checkpoint.load_checkpoint(path), path

    def _check_output(self, resume: str) -> None:
        """Refuse to go on with one run in the folder of another."""
        if resume in ("auto", "never") or self.output is None:
            return
        folder = Path(resume) if Path(resume).is_dir() else Path(resume).parent
        if folder.resolve() != self.output.resolve() and (self.output / LAST).exists():
            raise CheckpointError(
                f"resume: {self.output} holds a run of its own, which {resume} is not of: choose "
                f"another output, or resume='auto'"
            )

    def _restore(self, state: dict[str, Any], path: Path) -> None:
        engine = self.engine
        try:
            _check_same_run(path, state, self.identity)
            self._check_position(state)
            self.student.load_state_dict(state["state_dict"])
            engine.task.terms.load_state_dict(state["terms"])
            engine.optimizer.load_state_dict(state["optimizer"])
            if engine.ema is not None:
                engine.ema.module.load_state_dict(state["state_dict_ema"])
            engine.scheduler.load_state_dict(state["scheduler"])
            engine.scaler.load_state_dict(state["scaler"])
            engine.load_process_states(state["processes"])
            set_rng_state(state["rng"], engine.world.device)
            self.unreadable[:] = state["unreadable"]
        except CheckpointError:
            raise
        except (RuntimeError, ValueError) as error:
            reason = f"does not fit this student: {short_misfit(error)}"
            raise CheckpointError(f"resume: {path} {reason}") from error
        except (LookupError, TypeError, AttributeError, ArithmeticError) as error:
            reason = f"is not what a run saves ({type(error).__name__}: {error})"
            raise CheckpointError(f"resume: {path} {reason}") from error
        engine.position = Position(**state["position"])
        self.history, self.best = state["history"], state["best"]

    def _check_position(self, state: dict[str, Any]) -> None:
        """Refuse a position that the run never has, or whose history is another's."""
        position, length = Position(**state["position"]), self.identity.updates_per_epoch
        epochs = [record["epoch"] for record in state["history"]]
        last = self.identity.recipe.epochs
        if (
            not 0 <= position.epoch <= last
            or not 0 <= position.update <= (length if position.epoch < last else 0)
            or position.total != position.epoch * length + position.update
            or epochs != list(range(1, position.epoch + 1))
            or not 0 <= state["best"]["epoch"] <= position.epoch
            or self.ranked_by not in state["best"]
        ):
            run = f"{len(epochs)} epochs of history, or {last} epochs of {length} updates"
            raise ValueError(f"its position {vars(position)} does not fit {run}")


def _check_same_run(path: Path, state: dict[str, Any], identity: Identity) -> None:
    if "optimizer" not in state:
        raise CheckpointError(f"resume: {path} holds a student alone, no run (take {LAST})")
    for name, what in (
        ("train_images", "numbers of training images"),
        ("classes", "class names or their order"),
        ("stream", "(processes, workers of each) that share a stream and its order"),
    ):
        found, ours = state[name], getattr(identity, name)
        if found != ours:
            shown = [textwrap.shorten(str(value), 60, placeholder="...") for value in (found, ours)]
            raise CheckpointError(f"resume: {path} has other {what}: {shown[0]}, now {shown[1]}")
    differences = recipe_of(path, state).differences(identity.recipe)
    if differences:
        fields = ", ".join(f"{n} {a!r} -> {b!r}" for n, (a, b) in differences.items())
        raise CheckpointError(
            f"resume: {path} is of a run with another recipe ({fields}); choose another "
            f"output, or resume='never' to start afresh and overwrite it"
        )
