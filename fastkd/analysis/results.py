"""Results of an analysis as plain records, one for each model and layer, and their file format."""

from __future__ import annotations

import dataclasses
import math
import os
import types
import typing
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from fastkd.ops.sep import bandwidth

UNTRAINED = "untrained"


def measured(values: np.ndarray) -> np.ndarray:
    """The values of images that have one: NaN left out."""
    return values[np.isfinite(values)]


@dataclass(frozen=True)
class Distribution:
    """How a number is distributed over images.

    Attributes:
        mean: over images.
        std: population standard deviation over images.
        lower_quartile: 25th percentile; percentiles interpolate linearly, as numpy's.
        median: 50th percentile.
        upper_quartile: 75th percentile.
        percentile_99: 99 % of the images need at most this many dimensions (what the paper's tables
            print).
    """

    mean: float
    std: float
    lower_quartile: float
    median: float
    upper_quartile: float
    percentile_99: float

    @classmethod
    def of(cls, values: np.ndarray) -> Distribution:
        """Summarise a value per image.

        Args:
            values: [images]; what `measured` leaves out is left out.

        Returns:
            Their distribution; all NaN where no image has a value.
        """
        found = measured(values)
        if len(found) == 0:
            return cls(*[float("nan")] * 6)
        percentiles = np.percentile(found, (25, 50, 75, 99)).tolist()
        return cls(float(np.mean(found)), float(np.std(found)), *percentiles)


@dataclass(frozen=True)
class Ranks:
    """rank@q of every image: the dimensions that hold a part q of its energy.

    Attributes:
        levels: the parts q.
        values: [images, levels] int32; 0 for an image without energy, or with a NaN or infinity.
        largest: how many dimensions there are: min(N, D), or D in a shared basis.
    """

    levels: tuple[float, ...]
    values: np.ndarray
    largest: int

    def at(self, level: float) -> np.ndarray:
        """The ranks at a level.

        Args:
            level: one of `levels`.

        Returns:
            [measured images] int32; images without a rank are left out.

        Raises:
            ValueError: another level.
        """
        if level not in self.levels:
            raise ValueError(f"Ranks.at: level must be one of {self.levels}, got {level}")
        ranks = self.values[:, self.levels.index(level)]
        return ranks[ranks > 0]

    def distribution(self, level: float) -> Distribution:
        """How rank@level is distributed over images.

        Args:
            level: one of `levels`.

        Returns:
            The distribution.
        """
        return Distribution.of(self.at(level))

    def histogram(self, level: float) -> np.ndarray:
        """Count images by rank.

        Args:
            level: one of `levels`.

        Returns:
            Number of images of each rank, [largest + 1] int64.
        """
        return np.bincount(self.at(level), minlength=self.largest + 1)


@dataclass(frozen=True)
class Curve:
    """A cumulated curve in [0, 1], averaged.

    Attributes:
        mean: [K] float64; the first K dimensions or frequency bins hold this part.
        std: [K] float64, population standard deviation over images or tokens; None if not measured.
    """

    mean: np.ndarray
    std: np.ndarray | None = None


@dataclass(frozen=True)
class Sep:
    """Token spectral energy pattern of one layer: cumulated energy over channel frequency.

    Attributes:
        convention: ``"full"`` (all D bins in FFT order) or ``"folded"`` (D // 2 + 1 unique bins).
        curve: mean over tokens, and std over tokens where it was measured.
        white_noise: [F] float64, the expected curve of white noise.
        levels: parts of the energy.
        bandwidths: [levels] float64 in (0, 1]: first bin at which ``curve.mean`` reaches the level,
            divided by the number of bins.
        tokens: how many were averaged.
        without_energy: tokens left out because they are zero.
    """

    convention: str
    curve: Curve
    white_noise: np.ndarray
    levels: tuple[float, ...]
    bandwidths: np.ndarray
    tokens: int
    without_energy: int


@dataclass(frozen=True)
class SepTest:
    """Does the order of the channels matter? Bandwidths under random channel permutations.

    Attributes:
        levels: parts of the energy.
        observed: [levels] float64, bandwidths of the channels as they are.
        observed_interval: [levels, 2] float64, bootstrap interval of ``observed`` over images.
        permuted: [permutations, levels] float64.
        shift: [levels] float64, mean of permuted - observed, with bandwidths read between bins.
        shift_interval: [levels, 2] float64, bootstrap interval of ``shift``: images are drawn for
            what was observed, permutations for the mean of the others.
        p_value: [levels] float64, two-sided: (1 + permutations at least as far from their mean as
            the observed one) / (1 + permutations).
        confidence: of the intervals: 0.95.
    """

    levels: tuple[float, ...]
    observed: np.ndarray
    observed_interval: np.ndarray
    permuted: np.ndarray
    shift: np.ndarray
    shift_interval: np.ndarray
    p_value: np.ndarray
    confidence: float


@dataclass(frozen=True)
class Subspaces:
    """How far top-k subspaces turn away from each other, for one k.

    Attributes:
        k: dimensions of every subspace.
        overlap_shared: [images] float32 in [0, 1]: ||V_i^T V||_F^2 / k of an image's own top-k
            right-singular subspace and the shared one; NaN for an image of rank below k.
        overlap_pairs: [pairs] float32, the same between two random images.
        angles_shared: [k] float64, degrees: mean principal angles to the shared one, ascending.
        angles_pairs: [k] float64, degrees: mean principal angles between two random images.
        overlap_random: k / D, the expectation for random subspaces.
        angles_random: [k] float64, degrees: mean principal angles between random subspaces.
    """

    k: int
    overlap_shared: np.ndarray
    overlap_pairs: np.ndarray
    angles_shared: np.ndarray
    angles_pairs: np.ndarray
    overlap_random: float
    angles_random: np.ndarray


@dataclass(frozen=True)
class SharedView:
    """The images of one layer in the basis that all of them share: what a second pass gives.

    Attributes:
        ranks: dimensions of the shared basis that each image needs.
        curves: [images, D] float32: captured energy of every image.
        curve: mean and std over images of ``curves``.
        rotation: one per k, ascending.
    """

    ranks: Ranks
    curves: np.ndarray
    curve: Curve
    rotation: list[Subspaces]


@dataclass(frozen=True)
class LayerResult:
    """One layer of one model.

    Attributes:
        name: ``"blocks.23"``, ``"stages.3"``, or a module's name.
        index: its number among the model's blocks or stages, or its place among named modules.
        tokens: N, tokens of an image.
        channels: D.
        ranks: per-image rank@q.
        curve: per-image energy over dimensions, mean and std over images.
        effective_rank: [images] float32, Roy & Vetterli's; NaN where an image has no rank.
        stable_rank: [images] float32, sum of energies over the largest; NaN likewise.
        shared_energies: [D] float64, eigenvalues of the uncentred (or centred, as the settings say)
            second moment of all tokens, descending.
        sep: None where it was not asked for, or no token has energy.
        sep_test: None where it was not made: it is made for layers with ``shared``.
        shared: None for layers without a second pass, or without a finite image.
    """

    name: str
    index: int
    tokens: int
    channels: int
    ranks: Ranks
    curve: Curve
    effective_rank: np.ndarray
    stable_rank: np.ndarray
    shared_energies: np.ndarray
    sep: Sep | None = None
    sep_test: SepTest | None = None
    shared: SharedView | None = None


@dataclass(frozen=True)
class ModelResult:
    """One model on the analysed images.

    Attributes:
        name: as given by the user, or the label given for it.
        weights: ``"pretrained"``, ``"untrained"``, a file's name, or ``"saved tokens"``.
        architecture: timm's name of the architecture, or a class name; "" for saved tokens.
        parameters: how many; None for saved tokens.
        input_size: (H, W) of the images fed in; None for saved tokens.
        images: how many were measured.
        non_finite: of these, images left out of at least one layer because of a NaN, an infinity,
            or a value that is too large for its square.
        skipped: (name, reason) of every image that could not be read.
        layers: in depth order; the last one has ``shared``.
        seconds: time by part: ``"forward"`` (reading included), ``"analysis"``.
    """

    name: str
    weights: str
    architecture: str
    parameters: int | None
    input_size: tuple[int, int] | None
    images: int
    non_finite: int
    skipped: list[tuple[str, str]]
    layers: list[LayerResult]
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def last(self) -> LayerResult:
        """The deepest layer that was analysed."""
        return self.layers[-1]


def intervals(samples: np.ndarray, confidence: float) -> np.ndarray:
    """Central intervals of bootstrap samples."""
    tail = 100 * (1 - confidence) / 2
    lower, upper = np.percentile(samples, (tail, 100 - tail), axis=0)
    return np.stack([lower, upper], axis=-1)


def encode(value: Any, arrays: dict[str, np.ndarray], path: str) -> Any:
    """Turn a record into what JSON can say."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        named = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        return encode(named, arrays, path)
    if isinstance(value, np.ndarray):
        if value.dtype.hasobject:
            raise TypeError(f"encode: {path} must be an array of numbers, got dtype {value.dtype}")
        arrays[path] = value
        return {"array": path}
    if isinstance(value, np.generic):
        return encode(value.item(), arrays, path)
    if isinstance(value, dict):
        return {str(key): encode(item, arrays, f"{path}.{key}") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [encode(item, arrays, f"{path}.{index}") for index, item in enumerate(value)]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"encode: {path} must be a plain value, got {type(value).__name__}")


def decode(kind: Any, value: Any, arrays: typing.Mapping[str, np.ndarray], path: str) -> Any:
    """Undo `encode`."""
    if kind is Any:
        return value
    if kind is np.ndarray:
        return _array(value, arrays, path)
    if dataclasses.is_dataclass(kind):
        return _record(kind, value, arrays, path)
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        if value is None:
            return None
        inner = next(arm for arm in typing.get_args(kind) if arm is not type(None))
        return decode(inner, value, arrays, path)
    if typing.get_origin(kind) in (list, tuple):
        return _sequence(kind, value, arrays, path)
    if typing.get_origin(kind) is dict:
        items = _expect(dict, value, path).items()
        inner = typing.get_args(kind)[1]
        return {key: decode(inner, item, arrays, f"{path}.{key}") for key, item in items}
    if kind is float and not isinstance(value, bool | None):
        return _float(value, path)
    return _expect(kind, value, path)


def same(left: Any, right: Any) -> bool:
    """Are two records equal, array by array, with NaN equal to NaN and lists equal to tuples?"""
    if isinstance(left, np.ndarray) or isinstance(right, np.ndarray):
        return _same_arrays(left, right)
    if dataclasses.is_dataclass(left):
        return type(left) is type(right) and same(vars(left), vars(right))
    if isinstance(left, dict) and isinstance(right, dict):
        return left.keys() == right.keys() and all(same(left[key], right[key]) for key in left)
    if isinstance(left, list | tuple) and isinstance(right, list | tuple):
        return len(left) == len(right) and all(map(same, left, right))
    if isinstance(left, float) and isinstance(right, float) and math.isnan(left):
        return math.isnan(right)
    return bool(left == right)


def _same_arrays(left: Any, right: Any) -> bool:
    if not (isinstance(left, np.ndarray) and isinstance(right, np.ndarray)):
        return False
    floats = left.dtype.kind == "f"
    return left.dtype == right.dtype and np.array_equal(left, right, equal_nan=floats)


def _array(value: Any, arrays: typing.Mapping[str, np.ndarray], path: str) -> np.ndarray:
    name = _expect(dict, value, path).get("array")
    if name not in arrays:
        raise ValueError(f"{path}: its array {name!r} is missing")
    return arrays[name]


def _record(kind: Any, value: Any, arrays: typing.Mapping[str, np.ndarray], path: str) -> Any:
    annotations = typing.get_type_hints(kind)
    given = _expect(dict, value, path)
    if given.keys() != annotations.keys():
        raise ValueError(f"{path} must have the fields {sorted(annotations)}, got {sorted(given)}")
    return kind(
        **{
            name: decode(a, given[name], arrays, f"{path}.{name}")
            for name, a in annotations.items()
        }
    )


def _sequence(kind: Any, value: Any, arrays: typing.Mapping[str, np.ndarray], path: str) -> Any:
    items = _expect(list, value, path)
    arms = typing.get_args(kind)
    if len(arms) == 1 or arms[-1] is Ellipsis:
        arms = (arms[0],) * len(items)
    if len(arms) != len(items):
        raise ValueError(f"{path} must have {len(arms)} items, got {len(items)}")
    pairs = enumerate(zip(arms, items, strict=True))
    decoded = [decode(arm, item, arrays, f"{path}.{index}") for index, (arm, item) in pairs]
    return typing.get_origin(kind)(decoded)


def _float(value: Any, path: str) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        raise ValueError(f"{path} must be a number, got {value!r}") from None


def _expect(kind: Any, value: Any, path: str) -> Any:
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise ValueError(f"{path} must be a {kind.__name__}, got {value!r:.80}")
    return value


def excess_overlap(overlap: np.ndarray | float, random: float) -> np.ndarray | float:
    """Overlap beyond that of random subspaces: 0 for random ones, 1 for equal ones.

    (o - k/D) / (1 - k/D), which compares models of different widths.
    """
    if random >= 1:
        return overlap * float("nan")
    return (overlap - random) / (1 - random)


def bandwidths(curve: np.ndarray, levels: Iterable[float]) -> np.ndarray:
    """First bin at which a cumulated curve reaches each level, as a part of the bins."""
    return bandwidth(torch.tensor(curve), list(levels)).numpy()


def white_noise_bandwidths(sep: Sep) -> np.ndarray:
    """Bandwidths of white noise with as many channels, [levels]."""
    return bandwidths(sep.white_noise, sep.levels)


def first_median_last(angles: np.ndarray) -> tuple[float, float, float]:
    """The smallest, the median and the largest of ascending principal angles; NaN without any."""
    if len(angles) == 0:
        return (float("nan"),) * 3
    return float(angles[0]), float(np.median(angles)), float(angles[-1])


def levels_of(layers: Iterable[LayerResult]) -> list[float]:
    """All levels at which the layers' ranks were read, ascending."""
    return sorted({level for layer in layers for level in layer.ranks.levels})


def bandwidth_levels_of(layers: Iterable[LayerResult]) -> list[float]:
    """All levels at which the layers' bandwidths were read, ascending."""
    return sorted({level for layer in layers if layer.sep for level in layer.sep.levels})


def subspace_sizes_of(models: Iterable[ModelResult]) -> list[int]:
    """All k for which rotation was measured in a last layer, ascending."""
    return sorted(
        {r.k for model in models if model.last.shared for r in model.last.shared.rotation}
    )


def has_shared_depth(model: ModelResult) -> bool:
    """Was more than one layer seen in its shared basis?"""
    return sum(layer.shared is not None for layer in model.layers) > 1


def percent(level: float) -> str:
    """A part of the energy as text: 0.99 -> ``"99"``, 0.995 -> ``"99.5"``."""
    return f"{100 * level:g}"
