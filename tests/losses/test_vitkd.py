"""ViTKD against loops in float64, its mask, its parameters, and what it refuses."""

from collections.abc import Mapping

import numpy as np
import pytest
import torch
from torch import nn

from fastkd.losses.vitkd import ViTKD
from fastkd.tokens import Tokens

GRID = (3, 4)  # not square, on purpose
PAIRS = ((0, 0), (1, 2), (11, 23))
STUDENT_DIMS, TEACHER_DIMS = {0: 5, 1: 6, 11: 4}, {0: 7, 2: 6, 23: 3}  # 1:2 are equal
EVEN = {"mimic_weight": 0.2, "generate_weight": 0.3}  # both parts show in a sum


def maps(seed: int, dims: Mapping[int, int], grid=GRID, batch: int = 2) -> dict[int, Tokens]:
    generator = torch.Generator().manual_seed(seed)
    shape = batch, grid[0] * grid[1]
    return {
        key: Tokens(torch.randn(*shape, dim, generator=generator), grid, source=f"model{seed}")
        for key, dim in dims.items()
    }


def to(tokens: Mapping[int, Tokens], dtype: torch.dtype) -> dict[int, Tokens]:
    return {key: Tokens(one.data.to(dtype), one.grid) for key, one in tokens.items()}


def build(**options) -> ViTKD:
    torch.manual_seed(0)
    term = ViTKD(PAIRS, 1.0, STUDENT_DIMS, TEACHER_DIMS, **{**EVEN, **options})
    if term.generator is not None:
        nn.init.normal_(term.generator.mask_token)
    return term


@pytest.fixture
def features() -> tuple[dict[int, Tokens], dict[int, Tokens]]:
    return maps(0, STUDENT_DIMS), maps(1, TEACHER_DIMS)


def run(term: ViTKD, student, teacher, seed: int = 5) -> torch.Tensor:
    torch.manual_seed(seed)
    return term(student, teacher)


def run_and_mask(term: ViTKD, student, teacher, seed: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss and which tokens it hid."""
    seen = []
    handle = term.generator.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[1]))
    loss = run(term, student, teacher, seed)
    handle.remove()
    return loss, seen[0]


def aligned(layer: nn.Module, tokens: np.ndarray) -> np.ndarray:
    if isinstance(layer, nn.Identity):
        return tokens
    weight, bias = (parameter.detach().numpy() for parameter in (layer.weight, layer.bias))
    return np.array([[weight @ token + bias for token in image] for image in tokens])


def convolved(layer: nn.Conv2d, image: np.ndarray) -> np.ndarray:
    """One map [H, W, D] by loops: nine neighbors, zeros beyond the border."""
    weight, bias = (parameter.detach().numpy() for parameter in (layer.weight, layer.bias))
    out = np.zeros((*image.shape[:2], len(bias)))
    for row, column in np.ndindex(*image.shape[:2]):
        out[row, column] = bias
        for i, j in np.ndindex(3, 3):
            y, x = row + i - 1, column + j - 1
            if 0 <= y < image.shape[0] and 0 <= x < image.shape[1]:
                out[row, column] += weight[:, :, i, j] @ image[y, x]
    return out


def mimicked(term: ViTKD, student, teacher) -> float:
    total = 0.0
    for layer, (mine, theirs) in zip(term.aligners, PAIRS):
        made = aligned(layer, student[mine].data.numpy())
        total += sum(difference**2 for difference in (made - teacher[theirs].data.numpy()).flat)
    return total / 2


def generated(term: ViTKD, student, teacher, hidden: np.ndarray) -> float:
    total, layers = 0.0, term.generator.convolutions
    wanted = teacher[23].data.numpy()
    for image, tokens in enumerate(aligned(term.generator.aligner, student[11].data.numpy())):
        tokens[hidden[image]] = term.generator.mask_token.detach().numpy()
        first = convolved(layers[0], tokens.reshape(*GRID, -1))
        made = convolved(layers[2], np.maximum(first, 0)).reshape(len(tokens), -1)
        for place in np.flatnonzero(hidden[image]):
            total += ((made[place] - wanted[image, place]) ** 2).sum()
    return total / 2 / term.mask_ratio


@pytest.mark.parametrize("mask_ratio", [0.5, 0.3])
def test_the_value_is_that_of_the_definition(features, mask_ratio):
    term = build(mask_ratio=mask_ratio).double()
    student, teacher = (to(side, torch.float64) for side in features)
    loss, hidden = run_and_mask(term, student, teacher)
    expected = 0.2 * mimicked(term, student, teacher)
    expected += 0.3 * generated(term, student, teacher, hidden.numpy())
    assert loss.item() == pytest.approx(expected, rel=1e-10)


def test_gradients_pass_gradcheck():
    dims = {0: 1, 1: 2}, {0: 2, 1: 1}
    torch.manual_seed(0)
    term = ViTKD([(0, 0), (1, 1)], 1.0, *dims, **EVEN).double()
    sides = (maps(seed, widths, (2, 2), batch=1) for seed, widths in enumerate(dims))
    student, teacher = (to(side, torch.float64) for side in sides)
    leaves = [one.data.requires_grad_() for one in student.values()]

    def loss(*_: torch.Tensor) -> torch.Tensor:
        return run(term, student, teacher)

    assert torch.autograd.gradcheck(loss, (*leaves, *term.parameters()))


@pytest.mark.parametrize(
    "count, ratio, hidden",
    [
        (196, 0.5, 98),
        (49, 0.5, 25),  # as many as the authors' code hides of an odd number
        (10, 0.9, 9),  # 10 * (1 - 0.9) is less than 1 in floating point
        (12, 0.25, 3),
        (1, 0.5, 1),
    ],
)
def test_the_mask_hides_its_share_of_every_image(count, ratio, hidden):
    term = ViTKD([(0, 0)], 1.0, {0: 2}, {0: 2}, mask_ratio=ratio)
    tokens = maps(0, {0: 2}, (1, count), batch=4)
    _, mask = run_and_mask(term, tokens, tokens)
    assert mask.sum(1).tolist() == [hidden] * 4


def test_masks_differ_between_images_and_calls_and_repeat_with_the_seed(features):
    term = build()
    masks = [run_and_mask(term, *features, seed)[1] for seed in (1, 2, 1)]
    assert not torch.equal(masks[0], masks[1])
    assert torch.equal(masks[0], masks[2])
    assert not torch.equal(masks[0][0], masks[0][1])


def test_every_token_is_hidden_equally_often():
    term = ViTKD([(0, 0)], 1.0, {0: 1}, {0: 1}, mask_ratio=0.25)
    tokens = maps(0, {0: 1}, (2, 4), batch=2000)
    _, mask = run_and_mask(term, tokens, tokens)
    assert (mask.float().mean(0) - 0.25).abs().max() < 0.05  # five standard deviations


def test_only_hidden_places_of_the_teacher_are_compared(features):
    term, (student, teacher) = build(mimic_weight=0.0), features
    loss, hidden = run_and_mask(term, student, teacher)
    teacher[23].data[~hidden] += 1
    assert torch.equal(run(term, student, teacher), loss)
    teacher[23].data[hidden] += 1
    assert not torch.equal(run(term, student, teacher), loss)


def test_hidden_tokens_of_the_student_are_not_seen(features):
    term, (student, teacher) = build(mimic_weight=0.0), features
    loss, hidden = run_and_mask(term, student, teacher)
    student[11].data[hidden] = 9.0
    assert torch.equal(run(term, student, teacher), loss)
    student[11].data[~hidden] += 1
    assert not torch.equal(run(term, student, teacher), loss)


def test_evaluation_hides_as_training_does(features):
    term = build()
    training = run(term, *features)
    assert torch.equal(run(term.eval(), *features), training)


def test_a_single_pair_is_generated_and_not_mimicked(features):
    term = ViTKD(PAIRS[-1:], 1.0, STUDENT_DIMS, TEACHER_DIMS, generate_weight=0.3)
    assert term.mimic_weight == 0
    assert len(term.aligners) == 0
    last = [{key: side[key]} for key, side in zip(PAIRS[-1], features)]
    assert run(term, *last).item() == pytest.approx(
        0.3 * generated(term, *features, run_and_mask(term, *last)[1].numpy()), rel=1e-5
    )


@pytest.mark.parametrize("part", ["mimic_weight", "generate_weight"])
def test_a_part_of_weight_zero_has_no_parameters_and_no_value(features, part):
    whole, half = build(), build(**{part: 0.0})
    half.load_state_dict(
        {name: value for name, value in whole.state_dict().items() if name in half.state_dict()}
    )
    other = {"mimic_weight": "generate_weight", "generate_weight": "mimic_weight"}[part]
    rest = build(**{other: 0.0})
    rest.load_state_dict(
        {name: value for name, value in whole.state_dict().items() if name in rest.state_dict()}
    )
    assert set(whole.state_dict()) == set(half.state_dict()) | set(rest.state_dict())
    assert not set(half.state_dict()) & set(rest.state_dict())
    torch.testing.assert_close(run(half, *features) + run(rest, *features), run(whole, *features))


@pytest.mark.parametrize("options", [{}, {"mimic_weight": 0.0}, {"generate_weight": 0.0}])
def test_every_parameter_gets_a_gradient(features, options):
    term = build(**options)
    run(term, *features).backward()
    for name, parameter in term.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


def test_equal_widths_need_no_linear():
    term = ViTKD([(0, 0), (1, 1)], 1.0, {0: 4, 1: 4}, {0: 4, 1: 4})
    assert not any(isinstance(module, nn.Linear) for module in term.modules())


def test_mimicking_an_equal_map_costs_nothing():
    tokens = maps(0, {0: 4, 1: 4})
    student = {key: Tokens(one.data.clone().requires_grad_(), GRID) for key, one in tokens.items()}
    term = ViTKD([(0, 0), (1, 1)], 1.0, {0: 4, 1: 4}, {0: 4, 1: 4}, generate_weight=0.0)
    loss = term(student, tokens)
    loss.backward()
    assert loss.item() == 0
    assert student[0].data.grad.abs().max() == 0


def test_a_linear_that_somebody_listens_to_is_called(features):
    term = build(generate_weight=0.0)
    fused = term(*features)
    calls = []
    term.aligners[0].register_forward_hook(lambda *_: calls.append(1))
    torch.testing.assert_close(term(*features), fused)
    assert calls


def test_the_teacher_gets_no_gradient(features):
    student, teacher = features
    leaves = [one.data.requires_grad_() for one in (*student.values(), *teacher.values())]
    run(build(), student, teacher).backward()
    assert [leaf.grad is not None for leaf in leaves] == [True] * 3 + [False] * 3


def test_resample_brings_the_teacher_to_the_students_grid(features):
    student, _ = features
    teacher = maps(1, TEACHER_DIMS, (6, 5))
    resampled = {key: one.resample(GRID, "area") for key, one in teacher.items()}
    expected = run(build(), student, resampled)
    torch.testing.assert_close(run(build(resample="area"), student, teacher), expected)
    with pytest.raises(ValueError, match=r"\(3, 4\) grid.*\(6, 5\) grid"):
        run(build(), student, teacher)


def test_pairs_may_lie_on_different_grids():
    """A Swin's stages: each on a grid of its own."""
    student, teacher = maps(0, STUDENT_DIMS), maps(1, TEACHER_DIMS)
    student[0], teacher[0] = maps(2, {0: 5}, (6, 8))[0], maps(3, {0: 7}, (6, 8))[0]
    term = build()
    parts = [build(generate_weight=0.0), build(mimic_weight=0.0)]
    for part in parts:
        part.load_state_dict(term.state_dict(), strict=False)
    expected = run(parts[0], student, teacher) + run(parts[1], student, teacher)
    torch.testing.assert_close(run(term, student, teacher), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_tokens_are_summed_in_float32(features, dtype):
    student, teacher = (to(side, dtype) for side in features)
    loss = run(build(), student, teacher)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, run(build(), *features), rtol=0.02, atol=0)


def test_autocast_agrees_to_its_precision(features):
    expected = run(build(), *features)
    with torch.autocast("cpu", torch.bfloat16):
        loss = run(build(), *features)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected, rtol=0.02, atol=0)


@pytest.mark.parametrize("key", [0, 23])
def test_a_teachers_nan_is_not_hidden(features, key):
    student, teacher = features
    teacher[key].data[1, 3, 0] = torch.nan
    assert run(build(), student, teacher).isnan()


def test_all_zero_tokens_give_finite_gradients(features):
    student, teacher = features
    leaves = [one.data.zero_().requires_grad_() for one in student.values()]
    run(build(), student, teacher).backward()
    assert all(leaf.grad.isfinite().all() for leaf in leaves)


def test_it_compiles_without_a_break(features):
    results = []
    for term in (build(), torch.compile(build(), fullgraph=True, backend="aot_eager")):
        loss = run(term, *features)
        loss.backward()
        results.append([loss.detach(), *(parameter.grad for parameter in term.parameters())])
    torch.testing.assert_close(*results)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"mask_ratio": 0.0}, "mask_ratio must lie between 0 and 1, got 0.0"),
        ({"mask_ratio": 1.0}, "mask_ratio must lie between 0 and 1, got 1.0"),
        ({"mimic_weight": -1.0}, "mimic_weight must be finite and >= 0, got -1.0"),
        ({"generate_weight": -1.0}, "generate_weight must be finite and >= 0, got -1.0"),
        ({"mask_ratio": 0.3, "generate_weight": 0.0}, "mask_ratio=0.3 .*generate_weight=0"),
        ({"mimic_weight": 0.0, "generate_weight": 0.0}, "nothing to do for 3 pair"),
        ({"resample": "cubic"}, "resample must be one of"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=f"ViTKD: {message}"):
        build(**options)


def test_the_authors_options_are_those_of_who_gives_none():
    term = ViTKD(PAIRS, 1.0, STUDENT_DIMS, TEACHER_DIMS)
    assert (term.mask_ratio, term.mimic_weight, term.generate_weight) == (0.5, 3e-5, 3e-6)


def test_a_weight_of_mimicking_is_refused_where_nothing_is_mimicked():
    with pytest.raises(ValueError, match=r"mimic_weight=0\.2 .*single pair"):
        ViTKD([(0, 0)], 1.0, {0: 2}, {0: 2}, mimic_weight=0.2)
    assert ViTKD([(0, 0)], 1.0, {0: 2}, {0: 2}, mimic_weight=0.0).mimic_weight == 0


def test_an_empty_batch_costs_nothing():
    student, teacher = (maps(0, dims, batch=0) for dims in (STUDENT_DIMS, TEACHER_DIMS))
    term = build()
    loss = run(term, student, teacher)
    loss.backward()
    assert loss.item() == 0
    assert not any(parameter.grad.any() for parameter in term.parameters())


def test_a_single_pair_without_generation_is_refused():
    with pytest.raises(ValueError, match="the last pair is generated only"):
        ViTKD([(0, 0)], 1.0, {0: 2}, {0: 2}, generate_weight=0.0)


def test_a_key_without_channels_is_refused():
    with pytest.raises(ValueError, match="teacher_dims has no key 23"):
        ViTKD(PAIRS, 1.0, STUDENT_DIMS, {0: 7, 2: 6})


def test_a_missing_map_is_refused(features):
    student, teacher = features
    del student[11]
    with pytest.raises(ValueError, match="ViTKD: student has no key 11"):
        build()(student, teacher)


def test_other_channels_than_it_was_built_for_are_refused(features):
    student, _ = features
    with pytest.raises(ValueError, match=r"pair 2 must have \(4, 3\) channels.*got \(4, 8\)"):
        build()(student, maps(1, {**TEACHER_DIMS, 23: 8}))
