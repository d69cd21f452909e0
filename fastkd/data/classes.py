"""Class names and labels: read labels as numbers, and map a data set's classes to a model's."""

from __future__ import annotations

import functools
import logging
import math
import numbers
import re
import reprlib
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from timm.data import ImageNetInfo
from timm.utils.misc import natural_key
from torch.utils.data import Subset

NO_LABEL = -1  # as on Hugging Face's hub
_SYNSET = re.compile(r"n\d{8}")
_BY_NUMBER = "classes_by='number' takes them by number"

# macOS writes accents as letters of their own.
_normalized = functools.partial(unicodedata.normalize, "NFC")

logger = logging.getLogger("fastkd")


class LabelError(ValueError):
    """A label is not a class number."""


def class_number(label: Any, where: str) -> int | None:
    """Return a label as an int, or None for None; ``where`` names its sample in errors.

    Whole floats pass, because tables with gaps hold floats; so do arrays of one element.
    """
    if label is None:
        return None
    shape: Any = getattr(label, "shape", None)
    value = label.item() if shape is not None and math.prod(shape) == 1 else label
    whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if (whole or (isinstance(value, float) and value.is_integer())) and value >= NO_LABEL:
        return int(value)
    hint = " (one-hot or soft labels?)" if shape or isinstance(value, list | tuple) else ""
    raise LabelError(
        f"data: the label of {where} must be a whole number, from 0 (-1: none), got "
        f"{reprlib.repr(label)}{hint}"
    )


def number_classes(names: Iterable[str]) -> dict[str, int]:
    """Number class names in natural order, as timm does; raise for two that look the same."""
    ordered = sorted(names, key=natural_key)
    seen: dict[str, str] = {}
    for name in ordered:
        if (other := seen.setdefault(_normalized(name), name)) != name:
            raise ValueError(f"data: two classes look the same: {other!a} and {name!a}")
    return {name: number for number, name in enumerate(ordered)}


def class_names(dataset: Any) -> dict[int, str]:
    """Return a dataset's class names by label, with synonyms joined; empty where it has none."""
    if not getattr(dataset, "labeled", True):
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
    # torchvision's ImageNet has synonyms, other sets have gaps: then a list is better, if complete.
    if not plain and isinstance(classes, list | tuple) and len(classes) > max(names, default=-1):
        names = {
            label: list(name) if isinstance(name, list | tuple) else [name]
            for label, name in enumerate(classes)
        }
    return {label: ", ".join(map(str, names[label])) for label in sorted(names)}


@dataclass(frozen=True)
class Classes:
    """The classes of a data set or a model."""

    names: Mapping[int, tuple[str, ...]] = field(default_factory=dict)  # by label, with synonyms
    count: int | None = None  # of all classes, named or not; None: unknown
    guessed: bool = False  # the names are those of the ImageNet with as many classes

    @classmethod
    def of_data(cls, dataset: Any, count: int | None) -> Classes:
        """Return the classes of a dataset; ``count`` is what it states, if anything."""
        names = class_names(dataset)
        return cls({label: (name,) for label, name in names.items()}, count or len(names) or None)

    def aliases(self, label: int) -> tuple[str, ...]:
        """Return all names of a class, with the descriptions of WordNet's synsets."""
        given = tuple(map(_normalized, self.names.get(label, ())))
        return (*given, *(text for name in given for text in _descriptions(name)))

    def listed(self, labels: Iterable[int] | None = None) -> str:
        """Return three class names, for messages."""
        names = [repr(self.names[label][0]) for label in labels or self.names]
        return ", ".join(names[:3] + ["..."] * (len(names) > 3))

    def differences(self, other: Classes, of: tuple[str, str]) -> str:
        """List three labels that mean different classes; empty where none does."""
        labels = [n for n in self.names if not {*self.aliases(n)} & {*other.aliases(n)}]
        return "; ".join(
            f"{n} is {self.names[n][0]!r} in the {of[0]}, "
            f"{other.names.get(n, (None,))[0]!r} in the {of[1]}"
            for n in labels[:3]
        )


@functools.cache
def _synsets() -> tuple[ImageNetInfo, dict[str, str]]:
    """Return WordNet's synsets, and second names of those that share a description."""
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
    of: tuple[str, str] = ("data", "model"),  # what messages call the two sides
    quiet: bool = False,
) -> dict[int, int] | None:
    """Map a data set's labels to a model's by name; None keeps the numbers.

    Numbers are kept where ``by`` is "number", and, with a warning, where a side has no names or
    guessed ones of which the other side has none. Raise a ValueError for classes that the model
    lacks, and for numbers that cannot be the same.
    """
    if by not in ("name", "number"):
        raise ValueError(f"{caller}: classes_by must be 'name' or 'number', got {by!r}")
    mine, theirs = of
    by_name = by == "name" and bool(data.names) and bool(model.names)
    found = _find_labels(data, model) if by_name else {}
    unknown = [label for label in data.names if label not in found]
    if by_name and (found or not (data.guessed or model.guessed)):
        if not unknown:
            return found
        # Evaluation and training sets are always matched by name.
        hint = "" if caller == "data" else f"; {_BY_NUMBER}"
        raise ValueError(
            f"{caller}: {len(unknown)} of the {len(data.names)} classes of the {mine} are not "
            f"among those of the {theirs}: {data.listed(unknown)} (the {theirs} has "
            f"{model.listed()}){hint}"
        )
    counts = f"the {theirs} has {model.count} logits for the {data.count} classes of the {mine}"
    known = data.count is not None and model.count is not None
    if known and data.count > model.count:  # type: ignore[operator]
        raise ValueError(f"{caller}: {counts}")
    if by == "number":
        return None
    nameless = [side for side, c in ((mine, data), (theirs, model)) if not c.names]
    reason = f"no class names of the {' and the '.join(nameless)}"
    if by_name:
        reason = f"not of ImageNet: {(model if data.guessed else data).listed()}"
    # The numbers of named classes come from their order, which means nothing among more.
    if data.names and known and data.count != model.count:
        raise ValueError(f"{caller}: {counts} ({reason}); {_BY_NUMBER}")
    if not quiet:
        logger.warning(
            "%s: classes are taken by number, %s of the %s and %s of the %s (%s)",
            *(caller, data.count or "?", mine, model.count or "?", theirs, reason),
        )
    return None


def _find_labels(data: Classes, model: Classes) -> dict[int, int]:
    """Find the model's label of every class, but where it has none or several others."""
    labels: dict[str, set[int]] = {}
    for label in model.names:
        for name in model.aliases(label):
            labels.setdefault(name, set()).add(label)
    found = {}
    for label, given in data.names.items():
        for names in (map(_normalized, given), data.aliases(label)):
            candidates = {number for name in names for number in labels.get(name, ())}
            if len(candidates) == 1 or label in candidates:
                found[label] = label if label in candidates else candidates.pop()
                break
    return found


def require_same_classes(
    data: Classes, model: Classes, *, by: str, caller: str, of: tuple[str, str], quiet: bool
) -> None:
    """Raise a ValueError where the same logit of two models means different classes."""
    if None not in (data.count, model.count) and data.count != model.count:
        raise ValueError(
            f"{caller}: logits are compared class by class, but the {of[1]} has {model.count} "
            f"classes, the {of[0]} {data.count}"
        )
    if match_classes(data, model, by=by, caller=caller, of=of, quiet=quiet) is None:
        return
    if differences := data.differences(model, of):
        raise ValueError(
            f"{caller}: the classes of the {of[1]} are in another order than those of the "
            f"{of[0]}: {differences}; {_BY_NUMBER}"
        )
