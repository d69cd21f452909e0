"""Feature distillation: `FeatureKD` over pairs of blocks, `LiftKD`, and the fused distances."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from fastkd.losses import registry
from fastkd.losses.base import (
    Distance,
    FeatureTerm,
    Grid,
    Key,
    Pairs,
    check_choice,
    check_numbers,
    check_sides,
    print_options,
)
from fastkd.losses.projectors import (
    PROJECTORS,
    Lift,
    build_projector,
    check_widths,
    fused_weights,
    has_hooks,
    init_linear,
    pool_channels,
    pool_side,
)
from fastkd.ops import feature_kd, lift, lift_kd
from fastkd.ops.backend import Backend
from fastkd.ops.checks import check_float, wide_dtype
from fastkd.ops.feature_kd.reference import LOSSES, LossName
from fastkd.ops.lift_kd import LIFT_EPS
from fastkd.tokens import ResampleMode, Tokens
from fastkd.utils.argument_checks import describe

_LEARNED = tuple(p.name for p in registry.PROJECTORS if p.learned and not p.stays)


class MapDistance(Distance):
    r"""`fastkd.ops.feature_kd` as a module: the fused distances between corresponding tokens.

    With d = student - teacher, over B images, N = H W places and D channels:

    - ``"mse"``: :math:`\frac{1}{B N D} \sum d^2`; after a Linear, FitNets' hint (arXiv 1412.6550);
    - ``"smooth_l1"``: :math:`\frac{1}{B N D} \sum h(d)`, with h(d) = d^2 / (2 beta) below beta and
      \|d\| - beta / 2 above (arXiv 1504.08083);
    - ``"cosine"``: :math:`\frac{1}{B N} \sum (1 - \cos(s_n, t_n))`, over the tokens s_n and t_n;
    - ``"spectral"``: the mean squared difference of the real and imaginary parts of
      ``rfft2(map, norm="ortho")`` (SpectralKD, arXiv 2412.19055, eq. 6), without an FFT.

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
            raise ValueError(f"MapDistance: beta is of smooth_l1, got {beta=} with {loss!r}")
        self.loss: LossName = loss
        self.beta = 1.0 if beta is None else beta
        self.backend: Backend = backend
        check_numbers(self, beta=(self.beta, 0.0))

    def forward(self, student: Tensor, teacher: Tensor, *, grid: Grid | None = None) -> Tensor:
        # The operator checks its inputs, and takes maps as they are.
        check_sides("MapDistance", ("student", "teacher"), student, teacher)
        return feature_kd(student, teacher.detach(), grid=grid, **self.options)

    @property
    def options(self) -> dict[str, Any]:
        """What defines the distance, as the operators' keywords."""
        return {"loss": self.loss, "beta": self.beta, "backend": self.backend}


class FeatureKD(FeatureTerm):
    r"""Mean over pairs of a distance between student and teacher token maps.

    .. math:: L = \frac{1}{|P|} \sum_{(i, j) \in P} d(\pi(F^s_i), F^t_j)

    All projectors :math:`\pi` but ``"lift"`` are dropped at inference.

    Args:
        loss: the distance d: a name (``fastkd losses`` lists them), or a module called as
            ``loss(student, teacher, grid=(H, W))`` with [B, N, D] tokens (without ``grid`` where
            its forward has no such argument, like `torch.nn.MSELoss`).
        pairs: (student key, teacher key), resolved to the keys of the taps.
        weight: factor of the loss, the paper's by default.
        projector: ``"none"`` for equal widths, or a d of any widths; ``"pool"`` averages the wider
            side's channels (SpectralKD's code); a learned one of `build_projector`; ``"lift"``
            compares the lifted tokens from which the student classifies (arXiv 2511.15572), which
            the caller puts under the pair's student key.
        student_dims: channels per student key; needed by learned projectors and distances.
        teacher_dims: channels per teacher key; needed where ``student_dims`` are.
        resample: see `FeatureTerm`.
        backend: of the operators.
        **options: of the named distance, such as ``beta`` of ``"smooth_l1"``.

    Raises:
        ValueError: no pairs, an unknown option, or widths that the projector cannot bring together.
    """

    def __init__(
        self,
        loss: str | nn.Module = "mse",
        pairs: Pairs = ((11, 11),),
        weight: float = 0.2,
        projector: str = "none",
        student_dims: Mapping[Key, int] | None = None,
        teacher_dims: Mapping[Key, int] | None = None,
        resample: ResampleMode | None = None,
        backend: Backend = "auto",
        **options: Any,
    ) -> None:
        super().__init__(pairs, weight, resample)
        check_choice(self, "projector", projector, PROJECTORS)
        if projector == "lift" and len(pairs) > 1:
            raise ValueError(
                f"FeatureKD: projector='lift' compares one lifted map, got {len(pairs)} pairs"
            )
        self.projector = projector
        self.lifts = projector == "lift"
        widths = None
        if student_dims is not None and teacher_dims is not None:
            widths = self.widths(student_dims, teacher_dims)
        self.distances = nn.ModuleList(self._build_distances(loss, widths, backend, options))
        self._with_grid = all(_takes_grid(distance) for distance in self.distances)
        self.projectors = nn.ModuleList()
        if widths is None and projector in _LEARNED:
            raise _needs_dims(f"{projector=}")
        for index, pair in enumerate(widths or ()):
            self._check_widths(index, *pair)
            layer = build_projector(projector, *pair)
            if layer is not None:
                self.projectors.append(layer)

    def compare(self, student: Mapping[Key, Tokens], teacher: Mapping[Key, Tokens]) -> Tensor:
        distances = [
            self._compare_pair(index, *self.matched(student, teacher, index))
            for index in range(len(self.pairs))
        ]
        return torch.stack(distances).mean()

    @property
    def operator_options(self) -> dict[str, Any] | None:
        """The distance as the operators' keywords; None if it must be called."""
        return _operator_options(self.distances[0])

    def _build_distances(
        self,
        loss: str | nn.Module,
        widths: list[tuple[int, int]] | None,
        backend: str,
        options: dict[str, Any],
    ) -> list[nn.Module]:
        # One for all pairs, or one per pair where widths matter to it.
        if isinstance(loss, nn.Module):
            given = [*options, *(["backend"] if backend != "auto" else [])]
            if given:
                raise ValueError(
                    f"FeatureKD: {', '.join(given)}: options of a named loss, got a module"
                )
            return [loss]
        known = {entry.name: entry for entry in registry.FEATURE_LOSSES if not entry.projects}
        if not isinstance(loss, str) or loss not in known:
            raise ValueError(
                f"FeatureKD: loss must be one of {tuple(known)} or a module, got {describe(loss)}"
            )
        registry.check_options(known[loss], options, "FeatureKD")
        distance = known[loss].load()
        if loss in LOSSES:
            options = {**options, "loss": loss, "backend": backend}
        elif backend != "auto":
            raise ValueError(f"FeatureKD: {loss!r} has one implementation, got {backend=}")
        if not distance.needs_widths:
            return [distance(**options)]
        if widths is None:
            raise _needs_dims(f"{loss=}")
        if self.projector == "pool":
            widths = [(min(pair), min(pair)) for pair in widths]
        elif self.projector != "none":
            widths = [(teacher_dim, teacher_dim) for _, teacher_dim in widths]
        return [distance(student_dim=s, teacher_dim=t, **options) for s, t in widths]

    def _distance(self, index: int) -> nn.Module:
        return self.distances[index if len(self.distances) > 1 else 0]

    def _check_widths(self, index: int, student_dim: int, teacher_dim: int) -> None:
        # A caller's module may compare any widths.
        equal = getattr(self._distance(index), "equal_widths", False)
        check_widths(
            self.projector, self.pairs[index], student_dim, teacher_dim, equal_widths=equal
        )

    def _compare_pair(self, index: int, student: Tokens, teacher: Tokens) -> Tensor:
        self._check_widths(index, student.dim, teacher.dim)
        distance = self._distance(index)
        options = _operator_options(distance)
        tokens, targets, grid = student.data, teacher.data, student.grid
        if self.projector == "pool":
            if options is not None:
                side = pool_side(student.dim, teacher.dim)
                return feature_kd(tokens, targets, grid=grid, pool=side, **options)
            dim = min(student.dim, teacher.dim)
            tokens, targets = pool_channels(tokens, dim), pool_channels(targets, dim)
        elif self.projector in _LEARNED:
            layer = self.projectors[index]
            weights = fused_weights(layer)
            if weights is not None and options is not None:
                weight, bias = weights
                return cast(Tensor, lift_kd(tokens, weight, targets, bias, grid=grid, **options))
            if weights is not None and getattr(distance, "pools_first", False):
                # A Linear commutes with the mean: one token per image is projected instead of all.
                tokens, targets = (
                    x.mean(1, keepdim=True, dtype=wide_dtype(x)) for x in (tokens, targets)
                )
                grid = (1, 1)
            tokens = layer(_as_parameters(tokens, layer))
        if self._with_grid:
            return cast(Tensor, distance(tokens, targets, grid=grid))
        return cast(Tensor, distance(tokens, targets))


def _needs_dims(argument: str) -> ValueError:
    return ValueError(f"FeatureKD: {argument} needs student_dims and teacher_dims")


def _operator_options(distance: nn.Module) -> dict[str, Any] | None:
    """Get the operators' keywords, unless the distance has hooks, another class or forward."""
    replaced = has_hooks(distance) or "forward" in distance.__dict__
    return distance.options if type(distance) is MapDistance and not replaced else None


def _takes_grid(distance: nn.Module) -> bool:
    parameters = inspect.signature(distance.forward).parameters.values()
    return any(p.name == "grid" or p.kind is p.VAR_KEYWORD for p in parameters)


def _as_parameters(tokens: Tensor, layer: nn.Module) -> Tensor:
    """Cast tokens to the dtype of the layer's parameters; autocast does so itself."""
    parameter = next(layer.parameters(), None)
    if parameter is None or torch.is_autocast_enabled(tokens.device.type):
        return tokens
    return tokens.to(parameter.dtype)


class LiftKD(nn.Module):
    r"""Feature distillation through a lifting projector that is part of the loss.

    .. math:: L = d(LayerNorm(W F^s + b), F^t)

    with the distance d of `MapDistance` (arXiv 2511.15572). The lifted tokens [B, N, Dt] are never
    written. A teacher's `Tokens` on another grid (a patch size of 14) are first brought to the
    student's by `fastkd.tokens.match_grids`.

    Args:
        student_dim: channels of the student's tokens, Ds.
        teacher_dim: channels of the teacher's tokens, Dt.
        loss: d: ``"mse"``, ``"spectral"``, ``"smooth_l1"`` or ``"cosine"``.
        weight: factor of the distance.
        bias: whether the Linear has a bias; the paper's has none.
        norm: whether there is a LayerNorm.
        lift_eps: of the LayerNorm.
        beta: of ``"smooth_l1"``.
        pool: also return the mean of the lifted tokens, which the paper's student classifies.
        backend: of the operator.
        device: of the parameters.
        dtype: of the parameters.

    Attributes:
        projector: the `Lift`, of Linear ``proj`` and LayerNorm ``norm``.
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
        backend: Backend = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_numbers(self, student_dim=(student_dim, 1), teacher_dim=(teacher_dim, 1))
        check_choice(self, "loss", loss, LOSSES)
        check_numbers(self, weight=(weight, 0.0), lift_eps=(lift_eps, 0.0), beta=(beta, 0.0))
        dims, placement = (student_dim, teacher_dim), (device, dtype)
        self.projector = Lift(*dims, lift_eps, *placement, bias=bias, norm=norm)
        init_linear(self.projector.proj)
        self.loss: LossName = loss
        self.weight = weight
        self.beta = beta
        self.pool = pool
        self.backend: Backend = backend

    def forward(
        self, student_tokens: Tensor, teacher_tokens: Tensor, grid: Grid | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Lift the student's tokens and compare them with the teacher's.

        Args:
            student_tokens: [B, N, Ds] or [B, Ds, H, W]; receive the gradient.
            teacher_tokens: [B, N, Dt] or [B, Dt, H, W], frozen.
            grid: (H, W) of [B, N, D] tokens, for ``"spectral"``; square if omitted.

        Returns:
            ``weight`` times the distance; with ``pool`` the pair of it and [B, Dt].
        """
        width, channels = self.projector.operands()["weight"].shape
        _check_width("student_tokens", student_tokens, channels)
        _check_width("teacher_tokens", teacher_tokens, width)
        options: dict[str, Any] = {"grid": grid, "beta": self.beta, "backend": self.backend}
        found = self.projector.compare(
            student_tokens, teacher_tokens, self.loss, pool=self.pool, **options
        )
        if isinstance(found, Tensor):
            return self.weight * found
        return self.weight * found[0], found[1]

    def lift(self, tokens: Tensor, pool: bool = True) -> Tensor:
        """Lift the student's tokens without a teacher, as at inference.

        Args:
            tokens: [B, N, Ds] or [B, Ds, H, W].
            pool: return the mean of the lifted tokens.

        Returns:
            [B, Dt]; without ``pool`` [B, N, Dt], or [B, Dt, H, W] for a map.
        """
        operands = self.projector.operands()
        _check_width("tokens", tokens, operands["weight"].shape[1])
        return lift(tokens, **operands, pool=pool, backend=self.backend)


def _check_width(argument: str, tokens: Tensor, dim: int) -> None:
    if isinstance(tokens, Tokens):
        raise TypeError(
            f"LiftKD: {argument} must be a tensor, got Tokens (give its data and grid, after "
            "fastkd.tokens.match_grids where grids differ)"
        )
    check_float("LiftKD", argument, tokens)
    channels = 1 if tokens.ndim == 4 else -1
    if tokens.ndim not in (3, 4) or tokens.shape[channels] != dim:
        raise ValueError(
            f"LiftKD: {argument} must be [B, N, {dim}] or [B, {dim}, H, W], got "
            f"{list(tokens.shape)}"
        )
