"""`train`: a run from a recipe to a result."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import nn
from torch.utils.data import IterableDataset
from typing_extensions import Unpack

from fastkd.checkpoint import (
    BEST,
    LAST,
    CheckpointError,
    is_best,
    load_checkpoint,
    load_latest,
    move_best,
    remove_checkpoints,
    save_checkpoint,
)
from fastkd.config import Overrides, Recipe, refuse_image_options
from fastkd.data.datasets import Data, DataPair, open_data
from fastkd.data.loader import eval_loader, train_loader
from fastkd.data.samplers import Schedule
from fastkd.data.samples import DEATHS, Batch, Fault, describe_worker_death
from fastkd.inference.evaluate import evaluate_model
from fastkd.inference.loading import build_student, open_model, starts_from_weights
from fastkd.inference.preprocessing import (
    class_count,
    class_names,
    input_spec,
    parameter_count,
    student_shape,
)
from fastkd.training.build import (
    FromRecipe,
    build_engine,
    chosen_teacher,
    resolve_recipe,
    resolve_teacher,
    warn_idle,
)
from fastkd.training.dry_run import effective_values
from fastkd.training.engine import NonFiniteError, evaluate_terms, train_one_epoch
from fastkd.training.logging import RESULT, Result, RunLogger, check_trackers, open_trackers
from fastkd.training.state import Identity, Progress, restore, run_state, student_state
from fastkd.utils.distributed import StopRequest, World, world
from fastkd.utils.io import remove_leftovers
from fastkd.utils.random import derive_seed, preserved_rng, seed_all

RECIPE = "recipe.yaml"


def train(
    student: str | Path | nn.Module | None = None,
    teacher: str | Path | nn.Module | FromRecipe | None = FromRecipe.TEACHER,
    data: Data | None = None,
    output: str | Path | None = None,
    recipe: str | Path | Recipe | None = None,
    *,
    resume: str = "auto",
    device: str | torch.device | None = None,
    quiet: bool = False,
    **overrides: Unpack[Overrides],
) -> Result:
    """Train a student, by a teacher or without one.

    Under torchrun every process calls it and the batch is shared; the CPU's global generators of
    random numbers are left as they were.

    Args:
        student: a timm name, which starts from random weights (its variant comes from the recipe);
            a source with weights to start from (a run, a checkpoint, an export, ``local-dir:``,
            ``hf_hub:``); a module, which is trained in place; or None for the recipe's model.
        teacher: a timm name (pretrained, or with ``teacher_checkpoint=``), or any other source that
            `fastkd.create_teacher` takes. Left out, it is the recipe's. None trains on the labels
            alone: the matched run without distillation, whatever the recipe's terms.
        data: a folder with ``train`` and ``val`` (or ``validation``), a timm data set name with its
            scheme, or (train, val) map-style data sets of (PIL image or float tensor, label). None
            takes the recipe's.
        output: the run's folder, made if needed: recipe.yaml, log.jsonl, epochs.csv, last.pth and
            the checkpoint before it (``keep_checkpoints``), best.pth, result.json. None writes
            nothing, and then nothing can be resumed.
        recipe: a shipped name (`Recipe.names`), a YAML file, a run's folder, or a `Recipe`; None
            starts from the defaults.
        resume: ``"auto"`` continues the run in ``output`` if there is one (a finished one is not
            trained again; a torn checkpoint gives way to the one before it), ``"never"`` starts
            afresh, a path continues from that checkpoint.
        device: ``"cpu"``, ``"cuda"``, ``"cuda:1"``; None takes CUDA where there is a device.
        quiet: show nothing.
        **overrides: recipe fields by name. Unknown ones are errors, and so are those that have no
            effect where the run would be another one than asked for; of others a warning tells.

    Returns:
        What was measured, and where the files are.

    Raises:
        ValueError: options or data that do not fit, or a checkpoint of another run.
        TypeError: a field of the wrong type.
        NonFiniteError: the gradient was infinite or NaN in more than ``max_nonfinite`` updates in a
            row; single ones are skipped, counted and listed in log.jsonl.
        OSError: more than ``max_unreadable`` training images cannot be read (fewer are replaced and
            listed), an evaluation image cannot, or the last checkpoint cannot be written.
        KeyboardInterrupt: stopped by SIGINT, after writing a checkpoint.
        SystemExit: stopped by SIGTERM or SIGUSR1, after writing a checkpoint.
    """
    for name, path in (("output", output), ("resume", resume)):
        if path is not None and not str(path).strip():
            raise ValueError(f"train: {name} must not be empty, got {path!r}")
    loaded = Recipe.load(recipe)
    given = loaded.model if student is None else student
    if isinstance(given, str | Path) and starts_from_weights("train", given):
        size = overrides.get("img_size", loaded.img_size)
        with preserved_rng():
            student = open_model(given, img_size=size, caller="train").network
    resolved = resolve_recipe(loaded, student, teacher, data, overrides)
    guide = chosen_teacher(loaded, teacher)
    source = resolved.data if data is None else data
    if source is None:
        raise ValueError("train: data is missing: a folder, a timm data set name or two data sets")
    folder = None if output is None else Path(output)
    check_trackers(resolved.track, folder)
    if folder is None:
        idle = ("checkpoint_interval", "keep_checkpoints")
        warn_idle(overrides, idle, "without an output no checkpoint is written")
    with preserved_rng(), world(device) as peers:
        opened = open_data(source, resolved.data_root, labels=resolved.labels)
        if overrides.get("train_samples") is not None and not opened.streams:
            raise ValueError("train_samples: only streamed data need to be told their length")
        if opened.yields_tensors:
            refuse_image_options(overrides)
        run = _Run(student, guide, opened, folder, resolved, peers, quiet)
        return run.execute(resume)


class _Run:
    """One run: its parts, its position and its files."""

    def __init__(
        self,
        student: str | Path | nn.Module | None,
        teacher: str | Path | nn.Module | None,
        data: DataPair,
        output: Path | None,
        recipe: Recipe,
        peers: World,
        quiet: bool,
    ) -> None:
        self.recipe = recipe
        self.peers = peers
        self.output = output
        self.data = data
        shape = student_shape(recipe, data)
        seed_all(derive_seed("model", recipe.seed))
        if not isinstance(student, nn.Module):
            student = build_student(recipe, shape)
        num_classes = class_count(student, shape)
        self.student = student.to(peers.device)
        peers.share(self.student)  # before anything is copied from it, the EMA for one
        self.spec = input_spec(student, recipe, data)
        self.teacher = resolve_teacher(teacher, recipe, self.spec)
        self.train_loader = train_loader(data, recipe, self.spec, peers)
        self.eval_loader = eval_loader(data, recipe, self.spec, peers)
        self.schedule = _schedule(self.train_loader)
        self.engine = build_engine(
            self.student,
            self.teacher,
            recipe,
            self.spec,
            peers,
            num_classes=num_classes,
            updates_per_epoch=self.updates_per_epoch,
        )
        self.identity = Identity(
            recipe,
            self.spec,
            num_classes,
            shape.img_size,
            class_names(data),
            self.schedule.num_samples,
            (peers.size, recipe.workers) if data.streams else None,
        )
        self.progress = Progress()
        self.stop = StopRequest()
        self.stopped_between_updates = False
        self.faults: list[Fault] = []
        self.passed_over: list[str] = []
        self.unsaved: dict[str, OSError] = {}
        self.logger = self._build_logger(quiet)

    def _build_logger(self, quiet: bool) -> RunLogger:
        recipe, output = self.recipe, self.output

        def trackers(updates: int) -> Any:
            return open_trackers(recipe.track, output, recipe.to_dict(), updates) if output else ()

        return RunLogger(
            output,
            recipe.epochs * self.updates_per_epoch,
            quiet=quiet,
            enabled=self.peers.is_main,
            open_trackers=trackers,
        )

    @property
    def updates_per_epoch(self) -> int:
        """Length of an epoch."""
        return self.schedule.updates_per_epoch

    @property
    def finished(self) -> bool:
        """Whether the last epoch is done."""
        return self.engine.position.epoch >= self.recipe.epochs

    def execute(self, resume: str) -> Result:
        """Continue or begin, run to the end, and say what came of it."""
        checkpoint = self._resume(resume)
        self._mend_output(checkpoint)
        if not self.finished:
            self._prepare_output()
            with self.stop:
                self._run_epochs(resumed=checkpoint is not None)
        if LAST in self.unsaved:
            raise self.unsaved[LAST]
        self.peers.barrier()  # the files that the result names are written
        result = self._result()
        if self.output is not None and self.peers.is_main:
            result.save(self.output / RESULT)
        self.peers.barrier()
        return result

    def _resume(self, resume: str) -> Path | None:
        """Take up the run that ``resume`` names; returns its checkpoint, None to start afresh."""
        found = self._find_checkpoint(resume)
        path = None
        if found is not None:
            state, path = found
            restore(path, state, self.student, self.engine, self.identity, self.progress)
        totals = self.peers.gather(self.engine.position.total)
        if len(set(totals)) > 1:
            raise CheckpointError(
                f"resume: the processes found different checkpoints (after updates {totals}): the "
                f"output must be on a file system that all of them see"
            )
        return path

    def _find_checkpoint(self, resume: str) -> tuple[dict[str, Any], Path] | None:
        if resume == "never" or (resume == "auto" and self.output is None):
            return None
        folder = self.output if resume == "auto" else Path(resume)
        if folder is not None and (resume == "auto" or folder.is_dir()):
            found = load_latest(folder, self.passed_over.append)
            if found is not None or resume == "auto":
                return found
        path = Path(resume) / LAST if Path(resume).is_dir() else Path(resume)
        return load_checkpoint(path), path

    def _prepare_output(self) -> None:
        if self.output is not None and self.peers.is_main:
            self.recipe.save(self.output / RECIPE)

    def _mend_output(self, checkpoint: Path | None) -> None:
        """Let the folder say what the run has done so far, wherever it did it."""
        if self.output is None:
            return
        if self.peers.is_main:
            self.output.mkdir(parents=True, exist_ok=True)
            remove_leftovers(self.output)
            if checkpoint is None:
                remove_checkpoints(self.output)
                (self.output / RESULT).unlink(missing_ok=True)
            self.logger.mend(self.engine.position.total, self.progress.history)
            move_best(checkpoint, self.output, self.progress.best)
        self.peers.barrier()
        if self.finished and checkpoint != self.output / LAST:  # finished elsewhere
            self._prepare_output()
            self._save(LAST)

    def _run_epochs(self, resumed: bool) -> None:
        self.logger.start(self.engine.position.total)
        try:
            self._announce(resumed)
            while not self.finished:
                self._run_epoch()
        except (KeyboardInterrupt, SystemExit):
            self._keep_what_is_done()
            raise
        except NonFiniteError:
            self._tell_skipped()
            raise
        except DEATHS as error:
            # The signal that asked to stop may have ended loader processes, too.
            if self.stop.received is not None:
                self._keep_what_is_done()
                self.stop.raise_as_exception()
            death = describe_worker_death((self.train_loader, self.eval_loader), error)
            if death is None:
                raise
            raise RuntimeError(death) from error
        finally:
            self.logger.close()

    def _announce(self, resumed: bool) -> None:
        for reason in self.passed_over:
            text = f"{reason}; the checkpoint before it is taken"
            self.logger.event("torn", self._where() | {"reason": reason}, text)
        if self.logger.shows:
            values = effective_values(
                self.recipe, self.student, self.data, self.peers.size, self.teacher, self.spec
            )
            for heading, text in values.items():
                self.logger.message(f"{heading}: {text}")
        if resumed:
            position = self.engine.position
            self.logger.message(
                f"resumed after update {position.total}, in epoch {position.epoch + 1}"
            )

    def _run_epoch(self) -> None:
        position = self.engine.position
        self.schedule.set_position(position.epoch, position.update)
        trained = position.update == self.updates_per_epoch  # and stopped in the evaluation
        record = train_one_epoch(
            self.engine,
            () if trained else self.train_loader,
            self.recipe.accumulation,
            log_interval=self.recipe.log_interval,
            on_interval=self._after_interval,
            after_update=self._after_update,
        )
        self._tell_faults()
        self._tell_skipped()
        if (position.epoch + 1) % self.recipe.eval_interval == 0 or self._is_last_epoch:
            self._save(LAST)  # an evaluation may take longer than a stop may wait
            self._stop_if_asked()
            record.update(self._evaluate())
        self.progress.history.append(record)
        improved = self._note_best(record)
        position.epoch, position.update = position.epoch + 1, 0
        self.engine.meter.reset()
        # In this order: a kill between the two lets the epoch be done again, with the same best.
        if improved:
            self._save(BEST)
        self._save(LAST)
        self.logger.epoch(record, self.progress.history, self.recipe.epochs)
        if not self.finished:
            self._stop_if_asked()

    @property
    def _is_last_epoch(self) -> bool:
        return self.engine.position.epoch + 1 == self.recipe.epochs

    def _after_interval(self, record: dict[str, Any]) -> None:
        self._tell_faults()
        self._tell_skipped()
        self.logger.interval(record)

    def _after_update(self, slices: list[Batch]) -> None:
        self.logger.advance()
        self.faults.extend(fault for batch in slices for fault in batch.faults)
        update = self.engine.position.update
        if update == self.updates_per_epoch:
            return  # the epoch's own checkpoint is due after its evaluation
        if self.peers.size == 1:
            self._tell_faults()
        interval = self.recipe.checkpoint_interval
        due = interval and update % interval == 0
        asked = self.stop.poll(self.peers)
        if due or asked:
            self._save(LAST)
        if asked:
            self._stop()

    def _tell_faults(self) -> None:
        """Name images that could not be read, each once; too many of them end the run."""
        unreadable = self.progress.unreadable
        faults, self.faults = self.faults, []
        if self.peers.size == 1 and not faults:
            return
        for fault in (fault for part in self.peers.gather(faults) for fault in part):
            if fault.name in unreadable:
                continue
            unreadable.append(fault.name)
            self.logger.event(
                "unreadable",
                self._where() | fault._asdict(),
                f"data: cannot read {fault.name} ({fault.reason}); another image takes its place",
            )
        if len(unreadable) > self.recipe.max_unreadable:
            raise OSError(
                f"data: {len(unreadable)} training images cannot be read, more than max_unreadable "
                f"({self.recipe.max_unreadable}); the last is {unreadable[-1]}"
            )

    def _tell_skipped(self) -> None:
        """List the updates skipped since the last time, with the samples that they saw."""
        skipped = self.engine.skipped_updates()  # of the same updates on every process
        if not skipped:
            return
        ranks = self.peers.gather([dataclasses.asdict(update) for update in skipped])
        for number, update in enumerate(skipped):
            shares = [rank[number] for rank in ranks]
            record = {
                "update": update.update,
                "samples": [share["samples"] for share in shares],
                "finite_loss": [share["finite_loss"] for share in shares],
            }
            self.logger.event(
                "skipped",
                self._where() | record,
                f"update {update.update} was skipped: its gradient was not finite (its samples are "
                f"in log.jsonl)",
            )

    def _where(self) -> dict[str, Any]:
        position = self.engine.position
        return {"epoch": position.epoch, "update": position.total}

    def _stop_if_asked(self) -> None:
        """Stop where a checkpoint has just been written, if any process was asked to."""
        if self.stop.agree(self.peers):
            self._stop()

    def _stop(self) -> NoReturn:
        self.stopped_between_updates = True
        self._tell_stopped()
        self.stop.raise_as_exception()

    def _tell_stopped(self) -> None:
        if self.output is not None and LAST not in self.unsaved:
            self.logger.message(
                f"stopped after update {self.engine.position.total}; the same call continues from "
                f"{self.output / LAST}"
            )

    def _keep_what_is_done(self) -> None:
        """Save after an interrupt from anywhere, where this process alone can say what is done."""
        if self.stopped_between_updates or self.output is None or self.finished:
            return
        if self.peers.size > 1 or self.engine.applying:
            self.logger.message(
                f"stopped in the middle of an update: what came after {self.output / LAST} was "
                f"written is lost"
            )
            return
        self._save(LAST)
        self._tell_stopped()

    def _evaluate(self) -> dict[str, Any]:
        record: dict[str, Any] = {}
        if self.data.labelled_val:
            raw = self._measure(self.student)
            record |= {
                "top1": raw["top1"],
                "top5": raw["top5"],
                "eval_loss": raw["loss"],
                "eval_images": raw["count"],
            }
            self._stop_if_asked()
            if self.engine.ema is not None:
                ema = self._measure(self.engine.ema.module)
                record |= {
                    "ema_top1": ema["top1"],
                    "ema_top5": ema["top5"],
                    "ema_loss": ema["loss"],
                }
        if self._ranks_by_loss:
            terms = evaluate_terms(self.engine, self.eval_loader)
            record["eval_images"] = terms.pop("count")
            record |= {f"eval_{name}": value for name, value in terms.items()}
        return record

    def _measure(self, model: nn.Module) -> dict[str, Any]:
        self.peers.average_norms(model)
        return evaluate_model(model, self.eval_loader, self.peers, self.recipe.amp)

    @property
    def _ranks_by_loss(self) -> bool:
        """Whether accuracy says nothing: no labels to count by, or logits that nothing trains."""
        trains_logits = self.recipe.labels or self.engine.task.needs_logits
        return not (self.data.labelled_val and trains_logits)

    def _note_best(self, record: dict[str, Any]) -> bool:
        best = self.progress.best
        if self._ranks_by_loss:
            loss = record.get("eval_loss")
            if loss is None or not loss < best.get("loss", float("inf")):
                return False
            self.progress.best = {**best, "loss": loss, "epoch": record["epoch"] + 1}
            return True
        top1 = record.get("ema_top1" if self.recipe.best == "ema" else "top1")
        if top1 is None or top1 <= best["top1"]:
            return False
        self.progress.best = {"top1": top1, "epoch": record["epoch"] + 1}
        return True

    def _save(self, name: str) -> None:
        """Write a checkpoint; called on all processes, refused once something was not finite.

        Where it cannot be written the run goes on and says so: the next one may be.
        """
        if self.output is None:
            return
        sums = self.engine.read().sums
        if not self.peers.is_main:
            return
        parts = (self.student, self.engine, self.identity, self.progress)
        try:
            if name == BEST:
                save_checkpoint(student_state(*parts), self.output / name)
            else:
                state = run_state(*parts, list(sums.values()))
                save_checkpoint(state, self.output / name, self.recipe.keep_checkpoints)
            self.unsaved.pop(name, None)
        except OSError as error:
            self.unsaved[name] = error
            self.logger.event("unsaved", self._where() | {"file": name}, str(error))

    def _result(self) -> Result:
        last = self.progress.history[-1]
        best = self.progress.best
        return Result(
            top1=last.get("top1"),
            top5=last.get("top5"),
            ema_top1=last.get("ema_top1"),
            ema_top5=last.get("ema_top5"),
            eval_loss=last["eval_loss"],
            best_top1=None if self._ranks_by_loss else best["top1"],
            best_epoch=best["epoch"],
            best_rule=self._best_rule(),
            epochs=self.recipe.epochs,
            images=last["eval_images"],
            parameters=parameter_count(self.student),
            output=None if self.output is None else str(self.output),
            last=None if self.output is None else str(self.output / LAST),
            best=self._best_checkpoint(),
            history=self.progress.history,
        )

    def _best_rule(self) -> str:
        if self._ranks_by_loss:
            measure = "lowest loss of the raw weights"
        else:
            weights = "EMA" if self.recipe.best == "ema" else "raw"
            measure = f"highest top-1 of the {weights} weights"
        return f"{measure} on the evaluation set itself, earliest of equals"

    def _best_checkpoint(self) -> str | None:
        path = None if self.output is None else self.output / BEST
        return str(path) if path is not None and is_best(path, self.progress.best) else None


def _schedule(loader: Any) -> Schedule:
    """What knows an epoch's length and where the next iteration starts."""
    streams = isinstance(loader.dataset, IterableDataset)
    return loader.dataset if streams else loader.batch_sampler
