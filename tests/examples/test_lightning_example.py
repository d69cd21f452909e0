"""The Lightning example trains."""

import logging

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from tests.training.tiny import tensor_data, vit

lightning = pytest.importorskip(
    "lightning", reason="the Lightning example needs `pip install lightning`"
)


class Losses(lightning.Callback):
    def __init__(self) -> None:
        self.values = []

    def on_train_batch_end(self, trainer, module, outputs, batch, index):
        self.values.append(float(outputs["loss"]))


@pytest.mark.filterwarnings("ignore")
def test_the_lightning_example_trains_student_and_projector_and_not_the_teacher(tmp_path):
    from tests.examples.lightning_example import Distiller

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    data = DataLoader(TensorDataset(*tensor_data(48)[0].tensors), batch_size=16)
    torch.manual_seed(0)
    model, losses = Distiller(vit(), vit(24, seed=1), lr=3e-3), Losses()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trainer = lightning.Trainer(
        max_epochs=8,
        accelerator="cpu",
        devices=1,
        callbacks=[losses],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    trainer.fit(model, data)
    assert sum(losses.values[-3:]) < 0.9 * sum(losses.values[:3])
    changed = {name for name, value in model.state_dict().items() if not value.equal(before[name])}
    assert "loss.feature.projectors.0.weight" in changed
    assert "student.head.weight" in changed
    assert not any(name.startswith("teacher") for name in changed)
    assert {"loss", "ce", "soft_kd", "feature"} <= set(trainer.callback_metrics)
