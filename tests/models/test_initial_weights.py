"""What a new student starts from, tensor by tensor: the paper's released code, or timm."""

import re
from dataclasses import dataclass
from functools import partial
from statistics import NormalDist

import pytest
import timm
import torch
from timm.layers import LayerNorm
from timm.models import named_apply
from timm.models.vision_transformer import init_weights_vit_timm
from torch import Tensor, nn

from fastkd.config import Recipe
from fastkd.inference.preprocessing import Shape, build_student
from fastkd.models import (
    Lift,
    create_student,
)
from fastkd.models.architectures import into_lift, into_widelast
from fastkd.models.factory import rebuilt_by, registered_name

RARE = 1e-7  # probability of a largest value out of its bounds; five and a half standard deviations
SIGMAS = 5.5


@dataclass(frozen=True)
class Normal:
    """Mean 0. Truncated at 2, as timm and the authors call it: at 100 standard deviations."""

    std: float
    kurtosis: float = 3.0

    def largest(self, probability: float, count: int) -> float:
        """What the largest of ``count`` absolute values stays below with a probability."""
        return self.std * NormalDist().inv_cdf((1 + probability ** (1 / count)) / 2)


@dataclass(frozen=True)
class Uniform:
    """Mean 0, in [-bound, bound]."""

    bound: float
    kurtosis: float = 1.8

    @property
    def std(self) -> float:
        return self.bound / 3**0.5

    def largest(self, probability: float, count: int) -> float:
        return self.bound * probability ** (1 / count)


@dataclass(frozen=True)
class Constant:
    """The same value everywhere."""

    value: float


ZEROS, ONES = Constant(0.0), Constant(1.0)
PATCH = Uniform((3 * 16 * 16) ** -0.5)  # torch's default for a convolution, which timm leaves
NARROW = Uniform(192**-0.5)  # torch's for nn.Linear: bound 0.0722, std 0.0417
WIDE = Uniform(384**-0.5)  # bound 0.0510, std 0.0295

# Every parameter of a timm ViT, and what the students have beside or instead.
TIMM = {
    r"cls_token": Normal(1e-6),
    r"pos_embed": Normal(0.02),
    r"patch_embed\.proj\.(weight|bias)": PATCH,
    r".*norm\d?\.weight": ONES,
    r".*norm\d?\.bias": ZEROS,
    r"blocks\.\d+\.(attn\.(qkv|proj)|mlp\.fc[12])\.weight": Normal(0.02),
    r"blocks\.\d+\.(attn\.(qkv|proj)|mlp\.fc[12])\.bias": ZEROS,
    r"head\.weight": Normal(0.02),
    r"head\.bias": ZEROS,
}
PROJECTION, ENTRY = r"norm\.proj\.weight", r"blocks\.11\.proj_in\.weight"
START = {
    ("plain", None, "released"): TIMM,
    ("plain", None, "timm"): TIMM,
    ("lift", 384, "released"): TIMM
    | {PROJECTION: NARROW, r"head\.weight": WIDE, r"head\.bias": WIDE},
    ("lift", 384, "timm"): TIMM | {PROJECTION: Normal(0.02)},
    ("widelast", 384, "released"): TIMM | {ENTRY: Normal(0.02), r"cls_token": Normal(0.02)},
    ("widelast", 384, "timm"): TIMM | {ENTRY: Normal(0.02)},
    ("uniform", 219, "released"): TIMM,
    ("uniform", 219, "timm"): TIMM,
}


def assert_drawn_from(tensor: Tensor, expected: Normal | Uniform | Constant, name: str) -> None:
    """Mean, standard deviation and largest value, each within what chance allows for the size."""
    values = tensor.double().flatten()
    if isinstance(expected, Constant):
        assert torch.all(values == expected.value), name
        return
    count = len(values)
    mean_error = SIGMAS * expected.std / count**0.5
    # The variance of a sample's variance is (kurtosis - 1) / count of its square; half for the std.
    std_error = SIGMAS * expected.std * ((expected.kurtosis - 1) / count) ** 0.5 / 2
    assert abs(values.mean().item()) < mean_error, name
    assert values.std(correction=0).item() == pytest.approx(expected.std, abs=std_error), name
    lowest, highest = (expected.largest(p, count) for p in (RARE, 1 - RARE))
    assert lowest < values.abs().max().item() <= highest * (1 + 1e-6), name


@pytest.mark.parametrize(("variant", "width", "init_weights"), START)
def test_every_tensor_of_a_new_student_is_drawn_as_the_table_says(variant, width, init_weights):
    table = START[variant, width, init_weights]
    student = create_student(variant=variant, width=width, init_weights=init_weights)
    for name, parameter in student.named_parameters():
        (expected,) = (drawn for pattern, drawn in table.items() if re.fullmatch(pattern, name))
        assert_drawn_from(parameter.detach(), expected, name)


@pytest.mark.parametrize(
    ("draw", "expected"),
    [
        (partial(nn.init.normal_, std=0.0205), Normal(0.02)),
        (partial(nn.init.uniform_, a=-0.0346, b=0.0346), Normal(0.02)),  # of the same std
        (partial(nn.init.normal_, std=NARROW.std), NARROW),
        (partial(nn.init.normal_, mean=0.001, std=0.02), Normal(0.02)),
        (partial(nn.init.constant_, val=1e-9), ZEROS),
    ],
)
def test_the_bounds_of_the_table_tell_other_distributions_apart(draw, expected):
    with pytest.raises(AssertionError, match="fake"):
        assert_drawn_from(draw(torch.empty(384, 192)), expected, "fake")


def new(variant, init_weights, tiny, **options):
    torch.manual_seed(3)
    width = None if variant == "plain" else 48
    options = {"width": width, "init_weights": init_weights, **tiny, **options}
    return create_student("vit_tiny_patch16_224", variant, **options)


@pytest.mark.parametrize(
    ("variant", "changed"),
    [
        ("plain", set()),
        ("lift", {"norm.proj.weight", "head.weight", "head.bias"}),
        ("widelast", {"cls_token"}),
        ("uniform", set()),
    ],
)
def test_of_the_same_seed_nothing_but_the_named_tensors_differs(variant, changed, tiny):
    released, timms = (new(variant, way, tiny).state_dict() for way in ("released", "timm"))
    assert {name for name in timms if not torch.equal(released[name], timms[name])} == changed


def test_timms_are_drawn_in_timms_way_and_order(tiny):
    vit = timm.create_model("vit_tiny_patch16_224", **tiny)
    base = {name: value.clone() for name, value in vit.state_dict().items()}
    torch.manual_seed(3)
    student = into_lift(vit, 48, init_weights="timm")
    torch.manual_seed(3)
    lift, head = Lift(24, 48), nn.Linear(48, 7)
    for layer in (lift, head):
        named_apply(init_weights_vit_timm, layer, include_root=True)
    for name, value in student.state_dict().items():
        part, _, rest = name.partition(".")
        expected = {"norm": lift, "head": head}.get(part)
        assert torch.equal(value, base[name] if expected is None else expected.state_dict()[rest])


def test_the_released_ones_are_the_default(tiny):
    for variant in ("lift", "widelast"):
        torch.manual_seed(3)
        default = create_student("vit_tiny_patch16_224", variant, width=48, **tiny).state_dict()
        released = new(variant, "released", tiny).state_dict()
        assert all(torch.equal(default[name], released[name]) for name in released)


CREATED = {
    "deit_tiny_lift_patch16_224": "head.weight",
    "deit_tiny_widelast_patch16_224": "cls_token",
    "deit_tiny_uniform219_patch16_224": None,
    "fastkd_student": None,
}


@pytest.mark.parametrize("create", [timm.create_model, create_student])
@pytest.mark.parametrize(("name", "changed"), CREATED.items())
def test_registered_names_take_the_option(name, changed, create):
    states = []
    for way in ("released", "timm"):
        torch.manual_seed(0)
        states.append(create(name, init_weights=way, depth=1, num_classes=2).state_dict())
    released, timms = states
    differing = {n for n in timms if not torch.equal(released[n], timms[n])}
    assert (changed in differing) if changed else not differing


def test_fastkd_student_hands_the_option_on():
    states = []
    for way in ("released", "timm"):
        torch.manual_seed(0)
        options = {"base": "test_vit", "variant": "lift", "width": 96, "init_weights": way}
        states.append(timm.create_model("fastkd_student", **options).state_dict())
    assert not torch.equal(states[0]["head.weight"], states[1]["head.weight"])


@pytest.mark.parametrize("where", ["pretrained", "checkpoint_path"])
def test_a_class_token_that_has_learnt_is_kept(where, tiny, tmp_path):
    base = timm.create_model("vit_tiny_patch16_224", **tiny)
    file = tmp_path / "base.pth"
    torch.save(base.state_dict(), file)
    overlay = {"file": str(file), "num_classes": 7, "custom_load": False}
    options = {"pretrained": True, "pretrained_cfg_overlay": overlay}
    if where == "checkpoint_path":
        options = {"checkpoint_path": str(file)}
    student = new("widelast", "released", tiny, **options)
    assert torch.equal(student.cls_token, base.cls_token)


def test_a_widened_vit_keeps_a_class_token_unless_it_is_told_otherwise(tiny):
    arguments = {"dim": 24, "num_heads": 3, "norm_layer": LayerNorm}
    for options, kept in (({}, True), ({"init_weights": "released"}, False)):
        vit = timm.create_model("vit_tiny_patch16_224", **tiny)
        token = vit.cls_token.clone()
        student = into_widelast(vit, arguments, 48, **options)
        assert torch.equal(student.cls_token, token) == kept


def test_a_vit_without_a_class_token_starts_as_well(tiny):
    options = {"class_token": False, "global_pool": "avg"}
    assert new("widelast", "released", tiny, **options).cls_token is None


@pytest.mark.parametrize("variant", ["plain", "lift", "widelast", "uniform"])
def test_an_unknown_way_is_refused(variant, tiny):
    with pytest.raises(ValueError, match=r"init_weights must be one of .*got 'relased'"):
        new(variant, "relased", tiny)


@pytest.mark.parametrize("name", [n for n in CREATED if n != "fastkd_student"])
def test_an_unknown_way_is_refused_by_registered_names(name):
    with pytest.raises(ValueError, match=r"init_weights must be one of .*got 'relased'"):
        timm.create_model(name, init_weights="relased")


@pytest.mark.parametrize("variant", ["lift", "widelast"])
@pytest.mark.parametrize("create", ["by create_student", "by timm"])
def test_a_scheme_of_timm_needs_timms(variant, create, tiny):
    def made(**options):
        if create == "by timm":
            return timm.create_model(f"deit_tiny_{variant}_patch16_224", depth=1, **options)
        return create_student("vit_tiny_patch16_224", variant, width=48, **tiny, **options)

    with pytest.raises(ValueError, match=r"weight_init='jax' .* init_weights='timm'"):
        made(weight_init="jax")
    student = made(weight_init="jax", init_weights="timm")
    assert not student.head.weight.any()  # which is what "jax" makes of a head


def test_plain_and_uniform_students_take_timms_schemes_as_they_are(tiny):
    for variant in ("plain", "uniform"):
        assert not new(variant, "released", tiny, weight_init="jax").head.weight.any()


def test_what_a_student_started_from_is_no_part_of_how_it_is_rebuilt():
    student = create_student("test_vit", "lift", width=96, init_weights="timm")
    fields = rebuilt_by(student)
    assert fields is not None and "init_weights" not in fields
    _, arguments = registered_name(fields["model"], fields["variant"], fields["width"])
    assert "init_weights" not in arguments


@pytest.mark.parametrize("model", ["test_vit", "deit_tiny_lift_patch16_224"])
def test_a_recipe_decides_it(model):
    variant = {"variant": "lift", "width": 96} if model == "test_vit" else {}
    states = []
    for way in ("released", "timm"):
        torch.manual_seed(0)
        recipe = Recipe(model=model, init_weights=way, **variant)
        states.append(build_student(recipe, Shape(3, 3, None)).state_dict())
    released, timms = states
    differing = {name for name in timms if not torch.equal(released[name], timms[name])}
    assert differing == {"norm.proj.weight", "head.weight", "head.bias"}
