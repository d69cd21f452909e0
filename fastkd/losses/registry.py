"""Losses and projectors by the names that recipes and the command line use."""

# torch and pydantic are imported where they are needed: `fastkd train --help` must answer at once.

from __future__ import annotations

import importlib
import inspect
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from fastkd.utils.hints import suggestion

if TYPE_CHECKING:
    from fastkd.losses.base import FeatureTerm, Key, LogitTerm, Pairs, ResampleMode


@dataclass(frozen=True)
class Loss:
    """A loss: the class that computes it, its source, and the weight that its authors use."""

    name: str  # in recipes
    module: str  # of fastkd.losses
    class_name: str
    source: str
    weight: str  # the authors', at this reduction; scales differ by a factor of 10,000
    summary: str
    whole_ce: bool = False  # the authors add it to the whole cross-entropy

    def load(self) -> Any:
        """Import the class."""
        return _load(self.module, self.class_name)

    @property
    def projects(self) -> bool:
        """Whether it brings the widths together itself, so that no projector may."""
        from fastkd.losses.base import FeatureTerm

        return issubclass(self.load(), FeatureTerm)


@dataclass(frozen=True)
class Projector:
    """A map from the student's width to the teacher's."""

    name: str  # in recipes
    summary: str
    source: str
    learned: bool = True  # it has parameters
    stays: bool = False  # the student needs it at inference


# fmt: off
LOGIT_LOSSES = (
    Loss("soft", "logit", "SoftKD", "arXiv 1503.02531", "alpha 0.9 (arXiv 2511.15572)",
         "KL divergence of softened class probabilities, times tau^2"),
    Loss("hard", "logit", "HardKD", "arXiv 2012.12877 (DeiT)", "alpha 0.5",
         "cross-entropy against the teacher's arg max"),
    Loss("dkd", "logit", "DKD", "arXiv 2203.08679", "alpha 1 with ce_weight 1",
         "KL split into the target class and the others, each weighted", whole_ce=True),
    Loss("nkd", "logit", "NKD", "arXiv 2303.13005", "alpha 1 with ce_weight 1",
         "target class weighted by the teacher, others normalized", whole_ce=True),
    Loss("dist", "logit", "DIST", "arXiv 2205.10536", "alpha 1 with ce_weight 1",
         "Pearson correlation within an image and within a class", whole_ce=True),
)

FEATURE_LOSSES = (
    Loss("mse", "feature", "MapDistance", "arXiv 1412.6550", "0.2 (arXiv 2511.15572)",
         "mean squared difference of tokens; FitNets with projector linear"),
    Loss("spectral", "feature", "MapDistance", "arXiv 2412.19055", "0.2",
         "mean squared difference of the maps' 2-d spectra (SpectralKD)"),
    Loss("smooth_l1", "feature", "MapDistance", "arXiv 1504.08083", "1 in VkD, on pooled tokens",
         "Huber distance of tokens"),
    Loss("cosine", "feature", "MapDistance", "-", "none published at this reduction",
         "1 - cosine of corresponding tokens"),
    Loss("attention", "attention", "AttentionTransfer", "arXiv 1612.03928",
         "1000 for each pair (3000 for the mean of three)",
         "where an image's energy lies (attention transfer); any widths"),
    Loss("rkd", "rkd", "RKD", "arXiv 1904.05068", "1, as the parts have weights of their own",
         "distances and angles between the images of a batch; any widths"),
    Loss("crd", "crd", "CRD", "arXiv 1910.10699, in-batch",
         "0.8 for the original, which adds the two directions",
         "an image's own teacher embedding against those of the batch; any widths"),
    Loss("manifold", "manifold", "ManifoldKD", "arXiv 2107.01378",
         "1, as the parts have weights of their own",
         "similarities of patches: in an image, across images, at random; any widths"),
    Loss("vkd", "vkd", "VkD", "arXiv 2403.06213", "1",
         "distance to the standardized or whitened teacher; with projector orthogonal"),
    Loss("vitkd", "vitkd", "ViTKD", "arXiv 2209.02432", "1 with ce_weight 1",
         "mimic the first blocks, generate the last from masked tokens", whole_ce=True),
)

PROJECTORS = (
    Projector("none", "widths must be equal, or not matter to the loss", "-", learned=False),
    Projector("pool", "averages the wider side's channels", "SpectralKD's code", learned=False),
    Projector("linear", "a Linear per pair", "arXiv 1412.6550 (FitNets)"),
    Projector("mlp", "Linear, GELU, Linear per pair", "arXiv 2312.06709 (AM-RADIO)"),
    Projector("orthogonal", "a Linear per pair with orthonormal columns", "arXiv 2403.06213"),
    Projector("lift", "the student classifies from its lifted tokens, which are compared",
              "arXiv 2511.15572", stays=True),
)
# fmt: on


def create_logit_loss(
    name: str,
    *,
    weight: float = 1.0,
    tau: float | None = None,
    options: Mapping[str, Any] | None = None,
) -> LogitTerm:
    """Build a logit loss by name.

    Args:
        name: of a logit loss (``fastkd losses`` lists them).
        weight: factor of the loss.
        tau: temperature, ignored by losses that have none; None is the loss's default.
        options: other arguments of the loss.

    Returns:
        The loss.
    """
    entry = find_loss(name, LOGIT_LOSSES, "logit_loss")
    check_options(entry, options, "logit_options")
    arguments = {"weight": weight, **(options or {})}
    if tau is not None and has_temperature(entry):
        arguments["tau"] = tau
    return cast("LogitTerm", entry.load()(**arguments))


def create_feature_loss(
    name: str,
    pairs: Pairs,
    *,
    weight: float = 0.2,
    projector: str = "none",
    student_dims: Mapping[Key, int],
    teacher_dims: Mapping[Key, int],
    resample: ResampleMode | None = None,
    options: Mapping[str, Any] | None = None,
) -> FeatureTerm:
    """Build a feature loss over pairs of blocks by name.

    Args:
        name: of a feature loss (``fastkd losses`` lists them).
        pairs: (student key, teacher key).
        weight: factor of the loss.
        projector: one of `PROJECTORS`; "none" for a loss that projects by itself.
        student_dims: channels per student key.
        teacher_dims: channels per teacher key.
        resample: see `FeatureTerm`.
        options: other arguments of the loss.

    Returns:
        The loss; its parameters are on the CPU.

    Raises:
        ValueError: an unknown name or option, or a projector that does not fit.
    """
    entry = find_loss(name, FEATURE_LOSSES, "feature_loss")
    check_options(entry, options, "feature_options")
    arguments: dict[str, Any] = {"pairs": pairs, "weight": weight, "resample": resample}
    arguments |= {"student_dims": student_dims, "teacher_dims": teacher_dims, **(options or {})}
    if not entry.projects:
        term = _load("feature", "FeatureKD")(name, projector=projector, **arguments)
    elif projector == "none":
        term = entry.load()(**arguments)
    else:
        raise ValueError(
            f"projector: {name!r} brings widths together itself, got projector={projector!r}"
        )
    return cast("FeatureTerm", term)


def names(entries: Iterable[Loss | Projector]) -> tuple[str, ...]:
    """List the entries' names, in order."""
    return tuple(entry.name for entry in entries)


def find_loss(name: str, among: Iterable[Loss] | None = None, argument: str = "loss") -> Loss:
    """Look up a loss, or raise with the names there are."""
    known = {loss.name: loss for loss in among or (*LOGIT_LOSSES, *FEATURE_LOSSES)}
    if name not in known:
        raise ValueError(
            f"{argument} must be one of {tuple(known)}, got {name!r}{suggestion(name, known)}"
        )
    return known[name]


def options_of(entry: Loss) -> dict[str, Any]:
    """Get the defaults of what ``logit_options`` or ``feature_options`` may set of a loss."""
    from fastkd.losses.base import Distance, FeatureTerm, LogitTerm

    cls = entry.load()
    if entry.class_name == "MapDistance":  # four losses, of which one has an option
        return {"beta": 1.0} if entry.name == "smooth_l1" else {}
    set_by_caller = {
        LogitTerm: ("weight", "tau"),
        Distance: ("student_dim", "teacher_dim"),
        FeatureTerm: ("pairs", "weight", "student_dims", "teacher_dims", "resample"),
    }
    hidden = next(hidden for kind, hidden in set_by_caller.items() if issubclass(cls, kind))
    parameters = inspect.signature(cls).parameters.values()
    return {p.name: p.default for p in parameters if p.name not in hidden}


def check_options(entry: Loss, options: Mapping[str, Any] | None, argument: str) -> None:
    """Raise for options that a loss does not have, and for values of another type."""
    from pydantic import ConfigDict, TypeAdapter, ValidationError

    known = options_of(entry)
    hints = typing.get_type_hints(entry.load().__init__)
    for name, value in (options or {}).items():
        if name == "tau" and has_temperature(entry):
            raise ValueError(f"{argument}: tau is a field of its own, not an option: tau={value}")
        if name not in known:
            what = f"it has {', '.join(known)}" if known else "it has none"
            raise ValueError(f"{argument}: {entry.name!r} has no option {name!r}; {what}")
        try:
            TypeAdapter(hints[name], config=ConfigDict(strict=True)).validate_python(value)
        except ValidationError as error:
            reason = error.errors()[0]["msg"]
            raise TypeError(
                f"{argument}: {name} of {entry.name!r}: {reason}, got {value!r}"
            ) from None


def has_temperature(entry: Loss) -> bool:
    """Whether a logit loss has a temperature tau."""
    return "tau" in inspect.signature(entry.load()).parameters


def _load(module: str, class_name: str) -> Any:
    # By name: the modules of the losses may import this one.
    return getattr(importlib.import_module(f"fastkd.losses.{module}"), class_name)
