"""Class names and labels: a data set's classes matched with a model's, and labels as numbers."""

from __future__ import annotations

import functools
import logging
import math
import numbers
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from timm.data import ImageNetInfo
from timm.utils.misc import natural_key
from torch.utils.data import Subset

UNLABELLED = -1
_SYNSET = re.compile(r"n\d{8}")
_BY_NUMBER = "classes_by='number' takes them by number"

logger = logging.getLogger("fastkd")


class LabelError(ValueError):
    """A label that is no class number."""


def is_missing(label: Any) -> bool:
    """Return whether a label is None, or -1 as hubs write it."""
    return label is None or (getattr(label, "ndim", 0) == 0 and bool(label == UNLABELLED))


def class_number(label: Any, where: str) -> int | None:
    """Return a label as an int, or None for None; ``where`` names its sample in errors.

    Floats pass if they are whole, because tables with gaps hold floats; so do arrays and tensors of
    one element. Bools, strings and vectors are a LabelError.
    """
    if label is None:
        return None
    shape = getattr(label, "shape", None)
    value = label.item() if shape is not None and math.prod(shape) == 1 else label
    whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if (whole or (isinstance(value, float) and value.is_integer())) and value >= UNLABELLED:
        return int(value)
    shown = repr(label)
    if shape is not None and math.prod(shape) != 1:
        shown = f"a {type(label).__name__} of shape {list(shape)}"
    elif len(shown) > 60:
        shown = f"{shown[:57]}..."
    hint = " (one-hot or soft labels?)" if shape or isinstance(value, list | tuple) else ""
    raise LabelError(
        f"data: the label of {where} must be a whole number, from 0 (-1: none), got {shown}{hint}"
    )


def number_classes(names: Iterable[str]) -> dict[str, int]:
    """Number class names in natural order, as timm does.

    Raise a ValueError for two that look the same, as macOS and others write letters with accents.
    """
    ordered = sorted(names, key=natural_key)
    spelled: dict[str, str] = {}
    for name in ordered:
        if (other := spelled.setdefault(_spelled(name), name)) != name:
            raise ValueError(f"data: two classes look the same: {other!a} and {name!a}")
    return {name: number for number, name in enumerate(ordered)}


def _spelled(name: str) -> str:
    """A name in one of the ways in which Unicode writes letters with accents."""
    return unicodedata.normalize("NFC", name)


def map_classes(
    classes: Mapping[str, int], training: Mapping[str, int], place: str | os.PathLike[str]
) -> dict[int, int]:
    """Map each class number of an evaluation set to the training set's number of that name.

    A class without evaluation images then shifts no label. Raise a ValueError that names the
    folder ``place`` where it has classes that the training set lacks.
    """
    numbers = {_spelled(name): number for name, number in training.items()}
    unknown = [name for name in classes if _spelled(name) not in numbers]
    if unknown:
        raise ValueError(f"data: {place} has classes that the training set lacks: {unknown[:5]}")
    return {number: numbers[_spelled(name)] for name, number in classes.items()}


def class_names(dataset: Any) -> dict[int, str]:
    """Names of a dataset's classes by label; empty where it has none.

    They come from ``classes`` or ``class_to_idx`` of the dataset or its reader. Synonyms, which
    torchvision's ImageNet has, are joined as in timm's descriptions.
    """
    if not getattr(dataset, "labelled", True):
        return {}
    while isinstance(dataset, Subset):
        dataset = dataset.dataset
    indices = getattr(getattr(dataset, "reader", dataset), "class_to_idx", None)
    names: dict[int, list[Any]] = {}
    for name, label in indices.items() if isinstance(indices, Mapping) else ():
        if isinstance(label, numbers.Integral):
            names.setdefault(int(label), []).append(name)
    classes = getattr(dataset, "classes", None)
    plain = bool(names) and sorted(names) == list(range(sum(map(len, names.values()))))
    # Labels with gaps or synonyms: a list is by label, if it is long enough.
    if not plain and isinstance(classes, list | tuple) and len(classes) > max(names, default=-1):
        names = {
            label: list(name) if isinstance(name, list | tuple) else [name]
            for label, name in enumerate(classes)
        }
    return {label: ", ".join(map(str, names[label])) for label in sorted(names)}


@dataclass(frozen=True)
class Classes:
    """The classes of a data set or a model.

    Attributes:
        names: by label, each with as many as it goes by; empty where none are known.
        count: of all classes, named or not; None: unknown.
        guessed: the names are those of the ImageNet that has as many classes.
    """

    names: Mapping[int, tuple[str, ...]] = field(default_factory=dict)
    count: int | None = None
    guessed: bool = False

    @classmethod
    def of_data(cls, dataset: Any, count: int | None) -> Classes:
        """The classes of a dataset, which has ``count`` of them as far as it says."""
        names = class_names(dataset)
        return cls({label: (name,) for label, name in names.items()}, count or len(names) or None)

    def aliases(self, label: int) -> tuple[str, ...]:
        """All names of a class: those that are given, and descriptions of WordNet's synsets."""
        given = tuple(map(_spelled, self.names.get(label, ())))
        return (*given, *(text for name in given for text in _descriptions(name)))

    def labels(self) -> dict[str, set[int]]:
        """Labels by all names of their classes."""
        found: dict[str, set[int]] = {}
        for label in self.names:
            for name in self.aliases(label):
                found.setdefault(name, set()).add(label)
        return found

    def listed(self, labels: Iterable[int] | None = None) -> str:
        """Three classes by name, for messages."""
        names = [repr(self.names[label][0]) for label in labels or self.names]
        return ", ".join(names[:3] + ["..."] * (len(names) > 3))

    def differences(self, other: Classes, of: tuple[str, str]) -> str:
        """The first three labels that mean different classes; empty where none does."""
        labels = [n for n in self.names if not {*self.aliases(n)} & {*other.aliases(n)}]
        return "; ".join(
            f"{n} is {self.names[n][0]!r} in the {of[0]}, "
            f"{other.names.get(n, (None,))[0]!r} in the {of[1]}"
            for n in labels[:3]
        )


@functools.cache
def _synsets() -> tuple[ImageNetInfo, dict[str, str]]:
    """Descriptions of WordNet's synsets, and second names of those that share one in ImageNet."""
    info, again = ImageNetInfo(), {}
    seen = Counter[str]()
    for synset in info.label_names():
        text = info.label_name_to_description(synset)
        seen[text] += 1
        if seen[text] > 1:
            again[synset] = f"{text}{seen[text]}"  # as on Hugging Face: crane and crane2
    return info, again


def _descriptions(name: str) -> tuple[str, ...]:
    if not _SYNSET.fullmatch(name):
        return ()
    info, again = _synsets()
    try:
        text = info.label_name_to_description(name)
    except KeyError:
        return ()
    return (text, again[name]) if name in again else (text,)


def match_classes(
    data: Classes,
    model: Classes,
    *,
    by: str = "name",
    caller: str = "evaluate",
    of: tuple[str, str] = ("data", "model"),
    quiet: bool = False,
) -> dict[int, int] | None:
    """Map the labels of a data set to a model's: by name where both have names.

    None keeps the numbers: where they are asked for, or, which a line says unless ``quiet``, where
    a side has no names. Guessed names do not count where no class of the other side has one of
    them. ``of`` is what messages call the sides.

    Raises:
        ValueError: some of the data's classes are not among the model's; or, by number, the model
            has fewer classes, or not as many as the data have names for.
    """
    if by not in ("name", "number"):
        raise ValueError(f"{caller}: classes_by must be 'name' or 'number', got {by!r}")
    mine, theirs = of
    by_name = by == "name" and bool(data.names) and bool(model.names)
    labels = model.labels() if by_name else {}
    found = {label: _found(data, label, labels) for label in data.names} if by_name else {}
    known = {label: number for label, number in found.items() if number is not None}
    if by_name and (known or not (data.guessed or model.guessed)):
        if len(known) == len(found):
            return known
        unknown = [label for label in found if label not in known]
        raise ValueError(
            f"{caller}: {len(unknown)} of the {len(found)} classes of the {mine} are not among "
            f"those of the {theirs}: {data.listed(unknown)} (the {theirs} has "
            f"{model.listed()}); {_BY_NUMBER}"
        )
    if data.count is not None and model.count is not None and data.count > model.count:
        raise ValueError(
            f"{caller}: the {theirs} has {model.count} logits for the {data.count} classes of the "
            f"{mine}"
        )
    if by == "name":
        nameless = [side for side, c in ((mine, data), (theirs, model)) if not c.names]
        reason = f"no class names of the {' and the '.join(nameless)}"
        if by_name:
            reason = f"not of ImageNet: {(model if data.guessed else data).listed()}"
        # The numbers of named classes come from their order, and mean nothing among more.
        if data.names and None not in (data.count, model.count) and data.count != model.count:
            raise ValueError(
                f"{caller}: the {theirs} has {model.count} logits for the {data.count} classes of "
                f"the {mine} ({reason}); {_BY_NUMBER}"
            )
        if not quiet:
            logger.warning(
                "%s: classes are taken by number, %s of the %s and %s of the %s (%s)",
                *(caller, data.count or "?", mine, model.count or "?", theirs, reason),
            )
    return None


def require_same_classes(
    data: Classes, model: Classes, *, by: str, caller: str, of: tuple[str, str], quiet: bool
) -> None:
    """Raise a ValueError where the same logit of two models means different classes."""
    if None not in (data.count, model.count) and data.count != model.count:
        raise ValueError(
            f"{caller}: logits are compared class by class, but the {of[1]} has {model.count} "
            f"classes, the {of[0]} {data.count}"
        )
    if match_classes(data, model, by=by, caller=caller, of=of, quiet=quiet) is not None:
        differences = data.differences(model, of)
        if differences:
            raise ValueError(
                f"{caller}: the classes of the {of[1]} are in another order than those of the "
                f"{of[0]}: {differences}; {_BY_NUMBER}"
            )


def _found(data: Classes, label: int, labels: Mapping[str, set[int]]) -> int | None:
    """The model's label of a class; None if there is none, or several and none is its own."""
    for names in (map(_spelled, data.names[label]), data.aliases(label)):
        candidates = {number for name in names for number in labels.get(name, ())}
        if len(candidates) == 1:
            return next(iter(candidates))
        if label in candidates:
            return label
    return None
