"""The lifting projector (Linear, LayerNorm), and feature distillation through it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastkd.losses.base import (
    Grid,
    check_choice,
    check_option,
    print_options,
)
from fastkd.losses.projectors import has_hooks, init_linear
from fastkd.ops import lift, lift_kd
from fastkd.ops.backend import Backend
from fastkd.ops.feature_kd.reference import LOSSES, LossName
from fastkd.ops.lift_kd import LIFT_EPS
from fastkd.tokens import RESAMPLE_MODES, ResampleMode, Tokens, match_grids


class Lift(nn.Module):
    """Lift tokens to the teacher's width: Linear, then LayerNorm (arXiv 2511.15572, "Lift").

    Calling it gives the lifted tokens; `pooled` and `compare` never write them.

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
        check_option(self, "dim", dim, 1, whole=True)
        check_option(self, "width", width, 1, whole=True)
        check_option(self, "lift_eps", lift_eps)
        self.proj = nn.Linear(dim, width, bias=bias, device=device, dtype=dtype)
        self.norm: nn.Module = nn.Identity()
        if norm:
            self.norm = nn.LayerNorm(width, eps=lift_eps, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Lift tokens; writes [B, N, width].

        Args:
            x: [B, N, dim].

        Returns:
            [B, N, width].
        """
        return self.norm(self.proj(x))

    def pooled(self, tokens: Tensor, *, backend: Backend = "auto") -> Tensor:
        """Compute the mean of the lifted tokens.

        Args:
            tokens: [B, N, dim] or [B, dim, H, W], any strides.
            backend: of `fastkd.ops.lift`.

        Returns:
            [B, width].
        """
        return lift(tokens, **self.operands(), pool=True, backend=backend)

    def compare(
        self,
        tokens: Tensor,
        teacher_tokens: Tensor,
        loss: LossName = "mse",
        *,
        grid: Grid | None = None,
        beta: float = 1.0,
        pool: bool = False,
        backend: Backend = "auto",
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Compute the distance of the lifted tokens to a frozen teacher's (`fastkd.ops.lift_kd`).

        Args:
            tokens: [B, N, dim] or [B, dim, H, W], any strides.
            teacher_tokens: [B, N, width] or [B, width, H, W], any strides; gets no gradient.
            loss: see `LiftKD`.
            grid: (H, W) of [B, N, D] tokens.
            beta: of ``"smooth_l1"``.
            pool: also return the mean of the lifted tokens.
            backend: of the operator.

        Returns:
            A scalar; with ``pool`` the pair of it and [B, width].

        Raises:
            ValueError: shapes, grid or options do not fit.
        """
        return lift_kd(
            tokens,
            teacher_tokens=teacher_tokens,
            **self.operands(),
            loss=loss,
            grid=grid,
            pool=pool,
            beta=beta,
            backend=backend,
        )

    def is_fusible(self) -> bool:
        """Whether `pooled` and `compare` compute what the layers would.

        They do not where a layer has been replaced (adapters, quantization, parametrizations) or
        has hooks (feature extractors, FSDP): then the layers must be called.
        """
        as_built = type(self) is Lift and type(self.proj) is nn.Linear
        normed = type(self.norm) is nn.LayerNorm and self.norm.elementwise_affine
        return (
            as_built
            and (normed or type(self.norm) is nn.Identity)
            and not any(has_hooks(module) for module in (self, self.proj, self.norm))
        )

    def operands(self) -> dict[str, Any]:
        """Get the layers' parameters and epsilon as the operators' keywords.

        Raises:
            ValueError: the layers are not fusible; see `is_fusible`.
        """
        if not self.is_fusible():
            raise ValueError(
                "Lift: a layer has been exchanged or holds hooks, which fused operators would pass "
                "by; call the layers, and compare what they give with fastkd.ops.feature_kd"
            )
        norm = self.norm if isinstance(self.norm, nn.LayerNorm) else None
        return {
            "weight": self.proj.weight,
            "bias": self.proj.bias,
            "norm_weight": None if norm is None else norm.weight,
            "norm_bias": None if norm is None else norm.bias,
            "lift_eps": 0.0 if norm is None else norm.eps,
        }


class LiftKD(nn.Module):
    r"""Feature distillation through a lifting projector that is part of the loss.

    .. math:: L = d(LayerNorm(W F^s + b), F^t)

    with the distance d of `MapDistance`. The lifted tokens [B, N, Dt] are never written: this is
    `fastkd.ops.lift_kd`. With ``pool`` it also gives their mean, which the student of
    arXiv 2511.15572 classifies; at inference, `lift` does.

    Args:
        student_dim: channels of the student's tokens, Ds.
        teacher_dim: channels of the teacher's tokens, Dt.
        loss: the distance d: ``"mse"``, ``"spectral"``, ``"smooth_l1"`` or ``"cosine"``.
        weight: factor of the distance (the Linear's weight is ``projector.proj.weight``).
        bias: whether the Linear has a bias; the paper's has none.
        norm: whether there is a LayerNorm.
        lift_eps: of the LayerNorm.
        beta: threshold of ``"smooth_l1"``.
        pool: also return the mean of the lifted tokens.
        resample: for `Tokens`, see `FeatureTerm`.
        backend: of the operator.
        device: of the parameters.
        dtype: of the parameters.

    Attributes:
        projector: the `Lift`, of Linear ``proj`` and LayerNorm ``norm``.

    Raises:
        ValueError: an unknown option.
    """

    name = "feature"
    extra_repr = print_options

    def __init__(
        self,
        student_dim: int,
        teacher_dim: int,
        loss: LossName = "mse",
        weight: float = 1.0,
        *,
        bias: bool = False,
        norm: bool = True,
        lift_eps: float = LIFT_EPS,
        beta: float = 1.0,
        pool: bool = False,
        resample: ResampleMode | None = None,
        backend: Backend = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_option(self, "student_dim", student_dim, 1, whole=True)
        check_option(self, "teacher_dim", teacher_dim, 1, whole=True)
        check_choice(self, "loss", loss, LOSSES)
        check_option(self, "weight", weight)
        check_option(self, "lift_eps", lift_eps)
        check_option(self, "beta", beta)
        if resample is not None:
            check_choice(self, "resample", resample, RESAMPLE_MODES)
        self.projector = Lift(
            student_dim, teacher_dim, lift_eps, device, dtype, bias=bias, norm=norm
        )
        init_linear(self.projector.proj)
        self.loss: LossName = loss
        self.weight = weight
        self.beta = beta
        self.pool = pool
        self.resample: ResampleMode | None = resample
        self.backend: Backend = backend

    def forward(
        self,
        student_tokens: Tensor | Tokens,
        teacher_tokens: Tensor | Tokens,
        grid: Grid | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Lift the student's tokens and compare them with the teacher's.

        Args:
            student_tokens: [B, N, Ds], [B, Ds, H, W] or `Tokens`; receive the gradient.
            teacher_tokens: [B, N, Dt], [B, Dt, H, W] or `Tokens`, of the same kind; frozen.
            grid: (H, W) of [B, N, D] tensors, for ``"spectral"``; square if omitted.

        Returns:
            ``weight`` times the distance; with ``pool`` the pair of it and [B, Dt].

        Raises:
            TypeError: one side is `Tokens` and the other is not.
            ValueError: widths, counts or grids do not fit.
        """
        student, teacher, grid = self._matched(student_tokens, teacher_tokens, grid)
        width, channels = self.projector.operands()["weight"].shape
        self._check_width("student_tokens", student, channels)
        self._check_width("teacher_tokens", teacher, width)
        options: dict[str, Any] = {"grid": grid, "beta": self.beta, "backend": self.backend}
        found = self.projector.compare(student, teacher, self.loss, pool=self.pool, **options)
        if isinstance(found, Tensor):
            return self.weight * found
        distance, pooled = found
        return self.weight * distance, pooled

    def lift(self, tokens: Tensor | Tokens, pool: bool = True) -> Tensor:
        """Lift the student's tokens without a teacher, as at inference.

        Args:
            tokens: [B, N, Ds], [B, Ds, H, W] or `Tokens`.
            pool: return the mean of the lifted tokens.

        Returns:
            [B, Dt]; without ``pool`` [B, N, Dt], or [B, Dt, H, W] for a map.

        Raises:
            ValueError: ``tokens`` have another number of channels.
        """
        data = tokens.data if isinstance(tokens, Tokens) else tokens
        operands = self.projector.operands()
        self._check_width("tokens", data, operands["weight"].shape[1])
        return lift(data, **operands, pool=pool, backend=self.backend)

    def _matched(
        self, student: Tensor | Tokens, teacher: Tensor | Tokens, grid: Grid | None
    ) -> tuple[Tensor, Tensor, Grid | None]:
        if isinstance(student, Tensor) and isinstance(teacher, Tensor):
            return student, teacher, grid
        if not (isinstance(student, Tokens) and isinstance(teacher, Tokens)):
            raise TypeError(
                "LiftKD: student_tokens and teacher_tokens must be two tensors or two Tokens, got "
                f"{type(student).__name__} and {type(teacher).__name__}"
            )
        if grid is not None and tuple(grid) != student.grid:
            raise ValueError(f"LiftKD: grid {tuple(grid)} is given with Tokens of {student.grid}")
        student, teacher = match_grids(student, teacher, self.resample)
        return student.data, teacher.data, student.grid

    def _check_width(self, argument: str, tokens: Tensor, dim: int) -> None:
        channels = 1 if tokens.ndim == 4 else -1
        if tokens.ndim not in (3, 4) or tokens.shape[channels] != dim:
            raise ValueError(
                f"LiftKD: {argument} must be [B, N, {dim}] or [B, {dim}, H, W], got "
                f"{list(tokens.shape)}"
            )
