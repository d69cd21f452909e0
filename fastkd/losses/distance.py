"""Distances between the token maps of one pair of blocks: what every such loss has in common.

Knows tensors only. A distance is a plain module for anybody's loop; pairs, projectors and weights
are `fastkd.losses.FeatureKD`'s business.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from einops import rearrange
from torch import Tensor, nn

from fastkd.losses.base import check_choice
from fastkd.ops import feature_kd

Grid = tuple[int, int]
MAP_DISTANCES = ("mse", "spectral", "smooth_l1", "cosine")


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
