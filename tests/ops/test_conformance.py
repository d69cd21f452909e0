"""What every operator must do, for each entry of operators.py on each of its backends."""

from __future__ import annotations

import functools
import importlib
import itertools
import pkgutil
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

import fastkd.losses
import fastkd.ops
from fastkd import ops
from tests.harness.cases import relative_error
from tests.ops.answers import (
    answer,
    bfloat16_products,
    compare,
    found,
    inputs_of,
    options_of,
    right,
    same_bits,
    truth,
    usual,
)
from tests.ops.operators import OPERATORS, TENSOR, UPSTREAM, Operator, Tensors

for package in (fastkd.ops, fastkd.losses):  # before tests declare operators of their own
    for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
        if not module.name.endswith((".triton", ".kernels", ".tiles")):  # which need triton
            importlib.import_module(module.name)
# Names with an underscore are the compiled library's.
DECLARED = {
    name.removeprefix("fastkd::")
    for name in torch._C._dispatch_get_all_op_names()
    if name.startswith("fastkd::") and not name.startswith("fastkd::_")
}


def each(
    variants: str = "forms",
    where: Callable[[Operator], bool] = lambda operator: True,
    backends: bool = True,
    leave_out: Callable[..., bool] = lambda *_: False,
    slow: Callable[..., bool] = lambda *_: False,
    **axes: Callable[[Operator], object],
):
    """Parametrize over operators, their backends, variants and further axes.

    ``leave_out`` and ``slow`` take (operator, backend, variant, *axes).
    """
    rows = []
    for name, operator in OPERATORS.items():
        if not where(operator):
            continue
        chosen = getattr(operator, variants, ()) or operator.variants
        chosen = [*operator.variants][:1] if variants == "first" else chosen
        places = operator.backends if backends else ("torch",)
        values = (axis(operator) for axis in axes.values())
        for backend, *rest in itertools.product(places, chosen, *values):
            if leave_out(operator, backend, *rest):
                continue
            words = [str(x).removeprefix("torch.") for x in (backend, *rest) if x != "plain"]
            marks = [pytest.mark.slow] if slow(operator, backend, *rest) else []
            rows.append(
                pytest.param(name, backend, *rest, id="-".join([name, *words]), marks=marks)
            )
    return pytest.mark.parametrize(
        ("name", "backend", "variant", *axes), rows, indirect=["backend"]
    )


ELEMENTWISE = ("mse", "smooth_l1")  # the interpreter takes hard inputs of these with -m slow
# Of strides as others have.
RARE_LAYOUTS = ("every_other_token", "transposed", "expanded")


def rest_on_triton(operator: Operator, backend: str, variant: str, *_: object) -> bool:
    """What the interpreter does only with -m slow: other variants, and the same kernels again."""
    others = operator.forms and variant not in operator.forms
    return backend == "triton" and bool(others or operator.kernels_of)


def not_first(operator: Operator, variant: str) -> bool:
    return bool(operator.forms) and variant != operator.forms[0]


def differentiable(operator: Operator) -> bool:
    return bool(operator.wanted)


@pytest.fixture(autouse=True)
def _a_process_group(request: pytest.FixtureRequest) -> Iterator[None]:
    alone = request.node.callspec.params.get("name") if hasattr(request.node, "callspec") else ""
    if alone == "gather_rows":
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        yield
        dist.destroy_process_group()
    else:
        yield


# ----------------------------------------------------------------------------- values


@each("variants", backends=False, shape=lambda operator: operator.shapes)
def test_float64_equals_the_reference(name, backend, variant, shape):
    compare(backend, name, variant, shape, dtype=torch.float64)


@each(
    "variants",
    shape=lambda operator: [shape for shape in operator.shapes if shape != "tiny"],
    leave_out=lambda _, backend, variant, shape: (backend, shape) == ("triton", "many_images"),
    slow=lambda operator, backend, variant, shape: (
        shape in operator.costly
        and (
            rest_on_triton(operator, backend, variant)
            or (backend == "triton" and operator.products and not_first(operator, variant))
        )
    ),
)
def test_every_shape(name, backend, variant, shape):
    compare(backend, name, variant, shape)


@each(
    "variants",
    layout=lambda operator: operator.layouts,
    shape=lambda operator: operator.shapes if operator.any_shape else ("small",),
    leave_out=lambda _, backend, variant, layout, shape: (
        shape == "tiny" or (shape == "many_images" and backend == "triton")
    ),
    slow=lambda operator, backend, variant, layout, shape: (
        shape != "small"
        or bool(operator.forms and variant != operator.forms[0])
        or (backend == "triton" and bool(operator.kernels_of or layout in RARE_LAYOUTS))
    ),
)
def test_every_layout(name, backend, variant, layout, shape):
    compare(backend, name, variant, shape, layout=layout)


@each(
    "hard",
    case=lambda operator: operator.cases,
    dtype=lambda operator: operator.dtypes,
    shape=lambda operator: operator.hard_shapes,
    leave_out=lambda operator, backend, variant, case, dtype, shape: (
        (backend, dtype) == ("cuda", torch.float32) and operator.products is not None
    ),
    # Where kernels are slow, one dtype shows what this is about.
    slow=lambda operator, backend, variant, case, dtype, shape: (
        (backend != "torch" and bool(differentiable(operator) and dtype != torch.bfloat16))
        or (backend != "torch" and bool(operator.kernels_of))
        or (backend == "triton" and (dtype == torch.float32 or variant.startswith(ELEMENTWISE)))
    ),
)
def test_hard_inputs_are_as_right_as_eager(name, backend, variant, case, dtype, shape):
    # Like a GradScaler: float16 keeps no gradients of 1e-9, which is not what is asked here.
    operator = OPERATORS[name]
    key = (name, variant, shape, case, dtype)
    apart = operator.images == "apart"
    raw = truth(*key, upstream=1.0, others=None if operator.ties else float(apart))
    largest = max((x.abs().max().item() for x in raw[1].values()), default=0.0)
    scale = 10 / largest if largest > 1e-12 else 1.0
    others = None if operator.ties else scale if apart else 0.1
    if case in operator.unstable:
        results, gradients = found(backend, *key, upstream=scale, others=others)
        assert all(x.isfinite().all() for x in (*results, *gradients.values()))
    else:
        compare(backend, *key, upstream=scale, others=others)


@each(
    where=lambda operator: len(operator.maps) > 1 and torch.half in operator.dtypes,
    first=lambda operator: operator.dtypes,
    second=lambda operator: operator.dtypes,
    leave_out=lambda operator, backend, variant, first, second: (
        (backend, first) == ("cuda", torch.float32) and operator.products is not None
    ),
    slow=lambda operator, backend, variant, first, second: (
        bool(operator.forms and variant != operator.forms[0])
        or (backend == "triton" and (first == second or torch.float16 in (first, second)))
    ),
)
def test_maps_may_differ_in_dtype_from_each_other_and_from_parameters(
    name, backend, variant, first, second
):
    operator = OPERATORS[name]
    inputs = dict(inputs_of(name, "small", "noise", torch.float32, "tokens"))
    for key, dtype in zip(operator.maps, (first, second)):
        inputs[key] = inputs[key].to(dtype)
    right(backend, name, inputs, options_of(name, variant))


# ------------------------------------------------------------ what is not finite, and nothing


@each(
    "variants",
    bad=lambda operator: operator.bad,
    slow=lambda operator, backend, variant, bad: (
        rest_on_triton(operator, backend, variant)
        or (backend == "triton" and bad == torch.inf and not_first(operator, variant))
    ),
)
def test_what_is_not_finite_is_handed_on(name, backend, variant, bad):
    operator = OPERATORS[name]
    dtype = usual(name, backend)
    inputs = dict(inputs_of(name, "small", "noise", dtype, "tokens"))
    image = len(inputs[operator.maps[0]]) - 1
    inputs[operator.maps[0]] = inputs[operator.maps[0]].clone()
    inputs[operator.maps[0]][image, ..., 1] = bad
    results, gradients = answer(backend, name, inputs, options_of(name, variant))
    clean, _ = found(backend, name, variant, dtype=dtype)
    for ours, before in zip(results, clean):
        if ours.ndim and operator.images == "apart":
            assert torch.equal(ours[:image], before[:image])
            ours = ours[image]
        assert not ours.isfinite().all() if ours.is_floating_point() else (ours == 0).all()
    if operator.maps[0] in gradients:
        gradient = gradients[operator.maps[0]]
        slope_is_1 = operator.inner or (bad == torch.inf and "smooth_l1" in variant)
        if not slope_is_1:
            assert not gradient[image].isfinite().all()
        # The spectral row sums of lift_kd are products over a tile of several images.
        tiles = operator.products is not None and "spectral" in variant
        if operator.images != "related" and not tiles:
            assert gradient[:image].isfinite().all()


@each("variants", slow=rest_on_triton)
def test_an_empty_batch(name, backend, variant):
    operator = OPERATORS[name]
    full = inputs_of(name, "small", "noise", usual(name, backend), "tokens")
    inputs = {key: x[:0] if key in operator.maps else x for key, x in full.items()}
    results, gradients = answer(backend, name, inputs, options_of(name, variant))
    for ours, shape in zip(results, (x.shape for x in truth(name, variant)[0])):
        batched = shape[:1] == full[operator.maps[0]].shape[:1] and operator.images != "related"
        assert ours.shape == ((0, *shape[1:]) if batched else shape)
        torch.testing.assert_close(ours, torch.full_like(ours, operator.empty), equal_nan=True)
    for key, gradient in gradients.items():
        assert gradient.shape == inputs[key].shape and gradient.eq(0).all()


# ------------------------------------------------------------------------ bits and gradients


@each("variants", slow=rest_on_triton)
def test_a_second_run_gives_the_same_bits(name, backend, variant):
    dtype = usual(name, backend)
    inputs = inputs_of(name, "small", "noise", dtype, "tokens")
    again = answer(backend, name, inputs, options_of(name, variant))
    same_bits(again, found(backend, name, variant, dtype=dtype))


@each(
    where=differentiable,
    wanted=lambda operator: ((), *zip(operator.wanted)),
    slow=lambda operator, backend, variant, wanted: (
        backend == "triton"
        and bool(operator.kernels_of or (operator.forms and variant != operator.forms[0]))
    ),
)
def test_only_the_gradients_that_are_wanted_are_made_and_change_no_other(
    name, backend, variant, wanted
):
    dtype = usual(name, backend)
    results, everything = found(backend, name, variant, dtype=dtype)
    inputs = inputs_of(name, "small", "noise", dtype, "tokens")
    some = answer(backend, name, inputs, options_of(name, variant), wanted=wanted)
    same_bits(some, (results, {key: everything[key] for key in wanted}))


@each(
    where=lambda o: differentiable(o) and o.images != "apart",
    upstream=lambda operator: (1.0, 0.0, -3.0, 0.3),
    slow=lambda operator, backend, variant, upstream: (
        backend == "triton" and (variant != operator.forms[0] or upstream in (1.0, 0.3))
    ),
)
def test_gradients_are_scaled_by_what_arrives(name, backend, variant, upstream):
    compare(backend, name, variant, upstream=upstream, others=0.0)


def walked_twice(name, inputs, options, backend):
    operator = OPERATORS[name]
    leaves = {key: x.detach().requires_grad_(key in operator.wanted) for key, x in inputs.items()}
    choice = {"backend": backend} if len(operator.backends) > 1 else {}
    results = operator.call(**leaves, **options, **choice)
    value = results if isinstance(results, Tensor) else results[0]
    value = (value * 0.3).sum()
    wanted = [leaves[key] for key in operator.wanted]
    first = [x.clone() for x in torch.autograd.grad(value, wanted, retain_graph=True)]
    return first, torch.autograd.grad(value, wanted)


@each(
    where=differentiable,
    slow=lambda operator, backend, variant: (
        backend == "triton" and not operator.products and not_first(operator, variant)
    ),
)
def test_a_kept_graph_gives_the_same_gradients_again(name, backend, variant):
    inputs = inputs_of(name, "small", "noise", usual(name, backend), "tokens")
    inputs = {key: x.to(backend.device) for key, x in inputs.items()}
    options = options_of(name, variant)
    first, second = backend.call(walked_twice, name, inputs, options, backend.name)
    assert all(torch.equal(*pair) for pair in zip(first, second))


@each(backends=False)
def test_without_grad_mode_there_is_no_gradient(name, backend, variant):
    operator = OPERATORS[name]
    inputs = inputs_of(name, "small", "noise", torch.float32, "tokens")
    leaves = {key: x.to(backend.device).requires_grad_() for key, x in inputs.items()}
    with torch.no_grad():
        results = operator.run(leaves, options_of(name, variant), backend="torch", wanted=())[0]
    assert not any(x.requires_grad for x in results)
    for x in leaves.values():
        x.requires_grad_(False)
    for ours, expected in zip(results, found(backend, name, variant)[0]):
        assert torch.equal(ours.cpu(), expected)


@each("variants", backends=False, where=lambda o: differentiable(o) and "tiny" in o.shapes)
def test_gradcheck(name, backend, variant):
    operator = OPERATORS[name]
    inputs = inputs_of(name, "tiny", "noise", torch.float64, "tokens")
    others = {key: x for key, x in inputs.items() if key not in operator.wanted}

    def call(*leaves: Tensor):
        named = dict(zip(operator.wanted, leaves))
        choice = {"backend": "torch"} if len(operator.backends) > 1 else {}
        results = operator.call(**named, **others, **options_of(name, variant, "tiny"), **choice)
        results = [results] if isinstance(results, Tensor) else results
        return tuple(x for x in results if x.is_floating_point())

    leaves = [inputs[key].detach().requires_grad_() for key in operator.wanted]
    assert torch.autograd.gradcheck(call, leaves)
    if operator.twice == "right":
        assert torch.autograd.gradgradcheck(call, leaves)


@each(backends=False, where=lambda o: differentiable(o) and o.twice == "refused")
def test_second_derivatives_are_refused(name, backend, variant):
    operator = OPERATORS[name]
    inputs = inputs_of(name, "small", "noise", torch.float32, "tokens")
    leaves = {key: x.detach().requires_grad_(key in operator.wanted) for key, x in inputs.items()}
    results = operator.call(**leaves, **options_of(name, variant))
    value = results if isinstance(results, Tensor) else results[0]
    wanted = [leaves[key] for key in operator.wanted]
    with pytest.raises(RuntimeError, match=r"gradient cannot be differentiated again"):
        first = torch.autograd.grad(value.square().sum(), wanted, create_graph=True)
        first[0].sum().backward()


# ------------------------------------------------------------------------- settings of torch


@each(
    "variants",
    slow=lambda operator, backend, variant: (
        rest_on_triton(operator, backend, variant)
        or (backend != "torch" and not_first(operator, variant))
    ),
)
def test_autocast_changes_nothing_but_operands_of_products(name, backend, variant):
    inputs = inputs_of(name, "small", "noise", torch.float32, "tokens")
    results, gradients = answer(backend, name, inputs, options_of(name, variant), autocast=True)
    if not OPERATORS[name].follows_autocast:
        same_bits((results, gradients), found(backend, name, variant))
        return
    exact = truth(name, variant)
    assert {x.dtype for x in (*results, *gradients.values())} == {torch.float32}
    pairs = [*zip(results, exact[0]), *((x, exact[1][key]) for key, x in gradients.items())]
    assert max(relative_error(*pair) for pair in pairs) < 2e-2
    # The products have seen bfloat16 operands.
    seen, true = (x[1].get("weight", x[0][0]) for x in ((results, gradients), exact))
    assert relative_error(seen, true) > 1e-4


@each("variants", backends=False, where=lambda operator: not operator.follows_autocast)
def test_the_users_precision_of_products_changes_nothing(name, backend, variant):
    inputs = inputs_of(name, "small", "noise", torch.float32, "tokens")
    with bfloat16_products():
        again = answer(backend, name, inputs, options_of(name, variant))
    same_bits(again, answer(backend, name, inputs, options_of(name, variant)))


# -------------------------------------------------------------------- what torch knows of them


@each(
    backends=False,
    where=lambda operator: operator.traced,
    slow=lambda operator, backend, variant, autocast: (
        bool(operator.kernels_of or operator.plain) or (autocast and not_first(operator, variant))
    ),
    autocast=lambda operator: (False, True) if operator.follows_autocast else (False,),
)
def test_torch_compiles_it_whole_for_any_number_of_tokens(name, backend, variant, autocast):
    operator = OPERATORS[name]

    def step(inputs: Tensors):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            inputs = inputs | {operator.maps[0]: inputs[operator.maps[0]] * 1}
            results = operator.call(**inputs, **operator.variants[variant])
        return (results,) if isinstance(results, Tensor) else results

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    batch, _, _, *channels = operator.shapes["small"]
    for side in (2, 3):
        drawn = operator.draw((batch, side, side, *channels), operator.cases[0])
        leaves = {key: x.requires_grad_(key in operator.wanted) for key, x in drawn.items()}
        wanted = [leaves[key] for key in operator.wanted]
        outcomes = []
        for function in (compiled, step):
            results = function(leaves)
            roots = [x for x in results if x.requires_grad]
            arrives = [operator.arriving(x, UPSTREAM, 1.0) for x in roots]
            outcomes.append((results, torch.autograd.grad(roots, wanted, arrives) if roots else ()))
        for ours, eager in zip(*(itertools.chain(*outcome) for outcome in outcomes)):
            torch.testing.assert_close(ours, eager, rtol=1e-6, atol=1e-7)


class Calls(TorchDispatchMode):
    """The calls of fastkd's operators, backward halves included."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "fastkd":
            forward = torch._C._current_graph_task_id() == -1
            kept = tree_map_only(
                Tensor,
                lambda x: x.detach().clone().requires_grad_(forward and x.requires_grad),
                args,
            )
            self.seen.append((func, kept, kwargs or {}))
        return func(*args, **(kwargs or {}))


@functools.cache
def calls_of(name: str, variant: str, dtype: torch.dtype) -> list:
    shape = "tiny" if "tiny" in OPERATORS[name].shapes else "small"
    inputs = inputs_of(name, shape, "noise", dtype, "tokens")
    with Calls() as calls:
        OPERATORS[name].run(inputs, options_of(name, variant, shape), backend="torch")
    return calls.seen


@each(
    backends=False,
    dtype=lambda operator: (torch.float32, torch.float64),
    slow=lambda operator, backend, variant, dtype: (
        bool(operator.kernels_of)
        or (dtype == torch.float64 and (not_first(operator, variant) or not operator.forms))
    ),
)
def test_opcheck_of_all_that_it_calls(name, backend, variant, dtype):
    for operator, arguments, options in calls_of(name, variant, dtype):
        torch.library.opcheck(operator, arguments, options)


def test_every_operator_that_is_declared_has_an_entry():
    called = set()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    for name, operator in OPERATORS.items():
        for variant in operator.variants:
            calls = calls_of(name, variant, torch.float32)
            called |= {call[0]._schema.name.removeprefix("fastkd::") for call in calls}
    dist.destroy_process_group()
    assert not DECLARED - called
    assert set(ops.__all__) - {"backends"} <= set(OPERATORS)


@each(backends=False, where=lambda o: o.transforms and o.traced and o.images != "related")
def test_meta_tensors_tell_shapes_and_dtypes(name, backend, variant):
    operator = OPERATORS[name]
    inputs = inputs_of(name, "small", "noise", torch.float32, "tokens")
    on_meta = {key: x.to("meta") for key, x in inputs.items()}
    told = operator.run(on_meta, options_of(name, variant), backend="torch", wanted=())[0]
    real = found(backend, name, variant)[0]
    assert [(x.shape, x.dtype) for x in told] == [(x.shape, x.dtype) for x in real]


# ------------------------------------------------------------------------------- refusals


def total(call):
    def scalar(x: Tensor) -> Tensor:
        results = call(x)
        return (results if isinstance(results, Tensor) else results[0]).double().sum()

    return scalar


TRANSFORMS = {
    "grad": lambda call, x: torch.func.grad(total(call))(x),
    "vmap": lambda call, x: torch.func.vmap(call)(torch.stack([x, x])),
    "jvp": lambda call, x: torch.func.jvp(call, (x,), (x,)),
    "vjp": lambda call, x: torch.func.vjp(total(call), x),
    "jacrev": lambda call, x: torch.func.jacrev(total(call))(x),
    "hessian": lambda call, x: torch.func.hessian(total(call))(x),
}


def of_first(name: str, variant: str):
    """The operator as a function of its first map, and that map."""
    operator = OPERATORS[name]
    inputs = dict(inputs_of(name, "small", "noise", torch.float32, "tokens"))
    x = inputs.pop(operator.maps[0])
    options = options_of(name, variant)
    return (lambda x: operator.call(**{operator.maps[0]: x}, **inputs, **options)), x


@each(
    "first",
    backends=False,
    where=lambda operator: operator.transforms,
    transform=lambda operator: TRANSFORMS,
)
def test_transforms_of_torch_func_are_refused(name, backend, variant, transform):
    with pytest.raises(NotImplementedError, match=r"\w+: .*torch\.func"):
        TRANSFORMS[transform](*of_first(name, variant))


@each(backends=False, where=lambda operator: operator.measures)
def test_measurements_refuse_a_gradient(name, backend, variant):
    call, x = of_first(name, variant)
    with pytest.raises((RuntimeError, ValueError), match=rf"{name.split()[0]}: .*gradient"):
        call(x.clone().requires_grad_())


STRANGE = {
    "integers": lambda x: x.long(),
    "a list": lambda x: x.tolist(),
    "nothing": lambda x: None,
    "eight bits": lambda x: x.to(torch.float8_e5m2),
    "sparse": lambda x: x.to_sparse(),
}


@each(
    "first",
    backends=False,
    where=lambda operator: not operator.inner,
    place=lambda operator: range(len(operator.maps)),
    strange=lambda operator: STRANGE,
)
def test_what_is_no_dense_float_tensor_is_refused(name, backend, variant, place, strange):
    operator = OPERATORS[name]
    inputs = dict(inputs_of(name, "small", "noise", torch.float32, "tokens"))
    key = operator.maps[place]
    inputs[key] = STRANGE[strange](inputs[key])
    with pytest.raises(TypeError, match=rf"{name.split()[0]}: {key} must (be|have)") as caught:
        operator.call(**inputs, **options_of(name, variant))
    assert len(str(caught.value)) < 200 and "tensor(" not in str(caught.value)


@each(
    "first",
    backends=False,
    refused=lambda operator: [
        (option, place)
        for option, values in operator.refuses.items()
        for place in range(len(values))
    ],
)
def test_options_of_other_types_and_ranges_are_named(name, backend, variant, refused):
    option, place = refused
    operator = OPERATORS[name]
    inputs = inputs_of(name, "small", "noise", torch.float32, "tokens")
    options = options_of(name, variant) | {option: operator.refuses[option][place]}
    with pytest.raises((TypeError, ValueError), match=rf"^{name.split()[0]}: {option} ") as caught:
        operator.call(**inputs, **options)
    message = str(caught.value)
    assert len(message) < 200 and "tensor(" not in message


@each(
    "first",
    backends=False,
    where=lambda operator: len(operator.backends) > 1,
    wrong=lambda operator: (None, 1, "TRITON", "jax", ["torch"], TENSOR),
)
def test_what_is_no_backend_is_refused(name, backend, variant, wrong):
    inputs = inputs_of(name, "small", "noise", torch.float32, "tokens")
    with pytest.raises(
        ValueError, match=rf"{name.split()[0]}: backend must be one of .*, got "
    ) as caught:
        OPERATORS[name].call(**inputs, **options_of(name, variant), backend=wrong)
    assert len(str(caught.value)) < 150


@each(
    "first",
    backends=False,
    where=lambda operator: len(operator.backends) > 1,
    other=lambda operator: ("triton", "cuda"),
)
def test_a_backend_that_cannot_run_is_an_error_with_its_reason(name, backend, variant, other):
    operator = OPERATORS[name]
    if other in operator.backends and torch.cuda.is_available():
        pytest.skip("it can")
    reason = "it needs CUDA tensors, got cpu" if other in operator.backends else "not implemented"
    inputs = inputs_of(name, "small", "noise", torch.float32, "tokens")
    with pytest.raises(RuntimeError, match=f"backend '{other}' cannot run: {reason}"):
        operator.call(**inputs, **options_of(name, variant), backend=other)


@each(where=lambda operator: len(operator.backends) > 1, leave_out=lambda _, b, *__: b == "torch")
def test_float64_stays_on_the_reference(name, backend, variant):
    inputs = inputs_of(name, "small", "noise", torch.float64, "tokens")
    with pytest.raises(RuntimeError, match="float64 runs on 'torch' only"):
        answer(backend, name, inputs, options_of(name, variant))
