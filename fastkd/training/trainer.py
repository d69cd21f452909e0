"""`train`: the whole of a run, from a recipe to a result.

Puts the parts together and decides when to evaluate, log and save; every part does its own work
elsewhere.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NoReturn

import torch
from timm.utils import ModelEmaV3
from torch import nn

from fastkd.models import Teacher
from fastkd.models.weights import short_misfit
from fastkd.training.atomic import remove_leftovers
from fastkd.training.augment import create_mixup
from fastkd.training.checkpoint import (
    BEST,
    LAST,
    CheckpointError,
    load_checkpoint,
    move_best,
    save_checkpoint,
)
from fastkd.training.data import eval_loader, train_loader
from fastkd.training.datasets import Data, DataPair, open_data
from fastkd.training.distributed import World, world
from fastkd.training.engine import Engine, evaluate_model, train_one_epoch
from fastkd.training.interrupt import StopRequest
from fastkd.training.logger import RunLogger
from fastkd.training.options import (
    FromRecipe,
    chosen_teacher,
    refuse_image_options,
    resolve_recipe,
)
from fastkd.training.recipe import Recipe
from fastkd.training.result import RESULT, Result
from fastkd.training.seeding import derive_seed, preserved_rng, rng_state, seed_all, set_rng_state
from fastkd.training.setup import (
    build_optimizer,
    build_student,
    class_count,
    effective_values,
    find_checkpoint,
    input_spec,
    parameter_count,
    resolve_teacher,
    student_shape,
)
from fastkd.training.task import build_task

RECIPE = "recipe.yaml"


def train(
    student: str | nn.Module | None = None,
    teacher: str | Path | nn.Module | FromRecipe | None = FromRecipe.TEACHER,
    data: Data | None = None,
    output: str | Path | None = None,
    recipe: str | Path | Recipe | None = None,
    *,
    resume: str = "auto",
    device: str | torch.device | None = None,
    quiet: bool = False,
    **overrides: Any,
) -> Result:
    """Train a student, by a teacher or without one.

    Under torchrun every process calls it and the batch is shared; the global generators of random
    numbers are left as they were.

    Args:
        student: a timm name (its variant comes from the recipe), a module, which is trained in
            place, or None for the recipe's model.
        teacher: a timm name (pretrained, or with ``teacher_checkpoint=``), a folder or checkpoint
            of a fastkd run, or a module. Left out, it is the recipe's. None trains on the labels
            alone: the matched run without distillation, whatever the recipe's terms.
        data: a folder with ``train`` and ``val`` (or ``validation``), a timm data set name with its
            scheme, or (train, val) map-style data sets of (PIL image or float tensor, label). None
            takes the recipe's.
        output: the run's folder, made if needed: recipe.yaml, log.jsonl, epochs.csv, last.pth,
            best.pth, result.json. None writes nothing, and then nothing can be resumed.
        recipe: a shipped name (`Recipe.names`), a YAML file, a run's folder, or a `Recipe`; None
            starts from the defaults.
        resume: ``"auto"`` continues the run in ``output`` if there is one (a finished one is not
            trained again), ``"never"`` starts afresh, a path continues from that checkpoint.
        device: ``"cpu"``, ``"cuda"``, ``"cuda:1"``; None takes CUDA where there is a device.
        quiet: show nothing.
        **overrides: recipe fields by name; unknown ones, and those that could have no effect, are
            errors.

    Returns:
        What was measured, and where the files are.

    Raises:
        ValueError: options or data that do not fit, or a checkpoint of another run.
        TypeError: a field of the wrong type.
        NonFiniteError: the loss became infinite or NaN.
        KeyboardInterrupt: stopped by SIGINT, after writing a checkpoint.
        SystemExit: stopped by SIGTERM, after writing a checkpoint.
    """
    loaded = Recipe.load(recipe)
    resolved = resolve_recipe(loaded, student, teacher, data, overrides)
    guide = chosen_teacher(loaded, teacher)
    source = resolved.data if data is None else data
    if source is None:
        raise ValueError("train: data is missing: a folder, a timm data set name or two data sets")
    folder = None if output is None else Path(output)
    with preserved_rng(), world(device) as peers:
        opened = open_data(source, resolved.data_root)
        if opened.yields_tensors:
            refuse_image_options(overrides)
        run = _Run(student, guide, opened, folder, resolved, peers, quiet)
        return run.execute(resume)


class _Run:
    """One run: its parts, its position and its files."""

    def __init__(
        self,
        student: str | nn.Module | None,
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
        self.shape = shape = student_shape(recipe, data)
        seed_all(derive_seed("model", recipe.seed))
        if not isinstance(student, nn.Module):
            student = build_student(recipe, shape)
        self.num_classes = class_count(student, shape)
        self.student = student.to(peers.device)
        peers.share(self.student)  # before anything is copied from it, the EMA for one
        self.spec = input_spec(student, recipe, self.data)
        self.train_loader, self.eval_loader = self._loaders(self.data)
        self.sampler = self.train_loader.batch_sampler
        self.engine = self._build_engine(resolve_teacher(teacher, recipe, self.spec))
        self.history: list[dict[str, Any]] = []
        self.best: dict[str, Any] = {"top1": -1.0, "epoch": 0}
        self.stop = StopRequest()
        self.agreed_to_stop = False
        self.logger = RunLogger(
            output, recipe.epochs * self.updates_per_epoch, quiet=quiet, enabled=peers.is_main
        )

    def _loaders(self, data: DataPair) -> tuple[Any, Any]:
        context = (data, self.recipe, self.spec, self.peers.device, self.peers.rank)
        return train_loader(*context, self.peers.size), eval_loader(*context, self.peers.size)

    def _build_engine(self, teacher: Teacher | None) -> Engine:
        recipe, device = self.recipe, self.peers.device
        mixup = None
        if recipe.mixes:
            if self.num_classes is None:
                raise ValueError("num_classes: Mixup needs the number of classes, nobody says it")
            mixup = create_mixup(recipe, self.num_classes)
        # Before taps look at the student, so that the copy is of the bare model.
        ema = None if recipe.ema_decay is None else self._build_ema(recipe.ema_decay)
        if teacher is not None:
            teacher = teacher.to(device)
        example = torch.zeros(1, *self.spec.size, device=device)
        task = build_task(self.student, teacher, recipe, example)
        optimizer, scheduler = build_optimizer(task, recipe, self.updates_per_epoch)
        return Engine(
            task,
            teacher if task.needs_logits or task.needs_tokens else None,
            optimizer,
            scheduler,
            ema=ema,
            mixup=mixup,
            world=self.peers,
            amp=recipe.amp,
            clip_grad=recipe.clip_grad,
            ema_warmup=recipe.ema_warmup,
            seed=recipe.seed,
        )

    def _build_ema(self, decay: float) -> ModelEmaV3:
        return ModelEmaV3(self.student, decay=decay, use_warmup=self.recipe.ema_warmup)

    @property
    def updates_per_epoch(self) -> int:
        """Length of an epoch."""
        return self.sampler.updates_per_epoch

    @property
    def finished(self) -> bool:
        """Whether the last epoch is done."""
        return self.engine.position.epoch >= self.recipe.epochs

    def execute(self, resume: str) -> Result:
        """Continue or begin, run to the end, and say what came of it."""
        checkpoint = find_checkpoint(self.output, resume)
        if checkpoint is not None:
            self._restore(checkpoint)
        self._mend_output(checkpoint)
        if not self.finished:
            self._prepare_output()
            with self.stop:
                self._run_epochs(resumed=checkpoint is not None)
        self.peers.barrier()  # the files that the result names are written
        result = self._result()
        if self.output is not None and self.peers.is_main:
            result.save(self.output / RESULT)
        self.peers.barrier()
        return result

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
            self.logger.mend(self.engine.position.total, self.history)
            move_best(checkpoint, self.output, self.best)
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
            self._save_after_interrupt()
            raise
        except RuntimeError:
            # The signal that asked to stop may have reached the loader's workers too.
            if self.stop.received is None:
                raise
            self._save_after_interrupt()
            self._raise_stop()
        finally:
            self.logger.close()

    def _announce(self, resumed: bool) -> None:
        values = effective_values(self.recipe, self.student, self.data, self.peers.size)
        for heading, text in values.items():
            self.logger.message(f"{heading}: {text}")
        if resumed:
            position = self.engine.position
            self.logger.message(
                f"resumed after update {position.total}, in epoch {position.epoch + 1}"
            )

    def _run_epoch(self) -> None:
        position = self.engine.position
        self.sampler.set_position(position.epoch, position.update)
        record = train_one_epoch(
            self.engine,
            self.train_loader,
            self.recipe.accumulation,
            log_interval=self.recipe.log_interval,
            on_interval=self.logger.interval,
            after_update=self._after_update,
        )
        if (position.epoch + 1) % self.recipe.eval_interval == 0 or self._is_last_epoch:
            record.update(self._evaluate())
        self.history.append(record)
        improved = self._note_best(record)
        position.epoch, position.update = position.epoch + 1, 0
        self.engine.meter.reset()
        # In this order: a kill between the two lets the epoch be done again, with the same best.
        if improved:
            self._save(BEST)
        self._save(LAST)
        self.logger.epoch(record, self.history, self.recipe.epochs)
        if not self.finished and self._stop_requested():
            self._raise_stop()

    @property
    def _is_last_epoch(self) -> bool:
        return self.engine.position.epoch + 1 == self.recipe.epochs

    def _after_update(self) -> None:
        self.logger.advance()
        update = self.engine.position.update
        if update == self.updates_per_epoch:
            return  # the epoch's own checkpoint is due after its evaluation
        # Processes agree by a synchronisation, which is not worth one per update.
        may_ask = self.peers.size == 1 or update % self.recipe.log_interval == 0
        if may_ask and self._stop_requested():
            self._raise_stop()
        interval = self.recipe.checkpoint_interval
        if interval and update % interval == 0:
            self._save(LAST)

    def _stop_requested(self) -> bool:
        return self.peers.any(self.stop.received is not None)

    def _raise_stop(self) -> NoReturn:
        self.agreed_to_stop = True
        self.stop.raise_as_exception()

    def _save_after_interrupt(self) -> None:
        """Keep what is done, if all processes stand between the same two updates."""
        alone = self.peers.size == 1 and not self.engine.applying
        if self.output is None or self.finished or not (self.agreed_to_stop or alone):
            return
        self._save(LAST)
        self.logger.message(
            f"stopped after update {self.engine.position.total}; the same call continues from "
            f"{self.output / LAST}"
        )

    def _evaluate(self) -> dict[str, Any]:
        raw = self._measure(self.student)
        record = {"top1": raw["top1"], "top5": raw["top5"], "eval_loss": raw["loss"]}
        if self.engine.ema is not None:
            ema = self._measure(self.engine.ema.module)
            record |= {"ema_top1": ema["top1"], "ema_top5": ema["top5"], "ema_loss": ema["loss"]}
        return record

    def _measure(self, model: nn.Module) -> dict[str, Any]:
        self.peers.average_norms(model)
        return evaluate_model(model, self.eval_loader, self.peers, self.recipe.amp)

    def _note_best(self, record: dict[str, Any]) -> bool:
        top1 = record.get("ema_top1" if self.recipe.best == "ema" else "top1")
        if top1 is None or top1 <= self.best["top1"]:
            return False
        self.best = {"top1": top1, "epoch": record["epoch"] + 1}
        return True

    def _save(self, name: str) -> None:
        """Write a checkpoint; called on all processes, refused once something was not finite."""
        if self.output is None:
            return
        sums = self.engine.read_meter()
        if self.peers.is_main:
            state = self._student_state() if name == BEST else self._state(list(sums.values()))
            save_checkpoint(state, self.output / name)

    def _student_state(self) -> dict[str, Any]:
        """What rebuilds the student, and where its weights come from."""
        ema, position = self.engine.ema, self.engine.position
        return {
            "student": self.student.state_dict(),
            "ema": None if ema is None else ema.module.state_dict(),
            "recipe": self.recipe.to_dict(),
            "num_classes": self.num_classes,
            "img_size": self.shape.img_size,
            "input": {"size": self.spec.size, "mean": self.spec.mean, "std": self.spec.std},
            "position": vars(position).copy(),
            "best": self.best,
            "measured": self._last_measurement(),
        }

    def _last_measurement(self) -> dict[str, float]:
        """Top-1 of the raw and EMA weights when they were evaluated last; empty before."""
        evaluated = [record for record in self.history if "top1" in record]
        last = evaluated[-1] if evaluated else {}
        return {name: last[name] for name in ("top1", "ema_top1") if name in last}

    def _state(self, sums: list[float]) -> dict[str, Any]:
        engine = self.engine
        return self._student_state() | {
            "terms": engine.task.terms.state_dict(),
            "optimizer": engine.optimizer.state_dict(),
            "scheduler": engine.scheduler.state_dict(),
            "scaler": engine.scaler.state_dict(),
            # Updates seed themselves; this is for what a user's modules draw outside of them.
            "rng": rng_state(self.peers.device),
            "train_images": len(self.data.train),
            "meter": {**engine.meter.state_dict(), "sums": torch.tensor(sums, dtype=torch.float64)},
            "history": self.history,
        }

    def _restore(self, path: Path) -> None:
        state = load_checkpoint(path)
        self._check_same_run(path, state)
        engine = self.engine
        try:
            self.student.load_state_dict(state["student"])
            engine.task.terms.load_state_dict(state["terms"])
            engine.optimizer.load_state_dict(state["optimizer"])
            if engine.ema is not None:
                engine.ema.module.load_state_dict(state["ema"])
        except (RuntimeError, ValueError) as error:
            raise CheckpointError(
                f"resume: {path} does not fit this student: {short_misfit(error)}"
            ) from error
        engine.scheduler.load_state_dict(state["scheduler"])
        engine.scaler.load_state_dict(state["scaler"])
        engine.meter.load_state_dict(state["meter"])
        for name, value in state["position"].items():
            setattr(engine.position, name, value)
        self.history, self.best = state["history"], state["best"]
        set_rng_state(state["rng"], self.peers.device)

    def _check_same_run(self, path: Path, state: dict[str, Any]) -> None:
        if "optimizer" not in state:
            raise CheckpointError(
                f"resume: {path} holds a student alone, no run to continue (take {LAST})"
            )
        if state["train_images"] != len(self.data.train):
            raise CheckpointError(
                f"resume: {path} is of a run on {state['train_images']} training images, these "
                f"data have {len(self.data.train)}: its position has no meaning in them"
            )
        differences = Recipe.from_dict(state["recipe"]).differences(self.recipe)
        if differences:
            fields = ", ".join(f"{n} {a!r} -> {b!r}" for n, (a, b) in differences.items())
            raise CheckpointError(
                f"resume: {path} is of a run with another recipe ({fields}); choose another "
                f"output, or resume='never' to start afresh and overwrite it"
            )

    def _result(self) -> Result:
        last = self.history[-1]
        weights = "EMA" if self.recipe.best == "ema" else "raw"
        return Result(
            top1=last["top1"],
            top5=last["top5"],
            ema_top1=last.get("ema_top1"),
            ema_top5=last.get("ema_top5"),
            best_top1=self.best["top1"],
            best_epoch=self.best["epoch"],
            best_rule=f"highest top-1 of the {weights} weights on the evaluation set itself, "
            f"earliest of equals",
            epochs=self.recipe.epochs,
            images=len(self.data.val),
            parameters=parameter_count(self.student),
            output=None if self.output is None else str(self.output),
            last=self._written(LAST),
            best=self._written(BEST),
            history=self.history,
        )

    def _written(self, name: str) -> str | None:
        path = None if self.output is None else self.output / name
        return str(path) if path is not None and path.exists() else None
