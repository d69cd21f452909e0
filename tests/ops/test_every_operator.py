"""What every public operator refuses in our words: torch.func, and options of other types."""

import pytest
import torch
from torch import Tensor

from fastkd import ops

X = torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(0))
W = torch.randn(8, 8, generator=torch.Generator().manual_seed(1))
E = X.square().sum(1)
AXES = torch.eye(8, dtype=torch.float64)[:, :3]

# Each as a function of one tensor, with an input that it takes.
OPERATORS = {
    "bandwidth": (lambda x: ops.bandwidth(x), E.cumsum(-1) / E.sum(-1, keepdim=True)),
    "effective_rank": (lambda x: ops.effective_rank(x), E),
    "energy_curve": (lambda x: ops.energy_curve(x), E),
    "feature_kd": (lambda x: ops.feature_kd(x, X), X),
    "gram": (lambda x: ops.gram(x), X),
    "lift": (lambda x: ops.lift(x, W, pool=True), X),
    "lift_kd": (lambda x: ops.lift_kd(x, W, X), X),
    "overlap": (lambda x: ops.overlap(x, AXES), AXES),
    "principal_angles": (lambda x: ops.principal_angles(x, AXES), AXES),
    "rank_at": (lambda x: ops.rank_at(x), E),
    "second_moment": (lambda x: ops.second_moment(x), X),
    "sep": (lambda x: ops.sep(x), X),
    "singular_values": (lambda x: ops.singular_values(x), X),
    "spectral_ranks": (lambda x: ops.spectral_ranks(x)[0], X),
    "spectrum": (lambda x: ops.spectrum(x), X),
    "stable_rank": (lambda x: ops.stable_rank(x), E),
    "subspace": (lambda x: ops.subspace(x, 2), X),
}
MEASUREMENTS = ("overlap", "principal_angles", "second_moment", "sep", "subspace")
PLAIN = ("bandwidth", "effective_rank", "energy_curve", "stable_rank", "rank_at")


def total(call):
    return lambda x: call(x).double().sum()


TRANSFORMS = {
    "grad": lambda call, x: torch.func.grad(total(call))(x),
    "vmap": lambda call, x: torch.func.vmap(call)(x),
    "jvp": lambda call, x: torch.func.jvp(call, (x,), (x,)),
    "vjp": lambda call, x: torch.func.vjp(total(call), x),
    "jacrev": lambda call, x: torch.func.jacrev(total(call))(x),
    "hessian": lambda call, x: torch.func.hessian(total(call))(x),
}


def test_every_public_operator_is_here():
    assert set(OPERATORS) == set(ops.__all__) - {"backends"}


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("name", OPERATORS)
def test_transforms_of_torch_func_are_refused(name, transform):
    call, x = OPERATORS[name]
    with pytest.raises(NotImplementedError, match=rf"{name}: .*torch\.func"):
        TRANSFORMS[transform](call, x)


@pytest.mark.parametrize("name", [n for n in OPERATORS if n not in MEASUREMENTS + PLAIN])
def test_second_derivatives_are_refused(name):
    call, x = OPERATORS[name]
    x = x.clone().requires_grad_()
    with pytest.raises(RuntimeError, match=r"\w+: its gradient cannot be differentiated again"):
        (first,) = torch.autograd.grad(call(x).square().sum(), x, create_graph=True)
        first.sum().backward()


@pytest.mark.parametrize("name", ["effective_rank", "energy_curve", "stable_rank"])
def test_second_derivatives_of_plain_measures_are_right(name):
    x = (OPERATORS[name][1].double() + 1).requires_grad_()
    assert torch.autograd.gradgradcheck(OPERATORS[name][0], x)


@pytest.mark.parametrize("name", MEASUREMENTS)
def test_measurements_refuse_a_gradient(name):
    call, x = OPERATORS[name]
    with pytest.raises((RuntimeError, ValueError), match=rf"{name}: .*gradient"):
        call(x.clone().requires_grad_())


BACKENDS = {
    "feature_kd": lambda b: ops.feature_kd(X, X, backend=b),
    "lift": lambda b: ops.lift(X, W, backend=b),
    "lift_kd": lambda b: ops.lift_kd(X, W, X, backend=b),
    "second_moment": lambda b: ops.second_moment(X, backend=b),
    "sep": lambda b: ops.sep(X, backend=b),
    "singular_values": lambda b: ops.singular_values(X, backend=b),
    "spectral_ranks": lambda b: ops.spectral_ranks(X, backend=b),
    "spectrum": lambda b: ops.spectrum(X, backend=b),
}


@pytest.mark.parametrize("backend", [None, 1, "TRITON", ["torch"], X], ids=type)
@pytest.mark.parametrize("name", BACKENDS)
def test_what_is_no_backend_is_refused(name, backend):
    with pytest.raises(ValueError, match=rf"{name}: backend must be one of .*, got ") as caught:
        BACKENDS[name](backend)
    assert len(str(caught.value)) < 150


WRONG = {
    "rank_at q='0.5'": lambda: ops.rank_at(E, "0.5"),
    "rank_at q=None": lambda: ops.rank_at(E, None),
    "rank_at q=['0.5']": lambda: ops.rank_at(E, ["0.5"]),
    "rank_at q=True": lambda: ops.rank_at(E, True),
    "spectral_ranks q='0.5'": lambda: ops.spectral_ranks(X, "0.5"),
    "bandwidth q='0.5'": lambda: ops.bandwidth(E, "0.5"),
    "feature_kd beta='1'": lambda: ops.feature_kd(X, X, "smooth_l1", beta="1"),
    "feature_kd beta=tensor": lambda: ops.feature_kd(X, X, "smooth_l1", beta=X),
    "feature_kd eps=None": lambda: ops.feature_kd(X, X, eps=None),
    "feature_kd grid=16": lambda: ops.feature_kd(X, X, grid=16),
    "feature_kd grid='2x3'": lambda: ops.feature_kd(X, X, grid="2x3"),
    "feature_kd grid=(2.0, 3.0)": lambda: ops.feature_kd(X, X, grid=(2.0, 3.0)),
    "feature_kd grid=(6,)": lambda: ops.feature_kd(X, X, grid=(6,)),
    "feature_kd loss=None": lambda: ops.feature_kd(X, X, None),
    "feature_kd loss=tensor": lambda: ops.feature_kd(X, X, X),
    "feature_kd pool=True": lambda: ops.feature_kd(X, X, pool=True),
    "lift_kd beta='1'": lambda: ops.lift_kd(X, W, X, beta="1"),
    "lift_kd grid=16": lambda: ops.lift_kd(X, W, X, grid=16),
    "lift_kd lift_eps='1'": lambda: ops.lift_kd(X, W, X, lift_eps="1"),
    "lift_kd pool='yes'": lambda: ops.lift_kd(X, W, X, pool="yes"),
    "lift_kd loss=3": lambda: ops.lift_kd(X, W, X, loss=3),
    "lift pool=None": lambda: ops.lift(X, W, pool=None),
    "lift weight=None": lambda: ops.lift(X, None),
    "subspace k='2'": lambda: ops.subspace(X, "2"),
    "subspace k=2.0": lambda: ops.subspace(X, 2.0),
    "second_moment weight=None": lambda: ops.second_moment(X, None),
    "sep convention=None": lambda: ops.sep(X, None),
    "sep std='yes'": lambda: ops.sep(X, std="yes"),
}


@pytest.mark.parametrize("case", WRONG)
def test_options_of_another_type_are_named(case):
    name, option = case.split(" ", 1)
    with pytest.raises((TypeError, ValueError)) as caught:
        WRONG[case]()
    message = str(caught.value)
    assert message.startswith(f"{name}: {option.split('=')[0]} must ")
    assert "got" in message and len(message) < 200 and "tensor(" not in message


@pytest.mark.parametrize(
    "q", [0.9, [0.9], (0.9,), torch.tensor([0.9], dtype=torch.float64)], ids=type
)
def test_one_level_may_come_in_any_form(q: float | list[float] | Tensor):
    assert ops.rank_at(E, q).flatten().tolist() == ops.rank_at(E, 0.9).tolist()
