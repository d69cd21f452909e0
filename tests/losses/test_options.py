"""Numbers that no loss can be built with, whichever loss and option they are given to."""

import inspect
import math

import pytest

from fastkd import losses

NEEDED = {
    **dict.fromkeys(("dim", "width", "student_dim", "teacher_dim"), 8),
    **{"pairs": ((11, 11),), "student_dims": {11: 8}, "teacher_dims": {11: 8}, "weight": 1.0},
}
OPTIONS = [
    (name, option.name)
    for name in losses.__all__
    if inspect.isclass(getattr(losses, name))
    for option in inspect.signature(getattr(losses, name)).parameters.values()
    if str(option.annotation).split(" |")[0] in ("float", "int")
]
WITH = {  # of an option that is one of another option's
    ("MapDistance", "beta"): {"loss": "smooth_l1"},
    ("VkD", "eps"): {"normalize": "whiten"},
}


def built(name, **given):
    cls = getattr(losses, name)
    needed = {
        option: NEEDED[option]
        for option, parameter in inspect.signature(cls).parameters.items()
        if parameter.default is inspect.Parameter.empty and option in NEEDED
    }
    return cls(**needed | WITH.get((name, *given), {}) | given)


@pytest.mark.parametrize("value", [math.inf, math.nan, -1, -math.inf, "1", True, 1e300], ids=repr)
@pytest.mark.parametrize(("name", "option"), OPTIONS)
def test_no_option_is_infinite_nan_negative_or_of_another_type(name, option, value):
    if (name, option, value) == ("AttentionTransfer", "power", 1e300):
        pytest.skip("a power of values of at most 1 overflows nothing")
    with pytest.raises((ValueError, TypeError), match=f": .*{option} must"):
        built(name, **{option: value})


def test_every_loss_that_has_numbers_is_asked():
    assert {"SoftKD", "FeatureKD", "LiftKD", "CRD", "DistillationLoss"} <= {n for n, _ in OPTIONS}
    assert len(OPTIONS) > 30


def test_a_pair_is_compared_once():
    with pytest.raises(ValueError, match=r"pairs must differ, got \(\(3, 3\), \(3, 3\)\)"):
        losses.FeatureKD(pairs=((3, 3), (3, 3)))
