"""Distillation under Hugging Face's `Trainer`: a module that returns its loss needs no subclass."""

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fastkd.losses import DistillationLoss, FeatureKD, SoftKD
from fastkd.models import Taps, create_teacher


class Distiller(nn.Module):
    """Two models of transformers, tapped by module name; the class token is no patch.

    Save ``distiller.student.save_pretrained(...)``: the teacher and the projector stay behind.
    """

    def __init__(
        self, student: PreTrainedModel, teacher: PreTrainedModel, pair: tuple[str, str]
    ) -> None:
        super().__init__()
        self.student = student
        self.taps = Taps(student, [pair[0]], num_prefix=1)
        self.teacher = create_teacher(teacher)  # stays frozen and in eval mode
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
        student, teacher = self.taps(pixel_values), self.teacher(pixel_values)
        losses = self.loss(student.logits, labels, teacher.logits, student.tokens, teacher.tokens)
        return {"loss": losses["loss"], "logits": student.logits}


def collate(samples: list[tuple[Tensor, int]]) -> dict[str, Tensor]:
    images, labels = zip(*samples, strict=True)
    return {"pixel_values": torch.stack(images), "labels": torch.as_tensor(labels)}
