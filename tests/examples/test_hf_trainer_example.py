"""The Hugging Face example trains, and its teacher sees images in its own statistics."""

import copy

import pytest
import torch

from tests.harness.tiny import tensor_data

HALF = ((0.5,), (0.5,))


def tiny_vit(transformers, width):
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


@pytest.fixture
def distiller(transformers):
    from tests.examples.hf_trainer_example import Distiller

    student, teacher = (tiny_vit(transformers, width) for width in (16, 24))
    pair = last_block(student), last_block(teacher)
    return Distiller(student, teacher, pair, HALF, ((0.4,), (0.2,)))


def arguments(transformers, folder, **options):
    return transformers.TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=16,
        learning_rate=3e-3,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        **options,
    )


def trainer_of(transformers, model, folder, **options):
    from tests.examples.hf_trainer_example import collate

    return transformers.Trainer(
        model,
        arguments(transformers, folder, **options),
        train_dataset=tensor_data(48)[0],
        data_collator=collate,
    )


@pytest.mark.slow
def test_the_trainer_example_trains_student_and_projector_and_not_the_teacher(
    transformers, distiller, tmp_path
):
    before = {name: value.clone() for name, value in distiller.state_dict().items()}
    trainer = trainer_of(transformers, distiller, tmp_path, max_steps=24, logging_steps=4)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert float(losses[-1]) < 0.9 * float(losses[0])
    state = distiller.state_dict()
    changed = {name for name, value in state.items() if not value.equal(before[name])}
    assert "loss.feature.projectors.0.weight" in changed
    assert "student.classifier.weight" in changed
    assert not any(name.startswith("teacher") for name in changed)
    distiller.student.save_pretrained(tmp_path / "student")
    loaded = transformers.ViTForImageClassification.from_pretrained(tmp_path / "student")
    assert loaded.classifier.weight.equal(distiller.student.classifier.weight)


@pytest.mark.slow
def test_the_trainer_examples_teacher_sees_its_own_statistics(distiller):
    raw = torch.rand(2, 1, 8, 8)
    prepared = distiller.teacher.prepare((raw - 0.5) / 0.5)
    torch.testing.assert_close(prepared, (raw - 0.4) / 0.2)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # its name is about to change
def test_the_trainer_turns_on_gradient_checkpointing_in_the_student(
    transformers, distiller, tmp_path
):
    options = {"max_steps": 1, "gradient_checkpointing": True}
    trainer_of(transformers, distiller, tmp_path, **options).train()
    assert distiller.student.is_gradient_checkpointing
    assert not distiller.teacher.model.is_gradient_checkpointing


def test_a_copy_made_by_data_parallel_is_refused(distiller):
    replica = distiller._replicate_for_data_parallel()
    replica.student = copy.deepcopy(distiller.student)
    with pytest.raises(RuntimeError, match="one process a GPU"):
        replica(torch.rand(2, 1, 8, 8), torch.tensor([0, 1]))
