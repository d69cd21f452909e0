"""Results of an analysis as plain records per model and layer, and their file format."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from pydantic import ConfigDict, TypeAdapter, ValidationError

from fastkd.ops.sep import bandwidth

UNTRAINED = "untrained"


def measured(values: np.ndarray) -> np.ndarray:
    """Drop the NaN of images without a value."""
    return values[np.isfinite(values)]


@dataclass(frozen=True)
class Distribution:
    """How a number is distributed over images; percentiles are interpolated linearly."""

    mean: float
    std: float  # of the population
    lower_quartile: float
    median: float
    upper_quartile: float
    percentile_99: float  # what the paper's tables print

    @classmethod
    def of(cls, values: np.ndarray) -> Distribution:
        """Summarize one value per image.

        Args:
            values: [images]; NaN and infinities are left out.

        Returns:
            The distribution; all NaN if no image has a value.
        """
        found = measured(values)
        if len(found) == 0:
            return cls(*[float("nan")] * 6)
        percentiles = np.percentile(found, (25, 50, 75, 99)).tolist()
        return cls(float(np.mean(found)), float(np.std(found)), *percentiles)


@dataclass(frozen=True)
class Ranks:
    """rank@q of every image: the number of dimensions that hold a fraction q of its energy.

    Attributes:
        levels: the fractions q.
        values: [images, levels] int32; 0 for an image without energy, or with a NaN or infinity.
        largest: the largest possible rank: min(N, D), or D in a shared basis.
    """

    levels: tuple[float, ...]
    values: np.ndarray
    largest: int

    def at(self, level: float) -> np.ndarray:
        """Select the ranks at a level.

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
        """Summarize rank@level over images.

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
        mean: [K] float64; the first K dimensions or frequency bins hold this fraction.
        std: [K] float64, population standard deviation over images or tokens; None if not measured.
    """

    mean: np.ndarray
    std: np.ndarray | None = None


@dataclass(frozen=True)
class Sep:
    """Token spectral energy pattern of one layer: cumulated energy over channel frequency."""

    convention: str  # "full": all D bins in FFT order; "folded": D // 2 + 1 unique bins
    curve: Curve  # over tokens
    white_noise: np.ndarray  # [F] float64, the expected curve of white noise
    levels: tuple[float, ...]
    # [levels] float64 in (0, 1]: first bin at which the mean reaches the level, over F.
    bandwidths: np.ndarray
    tokens: int
    without_energy: int  # tokens left out because they are zero

    @property
    def white_noise_bandwidths(self) -> np.ndarray:
        """Bandwidths of white noise with as many channels, [levels]."""
        return bandwidths(self.white_noise, self.levels)


@dataclass(frozen=True)
class SepTest:
    """Bandwidths under random channel permutations: does the order of the channels matter?"""

    levels: tuple[float, ...]
    observed: np.ndarray  # [levels] float64
    observed_interval: np.ndarray  # [levels, 2] float64, bootstrapped over images
    permuted: np.ndarray  # [permutations, levels] float64
    shift: np.ndarray  # [levels] float64, mean of permuted - observed, read between bins
    shift_interval: np.ndarray  # [levels, 2] float64, bootstrapped over images and permutations
    # [levels] float64, two-sided: (1 + permutations at least as far from their mean as the observed
    # bandwidth) / (1 + permutations).
    p_value: np.ndarray
    confidence: float  # of the intervals


@dataclass(frozen=True)
class Subspaces:
    """How far top-k subspaces are rotated against each other, for one k."""

    k: int
    # [images] float32 in [0, 1]: ||V_i^T V||_F^2 / k of an image's own top-k right-singular
    # subspace and the shared one; NaN for an image of rank below k.
    overlap_shared: np.ndarray
    overlap_pairs: np.ndarray  # [pairs] float32, the same between two random images
    angles_shared: np.ndarray  # [k] float64, degrees, ascending: mean principal angles
    angles_pairs: np.ndarray  # [k] float64, degrees, ascending
    overlap_random: float  # k / D, the expectation for random subspaces
    angles_random: np.ndarray  # [k] float64, degrees, ascending

    def mean_excess(self, overlap: np.ndarray) -> float:
        """Average `excess_overlap` over images or pairs."""
        return float(excess_overlap(Distribution.of(overlap).mean, self.overlap_random))


@dataclass(frozen=True)
class SharedView:
    """The images of one layer in the basis that all of them share, from the second pass."""

    ranks: Ranks
    curves: np.ndarray  # [images, D] float32: captured energy of every image
    curve: Curve  # over images
    rotation: list[Subspaces]  # one per k, ascending


@dataclass(frozen=True)
class LayerResult:
    """Measurements of one layer of one model."""

    name: str  # "blocks.23", "stages.3", "final", or a module's name
    index: int  # among the model's blocks or stages, or among the modules given by name
    tokens: int  # N, tokens of an image
    channels: int  # D
    ranks: Ranks  # in each image's own basis
    curve: Curve  # energy over dimensions in the own basis, over images
    effective_rank: np.ndarray  # [images] float32, Roy & Vetterli's; NaN without a rank
    stable_rank: np.ndarray  # [images] float32, sum of energies over the largest
    shared_energies: np.ndarray  # [D] float64, eigenvalues of the second moment, descending
    sep: Sep | None = None  # None if not asked for, or if no token has energy
    sep_test: SepTest | None = None  # only of layers with `shared`
    shared: SharedView | None = None  # None without a second pass or a finite image

    @property
    def rotation(self) -> list[Subspaces]:
        """Rotation for every k; empty without a second pass."""
        return self.shared.rotation if self.shared else []

    def bases(self) -> list[tuple[str, Ranks]]:
        """Return the ranks in each image's own basis and, if measured, in the shared one."""
        shared = [("shared", self.shared.ranks)] if self.shared else []
        return [("own", self.ranks), *shared]

    def bandwidths(self) -> dict[float, float]:
        """Return the SEP bandwidths by level; empty without SEP."""
        if self.sep is None:
            return {}
        return dict(zip(self.sep.levels, self.sep.bandwidths.tolist(), strict=True))


@dataclass(frozen=True)
class ModelResult:
    """Measurements of one model on the selected images."""

    name: str
    weights: str  # "pretrained", "untrained", "as given", a file's name, or "saved tokens"
    architecture: str  # timm's name or a class name; "" for saved tokens
    parameters: int | None  # None for saved tokens
    input_size: tuple[int, int] | None  # (H, W) of the images; None for saved tokens
    images: int  # measured
    non_finite: int  # of these, images left out of a layer for a NaN, an infinity or a huge value
    skipped: list[tuple[str, str]]  # (name, reason) of every image that could not be read
    layers: list[LayerResult]  # in depth order
    seconds: dict[str, float] = field(default_factory=dict)  # "forward" with reading, "analysis"

    @property
    def last(self) -> LayerResult:
        """The deepest layer."""
        return self.layers[-1]


def intervals(samples: np.ndarray, confidence: float) -> np.ndarray:
    """Return central intervals of bootstrap samples."""
    tail = 100 * (1 - confidence) / 2
    lower, upper = np.percentile(samples, (tail, 100 - tail), axis=0)
    return np.stack([lower, upper], axis=-1)


def encode(value: Any, arrays: dict[str, np.ndarray], path: str) -> Any:
    """Turn a record into JSON values; its arrays go into ``arrays`` under their paths."""
    if isinstance(value, np.ndarray):
        arrays[path] = value
        return {"array": path}
    if isinstance(value, np.generic):
        value = value.item()
    if dataclasses.is_dataclass(value):
        value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {str(key): encode(item, arrays, f"{path}.{key}") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [encode(item, arrays, f"{path}.{index}") for index, item in enumerate(value)]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)  # JSON has neither NaN nor infinity
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"encode: {path} must be a plain value, got {type(value).__name__}")


def decode(kind: Any, value: Any, arrays: Mapping[str, np.ndarray]) -> Any:
    """Undo `encode`; ValueError names a field that is missing or has another type."""
    config = ConfigDict(arbitrary_types_allowed=True, extra="forbid")
    try:
        # pydantic takes no configuration for a dataclass itself, but hands on that of its tuple.
        adapter = TypeAdapter(tuple[kind], config=config)
        return adapter.validate_python((_with_arrays(value, arrays),))[0]
    except ValidationError as error:
        fault = error.errors(include_url=False, include_input=False)[0]
        field = ".".join(map(str, fault["loc"][1:]))
        raise ValueError(f"{field}: {fault['msg']}") from error


def _with_arrays(value: Any, arrays: Mapping[str, np.ndarray]) -> Any:
    if isinstance(value, dict) and value.keys() == {"array"}:
        if value["array"] not in arrays:
            raise ValueError(f"its array {value['array']!r} is missing")
        return arrays[value["array"]]
    if isinstance(value, dict):
        return {key: _with_arrays(item, arrays) for key, item in value.items()}
    return [_with_arrays(item, arrays) for item in value] if isinstance(value, list) else value


def same(left: Any, right: Any) -> bool:
    """Compare records with their arrays; NaN equals NaN, and a list equals a tuple."""
    ours: dict[str, np.ndarray] = {}
    theirs: dict[str, np.ndarray] = {}
    return encode(left, ours, "") == encode(right, theirs, "") and all(
        array.dtype == theirs[path].dtype
        and np.array_equal(array, theirs[path], equal_nan=array.dtype.kind == "f")
        for path, array in ours.items()
    )


def excess_overlap(overlap: np.ndarray | float, random: float) -> np.ndarray | float:
    """Return (o - k/D) / (1 - k/D): 0 for random subspaces, 1 for equal ones, at any width D."""
    if random >= 1:
        return overlap * float("nan")
    return (overlap - random) / (1 - random)


def bandwidths(curve: np.ndarray, levels: Iterable[float]) -> np.ndarray:
    """Find the first bin at which a cumulated curve reaches each level, over the number of bins."""
    return bandwidth(torch.tensor(curve), list(levels)).numpy()


def bandwidth_levels_of(layers: Iterable[LayerResult]) -> list[float]:
    """List all levels at which the layers' bandwidths were read, ascending."""
    return sorted({level for layer in layers if layer.sep for level in layer.sep.levels})


def subspace_sizes_of(layers: Iterable[LayerResult]) -> list[int]:
    """List all k for which the layers' rotation was measured, ascending."""
    return sorted({found.k for layer in layers for found in layer.rotation})


def has_shared_depth(model: ModelResult) -> bool:
    """Return whether more than one layer was measured in its shared basis."""
    return sum(layer.shared is not None for layer in model.layers) > 1


def percent(level: float) -> str:
    """Write a fraction as percent: 0.99 -> ``"99"``, 0.995 -> ``"99.5"``."""
    return f"{100 * level:g}"
