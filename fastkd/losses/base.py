"""Base classes of the losses, and the checks that they share."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import ClassVar, TypeVar

import torch
from einops import rearrange
from torch import Tensor, nn

from fastkd.losses.projectors import undecayed
from fastkd.ops import checks
from fastkd.ops.checks import check_float
from fastkd.tokens import RESAMPLE_MODES, ResampleMode, Tokens, match_grids
from fastkd.utils.argument_checks import FLOAT32, check_number, describe

Grid = tuple[int, int]
Key = int | str
Pairs = Sequence[tuple[Key, Key]]
Value = TypeVar("Value")

POSITIVE = FLOAT32[0]  # the least of options that must be neither 0 nor infinite in float32


def print_options(self: nn.Module) -> str:
    """Format the options that the constructor took; for ``extra_repr``."""
    names = inspect.signature(type(self)).parameters
    options = {name: getattr(self, name, None) for name in names}
    shown = (bool, int, float, str, tuple)  # neither modules nor None
    return ", ".join(
        f"{name}={value}" for name, value in options.items() if isinstance(value, shown)
    )


class LogitTerm(nn.Module):
    """Base of losses between two batches of logits; subclasses implement `compare`."""

    name: str  # key of the loss in what DistillationLoss returns
    needs_target: ClassVar[bool] = False  # whether it needs labels
    weight: float  # factor of the loss
    extra_repr = print_options

    def forward(self, student: Tensor, teacher: Tensor, target: Tensor | None = None) -> Tensor:
        """Compute ``weight`` times the distance.

        Args:
            student: [B, classes]; receives the gradient.
            teacher: [B, classes]; receives none.
            target: for losses that need one: [B] class indices, none of them ignored (-100), or
                [B, classes] soft targets, of which the largest is the target class.

        Returns:
            Scalar, float32 or float64; 0 for an empty batch.
        """
        return self.weight * self.compare(student, teacher, target)

    def compare(self, student: Tensor, teacher: Tensor, target: Tensor | None = None) -> Tensor:
        """Compute the distance without its weight; implemented by subclasses.

        Args:
            student: [B, classes].
            teacher: [B, classes].
            target: [B] or [B, classes].

        Returns:
            Scalar.
        """
        raise NotImplementedError(f"{type(self).__name__} must implement compare()")


class FeatureTerm(nn.Module):
    """Base of losses between the token maps of pairs of blocks; subclasses implement `compare`.

    Args:
        pairs: (student key, teacher key), resolved to the keys of the taps.
        weight: factor of the loss.
        resample: mode in which the teacher's map is resampled to the student's grid
            (`fastkd.tokens.match_grids`); None refuses different grids.
    """

    name = "feature"  # key of the loss in what DistillationLoss returns
    lifts = False  # whether the student's key stands for its lifted tokens
    extra_repr = print_options

    def __init__(self, pairs: Pairs, weight: float, resample: ResampleMode | None = None) -> None:
        super().__init__()
        if resample is not None:
            check_choice(self, "resample", resample, RESAMPLE_MODES)
        self.pairs = _checked_pairs(self, pairs)
        check_numbers(self, weight=(weight, 0.0))
        self.weight = weight
        self.resample: ResampleMode | None = resample

    def forward(self, student: Mapping[Key, Tokens], teacher: Mapping[Key, Tokens]) -> Tensor:
        """Compute ``weight`` times the distance.

        Args:
            student: tokens by key; get the gradient.
            teacher: tokens by key; get none.

        Returns:
            Scalar, float32 (float64 for float64 tokens).
        """
        return self.weight * self.compare(student, teacher)

    def compare(self, student: Mapping[Key, Tokens], teacher: Mapping[Key, Tokens]) -> Tensor:
        """Compute the distance without its weight; implemented by subclasses.

        Args:
            student: tokens by key.
            teacher: tokens by key.

        Returns:
            Scalar.
        """
        raise NotImplementedError(f"{type(self).__name__} must implement compare()")

    def matched(
        self,
        student: Mapping[Key, Tokens],
        teacher: Mapping[Key, Tokens],
        index: int = 0,
        widths: tuple[int, int] | None = None,
    ) -> tuple[Tokens, Tokens]:
        """Get both sides of a pair on one grid, the teacher's detached.

        Args:
            student: tokens by key.
            teacher: tokens by key; resampled where the grids differ.
            index: of the pair.
            widths: channels that both sides must have, if these are known.

        Returns:
            Both sides.

        Raises:
            ValueError: widths differ from ``widths``, or grids do not fit.
        """
        keys = self.pairs[index]
        mine = _look_up(self, "student", student, keys[0], Tokens)
        frozen = _look_up(self, "teacher", teacher, keys[1], Tokens)
        name, sources = type(self).__name__, (mine.source, frozen.source)
        check_sides(name, sources, mine.data, frozen.data)
        if widths not in (None, found := (mine.dim, frozen.dim)):
            raise ValueError(
                f"{name}: pair {index} must have {widths} channels (student's, teacher's), got "
                f"{found} from {' and '.join(sources)}"
            )
        return match_grids(mine, replace(frozen, data=frozen.data.detach()), self.resample)

    def widths(
        self, student_dims: Mapping[Key, int], teacher_dims: Mapping[Key, int]
    ) -> list[tuple[int, int]]:
        """Get the channels of both sides of every pair.

        Args:
            student_dims: channels per student key.
            teacher_dims: channels per teacher key.

        Returns:
            (student's, teacher's) per pair.
        """
        return [
            (
                _look_up(self, "student_dims", student_dims, student, int),
                _look_up(self, "teacher_dims", teacher_dims, teacher, int),
            )
            for student, teacher in self.pairs
        ]

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """List the parameters of more than one dimension that timm must not decay."""
        return undecayed(self)


class Distance(nn.Module):
    """Base of distances between token maps; subclasses implement `compare`."""

    equal_widths: ClassVar[bool] = True  # both sides need the same number of channels
    needs_widths: ClassVar[bool] = False  # the constructor takes student_dim and teacher_dim
    takes_embeddings: ClassVar[bool] = False  # one vector per image, [B, D], is taken as one token
    extra_repr = print_options

    @property
    def pools_first(self) -> bool:  # whether only the mean token of an image counts
        return False

    def forward(self, student: Tensor, teacher: Tensor, *, grid: Grid | None = None) -> Tensor:
        """Compare two batches of token maps.

        Args:
            student: [B, N, Ds] tokens or [B, Ds, H, W] maps, any float dtype; gets the gradient.
            teacher: [B, N, Dt] tokens or [B, Dt, H, W] maps; gets none.
            grid: (H, W) with H * W = N, for tokens where positions matter.

        Returns:
            Scalar, float32 (float64 for float64 inputs).
        """
        self._check_shapes(student, teacher)
        if student.ndim == 4:
            grid = (student.shape[2], student.shape[3])
            student, teacher = (rearrange(x, "b d h w -> b (h w) d") for x in (student, teacher))
        elif student.ndim == 2:
            student, teacher = student.unsqueeze(1), teacher.unsqueeze(1)
        # Autocast would round the products of float32 tokens to half precision.
        with torch.autocast(student.device.type, enabled=False):
            return self.compare(student, teacher.detach(), grid)

    def compare(self, student: Tensor, teacher: Tensor, grid: Grid | None) -> Tensor:
        """Compute the distance; implemented by subclasses.

        Args:
            student: [B, N, Ds] tokens.
            teacher: [B, N, Dt] tokens, detached.
            grid: (H, W) of the tokens, if known.

        Returns:
            Scalar.
        """
        raise NotImplementedError

    def _check_shapes(self, student: Tensor, teacher: Tensor) -> None:
        name = type(self).__name__
        check_sides(name, ("student", "teacher"), student, teacher)
        if student.ndim not in ((2, 3, 4) if self.takes_embeddings else (3, 4)):
            forms = "[B, N, D] or [B, D, H, W]" + (" or [B, D]" if self.takes_embeddings else "")
            raise ValueError(f"{name}: student must be {forms}, got {list(student.shape)}")
        expected, found = list(student.shape), list(teacher.shape)
        if not self.equal_widths and teacher.ndim == student.ndim:
            channels = 1 if student.ndim == 4 else -1
            expected[channels] = found[channels]
        if found != expected:
            surplus = teacher.ndim == student.ndim == 3 and abs(expected[1] - found[1])
            hint = " (a CLS token left in?)" if surplus in (1, 2) else ""  # 2: DeiT's distillation
            if teacher.ndim == 3 and expected[:2] == found[:2]:
                hint = " (FeatureKD's projector brings widths together)"
            raise ValueError(f"{name}: teacher must be {expected} like student, got {found}{hint}")
        if 0 in (*student.shape[1:], *found[1:]):
            raise ValueError(
                f"{name}: there must be tokens and channels, got {list(student.shape)} and {found}"
            )


def check_sides(function: str, names: tuple[str, str], student: Tensor, teacher: Tensor) -> None:
    """Raise unless both are floating-point tensors on one device."""
    for name, x in zip(names, (student, teacher), strict=True):
        check_float(function, name, x)
    if student.device != teacher.device:
        raise ValueError(
            f"{function}: {names[1]} must be on {student.device} like {names[0]}, got "
            f"{teacher.device}"
        )


def check_choice(term: nn.Module, argument: str, value: str, choices: Sequence[str]) -> None:
    """Raise unless the value is one of the choices."""
    checks.check_choice(type(term).__name__, argument, value, choices)


def check_numbers(term: nn.Module, **options: tuple[float, float]) -> None:
    """Raise unless every (value, least) is in bounds, and an integer where ``least`` is one."""
    for option, (value, least) in options.items():
        check_number(type(term).__name__, option, value, least, whole=isinstance(least, int))


def check_weights(term: nn.Module, **weights: float) -> None:
    """Raise unless all are finite and not negative, and one of them is positive."""
    check_numbers(term, **{name: (weight, 0.0) for name, weight in weights.items()})
    if not any(weights.values()):
        raise ValueError(
            f"{type(term).__name__}: one of {' and '.join(weights)} must be positive, got "
            f"{', '.join(map(str, weights.values()))}"
        )


def _look_up(
    term: nn.Module, argument: str, mapping: Mapping[Key, Value], key: Key, kind: type[Value]
) -> Value:
    """Get the value of a key, or raise where it is missing or of another kind."""
    name = type(term).__name__
    if not isinstance(mapping, Mapping):
        raise TypeError(
            f"{name}: {argument} must be a dict of {kind.__name__} by key, got {describe(mapping)}"
        )
    if key not in mapping:
        raise ValueError(f"{name}: {argument} has no key {key!r}, only {list(mapping)}")
    if not isinstance(mapping[key], kind):
        raise TypeError(
            f"{name}: {argument}[{key!r}] must be {kind.__name__}, got {describe(mapping[key])}"
        )
    return mapping[key]


def _checked_pairs(term: nn.Module, pairs: Pairs) -> tuple[tuple[Key, Key], ...]:
    name = type(term).__name__
    for pair in pairs if isinstance(pairs, Sequence) else [pairs]:
        keys = isinstance(pair, tuple | list) and [isinstance(key, int | str) for key in pair]
        if keys != [True, True]:
            raise TypeError(
                f"{name}: pairs must hold (student, teacher) pairs, such as [(11, 23)], got "
                f"{describe(pair)}"
            )
    if not pairs:
        raise ValueError(f"{name}: pairs must hold at least one pair, such as [(11, 23)]")
    if len(set(map(tuple, pairs))) < len(pairs):
        raise ValueError(f"{name}: pairs must differ, got {tuple(map(tuple, pairs))}")
    return tuple((student, teacher) for student, teacher in pairs)
