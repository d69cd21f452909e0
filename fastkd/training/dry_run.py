"""Check a run without training, and describe its schedule, parameters and FLOPs."""

from __future__ import annotations

import copy
import itertools
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from fastkd.config import MODULE_PREFIX, OptimConfig, Recipe, TeacherConfig
from fastkd.data.datasets import DataPair
from fastkd.data.samplers import TrainBatchSampler, slice_size
from fastkd.data.transforms import InputSpec
from fastkd.inference.create_teacher import create_teacher
from fastkd.inference.open_model import names_a_file
from fastkd.inference.preprocessing import num_classes_of, parameter_count
from fastkd.losses.registry import find_loss, has_temperature
from fastkd.models import Teacher
from fastkd.models.hub_download import is_hub_name
from fastkd.training import probe
from fastkd.training.build import FromRecipe, Given, open_parts, resolve_run, resolve_teacher
from fastkd.training.optim import ends_at_min_lr, skips_on_device
from fastkd.training.task import build_task
from fastkd.utils.distributed import ALONE, autocast, check_device, process_count
from fastkd.utils.random import preserved_rng

Module = TypeVar("Module", bound=nn.Module)


class _Missing:
    """What a failed step of a dry run returns: false, and so is every attribute."""

    def __getattr__(self, name: str) -> _Missing:
        return self

    def __bool__(self) -> bool:
        return False


MISSING = _Missing()


class _Problems(list[str]):
    """All that a run would be refused for."""

    def attempt(self, step: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        """Take a step of opening a run unless one before it failed that it needs."""
        if any(argument is MISSING for argument in arguments):
            return MISSING
        try:
            return step(*arguments, **options)
        except Exception as error:
            self += str(error).splitlines() or [type(error).__name__]
        return MISSING

    def resolve(self, recipe: Any, teacher: Any, output: Any, resume: str, asked: Any) -> Given:
        """Resolve a run with those overrides that are no problem."""
        while True:
            known = len(self)
            arguments = (None, teacher, None, output, recipe, resume, asked, self.attempt)
            given = self.attempt(resolve_run, *arguments)
            if given:
                return given
            named = {re.split("[:=]", line)[0] for line in self[known:]} & asked.keys()
            if not named:
                raise self.error()
            asked = {name: value for name, value in asked.items() if name not in named}

    def error(self) -> ValueError:
        return ValueError("; ".join(dict.fromkeys(self)))


def dry_run(
    recipe: str | Path | Recipe | None,
    teacher: str | FromRecipe | None,
    overrides: dict[str, Any],
    *,
    output: str | Path | None = None,
    resume: str = "auto",
    device: str | None = None,
) -> tuple[Recipe, dict[str, str]]:
    """Resolve and describe a run, or raise all that it would be refused for.

    Loads no published weights, uses no device and writes nothing.
    """
    problems = _Problems()
    attempt = problems.attempt
    if resume not in ("auto", "never") and not Path(resume).exists():
        problems.append(f"resume: there is no checkpoint {resume!r}")
    chosen, world_size = attempt(check_device, device), attempt(process_count)
    given = problems.resolve(recipe, teacher, output, resume, overrides)
    config, has_data = given.recipe, given.data is not None
    given = given._replace(data=given.data if has_data else MISSING)
    with preserved_rng():
        data, student, guide, *_ = open_parts(given, ALONE, overrides, sketch_teacher, attempt)
    module, spec = student.module, student.spec
    values = attempt(effective_values, config, module, data if has_data else None, world_size)
    costs = attempt(cost_lines, config, module, guide or None, spec, world_size)
    if problems:
        raise problems.error()
    named = config.teacher is not None and not names_a_file("train", config.teacher)
    unchecked = {
        "data (none are given)": not has_data,
        "published weights": named or is_hub_name(config.model or ""),
        f"{device} (not on this machine)": chosen.type == "cuda" and not torch.cuda.is_available(),
    }
    values |= costs
    if left := [what for what, is_left in unchecked.items() if is_left]:
        values["not checked"] = ", ".join(left)
    return config, values


def effective_values(
    recipe: Recipe, student: nn.Module, data: DataPair | None, world_size: int = 1
) -> dict[str, str]:
    """Describe what a recipe amounts to on these data and processes."""
    share, copies = slice_size(recipe, world_size), ""
    batch, accumulation = f"{recipe.batch_size} images", recipe.accumulation
    if share < recipe.batch_size:
        batch += f" = {share} x {world_size} (processes) x {accumulation} (accumulation)"
    is_module = (recipe.model or "").startswith(MODULE_PREFIX)
    values = {
        "student": type(student).__name__ if is_module else f"{recipe.model} ({recipe.variant})",
        "teacher": recipe.teacher or "none (no distillation)",
        "loss": _terms_text(recipe),
        "batch size": batch,
        "optimizer": recipe.opt + _in_brackets(recipe.opt_kwargs or {}),
        "learning rate": _schedule_text(recipe),
    }
    if not skips_on_device(recipe.opt):
        values["optimizer"] += "; the host waits at every update for its gradient norm"
    if data is not None:
        logits, known = num_classes_of(student) or recipe.num_classes, data.num_classes
        if None not in (logits, known) and logits != known:
            values["classes"] = f"{logits} logits for data of {known} classes"
        samples = recipe.train_samples or len(data.train) if data.streams else len(data.train)
        sampler = TrainBatchSampler(
            samples, share, accumulation=accumulation, world_size=world_size
        )
        updates = sampler.updates_per_epoch
        if recipe.repeated_aug > 1:
            copies = f" ({recipe.repeated_aug} copies of each image)"
        values["training set"] = f"{samples:,} images"
        if not data.streams:
            values["evaluation set"] = f"{len(data.val):,} images"
        values["epoch"] = f"{updates:,} updates, {updates * recipe.batch_size:,} samples{copies}"
        values["run"] = f"{recipe.epochs} epochs, {recipe.epochs * updates:,} updates"
    return values


@dataclass(frozen=True)
class Cost:
    """Parameters of a run's models, and FLOPs per image by `torch.utils.flop_counter`."""

    student_parameters: int  # without projectors
    dropped_parameters: int  # of the terms' projectors, which inference does not need
    teacher_parameters: int  # 0 without a teacher
    student_flops: int  # forward pass at inference
    teacher_flops: int  # forward pass; 0 if the terms do not need it
    step_flops: int  # teacher's and student's forward pass, terms and backward pass


def estimate(
    student: nn.Module, teacher: Teacher | None, recipe: Recipe, spec: InputSpec, batch: int
) -> Cost:
    """Count a run's parameters and FLOPs from shapes alone, on copies of models on any device."""
    shapes = FakeTensorMode(allow_non_fake_inputs=True)
    with shapes:
        student = _outlined(student)
        guide = None if teacher is None else _outlined(teacher)
        images = torch.empty(batch, *spec.size)
        # Before the task taps the student, whose inference has no terms.
        with (
            probe.naming(probe.student_words(recipe, spec.size)),
            torch.no_grad(),
            _counting() as counter,
        ):
            student.eval()(images[:1])
        student_flops = counter.get_total_flops()
    # Outside the fake mode, because initializing projectors reads values.
    task = build_task(student, guide, recipe, images[:1]).train()
    needed = guide if task.needs_logits or task.needs_tokens else None
    classes = getattr(task.student, "num_classes", None) or recipe.num_classes
    with shapes:
        task.terms = _outlined(task.terms)
        target = torch.zeros(batch, dtype=torch.long)
        if recipe.mixes and classes:
            target = torch.zeros(batch, classes)
        with _counting() as counter:
            with autocast(images.device, recipe.amp):
                with probe.naming(probe.teacher_words(recipe)):
                    output = None if needed is None else needed(images)
                teacher_flops = counter.get_total_flops()
                with probe.naming(probe.terms_words(recipe)):
                    losses = task(images, target, output)
            losses["loss"].backward()
    return Cost(
        student_parameters=parameter_count(student),
        dropped_parameters=parameter_count(task.terms),
        teacher_parameters=0 if guide is None else parameter_count(guide),
        student_flops=student_flops,
        teacher_flops=teacher_flops // batch,
        step_flops=counter.get_total_flops() // batch,
    )


@contextmanager
def _counting() -> Iterator[FlopCounterMode]:
    """Count FLOPs, of attention as two matrix products: that of CPUs has no formula before 2.15."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        yield counter


def _outlined(module: Module) -> Module:
    """Copy a module without the storage of its tensors; called under the fake mode."""
    memo: dict[int, Any] = {}  # `copy.deepcopy` takes what is in it for copied already
    for tensor in itertools.chain(module.parameters(), module.buffers()):
        outline = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
        if isinstance(tensor, nn.Parameter):
            outline = nn.Parameter(outline, tensor.requires_grad)
        memo[id(tensor)] = outline
    return copy.deepcopy(module, memo)


def cost_lines(
    recipe: Recipe,
    student: nn.Module,
    teacher: Teacher | None,
    spec: InputSpec,
    world_size: int = 1,
) -> dict[str, str]:
    """Format the cost of a run under ``"parameters"`` and ``"FLOPs per image"``."""
    try:
        cost = estimate(student, teacher, recipe, spec, slice_size(recipe, world_size))
    except probe.NEEDS_VALUES as error:
        reason = f"unknown: a model's pass depends on values ({type(error).__name__})"
        return {"parameters": f"{parameter_count(student):,}", "FLOPs per image": reason}
    giga = [f"{n / 1e9:.3g} G" for n in (cost.student_flops, cost.step_flops, cost.teacher_flops)]
    parameters = f"{cost.student_parameters:,}"
    if cost.dropped_parameters:
        parameters += f", and {cost.dropped_parameters:,} of projectors, dropped after training"
    flops = f"{giga[0]}, training step {giga[1]}"
    if cost.teacher_parameters:
        parameters += f"; teacher {cost.teacher_parameters:,}"
    if cost.teacher_flops:
        flops += f", teacher {giga[2]}"
    elif recipe.teacher is not None and teacher is None:
        flops += ", without the teacher"
    return {"parameters": parameters, "FLOPs per image": f"{flops} (a multiply-add is 2)"}


def sketch_teacher(name: Any, config: TeacherConfig, spec: InputSpec) -> Teacher | None:
    """Build a teacher for `estimate`: on the meta device, or from its checkpoint."""
    if name is None or names_a_file("train", name):
        return resolve_teacher(name, config, spec)
    described = f"teacher: {name} (teacher_img_size={config.teacher_img_size})"
    with probe.naming(described, (ValueError, TypeError, OSError)), torch.device("meta"):
        teacher = create_teacher(name, pretrained=False, img_size=config.teacher_img_size)
        teacher.set_input_stats(spec.mean, spec.std)
    return teacher


def _schedule_text(config: OptimConfig) -> str:
    scaled = f" = {config.lr:g} x {config.batch_size} / 512" if config.lr_scaling else ""
    warmup = f"from {config.warmup_lr:g} in {config.warmup_epochs} epochs to "
    end = f" to {config.min_lr:g}" if ends_at_min_lr(config) else ""
    return (
        f"{warmup if config.warmup_epochs else ''}{config.scaled_lr:g}{scaled}, then "
        f"{config.sched}{_in_brackets(config.sched_kwargs or {})}{end}"
    )


def _terms_text(recipe: Recipe) -> str:
    if recipe.teacher is None:
        return f"CE (label smoothing {recipe.label_smoothing:g})"
    terms = [f"{recipe.cross_entropy_weight:g} CE"] if recipe.labels else []
    if recipe.alpha > 0:
        options = dict(recipe.logit_options or {})
        if has_temperature(find_loss(recipe.logit_loss)):
            options = {"tau": recipe.tau, **options}
        terms.append(f"{recipe.alpha:g} {recipe.logit_loss} logits{_in_brackets(options)}")
    if recipe.feature_weight > 0:
        pairs = ",".join(f"{s}:{t}" for s, t in recipe.pairs)
        chosen = _in_brackets(recipe.feature_options or {})
        terms.append(f"{recipe.feature_weight:g} {recipe.feature_loss}{chosen} on {pairs}")
    return " + ".join(terms)


def _in_brackets(options: Mapping[str, Any]) -> str:
    listed = ", ".join(f"{name} {value}" for name, value in options.items())
    return f" ({listed})" if listed else ""
