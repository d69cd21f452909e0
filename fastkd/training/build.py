"""Resolve the arguments of `train`, and build the teacher, optimizer and engine of a run."""

from __future__ import annotations

import enum
import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from timm.utils import ModelEmaV3
from torch import nn
from torch.utils.data import DataLoader

from fastkd.config import (
    MODULE_PREFIX,
    DistillConfig,
    Recipe,
    TeacherConfig,
    refuse,
    refuse_image_options,
)
from fastkd.data.classes import Classes, match_classes, require_same_classes
from fastkd.data.datasets import DataPair
from fastkd.data.gpu_augment import device_augment
from fastkd.data.loader import eval_loader, train_loader
from fastkd.data.open_data import open_data
from fastkd.data.transforms import InputSpec, create_mixup
from fastkd.inference import open_model, preprocessing
from fastkd.inference.create_teacher import as_teacher, create_teacher
from fastkd.inference.preprocessing import Shape, class_count, input_spec, student_shape
from fastkd.losses.registry import check_options, find_loss, has_temperature
from fastkd.models import Teacher
from fastkd.models.factory import rebuilt_by
from fastkd.models.hub_download import is_hub_name
from fastkd.models.timm_models import looks_like_a_path
from fastkd.training import optim
from fastkd.training.logging import check_trackers
from fastkd.training.probe import check_inputs, naming
from fastkd.training.state import Identity
from fastkd.training.task import build_task
from fastkd.training.updates import Engine
from fastkd.utils.distributed import World
from fastkd.utils.random import derive_seed, preserved_rng, seed_all

logger = logging.getLogger("fastkd")

STUDENT_FIELDS = ("variant", "width", "drop_path", "init_weights")
TEACHER_FIELDS = ("teacher_checkpoint", "teacher_img_size")
RANDOM_FIELDS = ("scale", "ratio", "hflip", "color_jitter", "auto_augment", "reprob")
FEATURE_FIELDS = (
    *("feature_loss", "feature_options", "pairs", "projector", "resample"),
    *("student_prefix", "teacher_prefix"),
)
LOGIT_FIELDS = ("tau", "logit_loss", "logit_options", "classes_by")
_DEFAULTS = dict(Recipe())  # asking for one asks for nothing


class FromRecipe(enum.Enum):
    """Default of an argument that the recipe decides; None means none."""

    TEACHER = "the recipe's teacher"


class Given(NamedTuple):
    """The arguments of `train`, resolved; nothing is opened but a student with weights."""

    recipe: Recipe
    student: Any  # a name, a module or None
    teacher: Any
    data: Any  # `Data`; None in a dry run
    output: Path | None
    classes: Classes  # of the weights that the student starts from


Attempt = Callable[..., Any]  # takes a step of opening a run: a function and its arguments


def strictly(step: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """Take a step of opening a run, which an error ends; a dry run's attempts go on."""
    return step(*arguments, **options)


def resolve_run(
    student: Any,
    teacher: Any,
    data: Any,
    output: Any,
    recipe: Any,
    resume: str,
    overrides: Any,
    attempt: Attempt = strictly,
) -> Given:
    """Resolve the arguments of `train`; a dry run needs neither data, output nor weights."""
    dry = attempt is not strictly
    folder = attempt(_check_output, output, resume)
    loaded = Recipe.load(recipe)
    asked = loaded.override(**overrides)
    source = asked.model if student is None else student
    opened = attempt(_open_weights, source, asked.img_size, dry)
    if opened is not None:
        student = opened.network
    resolved = resolve_recipe(loaded, student, teacher, data, overrides)
    data = resolved.data if data is None else data
    if data is None and not dry:
        raise ValueError("train: data is missing: a folder, a timm data set name or two data sets")
    if folder or not dry:
        attempt(check_trackers, resolved.track, folder)
    if folder is None and not dry:
        idle = ("checkpoint_interval", "keep_checkpoints")
        warn_idle(overrides, idle, "without an output no checkpoint is written")
    classes = Classes() if opened is None else opened.named
    return Given(resolved, student, chosen_teacher(loaded, teacher), data, folder, classes)


def _check_output(output: Any, resume: str) -> Path | None:
    """Return the folder of a run, or refuse what cannot become one."""
    for name, path in (("output", output), ("resume", resume)):
        if path is not None and not str(path).strip():
            raise ValueError(f"train: {name} must not be empty, got {path!r}")
    if output is None:
        return None
    for path in (Path(output), *Path(output).parents):
        if path.is_file():
            raise ValueError(f"train: output must be a folder, but {path} is a file")
    return Path(output)


def _open_weights(student: Any, img_size: int | None, dry: bool) -> open_model.Model | None:
    """Open a student that has weights to start from; None for a timm name or a module."""
    if not (isinstance(student, str | Path) and open_model.starts_from_weights("train", student)):
        return None
    loads = not (dry and is_hub_name(str(student)))
    with preserved_rng():
        return open_model.open_model(student, img_size=img_size, pretrained=loads, caller="train")


def check_data(data: DataPair, overrides: Mapping[str, Any]) -> None:
    if overrides.get("train_samples") is not None and not data.streams:
        raise ValueError("train_samples: only streamed data have no length of their own")
    if data.yields_tensors:
        refuse_image_options(overrides)


class Parts(NamedTuple):
    """What a run works on, before anything of it changes."""

    data: DataPair
    student: BuiltStudent
    teacher: Teacher | None
    batches: DataLoader[Any]
    eval_batches: DataLoader[Any]


def open_parts(
    given: Given,
    peers: World,
    overrides: Mapping[str, Any],
    open_teacher: Callable[[Any, TeacherConfig, InputSpec], Teacher | None],
    attempt: Attempt = strictly,
) -> Parts:
    """Open data, student, teacher and dataloaders, and try the transforms out."""
    recipe, quiet = given.recipe, not peers.is_main
    data = attempt(open_data, given.data, recipe.data_root, labels=recipe.labels)
    attempt(check_data, data, overrides)
    if given.data and not data:  # a dry run's problem already; it goes on with the student
        classes = recipe.num_classes or preprocessing.num_classes_of(given.student) or 1000
        recipe = recipe.override(num_classes=classes)
    student = attempt(open_student, given.student, recipe, data or None, peers)
    spec = student.spec
    attempt(check_inputs, recipe, spec, data or None)
    teacher = attempt(open_teacher, given.teacher, recipe, spec)
    logits = (student.num_classes, given.classes)
    data = attempt(check_classes, recipe, data, *logits, teacher, quiet)
    batches = attempt(train_loader, data, recipe, spec, peers)
    eval_batches = attempt(eval_loader, data, recipe, spec, peers)
    return Parts(data, student, teacher, batches, eval_batches)


class BuiltStudent(NamedTuple):
    """A student on its device, the same on every process."""

    module: nn.Module
    spec: InputSpec
    num_classes: int | None  # None: unknown
    img_size: int | tuple[int, int] | None  # that it was built for


def open_student(
    student: str | nn.Module | None, recipe: Recipe, data: DataPair | None, peers: World
) -> BuiltStudent:
    """Build the student, or take the given module, for these data; None stands for images."""
    shape = Shape(recipe.num_classes, 3, recipe.img_size)
    if data is not None:
        shape = student_shape(recipe, data)
    seed_all(derive_seed("model", recipe.seed))
    if isinstance(student, nn.Module):
        module = student
    else:
        options = f"img_size={shape.img_size}, width={recipe.width}, drop_path={recipe.drop_path}"
        with naming(f"student: {recipe.model} with {options}", (ValueError, TypeError, OSError)):
            module = preprocessing.build_student(recipe, shape)
    for name, weight in module.named_parameters():
        if weight.dtype in (torch.float16, torch.bfloat16):
            raise ValueError(
                f"student: weights must be float32, got {name} in {weight.dtype}: hand over "
                "student.float(); amp='bf16' computes in bfloat16"
            )
    num_classes = class_count(module, shape)
    module = module.to(peers.device)
    peers.share(module)  # before anything is copied from it, the EMA for one
    return BuiltStudent(module, input_spec(module, recipe, data), num_classes, shape.img_size)


def check_classes(
    recipe: Recipe,
    data: DataPair,
    num_classes: int | None,
    weights: Classes,
    teacher: Teacher | None,
    quiet: bool = False,
) -> DataPair:
    """Compare the data's classes with a teacher's logits and with the weights to start from."""
    own = replace(Classes.of_data(data.train, None), count=num_classes)
    differences = own.differences(weights, ("data", "weights"))
    if weights.names and not weights.guessed and differences and not quiet:
        logger.warning("student: its weights are of other classes (%s)", differences)
    if teacher is None or recipe.alpha == 0:
        return data
    theirs = open_model.classes_of(teacher.model, teacher.classes)
    of: Any = {"caller": "teacher", "of": ("data", "teacher"), "quiet": quiet}
    if recipe.labels:
        require_same_classes(own, theirs, by=recipe.classes_by, **of)
        return data
    # The student learns the teacher's classes: evaluation labels are mapped to those, or not used.
    require_same_classes(Classes(count=num_classes), theirs, by="number", **of)
    own = Classes.of_data(data.val, None)
    if recipe.classes_by == "number" or not (data.labeled_val and own.names and theirs.names):
        return data
    try:
        numbers = match_classes(own, theirs, **of)
    except ValueError as error:
        if not quiet:
            logger.warning("no top-1 is measured: %s", error)
        return replace(data, labeled_val=False)
    return replace(data, numbers=numbers)


def identify(parts: Parts, recipe: Recipe, peers: World, updates_per_epoch: int) -> Identity:
    data, teacher = parts.data, parts.teacher
    samples = recipe.train_samples or len(data.train) if data.streams else len(data.train)
    stream = (peers.size, recipe.workers) if data.streams else None
    named = Classes.of_data(data.train, None)
    if teacher is not None and recipe.alpha > 0 and not recipe.labels:
        named = open_model.classes_of(teacher.model, teacher.classes)  # what the student learns
    names = {} if named.guessed else named.names
    regular = names and list(names) == list(range(len(names)))
    classes = [names[label][0] for label in names] if regular else None
    _, spec, num_classes, img_size = parts.student
    sizes = (samples, stream, updates_per_epoch)
    return Identity(recipe, spec, num_classes, img_size, classes, *sizes)


def chosen_teacher(recipe: TeacherConfig, teacher: Any) -> Any:
    if teacher is not FromRecipe.TEACHER:
        return teacher
    if recipe.teacher is not None and recipe.teacher.startswith(MODULE_PREFIX):
        raise ValueError(
            f"teacher: the recipe's teacher is {recipe.teacher}: hand the module over, or None"
        )
    return recipe.teacher


def resolve_recipe(recipe: Any, student: Any, teacher: Any, data: Any, overrides: Any) -> Recipe:
    """Return the recipe of a run as it is saved, with everything that the caller hands over."""
    loaded = Recipe.load(recipe)
    resolved = loaded.override(**overrides)
    if resolved.variant != loaded.variant and "width" not in overrides:
        resolved = resolved.override(width=None)  # it was the other variant's
    for chosen, options in (  # so were the options of another loss, optimizer or schedule
        ("logit_loss", "logit_options"),
        ("feature_loss", "feature_options"),
        ("opt", "opt_kwargs"),
        ("sched", "sched_kwargs"),
    ):
        if getattr(resolved, chosen) != getattr(loaded, chosen) and options not in overrides:
            resolved = resolved.override(**{options: None})
    optim.check_optimizer(resolved)
    teacher = chosen_teacher(loaded, teacher)
    _check_effect(resolved, student, teacher, overrides)
    if teacher is None:  # recorded, whatever terms the recipe has
        none = dict.fromkeys((*TEACHER_FIELDS, "ce_weight"))
        resolved = resolved.override(alpha=0.0, feature_weight=0.0, **none)
    if student is not None:
        rebuilt = rebuilt_by(student) if isinstance(student, nn.Module) else None
        resolved = resolved.override(**(rebuilt or {"model": _name(student)}))
    model = resolved.model or ""
    architecture, _, tag = model.partition(".")
    by_name = not isinstance(student, nn.Module) and not looks_like_a_path(model)
    if tag and by_name and timm.is_model(architecture):  # a tag stands for weights
        raise ValueError(
            f"student: the tag of {model!r} is one of published weights, but a timm name starts "
            f"from random ones: write {architecture!r} for these, 'hf_hub:timm/{model}' for those"
        )
    if isinstance(data, str | Path):
        resolved = resolved.override(data=str(data))
    if not resolved.labels:
        _check_unlabeled(resolved, teacher, overrides)
    optim.check_schedule(resolved)
    if resolved.alpha > 0:
        check_options(find_loss(resolved.logit_loss), resolved.logit_options, "logit_options")
    if resolved.feature_weight > 0:
        check_options(find_loss(resolved.feature_loss), resolved.feature_options, "feature_options")
    return resolved.override(teacher=None if teacher is None else _name(teacher))


def _name(model: Any) -> str:
    if isinstance(model, Teacher):
        model = model.model
    return f"{MODULE_PREFIX}{type(model).__name__}" if isinstance(model, nn.Module) else str(model)


def _check_effect(
    resolved: Recipe, student: Any, teacher: Any, overrides: Mapping[str, Any]
) -> None:
    """Refuse overrides without effect that would change the run, and warn of others."""
    # Overrides alone: a recipe may hold more than a run needs.
    if isinstance(student, nn.Module):
        refuse(overrides, STUDENT_FIELDS, "the student is given as a module")
    elif resolved.variant == "plain" and overrides.get("width") is not None:
        refuse(overrides, ("width",), "variant='plain' has no width to choose")
    if teacher is None:
        for name in (*TEACHER_FIELDS, "classes_by", *DistillConfig.model_fields):
            value = overrides.get(name)
            if value is not None and not (name in ("alpha", "feature_weight") and value == 0):
                raise ValueError(f"{name}: needs a teacher, and there is none (got {value!r})")
    elif resolved.alpha == 0 and resolved.feature_weight == 0:
        raise ValueError("teacher: with alpha=0 and feature_weight=0 it teaches nothing")
    changed = {n: value for n, value in overrides.items() if getattr(resolved, n) != _DEFAULTS[n]}
    if resolved.alpha == 0:
        refuse(changed, LOGIT_FIELDS, "alpha is 0")
    if resolved.feature_weight == 0:
        refuse(changed, FEATURE_FIELDS, "feature_weight is 0")
    if resolved.augment == "none":
        refuse(overrides, ("repeated_aug",), "with augment='none' all copies would be equal")
    for idle, names, reason in _idle(resolved):
        if idle:
            warn_idle(changed, names, reason)


def _idle(recipe: Recipe) -> list[tuple[bool, tuple[str, ...], str]]:
    """List (condition, fields, reason): where the condition holds, the fields do nothing."""
    no_temperature = not has_temperature(find_loss(recipe.logit_loss))
    random = f"augment={recipe.augment!r} leaves timm's random transforms out"
    return [
        (recipe.augment in ("none", "dataset"), RANDOM_FIELDS, random),
        (no_temperature, ("tau",), f"{recipe.logit_loss!r} has no temperature"),
        (not recipe.mixes, ("mixup_prob", "mixup_switch_prob"), "Mixup and CutMix are off"),
        (recipe.ema_decay is None, ("ema_warmup",), "there is no EMA"),
        (recipe.warmup_epochs == 0, ("warmup_lr",), "there is no warm-up"),
        (not optim.ends_at_min_lr(recipe), ("min_lr",), f"sched={recipe.sched!r} has none"),
        (not optim.takes_adam_eps(recipe.opt), ("adam_eps",), f"opt={recipe.opt!r} has none"),
        (recipe.auto_augment is not None, ("color_jitter",), "auto_augment takes its place"),
        (not recipe.labels, ("label_smoothing",), "with labels=False there is no cross-entropy"),
    ]


def warn_idle(given: Mapping[str, Any], names: Iterable[str], reason: str) -> None:
    for name in names:
        if name in given:
            logger.warning("%s=%r has no effect: %s", name, given[name], reason)


def _check_unlabeled(recipe: Recipe, teacher: Any, overrides: Mapping[str, Any]) -> None:
    if teacher is None:
        raise ValueError("labels: expected a teacher where labels=False, got none")
    if recipe.mixes:
        raise ValueError("labels: Mixup and CutMix mix labels; set mixup=0 and cutmix=0")
    if overrides.get("ce_weight") is not None:
        refuse(overrides, ("ce_weight",), "with labels=False there is no cross-entropy")
    if recipe.alpha > 0 and find_loss(recipe.logit_loss).load().needs_target:
        raise ValueError(f"labels: logit_loss={recipe.logit_loss!r} looks at them")


def build_engine(
    built: BuiltStudent, teacher: Teacher | None, recipe: Recipe, world: World, updates: int
) -> Engine:
    """Build task, optimizer and all else that an epoch of so many updates changes."""
    student, spec, num_classes, _ = built
    mixup = None
    if recipe.mixes:
        if num_classes is None:
            raise ValueError("num_classes: Mixup needs it, student and data do not define it")
        mixup = create_mixup(recipe, num_classes, recipe.label_smoothing)
    # Before taps look at the student, so that the copy is of the bare model.
    ema = None
    if recipe.ema_decay is not None:
        ema = ModelEmaV3(student, decay=recipe.ema_decay, use_warmup=recipe.ema_warmup)
    if teacher is not None:
        teacher = teacher.to(world.device)
    task = build_task(student, teacher, recipe, torch.zeros(1, *spec.size, device=world.device))
    optimizer, scheduler = optim.build_optimizer(task, recipe, updates)
    augment = device_augment(recipe, spec)
    return Engine(
        task,
        teacher if task.needs_logits or task.needs_tokens else None,
        optimizer,
        scheduler,
        config=recipe,
        world=world,
        ema=ema,
        augment=None if augment is None else augment.to(world.device),
        mixup=mixup,
    )


def resolve_teacher(teacher: Any, config: TeacherConfig, spec: InputSpec) -> Teacher | None:
    """Open a teacher, frozen and on the CPU, for images that are normalized for the student."""
    if teacher is None:
        return None
    size, checkpoint = config.teacher_img_size, config.teacher_checkpoint
    is_module = isinstance(teacher, nn.Module)
    if checkpoint is not None and (is_module or open_model.names_a_file("train", teacher)):
        raise ValueError("teacher_checkpoint: holds weights for a teacher given by its timm name")
    if isinstance(teacher, Teacher):
        if size is not None:
            raise ValueError("teacher_img_size: a Teacher has an input_size of its own")
        resolved = teacher
    elif is_module:
        resolved = create_teacher(teacher, input_size=size)
    else:
        what = f"teacher: {teacher} (teacher_img_size={size})"
        with naming(what, (ValueError, TypeError, OSError)):
            opened = open_model.open_model(
                teacher, checkpoint=checkpoint, img_size=size, caller="train"
            )
        resolved = as_teacher(opened, built_for=size)
    resolved.set_input_stats(spec.mean, spec.std)
    return resolved
