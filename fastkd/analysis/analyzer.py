"""`analyze`: measure models on images and write a report."""

from __future__ import annotations

import dataclasses
import platform
import shutil
from collections.abc import Sequence
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn
from typing_extensions import Unpack

from fastkd.analysis.arrays import ArraySource, is_array_folder
from fastkd.analysis.images import ImageSelection, open_images
from fastkd.analysis.report import Report, check_comparable
from fastkd.analysis.resume import Resume, check_same_analysis
from fastkd.analysis.study import AnalyzeOptions, Options, Study, TokenSource
from fastkd.analysis.tokens import ModelSource, open_subject
from fastkd.checkpoint import LAST
from fastkd.data.open_data import Data
from fastkd.inference.evaluate import check_options
from fastkd.models.weights import verifying
from fastkd.ops.environment import version
from fastkd.ops.sep import LEVELS as BANDWIDTH_LEVELS
from fastkd.utils.argument_checks import refuse_blank
from fastkd.utils.distributed import World, world
from fastkd.utils.io import remove_leftovers, write_text
from fastkd.utils.progress import Progress

RESUME_FOLDER = "resume"
FINGERPRINT = "fingerprint.json"  # of a model that was measured completely
Model = str | Path | nn.Module


def analyze(
    model: Model | Sequence[Model],
    data: Data | None = None,
    output: str | Path | None = None,
    *,
    compare: Sequence[Model] = (),
    checkpoint: str | Path | None = None,
    untrained: bool = False,
    weights: str = "auto",
    resume: bool = False,
    figures: bool = True,
    compare_paper: bool = False,
    device: str | torch.device | None = None,
    quiet: bool = False,
    verify: bool = True,
    command: str | None = None,
    **options: Unpack[AnalyzeOptions],
) -> Report:
    """Measure the features of models on images.

    The measurements of arXiv 2511.15572: rank@q, effective and stable rank of every image and
    layer; the token spectral energy pattern (SEP) with white noise and a permutation test; ranks
    and rotation in the basis that all images share. Under torchrun, the processes share the images.

    Args:
        model: a timm name, run folder, checkpoint, export, module (moved to the device), or folder
            of a saved report; or several. With saved tokens as data: a label.
        data: an image folder, a timm dataset name, a map-style dataset, or a folder of saved tokens
            (.npy, [L, N, D] an image; .npz). Not needed for saved reports.
        output: folder for report.md, report.json, arrays.npz, tables and figures; None for no
            files.
        compare: more models, beside the first in every table and figure.
        checkpoint: local weights for one timm name or module.
        untrained: give timm names random weights, the same each time.
        weights: ``"raw"``, ``"ema"`` or ``"auto"`` (the better ones) of a run.
        resume: continue an interrupted analysis of the same arguments in ``output``.
        figures: draw figures (needs matplotlib).
        compare_paper: add tables with the published numbers of models that the paper has.
        device: ``"cpu"``, ``"cuda"``, ``"cuda:1"``; None takes CUDA if there is a device.
        quiet: show no progress.
        verify: refuse weights whose checksum is wrong or missing.
        command: the command line, for the report.
        **options: fields of `Options`: layers, images, levels, sep, seed, batch_size, ...

    Returns:
        The report, the same on every process.

    Raises:
        ValueError: options, models or data do not match, an unknown option, or ``output`` holds an
            interrupted analysis without ``resume``.
        TypeError: an option of another type.
        RuntimeError: too many images cannot be read, or weights cannot be downloaded.
        ModuleNotFoundError: figures need matplotlib.
    """
    refuse_blank("analyze", data=data, output=output, checkpoint=checkpoint)
    several = not isinstance(model, str | Path | nn.Module)
    models = [*(model if several else [model]), *compare]  # type: ignore[misc]
    folder = None if output is None else Path(output)
    check_options("analyze", options, tuple(AnalyzeOptions.__annotations__))
    chosen = Options(**options)
    _check_arguments(models, data, checkpoint, folder, resume, figures)
    with world(device) as peers, verifying(verify):
        progress = Progress(shows=peers.is_main and not quiet)
        run = _Run(data, chosen, peers, progress, folder, resume)
        run.prepare_folder()
        merged = Report.merged(run.reports(models, checkpoint, untrained, weights))
        asked = {"compare_paper": compare_paper, "command": command}
        report = dataclasses.replace(merged, settings=merged.settings | asked)
        if folder is not None and peers.is_main:
            report.save(folder, figures=figures)
            shutil.rmtree(folder / RESUME_FOLDER, ignore_errors=True)
        peers.barrier()
    return report


def _check_arguments(
    models: list[Model], data: Any, checkpoint: Any, folder: Path | None, resume: bool, draw: bool
) -> None:
    measured = [model for model in models if not _is_report(model)]
    if not models:
        raise ValueError("analyze: model: expected at least one model, got none")
    if measured and data is None:
        raise ValueError(f"analyze: data is missing: the images to measure {measured[0]} on")
    if checkpoint is not None and len(measured) != 1:
        raise ValueError(
            f"analyze: checkpoint holds the weights of one model, got {len(measured)} models"
        )
    if resume and folder is None:
        raise ValueError("analyze: resume needs output, the folder of the interrupted analysis")
    if draw and folder is not None and find_spec("matplotlib") is None:
        raise ModuleNotFoundError(
            "analyze: figures need matplotlib: pip install 'fastkd[analysis]', or leave them out "
            "with figures=False (--no-figures)"
        )


def _is_report(model: Model) -> bool:
    # A run's folder stays a run, even if a report was written into it.
    if not isinstance(model, str | Path) or (Path(model) / LAST).is_file():
        return False
    return (Path(model) / "report.json").is_file()


@dataclasses.dataclass
class _Run:
    """Measure one model after the other, and keep their reports until all are done."""

    data: Any
    options: Options
    peers: World
    progress: Progress
    folder: Path | None  # of the report
    resume: bool

    @cached_property
    def selection(self) -> ImageSelection:
        """The images, the same for every model."""
        options = self.options
        return open_images(self.data, options.data_root, options.images, options.seed)

    @property
    def kept(self) -> Path | None:
        """Folder of what an interrupted analysis needs to resume."""
        return None if self.folder is None else self.folder / RESUME_FOLDER

    def prepare_folder(self) -> None:
        """Clean up the folder of the report; refuse to overwrite an interrupted analysis."""
        if self.peers.is_main and self.folder is not None and self.kept is not None:
            if self.kept.exists() and not self.resume:
                raise ValueError(
                    f"analyze: {self.folder} holds an interrupted analysis; give resume=True "
                    f"(--resume) to continue it, or remove {self.kept} to start over"
                )
            if self.folder.is_dir():
                remove_leftovers(self.folder)
            if self.resume and not self.kept.exists():
                self.progress.write(f"nothing to resume in {self.folder}: measuring from the start")
        self.peers.barrier()

    def reports(
        self, models: list[Model], checkpoint: Any, untrained: bool, weights: str
    ) -> list[Report]:
        """Load saved reports and measure the other models."""
        found = {n: Report.load(str(model)) for n, model in enumerate(models) if _is_report(model)}
        settings = self._settings()
        if len(found) < len(models):  # before anything is measured in vain
            others = (report.settings for report in found.values())
            check_comparable("analyze", [settings, *others])
        for number, model in enumerate(models):
            if number not in found:
                opening = _opening(model, len(models) > 1, untrained, weights)
                source = self._source(model, opening | {"checkpoint": checkpoint})
                found[number] = self._report(number, source, settings)
        return [found[number] for number in range(len(models))]

    def _settings(self) -> dict[str, Any]:
        """Return options and data as plain values, for the report."""
        options, data = self.options, self.data
        if data is not None:
            data = str(data) if isinstance(data, str | Path) else type(data).__name__
        layers = options.layers
        names = ("memory", "max_unreadable", "images", "amp", "img_size", "num_prefix")
        return {
            **options.measured,
            **{name: getattr(options, name) for name in names},
            "data": data,
            "layers": layers if isinstance(layers, str) else ",".join(map(str, layers)),
            "bandwidth_levels": BANDWIDTH_LEVELS,
        }

    def _source(self, model: Model, opening: dict[str, Any]) -> TokenSource:
        options = self.options
        opening = opening | {"img_size": options.img_size}
        if not is_array_folder(self.data):
            selection = self.selection  # before a model is downloaded in vain
            subject = open_subject(model, **opening)
            return ModelSource(subject, selection, options, self.peers.device)
        neutral = {"weights": "auto", "amp": "none"}
        given = opening | {"amp": options.amp, "num_prefix": options.num_prefix}
        for name, value in given.items():
            if value and value != neutral.get(name):
                raise ValueError(
                    f"analyze: {name} has no effect on the saved tokens in {self.data}, got "
                    f"{name}={value!r}"
                )
        source = ArraySource(self.data, options, self.peers.device)
        source.name = str(model)
        return source

    def _report(self, number: int, source: TokenSource, settings: dict[str, Any]) -> Report:
        """Load what was measured before the interruption, or measure a model now."""
        peers = self.peers
        state = Resume(self.kept, f"{number:02}", peers.rank, peers.size, self.resume)
        study = Study(source, self.options, peers, state, self.progress)
        folder = None if self.kept is None else self.kept / f"{number:02}"
        if folder is not None and self.resume and (folder / FINGERPRINT).exists():
            before = (folder / FINGERPRINT).read_text(encoding="utf-8")
            check_same_analysis(folder, before, study.fingerprint)
            self.progress.write(f"{source.name}: already measured")
            return Report.load(folder)
        try:
            result = study.run()
        finally:
            self.progress.close()
        report = Report([result], settings, _environment(peers))
        if folder is not None and peers.is_main:
            report.save(folder, figures=False)
            write_text(folder / FINGERPRINT, study.fingerprint)  # a report without it is incomplete
        return report


def _opening(model: Model, several: bool, untrained: bool, weights: str) -> dict[str, Any]:
    if not several:  # `open_subject` refuses options without effect
        return {"untrained": untrained, "weights": weights}
    # Of several models, options apply to those that they have an effect on.
    is_name = isinstance(model, str) and not Path(model).exists()
    return {"untrained": untrained and is_name, "weights": "auto" if is_name else weights}


def _environment(peers: World) -> dict[str, str]:
    on_gpu = peers.device.type == "cuda"
    return {
        "python": platform.python_version(),
        **{name: version(name) for name in ("fastkd", "torch", "timm", "numpy")},
        "device": torch.cuda.get_device_name(peers.device) if on_gpu else "cpu",
        "processes": str(peers.size),
    }
