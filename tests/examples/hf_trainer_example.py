"""Distillation under Hugging Face's `Trainer`: a module that returns its loss needs no subclass.

One process per GPU (``torchrun`` or ``accelerate launch``): started bare on several GPUs, `Trainer`
copies the module with `nn.DataParallel`, and the taps of a copy would read the original.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fastkd import create_teacher
from fastkd.losses import DistillationLoss, FeatureKD, SoftKD
from fastkd.models import Taps

Statistics = tuple[Sequence[float], Sequence[float]]


class Distiller(nn.Module):
    """Two models of transformers, tapped by module name; the class token is no patch.

    Both maps must lie on one grid; else ``FeatureKD(..., resample="bilinear")``.

    `Trainer`'s checkpoints hold the teacher too. What to keep is
    ``distiller.student.save_pretrained(...)``: the teacher and the projector stay behind.

    Args:
        student: what is trained.
        teacher: what is distilled from.
        pair: names of the layers that are compared, the student's and the teacher's.
        student_stats: ``(image_mean, image_std)`` of the student's image processor, which made the
            images.
        teacher_stats: those of the teacher's.
    """

    def __init__(
        self,
        student: PreTrainedModel,
        teacher: PreTrainedModel,
        pair: tuple[str, str],
        student_stats: Statistics,
        teacher_stats: Statistics,
    ) -> None:
        super().__init__()
        self.student = student
        self.taps = Taps(student, [pair[0]], num_prefix=1)
        mean, std = teacher_stats
        self.teacher = create_teacher(teacher, mean=mean, std=std)  # stays frozen, in eval mode
        self.teacher.set_input_stats(*student_stats)
        self.teacher.tap([pair[1]], num_prefix=1)
        feature = FeatureKD(
            "spectral",
            pairs=[pair],
            weight=0.2,
            projector="linear",
            student_dims={pair[0]: student.config.hidden_size},
            teacher_dims={pair[1]: teacher.config.hidden_size},
        )
        self.loss = DistillationLoss(SoftKD(tau=2.0, weight=0.5), feature, label_smoothing=0.1)

    def forward(self, pixel_values: Tensor, labels: Tensor) -> dict[str, Tensor]:
        if self.taps.model is not self.student:
            raise RuntimeError("Distiller: a copy made by nn.DataParallel; start one process a GPU")
        student, teacher = self.taps(pixel_values), self.teacher(pixel_values)
        losses = self.loss(student.logits, labels, teacher.logits, student.tokens, teacher.tokens)
        return {"loss": losses["loss"], "logits": student.logits}

    def gradient_checkpointing_enable(self, **options: Any) -> None:
        """What `TrainingArguments(gradient_checkpointing=True)` calls."""
        self.student.gradient_checkpointing_enable(**options)

    def activation_checkpointing_enable(self, **options: Any) -> None:
        """Its name in newer releases of transformers."""
        self.student.activation_checkpointing_enable(**options)


def collate(samples: list[tuple[Tensor, int]]) -> dict[str, Tensor]:
    images, labels = zip(*samples, strict=True)
    return {"pixel_values": torch.stack(images), "labels": torch.as_tensor(labels)}
