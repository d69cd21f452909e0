"""A loss called alone is its weight times its distance; sums take the distance and weight it."""

import inspect

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastkd import losses
from fastkd.losses import (
    DistillationLoss,
    FeatureKD,
    FeatureTerm,
    LiftKD,
    LogitTerm,
    SoftKD,
    create_feature_loss,
    create_logit_loss,
    registry,
)
from fastkd.tokens import Tokens

GRID, DIMS = (3, 4), ({0: 6, 1: 6}, {0: 8, 1: 8})
LOGIT, FEATURE = (
    registry.names(entries) for entries in (registry.LOGIT_LOSSES, registry.FEATURE_LOSSES)
)
LABELS = torch.tensor([0, 1, 2, 3])


def logits(seed: int) -> Tensor:
    return torch.randn(4, 5, generator=torch.Generator().manual_seed(seed))


def maps(seed: int, dims: dict[int, int]) -> dict[int, Tokens]:
    generator = torch.Generator().manual_seed(seed)
    return {
        k: Tokens(torch.randn(4, 12, dim, generator=generator), GRID) for k, dim in dims.items()
    }


def feature_term(name: str, weight: float) -> FeatureTerm:
    torch.manual_seed(0)
    projector = "none" if registry.find_loss(name).projects else "linear"
    return create_feature_loss(
        name,
        ((0, 0), (1, 1)),
        weight=weight,
        projector=projector,
        student_dims=DIMS[0],
        teacher_dims=DIMS[1],
    )


def drawn_alike(function, *inputs):
    torch.manual_seed(1)
    return function(*inputs)


@pytest.mark.parametrize("name", LOGIT)
def test_a_logit_loss_alone_is_its_weight_times_its_distance(name):
    inputs = logits(0), logits(1), LABELS
    half, whole = (create_logit_loss(name, weight=weight) for weight in (0.5, 1.0))
    assert torch.equal(half(*inputs), 0.5 * whole(*inputs))
    assert torch.equal(half.compare(*inputs), whole(*inputs))
    assert half(*inputs) > 0


@pytest.mark.parametrize("name", FEATURE)
def test_a_feature_loss_alone_is_its_weight_times_its_distance(name):
    inputs = maps(0, DIMS[0]), maps(1, DIMS[1])
    half, whole = (feature_term(name, weight) for weight in (0.5, 1.0))
    value = drawn_alike(half, *inputs)
    assert value > 0
    assert torch.equal(value, 0.5 * drawn_alike(whole, *inputs))
    assert torch.equal(drawn_alike(half.compare, *inputs), drawn_alike(whole, *inputs))


@pytest.mark.parametrize("pool", [False, True])
def test_liftkd_weights_its_distance_and_not_the_pooled_tokens(pool):
    results = []
    for weight in (0.25, 1.0):
        torch.manual_seed(0)
        found = LiftKD(6, 8, weight=weight, pool=pool)(
            maps(0, {0: 6})[0].data, maps(1, {0: 8})[0].data
        )
        results.append(found if pool else (found, torch.zeros(())))
    (light, light_pooled), (heavy, heavy_pooled) = results
    assert torch.equal(light, heavy / 4) and heavy > 0
    assert torch.equal(light_pooled, heavy_pooled)


def test_no_loss_takes_a_weight_that_it_does_not_apply():
    """Distances have none: a new class with a ``weight`` has to be tested above."""
    found = {
        name
        for name in losses.__all__
        if isinstance(cls := getattr(losses, name), type)
        and "weight" in inspect.signature(cls).parameters
        and not issubclass(cls, LogitTerm | FeatureTerm)
    }
    assert found == {"LiftKD"} | ({"FeatureTerm"} & found)


@pytest.mark.parametrize("logit", LOGIT)
@pytest.mark.parametrize("feature", ["mse", "vitkd", "rkd"])
def test_a_sum_weights_once_and_reports_without_weights(logit, feature):
    inputs = logits(0), LABELS, logits(1), maps(0, DIMS[0]), maps(1, DIMS[1])
    terms = DistillationLoss(create_logit_loss(logit, weight=0.3), feature_term(feature, 0.2))
    parts = drawn_alike(terms, *inputs)
    kd = terms.logit.compare(*inputs[:1], inputs[2], LABELS)
    distance = drawn_alike(terms.feature.compare, *inputs[3:])
    assert torch.equal(parts[terms.logit.name], kd)
    assert torch.equal(parts["feature"], distance)
    cross_entropy = F.cross_entropy(inputs[0], LABELS)
    torch.testing.assert_close(parts["loss"], 0.7 * cross_entropy + 0.3 * kd + 0.2 * distance)


def test_torchdistills_kd_loss_is_the_cross_entropy_and_a_weighted_soft_kd():
    student, teacher, alpha, tau = logits(0), logits(1), 0.3, 4.0
    kl = F.kl_div((student / tau).log_softmax(1), (teacher / tau).softmax(1), reduction="batchmean")
    cross_entropy = F.cross_entropy(student, LABELS)
    theirs = alpha * cross_entropy + (1 - alpha) * tau**2 * kl
    ours = alpha * cross_entropy + SoftKD(tau=tau, weight=0.7)(student, teacher)
    torch.testing.assert_close(ours, theirs)


def test_the_weight_of_a_loss_may_be_changed_afterwards():
    term, inputs = FeatureKD("mse", ((0, 0),)), (maps(0, {0: 6}), maps(1, {0: 6}))
    term.weight = 3.0
    assert torch.equal(term(*inputs), 3 * term.compare(*inputs))


def test_a_term_of_ones_own_implements_its_distance():
    class Gap(LogitTerm):
        name, weight = "gap", 0.5

        def compare(self, student, teacher, target=None):
            return (student - teacher).abs().mean()

    expected = (logits(0) - logits(1)).abs().mean()
    assert torch.equal(Gap()(logits(0), logits(1)), 0.5 * expected)
    assert torch.equal(
        DistillationLoss(Gap(), cross_entropy=False)(logits(0), LABELS, logits(1))["gap"], expected
    )


@pytest.mark.parametrize("base", [LogitTerm, FeatureTerm])
def test_a_term_without_its_distance_says_what_to_implement(base):
    class Unfinished(base):
        weight = 1.0

        def __init__(self) -> None:
            nn.Module.__init__(self)

    with pytest.raises(NotImplementedError, match=r"Unfinished must implement compare\(\)"):
        Unfinished()(logits(0), logits(1))
