"""The measuring loop over one model's images: two streamed passes, merged over processes."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, NamedTuple, Protocol, TypedDict

import numpy as np
import torch
from torch import Tensor

from fastkd.analysis.accumulators import Accumulator
from fastkd.analysis.accumulators.shared_basis import SUBSPACES, InSharedBasis, SecondMoment
from fastkd.analysis.accumulators.spectra import ImageSpectra, TokenPattern
from fastkd.analysis.results import LayerResult, ModelResult
from fastkd.analysis.resume import Resume
from fastkd.ops.checks import check_choice, check_flag, levels_of
from fastkd.ops.parallel import each
from fastkd.ops.sep import CONVENTIONS
from fastkd.ops.spectrum import LEVELS, MOST_LEVELS
from fastkd.utils.argument_checks import LARGEST_IMAGE, MOST_WORKERS, check_numbers, describe
from fastkd.utils.distributed import AMP_DTYPES, StopRequest, World
from fastkd.utils.progress import Progress

SHARED = ("last", "all", "none")
_PASSES = {"first": "spectra", "second": "shared basis"}
_GIGABYTE = 1e9
_NAMED_IMAGES = 3  # unreadable ones that an error lists

LayerChoice = str | Sequence[int | str]


@dataclass(frozen=True)
class Options:
    """Options of `analyze`, each a keyword argument of it.

    Attributes:
        layers: ``"all"`` blocks or stages, the ``"last"`` one, or some: ``"0,5"``, ``[0, "final"]``
            or module names. ``"final"`` is what a model's head pools; Lift students include it.
        images: number of images, evenly from all classes; None for all.
        img_size: pixels a side, for models that are built for a size; None for each model's own.
        num_prefix: prefix tokens to drop from layers given by module name.
        levels: fractions q of the energy, in (0, 1], up to eight.
        sep: frequency pattern of ``"full"`` D bins as in the paper, ``"folded"`` (D // 2 + 1 unique
            bins), or ``"none"``.
        permutations: random channel orders for the test of the pattern; 0 for no test.
        subspaces: dimensions k at which rotation is measured; those above min(N, D) are left out.
        shared: layers measured in the dataset's basis, too: ``"last"``, ``"all"`` or ``"none"``.
        centered: subtract the dataset's mean token in that basis; the paper does not.
        seed: for the choice of images, permutations and bootstrap samples.
        max_unreadable: fraction of the images that may be unreadable before the run stops.
        memory: GB of tokens to keep for the second pass; without enough, images are read twice.
        amp: ``"none"``, ``"bf16"`` or ``"fp16"``: autocast of the models. Measurements use float32.
        batch_size: images per forward pass and process.
        workers: processes that read images; None for up to four, as many as there are CPUs.
        data_root: folder with the files of a named dataset.

    Raises:
        ValueError: a value out of bounds.
        TypeError: a value of another type.
    """

    layers: LayerChoice = "all"
    images: int | None = 1000
    img_size: int | None = None
    num_prefix: int = 0
    levels: Sequence[float] = LEVELS
    sep: Literal["full", "folded", "none"] = "full"
    permutations: int = 100
    subspaces: Sequence[int] = SUBSPACES
    shared: Literal["last", "all", "none"] = "last"
    centered: bool = False
    seed: int = 0
    max_unreadable: float = 0.05
    memory: float = 0.5
    amp: Literal["none", "bf16", "fp16"] = "none"
    batch_size: int = 16
    workers: int | None = None
    data_root: str | None = None

    def __post_init__(self) -> None:
        levels = levels_of("analyze", self.levels, "levels")
        if len(levels) > MOST_LEVELS:
            raise ValueError(f"analyze: levels may be {MOST_LEVELS} at most, got {len(levels)}")
        check_choice("analyze", "sep", self.sep, (*CONVENTIONS, "none"))
        check_choice("analyze", "shared", self.shared, SHARED)
        check_choice("analyze", "amp", self.amp, ("none", *AMP_DTYPES))
        check_flag("analyze", "centered", self.centered)
        parse_layers(self.layers)
        for field in dataclasses.fields(self):
            if getattr(self, field.name) is None and "None" not in str(field.type):
                raise TypeError(f"analyze: {field.name} must be {field.type}, got None")
        if isinstance(self.subspaces, str) or not isinstance(self.subspaces, Sequence):
            got = describe(self.subspaces)
            raise TypeError(f"analyze: subspaces must be a sequence of integers, got {got}")
        for k in self.subspaces:
            check_numbers("analyze", subspaces=(k, 1))
        check_numbers(
            "analyze",
            images=(self.images, 1),
            img_size=(self.img_size, 1, LARGEST_IMAGE),
            num_prefix=(self.num_prefix, 0),
            permutations=(self.permutations, 0),
            seed=(self.seed, 0),
            max_unreadable=(self.max_unreadable, 0.0, 1.0),
            memory=(self.memory, 0.0),
            batch_size=(self.batch_size, 1),
            workers=(self.workers, 0, MOST_WORKERS),
        )

    @property
    def measured(self) -> dict[str, Any]:
        """The settings that numbers depend on, beside images and model."""
        names = ("permutations", "shared", "centered", "seed")
        return {
            "levels": levels_of("analyze", self.levels, "levels"),
            "convention": self.sep,
            "subspaces": tuple(self.subspaces),
            **{name: getattr(self, name) for name in names},
        }


class AnalyzeOptions(TypedDict, total=False):
    """The fields of `Options` as keyword arguments, for type checkers."""

    layers: LayerChoice
    images: int | None
    img_size: int | None
    num_prefix: int
    levels: Sequence[float]
    sep: Literal["full", "folded", "none"]
    permutations: int
    subspaces: Sequence[int]
    shared: Literal["last", "all", "none"]
    centered: bool
    seed: int
    max_unreadable: float
    memory: float
    amp: Literal["none", "bf16", "fp16"]
    batch_size: int
    workers: int | None
    data_root: str | None


def parse_layers(layers: LayerChoice) -> str | list[int | str]:
    """Parse a choice of layers into ``"all"``, ``"last"``, or a list of numbers and names."""
    items = layers.split(",") if isinstance(layers, str) else layers
    if not isinstance(items, Sequence) or any(
        isinstance(item, bool) or not isinstance(item, int | str) for item in items
    ):
        raise TypeError(f"layers: expected all, last, or numbers and names, got {layers!r}")
    if len(items) == 1 and items[0] in ("all", "last"):
        return str(items[0])
    names = ["-1" if item == "last" else str(item).strip() for item in items]
    if not names or "" in names:
        raise ValueError(f"layers: expected all, last, or numbers and names, got {layers!r}")
    return [int(name) if re.fullmatch(r"-?\d+", name) else name for name in names]


@dataclass(frozen=True)
class Layer:
    """One layer of a token source."""

    name: str  # "blocks.23", "stages.3", "final", a module's name; "layer.3" of saved tokens
    index: int  # among the blocks or stages ("final" follows them), or the modules given by name
    channels: int  # D


class Batch(NamedTuple):
    """Tokens of some images."""

    places: list[int]  # of the images that were read, ascending
    # Per layer [B, N, D] on the source's device, without prefix tokens, in the model's dtype and
    # with any strides; empty if no image of the batch was read.
    tokens: list[Tensor]
    skipped: list[tuple[int, str, str]]  # (place, name, reason) of unreadable images


class TokenSource(Protocol):
    """Tokens of one model on the selected images; `ModelResult` describes the other fields."""

    name: str
    weights: str
    architecture: str
    parameters: int | None
    input_size: tuple[int, int] | None
    layers: list[Layer]  # in depth order
    images: int  # selected, readable or not

    @property
    def fingerprint(self) -> dict[str, Any]:
        """Plain JSON values that differ where the tokens may."""

    def batches(self, start: int, stop: int) -> Iterator[Batch]:
        """Yield tokens of the images at places start..stop-1, in order."""


@dataclass(eq=False)
class Study:
    """Measure one source; every process calls `run`."""

    source: TokenSource
    options: Options
    world: World
    resume: Resume
    progress: Progress

    def __post_init__(self) -> None:
        self.share = _share(self.source.images, self.world)
        self.depth = len(self.source.layers)
        layers = list(range(self.depth))
        # Layers with a second pass.
        self.second = {"last": layers[-1:], "all": layers, "none": []}[self.options.shared]
        self.skipped: dict[int, tuple[str, str]] = {}  # place -> name and reason
        self.seconds = {"forward": 0.0, "analysis": 0.0}
        self.tokens = [0] * self.depth  # N of every layer
        # Tokens for the second pass; None once they would take too much memory.
        self._kept: list[Batch] | None = []
        self._kept_bytes = 0

    def run(self) -> ModelResult:
        """Measure all layers in one or two passes."""
        self.resume.open(self.fingerprint)
        with StopRequest() as stop:
            first = [self._first_measures(layer) for layer in range(self.depth)]
            self._pass("first", first, stop)
            self._stop_together(stop)
            self._merge_counts()
            with self._timed("analysis"):
                for measures in first:
                    for accumulator in measures.values():
                        _merge(accumulator, self.world)
            second = self._second_pass(first, stop)
            self._stop_together(stop)
        return self._result(first, second)

    @cached_property
    def fingerprint(self) -> str:
        """What the numbers depend on, as text; a limit may be raised before resuming."""
        settings = self.options.measured | self.source.fingerprint | {"name": self.source.name}
        return json.dumps(settings, sort_keys=True, default=str)

    def _first_measures(self, layer: int) -> dict[str, Accumulator]:
        measures: dict[str, Accumulator] = {
            "spectra": ImageSpectra(self.options.levels),
            "moment": SecondMoment(self.options.centered),
        }
        if self.options.sep != "none":
            measures["pattern"] = TokenPattern(self.options.sep, detailed=layer in self.second)
        return measures

    def _second_pass(
        self, first: list[dict[str, Any]], stop: StopRequest
    ) -> dict[int, InSharedBasis]:
        """Measure images in the basis that the first pass found; layer -> accumulator."""
        second: dict[int, InSharedBasis] = {}
        for layer in self.second:
            if first[layer]["moment"].tokens:
                with self._timed("analysis"):
                    basis = first[layer]["moment"].result()
                second[layer] = InSharedBasis(basis, self.options.levels, self.options.subspaces)
        if second:
            measures = [{"shared": second[i]} if i in second else {} for i in range(self.depth)]
            self._pass("second", measures, stop)
            self._kept = None
            self._stop_together(stop)
        for measure in second.values():
            _merge(measure, self.world)
        return second

    def _stop_together(self, stop: StopRequest) -> None:
        """Stop all processes if one was asked to, before any waits for the others."""
        asked_here = stop.received is not None
        if not stop.agree(self.world):
            return
        if self.resume.folder is not None:
            self.progress.close()
            self.progress.write("stopped; the same command with --resume continues from here")
        if not asked_here:
            raise SystemExit("analyze: another process was asked to stop")
        stop.raise_as_exception()

    def _pass(self, name: str, measures: list[dict[str, Any]], stop: StopRequest) -> None:
        """Stream this process' images through the accumulators, from where it was interrupted."""
        first, end = self.share
        begin = first
        state = self.resume.state(name)
        if state is not None:
            self._restore(state, measures)
            begin = state["next"]
        if begin > first:
            self._kept = None  # tokens of images before the interruption are lost
        label = f"{self.source.name}: {_PASSES[name]}"
        self.progress.start(label, end - first, begin - first, len(self.skipped))
        reread = name == "first" or self._kept is None
        for batch in self._batches(begin, end) if reread else self._kept or ():
            known = len(self.skipped)  # the second pass meets those of the first one again
            with self._timed("analysis"), torch.no_grad():
                self._update(batch, measures, keep=name == "first")
            begin = max([*batch.places, *(place for place, _, _ in batch.skipped)]) + 1
            read = len(batch.places) + len(batch.skipped)
            self.progress.advance(read, len(self.skipped) - known)
            if stop.received is not None or self._too_many_unreadable():
                break
            if self.resume.is_due:
                self.resume.save(name, self._state(begin, measures))
        self.resume.save(name, self._state(begin, measures))

    def _batches(self, begin: int, end: int) -> Iterator[Batch]:
        batches = iter(self.source.batches(begin, end))
        while True:
            with self._timed("forward"):
                batch = next(batches, None)
            if batch is None:
                return
            yield batch

    def _update(self, batch: Batch, measures: list[dict[str, Any]], keep: bool) -> None:
        self.skipped |= {place: (name, reason) for place, name, reason in batch.skipped}
        if not batch.places:
            return

        def update(layer: int) -> None:
            tokens = batch.tokens[layer]
            self.tokens[layer] = max(self.tokens[layer], tokens.shape[1])
            for accumulator in measures[layer].values():
                accumulator.update(tokens, batch.places)

        # The last layer takes longest: it starts first, so that the others do not wait for it.
        layers = [layer for layer in range(self.depth)[::-1] if measures[layer]]
        each(update, layers, batch.tokens[0].device)
        if keep and self._kept is not None:
            # A copy: a view without the class token would keep the whole sequence alive.
            tokens = [
                x.clone() if n in self.second else x.new_empty(0)
                for n, x in enumerate(batch.tokens)
            ]
            self._kept.append(batch._replace(tokens=tokens))
            self._kept_bytes += sum(x.numel() * x.element_size() for x in tokens)
            images = self.share[1] - self.share[0]
            seen = sum(len(kept.places) for kept in self._kept)
            if self._kept_bytes * images / seen > self.options.memory * _GIGABYTE / self.world.size:
                self._kept = None

    def _merge_counts(self) -> None:
        """Gather skipped images and numbers of tokens; raise if too many images are unreadable."""
        seen = self.world.gather((self.skipped, self.tokens))
        self.skipped = {place: why for skipped, _ in seen for place, why in skipped.items()}
        self.tokens = [max(counts) for counts in zip(*(tokens for _, tokens in seen), strict=True)]
        named = [f"{name} ({why})" for name, why in list(self.skipped.values())[:_NAMED_IMAGES]]
        more = len(self.skipped) - len(named)
        names = ": " + "; ".join(named) + (f"; and {more} more" if more > 0 else "")
        if self._too_many_unreadable():
            hint = "; raise the limit and resume (--resume) to continue from here"
            raise RuntimeError(
                f"analyze: {len(self.skipped)} of {self.source.images} images could not be read, "
                f"more than the {100 * self.options.max_unreadable:g} % allowed by max_unreadable"
                f"{names}{hint if self.resume.folder is not None else ''}"
            )
        if not any(self.tokens):
            raise RuntimeError(f"analyze: no image could be read{names}")

    def _too_many_unreadable(self) -> bool:
        return len(self.skipped) > self.options.max_unreadable * self.source.images

    def _state(self, at: int, measures: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "next": at,
            "measures": [{n: a.state() for n, a in layer.items()} for layer in measures],
            "skipped": self.skipped,
            "tokens": self.tokens,
            "seconds": self.seconds,
        }

    def _restore(self, state: dict[str, Any], measures: list[dict[str, Any]]) -> None:
        for layer, states in zip(measures, state["measures"], strict=True):
            for name, accumulator in layer.items():
                accumulator.restore(states[name])
        self.skipped = dict(state["skipped"])
        self.tokens = list(state["tokens"])
        self.seconds = dict(state["seconds"])

    @contextlib.contextmanager
    def _timed(self, part: str) -> Iterator[None]:
        begin = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[part] += time.perf_counter() - begin

    def _result(self, first: list[dict[str, Any]], second: dict[int, InSharedBasis]) -> ModelResult:
        with self._timed("analysis"):
            layers = each(
                lambda layer: self._layer_result(layer, first[layer], second.get(layer)),
                range(self.depth),
                torch.device("cpu"),
            )
            finite = np.all([x["spectra"].result().finite for x in first], axis=0)
        source = self.source
        return ModelResult(
            name=source.name,
            weights=source.weights,
            architecture=source.architecture,
            parameters=source.parameters,
            input_size=source.input_size,
            images=len(finite),
            non_finite=int((~finite).sum()),
            skipped=[self.skipped[place] for place in sorted(self.skipped)],
            layers=layers,
            seconds=dict(self.seconds),
        )

    def _layer_result(
        self, number: int, measures: dict[str, Any], shared: InSharedBasis | None
    ) -> LayerResult:
        layer, spectra = self.source.layers[number], measures["spectra"].result()
        moment: SecondMoment = measures["moment"]
        energies = np.full(layer.channels, np.nan)  # of a layer without a finite image
        if moment.tokens:
            found = moment.energies() if shared is None else shared.basis.energies
            energies = found.cpu().numpy()
        pattern: TokenPattern | None = measures.get("pattern")
        sep = test = None
        if pattern is not None and pattern.tokens:
            sep = pattern.result()
            if pattern.detailed and self.options.permutations > 0:
                test = pattern.permutation_test(self.options.permutations, seed=self.options.seed)
        return LayerResult(
            name=layer.name,
            index=layer.index,
            tokens=self.tokens[number],
            channels=layer.channels,
            ranks=spectra.ranks,
            curve=spectra.curve,
            effective_rank=spectra.effective_rank,
            stable_rank=spectra.stable_rank,
            shared_energies=energies,
            sep=sep,
            sep_test=test,
            shared=None if shared is None else shared.result(),
        )


def _share(images: int, world: World) -> tuple[int, int]:
    """Return this process' places, in whole pairs: partners 2 t and 2 t + 1 stay together."""
    pairs = (images + 1) // 2
    ends = [2 * (pairs * rank // world.size) for rank in (world.rank, world.rank + 1)]
    return min(ends[0], images), min(ends[1], images)


def _merge(accumulator: Accumulator, world: World) -> None:
    """Merge the accumulators of all processes, in the order of ranks."""
    if world.size == 1:
        return
    first, *others = world.gather(accumulator.state())
    accumulator.restore(first)
    for state in others:
        accumulator.merge(accumulator.with_state(state))
