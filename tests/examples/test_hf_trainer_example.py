"""The Hugging Face example trains."""

import pytest
import torch

from tests.training.tiny import tensor_data

transformers = pytest.importorskip(
    "transformers", reason="the Trainer example needs `pip install transformers accelerate`"
)
pytest.importorskip("accelerate", reason="transformers' Trainer needs `pip install accelerate`")


def tiny_vit(width):
    torch.manual_seed(width)
    config = transformers.ViTConfig(
        hidden_size=width,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=2 * width,
        image_size=8,
        patch_size=4,
        num_channels=1,
        num_labels=6,
    )
    return transformers.ViTForImageClassification(config)


def last_block(model):
    """Its name, which is another in transformers 4 than in 5."""
    return [name for name, part in model.named_modules() if type(part).__name__ == "ViTLayer"][-1]


def test_the_trainer_example_trains_student_and_projector_and_not_the_teacher(
    tmp_path, monkeypatch
):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    from tests.examples.hf_trainer_example import Distiller, collate

    student, teacher = tiny_vit(16), tiny_vit(24)
    model = Distiller(student, teacher, (last_block(student), last_block(teacher)))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=24,
        per_device_train_batch_size=16,
        learning_rate=3e-3,
        logging_steps=4,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = transformers.Trainer(
        model, arguments, train_dataset=tensor_data(48)[0], data_collator=collate
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert float(losses[-1]) < 0.9 * float(losses[0])
    changed = {name for name, value in model.state_dict().items() if not value.equal(before[name])}
    assert "loss.feature.projectors.0.weight" in changed
    assert "student.classifier.weight" in changed
    assert not any(name.startswith("teacher") for name in changed)
    student.save_pretrained(tmp_path / "student")
    loaded = transformers.ViTForImageClassification.from_pretrained(tmp_path / "student")
    assert loaded.classifier.weight.equal(student.classifier.weight)
