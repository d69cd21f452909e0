"""The Lightning example trains, and its teacher sees images in its own statistics."""

import logging

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from tests.harness.tiny import tensor_data, vit


@pytest.mark.filterwarnings("ignore")
def test_the_lightning_example_trains_student_and_projector_and_not_the_teacher(
    lightning, tmp_path
):
    from tests.examples.lightning_example import Distiller

    values = []

    class Losses(lightning.Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, index):
            values.append(float(outputs["loss"]))

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    data = DataLoader(TensorDataset(*tensor_data(48)[0].tensors), batch_size=16)
    torch.manual_seed(0)
    model = Distiller(vit(), vit(24, seed=1), lr=3e-3)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trainer = lightning.Trainer(
        max_epochs=8,
        accelerator="cpu",
        devices=1,
        callbacks=[Losses()],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    trainer.fit(model, data)
    assert sum(values[-3:]) < 0.9 * sum(values[:3])
    changed = {name for name, value in model.state_dict().items() if not value.equal(before[name])}
    assert "loss.feature.projectors.0.weight" in changed
    assert "student.head.weight" in changed
    assert not any(name.startswith("teacher") for name in changed)
    assert {"loss", "ce", "soft_kd", "feature"} <= set(trainer.callback_metrics)
    kept = vit(seed=7)
    kept.load_state_dict(model.student.state_dict())


def test_the_lightning_examples_teacher_sees_its_own_statistics(lightning):
    from tests.examples.lightning_example import Distiller

    student, teacher = vit(), vit(24, seed=1)
    student.pretrained_cfg = {"mean": (0.5,), "std": (0.5,)}
    teacher.pretrained_cfg = {"mean": (0.4,), "std": (0.2,)}
    raw = torch.rand(2, 1, 8, 8)
    prepared = Distiller(student, teacher).teacher.prepare((raw - 0.5) / 0.5)
    torch.testing.assert_close(prepared, (raw - 0.4) / 0.2)
