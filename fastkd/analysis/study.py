"""Measure one model on one selection of images: two streamed passes, merged over processes.

The first pass takes spectra, second moments and frequency patterns of every layer; the second one
looks at the images again in the basis that the first one found. What is kept between batches are
accumulators, and the tokens for the second pass where they fit into the memory given for them.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import torch
from torch import Tensor

from fastkd.analysis.accumulators import Accumulator
from fastkd.analysis.accumulators.image_spectra import ImageSpectra
from fastkd.analysis.accumulators.sep import TokenPattern
from fastkd.analysis.accumulators.shared_basis import SUBSPACES, InSharedBasis, SecondMoment
from fastkd.analysis.results import LayerResult, ModelResult
from fastkd.analysis.tokens import Batch, TokenSource
from fastkd.models.weights import UnreadableError, read_file
from fastkd.ops.checks import levels_of
from fastkd.ops.sep import CONVENTIONS
from fastkd.ops.spectrum import LEVELS, MOST_LEVELS
from fastkd.ops.threads import each
from fastkd.utils.arguments import check_numbers
from fastkd.utils.distributed import StopRequest, World
from fastkd.utils.io import replacing
from fastkd.utils.progress import Progress

SAVE_EVERY_SECONDS = 60.0

SHARED = ("last", "all", "none")
_PASSES = {"first": "spectra", "second": "shared basis"}
NO_PATTERN: Final = "none"
_GIGABYTE = 1e9
_NAMED_IMAGES = 3  # unreadable ones that an error lists


@dataclass(frozen=True)
class Settings:
    """What is measured; everything that two reports must have in common to be compared.

    Attributes:
        levels: parts of the energy at which ranks are read.
        convention: of the frequency pattern (SEP): ``"full"``, ``"folded"``, or ``"none"`` to leave
            it out.
        permutations: of the channels, for the pattern's test; 0 leaves it out.
        subspaces: dimensions k at which rotation is measured.
        shared: layers that get a second pass: ``"last"``, ``"all"`` or ``"none"``.
        centred: subtract the data set's mean token in the second pass.
        seed: of permutations and bootstrap samples.
        memory: GB of tokens that may be kept for the second pass, over all processes.
        max_unreadable: part of the images that may be unreadable.
    """

    levels: tuple[float, ...] = LEVELS
    convention: Literal["full", "folded", "none"] = "full"
    permutations: int = 100
    subspaces: tuple[int, ...] = SUBSPACES
    shared: str = "last"
    centred: bool = False
    seed: int = 0
    memory: float = 0.5
    max_unreadable: float = 0.05

    def __post_init__(self) -> None:
        levels_of("analyze", self.levels, "levels")
        if len(self.levels) > MOST_LEVELS:
            raise ValueError(
                f"analyze: levels may be {MOST_LEVELS} at most, got {len(self.levels)}"
            )
        known = (*CONVENTIONS, NO_PATTERN)
        if self.convention not in known:
            raise ValueError(f"analyze: sep must be one of {known}, got {self.convention!r}")
        if self.shared not in SHARED:
            raise ValueError(f"analyze: shared must be one of {SHARED}, got {self.shared!r}")
        for k in self.subspaces:
            check_numbers("analyze", subspaces=(k, 1))
        check_numbers(
            "analyze",
            permutations=(self.permutations, 0),
            memory=(self.memory, 0.0),
            max_unreadable=(self.max_unreadable, 0.0, 1.0),
            seed=(self.seed, 0),
        )


class Study:
    """Measures one source; every process calls `run`.

    Args:
        source: gives the tokens.
        settings: what to measure.
        world: this process among its peers, which share the images.
        resume: where progress is kept.
        progress: shown to the user.
    """

    def __init__(
        self,
        source: TokenSource,
        settings: Settings,
        world: World,
        resume: Resume,
        progress: Progress,
    ) -> None:
        self.source = source
        self.settings = settings
        self.world = world
        self.resume = resume
        self.progress = progress
        self.share = _share(source.images, world)
        depth = len(source.layers)
        self.second = {"last": [depth - 1], "all": list(range(depth)), "none": []}[settings.shared]
        self.skipped: dict[int, tuple[str, str]] = {}
        self.seconds = {"forward": 0.0, "analysis": 0.0}
        self.tokens = [0] * depth  # N of every layer
        self._kept: list[tuple[list[int], dict[int, Tensor]]] | None = []
        self._kept_bytes = 0

    def run(self) -> ModelResult:
        """Measure everything."""
        self.resume.open(self.fingerprint)
        with StopRequest() as stop:
            first = self._pass("first", [self._first_measures(i) for i in self._layers()], stop)
            self._merge_first(first, stop)
            second = {
                layer: self._in_shared_basis(first[layer])
                for layer in self.second
                if first[layer]["moment"].tokens
            }
            if second:
                self._second_pass(second, stop)
            self._stop_together(stop)
        return self._result(first, second)

    @cached_property
    def fingerprint(self) -> dict[str, Any]:
        """What the numbers depend on, as plain values.

        Neither the memory for kept tokens nor the limit on unreadable images changes them: a run
        that such a limit stopped can be gone on with after raising it.
        """
        settings = asdict(self.settings)
        del settings["memory"], settings["max_unreadable"]
        return {**settings, **self.source.fingerprint, "name": self.source.name}

    def _layers(self) -> range:
        return range(len(self.source.layers))

    def _first_measures(self, layer: int) -> dict[str, Accumulator]:
        settings = self.settings
        measures: dict[str, Accumulator] = {
            "spectra": ImageSpectra(settings.levels),
            "moment": SecondMoment(settings.centred),
        }
        if settings.convention != NO_PATTERN:
            measures["pattern"] = TokenPattern(settings.convention, detailed=layer in self.second)
        return measures

    def _in_shared_basis(self, measures: dict[str, Any]) -> InSharedBasis:
        with self._timed("analysis"):
            basis = measures["moment"].result()
        return InSharedBasis(basis, self.settings.levels, self.settings.subspaces)

    def _second_pass(self, second: dict[int, InSharedBasis], stop: StopRequest) -> None:
        if self._kept is None:
            measures = [{"shared": second[i]} if i in second else {} for i in self._layers()]
            self._pass("second", measures, stop)
        else:
            self._update_from_kept(second, stop)
        self._stop_together(stop)
        for measure in second.values():
            _merge(measure, self.world)

    def _update_from_kept(self, second: dict[int, InSharedBasis], stop: StopRequest) -> None:
        assert self._kept is not None
        self.progress.start(
            f"{self.source.name}: {_PASSES['second']}", sum(len(p) for p, _ in self._kept)
        )
        for places, tokens in self._kept:
            if stop.received is not None:
                break
            with self._timed("analysis"):
                for layer, measure in second.items():
                    measure.update(tokens[layer], places)
            self.progress.advance(len(places))
        self._kept = None

    def _stop_together(self, stop: StopRequest) -> None:
        """End on every process if one of them was asked to, before any waits for the others."""
        asked_here = stop.received is not None
        if not stop.agree(self.world):
            return
        if self.resume.folder is not None:
            self.progress.close()
            self.progress.write("stopped; the same command with --resume goes on from here")
        if not asked_here:
            raise SystemExit("analyze: another process was asked to stop")
        stop.raise_as_exception()

    def _pass(
        self, name: str, measures: list[dict[str, Any]], stop: StopRequest
    ) -> list[dict[str, Any]]:
        """Stream this process' images through the accumulators, from where it was interrupted."""
        begin, end = self.share
        state = self.resume.state(name)
        if state is not None:
            self._restore(state, measures)
            begin = state["next"]
        if begin > self.share[0]:
            self._kept = None  # tokens of images seen before the interruption are gone
        self.progress.start(
            f"{self.source.name}: {_PASSES[name]}",
            end - self.share[0],
            begin - self.share[0],
            len(self.skipped),
        )
        for batch in self._batches(begin, end):
            known = len(self.skipped)  # the second pass meets the first one's again
            with self._timed("analysis"), torch.no_grad():
                self._update(batch, measures, keep=name == "first")
            begin = self._after(batch)
            new = len(self.skipped) - known
            self.progress.advance(len(batch.places) + len(batch.skipped), new)
            if stop.received is not None or self._too_many_unreadable():
                break
            self.resume.save_now_and_then(name, partial(self._state, begin, measures))
        self.resume.save(name, self._state(begin, measures))
        return measures

    def _batches(self, begin: int, end: int) -> Iterator[Batch]:
        batches = iter(self.source.batches(begin, end))
        while True:
            with self._timed("forward"):
                batch = next(batches, None)
            if batch is None:
                return
            yield batch

    def _after(self, batch: Batch) -> int:
        """The first place behind a batch."""
        return max([*batch.places, *(place for place, _, _ in batch.skipped)]) + 1

    def _update(self, batch: Batch, measures: list[dict[str, Any]], keep: bool) -> None:
        self.skipped |= {place: (name, reason) for place, name, reason in batch.skipped}
        if not batch.places:
            return

        def update(layer: int) -> None:
            tokens = batch.tokens[layer]
            self.tokens[layer] = max(self.tokens[layer], tokens.shape[1])
            for accumulator in measures[layer].values():
                accumulator.update(tokens, batch.places)

        # The last layer has most to measure: begun first, it is not what all wait for.
        each(update, self._layers()[::-1], batch.tokens[0].device)
        if keep and self._kept is not None:
            self._keep(batch)

    def _keep(self, batch: Batch) -> None:
        """Keep the tokens of the second pass, or none at all if they would take too much memory."""
        assert self._kept is not None
        tokens = {layer: batch.tokens[layer] for layer in self.second}
        self._kept_bytes += sum(x.numel() * x.element_size() for x in tokens.values())
        images = self.share[1] - self.share[0]
        seen = sum(len(places) for places, _ in self._kept) + len(batch.places)
        allowed = self.settings.memory * _GIGABYTE / self.world.size
        if self._kept_bytes * images / seen > allowed:
            self._kept = None
            return
        # A copy: a view without the class token would keep the whole sequence alive.
        self._kept.append((batch.places, {layer: x.clone() for layer, x in tokens.items()}))

    def _merge_first(self, first: list[dict[str, Any]], stop: StopRequest) -> None:
        self._stop_together(stop)
        self._merge_counts()
        with self._timed("analysis"):
            for measures in first:
                for accumulator in measures.values():
                    _merge(accumulator, self.world)

    def _merge_counts(self) -> None:
        """Bring together what all processes skipped, and how many tokens their images have."""
        seen = self.world.gather((self.skipped, self.tokens))
        self.skipped = {place: why for skipped, _ in seen for place, why in skipped.items()}
        self.tokens = [max(tokens[layer] for _, tokens in seen) for layer in self._layers()]
        if self._too_many_unreadable():
            raise RuntimeError(
                f"analyze: {len(self.skipped)} of {self.source.images} images could not be read, "
                f"more than the {100 * self.settings.max_unreadable:g} % allowed by max_unreadable"
                f"{self._unreadable_names()}{self._how_to_allow()}"
            )
        if not any(self.tokens):
            raise RuntimeError(f"analyze: no image could be read{self._unreadable_names()}")

    def _too_many_unreadable(self) -> bool:
        return len(self.skipped) > self.settings.max_unreadable * self.source.images

    def _how_to_allow(self) -> str:
        kept = self.resume.folder is not None
        return "; with a larger limit, give resume (--resume) to go on from here" if kept else ""

    def _unreadable_names(self) -> str:
        named = [f"{name} ({why})" for name, why in list(self.skipped.values())[:_NAMED_IMAGES]]
        more = len(self.skipped) - len(named)
        return ": " + "; ".join(named) + (f"; and {more} more" if more > 0 else "")

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

    def _timed(self, part: str) -> _Timer:
        return _Timer(self.seconds, part)

    def _result(self, first: list[dict[str, Any]], second: dict[int, InSharedBasis]) -> ModelResult:
        with self._timed("analysis"):
            layers = each(
                lambda i: self._layer_result(i, first[i], second.get(i)),
                self._layers(),
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
        pattern: TokenPattern | None = measures.get("pattern")
        if pattern is not None and not pattern.tokens:
            pattern = None
        test = None
        if pattern is not None and pattern.detailed and self.settings.permutations > 0:
            test = pattern.permutation_test(self.settings.permutations, seed=self.settings.seed)
        return LayerResult(
            name=layer.name,
            index=layer.index,
            tokens=self.tokens[number],
            channels=layer.channels,
            ranks=spectra.ranks,
            curve=spectra.curve,
            effective_rank=spectra.effective_rank,
            stable_rank=spectra.stable_rank,
            shared_energies=_energies(measures["moment"], layer.channels, shared),
            sep=None if pattern is None else pattern.result(),
            sep_test=test,
            shared=None if shared is None else shared.result(),
        )


def _energies(moment: SecondMoment, channels: int, shared: InSharedBasis | None) -> np.ndarray:
    if moment.tokens == 0:
        return np.full(channels, np.nan)
    energies = moment.energies() if shared is None else shared.basis.energies
    return energies.cpu().numpy()


class _Timer:
    """Adds the seconds of a block to a part."""

    def __init__(self, seconds: dict[str, float], part: str) -> None:
        self.seconds = seconds
        self.part = part

    def __enter__(self) -> None:
        self.begin = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self.seconds[self.part] += time.perf_counter() - self.begin


def _share(images: int, world: World) -> tuple[int, int]:
    """This process' places, in whole pairs: partners 2 t and 2 t + 1 stay together."""
    pairs = (images + 1) // 2
    ends = [2 * (pairs * rank // world.size) for rank in (world.rank, world.rank + 1)]
    return min(ends[0], images), min(ends[1], images)


def _merge(accumulator: Accumulator, world: World) -> None:
    """Make an accumulator hold what those of all processes have seen, in the order of ranks."""
    if world.size == 1:
        return
    first, *others = world.gather(accumulator.state())
    accumulator.restore(first)
    for state in others:
        accumulator.merge(accumulator.with_state(state))


class Resume:
    """Keeps the state of the passes over one model's images.

    Args:
        folder: where; None keeps nothing.
        name: of the model's files.
        rank: this process.
        size: number of processes.
        wanted: whether to go on with what is there; else every pass starts anew and writes over it.
    """

    def __init__(
        self, folder: Path | None, name: str, rank: int = 0, size: int = 1, wanted: bool = False
    ) -> None:
        self.folder = folder
        self.wanted = wanted
        self._suffix = f"-{rank}of{size}.pt"
        self._name = name
        self._size = size
        self._fingerprint = ""
        self._saved = time.monotonic()

    def open(self, fingerprint: dict[str, Any]) -> None:
        """Say what the passes depend on, before the first of them."""
        self._fingerprint = plain_json(fingerprint)
        if self.folder is None or not self.wanted:
            return
        left = {path.name.rsplit("-", 1)[1] for path in self.folder.glob(f"{self._name}-*-*of*.pt")}
        others = {name.removesuffix(".pt").split("of")[1] for name in left} - {str(self._size)}
        if others:
            raise ValueError(
                f"analyze: {self.folder} was interrupted with {others.pop()} process(es); resume "
                f"with as many, got {self._size}, or remove it to start over"
            )

    def state(self, phase: str) -> dict[str, Any] | None:
        """What was saved of a pass."""
        if self.folder is None or not self.wanted or not self._path(phase).exists():
            return None
        path = self._path(phase)
        try:
            saved = read_file(path)
            before, state = saved["fingerprint"], saved["state"]
        except (UnreadableError, KeyError, TypeError) as error:
            raise ValueError(
                f"analyze: {path} cannot be read ({type(error).__name__}); remove it to start over"
            ) from error
        if before != self._fingerprint:
            what = difference(before, self._fingerprint)
            raise ValueError(
                f"analyze: {path} belongs to another analysis ({what}); give the same arguments, "
                f"or remove {path.parent} to start over"
            )
        return state

    def save(self, phase: str, state: dict[str, Any]) -> None:
        """Keep the state of a pass."""
        if self.folder is None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        with replacing(self._path(phase)) as file:
            torch.save({"fingerprint": self._fingerprint, "state": state}, file)
        self._saved = time.monotonic()

    def save_now_and_then(self, phase: str, make_state: Callable[[], dict[str, Any]]) -> None:
        """`save` if the last one is a minute ago."""
        if time.monotonic() - self._saved >= SAVE_EVERY_SECONDS:
            self.save(phase, make_state())

    def _path(self, phase: str) -> Path:
        assert self.folder is not None
        return self.folder / f"{self._name}-{phase}{self._suffix}"


def plain_json(fingerprint: dict[str, Any]) -> str:
    """A fingerprint as text, the same for equal ones."""
    return json.dumps(fingerprint, sort_keys=True, default=str)


def difference(before: str, now: str) -> str:
    """The first thing in which two fingerprints differ, in words."""
    old, new = _flat(json.loads(before)), _flat(json.loads(now))
    names = [name for name in {**old, **new} if old.get(name) != new.get(name)]
    name = names[0]
    return f"its {name} is {_short(old.get(name))}, not {_short(new.get(name))}"


def _flat(fingerprint: dict[str, Any]) -> dict[str, Any]:
    """Nested values by their own names: ``selection.images``; the plain ones first."""
    inner = [
        (f"{outer}.{name}", value)
        for outer, values in fingerprint.items()
        if isinstance(values, dict)
        for name, value in values.items()
    ]
    return {n: v for n, v in fingerprint.items() if not isinstance(v, dict)} | dict(inner)


def _short(value: Any, length: int = 60) -> str:
    text = str(value)
    return text if len(text) <= length else text[: length - 3] + "..."
