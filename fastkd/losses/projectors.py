"""How a student's channels meet a teacher's of another width.

Knows channel counts only: which models they belong to, and what the tokens are compared by, is the
caller's business.
"""

from __future__ import annotations

from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from fastkd.ops.checks import at_least_float32, in_float64

PROJECTORS = ("none", "pool", "linear", "mlp", "orthogonal", "lift")  # as in the registry
JOINING = ("pool", "linear", "mlp", "orthogonal")  # any two widths


def build_projector(
    name: str, student_dim: int, teacher_dim: int, *, hidden: int | None = None
) -> nn.Module | None:
    """Make the layers that bring a student's tokens to the teacher's width.

    Args:
        name: one of `PROJECTORS`.
        student_dim: the student's channels.
        teacher_dim: the teacher's channels.
        hidden: channels between the two layers of ``"mlp"``; the teacher's if omitted.

    Returns:
        The layers, [..., student_dim] -> [..., teacher_dim], for ``"linear"``, ``"mlp"`` and
        ``"orthogonal"``; None where nothing is learned, or the student itself has the layers.

    Raises:
        ValueError: an unknown name, or ``hidden`` for a projector that has none.
    """
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
    """FitNets' projector for tokens: Linear(student_dim -> teacher_dim), used in training only.

    Args:
        student_dim: the student's channels.
        teacher_dim: the teacher's channels.

    Returns:
        A linear layer with bias; weights from N(0, 0.02) truncated, as in ViTs.
    """
    projector = nn.Linear(student_dim, teacher_dim)
    init_linear(projector)
    return projector


def mlp_projector(student_dim: int, teacher_dim: int, hidden: int | None = None) -> nn.Sequential:
    """Linear, GELU, Linear, each token by itself, used in training only.

    The heads of AM-RADIO (arXiv 2312.06709) without their LayerNorm. (The projectors of
    arXiv 2210.15274 are three layers side by side, each Linear and ReLU, averaged.)

    Args:
        student_dim: the student's channels.
        teacher_dim: the teacher's channels.
        hidden: channels in between; ``teacher_dim`` if omitted.

    Returns:
        The three, with biases; weights from N(0, 0.02) truncated, as in ViTs.
    """
    hidden = teacher_dim if hidden is None else hidden
    layers = linear_projector(student_dim, hidden), linear_projector(hidden, teacher_dim)
    return nn.Sequential(layers[0], nn.GELU(), layers[1])


def orthogonal_projector(student_dim: int, teacher_dim: int) -> nn.Linear:
    """VkD's projector (arXiv 2403.06213): a Linear that turns tokens without stretching them.

    Without bias; the weight has orthonormal columns where the teacher is at least as wide, and
    orthonormal rows where it is narrower. It is so at every step, not by a penalty; `Orthonormal`
    says how, and what it costs. Whoever reads ``weight`` computes it, once a read.

    The parameter is ``parametrizations.weight.original``, of the weight's shape. Weight decay would
    pull the weight towards the rectangular identity: `undecayed` names what to leave out of it.
    Save the state dict: torch cannot pickle parametrised modules whole.

    Args:
        student_dim: the student's channels.
        teacher_dim: the teacher's channels.

    Returns:
        The layer; it starts at a random orthonormal weight.
    """
    layer = nn.Linear(student_dim, teacher_dim, bias=False)
    # Turns by angles of all sizes: at a smaller scale the weight would start at the identity,
    # at a larger one near reflections, where the map is flat.
    nn.init.normal_(layer.weight, std=max(student_dim, teacher_dim) ** -0.5)
    parametrize.register_parametrization(layer, "weight", Orthonormal())
    return layer


class Orthonormal(nn.Module):
    r"""Cayley's map from any matrix to one with orthonormal columns, or rows if it is wide.

    With a tall parameter's square top U and the rest V, S = U - U^T and

    .. math:: Y = 2 (I + V^T V - S)^{-1}, \quad Q = \begin{pmatrix} Y - I \\ V Y \end{pmatrix}

    is the left part of Cayley's map of the skew-symmetric matrix that has S and V in its first
    columns and nothing else below. One system of the narrower width is solved; the matrix to invert
    has no singular value below 1, so that nothing can fail and nobody has to look: no wait for the
    device. All weights are reached but those with Q_top + I singular; square ones are rotations.

    Computed in float64, which autocast leaves alone: in float32 the user's TensorFloat-32 would
    cost the orthonormality three digits. A device without float64 (``"mps"``) waits for the CPU,
    which does it.

    `torch.nn.utils.parametrizations.orthogonal` maps to the same set. Its exponential and its
    Cayley map solve for all Dt columns to keep Ds of them; its Householder map, the default for a
    weight that is not square, reads signs off parameters of -1 cut to integers: one step of weight
    decay makes them, and the weight, zero.
    """

    def forward(self, parameter: Tensor) -> Tensor:
        """Map a parameter [Dt, Ds] to the weight, in the parameter's shape and dtype."""
        free = in_float64(parameter)
        wide = free.shape[0] < free.shape[1]
        weight = _cayley(free.mT).mT if wide else _cayley(free)
        return weight.to(parameter.dtype).to(parameter.device).contiguous()


def _cayley(free: Tensor) -> Tensor:
    """A tall [n, k] to orthonormal columns."""
    top, rest = free.tensor_split([free.shape[1]])
    identity = torch.eye(free.shape[1], dtype=free.dtype, device=free.device)
    system = identity + rest.mT @ rest - (top - top.mT)
    solution, _ = torch.linalg.solve_ex(system, 2 * identity)
    return torch.cat([solution - identity, rest @ solution])


def undecayed(module: nn.Module) -> set[str]:
    """Parameters of orthogonal projectors, which weight decay would turn towards the identity.

    What to keep out of it in a loop of one's own; the student's biases, norms and embeddings are
    the loop's business. timm's `create_optimizer_v2` asks a module's ``no_weight_decay()`` instead,
    which `DistillationLoss` has, and calls this::

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
        module: what to look through; wrappers such as `DistributedDataParallel` are part of names.

    Returns:
        Names, as ``module.named_parameters()`` has them; none if there is no such projector.
    """
    return {
        f"{name}.original"
        for name, child in module.named_modules()
        if isinstance(child, parametrize.ParametrizationList)
        and any(isinstance(mapping, Orthonormal) for mapping in child)
    }


def fused_weights(layer: nn.Module) -> tuple[Tensor, Tensor | None] | None:
    """What an operator needs in order to compute a Linear itself.

    Args:
        layer: any module.

    Returns:
        Weight and bias, if the layer is a Linear, its tensors parametrised or not. None where only
        calling it does what was meant: another module, a subclass, one that somebody listens to, or
        whose forward somebody has replaced.
    """
    if parametrize.type_before_parametrizations(layer) is not nn.Linear:
        return None
    if has_hooks(layer) or "forward" in layer.__dict__:
        return None
    linear = cast(nn.Linear, layer)
    return linear.weight, linear.bias


def pool_channels(tokens: Tensor, dim: int) -> Tensor:
    """Average neighbouring channels, as `fastkd.ops.feature_kd` does with ``pool``.

    Args:
        tokens: [B, N, D].
        dim: how many channels to leave; the windows are those of adaptive average pooling, and
            overlap where ``dim`` does not divide D.

    Returns:
        [B, N, dim], float32 (float64 for float64 tokens).
    """
    return F.adaptive_avg_pool1d(at_least_float32(tokens), dim)


def pool_side(student_dim: int, teacher_dim: int) -> Literal["none", "student", "teacher"]:
    """Say whose channels are averaged down: the wider side's, as the SpectralKD code does.

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
    """Refuse a pair whose widths the projector cannot bring together.

    Args:
        projector: one of `PROJECTORS`.
        pair: (student key, teacher key), for the message.
        student_dim: the student's channels at this pair; for ``"lift"``, the lifted width.
        teacher_dim: the teacher's channels at this pair.
        equal_widths: whether the distance needs as many channels on both sides.

    Raises:
        ValueError: ``"none"`` or ``"lift"`` with different widths, which the distance needs equal.
    """
    if projector in JOINING or student_dim == teacher_dim or not equal_widths:
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
    """Initialise a projector in place as ViTs do: truncated N(0, 0.02), bias zero.

    Args:
        layer: with or without bias.
    """
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
