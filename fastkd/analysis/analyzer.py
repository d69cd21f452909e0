"""`analyze`: from what a user names to a report. Opens models and data, runs a study of each."""

from __future__ import annotations

import platform
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from fastkd.analysis.accumulators.shared_basis import SUBSPACES
from fastkd.analysis.arrays import ArraySource, is_array_folder
from fastkd.analysis.images import ImageSelection, open_images
from fastkd.analysis.report import Report, check_comparable
from fastkd.analysis.study import Resume, Settings, Study, difference, plain_json
from fastkd.analysis.tokens import LayerChoice, ModelSource, TokenSource, resolve
from fastkd.checkpoint import LAST
from fastkd.data.datasets import Data
from fastkd.data.loader import default_workers
from fastkd.models.weights import verifying
from fastkd.ops.environment import version
from fastkd.ops.sep import LEVELS as BANDWIDTH_LEVELS
from fastkd.ops.spectrum import LEVELS
from fastkd.utils.arguments import LARGEST_IMAGE, MOST_WORKERS, check_numbers, refuse_blank
from fastkd.utils.distributed import World, world
from fastkd.utils.io import remove_leftovers, write_text
from fastkd.utils.progress import Progress

RESUME_FOLDER = "resume"
REPORT = "report.json"
Model = str | Path | nn.Module


def analyze(
    model: Model | Sequence[Model],
    data: Data | None = None,
    output: str | Path | None = None,
    *,
    compare: Sequence[Model] = (),
    layers: LayerChoice = "all",
    images: int | None = 1000,
    checkpoint: str | Path | None = None,
    untrained: bool = False,
    weights: str = "auto",
    levels: float | Sequence[float] = LEVELS,
    sep: Literal["full", "folded", "none"] = "full",
    permutations: int = 100,
    subspaces: int | Sequence[int] = SUBSPACES,
    shared: str = "last",
    centred: bool = False,
    compare_paper: bool = False,
    seed: int = 0,
    max_unreadable: float = 0.05,
    memory: float = 0.5,
    resume: bool = False,
    figures: bool = True,
    device: str | torch.device | None = None,
    amp: str = "none",
    batch_size: int = 16,
    workers: int | None = None,
    img_size: int | None = None,
    data_root: str | None = None,
    num_prefix: int = 0,
    quiet: bool = False,
    verify: bool = True,
    command: str | None = None,
) -> Report:
    r"""What do the features of these models look like? Measured in one streamed run.

    The measurements of arXiv 2511.15572: per-image rank@q, effective and stable rank of every
    layer; the token spectral energy pattern (SEP) with its white-noise baseline and permutation
    test; the data-set basis, the dimensions of it that every image needs, and how far each image's
    own subspace turns away from it and from other images'. Nothing but accumulators is kept: memory
    does not grow with the number of images, except for ranks and curves of each, and for tokens of
    the second pass as far as ``memory`` allows; beyond that, images are fed a second time.

    Under torchrun the images are shared between the processes; the numbers are those of one.

    Args:
        model: a timm name (pretrained weights are downloaded), a folder or checkpoint of a fastkd
            run, a checkpoint that the paper's authors released, a module (it is moved to the
            device), or the folder of a saved report; or several of them. With saved tokens as data:
            a label.
        data: an image folder (class folders or not, ``val`` is taken), a timm data set name
            (``"hfds/..."``, ``"torch/..."``), a map-style data set, or a folder of saved token
            arrays (.npy, [L, N, D] an image; .npz). Not needed where every model is a saved report.
        output: folder for report.md, report.json, arrays.npz, tables and figures, and, until it is
            done, for what ``resume`` goes on from. A report's files in it are replaced. None: no
            files.
        compare: more models, put beside the first in every table and figure.
        layers: ``"all"`` blocks or stages, the ``"last"`` one, or some: ``"0,5,23"``,
            ``[0, 5, "final"]``, or module names. The lifted tokens of a Lift student count as its
            last layer, ``"final"``.
        images: how many, as many of every class as of any other; None for all.
        checkpoint: local weights for one timm name or module.
        untrained: give timm names random weights, the same each time.
        weights: ``"raw"``, ``"ema"`` or ``"auto"`` of a fastkd run, as in `fastkd.evaluate`.
        levels: parts q of the energy, in (0, 1], up to eight.
        sep: ``"full"`` (all D bins, as the paper's figures), ``"folded"`` (D // 2 + 1 unique bins)
            or ``"none"``.
        permutations: of the channels, for the test of the pattern; 0 leaves it out.
        subspaces: dimensions k at which rotation is measured; those above min(N, D) are left out.
        shared: layers that get the data-set view: the ``"last"`` one, ``"all"`` or ``"none"``.
        centred: subtract the data set's mean token in that view, not from each image's own
            spectrum; the paper does not.
        compare_paper: put the published numbers beside those of models that the paper has.
        seed: of the selection of images, permutations and bootstrap samples.
        max_unreadable: part of the images that may be unreadable before the run stops.
        memory: GB of tokens that may be kept for the second pass.
        resume: go on with an interrupted analysis of the same arguments in ``output``.
        figures: draw them (needs matplotlib).
        device: ``"cpu"``, ``"cuda"``, ``"cuda:1"``; None takes CUDA where there is one.
        amp: ``"none"``, ``"bf16"`` or ``"fp16"``: autocast of the models. Measurements are made on
            what it gives, in float32.
        batch_size: images per forward pass and process.
        workers: processes that read images; None: up to four, as many as there are CPUs.
        img_size: pixels a side, for models that are built for it; None: each model's own.
        data_root: where a named data set keeps its files.
        num_prefix: of module names as layers: tokens at the front that are no patches.
        quiet: show no progress.
        verify: as in `fastkd.evaluate`.
        command: how the run was started, for the report.

    Returns:
        The report, the same on every process.

    Raises:
        ValueError: options, models or data that do not fit; or a folder with an interrupted
            analysis is given without ``resume``.
        RuntimeError: too many images cannot be read, or weights cannot be downloaded.
        ModuleNotFoundError: figures are wanted and matplotlib is not installed.
    """
    settings = Settings(
        levels=(levels,) if isinstance(levels, float) else tuple(levels),
        convention=sep,
        permutations=permutations,
        subspaces=(subspaces,) if isinstance(subspaces, int) else tuple(subspaces),
        shared=shared,
        centred=centred,
        seed=seed,
        memory=memory,
        max_unreadable=max_unreadable,
    )
    check_numbers(
        "analyze",
        images=(images, 1),
        batch_size=(batch_size, 1),
        workers=(workers, 0, MOST_WORKERS),
        img_size=(img_size, 1, LARGEST_IMAGE),
        num_prefix=(num_prefix, 0),
    )
    refuse_blank("analyze", data=data, output=output, checkpoint=checkpoint)
    several = not isinstance(model, str | Path | nn.Module)
    subjects: list[Any] = [*(model if several else [model]), *compare]  # type: ignore[misc]
    _check_arguments(subjects, data, checkpoint, output, resume)
    if figures and output is not None:
        _need_matplotlib()
    with world(device) as peers, verifying(verify):
        feed = _Feed(
            data=data,
            data_root=data_root,
            layers=layers,
            images=images,
            seed=seed,
            batch_size=batch_size,
            workers=default_workers() if workers is None else workers,
            device=peers.device,
            amp=amp,
            num_prefix=num_prefix,
        )
        described = {
            **asdict(settings),
            "data": _data_name(data),
            "images": images,
            "layers": _plain_layers(layers),
            "amp": amp,
            "img_size": img_size,
            "bandwidth_levels": BANDWIDTH_LEVELS,
        }
        saved = {n: Report.load(str(x)) for n, x in enumerate(subjects) if _is_report(x)}
        if len(saved) < len(subjects):  # before anything is measured in vain
            check_comparable(
                "analyze", [described, *(report.settings for report in saved.values())]
            )
        folder = None if output is None else Path(output)
        progress = Progress(shows=peers.is_main and not quiet)
        run = _Run(feed, settings, described, peers, progress, folder, resume)
        own = [
            _options_of(subject, len(subjects) > 1, checkpoint, untrained, weights, img_size)
            for subject in subjects
        ]
        report = Report.merged(
            [
                saved[n] if n in saved else run.report_of(n, subject, **own[n])
                for n, subject in enumerate(subjects)
            ]
        )
        asked = {"compare_paper": compare_paper, "command": command}
        report = replace(report, settings=report.settings | asked)
        if folder is not None and peers.is_main:
            report.save(folder, figures=figures)
            shutil.rmtree(folder / RESUME_FOLDER, ignore_errors=True)
        peers.barrier()
    return report


@dataclass(frozen=True)
class _Feed:
    """The data, opened once, and how every model is fed with them."""

    data: Any
    data_root: str | None
    layers: LayerChoice
    images: int | None
    seed: int
    batch_size: int
    workers: int
    device: torch.device
    amp: str
    num_prefix: int

    @cached_property
    def selection(self) -> ImageSelection:
        """The images, the same for every model."""
        return open_images(self.data, self.data_root, self.images, self.seed)

    def source(self, subject: Model, **options: Any) -> TokenSource:
        """Tokens of one model, or the saved ones under its name."""
        if not is_array_folder(self.data):
            selection = self.selection  # before a model is downloaded in vain
            return ModelSource(
                resolve(subject, **options),
                selection,
                layers=self.layers,
                batch_size=self.batch_size,
                workers=self.workers,
                device=self.device,
                amp=self.amp,
                num_prefix=self.num_prefix,
            )
        self._refuse_model_options(options)
        saved = ArraySource(
            self.data,
            layers=self.layers,
            images=self.images,
            seed=self.seed,
            batch_size=self.batch_size,
            device=self.device,
        )
        saved.name = str(subject)
        return saved

    def _refuse_model_options(self, options: dict[str, Any]) -> None:
        given = options | {"amp": self.amp, "num_prefix": self.num_prefix}
        neutral = {"weights": "auto", "amp": "none"}
        for name, value in given.items():
            if value and value != neutral.get(name):
                raise ValueError(
                    f"analyze: {name} is of models that are run, but {self.data} holds saved "
                    f"tokens, got {name}={value!r}"
                )


class _Run:
    """Measures one model after the other, and keeps what is done until all are.

    Args:
        feed: gives the tokens.
        settings: what is measured.
        described: settings and input as plain values, for the reports.
        peers: this process among others.
        progress: shown to the user.
        folder: of the report; None keeps nothing.
        resume: go on with what an interrupted analysis left there.
    """

    def __init__(
        self,
        feed: _Feed,
        settings: Settings,
        described: dict[str, Any],
        peers: World,
        progress: Progress,
        folder: Path | None,
        resume: bool,
    ) -> None:
        self.feed = feed
        self.settings = settings
        self.described = described
        self.peers = peers
        self.progress = progress
        self.kept = None if folder is None else folder / RESUME_FOLDER
        self.resume = resume
        if peers.is_main and folder is not None:
            self._refuse_to_forget(folder)
            if folder.is_dir():
                remove_leftovers(folder)
            if self.resume and not (folder / RESUME_FOLDER).exists():
                progress.write(f"nothing to resume in {folder}: measuring from the start")
        peers.barrier()

    def _refuse_to_forget(self, folder: Path) -> None:
        if not self.resume and (folder / RESUME_FOLDER).exists():
            raise ValueError(
                f"analyze: {folder} holds an interrupted analysis; give resume=True "
                f"(--resume) to go on with it, or remove {folder / RESUME_FOLDER} to start over"
            )

    def report_of(self, number: int, subject: Model, **options: Any) -> Report:
        """The report of one model: kept from before, or measured now."""
        source = self.feed.source(subject, **options)
        state = Resume(self.kept, f"{number:02}", self.peers.rank, self.peers.size, self.resume)
        study = Study(source, self.settings, self.peers, state, self.progress)
        fingerprint = plain_json(study.fingerprint)
        done = self._kept_report(number, fingerprint)
        if done is not None:
            self.progress.write(f"{source.name}: kept from before")
            return done
        try:
            result = study.run()
        finally:
            self.progress.close()
        report = Report([result], self.described, _environment(self.peers))
        if self.kept is not None and self.peers.is_main:
            report.save(self.kept / f"{number:02}", figures=False)
            # Last: a report without it is not yet whole.
            write_text(self._key(number), fingerprint)
        return report

    def _key(self, number: int) -> Path:
        assert self.kept is not None
        return self.kept / f"{number:02}" / "fingerprint.json"

    def _kept_report(self, number: int, fingerprint: str) -> Report | None:
        """What was measured before the interruption."""
        if not self.resume or self.kept is None or not self._key(number).exists():
            return None
        before = self._key(number).read_text(encoding="utf-8")
        if before != fingerprint:
            raise ValueError(
                f"analyze: {self.kept / f'{number:02}'} was measured with other options "
                f"({difference(before, fingerprint)}); give the same ones to resume, or remove "
                f"{self.kept} to start over"
            )
        return Report.load(self.kept / f"{number:02}")


def _check_arguments(
    subjects: list[Model], data: Any, checkpoint: Any, output: str | Path | None, resume: bool
) -> None:
    measured = [subject for subject in subjects if not _is_report(subject)]
    if not subjects:
        raise ValueError("analyze: expected at least one model, got none")
    if measured and data is None:
        raise ValueError(f"analyze: data is missing: the images to measure {measured[0]} on")
    if checkpoint is not None and len(measured) != 1:
        raise ValueError(
            f"analyze: checkpoint holds the weights of one model, got {len(measured)} models"
        )
    if resume and output is None:
        raise ValueError("analyze: resume needs output, the folder of the interrupted analysis")


def _need_matplotlib() -> None:
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ModuleNotFoundError(
            "analyze: figures need matplotlib: pip install 'fastkd[analysis]', or leave them out "
            "with figures=False (--no-figures)"
        ) from error


def _is_report(subject: Model) -> bool:
    """Whether it is the folder of a saved report; a run that a report lies in is a run."""
    if not isinstance(subject, str | Path) or (Path(subject) / LAST).is_file():
        return False
    return (Path(subject) / REPORT).is_file()


def _options_of(
    subject: Model, several: bool, checkpoint: Any, untrained: bool, weights: str, img_size: Any
) -> dict[str, Any]:
    """What is asked for all models, as far as it means something for one of several.

    Random weights are for timm's names, raw or averaged ones for files; a single model that they
    mean nothing for refuses them.
    """
    is_name = isinstance(subject, str) and not Path(subject).exists()
    return {
        "checkpoint": checkpoint,
        "untrained": untrained and (is_name or not several),
        "weights": "auto" if several and is_name else weights,
        "img_size": img_size,
    }


def _plain_layers(layers: LayerChoice) -> str:
    return layers if isinstance(layers, str) else ",".join(map(str, layers))


def _data_name(data: Any) -> str | None:
    if data is None or isinstance(data, str | Path):
        return None if data is None else str(data)
    return type(data).__name__


def _environment(peers: World) -> dict[str, str]:
    on_gpu = peers.device.type == "cuda"
    return {
        "python": platform.python_version(),
        **{name: version(name) for name in ("fastkd", "torch", "timm", "numpy")},
        "device": torch.cuda.get_device_name(peers.device) if on_gpu else "cpu",
        "processes": str(peers.size),
    }
