"""What people call a model's classes.

Knows labels and timm's lists of ImageNet; nothing of models or of images.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from timm.data import ImageNetInfo, infer_imagenet_subset

from fastkd.utils.text import writable

_SYNSET = re.compile(r"n\d{8}")
_WITH_EVERY_SYNSET = ("imagenet1k", "imagenet22k")  # the former has some that the latter has not


def class_descriptions(names: Iterable[str] | None, count: int) -> tuple[str, ...]:
    """A name for every logit.

    Args:
        names: of the classes, as far as the model's run knew them. The numbers of WordNet by which
            ImageNet's folders are called become timm's descriptions.
        count: of the model's logits.

    Returns:
        ``count`` names: the given ones; else, where ``count`` is that of an ImageNet, timm's
        descriptions for it; and numbers where there is none.
    """
    known = _imagenet(count) if names is None else _readable([writable(name) for name in names])
    return tuple(known[:count] + [str(number) for number in range(len(known), count)])


def _imagenet(count: int) -> list[str]:
    subset = infer_imagenet_subset({"num_classes": count})
    return [] if subset is None else ImageNetInfo(subset).label_descriptions()


def _readable(names: list[str]) -> list[str]:
    if not all(_SYNSET.fullmatch(name) for name in names):
        return names
    described: dict[str, str] = {}
    for subset in _WITH_EVERY_SYNSET:
        described |= ImageNetInfo(subset).label_descriptions(as_dict=True)
    return [described.get(name, name) for name in names]
