"""How a student's channels meet a teacher's of another width.

Knows channel counts only: which models they belong to is the caller's business.
"""

from __future__ import annotations

from typing import Literal

from torch import nn

PROJECTORS = ("none", "pool", "linear", "lift")


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
    projector: str, pair: tuple[int | str, int | str], student_dim: int, teacher_dim: int
) -> None:
    """Refuse a pair whose widths the projector cannot bring together.

    Args:
        projector: one of `PROJECTORS`.
        pair: (student key, teacher key), for the message.
        student_dim: the student's channels at this pair; for ``"lift"``, the lifted width.
        teacher_dim: the teacher's channels at this pair.

    Raises:
        ValueError: ``"none"`` or ``"lift"`` with different widths.
    """
    if projector in ("pool", "linear") or student_dim == teacher_dim:
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
