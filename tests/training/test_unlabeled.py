"""Training on the teacher alone: labels may be missing, and nothing looks at them."""

import pytest
import torch
from torch.utils.data import TensorDataset

from fastkd.losses import DistillationLoss, SoftKD
from fastkd.training import train
from tests.harness.tiny import tensor_data, vit


class Unlabeled(TensorDataset):
    def __getitem__(self, index):
        return super().__getitem__(index)[0], None


@pytest.fixture
def images(data):
    return tuple(Unlabeled(*part.tensors) for part in data)


def test_the_total_without_cross_entropy_is_the_rest():
    torch.manual_seed(0)
    logits, teacher = torch.randn(4, 6), torch.randn(4, 6)
    term = SoftKD(2.0, 0.9)
    parts = DistillationLoss(term, cross_entropy=False)(logits, torch.full((4,), -1), teacher)
    assert set(parts) == {"loss", "soft_kd"}
    torch.testing.assert_close(parts["loss"], 0.9 * term.compare(logits, teacher))


def test_nothing_to_learn_from_is_refused():
    with pytest.raises(ValueError, match="needs logit or feature"):
        DistillationLoss(cross_entropy=False)


def test_features_alone_are_distilled_from_images_without_labels(images, fast):
    result = train(
        vit(), vit(24, seed=1), images, **fast | {"epochs": 6}, labels=False, projector="linear"
    )
    losses = [record["eval_loss"] for record in result.history]
    assert losses[-1] < losses[0]
    assert (result.top1, result.best_top1) == (None, None)
    assert result.best_epoch == losses.index(min(losses)) + 1
    assert "lowest loss" in result.best_rule
    assert "ce" not in result.history[0]
    assert "loss after epoch 6" in result.summary()


def test_labels_of_the_evaluation_set_are_counted_where_logits_are_taught(images, fast):
    teacher = vit(24, seed=1)
    labeled = tensor_data()
    options = fast | {"epochs": 12, "lr": 1e-2}
    train(teacher, None, labeled, **options)
    data = (images[0], labeled[1])
    result = train(vit(), teacher, data, **options, labels=False, alpha=1.0, feature_weight=0.0)
    assert result.top1 > 50
    assert "top-1" in result.best_rule


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"teacher": None}, "labels: expected a teacher"),
        ({"feature_weight": 0.0}, "it teaches nothing"),
        ({"mixup": 0.8}, "mix labels"),
        ({"ce_weight": 0.5}, "no cross-entropy"),
    ],
)
def test_what_labels_would_be_needed_for_is_refused(images, fast, options, message):
    options = {"teacher": vit(seed=1), **options}
    with pytest.raises(ValueError, match=message):
        train(vit(), data=images, **fast, labels=False, **options)


def test_missing_labels_are_an_error_where_they_are_needed(images, fast):
    with pytest.raises(ValueError, match="labels"):
        train(vit(), vit(seed=1), images, **fast)


def test_every_evaluation_hides_the_same_tokens(images, fast):
    """Else the epochs' losses, by which the best is picked, would differ by what ViTKD drew."""
    still = {"lr": 1e-30, "min_lr": 0.0, "weight_decay": 0.0, "ema_decay": None}
    options = fast | still | {"labels": False, "feature_loss": "vitkd"}
    history = train(vit(), vit(24, seed=1), images, **options).history
    assert history[0]["eval_feature"] == history[1]["eval_feature"]
    assert history[0]["feature"] != history[1]["feature"]
