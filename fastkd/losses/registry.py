"""What losses and projectors there are, under the names that recipes and the command line use.

Told without importing torch, so that ``fastkd losses`` and ``fastkd train --help`` answer at once;
the classes themselves are imported when they are built.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Loss:
    """One loss of the catalogue.

    Attributes:
        name: what a recipe calls it.
        path: ``module:Class`` of what computes it.
        summary: what it compares, in a line.
        source: where it comes from.
        weight: what its authors multiply it with, at this reduction and beside which
            cross-entropy; scales differ by a factor of 10,000.
        projects: whether it brings the widths together itself, so that no projector may.
        whole_ce: whether its authors add it to the whole cross-entropy.
    """

    name: str
    path: str
    summary: str
    source: str
    weight: str
    projects: bool = False
    whole_ce: bool = False

    def load(self) -> Any:
        """Import the class."""
        module, _, name = self.path.partition(":")
        return getattr(importlib.import_module(module), name)


@dataclass(frozen=True)
class Projector:
    """One way in which a student's channels meet a teacher's of another width.

    Attributes:
        name: what a recipe calls it.
        summary: what it does, in a line.
        learned: whether it has parameters of its own.
        stays: whether the student needs it at inference.
        source: where it comes from.
    """

    name: str
    summary: str
    learned: bool
    stays: bool
    source: str


LOGIT_LOSSES = (
    Loss(
        "soft",
        "fastkd.losses.logit:SoftKD",
        "KL divergence of softened class probabilities, times tau^2",
        "arXiv 1503.02531",
        "alpha 0.9 (arXiv 2511.15572)",
    ),
    Loss(
        "hard",
        "fastkd.losses.logit:HardKD",
        "cross-entropy against the teacher's arg max",
        "arXiv 2012.12877 (DeiT)",
        "alpha 0.5",
    ),
    Loss(
        "dkd",
        "fastkd.losses.logit:DKD",
        "KL split into the target class and the others, each weighted",
        "arXiv 2203.08679",
        "alpha 1 with ce_weight 1",
        whole_ce=True,
    ),
    Loss(
        "nkd",
        "fastkd.losses.logit:NKD",
        "target class weighted by the teacher, others normalised",
        "arXiv 2303.13005",
        "alpha 1 with ce_weight 1",
        whole_ce=True,
    ),
    Loss(
        "dist",
        "fastkd.losses.logit:DIST",
        "Pearson correlation within an image and within a class",
        "arXiv 2205.10536",
        "alpha 1 with ce_weight 1",
        whole_ce=True,
    ),
)

FEATURE_LOSSES = (
    Loss(
        "mse",
        "fastkd.losses.base:MapDistance",
        "mean squared difference of tokens; FitNets with projector linear",
        "arXiv 1412.6550",
        "0.2 (arXiv 2511.15572)",
    ),
    Loss(
        "spectral",
        "fastkd.losses.base:MapDistance",
        "mean squared difference of the maps' 2-d spectra (SpectralKD)",
        "arXiv 2412.19055",
        "0.2",
    ),
    Loss(
        "smooth_l1",
        "fastkd.losses.base:MapDistance",
        "Huber's distance of tokens",
        "arXiv 1504.08083",
        "1 in VkD, on pooled tokens",
    ),
    Loss(
        "cosine",
        "fastkd.losses.base:MapDistance",
        "1 - cosine of corresponding tokens",
        "-",
        "none published at this reduction",
    ),
    Loss(
        "attention",
        "fastkd.losses.attention:AttentionTransfer",
        "where an image's energy lies (attention transfer); any widths",
        "arXiv 1612.03928",
        "1000 for each pair (3000 for the mean of three)",
    ),
    Loss(
        "rkd",
        "fastkd.losses.rkd:RKD",
        "distances and angles between the images of a batch; any widths",
        "arXiv 1904.05068",
        "1, as the parts have weights of their own",
    ),
    Loss(
        "crd",
        "fastkd.losses.crd:CRD",
        "an image's own teacher embedding against those of the batch; any widths",
        "arXiv 1910.10699, in-batch",
        "0.8 for the original, which adds the two directions",
    ),
    Loss(
        "manifold",
        "fastkd.losses.manifold:ManifoldKD",
        "similarities of patches: in an image, across images, at random; any widths",
        "arXiv 2107.01378",
        "1, as the parts have weights of their own",
    ),
    Loss(
        "vkd",
        "fastkd.losses.vkd:VkD",
        "distance to the standardised or whitened teacher; with projector orthogonal",
        "arXiv 2403.06213",
        "1",
    ),
    Loss(
        "vitkd",
        "fastkd.losses.vitkd:ViTKD",
        "mimic the first blocks, generate the last from masked tokens",
        "arXiv 2209.02432",
        "1 with ce_weight 1",
        projects=True,
        whole_ce=True,
    ),
)

PROJECTORS = (
    Projector("none", "widths must be equal, or not matter to the loss", False, False, "-"),
    Projector("pool", "averages the wider side's channels", False, False, "SpectralKD's code"),
    Projector("linear", "a Linear per pair", True, False, "arXiv 1412.6550 (FitNets)"),
    Projector("mlp", "Linear, GELU, Linear per pair", True, False, "arXiv 2312.06709 (AM-RADIO)"),
    Projector(
        "orthogonal", "a Linear per pair with orthonormal columns", True, False, "arXiv 2403.06213"
    ),
    Projector(
        "lift",
        "the student classifies from its lifted tokens, which are compared",
        True,
        True,
        "arXiv 2511.15572",
    ),
)


def names(entries: Iterable[Loss | Projector]) -> tuple[str, ...]:
    """The entries' names, in order."""
    return tuple(entry.name for entry in entries)


def find_loss(name: str) -> Loss:
    """Look a loss up.

    Args:
        name: of a logit or a feature loss.

    Returns:
        Its entry.

    Raises:
        ValueError: there is none; the error lists what there is.
    """
    known = {loss.name: loss for loss in (*LOGIT_LOSSES, *FEATURE_LOSSES)}
    if name not in known:
        close = difflib.get_close_matches(name.lower(), list(known), n=1)
        hint = f" (did you mean {close[0]!r}?)" if close else ""
        raise ValueError(f"no loss {name!r}{hint}; there are: {', '.join(known)}")
    return known[name]
