"""Feature-map distillation as a `TrainingTask` for timm's own train loop."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from typing import Any, Literal

import timm
import torch
from timm.models import group_parameters
from timm.utils import unwrap_model
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fastkd.config import Recipe
from fastkd.data.classes import require_same_classes
from fastkd.inference.create_teacher import create_teacher
from fastkd.inference.open_model import Source, classes_of
from fastkd.integrations.timm_arguments import (
    check_ready_terms,
    data_config,
    described_terms,
    example_input,
    refuse_arguments_of_timm,
    tap_ready_term,
)
from fastkd.losses import DistillationLoss
from fastkd.losses.base import FeatureTerm, LogitTerm
from fastkd.models import TapOutput, Taps, Teacher
from fastkd.training.task import DistillationTask, build_feature_term, build_logit_term

try:
    from timm.task import DistillationTeacher, TrainingTask, resolve_classification_loss
except ImportError as error:
    raise ImportError(
        "fastkd.integrations.timm extends the training tasks of timm >= 1.0.31, found timm "
        f"{timm.__version__}: pip install -U timm"
    ) from error

__all__ = ["FeatureMapDistillationTask"]

logger = logging.getLogger("fastkd")


class FeatureMapDistillationTask(TrainingTask):
    """Distill token maps of chosen blocks, and logits, in timm's train loop.

    The loss is task_loss_weight * criterion + alpha * logit loss + feature_weight * feature loss.

    timm's `FeatureDistillationTask` compares one pooled vector per image; this one compares the
    tokens of pairs of blocks, with fastkd's losses and projectors. In timm's ``train.py``, use it
    in place of that task, which ``--kd-model-name NAME --kd-distill-type feature`` selects::

        from fastkd.integrations.timm import FeatureMapDistillationTask

        task = FeatureMapDistillationTask(
            model, args.kd_model_name, criterion=train_loss_fn,
            recipe="lift_softkd_spectral",  # or alpha=0.9, feature_loss="spectral", pairs=...
            device=device, dtype=model_dtype, verbose=utils.is_primary(args),
        )

    The import also registers ``--model deit_tiny_lift_patch16_224``. The optimizer takes
    ``task.get_trainable_module()`` (student and projectors), EMA averages both, and checkpoints
    hold the bare student under ``state_dict`` and the projectors under ``task_state``. Compile
    before `prepare_distributed`, as timm does; DDP needs no ``find_unused_parameters``.

    Args:
        student_model: any timm model, or a module whose layers are paired by name.
        teacher_model: any source that `fastkd.create_teacher` takes, timm's `DistillationTeacher`,
            or fastkd's `Teacher`. It is frozen and fed images in its own statistics and size. A
            named one has the student's channels and, where logits are compared, needs weights for
            the student's number of classes.
        criterion: the task loss on (logits, target); None: timm's `create_classification_loss`.
        criterion_kwargs: its arguments when ``criterion`` is None.
        teacher_pretrained_path: ``checkpoint`` of `create_teacher`, for a named teacher.
        teacher_pretrained_cfg_overlay: overrides of the named teacher's ``pretrained_cfg``.
        task_loss_weight: of the criterion; None: the recipe's ``ce_weight``, or 1 - alpha.
        logit: a ready logit term, such as `SoftKD(tau, alpha)`.
        feature: a ready feature term, such as `FeatureKD`; its pairs are module names, or count
            blocks from the front.
        recipe: where there are no ready terms: a recipe's name, file or object, of which the group
            "distillation" is taken; None: the defaults of `fastkd.train`.
        device: of the terms, the criterion and the teacher.
        dtype: of the terms, and of a teacher given by name.
        verbose: log what is distilled.
        classes_by: ``"name"``: where student and teacher name their classes and logits are
            compared, the names must be equal; ``"number"``: they may differ.
        **options: single fields of that group, such as ``alpha``, ``tau``, ``feature_loss``,
            ``pairs``, ``projector``, ``feature_weight``. Beside a ready feature term:
            ``student_prefix`` and ``teacher_prefix``, for layers tapped by name.

    Attributes:
        teacher: the `fastkd.models.Teacher`. Its ``set_input_stats(mean, std)`` sets what images
            are normalized with, where that is not what timm's loaders take for the student
            (``--mean``). Statistics that were set on a ready `Teacher` are kept.

    Raises:
        ValueError: nothing to distill, options beside ready terms, an option of another group, a
            named teacher without weights, logits of other classes, or what `fastkd.train` would
            refuse.
        TypeError: ``logit`` or ``feature`` is no term, or an argument of timm's own tasks is given.
        FileNotFoundError: the teacher's file is missing.
        RuntimeError: the teacher's weights cannot be downloaded.
    """

    def __init__(
        self,
        student_model: nn.Module,
        teacher_model: Source,
        criterion: nn.Module | Callable[..., Tensor] | None = None,
        criterion_kwargs: dict[str, Any] | None = None,
        teacher_pretrained_path: str | None = None,
        teacher_pretrained_cfg_overlay: dict[str, Any] | None = None,
        task_loss_weight: float | None = None,
        logit: LogitTerm | None = None,
        feature: FeatureTerm | None = None,
        recipe: str | os.PathLike[str] | Recipe | None = None,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
        verbose: bool = True,
        classes_by: Literal["name", "number"] = "name",
        **options: Any,
    ) -> None:
        super().__init__(device=device, dtype=dtype, verbose=verbose)
        refuse_arguments_of_timm(options)
        settings: Recipe | None = None
        if logit is None and feature is None:
            settings = described_terms(recipe, options, task_loss_weight)
            logit, task_loss_weight = build_logit_term(settings), settings.ce_weight
        else:
            check_ready_terms(logit, feature, recipe, options)
        student = unwrap_model(student_model)  # a compiled model hides its blocks from taps
        teacher = _resolve_teacher(
            teacher_model,
            student,
            pretrained_path=teacher_pretrained_path,
            overlay=teacher_pretrained_cfg_overlay,
            compares_logits=logit is not None,
            dtype=self.dtype,
        )
        if logit is not None:
            require_same_classes(
                classes_of(student),
                classes_of(teacher.model, teacher.classes),
                by=classes_by,
                caller="FeatureMapDistillationTask",
                of=("student", "teacher"),
                quiet=not verbose,
            )
        # Beside the trainable module, so that neither DDP, EMA nor a checkpoint holds it.
        self.teacher = teacher.to(self.device)
        taps: Taps | None = None
        if settings is not None:
            example = example_input(student, self.device)
            taps, feature = build_feature_term(student, teacher, settings, example)
        elif feature is not None:
            taps = tap_ready_term(feature, student, teacher, options, self.device)
        if logit is None and feature is None:
            raise ValueError(
                "FeatureMapDistillationTask: alpha=0 and feature_weight=0 leave nothing to distill"
            )
        # The criterion is timm's, so the terms have no cross-entropy of their own.
        terms = DistillationLoss(logit, feature, cross_entropy=False).to(self.device, self.dtype)
        self.trainable_module: Any = _TrainableModule(student, terms, taps)
        self.criterion = resolve_classification_loss(
            criterion, self.device, criterion_kwargs=criterion_kwargs
        )
        self.task_loss_weight = _criterion_weight(task_loss_weight, logit)
        if verbose:
            logger.info(
                "FeatureMapDistillationTask: teacher=%s, task_loss_weight=%g, %s",
                *(teacher.name, self.task_loss_weight, terms),
            )

    def forward(self, input: Tensor, target: Tensor) -> dict[str, Tensor]:
        """Compute the losses of one step.

        Args:
            input: [B, C, H, W], normalized for the student.
            target: whatever the criterion takes: class indices [B], or soft targets [B, classes].

        Returns:
            ``"loss"`` (to minimize), ``"output"`` (the student's logits), ``"task_loss"`` and every
            term of distillation, unweighted, under its name.

        Raises:
            TypeError: the student does not return one tensor of logits.
        """
        teacher_output = self.teacher(input.detach())
        losses = self.trainable_module(input, target, teacher_output)
        distillation, output = losses.pop("loss"), losses.pop("output")
        task_loss = self.criterion(output, target)
        total = self.task_loss_weight * task_loss + distillation
        return {"loss": total, "output": output, "task_loss": task_loss, **losses}

    def prepare_distributed(
        self, device_ids: list[Any] | None = None, **ddp_kwargs: Any
    ) -> FeatureMapDistillationTask:
        """Wrap student and terms in DDP; the frozen teacher stays outside."""
        self.trainable_module = DistributedDataParallel(
            self.trainable_module, device_ids=device_ids, **ddp_kwargs
        )
        return self

    def compile(
        self, backend: str = "inductor", mode: str | None = None, **compile_kwargs: Any
    ) -> Any:
        """Compile student with terms, student alone (for evaluation), and teacher."""
        options = {"backend": backend, "mode": mode, **compile_kwargs}
        # Evaluation runs the student without its terms: a graph of its own.
        self.eval_model = torch.compile(self._unwrapped().student, **options)
        # One graph of student and terms, so that the loss is compiled, too.
        self.trainable_module = torch.compile(self.trainable_module, **options)
        self.teacher.compile(**options)
        return self.eval_model

    def get_eval_model(self, module: nn.Module | None = None, ema: bool = False) -> Any:
        """Return the bare student, or its compiled form, which is evaluated and saved."""
        found = super().get_eval_model(module=module, ema=ema)
        inner = None if found is None else unwrap_model(found)
        return inner.student if isinstance(inner, DistillationTask) else found

    def get_clip_parameters(self, exclude_head: bool = False) -> list[nn.Parameter]:
        """Return parameters of student and terms; AGC excludes the student's last two."""
        trainable = self._unwrapped()
        student = list(trainable.student.parameters())
        # The last two are the weight and bias of the head, as timm's own tasks take them.
        return [*(student[:-2] if exclude_head else student), *trainable.terms.parameters()]

    def get_task_state(self, module: nn.Module | None = None, ema: bool = False) -> dict[str, Any]:
        """Return the state of the terms (projectors), for a checkpoint."""
        trainable = self._unwrapped(module, ema)
        state = {} if trainable is None else trainable.terms.state_dict()
        return {"terms": state} if state else {}

    def load_task_state(
        self,
        state: Mapping[str, Any] | None,
        strict: bool = True,
        module: nn.Module | None = None,
        ema: bool = False,
    ) -> None:
        """Load what `get_task_state` returned."""
        trainable = self._unwrapped(module, ema)
        if trainable is None:
            raise RuntimeError("FeatureMapDistillationTask: call setup_ema() before loading it")
        if state and "terms" in state:
            trainable.terms.load_state_dict(state["terms"], strict=strict)
        elif trainable.terms.state_dict():
            logger.warning(
                "the checkpoint holds no projectors of FeatureMapDistillationTask: they start anew"
            )

    def _unwrapped(self, module: nn.Module | None = None, ema: bool = False) -> Any:
        """Student and terms without DDP, EMA or compiler around them; None without EMA."""
        found = self.get_trainable_module(ema=ema) if module is None else module
        return None if found is None else unwrap_model(found)


class _TrainableModule(DistillationTask):
    """Student and terms, grouped by layers for timm's layer-wise learning rates."""

    def group_matcher(self, coarse: bool = False) -> Any:
        """Return the student's layers; the terms belong to the last."""
        if not hasattr(self.student, "group_matcher"):
            return {}
        student: Any = self.student
        layers = group_parameters(student, student.group_matcher(coarse=coarse), reverse=True)
        last = max(layers.values())
        return lambda name: layers.get(name.removeprefix("student."), last)

    def _run_student(
        self, images: Tensor, teacher_output: TapOutput | None
    ) -> tuple[Tensor, Tensor | None]:
        logits, distance = super()._run_student(images, teacher_output)
        if not isinstance(logits, Tensor):
            raise TypeError(
                "FeatureMapDistillationTask: the student must return one tensor of logits, got "
                f"{type(logits).__name__}; two heads are for timm's TokenDistillationTask, and "
                "student.set_distilled_training(False) leaves one"
            )
        return logits, distance


def _criterion_weight(given: float | None, logit: LogitTerm | None) -> float:
    alpha = 0.0 if logit is None else logit.weight
    weight = 1 - alpha if given is None else given
    if weight < 0:
        raise ValueError(
            f"FeatureMapDistillationTask: task_loss_weight must not be negative, got {weight:g} "
            f"(it is 1 - alpha by itself, and the logit term's weight alpha is {alpha:g})"
        )
    return weight


def _resolve_teacher(
    model: Source,
    student: nn.Module,
    *,
    pretrained_path: str | None,
    overlay: dict[str, Any] | None,
    compares_logits: bool,
    dtype: torch.dtype,
) -> Teacher:
    """Open the teacher, and set what timm's loaders normalize images with, unless it is set."""
    channels = getattr(student, "in_chans", 3)
    if isinstance(model, Teacher):
        teacher = model
    elif isinstance(model, DistillationTeacher):
        mean, std = (x.flatten().tolist() for x in (model.mean_kd, model.std_kd))
        teacher = create_teacher(unwrap_model(model.model), mean=mean, std=std)
    elif isinstance(model, nn.Module):
        teacher = create_teacher(unwrap_model(model))
    else:
        teacher = create_teacher(
            model,
            checkpoint=pretrained_path,
            # Without a logit term any head will do.
            num_classes=getattr(student, "num_classes", None) if compares_logits else None,
            in_chans=None if channels == 3 else channels,
            pretrained_cfg_overlay=overlay or None,
        ).to(dtype=dtype)
    config = data_config(student)
    expected = getattr(student, "in_chans", len(teacher.mean or config["mean"]))
    if teacher.scale is None and len(config["mean"]) == expected:
        teacher.set_input_stats(config["mean"], config["std"])
    return teacher
