"""What a term is: something with a name and a weight that compares a student with its teacher.

Logit terms compare [B, classes]; feature terms compare token maps of pairs of blocks. Neither knows
models, nor how terms are summed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, TypeVar

import torch
from einops import rearrange
from torch import Tensor, nn

from fastkd.losses.projectors import undecayed
from fastkd.ops import feature_kd
from fastkd.tokens import RESAMPLE_MODES, Tokens, match_grids

Grid = tuple[int, int]

MAP_DISTANCES = ("mse", "spectral", "smooth_l1", "cosine")

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


class Distance(nn.Module):
    """Base of distances: checks what comes in, and hands tokens to `compare`.

    The teacher is frozen: it gets no gradient. Autocast is off inside, so that sums keep their
    digits; `compare` gets the inputs' own dtypes and widens what it sums.

    Attributes:
        equal_widths: whether both sides need as many channels.
        needs_widths: whether the constructor takes ``student_dim`` and ``teacher_dim``.
        takes_embeddings: whether one vector an image, [B, D], is taken too, as one token.
    """

    equal_widths: ClassVar[bool] = True
    needs_widths: ClassVar[bool] = False
    takes_embeddings: ClassVar[bool] = False

    @property
    def pools_first(self) -> bool:
        """Whether nothing of an image but its mean token counts."""
        return False

    def forward(self, student: Tensor, teacher: Tensor, *, grid: Grid | None = None) -> Tensor:
        """Compare two batches of token maps.

        Args:
            student: [B, N, Ds] tokens or [B, Ds, H, W] maps; any float dtype. Receives the
                gradient.
            teacher: [B, N, Dt] tokens or [B, Dt, H, W] maps; receives none.
            grid: (H, W) with H * W = N, for tokens, where the distance looks at places.

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
        """The distance itself; subclasses implement it.

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
        for side, x in (("student", student), ("teacher", teacher)):
            if not isinstance(x, Tensor) or not x.is_floating_point():
                got = x.dtype if isinstance(x, Tensor) else type(x).__name__
                raise TypeError(f"{name}: {side} must be a floating-point tensor, got {got}")
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


def _hint(student: Tensor, teacher: Tensor, channels: int, equal_widths: bool) -> str:
    if student.ndim == 3 and abs(student.shape[1] - teacher.shape[1]) in (1, 2):
        return " (a CLS token left in?)"
    if equal_widths and student.shape[channels] != teacher.shape[channels]:
        return " (widths differ: FeatureKD's projector brings them together)"
    return ""


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
        beta: the threshold of ``"smooth_l1"``; other distances have none.
        backend: passed to the operator.

    Raises:
        ValueError: an unknown loss, or a ``beta`` for one that has none.
    """

    def __init__(self, loss: str = "mse", beta: float | None = None, backend: str = "auto") -> None:
        super().__init__()
        check_choice(self, "loss", loss, MAP_DISTANCES)
        if beta is not None and loss != "smooth_l1":
            raise ValueError(f"MapDistance: beta is of smooth_l1, got beta={beta} with {loss!r}")
        self.loss = loss
        self.beta = 1.0 if beta is None else beta
        self.backend = backend

    def forward(self, student: Tensor, teacher: Tensor, *, grid: Grid | None = None) -> Tensor:
        """Compare two batches of token maps; arguments and errors as in `feature_kd`.

        Args:
            student: [B, N, Ds] tokens or [B, Ds, H, W] maps. Receives the gradient.
            teacher: likewise; receives none.
            grid: (H, W) of tokens, for ``"spectral"``.

        Returns:
            Scalar, float32 (float64 for float64 inputs).
        """
        return feature_kd(student, teacher.detach(), grid=grid, **self.options)

    @property
    def options(self) -> dict[str, Any]:
        """What defines the distance, as the operators' keywords."""
        return {"loss": self.loss, "beta": self.beta, "backend": self.backend}

    def extra_repr(self) -> str:
        """Options, for ``print``."""
        return self.loss + (f", beta={self.beta}" if self.loss == "smooth_l1" else "")
