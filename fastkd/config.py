"""The recipe of a run: a flat, frozen pydantic model made of the sections that functions read."""

from __future__ import annotations

import functools
import os
import re
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, TypedDict

from annotated_types import Ge, Gt, Le, Lt, MaxLen, MinLen
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
    model_validator,
)
from pydantic_core import PydanticCustomError, core_schema
from typing_extensions import Unpack

from fastkd.losses.registry import FEATURE_LOSSES, LOGIT_LOSSES, PROJECTORS, names
from fastkd.utils.arguments import FLOAT32, LARGEST, LARGEST_IMAGE, MOST_WORKERS
from fastkd.utils.hints import suggestion
from fastkd.utils.io import write_text

IMAGE_FIELDS = ("interpolation", "crop_pct", "crop_mode")
MODULE_PREFIX = "module:"  # stands before the class name of a model that was given as a module
NONE_WORDS = ("none", "null", "~")

Key = int | str
Pairs = tuple[tuple[Key, Key], ...]
Scalar = float | int | bool | str | None
Options = dict[str, Scalar | tuple[int | float, ...]]  # by name; those of losses hold no lists

# Fields that say where and how fast a run happens, not what it computes: they may change on resume.
OPERATIONAL_FIELDS = frozenset(
    {
        *("data", "data_root", "workers", "max_unreadable", "max_nonfinite"),
        *("compile", "channels_last"),
        *("eval_batch_size", "log_interval", "track", "checkpoint_interval", "keep_checkpoints"),
    }
)

# What timm's parser knows: it passes over sections without a number, and takes any letters after t.
_STD = r"-mstd\d+(\.\d+)?"
AUTO_AUGMENT = (
    rf"^(rand(-m\d{{1,3}}|-n[1-9]\d?|-p(0|1(\.0+)?|0?\.\d+)|-mmax[1-9]\d{{0,2}}|-inc[01]|-t(weights|3aw?)|{_STD})*"
    rf"|augmix(-m\d{{1,3}}|-[wd][1-9]|-a\d+(\.\d+)?|-b[01]|{_STD})*"
    rf"|(original|originalr|v0|v0r|3a)({_STD})?)$"
)
RECIPE_BYTES = 100_000  # a whole recipe has 3,000
RECIPE_DEPTH = 6  # pairs and options have 3


class _FrozenOptions(dict[str, Any]):
    """A dict that does not change and can be hashed, as the recipe that holds it."""

    def _refuse(self, *_: Any, **__: Any) -> Any:
        raise TypeError("the options of a recipe do not change; use Recipe.override")

    __setitem__ = __delitem__ = __ior__ = _refuse
    update = pop = popitem = clear = setdefault = _refuse

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(frozenset(self.items()))

    def __reduce__(self) -> Any:
        return type(self), (dict(self),)


class _Quoted(str):
    """A scalar that YAML quotes: text, whatever it looks like."""


def parse_pairs(text: str) -> Pairs:
    """Read ``"0:0,1:1,11:23"``; what is no integer is a module's name.

    Args:
        text: pairs separated by commas, student and teacher by a colon.

    Returns:
        The pairs.

    Raises:
        ValueError: a pair without its colon.
    """
    return tuple(map(_pair, text.split(",")))


def parse_options(text: str) -> Options:
    """Read ``"beta=8,betas=[0.9,0.98]"``; values are numbers, true, false, none, words or lists.

    Args:
        text: assignments separated by commas; lists are in brackets.

    Returns:
        Values by name.

    Raises:
        ValueError: a part that is no assignment, or a name given twice.
    """
    options: Options = {}
    for part in re.split(r",(?![^\[]*\])", text):  # not at the commas in brackets
        name, equals, value = (piece.strip() for piece in part.partition("="))
        if not (name and equals and value):
            raise ValueError(f"an option is name=value, got {part!r}")
        if name in options:
            raise ValueError(f"{name} is given twice in {text!r}")
        listed = value.startswith("[") and value.endswith("]")
        options[name] = _numbers(value[1:-1].split(",")) if listed else _scalar(value)
    return options


def _numbers(items: Iterable[Any]) -> tuple[int | float, ...]:
    """The items of a list as numbers, or a ValueError."""
    numbers = tuple(_if_text(_scalar, _if_text(str.strip, item)) for item in items)
    if not all(isinstance(item, int | float) and not isinstance(item, bool) for item in numbers):
        raise ValueError(f"a list holds numbers, got {numbers}")
    return typing.cast(tuple[int | float, ...], numbers)


def _key(text: str) -> Key:
    """A block's number or a module's name."""
    try:
        return str(text) if isinstance(text, _Quoted) else int(text)
    except ValueError:
        return text.strip()


def _scalar(text: str) -> int | float | bool | str | None:
    """The value of a loss's option that a text stands for."""
    if isinstance(text, _Quoted):
        return str(text)
    words = {"true": True, "false": False, **dict.fromkeys(NONE_WORDS)}
    if text.lower() in words:
        return words[text.lower()]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _pair(items: Any) -> tuple[Key, Key]:
    if isinstance(items, str):  # of a list such as [0:0, 11:23]
        items = [_key(end) for end in items.split(":")]
    keys = tuple(items) if isinstance(items, list | tuple) else ()
    if len(keys) != 2 or not all(_is_key(key) for key in keys):
        raise ValueError(f"a pair is student:teacher, got {items!r}")
    return keys


def _is_key(key: Any) -> bool:
    if isinstance(key, str):
        return bool(key.strip())
    return isinstance(key, int) and not isinstance(key, bool) and -LARGEST < key < LARGEST


def _check_pairs(value: Any) -> Pairs:
    try:
        if isinstance(value, Mapping | set | frozenset | bytes):
            raise TypeError
        return parse_pairs(value) if isinstance(value, str) else tuple(map(_pair, value))
    except (TypeError, ValueError):
        raise PydanticCustomError("pairs_type", "no pairs") from None


def _check_options(value: Any, lists: bool = False) -> Options:
    """A copy: a caller's dictionary may change later."""
    options: Options = {}
    try:
        if not isinstance(value, str | Mapping):
            raise TypeError
        given = parse_options(value) if isinstance(value, str) else value
        for name, item in given.items():
            if not (isinstance(name, str) and name.strip()):
                raise TypeError
            if lists and isinstance(item, list | tuple):
                options[name] = _numbers(item)
            elif isinstance(item, bool | int | float | str | None):
                options[name] = item
            else:
                raise TypeError
    except (TypeError, ValueError):
        raise PydanticCustomError("options_type", "no options") from None
    items = [item if isinstance(item, tuple) else (item,) for item in options.values()]
    numbers = [item for part in items for item in part if isinstance(item, int | float)]
    if not all(-LARGEST < item < LARGEST for item in numbers):  # NaN is not, either
        raise PydanticCustomError("finite_number", "not finite")
    return options


def _items(value: Any) -> Any:
    if isinstance(value, str):
        return tuple(part.strip() for part in value.split(","))
    return tuple(value) if isinstance(value, list) else value


@dataclass(frozen=True)
class _Named:
    """One of the names that a registry holds; no Literal, because they stand there alone."""

    names: tuple[str, ...]

    def __get_pydantic_core_schema__(self, *_: Any) -> core_schema.CoreSchema:
        return core_schema.literal_schema(list(self.names))


# Each type ends with the words that errors and the command line's help describe it by.
Count = Annotated[int, Ge(1), Lt(LARGEST), "an integer of at least 1"]
Whole = Annotated[int, Ge(0), Lt(LARGEST), "an integer of at least 0"]
Positive = Annotated[float, Ge(FLOAT32[0]), Le(FLOAT32[1]), "a finite number above 0"]
NonNegative = Annotated[float, Ge(0), Le(FLOAT32[1]), "a finite number of at least 0"]
Pixels = Annotated[int, Ge(1), Le(LARGEST_IMAGE), "an integer between 1 and 16,384"]
Share = Annotated[float, Ge(0), Le(1), "a number between 0 and 1"]
PositiveShare = Annotated[float, Gt(0), Le(1), "a number in (0, 1]"]
BelowOne = Annotated[float, Ge(0), Lt(1), "a number in [0, 1)"]
Switch = Annotated[bool, "true or false"]
Text = Annotated[str, Field(pattern=r"\S"), "a text that is not empty"]
_Statistics = Annotated[
    tuple[Annotated[float, Ge(-FLOAT32[1]), Le(FLOAT32[1])], ...], MinLen(1), MaxLen(1024)
]
Channels = Annotated[
    _Statistics,
    BeforeValidator(_items, json_schema_input_type=str | _Statistics),
    "a list of numbers",
]
Range = Annotated[
    tuple[Positive, Positive],
    BeforeValidator(_items, json_schema_input_type=str | tuple[Positive, Positive]),
    "a lowest and a highest number above 0",
]
PairList = Annotated[
    Annotated[Pairs, MinLen(1)],
    BeforeValidator(_check_pairs, json_schema_input_type=str | Annotated[Pairs, MinLen(1)]),
    "pairs of blocks such as 11:23 or [[11, 23]]",
]
LossOptions = Annotated[
    dict[str, Scalar],
    BeforeValidator(_check_options, json_schema_input_type=str | dict[str, Scalar]),
    AfterValidator(_FrozenOptions),
    "options such as beta=8 or {beta: 8}",
]
FactoryOptions = Annotated[
    Options,
    BeforeValidator(
        functools.partial(_check_options, lists=True), json_schema_input_type=str | Options
    ),
    AfterValidator(_FrozenOptions),
    "options such as betas=[0.9,0.98] or {betas: [0.9, 0.98]}",
]


class Section(BaseModel):
    """Fields that belong together, checked one by one and against each other."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    if not typing.TYPE_CHECKING:  # type checkers know the fields

        def __init__(self, /, **values: Any) -> None:
            try:
                super().__init__(**values)
            except ValidationError as error:
                raise _explained(error, type(self), values) from None

    @model_validator(mode="after")
    def _check_together(self) -> Section:
        misfits = [
            f"{name}: expected {expected}, got {getattr(self, name)!r}"
            for section in type(self).__mro__
            if issubclass(section, Section) and "_misfits" in vars(section)
            for name, expected in section._misfits(self)
        ]
        if misfits:
            raise ValueError("\n".join(misfits))
        return self

    def _misfits(self) -> Iterator[tuple[str, str]]:
        """(field, what is expected) for values that do not fit those of other fields."""
        return iter(())


class StudentConfig(Section):
    """Which student is built."""

    model: Text | None = Field(
        default="deit_tiny_patch16_224", description="timm name of the student"
    )
    variant: Literal["plain", "lift", "widelast", "uniform"] = Field(
        default="plain", description="student architecture"
    )
    width: Annotated[int, Ge(1), Le(65_536), "an integer between 1 and 65,536"] | None = Field(
        default=None,
        description="of a variant; none: 384 for lift and widelast, uniform must be given one",
    )
    img_size: Pixels | None = Field(
        default=None, description="input pixels a side; none: the student's own"
    )
    num_classes: Count | None = Field(default=None, description="classes; none: as the data say")
    drop_path: Share = Field(default=0.0, description="stochastic depth rate at the last block")
    init_weights: Literal["released", "timm"] = Field(
        default="released",
        description="what a new lift or widelast starts from: as in the paper's released code, or "
        "as timm initializes the rest",
    )


class TeacherConfig(Section):
    """Which teacher is opened, and the size of its images."""

    teacher: Text | None = Field(
        default=None, description="timm name, run folder or fastkd checkpoint"
    )
    teacher_checkpoint: Text | None = Field(
        default=None, description="local weights for a timm name"
    )
    teacher_img_size: Pixels | None = Field(
        default=None, description="pixels a side that images are resized to for it; none: its own"
    )
    classes_by: Literal["name", "number"] = Field(
        default="name",
        description="match the teacher's logits with the classes by name; number: take them as "
        "they are numbered",
    )


class DistillConfig(Section):
    """What the student is compared with the teacher by."""

    alpha: NonNegative = Field(default=0.0, description="weight of the logit loss")
    ce_weight: NonNegative | None = Field(
        default=None, description="weight of the cross-entropy; none: 1 - alpha"
    )
    logit_loss: Annotated[str, _Named(names(LOGIT_LOSSES))] = Field(
        default="soft", description="distance between logits"
    )
    tau: Positive = Field(default=1.0, description="temperature of logit losses that have one")
    logit_options: LossOptions | None = Field(
        default=None, description="of the logit loss, as name=value,... (see: fastkd losses NAME)"
    )
    feature_loss: Annotated[str, _Named(names(FEATURE_LOSSES))] = Field(
        default="mse", description="distance between token maps"
    )
    feature_options: LossOptions | None = Field(
        default=None, description="of the feature loss, as name=value,... (see: fastkd losses NAME)"
    )
    feature_weight: NonNegative = Field(
        default=0.2, description="weight of the feature loss; 0: none"
    )
    pairs: PairList = Field(
        default=((-1, -1),),
        description="student:teacher blocks, as 0:0,1:1,11:23; from the end: --pairs=-1:-1; of a "
        "CNN, stages as timm counts them, the stem included (ResNet: 0 is the stem, 4 is layer4)",
    )
    student_prefix: Whole = Field(
        default=0, description="tokens that are no patches, in student layers paired by module name"
    )
    teacher_prefix: Whole = Field(
        default=0, description="tokens that are no patches, in teacher layers paired by module name"
    )
    projector: Annotated[str, _Named(names(PROJECTORS))] = Field(
        default="none", description="projector from student to teacher width"
    )
    resample: Literal["bilinear", "bicubic", "area", "nearest"] | None = Field(
        default=None,
        description="bring the teacher's grid to the student's; none: refuse other grids",
    )

    @property
    def cross_entropy_weight(self) -> float:
        """What the cross-entropy is multiplied with: ``ce_weight``, or 1 - alpha."""
        return max(0.0, 1 - self.alpha) if self.ce_weight is None else self.ce_weight

    def _misfits(self) -> Iterator[tuple[str, str]]:
        if len(set(self.pairs)) < len(self.pairs):
            yield "pairs", "each pair once"
        for side, name in enumerate(("student_prefix", "teacher_prefix")):
            if getattr(self, name) and not all(isinstance(pair[side], str) for pair in self.pairs):
                yield name, "0 where blocks are paired by number (their prefix is known)"


class DataConfig(Section):
    """Where images come from and how they are augmented."""

    data: Text | None = Field(
        default=None, description="folder with train/ and val/, or a timm data set name"
    )
    data_root: Text | None = Field(
        default=None, description="where a timm data set name keeps its files"
    )
    labels: Switch = Field(
        default=True,
        description="false: train on the teacher alone, without cross-entropy; labels may be "
        "missing",
    )
    train_samples: Count | None = Field(
        default=None, description="images an epoch of streamed data; none: as the data say"
    )
    max_unreadable: Whole = Field(
        default=20, description="unreadable training images that are replaced before the run stops"
    )
    augment: Literal["cpu", "gpu", "none", "dataset"] = Field(
        default="cpu",
        description="cpu: timm's random transforms; gpu: workers decode and crop, the device does "
        "the rest; none: nothing random; dataset: the data set's own",
    )
    mean: Channels | None = Field(default=None, description="input mean; none: the student's own")
    std: Channels | None = Field(default=None, description="input std; none: the student's own")
    interpolation: Literal["bicubic", "bilinear", "random"] = Field(
        default="bicubic", description="of training crops and evaluation"
    )
    crop_pct: PositiveShare = Field(
        default=0.875, description="part of the resized image that evaluation crops"
    )
    crop_mode: Literal["center", "squash", "border"] = Field(
        default="center", description="how evaluation crops, as in timm"
    )
    scale: Range = Field(default=(0.08, 1.0), description="area range of training crops")
    ratio: Range = Field(default=(3 / 4, 4 / 3), description="aspect range of training crops")
    hflip: Share = Field(default=0.5, description="probability of a horizontal flip")
    color_jitter: NonNegative = Field(
        default=0.3, description="used only where auto_augment is none"
    )
    auto_augment: (
        Annotated[
            Annotated[str, Field(pattern=AUTO_AUGMENT)],
            "a policy of timm's such as rand-m9-mstd0.5-inc1, augmix-m5-w4, original, v0r or 3a",
        ]
        | None
    ) = Field(default="rand-m9-mstd0.5-inc1", description="timm's auto augment policy string")
    reprob: Share = Field(
        default=0.25, description="probability of random erasing, with pixel noise"
    )
    repeated_aug: Count = Field(
        default=1, description="augmented copies of an image in a batch; DeiT: 3"
    )
    mixup: NonNegative = Field(default=0.0, description="Mixup alpha; 0: off")
    cutmix: NonNegative = Field(default=0.0, description="CutMix alpha; 0: off")
    mixup_prob: Share = Field(default=1.0, description="probability that a batch is mixed at all")
    mixup_switch_prob: Share = Field(
        default=0.5, description="probability of CutMix where both are on"
    )
    workers: Annotated[int, Ge(0), Le(MOST_WORKERS), "an integer between 0 and 1,024"] = Field(
        default=8, description="loader processes per rank; 0: in the main process"
    )

    @property
    def mixes(self) -> bool:
        """Whether Mixup or CutMix is on."""
        return self.mixup > 0 or self.cutmix > 0

    def _misfits(self) -> Iterator[tuple[str, str]]:
        for name, highest in (("scale", 1.0), ("ratio", float("inf"))):
            low, high = getattr(self, name)
            if not 0 < low <= high <= highest:
                limit = "" if highest > 1 else ", which is at most 1"
                yield name, f"a lowest number above 0 and a highest one{limit}"
        if (self.mean is None) != (self.std is None):
            yield "std", f"a value beside mean, {self.mean}" if self.mean else "none, as mean is"
        elif self.mean and self.std and len({len(self.mean), len(self.std)} - {1}) > 1:
            yield "std", f"{len(self.mean)} numbers, as mean has"
        if self.std is not None and min(self.std) < FLOAT32[0]:
            yield "std", "numbers above 0"
        sections = re.findall(r"-([a-z]+)", self.auto_augment or "")
        if len(set(sections)) < len(sections):
            yield "auto_augment", "each of its sections once"


class OptimConfig(Section):
    """Length, batch, schedule and precision of the training."""

    epochs: Count = Field(default=300, description="passes over the training data")
    warmup_epochs: Whole = Field(default=5, description="epochs of linear warm-up, part of epochs")
    batch_size: Count = Field(default=1024, description="images per update, over all ranks")
    accumulation: Count = Field(
        default=1, description="slices that an update's batch is computed in"
    )
    opt: Text = Field(
        default="adamw", description="optimizer, by timm's name: adamw, sgd, lion, lamb, ..."
    )
    opt_kwargs: FactoryOptions | None = Field(
        default=None, description="of the optimizer, as name=value,...; lists in brackets"
    )
    lr: Positive = Field(
        default=5e-4,
        description="learning rate, before lr_scaling; the recipes' is meant for AdamW",
    )
    lr_scaling: Switch = Field(default=True, description="multiply lr by batch_size / 512")
    sched: Annotated[  # what every supported timm has and needs no metric
        Literal["cosine", "multistep", "poly", "step", "tanh"],
        "one of cosine, multistep, poly, step, tanh; plateau needs a metric, use multistep",
    ] = Field(default="cosine", description="timm's schedule of the learning rate")
    sched_kwargs: FactoryOptions | None = Field(
        default=None,
        description="of the schedule, as name=value,...: decay_milestones=[30,60],decay_rate=0.1",
    )
    min_lr: NonNegative = Field(default=1e-5, description="where cosine, poly and tanh end")
    warmup_lr: NonNegative = Field(default=1e-6, description="where the warm-up starts")
    weight_decay: NonNegative = Field(
        default=0.05, description="weight decay of the optimizer; none on 1-d parameters"
    )
    decay_pos_embed: Switch = Field(
        default=False,
        description="decay embeddings too (the released code does, for its own students)",
    )
    adam_eps: Positive = Field(
        default=1e-8,
        description="epsilon of AdamW and its kin; of optimizers with another default: opt_kwargs",
    )
    label_smoothing: BelowOne = Field(default=0.1, description="of the cross-entropy")
    clip_grad: Positive | None = Field(
        default=None, description="largest gradient norm; none: no limit"
    )
    ema_decay: BelowOne | None = Field(
        default=0.99996, description="of averaged weights; none: off"
    )
    ema_warmup: Switch = Field(default=False, description="let the EMA's decay grow to ema_decay")
    amp: Literal["none", "bf16", "fp16"] = Field(default="bf16", description="autocast type")
    max_nonfinite: Count = Field(
        default=10, description="updates in a row that may be skipped for an infinite or NaN loss"
    )
    compile: Literal["none", "default", "reduce-overhead", "max-autotune"] = Field(
        default="none",
        description="torch.compile of student, terms and teacher, by its mode; reduce-overhead: "
        "CUDA graphs",
    )
    channels_last: Switch = Field(
        default=False, description="channels-last memory format, faster for convolutions on a GPU"
    )
    seed: Annotated[int, Ge(0), Lt(LARGEST), "an integer in [0, 2^63)"] = Field(
        default=0, description="of weights, order, augmentation and dropout"
    )

    @property
    def scaled_lr(self) -> float:
        """The peak learning rate: lr, times batch_size / 512 with lr_scaling."""
        return self.lr * self.batch_size / 512 if self.lr_scaling else self.lr

    def _misfits(self) -> Iterator[tuple[str, str]]:
        if self.warmup_epochs and self.warmup_epochs >= self.epochs:
            yield "warmup_epochs", f"fewer than epochs ({self.epochs})"
        if self.scaled_lr > FLOAT32[1]:
            yield "lr", "a number that is finite once it is scaled by batch_size / 512"
        if self.batch_size % self.accumulation:
            yield "batch_size", f"a multiple of accumulation ({self.accumulation})"
        if self.compile in ("reduce-overhead", "max-autotune") and self.accumulation > 1:
            yield "compile", "none or default with accumulation (CUDA graphs)"


class EvalConfig(Section):
    """When a run is evaluated, logged and saved."""

    eval_interval: Count = Field(
        default=1, description="epochs between evaluations; the last always is"
    )
    eval_batch_size: Count = Field(default=256, description="images per rank and step")
    best: Literal["raw", "ema"] = Field(
        default="raw", description="whose top-1 picks the best epoch"
    )
    log_interval: Count = Field(
        default=50,
        description="updates of an epoch between lines of log.jsonl, and of output to a file",
    )
    track: Literal["tensorboard", "wandb", "both"] | None = Field(
        default=None, description="where else metrics go, if installed"
    )
    keep_checkpoints: Count = Field(
        default=2, description="last checkpoints that are kept: last.pth, last-1.pth, ..."
    )
    checkpoint_interval: Whole = Field(
        default=0, description="updates between checkpoints inside an epoch; 0: at its end only"
    )


# In the order of the fields of a recipe.
SECTIONS: dict[str, type[Section]] = {
    "student": StudentConfig,
    "teacher": TeacherConfig,
    "distill": DistillConfig,
    "data": DataConfig,
    "optim": OptimConfig,
    "eval": EvalConfig,
}


class ImageOptions(TypedDict, total=False):
    """How `fastkd.evaluate` and `fastkd.predict` feed images to a model, for type checkers."""

    img_size: int
    crop_pct: float
    crop_mode: Literal["center", "squash", "border"]
    interpolation: Literal["bicubic", "bilinear", "random"]
    mean: tuple[float, ...] | list[float] | None
    std: tuple[float, ...] | list[float] | None


class EvaluateOptions(ImageOptions, total=False):
    """The same, and where a named dataset keeps its files."""

    data_root: str | None


IMAGE_OPTIONS = tuple(ImageOptions.__annotations__)


class Overrides(TypedDict, total=False):
    """Fields of a recipe as keyword arguments, for type checkers."""

    model: str | None
    variant: Literal["plain", "lift", "widelast", "uniform"]
    width: int | None
    img_size: int | None
    num_classes: int | None
    drop_path: float
    init_weights: Literal["released", "timm"]
    teacher_checkpoint: str | None
    teacher_img_size: int | None
    classes_by: Literal["name", "number"]
    alpha: float
    ce_weight: float | None
    logit_loss: str
    tau: float
    logit_options: Mapping[str, Any] | None
    feature_loss: str
    feature_options: Mapping[str, Any] | None
    feature_weight: float
    pairs: str | Iterable[tuple[int | str, int | str]]
    student_prefix: int
    teacher_prefix: int
    projector: str
    resample: Literal["bilinear", "bicubic", "area", "nearest"] | None
    data_root: str | None
    labels: bool
    train_samples: int | None
    max_unreadable: int
    augment: Literal["cpu", "gpu", "none", "dataset"]
    mean: tuple[float, ...] | list[float] | None
    std: tuple[float, ...] | list[float] | None
    interpolation: Literal["bicubic", "bilinear", "random"]
    crop_pct: float
    crop_mode: Literal["center", "squash", "border"]
    scale: tuple[float, float] | list[float]
    ratio: tuple[float, float] | list[float]
    hflip: float
    color_jitter: float
    auto_augment: str | None
    reprob: float
    repeated_aug: int
    mixup: float
    cutmix: float
    mixup_prob: float
    mixup_switch_prob: float
    workers: int
    epochs: int
    warmup_epochs: int
    batch_size: int
    accumulation: int
    opt: str
    opt_kwargs: Mapping[str, Any] | None
    lr: float
    lr_scaling: bool
    sched: Literal["cosine", "multistep", "poly", "step", "tanh"]
    sched_kwargs: Mapping[str, Any] | None
    min_lr: float
    warmup_lr: float
    weight_decay: float
    decay_pos_embed: bool
    adam_eps: float
    label_smoothing: float
    clip_grad: float | None
    ema_decay: float | None
    ema_warmup: bool
    amp: Literal["none", "bf16", "fp16"]
    max_nonfinite: int
    compile: Literal["none", "default", "reduce-overhead", "max-autotune"]
    channels_last: bool
    seed: int
    eval_interval: int
    eval_batch_size: int
    best: Literal["raw", "ema"]
    log_interval: int
    track: Literal["tensorboard", "wandb", "both"] | None
    keep_checkpoints: int
    checkpoint_interval: int


class RecipeFields(Overrides, total=False):
    """All fields: those that `fastkd.train` takes as arguments of their own, too."""

    teacher: str | None
    data: str | None


class Recipe(
    EvalConfig, OptimConfig, DataConfig, DistillConfig, TeacherConfig, StudentConfig
):  # pydantic takes the fields of the last base first
    """A run's settings, flat: it is each of its sections, so that a function can ask for one.

    Load one with `Recipe.load`, change it with `Recipe.override`, keep it with `Recipe.save`.

    Raises:
        ValueError: an unknown field, a value out of range, or values that do not fit each other;
            one line for each.
        TypeError: values of the wrong type, and nothing else.
    """

    if typing.TYPE_CHECKING:

        def __init__(self, **values: Unpack[RecipeFields]) -> None: ...

    @classmethod
    def load(cls, source: str | os.PathLike[str] | Recipe | None) -> Recipe:
        """Read a recipe by name, from a YAML file, or from a run's folder.

        A scalar of the file means what the same text means on the command line.

        Args:
            source: a name that `names` lists, a path to a YAML file, a run folder, a recipe (given
                back as it is), or None (the defaults).

        Returns:
            The recipe.

        Raises:
            ValueError: no such recipe, no YAML, an unknown key, one given twice, or a value that
                is none of its field's.
        """
        if source is None:
            return cls()
        if isinstance(source, Recipe):
            return source
        path = cls.path(source)
        try:
            values, faults = _typed(_read_yaml(path))
            if faults:
                raise ValueError("\n".join(faults))
            return cls(**values)
        except (ValueError, TypeError) as error:
            raise type(error)(f"{path}: {error}") from None

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
        if not str(source).strip():
            raise ValueError(
                f"recipe: expected a name, a YAML file or a run's folder, got {source!r}"
            )
        given = Path(source)
        shipped = Path(str(resources.files("fastkd") / "recipes" / f"{source}.yaml"))
        for candidate in (shipped, given / "recipe.yaml", given):
            if candidate.is_file():
                return candidate
        raise ValueError(
            f"no recipe {str(source)!r}{suggestion(str(source), Recipe.names())}; "
            f"there are: {', '.join(Recipe.names())}; or give a YAML file"
        )

    def override(self, **values: Unpack[RecipeFields]) -> Recipe:
        """Change fields.

        Args:
            **values: by field name.

        Returns:
            A new recipe.

        Raises:
            ValueError: an unknown field or a value out of range.
            TypeError: a value of the wrong type.
        """
        changed: Any = {**dict(self), **values}
        return type(self)(**changed)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write every field as YAML, atomically.

        Args:
            path: the file to write.
        """
        write_text(path, self.to_yaml())

    def to_yaml(self) -> str:
        """Every field as YAML, from which `load` makes the same recipe."""
        import yaml

        class Dumper(yaml.SafeDumper):
            """Quotes texts that would be read as numbers or words, or that YAML would change."""

        def represent(dumper: Dumper, text: str) -> Any:
            style = None if _scalar(text) == text else "'"
            style = style if text.isprintable() else '"'
            return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)

        Dumper.add_representer(str, represent)
        options: dict[str, Any] = {"sort_keys": False, "allow_unicode": True}
        return str(yaml.dump(self.to_dict(), Dumper=Dumper, **options))

    def to_dict(self) -> dict[str, Any]:
        """Plain values, lists for tuples; ``Recipe(**values)`` takes them back."""
        return {name: _plain(value) for name, value in self}

    def differences(self, other: Recipe) -> dict[str, tuple[Any, Any]]:
        """Fields that change what a run computes and differ between two recipes.

        Args:
            other: the recipe to compare with.

        Returns:
            (own value, other's value) by field.
        """
        return {
            name: (value, getattr(other, name))
            for name, value in self
            if name not in OPERATIONAL_FIELDS and value != getattr(other, name)
        }

    @classmethod
    def json_schema(cls) -> dict[str, Any]:
        """The JSON schema of a recipe's YAML, flat, for editors."""
        schema = cls.model_json_schema()
        for field in schema["properties"].values():
            if {"type": "null"} in field.get("anyOf", ()):
                field["anyOf"].append({"enum": list(NONE_WORDS)})
        schema["description"] = "A recipe of fastkd: what `fastkd train --recipe FILE` reads."
        return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}

    def _misfits(self) -> Iterator[tuple[str, str]]:
        if self.alpha > 1 and self.ce_weight is None and self.labels:
            yield "alpha", "at most 1 where ce_weight is 1 - alpha"
        if self.repeated_aug > self.batch_size:
            yield "repeated_aug", f"at most batch_size ({self.batch_size})"
        if self.best == "ema" and self.ema_decay is None:
            yield "best", "raw without ema_decay"


def parse_value(name: str, text: str) -> Any:
    """Read a field's value as it is written on the command line or in YAML.

    Args:
        name: the field.
        text: ``none`` for an optional field's None; ``true``/``false``; numbers; commas between
            the items of a tuple; ``11:23`` or ``0:0,11:23`` for pairs; ``name=value,...`` for
            options.

    Returns:
        The typed value.

    Raises:
        ValueError: no such field, or the text is none of its type or out of range.
    """
    return _from_text(name, text, text)


def refuse(given: Mapping[str, Any], names: Iterable[str], reason: str) -> None:
    """Raise a ValueError for the first of the names that was given although it has no effect."""
    for name in names:
        if name in given:
            raise ValueError(f"{name}={given[name]!r} has no effect: {reason}")


def refuse_image_options(given: Mapping[str, Any]) -> None:
    """Refuse options that resize or crop, for data that are tensors already."""
    refuse(given, IMAGE_FIELDS, "the data are tensors, which are neither resized nor cropped")


def describe(name: str) -> str:
    """What a field expects, in words.

    Args:
        name: of a field.
    """
    return _words(_hints()[name])


@functools.cache
def _hints() -> dict[str, Any]:
    return typing.get_type_hints(Recipe, include_extras=True)


def _from_text(name: str, value: Any, shown: Any) -> Any:
    """A field's value from text, or from lists and mappings of texts."""
    if name not in Recipe.model_fields:
        raise ValueError(_unknown(name, Recipe))
    hint = _hints()[name]
    if type(None) in typing.get_args(hint) and (
        value is None or (type(value) is str and value.lower() in NONE_WORDS)
    ):
        return None
    adapter: TypeAdapter[Any] = TypeAdapter(hint, config=ConfigDict(allow_inf_nan=False))
    try:
        return adapter.validate_python(value, strict=False)
    except ValidationError:
        raise ValueError(_refusal(name, shown)) from None


def _from_yaml(name: str, value: Any) -> Any:
    texts = value
    if isinstance(value, Mapping):
        texts = {
            str(key): item if isinstance(item, list) else _if_text(_scalar, item)
            for key, item in value.items()
        }
    elif name == "pairs" and isinstance(value, list):
        texts = [
            [_if_text(_key, end) for end in pair] if isinstance(pair, list) else pair
            for pair in value
        ]
    return _from_text(name, texts, value)


def _if_text(read: Callable[[str], Any], value: Any) -> Any:
    return read(value) if isinstance(value, str) else value


def _typed(given: Mapping[str, Any]) -> tuple[Any, list[str]]:
    """Values by field from those of a YAML file, and a line for each that is none."""
    values, faults = {}, []
    for name, value in given.items():
        try:
            values[name] = _from_yaml(name, value)
        except ValueError as error:
            faults.append(str(error))
    return values, faults


def _read_yaml(path: Path) -> dict[str, Any]:
    """The file's mapping with every scalar as its text."""
    import yaml

    class Loader(yaml.BaseLoader):
        """Keeps texts, tells quoted ones apart, and refuses what a recipe has no use for."""

        depth = 0

        def compose_node(self, parent: Any, index: Any) -> Any:
            event = self.peek_event()
            unused = f"more than {RECIPE_DEPTH} levels" if self.depth == RECIPE_DEPTH else None
            if isinstance(event, yaml.AliasEvent):  # of lists of lists they may stand for billions
                unused = f"an alias (*{event.anchor})"
            elif event.tag is not None:
                unused = f"a tag ({event.tag})"
            if unused is not None:
                line = event.start_mark.line + 1
                raise ValueError(f"line {line} has {unused}, which a recipe must not have")
            self.depth += 1
            node = super().compose_node(parent, index)
            self.depth -= 1
            return node

        def construct_scalar(self, node: yaml.ScalarNode) -> Any:
            text = super().construct_scalar(node)
            if node.style in ("'", '"'):
                return _Quoted(text)
            return text if node.style or text else None

        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
            seen: set[Any] = set()
            for key, _ in node.value:
                if str(key.value) in seen:
                    line = key.start_mark.line + 1
                    raise ValueError(f"{key.value}: given twice, again in line {line}")
                seen.add(str(key.value))
            return super().construct_mapping(node, deep)

    if path.stat().st_size > RECIPE_BYTES:
        raise ValueError(f"is no recipe: it has more than {RECIPE_BYTES:,} bytes")
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"no YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise ValueError("must hold a mapping of fields to values")
    return {str(name): value for name, value in content.items()}


def _words(hint: Any) -> str:
    if typing.get_origin(hint) is Annotated:
        for word in hint.__metadata__:
            if isinstance(word, str | _Named):
                return word if isinstance(word, str) else f"one of {', '.join(word.names)}"
    if typing.get_origin(hint) is Literal:
        return f"one of {', '.join(typing.get_args(hint))}"
    if hint is type(None):
        return "none"
    return " or ".join(_words(part) for part in typing.get_args(hint))


def _explained(
    error: ValidationError, model: type[Section], values: Mapping[str, Any]
) -> Exception:
    """One line for each fault: field, what is expected, what came."""
    lines: dict[str, None] = {}  # each once: a list may have several faults
    faults = error.errors(include_url=False)
    for fault in faults:
        if not fault["loc"]:  # of `_check_together`
            lines[str(fault["ctx"]["error"])] = None
            continue
        name = str(fault["loc"][0])
        unknown = fault["type"] == "extra_forbidden"
        lines[_unknown(name, model) if unknown else _refusal(name, values[name])] = None
    first = {str(fault["loc"][:1]): fault["type"] for fault in reversed(faults)}  # of each field
    typed = all(kind.endswith("_type") for kind in first.values())
    return (TypeError if typed else ValueError)("\n".join(lines))


def _refusal(name: str, value: Any) -> str:
    _, several, words = describe(name).partition("one of ")
    hint = ""
    if several and isinstance(value, str):
        hint = suggestion(value, words.removesuffix(" or none").split(", "))
    shown = repr(value)
    shown = shown if len(shown) <= 200 else f"{shown[:200]} ..."
    if not isinstance(value, str):
        shown += f" ({type(value).__name__})"
    if _is_beyond_float32(value):
        hint = ", which is 0 or infinite in float32"
    return f"{name}: expected {describe(name)}, got {shown}{hint}"


def _is_beyond_float32(value: Any) -> bool:
    try:
        number = abs(float(value))
    except (TypeError, ValueError, OverflowError):
        return False
    return 0 < number < FLOAT32[0] or FLOAT32[1] < number < float("inf")


def _unknown(name: str, model: type[Section]) -> str:
    # The arguments that stand beside the fields: they may be meant, too.
    known = [*model.model_fields, "output", "recipe", "resume"]
    return f"unknown recipe field {name!r}{suggestion(name, known)}"


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, tuple) else value
