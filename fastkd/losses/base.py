"""Base classes of logit losses, feature losses and distances, and the checks that they share."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, TypeVar

import torch
from einops import rearrange
from torch import Tensor, nn

from fastkd.losses.projectors import undecayed
from fastkd.ops import checks, feature_kd
from fastkd.ops.backend import Backend
from fastkd.ops.checks import check_float
from fastkd.ops.feature_kd.reference import LOSSES, LossName
from fastkd.tokens import RESAMPLE_MODES, ResampleMode, Tokens, match_grids
from fastkd.utils.arguments import FLOAT32, check_number, describe

Grid = tuple[int, int]
Key = int | str
Pairs = Sequence[tuple[Key, Key]]
Value = TypeVar("Value")


def print_options(self: nn.Module) -> str:
    """Format the numbers, flags and words that the constructor took; for ``extra_repr``."""
    names = inspect.signature(type(self)).parameters
    options = {name: getattr(self, name, None) for name in names}
    return ", ".join(
        f"{name}={value}"
        for name, value in options.items()
        if isinstance(value, bool | int | float | str)
    )


class LogitTerm(nn.Module):
    """Base of losses between two batches of logits.

    Calling one gives ``weight`` times its distance. Subclasses implement `compare`, the distance
    alone, which is what `DistillationLoss` takes, weights and reports.

    Attributes:
        name: key of the loss in what `DistillationLoss` returns.
        needs_target: whether the loss needs labels.
        weight: factor of the loss.
    """

    name: str
    needs_target: ClassVar[bool] = False
    weight: float
    extra_repr = print_options

    def forward(self, student: Tensor, teacher: Tensor, target: Tensor | None = None) -> Tensor:
        """Compute ``weight`` times the distance of two batches of logits.

        Args:
            student: [B, classes]; receives the gradient.
            teacher: [B, classes]; receives none.
            target: ignored without `needs_target`. [B] class indices in [0, classes), without
                any to be ignored (such as -100); or [B, classes] soft targets (Mixup, CutMix,
                one-hot), of which the largest is the target class.

        Returns:
            Scalar in float32 or float64. An empty batch gives 0.

        Raises:
            ValueError: shapes differ, there are too few classes, or a target is missing or boolean.
            RuntimeError: a class index is out of range (on CUDA, a failed device-side assertion).
        """
        return self.weight * self.compare(student, teacher, target)

    def compare(self, student: Tensor, teacher: Tensor, target: Tensor | None = None) -> Tensor:
        """Compute the distance without its weight; implemented by subclasses.

        Args:
            student: as for `forward`.
            teacher: as for `forward`.
            target: as for `forward`.

        Returns:
            Scalar.

        Raises:
            ValueError: as `forward`.
        """
        raise NotImplementedError(f"{type(self).__name__} must implement compare()")


class FeatureTerm(nn.Module):
    """Base of losses between the token maps of pairs of blocks.

    Calling one gives ``weight`` times its distance. Subclasses implement `compare`, the distance
    alone, which is what `DistillationLoss` takes, weights and reports.

    Args:
        pairs: (student key, teacher key), resolved to the keys of the taps.
        weight: factor of the loss.
        resample: None refuses different grids; otherwise the mode in which the teacher's map is
            resampled to the student's grid (`fastkd.tokens.match_grids`).

    Attributes:
        name: key of the loss in what `DistillationLoss` returns.
        lifts: whether the student's key stands for its lifted tokens.

    Raises:
        ValueError: no pairs, or an unknown way to resample.
    """

    name = "feature"
    lifts = False

    def __init__(self, pairs: Pairs, weight: float, resample: ResampleMode | None = None) -> None:
        super().__init__()
        if resample is not None:
            check_choice(self, "resample", resample, RESAMPLE_MODES)
        self.pairs = _checked_pairs(self, pairs)
        check_option(self, "weight", weight)
        self.weight = weight
        self.resample: ResampleMode | None = resample

    def forward(self, student: Mapping[Key, Tokens], teacher: Mapping[Key, Tokens]) -> Tensor:
        """Compute ``weight`` times the distance of the token maps.

        Args:
            student: tokens by key; receive the gradient.
            teacher: tokens by key; frozen, they receive none.

        Returns:
            Scalar, float32 (float64 for float64 tokens).

        Raises:
            ValueError: a key is missing, grids differ without ``resample``, or widths do not fit.
        """
        return self.weight * self.compare(student, teacher)

    def compare(self, student: Mapping[Key, Tokens], teacher: Mapping[Key, Tokens]) -> Tensor:
        """Compute the distance without its weight; implemented by subclasses.

        Args:
            student: as for `forward`.
            teacher: as for `forward`.

        Returns:
            Scalar.

        Raises:
            ValueError: as `forward`.
        """
        raise NotImplementedError(f"{type(self).__name__} must implement compare()")

    def matched(
        self, student: Mapping[Key, Tokens], teacher: Mapping[Key, Tokens], index: int = 0
    ) -> tuple[Tokens, Tokens]:
        """Get both sides of a pair on one grid, the teacher's detached.

        Args:
            student: tokens by key.
            teacher: tokens by key; resampled where the grids differ.
            index: of the pair.

        Returns:
            The student's tokens and the teacher's.

        Raises:
            ValueError: a key is missing, or grids differ without ``resample``.
        """
        mine, frozen = (
            self._tokens(side, tokens, key)
            for side, tokens, key in zip(
                ("student", "teacher"), (student, teacher), self.pairs[index], strict=True
            )
        )
        check_sides(type(self).__name__, (mine.source, frozen.source), mine.data, frozen.data)
        return match_grids(mine, replace(frozen, data=frozen.data.detach()), self.resample)

    def _tokens(self, side: str, tokens: Mapping[Key, Tokens], key: Key) -> Tokens:
        name = type(self).__name__
        if not isinstance(tokens, Mapping):
            raise TypeError(
                f"{name}: {side} must be a dict of Tokens by key, got {describe(tokens)} (tensors "
                "are compared by fastkd.ops.feature_kd)"
            )
        found = look_up(self, side, tokens, key)
        if not isinstance(found, Tokens):
            raise TypeError(
                f"{name}: {side}[{key!r}] must be Tokens(x, (H, W)), got {describe(found)}"
            )
        return found

    def widths(
        self, student_dims: Mapping[Key, int], teacher_dims: Mapping[Key, int]
    ) -> list[tuple[int, int]]:
        """Get the channels of both sides of every pair.

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

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """List the parameters of more than one dimension that timm must not decay."""
        return undecayed(self)

    def extra_repr(self) -> str:
        """Format the options, for ``print``."""
        pairs = ",".join(f"{student}:{teacher}" for student, teacher in self.pairs)
        return f"pairs={pairs}, {print_options(self)}"


class Distance(nn.Module):
    """Base of distances between token maps: checks the inputs and brings maps to tokens.

    Subclasses implement `compare`. The teacher gets no gradient. Autocast is off inside:
    `compare` gets the inputs' own dtypes and sums in float32 or wider.

    Attributes:
        equal_widths: whether both sides need the same number of channels.
        needs_widths: whether the constructor takes ``student_dim`` and ``teacher_dim``.
        takes_embeddings: whether one vector per image, [B, D], is taken too, as one token.
    """

    equal_widths: ClassVar[bool] = True
    needs_widths: ClassVar[bool] = False
    takes_embeddings: ClassVar[bool] = False
    extra_repr = print_options

    @property
    def pools_first(self) -> bool:
        """Whether only the mean token of an image counts."""
        return False

    def forward(self, student: Tensor, teacher: Tensor, *, grid: Grid | None = None) -> Tensor:
        """Compare two batches of token maps.

        Args:
            student: [B, N, Ds] tokens or [B, Ds, H, W] maps; any float dtype. Receives the
                gradient.
            teacher: [B, N, Dt] tokens or [B, Dt, H, W] maps; receives none.
            grid: (H, W) with H * W = N, for tokens where positions matter.

        Returns:
            Scalar, float32 (float64 for float64 inputs).

        Raises:
            TypeError: an input is no floating-point tensor.
            ValueError: shapes or widths do not fit.
        """
        self._check_shapes(student, teacher)
        if student.ndim == 4:
            grid = (student.shape[2], student.shape[3])
            student, teacher = (rearrange(x, "b d h w -> b (h w) d") for x in (student, teacher))
        elif student.ndim == 2:
            student, teacher = student.unsqueeze(1), teacher.unsqueeze(1)
        with torch.autocast(student.device.type, enabled=False):
            return self.compare(student, teacher.detach(), grid)

    def compare(self, student: Tensor, teacher: Tensor, grid: Grid | None) -> Tensor:
        """Compute the distance; implemented by subclasses.

        Args:
            student: [B, N, Ds] tokens.
            teacher: [B, N, Dt] tokens, detached.
            grid: (H, W) of the tokens, where the caller knows it.

        Returns:
            Scalar.
        """
        raise NotImplementedError

    def _check_shapes(self, student: Tensor, teacher: Tensor) -> None:
        name = type(self).__name__
        check_sides(name, ("student", "teacher"), student, teacher)
        forms = "[B, N, D] or [B, D, H, W]" + (" or [B, D]" if self.takes_embeddings else "")
        if student.ndim not in ((2, 3, 4) if self.takes_embeddings else (3, 4)):
            raise ValueError(f"{name}: student must be {forms}, got {list(student.shape)}")
        if 0 in (*student.shape[1:], *teacher.shape[1:]):
            raise ValueError(
                f"{name}: there must be tokens and channels, got {list(student.shape)} and "
                f"{list(teacher.shape)}"
            )
        channels = 1 if student.ndim == 4 else -1
        expected = list(student.shape)
        fits = teacher.ndim == student.ndim
        if fits and not self.equal_widths:
            expected[channels] = teacher.shape[channels]
        if not fits or list(teacher.shape) != expected:
            hint = "" if not fits else _hint(student, teacher, channels, self.equal_widths)
            raise ValueError(
                f"{name}: teacher must be {expected} like student, got {list(teacher.shape)}{hint}"
            )


class MapDistance(Distance):
    r"""`fastkd.ops.feature_kd` as a module: the fused distances between corresponding tokens.

    With d = student - teacher, over B images, N = H W places and D channels:

    - ``"mse"``: :math:`\frac{1}{B N D} \sum d^2`; after a learned Linear this is FitNets' hint
      (arXiv 1412.6550);
    - ``"smooth_l1"``: :math:`\frac{1}{B N D} \sum h(d)`, with h(d) = d^2 / (2 beta) below beta and
      \|d\| - beta / 2 above (arXiv 1504.08083);
    - ``"cosine"``: :math:`\frac{1}{B N} \sum (1 - \cos(s_n, t_n))`, over the tokens s_n and t_n;
    - ``"spectral"``: the mean squared difference of the real and imaginary parts of
      ``rfft2(map, norm="ortho")`` (SpectralKD, arXiv 2412.19055, eq. 6), evaluated without an FFT.

    Args:
        loss: ``"mse"``, ``"spectral"``, ``"smooth_l1"`` or ``"cosine"``.
        beta: threshold of ``"smooth_l1"``, 1 by default; refused for the others.
        backend: of the operator.

    Raises:
        ValueError: an unknown loss, or a ``beta`` for one that has none.
    """

    def __init__(
        self, loss: LossName = "mse", beta: float | None = None, backend: Backend = "auto"
    ) -> None:
        super().__init__()
        check_choice(self, "loss", loss, LOSSES)
        if beta is not None and loss != "smooth_l1":
            raise ValueError(
                f"MapDistance: beta is of smooth_l1, got beta={describe(beta)} with {loss!r}"
            )
        if beta is not None:
            check_option(self, "beta", beta)
        self.loss: LossName = loss
        self.beta = 1.0 if beta is None else beta
        self.backend: Backend = backend

    def forward(self, student: Tensor, teacher: Tensor, *, grid: Grid | None = None) -> Tensor:
        """As `Distance.forward`; the operator checks its inputs itself."""
        check_sides("MapDistance", ("student", "teacher"), student, teacher)
        return feature_kd(student, teacher.detach(), grid=grid, **self.options)

    @property
    def options(self) -> dict[str, Any]:
        """What defines the distance, as the operators' keywords."""
        return {"loss": self.loss, "beta": self.beta, "backend": self.backend}


def look_up(term: nn.Module, argument: str, mapping: Mapping[Key, Value], key: Key) -> Value:
    """Get the value of a key, or raise with the keys there are."""
    name = type(term).__name__
    if not isinstance(mapping, Mapping):
        raise TypeError(f"{name}: {argument} must be a dict by key, got {describe(mapping)}")
    if key not in mapping:
        raise ValueError(f"{name}: {argument} has no key {key!r}, only {list(mapping)}")
    return mapping[key]


def check_sides(function: str, names: tuple[str, str], student: Tensor, teacher: Tensor) -> None:
    """Raise unless both are floating-point tensors on one device."""
    for name, x in zip(names, (student, teacher), strict=True):
        check_float(function, name, x)
    if student.device != teacher.device:
        raise ValueError(
            f"{function}: {names[1]} must be on {student.device} like {names[0]}, got "
            f"{teacher.device}"
        )


def check_logits(function: str, name: str, logits: Tensor) -> None:
    """Raise unless they are [B, classes]."""
    check_float(function, name, logits)
    if logits.ndim != 2:
        hint = " (one image? unsqueeze(0))" if logits.ndim == 1 else ""
        raise ValueError(f"{function}: {name} must be [B, classes], got {list(logits.shape)}{hint}")


def check_target(function: str, logits: Tensor, target: Tensor) -> None:
    """Raise unless they are class indices [B] or soft targets [B, classes] for the logits."""
    batch, classes = logits.shape
    expected = f"class indices [{batch}] or soft targets [{batch}, {classes}]"
    if not isinstance(target, Tensor):
        raise TypeError(f"{function}: target must be {expected}, got {describe(target)}")
    indices = target.shape == (batch,) and not target.is_floating_point()
    boolean = target.dtype == torch.bool  # as an index it would mean class 0 or 1
    if boolean or not (indices or target.shape == (batch, classes)):
        raise ValueError(f"{function}: target must be {expected}, got {describe(target)}")
    if target.device != logits.device:
        raise ValueError(
            f"{function}: target must be on {logits.device} like the logits, got {target.device}"
        )


def mean_of(total: Tensor, images: int) -> Tensor:
    """Divide a sum over images by their number; 0 where there is no image."""
    return total / max(1, images)


def expected(probabilities: Tensor, logarithms: Tensor) -> Tensor:
    """Sum p log q over all; a class of probability 0 (a masked one) counts 0, as 0 log 0 = 0."""
    absent = probabilities == 0
    # Masked on both sides of the product, because the gradient of 0 * inf is NaN.
    return (probabilities * logarithms.masked_fill(absent, 0)).sum()


def check_choice(term: nn.Module, argument: str, value: str, choices: Sequence[str]) -> None:
    """Raise unless the value is one of the choices."""
    refuse_inputs(term, argument, value)
    checks.check_choice(type(term).__name__, argument, value, choices)


def check_option(
    term: nn.Module, option: str, value: float, least: float = 0, *, whole: bool = False
) -> None:
    """Raise unless the value is a number (an integer, if ``whole``) of at least ``least``."""
    refuse_inputs(term, option, value)
    check_number(type(term).__name__, option, value, least, whole=whole)


def check_positive(term: nn.Module, option: str, value: float) -> None:
    """Raise unless the value is positive, finite, and neither of them in float32 alone."""
    check_option(term, option, value, FLOAT32[0])


def check_weights(term: nn.Module, **weights: float) -> None:
    """Raise unless all are finite and not negative, and one of them is positive."""
    for option, weight in weights.items():
        check_option(term, option, weight)
    if not any(weights.values()):
        raise ValueError(
            f"{type(term).__name__}: one of {' and '.join(weights)} must be positive, got "
            f"{', '.join(map(str, weights.values()))}"
        )


def refuse_inputs(term: nn.Module, option: str, value: object) -> None:
    """Raise for a tensor or `Tokens` given to a constructor."""
    if isinstance(value, Tensor | Tokens):
        name = type(term).__name__
        raise TypeError(
            f"{name}: {option} cannot be {describe(value)}: options build the loss, which is then "
            f"called, {name}(...)(student, teacher)"
        )


def _checked_pairs(term: nn.Module, pairs: Pairs) -> tuple[tuple[Key, Key], ...]:
    refuse_inputs(term, "pairs", pairs)
    name = type(term).__name__
    if not isinstance(pairs, Sequence) or isinstance(pairs, str) or len(pairs) == 0:
        raise (ValueError if pairs == () or pairs == [] else TypeError)(
            f"{name}: pairs must hold at least one (student, teacher) pair, such as [(11, 23)], "
            f"got {describe(pairs)}"
        )
    for pair in pairs:
        keys = isinstance(pair, tuple | list) and [isinstance(key, int | str) for key in pair]
        if keys != [True, True]:
            raise TypeError(
                f"{name}: pairs must hold (student, teacher) pairs, such as [(11, 23)], got "
                f"{describe(pair)} in them"
            )
    if len(set(map(tuple, pairs))) < len(pairs):
        raise ValueError(f"{name}: pairs must differ, got {tuple(map(tuple, pairs))}")
    return tuple((student, teacher) for student, teacher in pairs)


def _hint(student: Tensor, teacher: Tensor, channels: int, equal_widths: bool) -> str:
    if student.ndim == 3 and abs(student.shape[1] - teacher.shape[1]) in (1, 2):
        return " (a CLS token left in?)"
    if equal_widths and student.shape[channels] != teacher.shape[channels]:
        return " (widths differ: FeatureKD's projector brings them together)"
    return ""
