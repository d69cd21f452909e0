"""`train`: a run from a recipe to a result."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

from fastkd.checkpoint import BEST, LAST, is_best
from fastkd.config import Recipe
from fastkd.data.loader import DEATHS, describe_worker_death, schedule_of
from fastkd.data.open_data import Data
from fastkd.inference.evaluate import evaluate_model
from fastkd.inference.preprocessing import parameter_count
from fastkd.models.weights import verifying
from fastkd.training.build import (
    FromRecipe,
    Given,
    Parts,
    build_engine,
    identify,
    open_parts,
    resolve_run,
    resolve_teacher,
)
from fastkd.training.dry_run import cost_lines, effective_values
from fastkd.training.logging import LOG, PLOT, RESULT, Result, RunLogger, result_of, timestamp
from fastkd.training.plots import plot_run
from fastkd.training.probe import check_pass
from fastkd.training.state import RunState, locked
from fastkd.training.updates import SKIPPED, NonFiniteError, Reading, evaluate_terms
from fastkd.utils.distributed import StopRequest, World, world
from fastkd.utils.random import preserved_rng

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
    verify: bool = True,
    **overrides: Any,
) -> Result:
    """Train a student, by a teacher or without one; under torchrun every process calls it.

    Args:
        student: a timm name, which starts from random weights; a source with weights to start from
            (a run, a checkpoint, an export, ``local-dir:``, ``hf_hub:``); a module, which is
            trained in place; or None for the recipe's model.
        teacher: any source that `fastkd.create_teacher` takes. Left out, it is the recipe's. None
            trains on the labels alone, the matched run without distillation.
        data: a folder with ``train`` and ``val`` (or ``validation``), a timm data set name with its
            scheme, or (train, val) map-style data sets of (PIL image or float tensor, label). None
            takes the recipe's.
        output: the run's folder, made if needed; None writes nothing.
        recipe: a shipped name (`Recipe.names`), a YAML file, a run's folder, or a `Recipe`; None
            starts from the defaults.
        resume: ``"auto"`` continues the run in ``output`` if there is one, ``"never"`` starts
            afresh, a path continues from that checkpoint.
        device: ``"cpu"``, ``"cuda"``, ``"cuda:1"``; None takes CUDA where there is a device.
        quiet: show nothing.
        verify: refuse weights whose checksum is wrong or missing.
        **overrides: recipe fields by name. Those that would have no effect are errors or warnings.

    Returns:
        What was measured, and where the files are.

    Raises:
        ValueError: options or data that do not fit, or a checkpoint of another run.
        RuntimeError: another run is writing into ``output``.
        TypeError: a field of the wrong type.
        NonFiniteError: weights or too many gradients in a row are infinite or NaN.
        OSError: too many images cannot be read, or the last checkpoint cannot be written.
        KeyboardInterrupt: stopped by SIGINT, after writing a checkpoint.
        SystemExit: stopped by SIGTERM or SIGUSR1, after writing a checkpoint.
    """
    with verifying(verify):
        given = resolve_run(student, teacher, data, output, recipe, resume, overrides)
    with preserved_rng(), world(device) as peers:
        run, parts = open_run(given, peers, verify, overrides)
        config, schedule = given.recipe, schedule_of(parts.batches)
        with locked(given.output, peers) as run.lock:
            with running(run, parts, resume, quiet) as (logger, stop):
                for epoch in range(run.engine.position.epoch + 1, config.epochs + 1):
                    schedule.set_position(epoch - 1, run.engine.position.update)
                    record = train_one_epoch(run, parts.batches, logger, stop)
                    if epoch % config.eval_interval == 0 or epoch == config.epochs:
                        save(run, logger)  # an evaluation may take longer than a stop may wait
                        record |= evaluate(run, parts, logger, stop)
                    if run.finish_epoch(record):
                        save(run, logger, BEST)
                    # Last: a kill before it lets the epoch be done again, with the same best.
                    save(run, logger, LAST)
                    logger.epoch(record, run.history)
                    if epoch < config.epochs:
                        stop.raise_if_asked(peers)
            return _finish(run, logger)


def open_run(
    given: Given, peers: World, verify: bool, overrides: dict[str, Any]
) -> tuple[RunState, Parts]:
    """Open data, student and teacher, and try them out before the output is touched."""
    with verifying(verify):
        parts = open_parts(given, peers, overrides, resolve_teacher)
    recipe, updates = given.recipe, schedule_of(parts.batches).updates_per_epoch
    engine = build_engine(parts.student, parts.teacher, recipe, peers, updates)
    check_pass(engine, recipe, parts.batches, parts.data)
    ranked_by = "ema_top1" if recipe.best == "ema" else "top1"
    if not (parts.data.labeled_val and (recipe.labels or engine.task.needs_logits)):
        ranked_by = "eval_loss"
    identity = identify(parts, recipe, peers, updates)
    return RunState(engine, identity, given.output, ranked_by), parts


def train_one_epoch(
    run: RunState, batches: DataLoader[Any], logger: RunLogger, stop: StopRequest
) -> dict[str, Any]:
    """Run the updates that are left of an epoch; returns the epoch's means and speed."""
    engine, recipe, peers = run.engine, run.identity.recipe, run.engine.world
    engine.task.train()
    # A host-side check costs nothing where the host computes, and stops at the very update.
    check_always = peers.device.type == "cpu" and peers.size == 1
    meter, last = engine.meter, logger.updates_per_epoch
    trained = engine.position.update == last  # and stopped in the evaluation
    _log_interval_if_due(run, logger)  # an interrupt may have come between an update and its line
    for slices in meter.timed(() if trained else batches, recipe.accumulation):
        engine.update(slices)
        update, total = engine.position.update, engine.position.total
        logger.advance([fault for batch in slices for fault in batch.faults], total)
        if check_always:
            engine.read()
        _log_interval_if_due(run, logger)
        if update == last:
            continue  # the epoch's own checkpoint is due after its evaluation
        if logger.has_faults and peers.size == 1:
            report(run, logger)
        asked = stop.poll(peers)
        if asked or (recipe.checkpoint_interval and update % recipe.checkpoint_interval == 0):
            save(run, logger)
        if asked:
            stop.raise_as_exception()
    report(run, logger)
    record = _record(run, engine.read(), None)
    if record["skipped_updates"] == meter.count > 1 and recipe.amp != "fp16":
        raise engine.non_finite(f"every update was skipped, {SKIPPED}")
    return record


def _log_interval_if_due(run: RunState, logger: RunLogger) -> None:
    meter, update = run.engine.meter, run.engine.position.update
    logged = 0 if meter.interval is None else meter.interval.applied + meter.interval.skipped
    if update % run.identity.recipe.log_interval == 0 and update > logged:
        report(run, logger)
        reading = run.engine.read()
        logger.interval(_record(run, reading, meter.interval))
        meter.interval = reading


def _record(run: RunState, reading: Reading, since: Reading | None) -> dict[str, Any]:
    engine, device = run.engine, run.engine.world.device
    record = run.where() | {"lr": engine.meter.lr} | reading.record(since, engine.world.size)
    if device.type == "cuda":  # the most that tensors have held, in GiB
        record["gpu_memory"] = torch.cuda.max_memory_allocated(device) / 2**30
    return record | {"time": timestamp()}


def evaluate(run: RunState, parts: Parts, logger: RunLogger, stop: StopRequest) -> dict[str, Any]:
    """Measure the raw and the averaged weights, and every term where accuracy does not rank."""
    engine, peers, amp = run.engine, run.engine.world, run.identity.recipe.amp
    batches = parts.eval_batches
    stop.raise_if_asked(peers)
    record: dict[str, Any] = {}
    lost = {"eval_unreadable": 0, "eval_nonfinite": 0, "ema_nonfinite": 0}
    lines: list[str] = []
    began = time.perf_counter()
    if parts.data.labeled_val:
        peers.average_norms(run.student)
        raw = evaluate_model(run.student, batches, peers, amp, lines.append)
        record = {name: raw[name] for name in ("top1", "top5")}
        record |= {"eval_loss": raw["loss"], "eval_images": raw["count"]}
        lost |= {f"eval_{name}": raw[name] for name in ("unreadable", "nonfinite")}
        stop.raise_if_asked(peers)
        if engine.ema is not None:
            peers.average_norms(engine.ema.module)
            averaged: list[str] = []
            ema = evaluate_model(engine.ema.module, batches, peers, amp, averaged.append)
            record |= {f"ema_{name}": ema[name] for name in ("top1", "top5", "loss")}
            lost["ema_nonfinite"] = ema["nonfinite"]
            lines += [f"EMA: {line}" for line in averaged if line not in lines]
    if run.ranked_by == "eval_loss":
        terms = evaluate_terms(engine, batches, lines.append)
        record["eval_images"], lost["eval_unreadable"] = terms.pop("count"), terms.pop("unreadable")
        record |= {f"eval_{name}": value for name, value in terms.items()}
    for line in dict.fromkeys(lines):
        logger.event("evaluation", run.where() | {"reason": line}, f"evaluation: {line}")
    record |= {name: count for name, count in lost.items() if count}
    return record | {"eval_seconds": time.perf_counter() - began}


def report(run: RunState, logger: RunLogger) -> None:
    logger.report(run.engine.skipped_updates())
    run.engine.forget_skipped()


def save(run: RunState, logger: RunLogger, name: str = LAST) -> None:
    """Write a checkpoint, and the log's lines of everything that it holds."""
    _remake_output(run, logger)
    report(run, logger)
    error = run.save(name)
    if error is not None:
        logger.event("unsaved", run.where() | {"file": name}, str(error))


def _remake_output(run: RunState, logger: RunLogger) -> None:
    """Take a deleted lock again, and make a deleted output again with what is still known."""
    lock, output = run.lock, run.output
    if lock is None or output is None or lock.is_held():
        return
    try:
        lock.release()
        lock.acquire()
        if (output / RECIPE).exists():
            return logger.message(f"the lock of {output} was removed and is taken again")
        run.identity.recipe.save(output / RECIPE)
        logger.reopen(run.engine.position.total, run.history)
    except OSError as error:
        return logger.message(f"{output} was deleted and cannot be made again ({error})")
    text = f"{output} was deleted and is made again, without {BEST} and most of {LOG}"
    logger.event("remade", run.where(), text)


@contextmanager
def running(
    run: RunState, parts: Parts, resume: str, quiet: bool
) -> Iterator[tuple[RunLogger, StopRequest]]:
    """Resume a run, and log it; at an interrupt save what is done, and explain what went wrong."""
    stop = StopRequest()
    recipe, peers, output = run.identity.recipe, run.engine.world, run.output
    options: dict[str, Any] = {"peers": peers, "unreadable": run.unreadable, "quiet": quiet}
    logger = RunLogger(output, recipe, run.identity.updates_per_epoch, **options)
    checkpoint = run.resume(resume)
    logger.mend(run.engine.position.total, run.history, foreign=not run.is_in_output(checkpoint))
    peers.barrier()  # the folder is there
    elsewhere = output is not None and checkpoint != output / LAST
    if output is not None and peers.is_main and (elsewhere or not run.finished):
        recipe.save(output / RECIPE)
    if run.lock is not None and run.lock.note:
        logger.message(run.lock.note)
    if run.finished:
        if elsewhere:
            save(run, logger)
        yield logger, stop
        return
    logger.start(run.engine.position.total)
    try:
        with stop:
            try:
                values: dict[str, str] = {}
                if logger.shows:
                    spec, teacher = run.identity.spec, parts.teacher
                    values = effective_values(recipe, run.student, parts.data, peers.size)
                    values |= cost_lines(recipe, run.student, teacher, spec, peers.size)
                logger.announce(values, run.where(), run.torn)
                yield logger, stop
            except (KeyboardInterrupt, SystemExit):
                _save_before_stop(run, logger)
                raise
            except NonFiniteError as error:
                report(run, logger)
                raise NonFiniteError(f"{error}. {run.kept()}") from error
            except DEATHS as error:
                # The signal that asked to stop may have ended loader processes, too.
                if stop.received is not None:
                    _save_before_stop(run, logger)
                    stop.raise_as_exception()
                death = describe_worker_death((parts.batches, parts.eval_batches), error)
                if death is None:
                    raise
                raise RuntimeError(death) from error
    finally:
        logger.close()


def _save_before_stop(run: RunState, logger: RunLogger) -> None:
    """Save after an interrupt, unless other processes or half an update are involved."""
    if run.output is None or run.finished:
        return
    last, total = run.output / LAST, run.engine.position.total
    if not run.is_saved and run.engine.world.size == 1 and not run.engine.changing:
        try:
            save(run, logger)
        except NonFiniteError as error:
            return logger.message(f"stopped: {error}. {run.kept()}")
    if run.is_saved:
        return logger.message(f"stopped after update {total}; the same call continues from {last}")
    reason = "" if LAST in run.unsaved else " in the middle of an update"
    kept = f"what came after {last} was written is lost" if last.exists() else "nothing was saved"
    logger.message(f"stopped{reason}: {kept}")


def _finish(run: RunState, logger: RunLogger) -> Result:
    output, peers, recipe = run.output, run.engine.world, run.identity.recipe
    unsaved = peers.gather(str(run.unsaved.get(LAST, "")))[0]  # the main process writes
    if unsaved:
        raise OSError(unsaved)
    files = {} if output is None else {"output": str(output), "last": str(output / LAST)}
    if output is not None and is_best(output / BEST, run.best):
        files["best"] = str(output / BEST)
    sizes = {"epochs": recipe.epochs, "parameters": parameter_count(run.student)}
    result = result_of(run.history, run.best, run.ranked_by, **sizes, **files)
    if output is not None and peers.is_main:
        result.save(output / RESULT)
        if not (output / PLOT).exists():
            plot_run(output, logger.message)
    peers.barrier()
    return result
