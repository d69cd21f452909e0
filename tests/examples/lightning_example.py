"""Distillation in a LightningModule: student, frozen teacher, taps on both, one loss."""

import lightning
import torch
from timm.data import resolve_data_config
from torch import nn

from fastkd import create_teacher
from fastkd.losses import DistillationLoss, FeatureKD, SoftKD
from fastkd.models import Taps


class Distiller(lightning.LightningModule):
    """A timm student after a timm teacher: logits, and the token maps of their last blocks.

    The maps must lie on one grid, as those of ViTs with one patch size at one image size do; where
    they do not, ``FeatureKD(..., resample="bilinear")`` brings the teacher's to the student's. The
    teacher's images are renormalized from what the student's loaders use.

    Lightning's checkpoints hold the teacher too. What to keep is
    ``torch.save(model.student.state_dict(), path)``.
    """

    def __init__(self, student: nn.Module, teacher: nn.Module, lr: float = 1e-3) -> None:
        super().__init__()
        self.student, self.lr = student, lr
        self.taps = Taps(student, [-1])
        self.teacher = create_teacher(teacher)  # stays frozen and in eval mode
        images = resolve_data_config({}, model=student)
        self.teacher.set_input_stats(images["mean"], images["std"])
        targets = self.teacher.tap([-1])
        self.loss = DistillationLoss(
            SoftKD(tau=2.0, weight=0.5),
            FeatureKD(
                "spectral",
                pairs=[(self.taps.indices[0], targets.indices[0])],
                weight=0.2,
                projector="linear",  # learned: the optimizer below takes it along
                student_dims=self.taps.dims,
                teacher_dims=targets.dims,
            ),
            label_smoothing=0.1,
        )

    def training_step(self, batch, index):
        images, labels = batch
        student, teacher = self.taps(images), self.teacher(images)
        losses = self.loss(student.logits, labels, teacher.logits, student.tokens, teacher.tokens)
        self.log_dict(losses)  # "loss", "ce", "soft_kd" and "feature"
        return losses["loss"]

    def configure_optimizers(self):
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        return torch.optim.AdamW(trained, self.lr, weight_decay=0.05)
