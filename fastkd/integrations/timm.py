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
from fastkd.inference.loading import Source, classes_of
from fastkd.inference.teacher import create_teacher
from fastkd.integrations.timm_terms import (
    DescribedTerms,
    ReadyTerms,
    data_config,
    refuse_arguments_of_timm,
)
from fastkd.losses import DistillationLoss
from fastkd.losses.base import FeatureTerm, LogitTerm
from fastkd.models import TapOutput, Teacher
from fastkd.training.task import DistillationTask

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
    r"""Distils token maps of chosen blocks, and logits, in timm's train loop.

    .. math:: L = w_{task} \, criterion + \alpha \, L_{logit} + w \, L_{feature}

    timm's `FeatureDistillationTask` compares one pooled vector an image; this one compares the
    tokens of pairs of blocks, with fastkd's losses and projectors. In timm's ``train.py``, put it
    in that task's place, which ``--kd-model-name NAME --kd-distill-type feature`` asks for
    (student_model is its ``model``)::

        from fastkd.integrations.timm import FeatureMapDistillationTask

        task = FeatureMapDistillationTask(
            model, args.kd_model_name, criterion=train_loss_fn,
            recipe="lift_softkd_spectral",  # or alpha=0.9, feature_loss="spectral", pairs=...
            device=device, dtype=model_dtype, verbose=utils.is_primary(args),
        )

    The import also makes ``--model deit_tiny_lift_patch16_224`` known. Everything else of the
    script stays as it is: the optimiser takes ``task.get_trainable_module()`` (student and
    projectors), EMA averages both, and checkpoints hold the bare student under ``state_dict``,
    where ``timm.create_model(..., checkpoint_path=)`` finds it, and the projectors under
    ``task_state``. Lift students run fused, as in `fastkd.train`.

    Compile before `prepare_distributed`, as timm does; DDP then wraps student and terms, never the
    teacher, and needs no ``find_unused_parameters``.

    Args:
        student_model: any timm model, or a module whose layers are paired by name.
        teacher_model: any source that `fastkd.create_teacher` takes, timm's `DistillationTeacher`,
            or fastkd's `Teacher`. It is frozen, stays in eval mode, and is
            fed images in its own statistics and size. A named one has the student's channels, and
            weights; where logits are compared, with a head of the student's classes.
        criterion: the task loss on (logits, target). Made by timm's `create_classification_loss`
            when None.
        criterion_kwargs: its arguments when ``criterion`` is None.
        teacher_pretrained_path: weights where ``teacher_model`` is a name, as `create_teacher`'s
            ``checkpoint``.
        teacher_pretrained_cfg_overlay: overrides of the name's ``pretrained_cfg``.
        task_loss_weight: of the criterion; None: the recipe's ``ce_weight``, or where it has none
            :math:`1 - \alpha`, as in `fastkd.train`.
        logit: a ready logit term, such as `SoftKD(tau, alpha)`.
        feature: a ready feature term, such as `FeatureKD`; its pairs are module names, or count
            blocks from the front.
        recipe: where there are no ready terms: a recipe's name, file or object, of which the group
            "distillation" is taken; None: the defaults of `fastkd.train`.
        device: of the terms and the criterion, and of the teacher, which is moved there.
        dtype: of the terms, and of a teacher given by name.
        verbose: log what is distilled.
        classes_by: ``"name"``: where student and teacher name their classes and logits are
            compared, each must be called the same; ``"number"``: whatever they are called.
        **options: single fields of that group, such as ``alpha``, ``tau``, ``feature_loss``,
            ``pairs``, ``projector``, ``feature_weight``; widths are found out. Beside a ready
            feature term: ``student_prefix`` and ``teacher_prefix``, for layers tapped by name.

    Attributes:
        teacher: the `fastkd.models.Teacher`. Its ``set_input_stats(mean, std)`` says what images
            are normalised with, where that is not what timm's loaders take for the student
            (``--mean``). A ready `Teacher` that has been told before keeps what it was told.

    Raises:
        ValueError: nothing to distil, options beside ready terms, an option of another group, a
            named teacher without weights, logits of other classes, or what `fastkd.train`
            would refuse: unknown blocks, widths that do not meet.
        TypeError: ``logit`` or ``feature`` is no term, or an argument of timm's own tasks is given.
        FileNotFoundError: the teacher's file is not there.
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
        described = (recipe, options, task_loss_weight)
        terms: DescribedTerms | ReadyTerms
        if logit is None and feature is None:
            terms = DescribedTerms(*described)
        else:
            terms = ReadyTerms(logit, feature, *described)
        student = unwrap_model(student_model)
        teacher = _resolve_teacher(
            teacher_model,
            student,
            pretrained_path=teacher_pretrained_path,
            overlay=teacher_pretrained_cfg_overlay,
            compares_logits=terms.compares_logits,
            dtype=self.dtype,
        )
        if terms.compares_logits:
            require_same_classes(
                classes_of(student),
                classes_of(teacher.model, teacher.classes),
                by=classes_by,
                caller="FeatureMapDistillationTask",
                of=("student", "teacher"),
                quiet=not verbose,
            )
        _say_input_statistics(teacher, student)
        self.teacher = teacher.to(self.device)
        logit, feature, taps = terms.build(student, teacher, self.device)
        trainable = _TrainableModule(student, _terms(logit, feature), taps)
        trainable.terms.to(self.device, self.dtype)
        self.trainable_module: Any = trainable
        self.criterion = resolve_classification_loss(
            criterion, self.device, criterion_kwargs=criterion_kwargs
        )
        self.task_loss_weight = _criterion_weight(terms.ce_weight, logit)
        if verbose:
            logger.info(
                "FeatureMapDistillationTask: teacher=%s, task_loss_weight=%g, %s",
                *(teacher.name, self.task_loss_weight, trainable.terms),
            )

    def forward(self, input: Tensor, target: Tensor) -> dict[str, Tensor]:
        """One step's losses.

        Args:
            input: [B, C, H, W], normalised for the student.
            target: whatever the criterion takes: class indices [B], or soft targets [B, classes].

        Returns:
            ``"loss"`` (to minimise), ``"output"`` (the student's logits), ``"task_loss"`` and every
            term of distillation, unweighted, under its name.

        Raises:
            TypeError: the student gives something else than its logits.
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
        """Wrap student and terms in DDP; the teacher has nothing to synchronise.

        Args:
            device_ids: of DDP; None on a CPU.
            **ddp_kwargs: likewise.

        Returns:
            self.
        """
        self.trainable_module = DistributedDataParallel(
            self.trainable_module, device_ids=device_ids, **ddp_kwargs
        )
        return self

    def compile(
        self, backend: str = "inductor", mode: str | None = None, **compile_kwargs: Any
    ) -> Any:
        """Compile student with terms, student alone (for evaluation), and teacher.

        Args:
            backend: of `torch.compile`, as are the others.
            mode: likewise.
            **compile_kwargs: likewise.

        Returns:
            The compiled student.
        """
        options = {"backend": backend, "mode": mode, **compile_kwargs}
        self.eval_model = torch.compile(self._unwrapped().student, **options)
        self.trainable_module = torch.compile(self.trainable_module, **options)
        self.teacher.compile(**options)
        return self.eval_model

    def get_eval_model(self, module: nn.Module | None = None, ema: bool = False) -> Any:
        """The bare student, or its compiled form: what is evaluated and saved.

        Args:
            module: the wrapped module to look into; None: the task's own.
            ema: the averaged student instead.

        Returns:
            The student; None where there is no EMA.
        """
        found = super().get_eval_model(module=module, ema=ema)
        inner = None if found is None else unwrap_model(found)
        return inner.student if isinstance(inner, DistillationTask) else found

    def get_clip_parameters(self, exclude_head: bool = False) -> list[nn.Parameter]:
        """Parameters of student and terms.

        Args:
            exclude_head: leave out the last two of the student, as timm does for AGC.

        Returns:
            The parameters.
        """
        trainable = self._unwrapped()
        student = list(trainable.student.parameters())
        return [*(student[:-2] if exclude_head else student), *trainable.terms.parameters()]

    def get_task_state(self, module: nn.Module | None = None, ema: bool = False) -> dict[str, Any]:
        """State of the terms (projectors): what a checkpoint needs beside the student.

        Args:
            module: the wrapped module to look into; None: the task's own.
            ema: the averaged terms instead.

        Returns:
            ``{"terms": ...}``, or nothing where terms have no state or there is no EMA.
        """
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
        """Load what `get_task_state` gave.

        Args:
            state: None or empty leaves the terms as they are, with a warning if they have a state.
            strict: refuse missing and unexpected entries.
            module: the wrapped module to load into; None: the task's own.
            ema: load into the averaged terms.

        Raises:
            RuntimeError: there is no EMA to load into, or the state does not fit.
        """
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
    """Student and terms, with the layers that timm's layer-wise learning rates ask for."""

    def group_matcher(self, coarse: bool = False) -> Any:
        """Layers of the student; the terms belong to its last."""
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


def _terms(logit: LogitTerm | None, feature: FeatureTerm | None) -> DistillationLoss:
    """The criterion is timm's, so that the cross-entropy is left out."""
    if logit is None and feature is None:
        raise ValueError(
            "FeatureMapDistillationTask: alpha=0 and feature_weight=0 leave nothing to distil"
        )
    return DistillationLoss(logit, feature, cross_entropy=False)


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
    if isinstance(model, Teacher):
        return model
    if isinstance(model, DistillationTeacher):
        mean, std = (x.flatten().tolist() for x in (model.mean_kd, model.std_kd))
        return create_teacher(unwrap_model(model.model), mean=mean, std=std)
    if isinstance(model, nn.Module):
        return create_teacher(unwrap_model(model))
    channels = getattr(student, "in_chans", 3)
    teacher = create_teacher(
        model,
        checkpoint=pretrained_path,
        num_classes=getattr(student, "num_classes", None) if compares_logits else None,
        in_chans=None if channels == 3 else channels,
        pretrained_cfg_overlay=overlay or None,
    )
    return teacher.to(dtype=dtype)


def _say_input_statistics(teacher: Teacher, student: nn.Module) -> None:
    """Tell the teacher how timm's loaders normalise images, unless somebody has told it."""
    if teacher.scale is not None:
        return
    config = data_config(student)
    channels = getattr(student, "in_chans", len(teacher.mean or config["mean"]))
    if len(config["mean"]) == channels:
        teacher.set_input_stats(config["mean"], config["std"])
