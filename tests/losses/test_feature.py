"""FeatureKD against the definitions of its distances, and what it refuses."""

import functools

import pytest
import torch
import torch.nn.functional as F
from timm.optim import create_optimizer_v2

from fastkd.config import Recipe
from fastkd.losses import FeatureKD, pool_side
from fastkd.tokens import Tokens, match_grids

unit = functools.partial(FeatureKD, weight=1.0)
GRID = (3, 4)


def tokens(seed: int, dim: int = 6, grid: tuple[int, int] = GRID, batch: int = 2) -> Tokens:
    generator = torch.Generator().manual_seed(seed)
    data = torch.randn(batch, grid[0] * grid[1], dim, generator=generator, dtype=torch.float64)
    return Tokens(data, grid, source=f"model{seed}")


def as_map(one: Tokens) -> torch.Tensor:
    return one.data.unflatten(1, one.grid).permute(0, 3, 1, 2)


def spectral(student: Tokens, teacher: Tokens) -> torch.Tensor:
    stacks = [
        torch.view_as_real(torch.fft.rfft2(as_map(one), norm="ortho")) for one in (student, teacher)
    ]
    return F.mse_loss(*stacks)


DEFINITIONS = {
    "mse": lambda s, t: ((s.data - t.data) ** 2).mean(),
    "spectral": spectral,
    "smooth_l1": lambda s, t: F.smooth_l1_loss(s.data, t.data),
    "cosine": lambda s, t: 1 - F.cosine_similarity(s.data, t.data, dim=-1).mean(),
}


@pytest.mark.parametrize("loss", DEFINITIONS)
def test_each_distance_equals_its_definition(loss):
    student, teacher = tokens(0), tokens(1)
    term = unit(loss, pairs=((11, 23),))
    torch.testing.assert_close(
        term({11: student}, {23: teacher}), DEFINITIONS[loss](student, teacher)
    )


def test_pairs_are_averaged():
    students, teachers = {0: tokens(0), 1: tokens(1)}, {5: tokens(2), 7: tokens(3)}
    term = unit("mse", pairs=((0, 5), (1, 7), (1, 5)))
    expected = sum(
        F.mse_loss(students[s].data, teachers[t].data) for s, t in ((0, 5), (1, 7), (1, 5))
    )
    torch.testing.assert_close(term(students, teachers), expected / 3)


@pytest.mark.parametrize("widths", [(6, 12), (12, 6), (6, 9)])
def test_pool_averages_the_wider_side_as_adaptive_pooling_does(widths):
    student, teacher = tokens(0, widths[0]), tokens(1, widths[1])
    narrow = min(widths)
    pooled = [F.adaptive_avg_pool1d(one.data, narrow) for one in (student, teacher)]
    term = unit("mse", pairs=((0, 0),), projector="pool")
    torch.testing.assert_close(term({0: student}, {0: teacher}), F.mse_loss(*pooled))


def test_linear_projects_the_student_to_the_teachers_width():
    student, teacher = tokens(0, 6), tokens(1, 10)
    term = unit(
        pairs=((0, 0),), projector="linear", student_dims={0: 6}, teacher_dims={0: 10}
    ).double()
    linear = term.projectors[0]
    expected = F.mse_loss(student.data @ linear.weight.T + linear.bias, teacher.data)
    torch.testing.assert_close(term({0: student}, {0: teacher}), expected)


@pytest.mark.parametrize("loss", DEFINITIONS)
def test_linear_has_the_gradients_of_its_layer_before_the_distance(loss):
    student, teacher = tokens(0, 6), tokens(1, 10)
    student.data.requires_grad_()
    term = unit(
        loss, ((0, 0),), projector="linear", student_dims={0: 6}, teacher_dims={0: 10}
    ).double()
    projected = Tokens(term.projectors[0](student.data), GRID)
    wanted = (student.data, *term.parameters())
    expected = torch.autograd.grad(DEFINITIONS[loss](projected, teacher), wanted)
    gradients = torch.autograd.grad(term({0: student}, {0: teacher}), wanted)
    for ours, theirs in zip(gradients, expected):
        torch.testing.assert_close(ours, theirs)


def test_linear_never_calls_its_layer_and_so_writes_no_projected_map(monkeypatch):
    term = unit(
        pairs=((0, 0),), projector="linear", student_dims={0: 6}, teacher_dims={0: 10}
    ).double()
    failing = lambda *_: pytest.fail("the projected map is written")  # noqa: E731
    monkeypatch.setattr(torch.nn.Linear, "forward", failing)
    term({0: tokens(0, 6)}, {0: tokens(1, 10)}).backward()


def test_linear_resamples_the_teacher_as_the_others_do():
    student, teacher = tokens(0, 6), tokens(1, 10, grid=(6, 8))
    term = unit(
        "spectral", ((0, 0),), projector="linear", student_dims={0: 6}, teacher_dims={0: 10},
        resample="area",
    ).double()  # fmt: skip
    projected = Tokens(term.projectors[0](student.data), GRID)
    expected = spectral(projected, match_grids(student, teacher, "area")[1])
    torch.testing.assert_close(term({0: student}, {0: teacher}), expected)


def test_linear_keeps_the_names_of_its_parameters():
    dims = {0: 6, 1: 6}
    term = unit(pairs=((0, 0), (1, 1)), projector="linear", student_dims=dims, teacher_dims=dims)
    names = [f"projectors.{index}.{name}" for index in (0, 1) for name in ("weight", "bias")]
    assert list(term.state_dict()) == names


def test_linear_has_one_projector_per_pair_and_each_receives_a_gradient():
    dims = {0: 6, 1: 6}
    term = unit(
        pairs=((0, 0), (1, 1)), projector="linear", student_dims=dims, teacher_dims={0: 8, 1: 10}
    ).double()
    term({0: tokens(0), 1: tokens(1)}, {0: tokens(2, 8), 1: tokens(3, 10)}).backward()
    assert [tuple(p.weight.shape) for p in term.projectors] == [(8, 6), (10, 6)]
    assert all(p.weight.grad.abs().sum() > 0 for p in term.projectors)


@pytest.mark.parametrize("projector", ["none", "pool", "lift"])
def test_other_projectors_hold_no_parameters(projector):
    term = unit(pairs=((0, 0),), projector=projector, student_dims={0: 6}, teacher_dims={0: 6})
    assert list(term.parameters()) == []


def test_different_grids_are_refused_without_resample():
    with pytest.raises(ValueError, match="resample"):
        unit(pairs=((0, 0),))({0: tokens(0)}, {0: tokens(1, grid=(6, 8))})


def test_resample_brings_the_teacher_to_the_students_grid():
    student, teacher = tokens(0), tokens(1, grid=(6, 8))
    term = unit(pairs=((0, 0),), resample="bilinear")
    expected = F.mse_loss(student.data, match_grids(student, teacher, "bilinear")[1].data)
    torch.testing.assert_close(term({0: student}, {0: teacher}), expected)


def test_unequal_widths_without_projector_name_the_projectors_to_choose():
    with pytest.raises(ValueError, match=r"6 channels, teacher 12.*'linear'.*'pool'"):
        unit(pairs=((0, 0),), student_dims={0: 6}, teacher_dims={0: 12})


def test_unequal_widths_are_refused_in_forward_where_none_were_declared():
    with pytest.raises(ValueError, match="projector='none' needs equal widths"):
        unit(pairs=((0, 0),))({0: tokens(0, 6)}, {0: tokens(1, 12)})


def test_a_lift_of_another_width_names_the_width_to_choose():
    with pytest.raises(ValueError, match="width=12"):
        unit(pairs=((0, 0),), projector="lift", student_dims={0: 6}, teacher_dims={0: 12})


def test_lift_takes_one_pair():
    with pytest.raises(ValueError, match="one lifted map"):
        unit(pairs=((0, 0), (1, 1)), projector="lift")


def test_empty_pairs_are_refused():
    with pytest.raises(ValueError, match="at least one"):
        unit(pairs=())


def test_linear_without_widths_is_refused():
    with pytest.raises(ValueError, match="student_dims and teacher_dims"):
        unit(pairs=((0, 0),), projector="linear")


def test_a_missing_key_is_named():
    with pytest.raises(ValueError, match=r"teacher has no key 3, only \[0\]"):
        unit(pairs=((0, 3),))({0: tokens(0)}, {0: tokens(1)})


@pytest.mark.parametrize("option", [{"loss": "l2"}, {"projector": "cnn"}, {"resample": "lanczos"}])
def test_unknown_options_are_refused(option):
    with pytest.raises(ValueError, match="must be one of"):
        unit(**option)


@pytest.mark.parametrize(
    ("dims", "side"), [((192, 384), "teacher"), ((384, 192), "student"), ((8, 8), "none")]
)
def test_pool_side_is_the_wider_one(dims, side):
    assert pool_side(*dims) == side


class Doubled(torch.nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


def test_an_exchanged_projector_is_called():
    student, teacher = tokens(0), tokens(1, dim=8)
    term = unit("mse", ((11, 23),), projector="linear", student_dims={11: 6},
                     teacher_dims={23: 8}).double()  # fmt: skip
    layer = Doubled(6, 8).double()
    term.projectors[0] = layer
    expected = F.mse_loss(layer(student.data), teacher.data)
    torch.testing.assert_close(term({11: student}, {23: teacher}), expected)


def test_hooks_on_a_projector_run():
    student, teacher = tokens(0), tokens(1, dim=8)
    term = unit("mse", ((11, 23),), projector="linear", student_dims={11: 6},
                     teacher_dims={23: 8}).double()  # fmt: skip
    seen = []
    term.projectors[0].register_forward_hook(lambda *arguments: seen.append(1))
    term({11: student}, {23: teacher})
    assert seen


class Gap(torch.nn.Module):
    """A distance of somebody's own."""

    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor(2.0, dtype=torch.float64))

    def forward(self, student, teacher, *, grid):
        assert grid == GRID
        return self.scale * (student.mean() - teacher.mean()).abs()


def test_a_module_may_be_the_distance_and_all_pairs_share_it():
    students, teachers = {0: tokens(0), 1: tokens(1, 8)}, {0: tokens(2), 1: tokens(3)}
    term = unit(Gap(), ((0, 0), (1, 1)))
    gaps = [2 * (students[key].data.mean() - teachers[key].data.mean()).abs() for key in (0, 1)]
    torch.testing.assert_close(term(students, teachers), sum(gaps) / 2)
    assert [name for name, _ in term.named_parameters()] == ["distances.0.scale"]


@pytest.mark.parametrize("given", [{"beta": 1.0}, {"backend": "torch"}])
def test_a_module_takes_no_options(given):
    with pytest.raises(ValueError, match="options of a named loss"):
        unit(Gap(), **given)


def test_a_module_need_not_know_of_grids():
    student, teacher = tokens(0), tokens(1)
    term = unit(torch.nn.MSELoss(), ((0, 0),))
    torch.testing.assert_close(
        term({0: student}, {0: teacher}), F.mse_loss(student.data, teacher.data)
    )


@pytest.mark.parametrize("projector", ["none", "pool", "linear", "orthogonal", "mlp"])
def test_hooks_on_a_distance_run_whatever_the_projector(projector):
    dims = {"student_dims": {0: 6}, "teacher_dims": {0: 6}}
    term = unit("mse", ((0, 0),), projector=projector, **dims).double()
    seen = []
    term.distances[0].register_forward_hook(lambda *arguments: seen.append(1))
    term({0: tokens(0)}, {0: tokens(1)})
    assert seen


@pytest.mark.parametrize("projector", ["linear", "orthogonal"])
@pytest.mark.parametrize("loss", ["vkd", "rkd", "crd"])
def test_what_only_sees_the_mean_token_has_it_projected_alone(loss, projector):
    dims = {"student_dims": {0: 6}, "teacher_dims": {0: 8}}
    term = unit(loss, ((0, 0),), projector=projector, **dims).double()
    student, teacher = tokens(0, batch=4), tokens(1, 8, batch=4)
    layer, shapes = term.projectors[0], []
    expected = term.distances[0](layer(student.data), teacher.data, grid=GRID)
    call = layer.forward
    layer.forward = lambda x: shapes.append(x.shape) or call(x)
    torch.testing.assert_close(term({0: student}, {0: teacher}), expected)
    del layer.forward
    torch.testing.assert_close(term({0: student}, {0: teacher}), expected)
    assert shapes == [(4, 12, 6)]  # a replaced forward gets all tokens


def test_timms_optimizers_spare_orthogonal_projectors():
    dims = {"student_dims": {0: 6}, "teacher_dims": {0: 8}}
    term = unit("vkd", ((0, 0),), projector="orthogonal", **dims)
    groups = create_optimizer_v2(term, opt="adamw", lr=1e-3, weight_decay=0.05).param_groups
    decayed = [p for group in groups if group["weight_decay"] for p in group["params"]]
    assert decayed == []


@pytest.mark.parametrize("projector", ["mlp", "orthogonal"])
@pytest.mark.parametrize("loss", DEFINITIONS)
def test_learned_projectors_come_before_any_distance(loss, projector):
    student, teacher = tokens(0), tokens(1, dim=8)
    term = unit(
        loss, ((0, 0),), projector=projector, student_dims={0: 6}, teacher_dims={0: 8}
    ).double()
    projected = Tokens(term.projectors[0](student.data), GRID)
    expected = DEFINITIONS[loss](projected, teacher)
    value = term({0: student}, {0: teacher})
    torch.testing.assert_close(value, expected)
    wanted = list(term.parameters())
    for ours, theirs in zip(
        torch.autograd.grad(value, wanted), torch.autograd.grad(expected, wanted)
    ):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("loss", ["mse", "vkd"])
@pytest.mark.parametrize("projector", ["linear", "mlp", "orthogonal"])
def test_half_precision_tokens_meet_float32_projectors_without_autocast(loss, projector):
    dims = {"student_dims": {0: 6}, "teacher_dims": {0: 8}}
    term = unit(loss, ((0, 0),), projector=projector, **dims)
    halves = [Tokens(one.data.bfloat16(), GRID) for one in (tokens(0), tokens(1, 8))]
    exact = [Tokens(one.data.float(), GRID) for one in halves]
    value = term({0: halves[0]}, {0: halves[1]})
    torch.testing.assert_close(value, term({0: exact[0]}, {0: exact[1]}), rtol=1e-2, atol=1e-3)


def test_orthogonal_writes_no_projected_map_either(monkeypatch):
    term = unit(
        pairs=((0, 0),), projector="orthogonal", student_dims={0: 6}, teacher_dims={0: 10}
    ).double()
    failing = lambda *_: pytest.fail("the projected map is written")  # noqa: E731
    monkeypatch.setattr(torch.nn.Linear, "forward", failing)
    term({0: tokens(0, 6)}, {0: tokens(1, 10)}).backward()


def test_pool_averages_channels_before_a_distance_that_no_operator_computes():
    student, teacher = tokens(0, 6), tokens(1, 12)
    term = unit("vkd", ((0, 0),), projector="pool")
    pooled = Tokens(F.adaptive_avg_pool1d(teacher.data, 6), GRID)
    expected = unit("vkd", ((0, 0),))({0: student}, {0: pooled})
    torch.testing.assert_close(term({0: student}, {0: teacher}), expected)


@pytest.mark.parametrize("loss", ["attention", "rkd", "manifold"])
def test_distances_that_look_at_no_channels_need_no_projector(loss):
    term = unit(loss, ((0, 0),), student_dims={0: 6}, teacher_dims={0: 12})
    value = term({0: tokens(0, 6, batch=4)}, {0: tokens(1, 12, batch=4)})
    assert torch.isfinite(value)
    assert value > 0


def test_a_learned_distance_is_built_for_the_widths_it_will_see():
    dims = {"student_dims": {0: 6, 1: 6}, "teacher_dims": {0: 12, 1: 8}}
    term = unit("crd", ((0, 0), (1, 1)), dim=4, **dims).double()
    assert len(term.distances) == 2
    term(
        {0: tokens(0, batch=4), 1: tokens(1, batch=4)},
        {0: tokens(2, 12, batch=4), 1: tokens(3, 8, batch=4)},
    ).backward()
    assert all(p.grad is not None for p in term.parameters())


def test_a_learned_distance_sees_what_the_projector_leaves():
    term = unit(
        "crd", ((0, 0),), projector="linear", student_dims={0: 6}, teacher_dims={0: 12}
    ).double()
    assert torch.isfinite(term({0: tokens(0, batch=4)}, {0: tokens(1, 12, batch=4)}))


def test_a_learned_distance_without_widths_is_refused():
    with pytest.raises(ValueError, match="'crd' needs student_dims and teacher_dims"):
        unit("crd")


def test_an_option_of_another_distance_is_refused():
    with pytest.raises(ValueError, match="'mse' has no option 'beta'; it has none"):
        unit("mse", beta=2.0)


def test_a_backend_for_what_no_operator_computes_is_refused():
    with pytest.raises(ValueError, match="'rkd' has one implementation"):
        unit("rkd", backend="triton")


def test_a_term_of_its_own_is_no_distance():
    with pytest.raises(ValueError, match="got 'vitkd'"):
        unit("vitkd")


def test_it_begins_with_the_weight_of_a_recipe():
    assert FeatureKD().weight == Recipe().feature_weight == 0.2
