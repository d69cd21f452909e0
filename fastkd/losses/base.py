"""What a term is: something with a name and a weight that compares a student with its teacher.

Logit terms compare [B, classes]; feature terms compare token maps of pairs of blocks. Neither knows
models, nor how terms are summed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import ClassVar, TypeVar

import torch
from torch import Tensor, nn

from fastkd.losses.projectors import undecayed
from fastkd.tokens import RESAMPLE_MODES, Tokens, match_grids

Key = int | str
Pairs = Sequence[tuple[Key, Key]]
Value = TypeVar("Value")


class LogitTerm(nn.Module):
    """A distance between two batches of logits.

    Subclasses implement ``forward(student, teacher, target=None)``: [B, classes] twice, of which
    the student's receives the gradient, and the labels where `needs_target` says so.

    Attributes:
        name: its key among the losses of a step.
        needs_target: whether it looks at the labels.
        weight: what the caller multiplies the term with; kept here, not applied here.
    """

    name: str
    needs_target: ClassVar[bool] = False
    weight: float


class FeatureTerm(nn.Module):
    """A distance between token maps of pairs of blocks.

    Subclasses implement ``forward(student, teacher)``: tokens by key, of which the student's
    receive the gradient and the teacher's, which are frozen, none.

    Args:
        pairs: (student key, teacher key), resolved to the keys of the taps.
        weight: what the caller multiplies the term with; kept here, not applied here.
        resample: None refuses different grids; otherwise the mode that brings the teacher's map to
            the student's grid (`fastkd.tokens.match_grids`).

    Attributes:
        name: its key among the losses of a step.
        lifts: whether the student's key stands for its lifted tokens.

    Raises:
        ValueError: no pairs, or an unknown way to resample.
    """

    name = "feature"
    lifts = False

    def __init__(self, pairs: Pairs, weight: float, resample: str | None = None) -> None:
        super().__init__()
        if resample is not None:
            check_choice(self, "resample", resample, RESAMPLE_MODES)
        if not pairs:
            raise ValueError(
                f"{type(self).__name__}: pairs must hold at least one (student, teacher) pair"
            )
        self.pairs = tuple((student, teacher) for student, teacher in pairs)
        self.weight = weight
        self.resample = resample

    def matched(
        self, student: Mapping[Key, Tokens], teacher: Mapping[Key, Tokens], index: int = 0
    ) -> tuple[Tokens, Tokens]:
        """Both sides of a pair, on one grid; the teacher's detached.

        Args:
            student: tokens by key.
            teacher: tokens by key; resampled where the grids differ.
            index: which pair.

        Returns:
            The student's tokens, the teacher's.

        Raises:
            ValueError: a key is missing, or grids differ without ``resample``.
        """
        student_key, teacher_key = self.pairs[index]
        frozen = look_up(self, "teacher", teacher, teacher_key)
        return match_grids(
            look_up(self, "student", student, student_key),
            replace(frozen, data=frozen.data.detach()),
            self.resample,
        )

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Parameters that timm's optimiser factory must not decay, beside the 1-d ones."""
        return undecayed(self)

    def widths(
        self, student_dims: Mapping[Key, int], teacher_dims: Mapping[Key, int]
    ) -> list[tuple[int, int]]:
        """Channels of both sides of every pair.

        Args:
            student_dims: channels per student key.
            teacher_dims: channels per teacher key.

        Returns:
            (student's, teacher's) per pair.

        Raises:
            ValueError: a key is missing.
        """
        return [
            (
                look_up(self, "student_dims", student_dims, student),
                look_up(self, "teacher_dims", teacher_dims, teacher),
            )
            for student, teacher in self.pairs
        ]


def look_up(term: nn.Module, argument: str, mapping: Mapping[Key, Value], key: Key) -> Value:
    """The value under a key, or one error that says what is there."""
    if key not in mapping:
        raise ValueError(
            f"{type(term).__name__}: {argument} has no key {key!r}, only {list(mapping)}"
        )
    return mapping[key]


def check_choice(term: nn.Module, argument: str, value: str, choices: Sequence[str]) -> None:
    """Refuse a value that is none of the choices."""
    if value not in choices:
        raise ValueError(
            f"{type(term).__name__}: {argument} must be one of {tuple(choices)}, got {value!r}"
        )


def check_logits(term: nn.Module, student: Tensor, teacher: Tensor) -> None:
    """Refuse logits that are not [B, classes] twice."""
    if student.ndim != 2 or student.shape != teacher.shape:
        raise ValueError(
            f"{type(term).__name__}: teacher logits must be [B, classes] = {list(student.shape)} "
            f"like the student's, got {list(teacher.shape)} (a teacher of another data set? "
            "alpha=0 distils features only)"
        )
