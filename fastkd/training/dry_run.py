"""Schedule, parameters and FLOPs of a run before it starts, from tensors without storage."""

from __future__ import annotations

import copy
import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from fastkd.config import MODULE_PREFIX, OptimConfig, Recipe, TeacherConfig
from fastkd.data.classes import Classes
from fastkd.data.datasets import DataPair, open_data
from fastkd.data.loader import eval_loader, train_loader
from fastkd.data.samplers import TrainBatchSampler, slice_size
from fastkd.data.transforms import InputSpec
from fastkd.inference.loading import create_teacher, names_a_file
from fastkd.inference.preprocessing import (
    Shape,
    class_count,
    input_spec,
    parameter_count,
    student_shape,
)
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
from fastkd.training.task import DistillationTask, build_task
from fastkd.utils.distributed import autocast, check_device, process_count

CPU = torch.device("cpu")

# FLOP formulas of attention on CPUs, which not every version of torch has.
CPU_ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: (
        lambda query, key, value, *_, **__: sdpa_flop_count(query, key, value)
    ),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        lambda upstream, query, key, value, *_, **__: sdpa_backward_flop_count(
            upstream, query, key, value
        )
    ),
}

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
    run = _Attempts(list(problems))
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


@dataclass
class _Attempts:
    """Go on after an error, and raise all of them together."""

    problems: list[str]

    def attempt(self, step: Callable[..., Given], *arguments: Any, **options: Any) -> Given | None:
        """Return what a step gives; None after an error."""
        try:
            return step(*arguments, **options)
        except Exception as error:
            self.problems.append(" ".join(str(error).split()) or type(error).__name__)
        return None

    def resolve(self, loaded: Recipe, student: Any, teacher: Any, given: dict[str, Any]) -> Recipe:
        """Resolve the recipe with those overrides that are no problem."""
        given = dict(given)
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
    recipe: Recipe,
    student: nn.Module,
    data: DataPair | None,
    world_size: int = 1,
    teacher: Teacher | None = None,
    spec: InputSpec | None = None,
) -> dict[str, str]:
    """Describe what a recipe amounts to on these data and processes."""
    share = slice_size(recipe, world_size)
    values = {
        "student": f"{recipe.model} ({recipe.variant}), {parameter_count(student):,} parameters"
        if not (recipe.model or "").startswith(MODULE_PREFIX)
        else f"{type(student).__name__}, {parameter_count(student):,} parameters",
        "teacher": recipe.teacher or "none (no distillation)",
        "terms": _terms_text(recipe),
        "global batch": f"{recipe.batch_size} = {world_size} process(es) x {recipe.accumulation} "
        f"slice(s) x {share}",
        "optimizer": _optimizer_text(recipe),
        "learning rate": _schedule_text(recipe),
    }
    if data is not None:
        known = data.num_classes
        if known is not None and recipe.num_classes is not None and recipe.num_classes > known:
            values["classes"] = f"{recipe.num_classes} logits for data of {known} classes"
        samples = recipe.train_samples or len(data.train) if data.streams else len(data.train)
        sampler = TrainBatchSampler(
            samples, share, accumulation=recipe.accumulation, world_size=world_size
        )
        updates = sampler.updates_per_epoch
        copies = f", {recipe.repeated_aug} copies of each" if recipe.repeated_aug > 1 else ""
        values["training set"] = f"{samples:,} images"
        values["an epoch"] = f"{updates * recipe.batch_size:,} samples{copies}, {updates:,} updates"
        if not data.streams:
            values["evaluation set"] = f"{len(data.val):,} images"
        values["in all"] = f"{recipe.epochs} epochs, {recipe.epochs * updates:,} updates"
    if spec is not None:
        values |= cost_lines(recipe, student, teacher, spec, world_size)
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
    """Count a run's parameters and FLOPs from shapes alone.

    The models may be on any device, the meta device too, and are not changed.
    """
    shapes = FakeTensorMode(allow_non_fake_inputs=True)
    with shapes:
        student = _outlined(student)
        guide = None if teacher is None else _outlined(teacher)
        images = torch.empty(batch, *spec.size)
        # Before the task taps the student, whose inference has no terms.
        with naming(student_words(recipe, spec.size)):
            student_flops = _inference_flops(student, images[:1])
    # Outside the fake mode, because initializing projectors reads values.
    task = build_task(student, guide, recipe, images[:1]).train()
    needed = guide if task.needs_logits or task.needs_tokens else None
    with shapes:
        task.terms = _outlined(task.terms)
        with _flop_counter() as counter:
            with autocast(CPU, recipe.amp):
                with naming(teacher_words(recipe)):
                    output = None if needed is None else needed(images)
                teacher_flops = counter.get_total_flops()
                with naming(terms_words(recipe)):
                    losses = task(images, _targets(task, recipe, images), output)
            losses["loss"].backward()
    return Cost(
        student_parameters=parameter_count(student),
        dropped_parameters=parameter_count(task.terms),
        teacher_parameters=0 if guide is None else parameter_count(guide),
        student_flops=student_flops,
        teacher_flops=teacher_flops // batch,
        step_flops=counter.get_total_flops() // batch,
    )


def cost_lines(
    recipe: Recipe,
    student: nn.Module,
    teacher: Teacher | None,
    spec: InputSpec,
    world_size: int = 1,
) -> dict[str, str]:
    """Format the cost of a run under ``"parameters"`` and ``"compute"``."""
    try:
        cost = estimate(student, teacher, recipe, spec, slice_size(recipe, world_size))
    except NEEDS_VALUES as error:
        reason = f"a model's pass depends on values ({type(error).__name__})"
        return {"compute": f"FLOPs cannot be told from shapes: {reason}"}
    missing = recipe.teacher is not None and teacher is None
    return {
        "parameters": _parameters_text(cost),
        "compute": _compute_text(cost) + ("; without the teacher" if missing else ""),
    }


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


def _targets(task: DistillationTask, recipe: Recipe, images: Tensor) -> Tensor:
    """Class indices, or the soft targets that Mixup makes of them."""
    labels = torch.zeros(len(images), dtype=torch.long)
    classes = getattr(task.student, "num_classes", None) or recipe.num_classes
    return torch.zeros(len(images), classes) if recipe.mixes and classes else labels


@torch.no_grad()
def _inference_flops(model: nn.Module, image: Tensor) -> int:
    was_training = model.training
    model.eval()
    with _flop_counter() as counter:
        model(image)
    model.train(was_training)
    return counter.get_total_flops()


def _flop_counter() -> FlopCounterMode:
    return FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION)


def _outlined(module: Module) -> Module:
    """A copy whose parameters and buffers have shapes and no storage; called under the fake mode.

    The memo tells `copy.deepcopy` that the tensors are copied already, so that no byte of them is.
    """
    memo: dict[int, Any] = {}
    for tensor in itertools.chain(module.parameters(), module.buffers()):
        outline = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
        if isinstance(tensor, nn.Parameter):
            outline = nn.Parameter(outline, tensor.requires_grad)
        memo[id(tensor)] = outline
    return copy.deepcopy(module, memo)


def _parameters_text(cost: Cost) -> str:
    parts = [f"student {cost.student_parameters:,}"]
    if cost.dropped_parameters:
        parts.append(f"projectors that are dropped after training {cost.dropped_parameters:,}")
    if cost.teacher_parameters:
        parts.append(f"teacher {cost.teacher_parameters:,}")
    return ", ".join(parts)


def _compute_text(cost: Cost) -> str:
    parts = [f"student {_scaled(cost.student_flops, 'FLOPs')}"]
    if cost.teacher_flops:
        parts.append(f"teacher {_scaled(cost.teacher_flops, 'FLOPs')}")
    parts.append(f"a training step {_scaled(cost.step_flops, 'FLOPs')} an image")
    return ", ".join(parts) + " (a multiply-add is 2)"


def _scaled(value: int, unit: str) -> str:
    prefix, size = "G", 1e9
    if value < 1e8:
        prefix, size = ("M", 1e6) if value >= 1e5 else ("k", 1e3)
    return f"{value / size:.2f} {prefix}{unit}"


def _optimizer_text(config: OptimConfig) -> str:
    text = config.opt + _in_brackets(config.opt_kwargs or {})
    if skips_on_device(config.opt):
        return text
    return f"{text}; the host reads at every update whether its gradient is finite"


def _schedule_text(config: OptimConfig) -> str:
    scaled = f" = {config.lr:g} x {config.batch_size} / 512" if config.lr_scaling else ""
    warmup = f"from {config.warmup_lr:g} in {config.warmup_epochs} epochs to "
    shape = "a cosine" if config.sched == "cosine" else config.sched
    end = f" to {config.min_lr:g}" if ends_at_min_lr(config) else ""
    return (
        f"{warmup if config.warmup_epochs else ''}{config.scaled_lr:g}{scaled}, by {shape}"
        f"{_in_brackets(config.sched_kwargs or {})}{end}"
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
    if not options:
        return ""
    told = [f"{name} {_number(value)}" for name, value in options.items()]
    return f" ({', '.join(told)})"


def _number(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
