"""Distillation of token maps between pairs of blocks: projectors, distances, and their mean."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from fastkd.losses import registry
from fastkd.losses.base import (
    FeatureTerm,
    Grid,
    Key,
    MapDistance,
    Pairs,
    check_choice,
    refuse_inputs,
)
from fastkd.losses.forward_gradient import wide_dtype
from fastkd.losses.projectors import (
    PROJECTORS,
    build_projector,
    check_widths,
    fused_weights,
    has_hooks,
    pool_channels,
    pool_side,
)
from fastkd.ops import feature_kd, lift_kd
from fastkd.ops.backend import Backend
from fastkd.ops.feature_kd.reference import LOSSES
from fastkd.tokens import ResampleMode, Tokens
from fastkd.utils.arguments import describe

_LEARNED = tuple(p.name for p in registry.PROJECTORS if p.learned and not p.stays)


class FeatureKD(FeatureTerm):
    r"""Mean over pairs of a distance between student and teacher token maps.

    .. math:: L = \frac{1}{|P|} \sum_{(i, j) \in P} d(\pi(F^s_i), F^t_j)

    The distance d is a name (``fastkd losses`` lists them) or a module; ``"mse"``, ``"spectral"``,
    ``"smooth_l1"`` and ``"cosine"`` are fused into single passes (`fastkd.ops.feature_kd`). The
    projector :math:`\pi` is one of

    - ``"none"``: tokens are compared as they are; widths must be equal, or not matter to d;
    - ``"pool"``: the wider side's channels are averaged down (what SpectralKD's code does);
    - ``"linear"``: a learned Linear per pair, student to teacher width (FitNets, arXiv 1412.6550),
      dropped at inference; before a fused distance the projected map is never written;
    - ``"mlp"``: Linear, GELU, Linear; dropped at inference;
    - ``"orthogonal"``: a Linear whose weight stays orthonormal (VkD, arXiv 2403.06213); dropped at
      inference, fused like ``"linear"``;
    - ``"lift"``: the student classifies from its own lifted tokens, and those are compared
      (arXiv 2511.15572); the caller puts them under the pair's student key. It stays at inference.

    Args:
        loss: the distance d, shared by all pairs: a name, or a module called as
            ``loss(student, teacher, grid=(H, W))`` with [B, N, D] tokens (without ``grid`` where
            its forward has no such argument, like `torch.nn.MSELoss`).
        pairs: (student key, teacher key), resolved to the keys of the taps.
        weight: factor of the loss, the paper's by default.
        projector: one of the six above.
        student_dims: channels per student key; needed by learned projectors and distances, and for
            checking widths early.
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
        refuse_inputs(self, "loss", loss)
        super().__init__(pairs, weight, resample)
        check_choice(self, "projector", projector, PROJECTORS)
        if projector == "lift" and len(pairs) > 1:
            raise ValueError(
                f"FeatureKD: projector='lift' compares the one lifted map of the student, got "
                f"{len(pairs)} pairs"
            )
        self.projector = projector
        self.lifts = projector == "lift"
        widths = None
        if student_dims is not None and teacher_dims is not None:
            widths = self.widths(student_dims, teacher_dims)
        self.distances = nn.ModuleList(self._build_distances(loss, widths, backend, options))
        self._with_grid = all(_takes_grid(distance) for distance in self.distances)
        self.projectors = nn.ModuleList(self._build_projectors(widths))

    def compare(self, student: Mapping[Key, Tokens], teacher: Mapping[Key, Tokens]) -> Tensor:
        """Compare the token maps of every pair, without the weight; see `FeatureTerm.forward`."""
        distances = [
            self._compare_pair(index, *self.matched(student, teacher, index))
            for index in range(len(self.pairs))
        ]
        return torch.stack(distances).mean()

    @property
    def operator_options(self) -> dict[str, Any] | None:
        """The distance as the operators' keywords; None where only calling it will do."""
        return _operator_options(self.distances[0])

    def _build_distances(
        self,
        loss: str | nn.Module,
        widths: list[tuple[int, int]] | None,
        backend: str,
        options: dict[str, Any],
    ) -> list[nn.Module]:
        """Build one distance for all pairs, or one per pair where widths matter to it."""
        if isinstance(loss, nn.Module):
            given = [*options, *(["backend"] if backend != "auto" else [])]
            if given:
                raise ValueError(
                    f"FeatureKD: {', '.join(given)}: options of a named loss, got a module"
                )
            return [loss]
        entry = _find_distance(loss)
        registry.check_options(entry, options, "FeatureKD")
        distance = entry.load()
        if loss in LOSSES:
            options = {**options, "loss": loss, "backend": backend}
        elif backend != "auto":
            raise ValueError(f"FeatureKD: {loss!r} has one implementation, got {backend=}")
        if not distance.needs_widths:
            return [distance(**options)]
        if widths is None:
            raise ValueError(
                f"FeatureKD: loss={loss!r} needs student_dims and teacher_dims, the channels per "
                "key"
            )
        projected = [self._projected_widths(*pair) for pair in widths]
        return [distance(student_dim=s, teacher_dim=t, **options) for s, t in projected]

    def _projected_widths(self, student_dim: int, teacher_dim: int) -> tuple[int, int]:
        if self.projector == "none":
            return student_dim, teacher_dim
        dim = min(student_dim, teacher_dim) if self.projector == "pool" else teacher_dim
        return dim, dim

    def _build_projectors(self, widths: list[tuple[int, int]] | None) -> list[nn.Module]:
        if widths is None:
            if self.projector in _LEARNED:
                raise ValueError(
                    f"FeatureKD: projector={self.projector!r} needs student_dims and teacher_dims, "
                    "the channels per key"
                )
            return []
        for index, pair in enumerate(widths):
            self._check_widths(index, *pair)
        built = [build_projector(self.projector, *pair) for pair in widths]
        return [projector for projector in built if projector is not None]

    def _check_widths(self, index: int, student_dim: int, teacher_dim: int) -> None:
        equal = getattr(self._distance(index), "equal_widths", False)
        check_widths(
            self.projector, self.pairs[index], student_dim, teacher_dim, equal_widths=equal
        )

    def _distance(self, index: int) -> nn.Module:
        return self.distances[index if len(self.distances) > 1 else 0]

    def _compare_pair(self, index: int, student: Tokens, teacher: Tokens) -> Tensor:
        self._check_widths(index, student.dim, teacher.dim)
        distance = self._distance(index)
        if self.projector in _LEARNED:
            return self._compare_projected(self.projectors[index], distance, student, teacher)
        if self.projector == "pool":
            return self._compare_pooled(distance, student, teacher)
        return self._call(distance, student.data, teacher.data, student.grid)

    def _compare_projected(
        self, layer: nn.Module, distance: nn.Module, student: Tokens, teacher: Tokens
    ) -> Tensor:
        weights, options = fused_weights(layer), _operator_options(distance)
        if weights is not None and options is not None:
            weight, bias = weights
            fused = lift_kd(student.data, weight, teacher.data, bias, grid=student.grid, **options)
            return cast(Tensor, fused)
        tokens, targets, grid = student.data, teacher.data, student.grid
        if weights is not None and getattr(distance, "pools_first", False):
            # A Linear commutes with the mean: one token per image is projected instead of all.
            tokens, targets = (
                x.mean(1, keepdim=True, dtype=wide_dtype(x)) for x in (tokens, targets)
            )
            grid = (1, 1)
        return self._call(distance, layer(_as_parameters(tokens, layer)), targets, grid)

    def _compare_pooled(self, distance: nn.Module, student: Tokens, teacher: Tokens) -> Tensor:
        options = _operator_options(distance)
        if options is not None:
            side = pool_side(student.dim, teacher.dim)
            return feature_kd(student.data, teacher.data, grid=student.grid, pool=side, **options)
        dim = min(student.dim, teacher.dim)
        sides = pool_channels(student.data, dim), pool_channels(teacher.data, dim)
        return self._call(distance, *sides, student.grid)

    def _call(self, distance: nn.Module, student: Tensor, teacher: Tensor, grid: Grid) -> Tensor:
        if self._with_grid:
            return cast(Tensor, distance(student, teacher, grid=grid))
        return cast(Tensor, distance(student, teacher))


def _find_distance(name: str) -> registry.Loss:
    for entry in registry.FEATURE_LOSSES:
        if entry.name == name and not entry.projects:
            return entry
    known = tuple(entry.name for entry in registry.FEATURE_LOSSES if not entry.projects)
    raise ValueError(f"FeatureKD: loss must be one of {known} or a module, got {describe(name)}")


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
