"""The total of arXiv 2511.15572: (1 - alpha) CE + alpha KD + w feature."""

import math

import pytest
import timm.optim
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


def test_alpha_above_one_is_taken_beside_a_cross_entropy_of_its_own_weight():
    parts = DistillationLoss(SoftKD(weight=1.5), ce_weight=0.5)(LOGITS, TARGET, TEACHER_LOGITS)
    torch.testing.assert_close(parts["loss"], 0.5 * parts["ce"] + 1.5 * parts["soft_kd"])


def test_alpha_above_one_is_taken_without_cross_entropy():
    terms = DistillationLoss(SoftKD(weight=1.5), cross_entropy=False)
    parts = terms(LOGITS, TARGET, TEACHER_LOGITS)
    assert set(parts) == {"loss", "soft_kd"}
    torch.testing.assert_close(parts["loss"], 1.5 * parts["soft_kd"])


@pytest.mark.parametrize("weight", [-0.1, math.nan, math.inf])
@pytest.mark.parametrize(
    ("build", "name"),
    [
        (lambda weight: DistillationLoss(SoftKD(weight=weight), ce_weight=1.0), "SoftKD: weight"),
        (
            lambda weight: DistillationLoss(HardKD(weight=weight), cross_entropy=False),
            "HardKD: weight",
        ),
        (lambda weight: DistillationLoss(feature=FeatureKD(weight=weight)), "FeatureKD: weight"),
        (lambda weight: DistillationLoss(ce_weight=weight), "DistillationLoss: ce_weight"),
    ],
)
def test_a_weight_that_is_negative_or_no_number_is_refused(build, name, weight):
    message = f"{name} must be finite and >= 0, got {weight}"
    with pytest.raises(ValueError, match=message):
        build(weight)


def test_a_weight_of_the_cross_entropy_without_one_is_refused():
    with pytest.raises(ValueError, match=r"ce_weight needs cross_entropy, got ce_weight=0\.5"):
        DistillationLoss(SoftKD(weight=0.5), cross_entropy=False, ce_weight=0.5)


def test_no_term_at_all_is_refused():
    with pytest.raises(ValueError, match="needs logit or feature"):
        DistillationLoss(cross_entropy=False)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_cross_entropy_of_half_precision_logits_is_that_of_float32(dtype):
    logits = LOGITS.to(dtype)
    parts = DistillationLoss()(logits, TARGET)
    torch.testing.assert_close(parts["ce"], F.cross_entropy(logits.float(), TARGET))


def test_an_empty_batch_costs_nothing():
    logits = torch.zeros(0, 5, requires_grad=True)
    maps = {0: Tokens(torch.zeros(0, 9, 6), (3, 3))}
    terms = DistillationLoss(SoftKD(weight=0.9), FeatureKD(pairs=((0, 0),), weight=0.2), 0.1)
    parts = terms(logits, TARGET[:0], torch.zeros(0, 5), maps, maps)
    parts["loss"].backward()
    assert {name: value.item() for name, value in parts.items()} == dict.fromkeys(terms.names, 0)


def test_timms_optimizers_leave_the_angles_of_orthogonal_projectors_undecayed():
    terms = DistillationLoss(feature=FeatureKD("vkd", ((0, 0),), 1.0, "orthogonal", {0: 3}, {0: 4}))
    assert terms.no_weight_decay() == {"feature.projectors.0.parametrizations.weight.original"}
    groups = timm.optim.create_optimizer_v2(terms, "adamw", weight_decay=0.1).param_groups
    assert [group["weight_decay"] for group in groups] == [0]


def test_timms_optimizers_decay_plain_projectors():
    terms = DistillationLoss(feature=FeatureKD("mse", ((0, 0),), 1.0, "linear", {0: 3}, {0: 4}))
    assert terms.no_weight_decay() == set()
    groups = timm.optim.create_optimizer_v2(terms, "adamw", weight_decay=0.1).param_groups
    decayed = {p for group in groups if group["weight_decay"] > 0 for p in group["params"]}
    assert decayed == {terms.feature.projectors[0].weight}


def test_a_distance_computed_on_the_way_takes_the_place_of_the_tokens():
    terms = DistillationLoss(SoftKD(weight=0.9), FeatureKD(pairs=((0, 0),), weight=0.2), 0.1)
    expected = terms(LOGITS, TARGET, TEACHER_LOGITS, STUDENT, TEACHER)
    distance = terms.feature.compare(STUDENT, TEACHER)
    assert terms.combine(LOGITS, TARGET, TEACHER_LOGITS, distance) == expected


def test_a_feature_term_without_its_distance_is_an_error():
    with pytest.raises(ValueError, match="feature term needs its distance"):
        DistillationLoss(feature=FeatureKD()).combine(LOGITS, TARGET)
