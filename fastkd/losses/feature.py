"""Distillation of feature maps between pairs of blocks.

Knows tokens, widths and projectors; which model the tokens come from is the caller's business, and
the distance itself is `fastkd.ops.feature_kd`, or `fastkd.ops.lift_kd` after a learned projector.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from fastkd.losses.projectors import (
    PROJECTORS,
    check_widths,
    has_hooks,
    linear_projector,
    pool_side,
)
from fastkd.ops import feature_kd, lift_kd
from fastkd.tokens import RESAMPLE_MODES, Tokens, match_grids

Key = int | str
Value = TypeVar("Value")
FEATURE_LOSSES = ("mse", "spectral", "smooth_l1", "cosine")


class FeatureKD(nn.Module):
    r"""Mean over pairs of a distance between student and teacher token maps.

    .. math:: L = \frac{1}{|P|} \sum_{(i, j) \in P} d(\pi(F^s_i), F^t_j)

    with d one of ``"mse"`` (mean over all elements), ``"spectral"`` (SpectralKD, arXiv 2412.19055),
    ``"smooth_l1"`` and ``"cosine"``, each reduced to a mean as `fastkd.ops.feature_kd` documents.
    The projector :math:`\pi` is one of

    - ``"none"``: equal widths, tokens compared as they are;
    - ``"pool"``: the wider side's channels are averaged down (what SpectralKD's code does);
    - ``"linear"``: a learned Linear per pair, student to teacher width (FitNets, arXiv 1412.6550),
      dropped at inference; the projected map is never written;
    - ``"lift"``: the student classifies from its own lifted tokens and those are compared
      (arXiv 2511.15572); the caller puts them under the pair's student key.

    Args:
        loss: the distance d.
        pairs: (student key, teacher key), resolved to the keys of the taps.
        weight: what the caller multiplies the term with; kept here, not applied here.
        projector: one of the four above.
        student_dims: channels per student key; needed by ``"linear"`` and for the check of widths.
        teacher_dims: channels per teacher key; likewise.
        resample: None refuses different grids; otherwise the mode that brings the teacher's map to
            the student's grid (`fastkd.tokens.match_grids`).
        backend: passed to the operators.
        beta: the threshold of ``"smooth_l1"``.

    Raises:
        ValueError: no pairs, an unknown option, or widths that the projector cannot bring together.
    """

    name = "feature"

    def __init__(
        self,
        loss: str = "mse",
        pairs: Sequence[tuple[Key, Key]] = ((11, 11),),
        weight: float = 0.2,
        projector: str = "none",
        student_dims: Mapping[Key, int] | None = None,
        teacher_dims: Mapping[Key, int] | None = None,
        resample: str | None = None,
        backend: str = "auto",
        beta: float = 1.0,
    ) -> None:
        super().__init__()
        _check_choice("loss", loss, FEATURE_LOSSES)
        _check_choice("projector", projector, PROJECTORS)
        if resample is not None:
            _check_choice("resample", resample, RESAMPLE_MODES)
        if not pairs:
            raise ValueError("FeatureKD: pairs must hold at least one (student, teacher) pair")
        if projector == "lift" and len(pairs) > 1:
            raise ValueError(
                f"FeatureKD: projector='lift' compares the one lifted map of the student, got "
                f"{len(pairs)} pairs"
            )
        self.loss = loss
        self.pairs = tuple((student, teacher) for student, teacher in pairs)
        self.weight = weight
        self.projector = projector
        self.resample = resample
        self.backend = backend
        self.beta = beta
        self.projectors = nn.ModuleList(self._build_projectors(student_dims, teacher_dims))

    def _build_projectors(
        self, student_dims: Mapping[Key, int] | None, teacher_dims: Mapping[Key, int] | None
    ) -> list[nn.Module]:
        if student_dims is None or teacher_dims is None:
            if self.projector == "linear":
                raise ValueError(
                    "FeatureKD: projector='linear' needs student_dims and teacher_dims, the "
                    "channels per key"
                )
            return []
        projectors: list[nn.Module] = []
        for student, teacher in self.pairs:
            widths = (
                _lookup("student_dims", student_dims, student),
                _lookup("teacher_dims", teacher_dims, teacher),
            )
            check_widths(self.projector, (student, teacher), *widths)
            if self.projector == "linear":
                projectors.append(linear_projector(*widths))
        return projectors

    def forward(self, student: Mapping[Key, Tokens], teacher: Mapping[Key, Tokens]) -> Tensor:
        """Compare the token maps of every pair.

        Args:
            student: tokens by key; receive the gradient.
            teacher: tokens by key; frozen (``"linear"`` refuses one that requires a gradient).

        Returns:
            Scalar float32, unweighted.

        Raises:
            ValueError: a key is missing, grids differ without ``resample``, or widths differ.
        """
        distances = [
            self._distance(index, *self.matched(student, teacher, index))
            for index in range(len(self.pairs))
        ]
        return torch.stack(distances).mean()

    @property
    def options(self) -> dict[str, Any]:
        """What defines the distance, as the operators' keywords."""
        return {"loss": self.loss, "beta": self.beta, "backend": self.backend}

    def matched(
        self, student: Mapping[Key, Tokens], teacher: Mapping[Key, Tokens], index: int = 0
    ) -> tuple[Tokens, Tokens]:
        """Both sides of a pair, on one grid.

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
        return match_grids(
            _lookup("student", student, student_key),
            _lookup("teacher", teacher, teacher_key),
            self.resample,
        )

    def _distance(self, index: int, student: Tokens, teacher: Tokens) -> Tensor:
        check_widths(self.projector, self.pairs[index], student.dim, teacher.dim)
        grid = student.grid
        if self.projector == "linear":
            return self._projected_distance(self.projectors[index], student, teacher)
        pool = pool_side(student.dim, teacher.dim) if self.projector == "pool" else "none"
        return feature_kd(student.data, teacher.data, grid=grid, pool=pool, **self.options)

    def _projected_distance(self, layer: nn.Module, student: Tokens, teacher: Tokens) -> Tensor:
        if type(layer) is nn.Linear and not has_hooks(layer):
            distance = lift_kd(
                student.data,
                layer.weight,
                teacher.data,
                layer.bias,
                grid=student.grid,
                **self.options,
            )
            return cast(Tensor, distance)
        # Someone has exchanged it, or listens to it: only calling it does what was meant.
        return feature_kd(layer(student.data), teacher.data, grid=student.grid, **self.options)

    def extra_repr(self) -> str:
        """Options, for ``print``."""
        pairs = ",".join(f"{student}:{teacher}" for student, teacher in self.pairs)
        return f"{self.loss}, pairs={pairs}, weight={self.weight}, projector={self.projector}"


def _check_choice(argument: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"FeatureKD: {argument} must be one of {tuple(choices)}, got {value!r}")


def _lookup(argument: str, mapping: Mapping[Key, Value], key: Key) -> Value:
    if key not in mapping:
        raise ValueError(f"FeatureKD: {argument} has no key {key!r}, only {list(mapping)}")
    return mapping[key]
