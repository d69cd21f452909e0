"""Projectors from the student's width to the teacher's: plain layers, `Orthonormal` and `Lift`."""

from __future__ import annotations

from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from fastkd.ops import lift_kd
from fastkd.ops.backend import Backend
from fastkd.ops.checks import at_least_float32, in_float64
from fastkd.ops.feature_kd.reference import LossName
from fastkd.ops.lift_kd import LIFT_EPS
from fastkd.utils.argument_checks import check_numbers

# As in the registry, which imports the bases of the losses, and they this file.
PROJECTORS = ("none", "pool", "linear", "mlp", "orthogonal", "lift")


def build_projector(name: str, student_dim: int, teacher_dim: int) -> nn.Module | None:
    """Build the layers that map a student's tokens to the teacher's width.

    ``"linear"`` is FitNets' (arXiv 1412.6550); ``"mlp"``, Linear, GELU, Linear, as wide inside as
    the teacher, AM-RADIO's head (arXiv 2312.06709) without its LayerNorm; ``"orthogonal"`` VkD's
    (arXiv 2403.06213), a Linear without bias whose weight has orthonormal columns (rows if the
    teacher is narrower), which torch cannot pickle.

    Args:
        name: one of `PROJECTORS`.
        student_dim: the student's channels.
        teacher_dim: the teacher's channels.

    Returns:
        Layers from [..., student_dim] to [..., teacher_dim], initialized as in ViTs, truncated
        N(0, 0.02), or random orthonormal; None for ``"none"``, ``"pool"`` and ``"lift"``.

    Raises:
        ValueError: an unknown name.
    """
    check_numbers("build_projector", student_dim=(student_dim, 1), teacher_dim=(teacher_dim, 1))
    if name not in PROJECTORS:
        raise ValueError(f"build_projector: name must be one of {PROJECTORS}, got {name!r}")
    if name == "orthogonal":
        return orthogonal_projector(student_dim, teacher_dim)
    if name not in ("linear", "mlp"):
        return None
    first = init_linear(nn.Linear(student_dim, teacher_dim))
    if name == "linear":
        return first
    return nn.Sequential(first, nn.GELU(), init_linear(nn.Linear(teacher_dim, teacher_dim)))


def init_linear(layer: nn.Linear) -> nn.Linear:
    """Initialize a layer in place as in ViTs: truncated N(0, 0.02), bias zero."""
    nn.init.trunc_normal_(layer.weight, std=0.02)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


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

    .. math:: Y = 2 (I + V^T V - S)^{-1}, \quad Q = \begin{pmatrix} Y - I \\ V Y \end{pmatrix}

    with the square top U of a tall parameter, the rest V, and S = U - U^T: the left part of
    Cayley's map of the skew-symmetric matrix with S and V in its first columns and zeros below.
    """

    # One system of the narrower width is solved, whose matrix has no singular value below 1, so it
    # cannot fail. torch.nn.utils.parametrizations.orthogonal solves for all Dt columns to keep Ds,
    # and its Householder map turns all to zero after one step of weight decay.

    def forward(self, parameter: Tensor) -> Tensor:
        """Map a parameter [Dt, Ds] to the weight, in the parameter's shape and dtype."""
        free = in_float64(parameter)  # TensorFloat-32 would cost three digits of orthonormality
        wide = free.shape[0] < free.shape[1]
        weight = _cayley(free.mT).mT if wide else _cayley(free)
        return weight.to(parameter.dtype).to(parameter.device).contiguous()


def _cayley(free: Tensor) -> Tensor:
    """Map a tall [n, k] to orthonormal columns."""
    top, rest = free.tensor_split([free.shape[1]])
    identity = torch.eye(free.shape[1], dtype=free.dtype, device=free.device)
    system = identity + rest.mT @ rest - (top - top.mT)
    solution, _ = torch.linalg.solve_ex(system, 2 * identity)  # unlike solve, without a sync
    return torch.cat([solution - identity, rest @ solution])


def undecayed(module: nn.Module) -> set[str]:
    """List the parameters of orthogonal projectors, which weight decay would pull to the identity.

    Args:
        module: any module; `DistillationLoss.no_weight_decay` lists its own for timm's optimizers.

    Returns:
        Names, as in ``module.named_parameters()``.
    """
    return {
        f"{name}.original"
        for name, child in module.named_modules()
        if isinstance(child, parametrize.ParametrizationList)
        and any(isinstance(mapping, Orthonormal) for mapping in child)
    }


class Lift(nn.Module):
    """Lift tokens to the teacher's width: Linear, then LayerNorm (arXiv 2511.15572, "Lift").

    Args:
        dim: channels of the incoming tokens.
        width: channels of the lifted tokens.
        lift_eps: of the LayerNorm.
        device: of the parameters.
        dtype: of the parameters.
        bias: whether the Linear has a bias; the paper's has none.
        norm: whether there is a LayerNorm.
    """

    def __init__(
        self,
        dim: int,
        width: int,
        lift_eps: float = LIFT_EPS,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = False,
        norm: bool = True,
    ) -> None:
        super().__init__()
        check_numbers("Lift", dim=(dim, 1), width=(width, 1), lift_eps=(lift_eps, 0.0))
        self.proj = nn.Linear(dim, width, bias=bias, device=device, dtype=dtype)
        self.norm: nn.Module = nn.Identity()
        if norm:
            self.norm = nn.LayerNorm(width, eps=lift_eps, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Lift tokens.

        Args:
            x: [B, N, dim].

        Returns:
            [B, N, width].
        """
        return self.norm(self.proj(x))

    def compare(
        self,
        tokens: Tensor,
        teacher_tokens: Tensor,
        loss: LossName = "mse",
        *,
        grid: tuple[int, int] | None = None,
        beta: float = 1.0,
        pool: bool = False,
        backend: Backend = "auto",
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Compute the distance to a frozen teacher's tokens without writing the lifted ones.

        Args:
            tokens: [B, N, dim] or [B, dim, H, W], any strides.
            teacher_tokens: [B, N, width] or [B, width, H, W], any strides; gets no gradient.
            loss: see `LiftKD`.
            grid: (H, W) of [B, N, D] tokens.
            beta: of ``"smooth_l1"``.
            pool: also return the mean of the lifted tokens, [B, width].
            backend: of the operator.

        Returns:
            A scalar; with ``pool`` a pair.
        """
        options = {"grid": grid, "pool": pool, "beta": beta, "backend": backend}
        operands = self.operands() | options
        return lift_kd(tokens, teacher_tokens=teacher_tokens, loss=loss, **operands)

    def is_fusible(self) -> bool:
        """Whether an operator may compute the layers: they have no hooks and are as built."""
        # Adapters, quantization and parametrizations replace layers; feature extractors and FSDP
        # hook them.
        normed = type(self.norm) is nn.LayerNorm and self.norm.elementwise_affine
        return (
            type(self) is Lift
            and type(self.proj) is nn.Linear
            and (normed or type(self.norm) is nn.Identity)
            and not any(has_hooks(module) for module in (self, self.proj, self.norm))
        )

    def operands(self) -> dict[str, Any]:
        """Get the layers' parameters and epsilon as the operators' keywords.

        Raises:
            ValueError: not `is_fusible`.
        """
        if not self.is_fusible():
            raise ValueError(
                "Lift: a layer has been exchanged or has hooks, which fused operators ignore; call "
                "the layers, and compare their output by fastkd.ops.feature_kd"
            )
        norm = self.norm if isinstance(self.norm, nn.LayerNorm) else None
        return {
            "weight": self.proj.weight,
            "bias": self.proj.bias,
            "norm_weight": None if norm is None else norm.weight,
            "norm_bias": None if norm is None else norm.bias,
            "lift_eps": 0.0 if norm is None else norm.eps,
        }


def fused_weights(layer: nn.Module) -> tuple[Tensor, Tensor | None] | None:
    """Get weight and bias of a plain Linear, parametrized or not, that an operator may compute.

    None for other modules, subclasses, and a layer that has hooks or whose forward is replaced.
    """
    if parametrize.type_before_parametrizations(layer) is not nn.Linear:
        return None
    if has_hooks(layer) or "forward" in layer.__dict__:  # accelerate replaces it
        return None
    linear = cast(nn.Linear, layer)
    return linear.weight, linear.bias


def has_hooks(module: nn.Module) -> bool:
    """Whether calling the module runs hooks."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


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
    """Raise for widths that must be equal; for ``"lift"``, ``student_dim`` is the lifted one."""
    if projector not in ("none", "lift") or student_dim == teacher_dim or not equal_widths:
        return
    raise ValueError(
        f"FeatureKD: pair {pair[0]}:{pair[1]}: student has {student_dim} channels, teacher "
        f"{teacher_dim}; projector={projector!r} needs equal widths: choose projector='linear' "
        "(learned, dropped at inference) or 'pool' (averages the wider side), or create the "
        f"student as 'lift' (with projector='lift') or 'widelast' with width={teacher_dim}"
    )
