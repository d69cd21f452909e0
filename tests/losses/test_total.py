"""The total of arXiv 2511.15572: (1 - alpha) CE + alpha KD + w feature."""

import pytest
import torch
import torch.nn.functional as F

from fastkd.losses import DistillationLoss, FeatureKD, HardKD, SoftKD
from fastkd.tokens import Tokens

GENERATOR = torch.Generator().manual_seed(0)
LOGITS, TEACHER_LOGITS = (torch.randn(4, 5, generator=GENERATOR) for _ in range(2))
TARGET = torch.tensor([0, 3, 1, 4])
STUDENT, TEACHER = ({0: Tokens(torch.randn(4, 9, 6, generator=GENERATOR), (3, 3))} for _ in "st")


def test_total_is_the_weighted_sum_of_its_parts():
    terms = DistillationLoss(SoftKD(2.0, weight=0.9), FeatureKD(pairs=((0, 0),), weight=0.2), 0.1)
    parts = terms(LOGITS, TARGET, TEACHER_LOGITS, STUDENT, TEACHER)
    cross_entropy = F.cross_entropy(LOGITS, TARGET, label_smoothing=0.1)
    kl = 4 * F.kl_div(
        (LOGITS / 2).log_softmax(-1), (TEACHER_LOGITS / 2).softmax(-1), reduction="batchmean"
    )
    mse = F.mse_loss(STUDENT[0].data, TEACHER[0].data)
    torch.testing.assert_close(parts["loss"], 0.1 * cross_entropy + 0.9 * kl + 0.2 * mse)
    assert set(parts) == set(terms.names) == {"loss", "ce", "soft_kd", "feature"}


def test_parts_are_unweighted():
    parts = DistillationLoss(feature=FeatureKD(pairs=((0, 0),), weight=0.01))(
        LOGITS, TARGET, None, STUDENT, TEACHER
    )
    torch.testing.assert_close(parts["feature"], F.mse_loss(STUDENT[0].data, TEACHER[0].data))


def test_without_a_logit_term_cross_entropy_counts_in_full():
    parts = DistillationLoss(feature=FeatureKD(pairs=((0, 0),), weight=0.2))(
        LOGITS, TARGET, None, STUDENT, TEACHER
    )
    torch.testing.assert_close(parts["loss"], parts["ce"] + 0.2 * parts["feature"])


def test_without_terms_the_total_is_cross_entropy():
    parts = DistillationLoss(label_smoothing=0.1)(LOGITS, TARGET)
    torch.testing.assert_close(parts["loss"], F.cross_entropy(LOGITS, TARGET, label_smoothing=0.1))


def test_soft_targets_are_not_smoothed_again():
    soft = torch.rand(4, 5, generator=GENERATOR).softmax(-1)
    expected = -(soft * LOGITS.log_softmax(-1)).sum(-1).mean()
    parts = DistillationLoss(label_smoothing=0.1)(LOGITS, soft)
    torch.testing.assert_close(parts["ce"], expected)


def test_hard_distillation_takes_the_logit_terms_place():
    terms = DistillationLoss(HardKD(weight=0.5))
    parts = terms(LOGITS, TARGET, TEACHER_LOGITS)
    torch.testing.assert_close(parts["loss"], 0.5 * parts["ce"] + 0.5 * parts["hard_kd"])


def test_a_term_without_its_teacher_output_is_an_error():
    with pytest.raises(ValueError, match="soft_kd needs teacher_logits"):
        DistillationLoss(SoftKD(weight=0.5))(LOGITS, TARGET)


def test_alpha_above_one_is_refused():
    with pytest.raises(ValueError, match=r"alpha must lie in \[0, 1\]"):
        DistillationLoss(SoftKD(weight=1.5))


def test_a_distance_computed_on_the_way_takes_the_place_of_the_tokens():
    terms = DistillationLoss(SoftKD(weight=0.9), FeatureKD(pairs=((0, 0),), weight=0.2), 0.1)
    expected = terms(LOGITS, TARGET, TEACHER_LOGITS, STUDENT, TEACHER)
    distance = terms.feature(STUDENT, TEACHER)
    assert terms.combine(LOGITS, TARGET, TEACHER_LOGITS, distance) == expected


def test_a_feature_term_without_its_distance_is_an_error():
    with pytest.raises(ValueError, match="feature term needs its distance"):
        DistillationLoss(feature=FeatureKD()).combine(LOGITS, TARGET)
