"""Projectors: what each builds, what stays orthonormal, when an operator may do their work."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.nn.utils import parametrize

from fastkd.losses import registry
from fastkd.losses.projectors import (
    PROJECTORS,
    Orthonormal,
    build_projector,
    check_widths,
    fused_weights,
    orthogonal_projector,
    pool_channels,
    undecayed,
)
from fastkd.ops import feature_kd, lift_kd
from tests.harness.devices import NoFloat64

WIDTHS = [
    (6, 10),  # a wider teacher: orthonormal columns
    (10, 6),  # a narrower one: orthonormal rows
    (7, 7),  # a rotation
    (3, 40),  # far apart: the system that is solved stays 3 x 3
    (1, 4),
]


def gram_error(weight: torch.Tensor) -> float:
    """How far the narrower side's vectors are from orthonormal."""
    tall = weight.double() if weight.shape[0] >= weight.shape[1] else weight.double().mT
    return (tall.mT @ tall - torch.eye(tall.shape[1], dtype=torch.float64)).abs().max().item()


def tokens(dim: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(2, 5, dim, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def train(layer: nn.Module, steps: int, **options: float) -> None:
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1, **options)
    for step in range(steps):
        optimizer.zero_grad()
        layer(tokens(6, step)).pow(3).mean().backward()
        optimizer.step()


def test_projectors_are_those_of_the_catalogue():
    assert registry.names(registry.PROJECTORS) == PROJECTORS


@pytest.mark.parametrize("name", PROJECTORS)
def test_exactly_the_learned_projectors_that_do_not_stay_are_built(name):
    entry = next(entry for entry in registry.PROJECTORS if entry.name == name)
    built = build_projector(name, 6, 10)
    assert (built is not None) == (entry.learned and not entry.stays)


@pytest.mark.parametrize("name", ["linear", "mlp", "orthogonal"])
@pytest.mark.parametrize("widths", WIDTHS)
def test_built_projectors_give_the_teachers_width(name, widths):
    projected = build_projector(name, *widths)(tokens(widths[0]))
    assert projected.shape == (2, 5, widths[1])


def test_an_unknown_projector_is_refused():
    with pytest.raises(ValueError, match=r"build_projector: name must be one of .*got 'conv'"):
        build_projector("conv", 6, 10)


def test_mlp_has_a_gelu_between_its_layers():
    projector = build_projector("mlp", 6, 10).double()
    first, _, second = projector
    assert first.out_features == 10
    x = tokens(6, dtype=torch.float64)
    hidden = x @ first.weight.T + first.bias
    gelu = hidden * torch.special.ndtr(hidden)
    torch.testing.assert_close(projector(x), gelu @ second.weight.T + second.bias)


@pytest.mark.parametrize("name", ["linear", "mlp"])
def test_plain_projectors_start_as_vits_do(name):
    torch.manual_seed(0)
    for layer in build_projector(name, 64, 96).modules():
        if isinstance(layer, nn.Linear):
            assert 0.015 < layer.weight.std() < 0.022
            assert not layer.bias.any()


@pytest.mark.parametrize("widths", WIDTHS)
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, 1e-14), (torch.float32, 5e-7), (torch.bfloat16, 2e-2)],  # their rounding
    ids=str,
)
def test_orthogonal_weight_is_orthonormal(widths, dtype, tolerance):
    layer = orthogonal_projector(*widths).to(dtype)
    assert layer.weight.dtype == dtype
    assert layer.weight.shape == (widths[1], widths[0])
    assert layer.bias is None
    assert gram_error(layer.weight) < tolerance


@pytest.mark.parametrize("widths", WIDTHS)
def test_orthogonal_weight_is_contiguous_as_operators_ask(widths):
    assert orthogonal_projector(*widths).weight.is_contiguous()


def test_a_device_without_float64_leaves_cayleys_map_to_the_cpu():
    with torch.no_grad(), FakeTensorMode(), NoFloat64("mps"):
        weight = Orthonormal()(torch.empty(10, 6, device="mps"))
    assert (weight.device.type, weight.dtype) == ("mps", torch.float32)


def test_orthogonal_weight_stays_orthonormal_and_moves_while_it_learns():
    torch.manual_seed(0)
    layer = orthogonal_projector(6, 10)
    before = layer.weight.detach().clone()
    train(layer, 20)
    assert gram_error(layer.weight) < 5e-7
    assert (layer.weight - before).abs().max() > 0.1


def test_orthogonal_weight_survives_weight_decay():
    torch.manual_seed(0)
    layer = orthogonal_projector(6, 10)
    train(layer, 20, weight_decay=1.0)
    assert gram_error(layer.weight) < 5e-7


@pytest.mark.parametrize("scale", [0.0, 1e3])
def test_orthogonal_weight_is_orthonormal_wherever_the_parameter_goes(scale):
    parameter = scale * torch.randn(10, 6, generator=torch.Generator().manual_seed(0))
    assert gram_error(Orthonormal()(parameter)) < 5e-7


def test_orthogonal_weight_is_cayleys_map_of_a_skew_symmetric_matrix():
    parameter = torch.randn(7, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    skew = torch.zeros(7, 7, dtype=torch.float64)
    skew[:3, :3] = parameter[:3] - parameter[:3].T
    skew[3:, :3] = parameter[3:]
    skew[:3, 3:] = -parameter[3:].T
    identity = torch.eye(7, dtype=torch.float64)
    expected = (identity + skew) @ torch.linalg.inv(identity - skew)
    torch.testing.assert_close(Orthonormal()(parameter), expected[:, :3])


@pytest.mark.parametrize("shape", [(5, 3), (3, 5), (3, 3)])
def test_orthogonal_map_has_the_gradient_of_its_definition(shape):
    parameter = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(Orthonormal(), parameter)


@pytest.mark.parametrize("widths", [(48, 96), (64, 64)])
def test_orthogonal_weight_starts_mixed_and_spread_over_all_channels(widths):
    torch.manual_seed(0)
    weight = orthogonal_projector(*widths).weight
    rows = weight.square().sum(1)  # Ds / Dt each, if the student reaches all of them alike
    assert rows.min() > 0.3 * widths[0] / widths[1]
    assert weight.abs().max() < 0.7  # the identity's would be 1


def test_autocast_leaves_the_weight_orthonormal_and_multiplies_in_its_dtype():
    layer = orthogonal_projector(6, 10)
    with torch.autocast("cpu", torch.bfloat16):
        assert gram_error(layer.weight) < 5e-7
        assert layer(tokens(6)).dtype == torch.bfloat16


def test_tokens_keep_lengths_and_angles_through_an_orthogonal_projector():
    x = tokens(6, dtype=torch.float64).flatten(0, 1)
    projected = orthogonal_projector(6, 10).double()(x)
    torch.testing.assert_close(projected @ projected.T, x @ x.T)


def test_a_copy_of_an_orthogonal_projector_learns_by_itself():
    layer = orthogonal_projector(6, 10)
    average = copy.deepcopy(layer)
    before = layer.weight.detach().clone()
    with torch.no_grad():
        average.parametrizations.weight.original.mul_(0.5)
    torch.testing.assert_close(layer.weight, before, rtol=0, atol=0)
    assert not torch.equal(average.weight, before)
    assert gram_error(average.weight) < 5e-7


def test_state_dict_of_an_orthogonal_projector_is_one_tensor_that_restores_it():
    layer, other = orthogonal_projector(6, 10), orthogonal_projector(6, 10)
    state = layer.state_dict()
    assert list(state) == ["parametrizations.weight.original"]
    other.load_state_dict(state)
    torch.testing.assert_close(other.weight, layer.weight, rtol=0, atol=0)


def test_undecayed_names_the_parameters_of_orthogonal_projectors_only():
    model = nn.ModuleDict({"plain": nn.Linear(3, 3), "turned": orthogonal_projector(3, 4)})
    assert undecayed(model) == {"turned.parametrizations.weight.original"}
    assert undecayed(model) <= {name for name, _ in model.named_parameters()}


def test_a_projector_and_its_fused_weights_compile_to_one_graph():
    layer = orthogonal_projector(6, 10)

    def both(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        weight, _ = fused_weights(layer)
        return layer(x), weight

    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(tokens(6)), both(tokens(6)))
    compiled(tokens(6))[0].sum().backward()
    assert layer.parametrizations.weight.original.grad.any()


@pytest.mark.parametrize("name", ["linear", "orthogonal"])
def test_fused_weights_are_what_the_layer_multiplies_with(name):
    layer = build_projector(name, 6, 10)
    x = tokens(6)
    torch.testing.assert_close(F.linear(x, *fused_weights(layer)), layer(x))


def test_fused_weights_of_an_orthogonal_projector_give_the_layers_gradient():
    layer = orthogonal_projector(6, 10).double()
    student, teacher = tokens(6, dtype=torch.float64), tokens(10, 1, torch.float64)
    parameter = layer.parametrizations.weight.original
    weight, bias = fused_weights(layer)
    fused = torch.autograd.grad(lift_kd(student, weight, teacher, bias), parameter)
    (feature_kd(layer(student), teacher)).backward()
    torch.testing.assert_close(fused[0], parameter.grad)


class Doubling(nn.Linear):
    """A Linear by name only."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


def mlp() -> nn.Module:
    return build_projector("mlp", 6, 10)


def subclass() -> nn.Module:
    return Doubling(6, 10)


def sequential() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 10))


def hooked() -> nn.Module:
    layer = orthogonal_projector(6, 10)
    layer.register_forward_hook(lambda module, args, output: 2 * output)
    return layer


def watched_backward() -> nn.Module:
    layer = nn.Linear(6, 10)
    layer.register_full_backward_hook(lambda module, inputs, outputs: None)
    return layer


def watched_before_backward() -> nn.Module:
    layer = nn.Linear(6, 10)
    layer.register_full_backward_pre_hook(lambda module, outputs: None)
    return layer


def watched_before_forward() -> nn.Module:
    layer = nn.Linear(6, 10)
    layer.register_forward_pre_hook(lambda module, inputs: None)
    return layer


def replaced_forward() -> nn.Module:
    layer = nn.Linear(6, 10)
    layer.forward = lambda x: 2 * F.linear(x, layer.weight)  # as accelerate's hooks do
    return layer


def parametrized_subclass() -> nn.Module:
    layer = Doubling(6, 10, bias=False)
    parametrize.register_parametrization(layer, "weight", Orthonormal())
    return layer


@pytest.mark.parametrize(
    "make",
    [
        mlp,
        subclass,
        sequential,
        parametrized_subclass,
        hooked,
        watched_before_forward,
        watched_backward,
        watched_before_backward,
        replaced_forward,
    ],
    ids=lambda make: make.__name__,
)
def test_no_fused_weights_where_calling_does_more_than_a_linear(make):
    assert fused_weights(make()) is None


@pytest.mark.parametrize("dim", [4, 5, 6, 12], ids=str)  # windows that divide and that overlap
def test_pooled_channels_are_what_feature_kd_pools(dim):
    wide, narrow = tokens(12, dtype=torch.float64), tokens(dim, 1, torch.float64)
    side = "student" if dim < 12 else "none"
    pooled = pool_channels(wide, dim)
    assert pooled.shape == (2, 5, dim)
    torch.testing.assert_close(F.mse_loss(pooled, narrow), feature_kd(wide, narrow, pool=side))


def test_half_precision_channels_are_averaged_in_float32():
    pooled = pool_channels(tokens(12).half(), 4)
    assert pooled.dtype == torch.float32
    torch.testing.assert_close(pooled, tokens(12).half().float().unflatten(-1, (4, 3)).mean(-1))


@pytest.mark.parametrize("projector", ["pool", "linear", "mlp", "orthogonal"])
def test_these_projectors_join_any_widths(projector):
    check_widths(projector, (0, 1), 6, 10)


@pytest.mark.parametrize("projector", ["none", "lift"])
def test_these_projectors_join_equal_widths_only(projector):
    check_widths(projector, (0, 1), 6, 6)
    with pytest.raises(ValueError, match=r"pair 0:1: student has 6 channels, teacher 10.*width=10"):
        check_widths(projector, (0, 1), 6, 10)


@pytest.mark.parametrize("projector", PROJECTORS)
def test_no_projector_minds_widths_that_the_distance_does_not_compare(projector):
    check_widths(projector, (0, 1), 6, 10, equal_widths=False)
