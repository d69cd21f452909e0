"""lift_kd and lift: what they compute, on every backend, against the float64 definition."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from bench.harness import peak_extra_bytes
from fastkd.ops import lift, lift_kd, self_check
from fastkd.ops.feature_kd.reference import LOSSES
from fastkd.ops.feature_kd.reference import definition as feature_kd_definition
from fastkd.ops.lift_kd import BACKENDS, LIFT_EPS
from fastkd.ops.lift_kd import reference as torch_path
from fastkd.ops.lift_kd.projection import Projection
from tests.harness.cases import BFLOAT16_FIRST, FINITE, nearest_dtype_error, relative_error
from tests.ops.test_feature_kd import LAYOUTS, layouts

UPSTREAM = 0.2
NAMES = ("tokens", "weight", "bias", "norm_weight", "norm_bias")

# [B, H, W, Ds], Dt
SHAPES = {
    "small": ((3, 6, 6, 32), 64),  # even grid, whole blocks; the smallest that CUDA C++ takes
    "swin": ((2, 7, 7, 40), 72),  # odd grid: no Nyquist column
    "oblong": ((3, 5, 6, 33), 57),  # nothing a multiple of any tile
    "one_token": ((5, 1, 1, 24), 40),  # a tile of many images
    "narrower": ((2, 4, 4, 96), 40),  # lifted down
    "slabs": ((1, 3, 4, 300), 72),  # more channels than one program accumulates or keeps
}
FEW_SHAPES = [
    pytest.param(shape, id=name, marks=[pytest.mark.slow] if name in ("swin", "narrower") else [])
    for name, shape in SHAPES.items()
]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
OPTIONS = {
    "norm": ("norm_weight", "norm_bias"),
    "norm_without_bias": ("norm_weight",),
    "bias": ("bias",),
    "bias_and_norm": ("bias", "norm_weight", "norm_bias"),
    "linear": (),
}
ALL = OPTIONS["bias_and_norm"]


@dataclass
class Problem:
    """Inputs of lift_kd by name; ``tokens`` and ``teacher`` are [B, H, W, D]."""

    tokens: Tensor
    teacher: Tensor
    parameters: dict[str, Tensor]

    @property
    def grid(self) -> tuple[int, int]:
        return tuple(self.tokens.shape[1:3])

    def to(self, dtype: torch.dtype) -> Problem:
        parameters = {name: x.to(dtype) for name, x in self.parameters.items()}
        return Problem(self.tokens.to(dtype), self.teacher.to(dtype), parameters)

    def call(self, backend, *, layout: str = "tokens", **options):
        """Value, pooled, lifted gradients by name, computed where the backend works."""
        tokens, teacher = (
            layouts(x, layout).to(backend.device) for x in (self.tokens, self.teacher)
        )
        if tokens.ndim == 3:
            options = {"grid": self.grid, **options}
        parameters = {name: x.to(backend.device) for name, x in self.parameters.items()}
        return backend.call(
            loss_and_gradients, tokens, teacher, parameters, backend=backend.name, **options
        )


def draw(shape, width: int, parts=ALL, case: str = "noise") -> Problem:
    batch, height, columns, channels = shape
    tokens, _ = FINITE[case]((batch, height * columns, channels))
    _, teacher = FINITE[case]((batch, height * columns, width))
    generator = torch.Generator().manual_seed(3)
    parameters = {
        "weight": torch.randn(width, channels, generator=generator) * channels**-0.5,
        "bias": torch.randn(width, generator=generator),
        "norm_weight": torch.randn(width, generator=generator),
        "norm_bias": torch.randn(width, generator=generator),
    }
    kept = {name: x for name, x in parameters.items() if name == "weight" or name in parts}
    grid = height, columns
    return Problem(tokens.unflatten(1, grid), teacher.unflatten(1, grid), kept)


def pooled_weights(pooled: Tensor) -> Tensor:
    """A gradient for the pooled tokens that is no constant."""
    count = torch.arange(pooled.numel(), dtype=torch.float64, device=pooled.device)
    return torch.cos(count).view_as(pooled).to(pooled.dtype)


def loss_and_gradients(
    tokens: Tensor,
    teacher: Tensor,
    parameters: dict[str, Tensor],
    pool: bool = False,
    wanted: tuple[str, ...] = NAMES,
    upstream: float = UPSTREAM,
    pooled_upstream: float = 1.0,
    **options,
):
    """One forward and backward; also runs in the interpreter's process."""
    leaves = {"tokens": tokens, **parameters}
    leaves = {name: x.detach().requires_grad_(name in wanted) for name, x in leaves.items()}
    parameters = {name: x for name, x in leaves.items() if name != "tokens"}
    result = lift_kd(leaves["tokens"], teacher_tokens=teacher, pool=pool, **parameters, **options)
    value, pooled = result if pool else (result, None)
    total = value * upstream
    if pool:
        total = total + (pooled * pooled_weights(pooled)).sum() * pooled_upstream
    if total.requires_grad:
        total.backward()
    gradients = {name: x.grad for name, x in leaves.items()}
    return value.detach(), None if pooled is None else pooled.detach(), gradients


def defined(
    problem: Problem,
    loss: str = "mse",
    dtype: torch.dtype = torch.float64,
    upstream: float = UPSTREAM,
    pooled_upstream: float = 1.0,
    beta: float = 1.0,
    lift_eps: float = LIFT_EPS,
):
    """The same by autograd through plain layers in a dtype; the lifted tokens come fourth.

    Half maps are compared in float32, as a KD loss in plain PyTorch would.
    """
    problem = problem.to(dtype)
    leaves = {"tokens": problem.tokens, **problem.parameters}
    leaves = {name: x.detach().requires_grad_() for name, x in leaves.items()}
    lifted = F.linear(leaves["tokens"], leaves["weight"], leaves.get("bias"))
    if "norm_weight" in leaves:
        norm = leaves["norm_weight"], leaves.get("norm_bias")
        lifted = F.layer_norm(lifted, lifted.shape[-1:], *norm, lift_eps)
    compared = [x if dtype == torch.float64 else x.float() for x in (lifted, problem.teacher)]
    value = feature_kd_definition(*compared, loss, beta)
    pooled = lifted.mean(dim=(1, 2))
    total = value * upstream
    if pooled_upstream:
        total = total + (pooled * pooled_weights(pooled)).sum() * pooled_upstream
    total.backward()
    gradients = {name: x.grad for name, x in leaves.items()}
    return value.detach(), pooled.detach(), gradients, lifted.detach()


def as_tokens(x: Tensor, like: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 1) if x.ndim == 4 else x.view(like.shape)


def skip_if_refused(backend, problem: Problem, loss: str, compute: torch.dtype) -> None:
    refuses = BACKENDS.implementations[backend.name].refuses
    vectors = (problem.parameters.get(name) for name in NAMES[2:])
    projection = Projection(problem.parameters["weight"], *vectors, LIFT_EPS, compute)
    reason = refuses(problem.tokens, projection, problem.teacher, loss)
    if reason is not None:
        pytest.skip(f"{backend.name}: {reason}")


def check(found, expected, tolerance: float = 1e-5) -> None:
    for name, ours, truth, _ in results(found, expected, expected):
        assert relative_error(ours, truth) < tolerance, name


def results(found, expected, eager):
    """(name, ours, truth, relative error of eager) of every result that there is."""
    value, pooled, gradients = found
    # One number may be right by chance; what it is made of is not.
    yield "value", value.cpu(), expected[0], relative_error(eager[3], expected[3])
    if pooled is not None:
        yield "pooled", pooled.cpu(), expected[1], relative_error(eager[1], expected[1])
    for name, truth in expected[2].items():
        if gradients[name] is None:
            continue
        ours = gradients[name].cpu()
        ours = as_tokens(ours, truth) if name == "tokens" else ours
        yield name, ours, truth, relative_error(eager[2][name], truth)


def check_half(found, expected, eager, dtype: torch.dtype, floor=None) -> None:
    """Every result within twice the error of plain PyTorch in the same dtype.

    ``floor``: the same in float32, where that loses digits, too.
    """
    floors = {} if floor is None else {n: e for n, _, _, e in results(found, expected, floor)}
    for name, ours, truth, plain in results(found, expected, eager):
        # float16 sums overflow in plain PyTorch, not here
        plain = 4 * torch.finfo(dtype).eps if plain != plain else plain
        limit = max(nearest_dtype_error(dtype, plain), 4 * floors.get(name, 0.0))
        assert relative_error(ours, truth) <= limit, name


@pytest.mark.parametrize("pool", [False, True], ids=["one_pass", "pooled"])
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("parts", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_float64_equals_the_definition_to_1e_12(shape, parts, loss, pool):
    problem = draw(*shape, parts).to(torch.float64)
    tokens, teacher = problem.tokens.flatten(1, 2), problem.teacher.flatten(1, 2)
    found = loss_and_gradients(
        tokens, teacher, problem.parameters, pool, loss=loss, grid=problem.grid
    )
    assert found[0].dtype == torch.float64
    check(found, defined(problem, loss, pooled_upstream=float(pool)), 1e-12)


@pytest.mark.parametrize("pool", [False, True], ids=["one_pass", "pooled"])
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("shape", FEW_SHAPES)
def test_every_shape(backend, shape, loss, pool):
    problem = draw(*shape)
    skip_if_refused(backend, problem, loss, torch.float32)
    found = problem.call(backend, loss=loss, pool=pool)
    assert found[0].dtype == torch.float32
    check(found, defined(problem, loss, pooled_upstream=float(pool)))


@pytest.mark.parametrize("pool", [False, True], ids=["one_pass", "pooled"])
@pytest.mark.parametrize("loss", ["mse", "cosine"])
@pytest.mark.parametrize("parts", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("dtype", BFLOAT16_FIRST, ids=str)
def test_bias_and_norm_are_optional(backend, parts, loss, pool, dtype):
    problem = draw(*SHAPES["small"], parts).to(dtype)
    skip_if_refused(backend, problem, loss, dtype)
    found = problem.call(backend, loss=loss, pool=pool)
    expected = defined(problem, loss, pooled_upstream=float(pool))
    eager = defined(problem, loss, dtype, pooled_upstream=float(pool))
    assert set(found[2]) == {"tokens", "weight", *parts}
    check_half(found, expected, eager, dtype)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("loss", ["spectral", pytest.param("cosine", marks=pytest.mark.slow)])
@pytest.mark.parametrize("pool", [False, True], ids=["one_pass", "pooled"])
def test_every_layout(backend, layout, loss, pool):
    dtype = torch.bfloat16 if backend.name == "cuda" else torch.float32
    problem = draw(*SHAPES["small"]).to(dtype)
    skip_if_refused(backend, problem, loss, dtype)
    found = problem.call(backend, layout=layout, loss=loss, pool=pool)
    expected = defined(problem, loss, pooled_upstream=float(pool))
    eager = defined(problem, loss, dtype, pooled_upstream=float(pool))
    check_half(found, expected, eager, dtype)


def equal_to_teacher(problem: Problem) -> Problem:
    """The teacher's tokens are the lifted student's, as far as the dtype can say."""
    names = [problem.parameters.get(name) for name in NAMES[1:]]
    exact = Projection(*(None if x is None else x.double() for x in names), LIFT_EPS, torch.float64)
    teacher = torch_path.lift(problem.tokens.double(), exact, torch.float64)
    return Problem(problem.tokens, teacher.to(problem.teacher.dtype), problem.parameters)


@pytest.mark.parametrize("dtype", BFLOAT16_FIRST, ids=str)
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("case", FINITE)
def test_hard_inputs_are_as_right_as_eager_in_the_same_dtype(backend, case, loss, dtype):
    problem = draw(*SHAPES["small"], ("norm_weight", "norm_bias"), case=case).to(dtype)
    skip_if_refused(backend, problem, loss, dtype)
    if case == "equal":
        problem = equal_to_teacher(problem)
    # Like a GradScaler: float16 keeps no gradients of 1e-9, which is not what is asked here.
    raw = defined(problem, loss, upstream=1.0, pooled_upstream=0.0)[2]
    largest = max(gradient.abs().max().item() for gradient in raw.values())
    upstream = 1.0 if case == "equal" else 100 / largest
    options = {"upstream": upstream, "pooled_upstream": 0.1}
    expected = defined(problem, loss, **options)
    eager = defined(problem, loss, dtype, **options)
    single = defined(problem, loss, torch.float32, **options)
    found = problem.call(backend, loss=loss, pool=True, **options)
    assert found[0].isfinite() and found[2]["tokens"].dtype == dtype
    if case == "equal":  # a loss of rounding errors: only its size can be compared
        assert found[0].item() <= 2 * eager[0].item() + 1e-6
        return
    check_half(found, expected, eager, dtype, single)


def test_smooth_l1_takes_its_threshold(backend):
    problem = draw(*SHAPES["small"]).to(torch.bfloat16)
    for beta in (0.0, 0.25, 2.0):
        found = problem.call(backend, loss="smooth_l1", beta=beta, pool=True)
        expected = defined(problem, "smooth_l1", beta=beta)
        eager = defined(problem, "smooth_l1", torch.bfloat16, beta=beta)
        check_half(found, expected, eager, torch.bfloat16)


# The widths and the dtype that the CUDA C++ kernels take, too.
@pytest.mark.parametrize("pool", [False, True], ids=["one_pass", "pooled"])
@pytest.mark.parametrize("lift_eps", [0.0, 0.5])
def test_the_layer_norm_takes_its_eps(backend, lift_eps, pool):
    problem = draw((1, 2, 3, 192), 384, ("norm_weight", "norm_bias"))
    problem.tokens *= 0.5  # eps is a part of the variance that cannot be missed
    problem = problem.to(torch.bfloat16)
    found = problem.call(backend, pool=pool, lift_eps=lift_eps)
    options = {"pooled_upstream": float(pool), "lift_eps": lift_eps}
    truth, eager = (defined(problem, dtype=x, **options) for x in (torch.float64, torch.bfloat16))
    check_half(found, truth, eager, torch.bfloat16)
    default = defined(problem, pooled_upstream=float(pool))
    assert relative_error(found[0].cpu(), default[0]) > (1e-6 if lift_eps == 0 else 1e-2)


@pytest.mark.parametrize("size", [1e20, 1e30])
def test_cosines_of_teachers_of_any_size(backend, size):
    problem = draw((2, 2, 3, 192), 384, ("norm_weight", "norm_bias"))
    problem.teacher[0] *= size  # beside an image of ordinary size
    problem = problem.to(torch.bfloat16)
    if backend.name == "cuda":  # it has no registers left to scale tokens, and says NaN
        skip_if_refused(backend, problem, "cosine", torch.bfloat16)
        assert problem.call(backend, loss="cosine")[0].isnan()
        return
    found = problem.call(backend, loss="cosine")
    truth = defined(problem, "cosine", pooled_upstream=0.0)
    eager = defined(problem, "cosine", torch.bfloat16, pooled_upstream=0.0)
    check_half(found, truth, eager, torch.bfloat16)


@pytest.mark.parametrize("pool", [False, True], ids=["one_pass", "pooled"])
def test_parameters_may_lie_in_memory_any_way(backend, pool):
    problem = draw(*SHAPES["small"]).to(torch.bfloat16)
    expected = problem.call(backend, pool=pool)
    weight = problem.parameters["weight"]
    problem.parameters["weight"] = weight.mT.contiguous().mT
    for name in ("bias", "norm_weight", "norm_bias"):
        problem.parameters[name] = torch.stack([problem.parameters[name]] * 3, dim=1)[:, 1]
    found = problem.call(backend, pool=pool)
    assert torch.equal(found[0], expected[0])
    for name in NAMES:
        assert torch.equal(found[2][name], expected[2][name]), name


@pytest.mark.parametrize("pool", [False, True], ids=["one_pass", "pooled"])
@pytest.mark.parametrize("wanted", [("tokens",), ("weight",), ("bias", "norm_bias"), ()])
def test_only_the_gradients_that_are_required_come_back(backend, wanted, pool):
    problem = draw(*SHAPES["small"]).to(torch.bfloat16)
    everything = problem.call(backend, pool=pool)
    value, _, gradients = problem.call(backend, pool=pool, wanted=wanted)
    assert torch.equal(value, everything[0])
    for name, gradient in gradients.items():
        if name in wanted:
            assert torch.equal(gradient, everything[2][name])
        else:
            assert gradient is None


@pytest.mark.parametrize("used", ["loss", "pooled"])
def test_either_output_may_be_used_alone(backend, used):
    problem = draw(*SHAPES["small"]).to(torch.bfloat16)
    options = {"upstream": float(used == "loss"), "pooled_upstream": float(used == "pooled")}
    found = problem.call(backend, pool=True, loss="spectral", **options)
    expected = defined(problem, "spectral", **options)
    eager = defined(problem, "spectral", torch.bfloat16, **options)
    check_half(found, expected, eager, torch.bfloat16)


def gradients_of_one_output(tokens, teacher, parameters, used: int, backend: str):
    tokens = tokens.detach().requires_grad_()
    outputs = lift_kd(
        tokens, teacher_tokens=teacher, **parameters, pool=True, loss="spectral", backend=backend
    )
    return torch.autograd.grad(outputs[used].sum(), tokens)[0]


@pytest.mark.parametrize("used", [0, 1], ids=["loss", "pooled"])
def test_an_unused_output_has_no_part_in_the_gradient(backend, used):
    problem = draw(*SHAPES["small"], ("norm_weight",)).to(torch.bfloat16)
    inputs = (x.flatten(1, 2).to(backend.device) for x in (problem.tokens, problem.teacher))
    parameters = {name: x.to(backend.device) for name, x in problem.parameters.items()}
    found = backend.call(gradients_of_one_output, *inputs, parameters, used, backend.name)
    exact = problem.to(torch.float64)
    truth = gradients_of_one_output(
        exact.tokens.flatten(1, 2), exact.teacher.flatten(1, 2), exact.parameters, used, "torch"
    )
    assert relative_error(found.cpu(), truth) < 2e-2


def pooled_gradient_at_an_odd_address(tokens, teacher, parameters, backend: str):
    tokens = tokens.detach().requires_grad_()
    value, pooled = lift_kd(
        tokens, teacher_tokens=teacher, **parameters, pool=True, backend=backend
    )
    # The gradient of the second half of a concatenation is a view that starts anywhere.
    joined = torch.cat([pooled.new_zeros(3), pooled.flatten()])
    return torch.autograd.grad(value + (joined * pooled_weights(joined)).sum(), tokens)[0]


def test_the_pooled_gradient_may_start_at_any_address(backend):
    problem = draw(*SHAPES["small"], ("norm_weight",)).to(torch.bfloat16)
    inputs = (x.flatten(1, 2).to(backend.device) for x in (problem.tokens, problem.teacher))
    parameters = {name: x.to(backend.device) for name, x in problem.parameters.items()}
    found = backend.call(pooled_gradient_at_an_odd_address, *inputs, parameters, backend.name)
    exact = problem.to(torch.float64)
    truth = pooled_gradient_at_an_odd_address(
        exact.tokens.flatten(1, 2), exact.teacher.flatten(1, 2), exact.parameters, "torch"
    )
    assert relative_error(found.cpu(), truth) < 2e-2


@pytest.mark.parametrize("upstream", [1.0, 0.0, -3.0, 0.3])
def test_the_one_pass_form_scales_by_what_arrives(backend, upstream):
    problem = draw(*SHAPES["small"]).to(torch.bfloat16)
    found = problem.call(backend, upstream=upstream)
    expected = defined(problem, upstream=upstream, pooled_upstream=0.0)
    eager = defined(problem, "mse", torch.bfloat16, upstream=upstream, pooled_upstream=0.0)
    check_half(found, expected, eager, torch.bfloat16)


def two_backwards(tokens, teacher, parameters, backend: str):
    tokens = tokens.detach().requires_grad_()
    value = lift_kd(tokens, teacher_tokens=teacher, **parameters, backend=backend)
    (first,) = torch.autograd.grad(value * 0.3, tokens, retain_graph=True)
    first = first.clone()
    (second,) = torch.autograd.grad(value * 0.3, tokens)
    return first, second


def test_a_retained_graph_can_be_walked_twice(backend):
    problem = draw(*SHAPES["small"]).to(torch.bfloat16)
    inputs = (x.flatten(1, 2).to(backend.device) for x in (problem.tokens, problem.teacher))
    parameters = {name: x.to(backend.device) for name, x in problem.parameters.items()}
    first, second = backend.call(two_backwards, *inputs, parameters, backend.name)
    assert torch.equal(first, second)  # the first rounds its factor no more than the second


@pytest.mark.parametrize("pool", [False, True], ids=["one_pass", "pooled"])
def test_scaled_float16_gradients_do_not_vanish(backend, pool):
    problem = draw(*SHAPES["small"], ("norm_weight",)).to(torch.float16)
    problem.tokens *= 20  # the norm makes gradients small
    found = problem.call(backend, pool=pool, upstream=2.0**-7, pooled_upstream=0.0)[2]["tokens"]
    scaled = problem.call(backend, pool=pool, upstream=2.0**13, pooled_upstream=0.0)
    truth = defined(problem, upstream=2.0**13, pooled_upstream=0.0)
    eager = defined(problem, "mse", torch.float16, upstream=2.0**13, pooled_upstream=0.0)
    unscaled = as_tokens(found.cpu().double(), truth[2]["tokens"]) * 2.0**20
    assert relative_error(unscaled, truth[2]["tokens"]) > 0.02  # without scaling they do
    check_half((scaled[0], None, scaled[2]), truth, eager, torch.float16)


@pytest.mark.parametrize("teacher_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("token_dtype", DTYPES, ids=str)
def test_float32_parameters_serve_tokens_of_any_dtype(backend, token_dtype, teacher_dtype):
    problem = draw(*SHAPES["small"])
    problem.tokens = problem.tokens.to(token_dtype)
    problem.teacher = problem.teacher.to(teacher_dtype)
    skip_if_refused(backend, problem, "mse", token_dtype)
    value, pooled, gradients = problem.call(backend, pool=True)
    assert value.dtype == torch.float32 and pooled.dtype == token_dtype
    assert gradients["tokens"].dtype == token_dtype
    assert gradients["weight"].dtype == gradients["norm_bias"].dtype == torch.float32
    tolerance = 1e-5 if token_dtype == torch.float32 else 2e-2
    check((value, pooled, gradients), defined(problem), tolerance)


def under_autocast(tokens, teacher, parameters, **options):
    with torch.autocast(tokens.device.type, torch.bfloat16):
        return loss_and_gradients(tokens, teacher, parameters, **options)


@pytest.mark.parametrize("pool", [False, True], ids=["one_pass", "pooled"])
def test_autocast_decides_the_dtype_of_products(backend, pool):
    problem = draw(*SHAPES["small"])
    inputs = (x.flatten(1, 2).to(backend.device) for x in (problem.tokens, problem.teacher))
    parameters = {name: x.to(backend.device) for name, x in problem.parameters.items()}
    value, pooled, gradients = backend.call(
        under_autocast, *inputs, parameters, pool=pool, backend=backend.name
    )
    # float32 in, float32 out, but the products have seen bfloat16 operands
    assert all(x.dtype == torch.float32 for x in gradients.values())
    expected = defined(problem, pooled_upstream=float(pool))
    check((value, pooled, gradients), expected, 2e-2)
    assert relative_error(gradients["weight"].cpu(), expected[2]["weight"]) > 1e-4
    if pool:
        assert pooled.dtype == torch.float32


def lifted_with_gradients(tokens, parameters, pool: bool, wanted: bool, **options):
    leaves = {"tokens": tokens, **parameters}
    leaves = {name: x.detach().requires_grad_(wanted) for name, x in leaves.items()}
    result = lift(pool=pool, **leaves, **options)
    if wanted:
        (result * pooled_weights(result)).sum().backward()
    return result.detach(), {name: x.grad for name, x in leaves.items()}


@pytest.mark.parametrize("parts", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("layout", ["cls_sliced_off", "channels_first"])
@pytest.mark.parametrize("wanted", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("pool", [False, True], ids=["map", "pooled"])
def test_lift_equals_linear_and_layer_norm(backend, pool, wanted, layout, parts):
    if wanted and not pool and backend.name != "torch":
        pytest.skip("training on the map goes through torch's own layers, and says so")
    # Their half precision is not ours to test.
    dtype = torch.float32 if wanted and not pool else torch.bfloat16
    problem = draw(*SHAPES["small"], parts).to(dtype)
    tokens = layouts(problem.tokens, layout).to(backend.device)
    parameters = {name: x.to(backend.device) for name, x in problem.parameters.items()}
    found, gradients = backend.call(
        lifted_with_gradients, tokens, parameters, pool, wanted, backend=backend.name
    )
    assert found.dtype == dtype
    exact = {name: x.double() for name, x in problem.parameters.items()}
    truth, truths = lifted_with_gradients(
        layouts(problem.tokens.double(), layout), exact, pool, True, backend="torch"
    )
    plain = F.linear(problem.tokens.double().flatten(1, 2), exact["weight"], exact.get("bias"))
    if "norm_weight" in exact:
        plain = F.layer_norm(
            plain, plain.shape[-1:], exact["norm_weight"], exact.get("norm_bias"), LIFT_EPS
        )
    if pool:
        plain = plain.mean(dim=1)
    elif layout == "channels_first":
        plain = plain.mT.unflatten(2, problem.grid)
    assert relative_error(truth, plain) < 1e-12
    assert found.shape == plain.shape
    assert relative_error(found.cpu(), plain) < 1e-2
    for name, gradient in gradients.items():
        if wanted:
            assert relative_error(gradient.cpu(), truths[name]) < 2e-2, name


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("pool", [False, True], ids=["one_pass", "pooled"])
def test_nan_and_inf_are_handed_on(backend, loss, bad, pool):
    problem = draw(*SHAPES["small"]).to(torch.bfloat16)
    problem.tokens[1, 2, 3, 5] = bad
    value, pooled, gradients = problem.call(backend, loss=loss, pool=pool)
    tokens = gradients["tokens"].view(problem.tokens.shape)
    assert not value.isfinite() and not gradients["weight"].isfinite().all()
    assert not tokens[1].isfinite().all()
    if loss != "spectral":  # whose row sums are products over a tile of several images
        assert tokens[0].isfinite().all() and tokens[2].isfinite().all()
    if pool:
        assert not pooled[1].isfinite().any() and pooled[0].isfinite().all()


@pytest.mark.parametrize("pool", [False, True], ids=["one_pass", "pooled"])
def test_an_empty_batch_gives_zero(backend, pool):
    problem = draw(*SHAPES["small"])
    problem.tokens, problem.teacher = problem.tokens[:0], problem.teacher[:0]
    value, pooled, gradients = problem.call(backend, pool=pool)
    assert value.item() == 0
    assert gradients["tokens"].shape == (0, 36, 32) and gradients["weight"].eq(0).all()
    assert not pool or pooled.shape == (0, 64)


@pytest.mark.parametrize("pool", [False, True], ids=["one_pass", "pooled"])
@pytest.mark.parametrize("loss", LOSSES)
def test_a_second_run_is_bitwise_equal(backend, loss, pool):
    problem = draw(*SHAPES["small"]).to(torch.bfloat16)
    first, second = (problem.call(backend, loss=loss, pool=pool) for _ in range(2))
    assert torch.equal(first[0], second[0])
    for name in NAMES:
        assert torch.equal(first[2][name], second[2][name])


def inputs_after_a_step(tokens, teacher, parameters, **options):
    loss_and_gradients(tokens, teacher, parameters, **options)
    return tokens, teacher, parameters


@pytest.mark.parametrize("pool", [False, True], ids=["one_pass", "pooled"])
def test_inputs_are_left_as_they_are(backend, pool):
    problem = draw(*SHAPES["small"]).to(torch.bfloat16)
    tokens, teacher = (
        x.flatten(1, 2).to(backend.device) for x in (problem.tokens, problem.teacher)
    )
    parameters = {name: x.to(backend.device) for name, x in problem.parameters.items()}
    after = backend.call(
        inputs_after_a_step, tokens.clone(), teacher.clone(),
        {name: x.clone() for name, x in parameters.items()}, pool=pool, backend=backend.name,
    )  # fmt: skip
    assert torch.equal(after[0], tokens) and torch.equal(after[1], teacher)
    assert all(torch.equal(after[2][name], x) for name, x in parameters.items())


def in_small_bands(tokens, teacher, parameters, **options):
    """Several bands and splits, as only training batches have them."""
    from fastkd.ops.lift_kd import triton

    before = triton.BAND_TOKENS
    triton.BAND_TOKENS = 128
    try:
        return loss_and_gradients(tokens, teacher, parameters, **options)
    finally:
        triton.BAND_TOKENS = before


@pytest.mark.slow
@pytest.mark.parametrize("pool", [False, True], ids=["one_pass", "pooled"])
@pytest.mark.parametrize("loss", ["mse", "spectral"])
def test_triton_adds_up_all_bands(backend, loss, pool):
    if backend.name != "triton":
        pytest.skip("the others have no bands of their own")
    problem = draw((9, 6, 7, 33), 57)
    tokens, teacher = (
        x.flatten(1, 2).to(backend.device) for x in (problem.tokens, problem.teacher)
    )
    parameters = {name: x.to(backend.device) for name, x in problem.parameters.items()}
    found = backend.call(
        in_small_bands, tokens, teacher, parameters,
        pool=pool, loss=loss, grid=problem.grid, backend=backend.name,
    )  # fmt: skip
    check(found, defined(problem, loss, pooled_upstream=float(pool)))


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(torch_path, "CHUNK_BYTES", 57 * 4 * 10)  # ten tokens


@pytest.mark.parametrize("pool", [False, True], ids=["one_pass", "pooled"])
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("grid", [(2, 3), (5, 6), (1, 30), (3, 12)])
def test_the_torch_path_is_right_however_it_is_cut(small_chunks, loss, grid, pool):
    problem = draw((3, *grid, 33), 57)
    tokens, teacher = problem.tokens.flatten(1, 2), problem.teacher.flatten(1, 2)
    found = loss_and_gradients(tokens, teacher, problem.parameters, pool, loss=loss, grid=grid)
    check(found, defined(problem, loss, pooled_upstream=float(pool)))


def eager_step(tokens, teacher, parameters):
    lifted = F.linear(tokens, parameters["weight"])
    norm = parameters["norm_weight"], parameters["norm_bias"]
    value = F.mse_loss(F.layer_norm(lifted, lifted.shape[-1:], *norm, LIFT_EPS), teacher)
    return torch.autograd.grad(value, (tokens, *parameters.values()))


def test_on_a_cpu_it_takes_a_quarter_of_eagers_memory_however_many_tokens():
    def peaks(batch: int) -> tuple[int, int]:
        problem = draw((batch, 14, 14, 192), 384, ("norm_weight", "norm_bias"))
        tokens = problem.tokens.flatten(1, 2).requires_grad_()
        teacher = problem.teacher.flatten(1, 2)
        parameters = {name: x.requires_grad_() for name, x in problem.parameters.items()}

        def ours() -> object:
            value = lift_kd(tokens, teacher_tokens=teacher, **parameters)
            return torch.autograd.grad(value, (tokens, *parameters.values()))

        own = peak_extra_bytes(ours, "cpu")
        eager = peak_extra_bytes(lambda: eager_step(tokens, teacher, parameters), "cpu")
        return own - tokens.nbytes, eager  # the tokens' gradient is a result

    small, _ = peaks(16)
    large, eager = peaks(64)
    assert large < 1.05 * small
    assert large + 64 * 196 * 192 * 4 <= eager / 4


def test_tuning_keeps_the_fastest_configuration_that_fits(monkeypatch):
    tiles = pytest.importorskip("fastkd.ops.lift_kd.tiles")
    from fastkd.ops.lift_kd import triton as tuning

    milliseconds = dict.fromkeys(tiles.CANDIDATES, 2.0)
    milliseconds |= {tiles.HALF: 3.0, tiles.CANDIDATES[3]: 1.0, tiles.FLOAT: float("inf")}
    monkeypatch.setattr(tuning, "_milliseconds", lambda tile, *rest: milliseconds[tile])
    problem = draw(*SHAPES["small"])
    projection = Projection(
        problem.parameters["weight"], None, None, None, LIFT_EPS, torch.bfloat16
    )
    search = (problem.tokens, projection, "mse", tiles.HALF, None)
    assert tuning._search(*search) == tiles.CANDIDATES[3]
    assert tuning.tuned(*search) == tiles.HALF  # not asked for


FLAT = (torch.randn(2, 9, 8), torch.randn(12, 8), torch.randn(2, 9, 12))


@pytest.mark.parametrize("pool", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_forward_passes_opcheck(dtype, pool):
    problem = draw((2, 3, 3, 8), 12).to(dtype)
    leaves = [problem.tokens, *problem.parameters.values()]
    leaves = [x.requires_grad_() for x in leaves]
    options = problem.teacher, "spectral", 1.0, pool, "torch"
    arguments = (*leaves, LIFT_EPS, dtype, False, *options)
    torch.library.opcheck(torch.ops.fastkd.lift_kd.default, arguments)


def test_the_other_operators_pass_opcheck():
    problem = draw((2, 3, 3, 8), 12)
    leaves = [problem.tokens, *problem.parameters.values()]
    lifted = *leaves, LIFT_EPS, torch.float32, False
    teacher, options = problem.teacher, ("cosine", 1.0)
    needs = [True, True, False, True, True]
    _, pooled, stats = torch.ops.fastkd.lift_kd(*lifted, teacher, *options, True, "torch")
    upstream = torch.tensor(0.5)
    torch.library.opcheck(
        torch.ops.fastkd.lift_kd_backward.default,
        (upstream, pooled, *lifted, teacher, stats, *options, needs, "torch"),
    )
    torch.library.opcheck(torch.ops.fastkd.lift.default, (*lifted, torch.float32, "torch"))
    torch.library.opcheck(torch.ops.fastkd.scale_.default, (torch.ones(3), upstream, "torch"))
    lifted = *(x.requires_grad_() for x in leaves), LIFT_EPS, torch.float32, True
    torch.library.opcheck(
        torch.ops.fastkd.lift_kd_one_pass.default,
        (*lifted, teacher, *options, [True] * 5, "torch"),
    )


def test_gradients_pass_gradcheck():
    problem = draw((2, 2, 3, 4), 5).to(torch.float64)
    tokens, teacher = problem.tokens.flatten(1, 2), problem.teacher.flatten(1, 2)
    leaves = [x.requires_grad_() for x in (tokens, *problem.parameters.values())]
    for loss in LOSSES:
        for pool in (False, True):

            def step(tokens, *parameters, loss=loss, pool=pool):
                named = dict(zip(problem.parameters, parameters))
                return lift_kd(
                    tokens, teacher_tokens=teacher, loss=loss, grid=(2, 3), pool=pool, **named
                )

            assert torch.autograd.gradcheck(step, leaves)


@pytest.mark.parametrize("pool", [False, True], ids=["one_pass", "pooled"])
@pytest.mark.parametrize("autocast", [False, True])
def test_compiles_without_a_graph_break(pool, autocast):
    problem = draw((2, 4, 4, 8), 12)
    tokens, teacher = problem.tokens.flatten(1, 2).requires_grad_(), problem.teacher.flatten(1, 2)
    parameters = {name: x.requires_grad_() for name, x in problem.parameters.items()}

    def step(tokens, teacher, parameters):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            result = lift_kd(
                tokens * 2, teacher_tokens=teacher, loss="spectral", pool=pool, **parameters
            )
        return result[0] + result[1].float().square().sum() if pool else result * 3

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    leaves = tokens, *parameters.values()
    value, expected = compiled(tokens, teacher, parameters), step(tokens, teacher, parameters)
    assert torch.equal(value, expected)
    for found, truth in zip(
        torch.autograd.grad(value, leaves), torch.autograd.grad(expected, leaves)
    ):
        assert torch.equal(found, truth)


def test_compiles_with_dynamic_token_counts():
    weight, norm = torch.randn(12, 8), torch.randn(12)

    def step(tokens, teacher):
        return lift_kd(tokens, weight, teacher, None, norm, pool=True)

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    for count in (16, 36, 49):
        inputs = torch.randn(2, count, 8), torch.randn(2, count, 12)
        for found, expected in zip(compiled(*inputs), step(*inputs)):
            assert torch.equal(found, expected)


@pytest.mark.parametrize("pool", [False, True], ids=["one_pass", "pooled"])
def test_flop_counters_see_what_they_see_of_the_layers(pool):
    problem = draw((2, 3, 3, 8), 12, ())
    leaves = [x.requires_grad_() for x in (problem.tokens, problem.parameters["weight"])]

    def count(step) -> int:
        with FlopCounterMode(display=False) as counter:
            torch.autograd.grad(step(leaves[0].flatten(1, 2), leaves[1]), leaves)
        return counter.get_total_flops()

    def fused(tokens, weight):
        result = lift_kd(tokens, weight, problem.teacher.flatten(1, 2), pool=pool)
        return result[0] + result[1].sum() if pool else result

    plain = count(lambda tokens, weight: F.linear(tokens, weight).sum())
    assert count(fused) == plain > 0


def test_meta_tensors_tell_shapes():
    tokens, weight, teacher = (x.to("meta") for x in FLAT)
    value, pooled = lift_kd(tokens, weight, teacher, pool=True)
    assert value.shape == () and pooled.shape == (2, 12)
    assert lift(tokens, weight).shape == (2, 9, 12)


def test_no_gradient_is_computed_without_grad_mode():
    tokens, weight, teacher = FLAT
    with torch.no_grad():
        value = lift_kd(tokens.clone().requires_grad_(), weight, teacher)
    assert not value.requires_grad


@pytest.mark.parametrize("pool", [False, True], ids=["one_pass", "pooled"])
def test_a_second_derivative_is_refused(pool):
    tokens, weight, teacher = FLAT
    tokens = tokens.clone().requires_grad_()
    result = lift_kd(tokens, weight, teacher, pool=pool)
    value = result[0].square() + result[1].sum() if pool else result.square()
    with pytest.raises(RuntimeError, match="lift_kd: its gradient cannot be differentiated again"):
        torch.autograd.grad(value, tokens, create_graph=True)


def test_a_float64_teacher_changes_no_dtype():
    tokens, weight, teacher = FLAT
    value, pooled = lift_kd(tokens, weight, teacher.double(), pool=True)
    assert value.dtype == pooled.dtype == torch.float32
    assert torch.equal(value, lift_kd(tokens, weight, teacher))


def test_a_gradient_of_the_lifted_map_has_no_backend_of_its_own():
    tokens, weight, _ = FLAT
    with pytest.raises(RuntimeError, match=r"lift: backend 'triton' cannot run: .*torch's own"):
        lift(tokens, weight.clone().requires_grad_(), backend="triton")


S, W, T = torch.zeros(8, 196, 192), torch.zeros(384, 192), torch.zeros(8, 196, 384)
V = torch.zeros(384)

BAD_INPUTS = {
    "cls_in_teacher": (
        (S, W, torch.zeros(8, 197, 384)),
        {},
        r"teacher_tokens must be \[8, 196, 384\].*got \[8, 197, 384\] \(a CLS token left in\?\)",
    ),
    "cls_in_student": (
        (torch.zeros(8, 197, 192), W, T),
        {},
        r"got \[8, 196, 384\] \(a CLS token left in student_tokens\?\)",
    ),
    "teacher_width": ((S, W, S), {}, r"teacher_tokens must be \[8, 196, 384\].*\[8, 196, 192\]"),
    "weight": ((S, W.mT, T), {}, r"weight must be \[Dt, 192\].*got \[192, 384\]"),
    "bias": ((S, W, T), {"bias": V[:3]}, r"bias must be \[384\].*got \[3\]"),
    "norm": ((S, W, T), {"norm_bias": V}, r"norm_bias needs norm_weight"),
    "loss": ((S, W, T), {"loss": "l2"}, r"'mse', 'spectral'.*got 'l2'"),
    "grid": ((S, W, T), {"grid": (14, 13)}, r"grid \(14, 13\) does not match 196 tokens"),
    "no_square": ((S[:, 1:], W, T[:, 1:]), {"loss": "spectral"}, r"195 tokens"),
    "dims": ((S[0], W, T[0]), {}, r"\[B, N, D\] or \[B, D, H, W\], got \[196, 192\]"),
    "mixed": ((S, W, torch.zeros(8, 384, 14, 14)), {}, r"both"),
    "no_tokens": ((S[:, :0], W, T[:, :0]), {}, r"only the batch of student_tokens may be empty"),
    "lift_eps": ((S, W, T), {"lift_eps": -1.0}, r"lift_eps must be finite and >= 0, got -1"),
    "beta": ((S, W, T), {"beta": float("nan")}, r"beta must be finite"),
    "backend": ((S, W, T), {"backend": "jax"}, r"backend must be one of.*got 'jax'"),
    "device": ((S, W.to("meta"), T), {}, r"weight must be on cpu like the tokens, got meta"),
    "teacher_gradient": (
        (S, W, T.clone().requires_grad_()),
        {},
        r"teacher_tokens requires a gradient.*detach",
    ),
}


@pytest.mark.parametrize(("inputs", "options", "message"), BAD_INPUTS.values(), ids=BAD_INPUTS)
def test_bad_inputs_are_named(inputs, options, message):
    with pytest.raises(ValueError, match=f"lift_kd: .*{message}"):
        lift_kd(*inputs, **options)


def test_lift_names_its_own_arguments():
    with pytest.raises(ValueError, match=r"lift: weight must be \[Dt, 192\].*got \[192, 384\]"):
        lift(S, W.mT)
    with pytest.raises(TypeError, match="lift: tokens must have a float dtype"):
        lift(S.int(), W)


@pytest.mark.parametrize("bad", [T.int(), [1.0]], ids=["int", "list"])
def test_inputs_without_a_float_dtype_are_a_type_error(bad):
    with pytest.raises(TypeError, match="teacher_tokens must"):
        lift_kd(S, W, bad)


def test_float64_stays_on_the_reference(backend):
    if backend.name == "torch":
        return
    inputs = [x.double().to(backend.device) for x in FLAT]
    with pytest.raises(RuntimeError, match="float64 runs on 'torch' only"):
        backend.call(lift_kd, *inputs, backend=backend.name)


def self_checked(name: str, device: str, dtypes, loss: str, compute, normed: bool) -> str | None:
    tokens, weight, teacher = (torch.zeros(1, dtype=dtype, device=device) for dtype in dtypes)
    norm_weight = weight if normed else None
    projection = Projection(weight, None, norm_weight, None, LIFT_EPS, compute)
    return self_check.failure(BACKENDS, name, (tokens, projection, teacher, loss))


@pytest.mark.slow
@pytest.mark.parametrize("normed", [True, False], ids=["norm", "linear"])
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize(
    "compute",
    [pytest.param(d, marks=[] if d is torch.bfloat16 else pytest.mark.nightly) for d in DTYPES],
    ids=str,
)
def test_every_backend_passes_its_self_check(backend, compute, loss, normed):
    if backend.name == "cuda" and compute == torch.float32:
        pytest.skip("half precision only")
    dtypes = (torch.float32, torch.float32, torch.bfloat16)
    options = dtypes, loss, compute, normed
    assert backend.call(self_checked, backend.name, backend.device, *options) is None


def test_an_unproven_backend_runs_only_where_it_is_asked_for(monkeypatch):
    from fastkd.ops import backend as backends

    monkeypatch.setattr(backends, "unavailable", lambda name, device: None)
    monkeypatch.setattr(backends, "EMULATED", set())
    monkeypatch.setenv("FASTKD_SELF_CHECK", "0")
    monkeypatch.delenv("FASTKD_UNPROVEN", raising=False)
    inputs = (torch.zeros(2, 6, 6, 32), torch.zeros(64, 32), torch.zeros(2, 6, 6, 64))
    tokens, weight, teacher = (x.bfloat16() for x in inputs)
    projection = Projection(weight, None, None, None, LIFT_EPS, torch.bfloat16)
    assert not BACKENDS.implementations["cuda"].proven
    reason = BACKENDS.why_not("cuda", tokens, projection, teacher, "mse")
    assert "no GPU has verified it yet" in reason
    monkeypatch.setenv("FASTKD_UNPROVEN", "1")
    reason = BACKENDS.why_not("cuda", tokens, projection, teacher, "mse")
    assert reason is None or "verified" not in reason
