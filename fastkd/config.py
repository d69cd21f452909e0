"""Recipe: everything a run depends on, in one flat frozen record.

Knows names, types and YAML; not what the values do. The same fields make the keyword overrides of
`fastkd.train`, the keys of ``recipes/*.yaml`` and the flags of ``fastkd train``.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import os
import re
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from fastkd.losses.registry import FEATURE_LOSSES, LOGIT_LOSSES, PROJECTORS, names
from fastkd.utils.io import write_text

IMAGE_FIELDS = ("interpolation", "crop_pct", "crop_mode")


MODULE_PREFIX = "module:"

Key = int | str
Pairs = tuple[tuple[Key, Key], ...]
Options = dict[str, float | int | bool | str | None]  # of a loss, by name

# Fields that say where and how fast a run happens, not what it computes: they may change on resume.
OPERATIONAL_FIELDS = frozenset(
    {
        *("data", "data_root", "workers", "max_unreadable", "max_nonfinite"),
        *("compile", "channels_last"),
        *("eval_batch_size", "log_interval", "track", "checkpoint_interval", "keep_checkpoints"),
    }
)


def _option(default: Any, group: str, help: str, choices: tuple[str, ...] | None = None) -> Any:
    return dataclasses.field(
        default=default, metadata={"group": group, "help": help, "choices": choices}
    )


@dataclass(frozen=True)
class Recipe:
    """A run's settings. Each field's metadata holds its one-line help, its group and its choices.

    Load one with `Recipe.load`, change it with `Recipe.override`, keep it with `Recipe.save`.
    """

    model: str | None = _option("deit_tiny_patch16_224", "student", "timm name of the student")
    variant: str = _option(
        "plain", "student", "student architecture", ("plain", "lift", "widelast", "uniform")
    )
    width: int | None = _option(
        None, "student", "of a variant; none: 384 for lift and widelast, uniform must be given one"
    )
    img_size: int | None = _option(None, "student", "input pixels a side; none: the student's own")
    num_classes: int | None = _option(None, "student", "classes; none: as the data say")
    drop_path: float = _option(0.0, "student", "stochastic depth rate at the last block")

    teacher: str | None = _option(None, "teacher", "timm name, run folder or fastkd checkpoint")
    teacher_checkpoint: str | None = _option(None, "teacher", "local weights for a timm name")
    teacher_img_size: int | None = _option(
        None, "teacher", "pixels a side that images are resized to for it; none: its own"
    )

    alpha: float = _option(0.0, "distillation", "weight of the logit loss")
    ce_weight: float | None = _option(
        None, "distillation", "weight of the cross-entropy; none: 1 - alpha"
    )
    logit_loss: str = _option(
        "soft", "distillation", "distance between logits", names(LOGIT_LOSSES)
    )
    tau: float = _option(1.0, "distillation", "temperature of logit losses that have one")
    logit_options: Options | None = _option(
        None, "distillation", "of the logit loss, as name=value,... (see: fastkd losses NAME)"
    )
    feature_loss: str = _option(
        "mse", "distillation", "distance between token maps", names(FEATURE_LOSSES)
    )
    feature_options: Options | None = _option(
        None, "distillation", "of the feature loss, as name=value,... (see: fastkd losses NAME)"
    )
    feature_weight: float = _option(0.2, "distillation", "weight of the feature loss; 0: none")
    pairs: tuple[tuple[int | str, int | str], ...] = _option(
        ((-1, -1),),
        "distillation",
        "student:teacher blocks, as 0:0,1:1,11:23; from the end: --pairs=-1:-1; of a CNN, stages "
        "as timm counts them, the stem included (ResNet: 0 is the stem, 4 is layer4)",
    )
    student_prefix: int = _option(
        0, "distillation", "tokens that are no patches, in student layers paired by module name"
    )
    teacher_prefix: int = _option(0, "distillation", "likewise, in the teacher's layers")
    projector: str = _option("none", "distillation", "how widths meet", names(PROJECTORS))
    resample: str | None = _option(
        None,
        "distillation",
        "bring the teacher's grid to the student's; none: refuse other grids",
        ("bilinear", "bicubic", "area", "nearest"),
    )

    data: str | None = _option(None, "data", "folder with train/ and val/, or a timm data set name")
    data_root: str | None = _option(None, "data", "where a timm data set name keeps its files")
    labels: bool = _option(
        True,
        "data",
        "false: train on the teacher alone, without cross-entropy; labels may be missing",
    )
    train_samples: int | None = _option(
        None, "data", "images an epoch of streamed data; none: as the data say"
    )
    max_unreadable: int = _option(
        20, "data", "unreadable training images that are replaced before the run stops"
    )
    augment: str = _option(
        "cpu",
        "data",
        "cpu: timm's random transforms; gpu: workers decode and crop, the device does the rest; "
        "none: nothing random; dataset: the data set's own",
        ("cpu", "gpu", "none", "dataset"),
    )
    mean: tuple[float, ...] | None = _option(None, "data", "input mean; none: the student's own")
    std: tuple[float, ...] | None = _option(None, "data", "input std; none: the student's own")
    interpolation: str = _option(
        "bicubic", "data", "of training crops and evaluation", ("bicubic", "bilinear", "random")
    )
    crop_pct: float = _option(0.875, "data", "part of the resized image that evaluation crops")
    crop_mode: str = _option(
        "center", "data", "how evaluation crops, as in timm", ("center", "squash", "border")
    )
    scale: tuple[float, ...] = _option((0.08, 1.0), "data", "area range of training crops")
    ratio: tuple[float, ...] = _option((3 / 4, 4 / 3), "data", "aspect range of training crops")
    hflip: float = _option(0.5, "data", "probability of a horizontal flip")
    color_jitter: float = _option(0.3, "data", "used only where auto_augment is none")
    auto_augment: str | None = _option(
        "rand-m9-mstd0.5-inc1", "data", "timm's auto augment policy string"
    )
    reprob: float = _option(0.25, "data", "probability of random erasing, with pixel noise")
    repeated_aug: int = _option(1, "data", "augmented copies of an image in a batch; DeiT: 3")
    mixup: float = _option(0.0, "data", "Mixup alpha; 0: off")
    cutmix: float = _option(0.0, "data", "CutMix alpha; 0: off")
    mixup_prob: float = _option(1.0, "data", "probability that a batch is mixed at all")
    mixup_switch_prob: float = _option(0.5, "data", "probability of CutMix where both are on")
    workers: int = _option(8, "data", "loader processes per rank; 0: in the main process")

    epochs: int = _option(300, "optimisation", "passes over the training data")
    warmup_epochs: int = _option(5, "optimisation", "epochs of linear warm-up, part of epochs")
    batch_size: int = _option(1024, "optimisation", "images per update, over all ranks")
    accumulation: int = _option(1, "optimisation", "slices that an update's batch is computed in")
    lr: float = _option(5e-4, "optimisation", "learning rate, before lr_scaling")
    lr_scaling: bool = _option(True, "optimisation", "multiply lr by batch_size / 512")
    min_lr: float = _option(1e-5, "optimisation", "where the cosine ends")
    warmup_lr: float = _option(1e-6, "optimisation", "where the warm-up starts")
    weight_decay: float = _option(0.05, "optimisation", "AdamW's; none on 1-d parameters")
    decay_pos_embed: bool = _option(
        False, "optimisation", "decay embeddings too (the released code does, for its own students)"
    )
    eps: float = _option(1e-8, "optimisation", "AdamW's epsilon")
    label_smoothing: float = _option(0.1, "optimisation", "of the cross-entropy")
    clip_grad: float | None = _option(None, "optimisation", "largest gradient norm; none: no limit")
    ema_decay: float | None = _option(0.99996, "optimisation", "of averaged weights; none: off")
    ema_warmup: bool = _option(False, "optimisation", "let the EMA's decay grow to ema_decay")
    amp: str = _option("bf16", "optimisation", "autocast type", ("none", "bf16", "fp16"))
    max_nonfinite: int = _option(
        10, "optimisation", "updates in a row that may be skipped for an infinite or NaN loss"
    )
    compile: str = _option(
        "none",
        "optimisation",
        "torch.compile of student, terms and teacher, by its mode; reduce-overhead: CUDA graphs",
        ("none", "default", "reduce-overhead", "max-autotune"),
    )
    channels_last: bool = _option(
        False, "optimisation", "channels-last memory format, faster for convolutions on a GPU"
    )
    seed: int = _option(0, "optimisation", "of weights, order, augmentation and dropout")

    eval_interval: int = _option(1, "evaluation", "epochs between evaluations; the last always is")
    eval_batch_size: int = _option(256, "evaluation", "images per rank and step")
    best: str = _option("raw", "evaluation", "whose top-1 picks the best epoch", ("raw", "ema"))
    log_interval: int = _option(50, "evaluation", "updates between lines of log.jsonl")
    track: str | None = _option(
        None, "evaluation", "where else metrics go, if installed", ("tensorboard", "wandb", "both")
    )
    keep_checkpoints: int = _option(
        2, "evaluation", "last checkpoints that are kept: last.pth, last-1.pth, ..."
    )
    checkpoint_interval: int = _option(
        0, "evaluation", "updates between checkpoints inside an epoch; 0: at its end only"
    )

    def __post_init__(self) -> None:
        for name, value in self.items():
            object.__setattr__(self, name, _typed(name, value))
        _check_ranges(self)

    @classmethod
    def load(cls, source: str | os.PathLike[str] | Recipe | None) -> Recipe:
        """Read a recipe by name, from a YAML file, or from a run's folder.

        Args:
            source: a name that `names` lists, a path to a YAML file, a run folder, a recipe (given
                back as it is), or None (the defaults).

        Returns:
            The recipe.

        Raises:
            ValueError: no such recipe, an unknown key, or a value of the wrong type.
        """
        if source is None:
            return cls()
        if isinstance(source, Recipe):
            return source
        path = cls.path(source)
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=_RecipeLoader)
        if not isinstance(content, dict):
            raise ValueError(f"Recipe.load: {path} must hold a mapping of fields to values")
        try:
            return cls.from_dict(content)
        except (ValueError, TypeError) as error:
            raise type(error)(f"{path}: {error}") from None

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Recipe:
        """Build a recipe from plain values, the defaults for what is not given.

        Args:
            values: by field name.

        Returns:
            The recipe.

        Raises:
            ValueError: an unknown field or a value out of range.
            TypeError: a value of the wrong type.
        """
        values = _in_todays_words(values)
        _check_names(values)
        return cls(**values)

    @staticmethod
    def names() -> list[str]:
        """Names of the recipes that ship with fastkd."""
        folder = resources.files("fastkd") / "recipes"
        return sorted(Path(e.name).stem for e in folder.iterdir() if e.name.endswith(".yaml"))

    @staticmethod
    def path(source: str | os.PathLike[str]) -> Path:
        """Where a recipe's YAML lies.

        Args:
            source: a shipped name, a YAML file or a run folder.

        Returns:
            The path of an existing file.

        Raises:
            ValueError: there is none.
        """
        given = Path(source)
        shipped = Path(str(resources.files("fastkd") / "recipes" / f"{source}.yaml"))
        for candidate in (shipped, given / "recipe.yaml", given):
            if candidate.is_file():
                return candidate
        raise ValueError(
            f"no recipe {str(source)!r}{_suggestion(str(source), Recipe.names())}; "
            f"there are: {', '.join(Recipe.names())}; or give a YAML file"
        )

    def override(self, **values: Any) -> Recipe:
        """Change fields.

        Args:
            **values: by field name.

        Returns:
            A new recipe.

        Raises:
            ValueError: an unknown field or a value out of range.
            TypeError: a value of the wrong type.
        """
        _check_names(values)
        return dataclasses.replace(self, **values)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write every field as YAML, atomically.

        Args:
            path: the file to write.
        """
        text = yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True)
        write_text(path, text)

    def items(self) -> Iterator[tuple[str, Any]]:
        """Field names and values, in order."""
        for field in dataclasses.fields(self):
            yield field.name, getattr(self, field.name)

    def to_dict(self) -> dict[str, Any]:
        """Plain values (lists for tuples) that `from_dict` takes back."""
        return {name: _plain(value) for name, value in self.items()}

    def differences(self, other: Recipe) -> dict[str, tuple[Any, Any]]:
        """Fields that change what a run computes and differ between two recipes.

        Args:
            other: the recipe to compare with.

        Returns:
            (own value, other's value) by field.
        """
        return {
            name: (value, getattr(other, name))
            for name, value in self.items()
            if name not in OPERATIONAL_FIELDS and value != getattr(other, name)
        }

    @property
    def scaled_lr(self) -> float:
        """The peak learning rate: lr, times batch_size / 512 with lr_scaling."""
        return self.lr * self.batch_size / 512 if self.lr_scaling else self.lr

    @property
    def cross_entropy_weight(self) -> float:
        """What the cross-entropy is multiplied with: ``ce_weight``, or 1 - alpha."""
        return 1 - self.alpha if self.ce_weight is None else self.ce_weight

    @property
    def mixes(self) -> bool:
        """Whether Mixup or CutMix is on."""
        return self.mixup > 0 or self.cutmix > 0


def _in_todays_words(values: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of recipes that were written earlier: ``hard`` is one of several logit losses now."""
    today = dict(values)
    if today.pop("hard", False) is True:
        today["logit_loss"] = "hard"
    return today


def parse_value(name: str, text: str) -> Any:
    """Read a field's value as it is written on the command line.

    Args:
        name: the field.
        text: ``none`` for an optional field's None; ``true``/``false``; numbers; commas between
            the items of a tuple; ``11:23`` or ``0:0,11:23`` for pairs; ``name=value,...`` for
            options.

    Returns:
        The typed value.

    Raises:
        ValueError: no such field, or the text is none of its type.
    """
    _check_names([name])
    kinds = _kinds(name)
    if type(None) in kinds and text.lower() in ("none", "null"):
        return None
    for kind in kinds:
        try:
            return _parse_as(kind, text)
        except ValueError:
            continue
    raise ValueError(f"{name}: expected {_describe(name)}, got {text!r}")


def parse_pairs(text: str) -> Pairs:
    """Read ``"0:0,1:1,11:23"``; what is no integer is a module's name.

    Args:
        text: pairs separated by commas, student and teacher by a colon.

    Returns:
        The pairs.

    Raises:
        ValueError: a pair without its colon.
    """
    return tuple(_pair(map(_number_or_name, part.split(":"))) for part in text.split(","))


def parse_options(text: str) -> Options:
    """Read ``"beta=8,normalize=whiten"``; values are numbers, true, false, none or words.

    Args:
        text: assignments separated by commas.

    Returns:
        Values by name.

    Raises:
        ValueError: a part that is no assignment.
    """
    options: Options = {}
    for part in text.split(","):
        name, equals, value = (piece.strip() for piece in part.partition("="))
        if not (name and equals and value):
            raise ValueError(f"an option is name=value, got {part!r}")
        options[name] = None if value.lower() == "none" else yaml.load(value, _RecipeLoader)
    return _checked_options(options)


def fields_by_group() -> dict[str, list[dataclasses.Field[Any]]]:
    """Recipe fields under the heading of their group, in order."""
    groups: dict[str, list[dataclasses.Field[Any]]] = {}
    for field in dataclasses.fields(Recipe):
        groups.setdefault(field.metadata["group"], []).append(field)
    return groups


class _RecipeLoader(yaml.SafeLoader):
    """Safe loading, and ``1e-5`` is a number, which YAML 1.1 reads as a string."""


_RecipeLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


@lru_cache(maxsize=1)
def _hints() -> dict[str, Any]:
    return typing.get_type_hints(Recipe)


def _kinds(name: str) -> tuple[Any, ...]:
    hint = _hints()[name]
    if hint != Pairs and typing.get_origin(hint) in (typing.Union, types.UnionType):
        return typing.get_args(hint)
    return (hint,)


_WORDS = {
    str: "a string",
    int: "an integer",
    float: "a number",
    bool: "true or false",
    type(None): "none",
    tuple[float, ...]: "a list of numbers",
    Pairs: "pairs of blocks such as 11:23 or [[11, 23]]",
    Options: "options such as beta=8 or {beta: 8}",
}


def _describe(name: str) -> str:
    choices = Recipe.__dataclass_fields__[name].metadata["choices"]
    words = [f"one of {', '.join(choices)}"] if choices else []
    words += [_WORDS[kind] for kind in _kinds(name) if not (choices and kind is str)]
    return " or ".join(words)


def _typed(name: str, value: Any) -> Any:
    """The value as the field keeps it; TypeError names field, expected and got."""
    for kind in _kinds(name):
        try:
            converted = _convert(kind, value)
        except (TypeError, ValueError):
            continue
        choices = Recipe.__dataclass_fields__[name].metadata["choices"]
        if choices and converted is not None and converted not in choices:
            hint = _suggestion(converted, choices)
            raise ValueError(f"{name}: expected {_describe(name)}, got {value!r}{hint}")
        return converted
    raise TypeError(f"{name}: expected {_describe(name)}, got {value!r} ({type(value).__name__})")


def _convert(kind: Any, value: Any) -> Any:
    if kind == Pairs:
        if isinstance(value, str):
            return parse_pairs(value)
        return tuple(_pair(pair) for pair in value)
    if kind == Options:
        return parse_options(value) if isinstance(value, str) else _checked_options(value)
    if kind == tuple[float, ...]:
        if isinstance(value, str):
            raise TypeError
        return tuple(_convert(float, item) for item in value)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise TypeError
    return value


def _parse_as(kind: Any, text: str) -> Any:
    if kind == Pairs:
        return parse_pairs(text)
    if kind == Options:
        return parse_options(text)
    if kind == tuple[float, ...]:
        return tuple(float(part) for part in text.split(","))
    if kind is bool:
        words = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
        if text.lower() not in words:
            raise ValueError
        return words[text.lower()]
    if kind is type(None):
        raise ValueError
    return kind(text)


def _pair(items: Any) -> tuple[Key, Key]:
    keys = () if isinstance(items, str) else tuple(items)
    if len(keys) != 2 or any(isinstance(k, bool) or not isinstance(k, int | str) for k in keys):
        raise ValueError(f"a pair is student:teacher, got {items!r}")
    return keys


def _checked_options(options: Any) -> Options:
    """A copy, none for none; names are words and values scalars."""
    if not isinstance(options, Mapping):
        raise TypeError
    for name, value in options.items():
        if not isinstance(name, str) or not isinstance(value, bool | int | float | str | None):
            raise ValueError(f"an option is a name and a scalar, got {name!r}: {value!r}")
    return dict(options)


def _number_or_name(text: str) -> Key:
    try:
        return int(text)
    except ValueError:
        return text.strip()


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return dict(value)
    return [_plain(item) for item in value] if isinstance(value, tuple) else value


def _check_names(names: typing.Iterable[str]) -> None:
    known = list(Recipe.__dataclass_fields__)
    for name in names:
        if name not in known:
            raise ValueError(f"unknown recipe field {name!r}{_suggestion(name, known)}")


def _suggestion(word: str, known: typing.Iterable[str]) -> str:
    close = difflib.get_close_matches(word, list(known), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def _check_ranges(recipe: Recipe) -> None:
    """Refuse values that no run can use; each message names the field."""
    for name in ("epochs", "batch_size", "accumulation", "repeated_aug", "eval_batch_size"):
        _require(getattr(recipe, name) >= 1, name, "at least 1", recipe)
    for name in ("eval_interval", "log_interval", "keep_checkpoints", "max_nonfinite"):
        _require(getattr(recipe, name) >= 1, name, "at least 1", recipe)
    for name in (
        "workers",
        "max_unreadable",
        "checkpoint_interval",
        "warmup_epochs",
        "feature_weight",
        "seed",
    ):
        _require(getattr(recipe, name) >= 0, name, "at least 0", recipe)
    for side, name in enumerate(("student_prefix", "teacher_prefix")):
        by_name = all(isinstance(pair[side], str) for pair in recipe.pairs)
        expected = "0 where blocks are paired by number (their prefix is known)"
        _require(getattr(recipe, name) == 0 or by_name, name, expected, recipe)
    _require(0 <= recipe.alpha < math.inf, "alpha", "at least 0, and finite", recipe)
    shared = recipe.alpha <= 1 or recipe.ce_weight is not None or not recipe.labels
    _require(shared, "alpha", "at most 1 where ce_weight is 1 - alpha", recipe)
    weighted = recipe.ce_weight is None or 0 <= recipe.ce_weight < math.inf
    _require(weighted, "ce_weight", "none or at least 0, and finite", recipe)
    for name in ("drop_path", "hflip", "reprob", "mixup_prob", "mixup_switch_prob"):
        _require(0 <= getattr(recipe, name) <= 1, name, "between 0 and 1", recipe)
    for name in ("lr", "eps", "tau"):
        _require(getattr(recipe, name) > 0, name, "greater than 0", recipe)
    for name in ("mixup", "cutmix", "weight_decay", "min_lr", "warmup_lr", "color_jitter"):
        _require(getattr(recipe, name) >= 0, name, "at least 0", recipe)
    _require(0 <= recipe.label_smoothing < 1, "label_smoothing", "in [0, 1)", recipe)
    _require(0 < recipe.crop_pct <= 1, "crop_pct", "in (0, 1]", recipe)
    _require(len(recipe.scale) == 2, "scale", "a lowest and a highest value", recipe)
    _require(len(recipe.ratio) == 2, "ratio", "a lowest and a highest value", recipe)
    shorter = recipe.warmup_epochs < recipe.epochs or recipe.warmup_epochs == 0
    _require(shorter, "warmup_epochs", f"fewer than epochs ({recipe.epochs})", recipe)
    positive = recipe.std is None or min(recipe.std) > 0
    _require(positive, "std", "greater than 0", recipe)
    both = (recipe.mean is None) == (recipe.std is None)
    _require(both, "std", "mean and std together", recipe)
    _require(len(recipe.pairs) > 0, "pairs", "at least one pair", recipe)
    _require(recipe.clip_grad is None or recipe.clip_grad > 0, "clip_grad", "positive", recipe)
    decay = recipe.ema_decay
    _require(decay is None or 0 <= decay < 1, "ema_decay", "none or in [0, 1)", recipe)
    _require(recipe.best == "raw" or decay is not None, "best", "raw without ema_decay", recipe)
    counted = recipe.train_samples is None or recipe.train_samples >= 1
    _require(counted, "train_samples", "none or at least 1", recipe)
    graphs = recipe.compile in ("reduce-overhead", "max-autotune") and recipe.accumulation > 1
    _require(not graphs, "compile", "none or default with accumulation (CUDA graphs)", recipe)
    slices = recipe.batch_size % recipe.accumulation == 0
    _require(slices, "batch_size", f"a multiple of accumulation ({recipe.accumulation})", recipe)


def _require(condition: bool, name: str, expected: str, recipe: Recipe) -> None:
    if not condition:
        raise ValueError(f"{name}: expected {expected}, got {getattr(recipe, name)!r}")


def refuse_image_options(overrides: Mapping[str, Any]) -> None:
    """Refuse options of image files for data that are tensors already.

    Args:
        overrides: what the caller gave in so many words.

    Raises:
        ValueError: one of them is of images.
    """
    _refuse(overrides, IMAGE_FIELDS, "the data are tensors, which are neither resized nor cropped")


def _refuse(overrides: Mapping[str, Any], names: tuple[str, ...], reason: str) -> None:
    for name in names:
        if name in overrides:
            raise ValueError(f"{name}={overrides[name]!r} has no effect: {reason}")
