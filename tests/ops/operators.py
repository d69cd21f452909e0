"""The operators that test_conformance.py holds to the same rules: one entry each.

A new operator needs an entry: how to call it, inputs, and what it computes in plain PyTorch.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastkd import ops
from fastkd.losses.attention import AttentionTransfer
from fastkd.losses.crd import CRD
from fastkd.losses.manifold import ManifoldKD
from fastkd.losses.rkd import RKD
from fastkd.ops.feature_kd.reference import LOSSES
from fastkd.ops.lift_kd import LIFT_EPS
from fastkd.ops.second_moment.reference import WEIGHTS
from fastkd.ops.sep import CONVENTIONS
from fastkd.ops.spectrum import LEVELS
from tests.harness.cases import FINITE, MAP_LAYOUTS, SPECTRA, TOKEN_LAYOUTS, relative_error

Tensors = dict[str, Tensor]
Shape = tuple[int, ...]

HALVES = (torch.float16, torch.bfloat16)
UPSTREAM = 0.2  # the gradient that arrives at a scalar


def relative_errors(found: Sequence[Tensor], truth: Sequence[Tensor]) -> list[float]:
    return [relative_error(ours, exact) for ours, exact in zip(found, truth)]


@dataclass(frozen=True, kw_only=True)
class Operator:
    """What the suite has to know of an operator.

    Attributes:
        call: takes the inputs by name, a variant's options, ``backend`` where there are several,
            and ``grid`` with ``takes_grid``; returns one tensor or several.
        reference: the same in plain PyTorch and in the dtype of its inputs, with autograd.
        draw: float32 inputs by name, maps as [B, H * W, D], for a shape and a case.
        shapes: [B, H, W, Ds, ...]; the first is small, "tiny" is for finite differences.
        variants: options by name.
        forms: the variants that take other paths, for what does not depend on the rest.
        costly: shapes that take seconds in Triton's interpreter; "many_images" takes it minutes.
        cases: hard inputs of ``draw``.
        hard: the variants that take them, in ``hard_shapes``.
        maps: inputs that may have any layout and are rounded in tests of half precision.
        parameters: other inputs that are rounded with them.
        wanted: inputs that may get a gradient.
        layouts: of the maps; in all shapes with ``any_shape``.
        results: dtype of each result: "wide" (float32, or float64), "same" as the maps, or a dtype.
        images: "apart" if results are one per image; "summed" if gradients are; else "related".
        errors: of results, in units that ``tolerance`` (``exact`` in float64) bounds.
        absolute: error allowed in a scalar for a variant that is a difference from 1.
        products: of operands in the maps' dtype, where eager PyTorch in that is the measure; gives
            what the value is made of, as one number may be right by chance.
        empty: the results for no image.
        refuses: options with values that they may not have.
        kernels_of: the operator that shares its kernels, and is tested more where they are slow.
        measures: refuses inputs that require a gradient.
        transforms: whether `torch.func` is refused.
        twice: whether a second derivative is "refused" or "right"; None where neither.
        follows_autocast: whether autocast decides the dtype of products.
        plain: made of torch's own operations.
        inner: called by others only, which check what they hand on; linear.
        traced: whether shapes alone are enough to trace it.
        own_layers: has layers of torch's own, whose backward autocast would change.
        as_eager: results are compared with eager float32 too, where that has few digits.
        unstable: cases of which float32 has no digits.
        bad: values that are not finite and must show.
    """

    call: Callable[..., Any]
    reference: Callable[..., Any]
    draw: Callable[[Shape, str], Tensors]
    shapes: dict[str, Shape]
    variants: dict[str, dict[str, Any]] = field(default_factory=lambda: {"plain": {}})
    forms: tuple[str, ...] = ()
    costly: tuple[str, ...] = ()
    cases: tuple[str, ...] = tuple(FINITE)
    hard: tuple[str, ...] = ()
    hard_shapes: tuple[str, ...] = ("small",)
    maps: tuple[str, ...] = ("student", "teacher")
    parameters: tuple[str, ...] = ()
    wanted: tuple[str, ...] = ("student",)
    layouts: tuple[str, ...] = TOKEN_LAYOUTS + MAP_LAYOUTS
    any_shape: bool = False
    dtypes: tuple[torch.dtype, ...] = (torch.float32, *HALVES)
    results: tuple[str | torch.dtype, ...] = ("wide",)
    backends: tuple[str, ...] = ("torch",)
    images: str = "related"
    errors: Callable[[Sequence[Tensor], Sequence[Tensor]], list[float]] = relative_errors
    tolerance: float = 1e-5
    exact: float = 1e-12
    absolute: dict[str, float] = field(default_factory=dict)
    products: Callable[..., Tensor] | None = None
    empty: float = 0.0
    takes_grid: bool = False
    ties: bool = False  # in hard cases, so that a sum of all is what has a gradient
    refuses: dict[str, tuple[Any, ...]] = field(default_factory=dict)
    kernels_of: str = ""
    measures: bool = False
    transforms: bool = True
    twice: str | None = "refused"
    follows_autocast: bool = False
    plain: bool = False
    inner: bool = False
    traced: bool = True
    own_layers: bool = False
    as_eager: bool = False
    unstable: tuple[str, ...] = ()
    bad: tuple[float, ...] = (torch.nan, torch.inf)

    def run(
        self,
        inputs: Tensors,
        options: dict[str, Any],
        *,
        backend: str | None = None,
        wanted: tuple[str, ...] | None = None,
        upstream: float = UPSTREAM,
        others: float | None = 1.0,
        autocast: bool = False,
    ) -> tuple[list[Tensor], Tensors]:
        """Results and gradients, of the operator or (without a backend) of the reference."""
        names = [x for x in (self.wanted if wanted is None else wanted) if x in inputs]
        leaves = {name: x.detach().requires_grad_(name in names) for name, x in inputs.items()}
        device = next(iter(inputs.values())).device.type
        with torch.autocast(device, torch.bfloat16, enabled=True) if autocast else nullcontext():
            results = self.results_of(leaves, options, backend)
        roots = [x for x in results if x.requires_grad]
        if roots:
            arrives = [self.arriving(x, upstream, others) for x in roots]
            torch.autograd.backward(roots, arrives)
        return [x.detach() for x in results], {name: leaves[name].grad for name in names}

    def results_of(self, leaves: Tensors, options: dict[str, Any], backend: str | None):
        """Results as a list, of the operator or (without a backend) of the reference."""
        if backend is None:
            results = self.reference(**leaves, **options)
        else:
            choice = {"backend": backend} if len(self.backends) > 1 else {}
            results = self.call(**leaves, **options, **choice)
        return [results] if isinstance(results, Tensor) else list(results)

    def arriving(self, result: Tensor, upstream: float, others: float | None) -> Tensor:
        """A gradient for a result: no constant but for scalars, or without ``others``."""
        if result.ndim == 0 or others is None:
            return torch.full_like(result, upstream)
        count = torch.arange(result.numel(), dtype=torch.float64, device=result.device)
        return (torch.cos(count) * others).view_as(result).to(result.dtype)


def measure(name: str, inputs: Tensors, options: dict[str, Any], **how: Any):
    """Results, gradients, and the inputs that were written to; also runs in a worker process."""

    def bits(x: Tensor) -> Tensor:
        return x.detach().clone(memory_format=torch.contiguous_format).view(torch.uint8)

    before = {key: bits(x) for key, x in inputs.items() if x.ndim}
    torch.rand(7)  # neither numbers that were drawn before nor what memory held may matter
    for size in (2**k for k in range(4, 17)):
        torch.full((size,), torch.nan)
    results, gradients = OPERATORS[name].run(inputs, options, **how)
    written = [key for key, x in before.items() if not torch.equal(x, bits(inputs[key]))]
    return results, gradients, written


# ---------------------------------------------------------------- inputs and plain formulas


def widths(shape: Shape) -> tuple[Shape, Shape]:
    """[B, N, Ds] and [B, N, Dt]."""
    batch, height, width, narrow, *wide = shape
    return (batch, height * width, narrow), (batch, height * width, *(wide or [narrow]))


def pair(shape: Shape, case: str, names: Sequence[str] = ("student", "teacher")) -> Tensors:
    student, teacher = widths(shape)
    return {names[0]: FINITE[case](student)[0], names[1]: FINITE[case](teacher)[1]}


def alone(name: str, cases: dict[str, Callable[[Shape], Any]] = FINITE):
    def draw(shape: Shape, case: str) -> Tensors:
        drawn = cases[case](widths(shape)[0])
        return {name: drawn if isinstance(drawn, Tensor) else drawn[0]}

    return draw


def as_maps(x: Tensor, grid: tuple[int, int] | None) -> Tensor:
    return x.permute(0, 2, 3, 1) if x.ndim == 4 else x.unflatten(1, grid or (1, x.shape[1]))


def directions(x: Tensor, shortest: float) -> Tensor:
    norm = x.norm(dim=-1, keepdim=True)
    long = norm >= shortest
    return torch.where(long, x / torch.where(long, norm, 1), 0)


def distance(student: Tensor, teacher: Tensor, loss: str, beta=1.0, eps=1e-8) -> Tensor:
    """Of [B, H, W, D] maps; half precision is compared in float32, as in plain PyTorch."""
    wide = torch.promote_types(torch.promote_types(student.dtype, teacher.dtype), torch.float32)
    student, teacher = student.to(wide), teacher.to(wide)
    if loss == "spectral":
        spectra = (torch.fft.rfft2(x, dim=(1, 2), norm="ortho") for x in (student, teacher))
        return F.mse_loss(*map(torch.view_as_real, spectra))
    if loss == "cosine":
        student, teacher = (directions(x, eps) for x in (student, teacher))
        return 1 - (student * teacher).sum(dim=-1).mean()
    if loss == "smooth_l1":
        return F.smooth_l1_loss(student, teacher, beta=beta)
    return F.mse_loss(student, teacher)


def feature_distance(student, teacher, loss, grid=None, **numbers):
    return distance(as_maps(student, grid), as_maps(teacher, grid), loss, **numbers)


def layers(
    tokens, weight, bias=None, norm_weight=None, norm_bias=None, lift_eps=LIFT_EPS, grid=None
):
    lifted = F.linear(as_maps(tokens, grid), weight, bias)
    if norm_weight is None:
        return lifted
    return F.layer_norm(lifted, lifted.shape[-1:], norm_weight, norm_bias, lift_eps)


def lifted_of(student_tokens, teacher_tokens, loss="mse", pool=False, beta=1.0, **layer):
    return layers(student_tokens, **layer)


def lifted_distance(student_tokens, teacher_tokens, loss="mse", pool=False, beta=1.0, **layer):
    lifted = layers(student_tokens, **layer)
    value = distance(lifted, as_maps(teacher_tokens, layer.get("grid")), loss, beta)
    return (value, lifted.mean(dim=(1, 2))) if pool else value


def lifted_map(tokens, **parameters):
    lifted = layers(tokens, **parameters)
    return lifted.permute(0, 3, 1, 2) if tokens.ndim == 4 else lifted.flatten(1, 2)


def with_layers(tokens: str, teacher: str | None = None):
    """Inputs of lift_kd or lift."""

    def draw(shape: Shape, case: str) -> Tensors:
        inputs = pair(shape, case, (tokens, teacher or "unused"))
        inputs.pop("unused", None)
        width, channels = shape[4], shape[3]
        generator = torch.Generator().manual_seed(3)
        sizes = {"weight": (width, channels)}
        sizes |= dict.fromkeys(("bias", "norm_weight", "norm_bias"), (width,))
        parameters = {n: torch.randn(size, generator=generator) for n, size in sizes.items()}
        parameters["weight"] *= channels**-0.5
        if case != "noise":
            parameters["bias"] *= 0  # beside it, hard tokens would be small
        return inputs | parameters

    return draw


def outer_products(tokens: Tensor, weight: str) -> Tensor:
    rows = tokens.double().flatten(0, -2)
    largest = rows.abs().amax(dim=1, keepdim=True)
    if weight == "none":
        return rows.mT @ rows
    rows = rows / torch.where(largest == 0, 1, largest)
    energy = rows.square().sum(dim=1, keepdim=True)
    return (rows / torch.where(energy == 0, 1, energy)).mT @ rows


def spectral_curves(tokens: Tensor, convention: str, std: bool) -> tuple[Tensor, Tensor]:
    rows = tokens.double().flatten(0, -2)
    rows = rows[rows.abs().amax(dim=1) > 0]
    energy = torch.fft.fft(rows).abs().square()
    if convention == "folded":
        channels = rows.shape[1]
        energy, mirrored = energy[:, : channels // 2 + 1], energy
        energy[:, 1 : (channels + 1) // 2] += mirrored[:, channels // 2 + 1 :].flip(1)
    curves = energy.cumsum(dim=1) / energy.sum(dim=1, keepdim=True)
    return curves.mean(dim=0), curves.std(dim=0, correction=0)


def energies_of(x: Tensor) -> Tensor:
    return torch.linalg.svdvals(x).square()


def of_total(found: Tensor, truth: Tensor) -> float:
    total = truth.double().sum(dim=-1, keepdim=True).clamp_min(1e-300)
    return ((found.double() - truth.double()).abs() / total).max().item()


def spectral_errors(found: Sequence[Tensor], truth: Sequence[Tensor]) -> list[float]:
    ordered = (found[0] >= 0).all() and (found[0].diff(dim=-1) <= 0).all()
    errors = [of_total(found[0], truth[0]) if ordered else torch.inf]
    for ranks in found[1:]:  # where the curve is within 1e-5 of a level, either side is right
        least, most = (ranks_of(truth[0], [q + band for q in LEVELS]) for band in (-1e-5, 1e-5))
        errors.append(0.0 if ((least <= ranks) & (ranks <= most)).all() else torch.inf)
    return errors


def ranks_of(energies: Tensor, q: Sequence[float]) -> Tensor:
    curve = energies.double().cumsum(dim=-1).unsqueeze(-1)
    reached = curve >= torch.tensor(q, dtype=torch.float64) * curve[..., -1:, :]
    return torch.where(curve[..., -1, :] == 0, 0, (~reached).sum(dim=-2) + 1)


def entropy_rank(energies: Tensor) -> Tensor:
    values = energies.sqrt()
    return torch.special.entr(values / values.sum(dim=-1, keepdim=True)).sum(dim=-1).exp()


def bases(shape: Shape, case: str) -> Tensors:
    return {name: torch.linalg.qr(x.mT.double()).Q for name, x in pair(shape, case, "ab").items()}


def energies(shape: Shape, case: str) -> Tensors:
    values = FINITE[case](widths(shape)[0])[0].double().square().sum(dim=1)
    values = values.sort(dim=-1, descending=True).values
    return {"energies": (values + 1e-3 * values.amax()).float()}


def curves(shape: Shape, case: str) -> Tensors:
    values = energies(shape, case)["energies"].cumsum(dim=-1)
    return {"curve": values / values[..., -1:]}


def projector(x: Tensor, k: int) -> Tensor:
    right = torch.linalg.svd(x.double()).Vh[..., :k, :]
    return right.mT @ right


def attention_distance(student: Tensor, teacher: Tensor) -> Tensor:
    maps = []
    for x in (student, teacher):
        x = x.flatten(2).mT if x.ndim == 4 else x
        x = x / torch.where(x.amax() == 0, 1, x.detach().abs().amax())
        maps.append(F.normalize(x.square().mean(dim=2), dim=1, eps=1e-300))
    return F.mse_loss(*maps)


def pooled(x: Tensor) -> Tensor:
    return x.flatten(2).mean(dim=2) if x.ndim == 4 else x.mean(dim=1)


def image_relations(student: Tensor, teacher: Tensor) -> Tensor:
    relations = []
    for x in (pooled(student), pooled(teacher)):
        legs = x[None] - x[:, None]
        lengths = legs.norm(dim=-1)
        mean = lengths.sum() / lengths.count_nonzero().clamp(min=1)
        units = directions(legs, 1e-12)
        relations.append((lengths / torch.where(mean == 0, 1, mean), units @ units.mT))
    distances, angles = zip(*relations)
    return 25 * F.smooth_l1_loss(*distances) + 50 * F.smooth_l1_loss(*angles)


def contrast(student: Tensor, teacher: Tensor, **heads: Tensor) -> Tensor:
    sides = []
    for name, x in {"student": student, "teacher": teacher}.items():
        weight, bias = heads[f"{name}_head.weight"], heads[f"{name}_head.bias"]
        sides.append(F.normalize(F.linear(pooled(x).to(weight.dtype), weight, bias), dim=1))
    logits = sides[0] @ sides[1].mT / 0.07
    target = torch.arange(len(logits))
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.mT, target)) / 2


CRDS = {widths: CRD(*widths, 8) for widths in ((5, 7), (3, 4))}


def crd(student: Tensor, teacher: Tensor, **heads: Tensor) -> Tensor:
    loss = CRDS[heads["student_head.weight"].shape[1], heads["teacher_head.weight"].shape[1]]
    return torch.func.functional_call(loss, heads, (student, teacher))


def with_heads(shape: Shape, case: str) -> Tensors:
    inputs = pair(shape, case)
    generator = torch.Generator().manual_seed(3)
    for side in ("student", "teacher"):
        channels = inputs[side].shape[2]
        weight = torch.randn(8, channels, generator=generator) * channels**-0.5
        bias = torch.randn(8, generator=generator)
        inputs |= {f"{side}_head.weight": weight, f"{side}_head.bias": bias}
    return inputs


HEADS = tuple(
    f"{side}_head.{name}" for side in ("student", "teacher") for name in ("weight", "bias")
)


def patch_relations(student: Tensor, teacher: Tensor) -> Tensor:
    sides = [x.flatten(2).mT if x.ndim == 4 else x for x in (student, teacher)]
    sides = [directions(x, 1e-12) for x in sides]
    within = F.mse_loss(*(x @ x.mT for x in sides))
    between = F.mse_loss(*(x.transpose(0, 1) @ x.permute(1, 2, 0) for x in sides))
    drawn = F.mse_loss(*(x.flatten(0, 1) @ x.flatten(0, 1).mT for x in sides))
    return 4 * within + 0.1 * between + 0.2 * drawn


# ------------------------------------------------------------------------------ the table

MAPS = {
    "small": (2, 6, 6, 40),
    "deit": (1, 14, 14, 48),  # even grid, whole packs of 8 channels
    "swin": (2, 7, 7, 40),  # odd grid: no Nyquist column
    "oblong": (3, 5, 6, 33),  # nothing a multiple of any tile
    "one_token": (2, 1, 1, 24),
    "one_row": (1, 1, 2, 8),  # smallest even row
    "wide": (1, 2, 130, 12),  # rows longer than any warp or tile of the others
    "many_images": (70, 32, 2, 16),  # a second round of every loop over lines and partial sums
    "tiny": (2, 2, 3, 3),
}
LIFTED = {
    "small": (3, 6, 6, 32, 64),  # even grid, whole blocks; the smallest that CUDA C++ takes
    "swin": (2, 7, 7, 40, 72),  # odd grid: no Nyquist column
    "oblong": (3, 5, 6, 33, 57),  # nothing a multiple of any tile
    "one_token": (5, 1, 1, 24, 40),  # a tile of many images
    "narrower": (2, 4, 4, 96, 40),  # lifted down
    "slabs": (1, 3, 4, 300, 72),  # more channels than one program accumulates or keeps
    "tiny": (2, 2, 3, 4, 5),
}
MOMENTS = {
    "small": (2, 1, 45, 40),
    "one_token": (1, 1, 1, 24),
    "one_channel": (2, 1, 5, 1),
    "deit": (2, 14, 14, 48),  # more tokens than one split takes
    "oblong": (3, 1, 37, 33),  # nothing a multiple of any tile
    "three_tiles": (2, 1, 33, 150),  # off-diagonal tiles, whole and cut off
    "large_tiles": (1, 1, 70, 256),  # which half precision takes, two by two
}
MATRICES = {
    "small": (3, 1, 12, 20),  # fewer tokens than channels
    "tall": (2, 1, 20, 12),  # more tokens than channels
    "one_token": (3, 1, 1, 5),
    "swin": (1, 7, 7, 49),  # square
    "tiny": (2, 1, 4, 6),
}
RELATED = {"small": (4, 2, 3, 5, 7), "tiny": (3, 1, 2, 3, 4)}

LIFTS = {
    f"{loss}, {form}": {"loss": loss, "pool": form == "pooled"}
    for loss in LOSSES
    for form in ("one pass", "pooled")
}
LIFT_PARAMETERS = ("weight", "bias", "norm_weight", "norm_bias")
TENSOR = torch.zeros(3)
OF_TOKENS = {"maps": ("tokens",), "layouts": TOKEN_LAYOUTS, "wanted": (), "twice": None}
OF_MATRICES = {
    "draw": alone("x", SPECTRA),
    "cases": tuple(SPECTRA),
    "shapes": MATRICES,
    "maps": ("x",),
    "wanted": ("x",),
    "layouts": TOKEN_LAYOUTS,
    "images": "apart",
}
OF_ENERGIES = {
    "draw": energies,
    "shapes": {"small": (3, 1, 4, 9), "tiny": (2, 1, 2, 4)},
    "maps": ("energies",),
    "wanted": ("energies",),
    "layouts": ("unaligned", "channels_sliced"),
    "dtypes": (torch.float32,),
    "images": "apart",
    "twice": "right",
    "plain": True,
}
OF_BASES = {
    "draw": bases,
    "shapes": {"small": (3, 1, 3, 9), "tiny": (2, 1, 2, 4)},
    "maps": ("a", "b"),
    "wanted": (),
    "layouts": TOKEN_LAYOUTS,
    "dtypes": (torch.float32,),
    "cases": ("noise",),
    "results": (torch.float64,),
    "images": "apart",
    "measures": True,
    "tolerance": 1e-6,
    "twice": None,
    "plain": True,
}

OPERATORS = {
    "feature_kd": Operator(
        call=ops.feature_kd,
        reference=feature_distance,
        draw=pair,
        shapes=MAPS,
        variants={loss: {"loss": loss} for loss in LOSSES},
        forms=("spectral", "cosine"),
        costly=("deit", "swin", "oblong", "one_token", "one_row", "wide"),
        any_shape=True,
        wanted=("student", "teacher"),
        backends=("torch", "triton", "cuda"),
        images="summed",
        absolute={"cosine": 3e-7},
        takes_grid=True,
        refuses={
            "loss": (None, "l2", TENSOR),
            "grid": (16, "2x3", (2.0, 3.0), (6,), (6, 5)),
            "pool": (True, "max"),
            "beta": ("1", TENSOR, -1.0),
            "eps": (None, float("nan")),
        },
    ),
    "lift_kd": Operator(
        call=ops.lift_kd,
        reference=lifted_distance,
        draw=with_layers("student_tokens", "teacher_tokens"),
        shapes=LIFTED,
        variants=LIFTS,
        forms=("spectral, one pass", "cosine, pooled"),
        costly=("swin", "oblong", "one_token", "narrower", "slabs"),
        # An equal teacher is that of the lifted tokens: in test_lift_kd.py.
        cases=tuple(case for case in FINITE if case != "equal"),
        hard=tuple(variant for variant in LIFTS if "pooled" in variant),
        maps=("student_tokens", "teacher_tokens"),
        parameters=LIFT_PARAMETERS,
        wanted=("student_tokens", *LIFT_PARAMETERS),
        results=("wide", "same"),
        backends=("torch", "triton", "cuda"),
        images="summed",
        products=lifted_of,
        takes_grid=True,
        follows_autocast=True,
        refuses={
            "loss": (3, "l2"),
            "grid": (16, (6, 5)),
            "pool": ("yes", None),
            "beta": ("1", float("nan")),
            "lift_eps": ("1", -1.0),
        },
    ),
    "lift": Operator(
        call=functools.partial(ops.lift, pool=True),
        reference=lambda tokens, **parameters: layers(tokens, **parameters).mean(dim=(1, 2)),
        draw=with_layers("tokens"),
        costly=("swin", "oblong", "one_token", "narrower", "slabs"),
        shapes=LIFTED,
        maps=("tokens",),
        parameters=LIFT_PARAMETERS,
        wanted=("tokens", *LIFT_PARAMETERS),
        results=("same",),
        backends=("torch", "triton", "cuda"),
        images="apart",
        products=lambda tokens, **parameters: layers(tokens, **parameters),
        follows_autocast=True,
        refuses={"pool": ("yes", None), "lift_eps": ("1", -1.0)},
        kernels_of="lift_kd",
    ),
    "lift map": Operator(  # with a gradient it is torch's own layers
        call=ops.lift,
        reference=lifted_map,
        draw=with_layers("tokens"),
        costly=("swin", "oblong", "one_token", "narrower", "slabs"),
        shapes=LIFTED,
        maps=("tokens",),
        parameters=LIFT_PARAMETERS,
        wanted=(),
        results=("same",),
        backends=("torch", "triton", "cuda"),
        images="apart",
        products=lambda tokens, **parameters: layers(tokens, **parameters),
        follows_autocast=True,
        kernels_of="lift_kd",
        twice=None,
    ),
    "second_moment": Operator(
        call=ops.second_moment,
        reference=outer_products,
        draw=alone("tokens"),
        shapes=MOMENTS,
        variants={weight: {"weight": weight} for weight in WEIGHTS},
        results=(torch.float64,),
        backends=("torch", "triton"),
        measures=True,
        exact=1e-13,
        refuses={"weight": (None, "norm")},
        **OF_TOKENS,
    ),
    "sep": Operator(
        call=functools.partial(ops.sep, std=True),
        reference=functools.partial(spectral_curves, std=True),
        draw=alone("tokens"),
        shapes={"small": (2, 1, 33, 40), "one_channel": (2, 1, 7, 1), "odd": (3, 1, 7, 5)},
        variants={convention: {"convention": convention} for convention in CONVENTIONS},
        forms=("folded",),
        results=(torch.float64, torch.float64),
        backends=("torch", "triton"),
        # The square root magnifies what rounding leaves of a variance of zero.
        errors=lambda found, truth: [
            (ours - exact).abs().max().item() * factor
            for ours, exact, factor in zip(found, truth, (1, 0.5))
        ],
        tolerance=1e-6,
        exact=1e-7,
        empty=torch.nan,
        measures=True,
        refuses={"convention": (None, "half"), "std": ("yes",)},
        kernels_of="second_moment",
        **OF_TOKENS,
    ),
    "spectrum": Operator(
        call=ops.spectrum,
        reference=energies_of,
        backends=("torch", "cuda"),
        errors=spectral_errors,
        kernels_of="spectral_ranks",
        tolerance=1e-6,
        ties=True,
        **OF_MATRICES,
    ),
    "spectral_ranks": Operator(
        call=ops.spectral_ranks,
        reference=lambda x: (energies_of(x), ranks_of(energies_of(x), LEVELS)),
        results=("wide", torch.int64),
        backends=("torch", "cuda"),
        errors=spectral_errors,
        tolerance=1e-6,
        ties=True,
        hard_shapes=("small", "tall", "one_token", "swin"),
        refuses={"q": ("0.5", 99, (0.5,) * 9)},
        **OF_MATRICES,
    ),
    "singular_values": Operator(
        call=ops.singular_values,
        reference=lambda x: torch.linalg.svdvals(x),
        backends=("torch", "cuda"),
        errors=lambda found, truth: [of_total(found[0].square(), truth[0].square())],
        kernels_of="spectral_ranks",
        tolerance=1e-6,
        **OF_MATRICES | {"wanted": ()},  # the gradient of zeros is ours alone
    ),
    "gram": Operator(
        call=ops.gram,
        reference=lambda x: x @ x.mT if x.shape[1] <= x.shape[2] else x.mT @ x,
        **OF_MATRICES,
    ),
    "subspace": Operator(
        call=lambda x, k=2: (lambda u: u @ u.mT)(ops.subspace(x, k)),  # whatever the signs
        reference=functools.partial(projector, k=2),
        results=(torch.float64,),
        measures=True,
        **OF_MATRICES
        | {
            "cases": ("noise_matrix", "near_half_limit"),
            "shapes": {"small": (3, 1, 7, 12), "tall": (3, 1, 12, 7)},
            "wanted": (),
            "twice": None,
            "traced": False,
            "refuses": {"k": ("2", 2.0, None, True, [2], 99)},
        },
    ),
    "energy_curve": Operator(
        call=ops.energy_curve,
        reference=lambda energies: energies.cumsum(-1) / energies.sum(-1, keepdim=True),
        **OF_ENERGIES,
    ),
    "effective_rank": Operator(call=ops.effective_rank, reference=entropy_rank, **OF_ENERGIES),
    "stable_rank": Operator(
        call=ops.stable_rank,
        reference=lambda energies: energies.sum(-1) / energies.amax(-1),
        **OF_ENERGIES,
    ),
    "rank_at": Operator(
        call=functools.partial(ops.rank_at, q=(0.31, 0.87)),
        reference=functools.partial(ranks_of, q=(0.31, 0.87)),
        results=(torch.int64,),
        refuses={"q": ("0.5", None, ["0.5"], True, 0.0, ())},
        **OF_ENERGIES | {"wanted": (), "twice": None},
    ),
    "bandwidth": Operator(
        call=functools.partial(ops.bandwidth, q=(0.31, 0.87)),
        reference=lambda curve: (
            ((curve.unsqueeze(-1) < curve.new_tensor((0.31, 0.87))).sum(-2) + 1).double()
            / curve.shape[-1]
        ),
        results=(torch.float64,),
        refuses={"q": ("0.5", [0.0], [])},
        **OF_ENERGIES
        | {"draw": curves, "maps": ("curve",), "wanted": (), "twice": None}
        | {"bad": (torch.nan,)},
    ),
    "overlap": Operator(
        call=ops.overlap,
        reference=lambda a, b: (a.mT @ b).square().sum((-2, -1)) / min(a.shape[-1], b.shape[-1]),
        **OF_BASES,
    ),
    "principal_angles": Operator(
        call=ops.principal_angles,
        reference=lambda a, b: torch.linalg.svdvals(a.mT @ b).clamp(max=1).arccos(),
        **OF_BASES,
    ),
    "AttentionTransfer": Operator(
        call=AttentionTransfer(),
        reference=attention_distance,
        draw=pair,
        shapes=RELATED,
        transforms=False,
        twice="right",
        tolerance=1e-4,
    ),
    "RKD": Operator(
        call=RKD(), reference=image_relations, draw=pair, shapes=RELATED, as_eager=True
    ),
    "CRD": Operator(
        call=crd,
        reference=contrast,
        draw=with_heads,
        shapes=RELATED,
        wanted=("student", *HEADS),
        own_layers=True,
        as_eager=True,
        unstable=("tiny",),  # all embeddings are the biases'
    ),
    "ManifoldKD": Operator(
        call=ManifoldKD().eval(),  # evenly spaced patches, here all
        reference=patch_relations,
        draw=pair,
        shapes=RELATED,
        as_eager=True,
        unstable=("dominant_direction",),  # all similarities are nearly 1
    ),
    "gather_rows": Operator(  # CRD's, in a group of one process
        call=lambda own: torch.ops.fastkd.gather_rows(own, 1),
        reference=lambda own: own * 1,
        draw=alone("own"),
        shapes={"small": (3, 1, 4, 5), "tiny": (2, 1, 2, 3)},
        maps=("own",),
        wanted=("own",),
        layouts=TOKEN_LAYOUTS,
        results=("same",),
        images="apart",
        transforms=False,
        twice=None,
        inner=True,
    ),
}
