"""Check a run without training, and describe its schedule, parameters and FLOPs."""

from __future__ import annotations

import copy
import itertools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from fastkd.config import MODULE_PREFIX, OptimConfig, Recipe, TeacherConfig
from fastkd.data.classes import Classes
from fastkd.data.datasets import open_data
from fastkd.data.loader import eval_loader, train_loader
from fastkd.data.readers import DataPair
from fastkd.data.samplers import TrainBatchSampler, slice_size
from fastkd.data.transforms import InputSpec
from fastkd.inference.loading import names_a_file
from fastkd.inference.preprocessing import (
    Shape,
    class_count,
    input_spec,
    parameter_count,
    student_shape,
)
from fastkd.inference.teacher import create_teacher
from fastkd.losses.registry import find_loss, has_temperature
from fastkd.models import Teacher
from fastkd.models.hub import is_hub_name
from fastkd.training.build import (
    FromRecipe,
    check_classes,
    check_data,
    check_output,
    new_student,
    resolve_recipe,
    resolve_teacher,
    with_weights,
)
from fastkd.training.optim import ends_at_min_lr, skips_on_device
from fastkd.training.probe import (
    NEEDS_VALUES,
    check_inputs,
    naming,
    student_words,
    teacher_words,
    terms_words,
)
from fastkd.training.task import build_task
from fastkd.utils.distributed import autocast, check_device, process_count

Module = TypeVar("Module", bound=nn.Module)
Given = TypeVar("Given")


def dry_run(
    recipe: str | Path | Recipe | None,
    teacher: str | FromRecipe | None,
    overrides: dict[str, Any],
    *,
    output: str | Path | None = None,
    resume: str = "auto",
    device: str | None = None,
    problems: Sequence[str] = (),
) -> tuple[Recipe, dict[str, str]]:
    """Describe a run without loading a teacher's weights, using a device or writing output.

    Raises one ValueError of all that a run would be refused for, ``problems`` among it.
    """
    run = _Attempts(problems)
    run.attempt(check_output, output, resume)
    if resume not in ("auto", "never") and resume.strip() and not Path(resume).exists():
        run.problems.append(f"resume: there is no checkpoint {resume!r}")
    chosen = run.attempt(check_device, device)
    world_size = run.attempt(process_count) or 1
    loaded = run.attempt(Recipe.load, recipe)
    if loaded is None:
        run.finish()
    size = overrides.get("img_size", loaded.img_size)
    model = overrides.get("model", loaded.model)
    published = model is not None and is_hub_name(model)
    known = len(run.problems)
    opened = run.attempt(with_weights, model, size, pretrained=not published)
    student, weights = (None, Classes()) if opened is None else (opened.network, opened.named)
    lost = len(run.problems) > known
    resolved = run.resolve(loaded, student, teacher, overrides)
    data = None
    if resolved.data is not None:
        data = run.attempt(open_data, resolved.data, resolved.data_root, labels=resolved.labels)
    shape: Shape | None = Shape(resolved.num_classes, 3, resolved.img_size)
    if data is not None:
        run.attempt(check_data, data, overrides)
        shape = run.attempt(student_shape, resolved, data)
    elif resolved.data is not None and resolved.num_classes is None:
        shape = Shape(1000, 3, resolved.img_size)  # the data are a problem already
    if student is None and shape is not None and not lost:
        student = run.attempt(new_student, resolved, shape)
    if student is None or shape is None:
        run.finish()
    spec = run.attempt(input_spec, student, resolved, data)
    values = run.attempt(effective_values, resolved, student, data, world_size)
    costs = None
    if spec is not None:
        classes = run.attempt(class_count, student, shape)
        before = len(run.problems)
        run.attempt(check_inputs, resolved, spec, data, classes)
        if data is not None and len(run.problems) == before:
            run.attempt(train_loader, data, resolved, spec)
            run.attempt(eval_loader, data, resolved, spec)
        guide = run.attempt(sketch_teacher, resolved, spec)
        if data is not None:
            run.attempt(check_classes, resolved, data, classes, weights, guide)
        costs = run.attempt(cost_lines, resolved, student, guide, spec, world_size)
    if run.problems or values is None or costs is None:
        run.finish()
    published |= resolved.teacher is not None and not names_a_file("train", resolved.teacher)
    absent = chosen is not None and chosen.type == "cuda" and not torch.cuda.is_available()
    unchecked = {
        "data (none are given)": data is None,
        "published weights": published,
        f"{device} (not on this machine)": absent,
    }
    left = [what for what, is_left in unchecked.items() if is_left]
    return resolved, values | costs | ({"not checked": ", ".join(left)} if left else {})


class _Attempts:
    """Steps that are tried although others failed, and their errors."""

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = list(problems)

    def attempt(self, step: Callable[..., Given], *arguments: Any, **options: Any) -> Given | None:
        """Return what a step gives; None after an error."""
        try:
            return step(*arguments, **options)
        except Exception as error:
            self.problems.append(" ".join(str(error).split()) or type(error).__name__)
        return None

    def resolve(self, loaded: Recipe, student: Any, teacher: Any, given: dict[str, Any]) -> Recipe:
        """Resolve the recipe with those overrides that are no problem."""
        while True:
            try:
                return resolve_recipe(loaded, student, teacher, None, given)
            except (ValueError, TypeError) as error:
                lines = str(error).splitlines()
            self.problems += lines
            named = {re.split("[:=]", line)[0] for line in lines} & given.keys()
            if not named:
                self.finish()
            given = {name: value for name, value in given.items() if name not in named}

    def finish(self) -> NoReturn:
        """Raise the problems."""
        raise ValueError("; ".join(dict.fromkeys(self.problems)))


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
        known = data.num_classes
        if known is not None and recipe.num_classes is not None and recipe.num_classes > known:
            values["classes"] = f"{recipe.num_classes} logits for data of {known} classes"
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
    """Parameters of a run's models, and FLOPs per image.

    FLOPs are those of matrix products, convolutions and attention (`torch.utils.flop_counter`), a
    multiply-add being two; element-wise work is left out.
    """

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
        with naming(student_words(recipe, spec.size)), torch.no_grad(), _counting() as counter:
            was_training = student.training
            student.eval()(images[:1])
            student.train(was_training)
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
                with naming(teacher_words(recipe)):
                    output = None if needed is None else needed(images)
                teacher_flops = counter.get_total_flops()
                with naming(terms_words(recipe)):
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
    except NEEDS_VALUES as error:
        reason = f"a model's pass depends on values ({type(error).__name__})"
        parameters = f"{parameter_count(student):,}"
        return {"parameters": parameters, "FLOPs per image": f"unknown, because {reason}"}
    parameters = f"{cost.student_parameters:,}"
    if cost.dropped_parameters:
        parameters += f", and {cost.dropped_parameters:,} of projectors, dropped after training"
    flops = f"{_giga(cost.student_flops)} G, training step {_giga(cost.step_flops)} G"
    if cost.teacher_parameters:
        parameters += f"; teacher {cost.teacher_parameters:,}"
    if cost.teacher_flops:
        flops += f", teacher {_giga(cost.teacher_flops)} G"
    elif recipe.teacher is not None and teacher is None:
        flops += ", without the teacher"
    return {"parameters": parameters, "FLOPs per image": f"{flops} (a multiply-add is 2)"}


def _giga(flops: int) -> str:
    return f"{flops / 1e9:.3g}"


def sketch_teacher(config: TeacherConfig, spec: InputSpec) -> Teacher | None:
    """Build a teacher for `estimate`: a timm model on the meta device, or one from its checkpoint.

    None without a teacher, or if the recipe names a module that was passed to `train`.
    """
    name = config.teacher
    if name is None or name.startswith(MODULE_PREFIX):
        return None
    if names_a_file("train", name):
        return resolve_teacher(name, config, spec)
    described = f"teacher: {name} (teacher_img_size={config.teacher_img_size})"
    with naming(described, (ValueError, TypeError, OSError)), torch.device("meta"):
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
