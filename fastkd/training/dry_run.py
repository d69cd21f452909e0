"""What a run will cost, before anything is computed: parameters, FLOPs and memory of a step.

Runs the models once on tensors that have shapes and no storage, so that nobody queues for a GPU to
learn that a batch does not fit. Knows modules, recipes and shapes; neither data, weights nor the
accelerator that the run will use.
"""

from __future__ import annotations

import copy
import itertools
import os
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
    UnsupportedFakeTensorException,
    UnsupportedOperatorException,
)
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from fastkd.config import MODULE_PREFIX, Recipe, refuse_image_options
from fastkd.data.datasets import DataPair, open_data
from fastkd.data.samplers import TrainBatchSampler, slice_size
from fastkd.data.transforms import InputSpec
from fastkd.inference.loading import build_student
from fastkd.inference.preprocessing import Shape, input_spec, parameter_count, student_shape
from fastkd.losses.registry import find_loss, has_temperature
from fastkd.models import TapOutput, Teacher, create_teacher
from fastkd.training.build import FromRecipe, resolve_recipe, resolve_teacher
from fastkd.training.task import DistillationTask, build_task
from fastkd.utils.distributed import AMP_DTYPES, autocast

# How a pass says that it depends on values, which shapes without storage do not have.
NEEDS_VALUES = (
    DataDependentOutputException,
    DynamicOutputShapeException,
    UnsupportedFakeTensorException,
    UnsupportedOperatorException,
)
CPU = torch.device("cpu")

# What widens its input under CUDA's autocast (PyTorch's list, as far as models and losses of images
# use it). A CPU's does not widen all of it, and it is on a CPU that the shapes are run.
WIDENED_ON_CUDA = frozenset(
    {
        *("softmax", "log_softmax", "layer_norm", "group_norm", "norm", "normalize"),
        *("exp", "log", "pow", "__pow__", "rsqrt", "reciprocal", "softplus", "cumsum"),
        *("cross_entropy", "nll_loss", "kl_div", "mse_loss", "l1_loss", "smooth_l1_loss"),
        *("binary_cross_entropy_with_logits", "cosine_similarity"),
    }
)

# Attention as it runs on a CPU, whose formulae not every version of torch has.
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


@dataclass(frozen=True)
class Memory:
    """Bytes that one rank holds during an update, by what they are for.

    P is the number of trained parameters (student and projectors), B the images of a slice.

    Attributes:
        weights: of student and projectors, each at the size of its own dtype; float32: 4 P.
        gradients: as the weights; they live from the first slice's backward to the update.
        buckets: DistributedDataParallel's copy of the gradients, to send; 0 for one process.
        optimizer: AdamW's two moments, each as the weights; float32: 8 P.
        ema: the averaged student's parameters and buffers; 0 without ``ema_decay``.
        teacher_weights: its parameters and buffers, as they are stored; float32: 4 a parameter.
        batch: B images of C H W float32 values and 8 bytes of label each; with ``augment="gpu"``
            the C H W bytes that they are made from as well.
        teacher_activations: the most that its forward pass allocates at a time, in eval mode
            without gradients, under the recipe's autocast as CUDA has it (softmax in float32).
        activations: what the student's forward pass and the terms keep for the backward pass,
            every storage once: activations, the low-precision copies of weights, the teacher's
            tokens. Parameters, buffers and the batch are not among them.
    """

    weights: int
    gradients: int
    buckets: int
    optimizer: int
    ema: int
    teacher_weights: int
    batch: int
    teacher_activations: int
    activations: int

    @property
    def total(self) -> int:
        """All of it, of the two kinds of activations the larger: they follow each other.

        That is eager PyTorch's need. torch.compile keeps fewer activations; the allocator's
        fragments, cuDNN's workspaces and the CUDA context (0.5 to 1 GB) come on top.
        """
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        passing = max(values.pop("teacher_activations"), values.pop("activations"))
        return sum(values.values()) + passing


@dataclass(frozen=True)
class Cost:
    """Sizes of a run's models and of one step of it. A multiply-add counts as two FLOPs.

    FLOPs are those of matrix products, convolutions and attention, as
    ``torch.utils.flop_counter`` counts them; element-wise work is left out.

    Attributes:
        student_parameters: of the student, projectors not among them.
        dropped_parameters: of the terms' projectors, which inference does not need.
        teacher_parameters: 0 without a teacher.
        student_flops: of one image's forward pass, as at inference.
        teacher_flops: likewise; 0 where the terms do not need it.
        step_flops: of one image in a training step: the teacher's forward pass, the student's,
            the terms and the backward pass.
        batch: images of a slice, for which the memory is.
        memory: of one rank.
    """

    student_parameters: int
    dropped_parameters: int
    teacher_parameters: int
    student_flops: int
    teacher_flops: int
    step_flops: int
    batch: int
    memory: Memory


def estimate(
    student: nn.Module,
    teacher: Teacher | None,
    recipe: Recipe,
    spec: InputSpec,
    batch: int,
    world_size: int = 1,
) -> Cost:
    """Sizes of one rank's step, from shapes alone; takes a second or two, on the CPU.

    Args:
        student: on any device, the meta device too; left as it is.
        teacher: likewise; None where the terms need none.
        recipe: terms, ``amp``, ``ema_decay`` and mixing.
        spec: what the student takes in.
        batch: images of one slice of one rank.
        world_size: number of ranks.

    Returns:
        The cost.

    Raises:
        ValueError: the student and the teacher cannot be brought together by the recipe.
        RuntimeError: one of `NEEDS_VALUES`: a model's pass depends on values.
    """
    shapes = FakeTensorMode(allow_non_fake_inputs=True)
    with shapes:
        student = _outlined(student)
        guide = None if teacher is None else _outlined(teacher)
        images = torch.empty(batch, *spec.size)
        # Before the task taps the student, whose inference has no terms.
        student_flops = _inference_flops(student, images[:1])
    # Outside, because new projectors are initialised, for which some values have to be looked at.
    task = build_task(student, guide, recipe, images[:1]).train()
    needed = guide if task.needs_logits or task.needs_tokens else None
    with shapes:
        task.terms = _outlined(task.terms)
        step = _run_step(task, needed, recipe, images)
    return Cost(
        student_parameters=_count(student),
        dropped_parameters=_count(task.terms),
        teacher_parameters=0 if guide is None else _count(guide),
        student_flops=student_flops,
        teacher_flops=step.teacher_flops // batch,
        step_flops=step.flops // batch,
        batch=batch,
        memory=_memory(task, needed, recipe, images, step, world_size),
    )


def cost_lines(
    recipe: Recipe,
    student: nn.Module,
    teacher: Teacher | None,
    spec: InputSpec,
    world_size: int = 1,
) -> dict[str, str]:
    """The cost of a run for people to read.

    Args:
        recipe: resolved.
        student: as in `estimate`.
        teacher: likewise; `sketch_teacher` makes one without its weights.
        spec: what the student takes in.
        world_size: number of processes.

    Returns:
        Text under ``"parameters"``, ``"compute"`` and ``"memory"``; where a model's pass depends on
        values, one line that says so.

    Raises:
        ValueError: the batch cannot be shared out, or student and teacher do not fit.
    """
    try:
        share = slice_size(recipe, world_size)
        cost = estimate(student, teacher, recipe, spec, share, world_size)
    except NEEDS_VALUES as error:
        reason = f"a model's pass depends on values ({type(error).__name__})"
        return {"compute": f"FLOPs and memory cannot be told from shapes: {reason}"}
    missing = recipe.teacher is not None and teacher is None
    return {
        "parameters": _parameters_text(cost),
        "compute": _compute_text(cost) + ("; without the teacher" if missing else ""),
        "memory": _memory_text(cost) + ("; without the teacher" if missing else ""),
    }


def sketch_teacher(recipe: Recipe, spec: InputSpec) -> Teacher | None:
    """A recipe's teacher for `estimate`: a timm model without weights or storage.

    Args:
        recipe: its ``teacher`` and ``teacher_img_size``.
        spec: the student's input.

    Returns:
        The teacher, on the meta device; a run's is read from its checkpoint. None where the recipe
        has none, or a module that only its author has.

    Raises:
        ValueError: an unknown name, or a checkpoint that cannot be used.
    """
    name = recipe.teacher
    if name is None or name.startswith(MODULE_PREFIX):
        return None
    if Path(name).exists():
        return resolve_teacher(name, recipe, spec)
    with torch.device("meta"):
        teacher = create_teacher(name, pretrained=False, img_size=recipe.teacher_img_size)
        teacher.set_input_stats(spec.mean, spec.std)
    return teacher


@dataclass(frozen=True)
class _Step:
    """What one step on shapes has shown."""

    flops: int
    teacher_flops: int
    teacher_activations: int
    activations: int


def _run_step(
    task: DistillationTask, teacher: Teacher | None, recipe: Recipe, images: Tensor
) -> _Step:
    """Forward and backward of one slice, as `Engine.update` does them."""
    given = {*_storages(task.parameters()), *_storages(task.buffers()), *_storages([images])}
    with _flop_counter() as counter:
        with autocast(CPU, recipe.amp), _WidenedAsOnCuda():
            output, peak = _teach(teacher, images)
            teacher_flops = counter.get_total_flops()
            with _kept_for_backward(given) as kept:
                target = _targets(task, recipe, images)
                losses = task(images, target, output)
        activations = sum(storage.nbytes() for storage in kept.values())
        kept.clear()
        losses["loss"].backward()
    return _Step(counter.get_total_flops(), teacher_flops, peak, activations)


def _teach(teacher: Teacher | None, images: Tensor) -> tuple[TapOutput | None, int]:
    if teacher is None:
        return None, 0
    with _LiveBytes() as live:
        output = teacher(images)
    return output, live.peak


def _targets(task: DistillationTask, recipe: Recipe, images: Tensor) -> Tensor:
    """Class indices, or the soft targets that Mixup makes of them."""
    labels = torch.zeros(len(images), dtype=torch.long)
    classes = getattr(task.student, "num_classes", None) or recipe.num_classes
    return torch.zeros(len(images), classes) if recipe.mixes and classes else labels


def _memory(
    task: DistillationTask,
    teacher: Teacher | None,
    recipe: Recipe,
    images: Tensor,
    step: _Step,
    world_size: int,
) -> Memory:
    trained = [parameter for parameter in task.parameters() if parameter.requires_grad]
    weights = _bytes(task.parameters()) + _bytes(task.buffers())
    batch = _bytes([images]) + 8 * len(images)
    if recipe.augment == "gpu":
        batch += images.numel()
    return Memory(
        weights=weights,
        gradients=_bytes(trained),
        buckets=_bytes(trained) if world_size > 1 else 0,
        optimizer=2 * _bytes(trained),
        ema=0 if recipe.ema_decay is None else _state_bytes(task.student),
        teacher_weights=0 if teacher is None else _state_bytes(teacher),
        batch=batch,
        teacher_activations=step.teacher_activations,
        activations=step.activations,
    )


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


@contextmanager
def _kept_for_backward(given: set[int]) -> Iterator[dict[int, torch.UntypedStorage]]:
    """Storages that autograd keeps, by identity, but those ``given``."""
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in given:
            kept[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield kept


class _WidenedAsOnCuda(TorchFunctionMode):
    """Gives `WIDENED_ON_CUDA` float32 under a CPU's autocast, too."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") in WIDENED_ON_CUDA and torch.is_autocast_enabled(CPU.type):
            args, kwargs = tree_map_only(Tensor, _widened, (args, kwargs))
        return func(*args, **kwargs)


def _widened(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in AMP_DTYPES.values() else tensor


class _LiveBytes(TorchDispatchMode):
    """The most bytes that operators' results have held at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.held = 0
        self.peak = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        results = func(*args, **(kwargs or {}))
        known = _storages(_tensors((args, kwargs)))
        for tensor in _tensors(results):
            storage = tensor.untyped_storage()
            if storage._cdata not in known:  # a view, or an operator that works in place
                known.add(storage._cdata)
                self._hold(storage)
        return results

    def _hold(self, storage: torch.UntypedStorage) -> None:
        size = storage.nbytes()
        self.held += size
        self.peak = max(self.peak, self.held)
        weakref.finalize(storage, self._release, size)

    def _release(self, size: int) -> None:
        self.held -= size


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _storages(tensors: Any) -> set[int]:
    return {tensor.untyped_storage()._cdata for tensor in tensors}


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _bytes(tensors: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _state_bytes(module: nn.Module) -> int:
    return _bytes(module.parameters()) + _bytes(module.buffers())


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


def _memory_text(cost: Cost) -> str:
    memory = cost.memory
    shown = {
        "weights, gradients and AdamW": memory.weights + memory.gradients + memory.optimizer,
        "gradients to send": memory.buckets,
        "EMA": memory.ema,
        "teacher": memory.teacher_weights,
        "batch": memory.batch,
        "activations for the backward pass": memory.activations,
        "or, before, the teacher's": memory.teacher_activations,
    }
    parts = [f"{name} {_scaled(size, 'B')}" for name, size in shown.items() if size]
    return (
        f"about {_scaled(memory.total, 'B')} a process at {cost.batch} images, not compiled: "
        + ", ".join(parts)
    )


def _scaled(value: int, unit: str) -> str:
    """With the prefix that leaves two digits to see."""
    prefix, size = "G", 1e9
    if value < 1e8:
        prefix, size = ("M", 1e6) if value >= 1e5 else ("k", 1e3)
    return f"{value / size:.2f} {prefix}{unit}"


def effective_values(
    recipe: Recipe,
    student: nn.Module,
    data: DataPair | None,
    world_size: int = 1,
    teacher: Teacher | None = None,
    spec: InputSpec | None = None,
) -> dict[str, str]:
    """What a recipe comes down to on these data and processes, for people to read.

    Args:
        recipe: resolved.
        student: the student.
        data: None where there are none yet; then lengths are left out.
        world_size: number of processes.
        teacher: None where it is only known by its name; then it is built without weights.
        spec: the student's input; None leaves FLOPs and memory out.

    Returns:
        Text by heading, in order.

    Raises:
        ValueError: the batch cannot be shared out, or exceeds the data.
    """
    share = slice_size(recipe, world_size)
    values = {
        "student": f"{recipe.model} ({recipe.variant}), {parameter_count(student):,} parameters"
        if not (recipe.model or "").startswith(MODULE_PREFIX)
        else f"{type(student).__name__}, {parameter_count(student):,} parameters",
        "teacher": recipe.teacher or "none (no distillation)",
        "terms": _terms_text(recipe),
        "global batch": f"{recipe.batch_size} = {world_size} process(es) x {recipe.accumulation} "
        f"slice(s) x {share}",
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
        teacher = teacher or sketch_teacher(recipe, spec)
        values |= cost_lines(recipe, student, teacher, spec, world_size)
    return values


def dry_run(
    recipe: Recipe, teacher: str | FromRecipe | None, overrides: dict[str, Any]
) -> tuple[Recipe, dict[str, str]]:
    """What a run would be, without a teacher's weights, a device or an output.

    Args:
        recipe: the run's.
        teacher: its name, None, or `FromRecipe.TEACHER`.
        overrides: recipe fields.

    Returns:
        The resolved recipe, and `effective_values`.

    Raises:
        ValueError: the same that would stop the run at its start.
    """
    resolved = resolve_recipe(recipe, None, teacher, None, overrides)
    data = None
    if resolved.data is not None:
        data = open_data(resolved.data, resolved.data_root, labels=resolved.labels)
    if data is None:
        shape = Shape(resolved.num_classes, 3, resolved.img_size)
    else:
        if data.yields_tensors:
            refuse_image_options(overrides)
        shape = student_shape(resolved, data)
    student = build_student(resolved, shape)
    spec = input_spec(student, resolved, data)
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    return resolved, effective_values(resolved, student, data, world_size, spec=spec)


def _schedule_text(recipe: Recipe) -> str:
    scaled = f" = {recipe.lr:g} x {recipe.batch_size} / 512" if recipe.lr_scaling else ""
    warmup = f"from {recipe.warmup_lr:g} in {recipe.warmup_epochs} epochs to "
    return (
        f"{warmup if recipe.warmup_epochs else ''}{recipe.scaled_lr:g}{scaled}, by a cosine to "
        f"{recipe.min_lr:g}"
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
