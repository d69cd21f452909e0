"""Projectors from the student's width to the teacher's."""

from __future__ import annotations

from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from fastkd.ops.checks import at_least_float32, in_float64
from fastkd.utils.arguments import check_numbers

PROJECTORS = ("none", "pool", "linear", "mlp", "orthogonal", "lift")  # as in the registry


def build_projector(
    name: str, student_dim: int, teacher_dim: int, *, hidden: int | None = None
) -> nn.Module | None:
    """Build the layers that map a student's tokens to the teacher's width.

    ``"linear"`` is FitNets' (arXiv 1412.6550). ``"mlp"``, Linear, GELU, Linear, is AM-RADIO's head
    (arXiv 2312.06709) without its LayerNorm. ``"orthogonal"`` is VkD's (arXiv 2403.06213): a Linear
    without bias whose weight has orthonormal columns, or rows if the teacher is narrower, at every
    step. Its parameter is ``parametrizations.weight.original``; see `undecayed`. Save its state
    dict: torch cannot pickle parametrized modules.

    Args:
        name: one of `PROJECTORS`.
        student_dim: the student's channels.
        teacher_dim: the teacher's channels.
        hidden: channels between the two layers of ``"mlp"``; the teacher's by default.

    Returns:
        The layers, [..., student_dim] -> [..., teacher_dim], for ``"linear"``, ``"mlp"`` and
        ``"orthogonal"``; None where nothing is learned, or the student itself has the layers.
        Weights are from N(0, 0.02) truncated, as in ViTs, or random orthonormal.

    Raises:
        ValueError: an unknown name, or ``hidden`` for another projector than ``"mlp"``.
    """
    check_numbers(
        "build_projector",
        student_dim=(student_dim, 1),
        teacher_dim=(teacher_dim, 1),
        hidden=(hidden, 1),
    )
    if name not in PROJECTORS:
        raise ValueError(f"build_projector: name must be one of {PROJECTORS}, got {name!r}")
    if hidden is not None and name != "mlp":
        raise ValueError(f"build_projector: hidden is of 'mlp', got hidden={hidden} with {name!r}")
    if name == "linear":
        return linear_projector(student_dim, teacher_dim)
    if name == "mlp":
        return mlp_projector(student_dim, teacher_dim, hidden)
    if name == "orthogonal":
        return orthogonal_projector(student_dim, teacher_dim)
    return None


def linear_projector(student_dim: int, teacher_dim: int) -> nn.Linear:
    """Build a Linear with bias, initialized as in ViTs."""
    projector = nn.Linear(student_dim, teacher_dim)
    init_linear(projector)
    return projector


def mlp_projector(student_dim: int, teacher_dim: int, hidden: int | None = None) -> nn.Sequential:
    """Build Linear, GELU, Linear with biases, initialized as in ViTs."""
    hidden = teacher_dim if hidden is None else hidden
    layers = linear_projector(student_dim, hidden), linear_projector(hidden, teacher_dim)
    return nn.Sequential(layers[0], nn.GELU(), layers[1])


def orthogonal_projector(student_dim: int, teacher_dim: int) -> nn.Linear:
    """Build a Linear without bias whose weight is orthonormal, computed at each read of it."""
    layer = nn.Linear(student_dim, teacher_dim, bias=False)
    # Rotations by angles of all sizes: at a smaller scale the weight would start at the identity,
    # at a larger one near reflections, where the map is flat.
    nn.init.normal_(layer.weight, std=max(student_dim, teacher_dim) ** -0.5)
    parametrize.register_parametrization(layer, "weight", Orthonormal())
    return layer


class Orthonormal(nn.Module):
    r"""Cayley's map from any matrix to one with orthonormal columns, or rows if it is wide.

    With the square top U of a tall parameter and the rest V, S = U - U^T and

    .. math:: Y = 2 (I + V^T V - S)^{-1}, \quad Q = \begin{pmatrix} Y - I \\ V Y \end{pmatrix}

    is the left part of Cayley's map of the skew-symmetric matrix that has S and V in its first
    columns and zeros below. One system of the narrower width is solved; its matrix has no singular
    value below 1, so it cannot fail, and no check synchronizes with the device. All weights are
    reached but those with Q_top + I singular; square ones are rotations.

    Computed in float64: in float32, TensorFloat-32 would cost three digits of orthonormality.
    Devices without float64 (``"mps"``) compute on the CPU.

    `torch.nn.utils.parametrizations.orthogonal` maps to the same set. Its exponential and Cayley
    maps solve for all Dt columns to keep Ds of them. Its Householder map, the default for a weight
    that is not square, truncates parameters of -1 to integers for signs: after one step of weight
    decay they, and the weight, are zero.
    """

    def forward(self, parameter: Tensor) -> Tensor:
        """Map a parameter [Dt, Ds] to the weight, in the parameter's shape and dtype."""
        free = in_float64(parameter)
        wide = free.shape[0] < free.shape[1]
        weight = _cayley(free.mT).mT if wide else _cayley(free)
        return weight.to(parameter.dtype).to(parameter.device).contiguous()


def _cayley(free: Tensor) -> Tensor:
    """Map a tall [n, k] to orthonormal columns."""
    top, rest = free.tensor_split([free.shape[1]])
    identity = torch.eye(free.shape[1], dtype=free.dtype, device=free.device)
    system = identity + rest.mT @ rest - (top - top.mT)
    solution, _ = torch.linalg.solve_ex(system, 2 * identity)
    return torch.cat([solution - identity, rest @ solution])


def undecayed(module: nn.Module) -> set[str]:
    """List the parameters of orthogonal projectors, which weight decay would pull to the identity.

    For your own loop, in addition to the student's biases, norms and embeddings. timm's
    `create_optimizer_v2` calls a module's ``no_weight_decay()``, which `DistillationLoss` has::

        losses = DistillationLoss(feature=FeatureKD(projector="orthogonal", ...))
        module = nn.ModuleDict({"student": student, "losses": losses})
        spared = undecayed(module)
        named = dict(module.named_parameters())
        optimizer = torch.optim.AdamW(
            [
                {"params": [p for name, p in named.items() if name not in spared]},
                {"params": [p for name, p in named.items() if name in spared], "weight_decay": 0.0},
            ],
            weight_decay=0.05,
        )

    Args:
        module: any module; wrappers such as `DistributedDataParallel` are part of the names.

    Returns:
        Names, as in ``module.named_parameters()``; none if there is no such projector.
    """
    return {
        f"{name}.original"
        for name, child in module.named_modules()
        if isinstance(child, parametrize.ParametrizationList)
        and any(isinstance(mapping, Orthonormal) for mapping in child)
    }


def fused_weights(layer: nn.Module) -> tuple[Tensor, Tensor | None] | None:
    """Get weight and bias of a plain Linear, parametrized or not, that an operator may compute.

    None for other modules, subclasses, and a layer that has hooks or whose forward is replaced.
    """
    if parametrize.type_before_parametrizations(layer) is not nn.Linear:
        return None
    if has_hooks(layer) or "forward" in layer.__dict__:
        return None
    linear = cast(nn.Linear, layer)
    return linear.weight, linear.bias


def pool_channels(tokens: Tensor, dim: int) -> Tensor:
    """Average neighboring channels of [B, N, D] to [B, N, dim], like ``pool`` of `feature_kd`."""
    return F.adaptive_avg_pool1d(at_least_float32(tokens), dim)


def pool_side(student_dim: int, teacher_dim: int) -> Literal["none", "student", "teacher"]:
    """Choose the side whose channels are averaged: the wider one, as in SpectralKD's code.

    Args:
        student_dim: the student's channels.
        teacher_dim: the teacher's channels.

    Returns:
        The ``pool`` argument for `fastkd.ops.feature_kd`.
    """
    if student_dim == teacher_dim:
        return "none"
    return "teacher" if teacher_dim > student_dim else "student"


def check_widths(
    projector: str,
    pair: tuple[int | str, int | str],
    student_dim: int,
    teacher_dim: int,
    *,
    equal_widths: bool = True,
) -> None:
    """Raise for widths that must be equal and that the projector does not change.

    For ``"lift"``, ``student_dim`` is the lifted width.
    """
    if projector not in ("none", "lift") or student_dim == teacher_dim or not equal_widths:
        return
    where = f"pair {pair[0]}:{pair[1]}: student has {student_dim} channels, teacher {teacher_dim}"
    if projector == "lift":
        raise ValueError(
            f"FeatureKD: {where}; projector='lift' compares the student's lifted tokens as they "
            f"are: create the student with width={teacher_dim}"
        )
    raise ValueError(
        f"FeatureKD: {where}; projector='none' needs equal widths: choose projector='lift' if the "
        "student is a Lift already, 'linear' (learned, dropped at inference), 'pool' (averages the "
        f"wider side), or a student variant 'lift' or 'widelast' with width={teacher_dim}"
    )


def init_linear(layer: nn.Linear) -> None:
    """Initialize a layer as in ViTs: truncated N(0, 0.02), bias zero."""
    nn.init.trunc_normal_(layer.weight, std=0.02)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


def has_hooks(module: nn.Module) -> bool:
    """Whether calling the module runs hooks."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )
