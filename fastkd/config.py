"""The recipe of a run: a flat, frozen pydantic model made of the sections that functions read."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from importlib import resources
from pathlib import Path
from typing import Any, Literal, TypedDict

from fastkd import recipe_fields as fields
from fastkd.utils.argument_checks import FLOAT32
from fastkd.utils.hints import suggestion
from fastkd.utils.io import write_text

IMAGE_FIELDS = ("interpolation", "crop_pct", "crop_mode")
MODULE_PREFIX = "module:"  # stands before the class name of a model that was given as a module

# Fields that say where and how fast a run happens, not what it computes: they may change on resume.
OPERATIONAL_FIELDS = frozenset(
    {
        *("data", "data_root", "workers", "max_unreadable", "max_nonfinite"),
        *("compile", "channels_last"),
        *("eval_batch_size", "log_interval", "track", "checkpoint_interval", "keep_checkpoints"),
    }
)


class StudentConfig(fields.Section):
    """Which student is built."""

    model: fields.Text | None = "deit_tiny_patch16_224"
    """timm name of the student"""
    variant: Literal["plain", "lift", "widelast", "uniform"] = "plain"
    """student architecture"""
    width: fields.Width | None = None
    """channels of the variant; none: 384 for lift and widelast; uniform requires it"""
    img_size: fields.Pixels | None = None
    """input pixels a side; none: the model's own"""
    num_classes: fields.Count | None = None
    """number of classes; none: as many as the dataset has"""
    drop_path: fields.Share = 0.0
    """stochastic depth rate at the last block"""
    init_weights: Literal["released", "timm"] = "released"
    """initial weights of a lift or widelast: as in the paper's released code, or timm's"""


class TeacherConfig(fields.Section):
    """Which teacher is opened, and the size of its images."""

    teacher: fields.Text | None = None
    """teacher: timm name, run folder, checkpoint, export or hf_hub:...; none: train without one"""
    teacher_checkpoint: fields.Text | None = None
    """weights for a teacher given by its timm name"""
    teacher_img_size: fields.Pixels | None = None
    """input pixels a side of the teacher; none: its own"""
    classes_by: Literal["name", "number"] = "name"
    """match the teacher's logits with the classes by name, or take them by number"""


class DistillConfig(fields.Section):
    """What the student is compared with the teacher by."""

    alpha: fields.NonNegative = 0.0
    """weight of the logit loss"""
    ce_weight: fields.NonNegative | None = None
    """weight of the cross-entropy; none: 1 - alpha"""
    logit_loss: fields.LogitLoss = "soft"
    """distance between logits"""
    tau: fields.Positive = 1.0
    """temperature of logit losses that have one"""
    logit_options: fields.LossOptions | None = None
    """options of the logit loss, as name=value,... (see: fastkd losses NAME)"""
    feature_loss: fields.FeatureLoss = "mse"
    """distance between token maps"""
    feature_options: fields.LossOptions | None = None
    """options of the feature loss, as name=value,... (see: fastkd losses NAME)"""
    feature_weight: fields.NonNegative = 0.2
    """weight of the feature loss; 0: none"""
    pairs: fields.PairList = ((-1, -1),)
    """student:teacher blocks, as 0:0,11:23; from the end: --pairs=-1:-1; of a CNN, timm's stages
    (ResNet: 0 is the stem, 4 is layer4)"""
    student_prefix: fields.Whole = 0
    """class and register tokens of student layers paired by module name"""
    teacher_prefix: fields.Whole = 0
    """class and register tokens of teacher layers paired by module name"""
    projector: fields.Projector = "none"
    """projector from student to teacher width"""
    resample: Literal["bilinear", "bicubic", "area", "nearest"] | None = None
    """resampling of the teacher's token grid to the student's; none: refuse different grids"""

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


class DataConfig(fields.Section):
    """Where images come from and how they are augmented."""

    data: fields.Text | None = None
    """folder with train/ and val/, shards, or timm dataset name"""
    data_root: fields.Text | None = None
    """files of a timm dataset given by name"""
    labels: fields.Switch = True
    """false: train on the teacher alone, without cross-entropy; labels may be missing"""
    train_samples: fields.Count | None = None
    """images per epoch of streamed data; none: as the dataset states"""
    max_unreadable: fields.Whole = 20
    """stop after this many unreadable training images; others take their place"""
    augment: Literal["cpu", "gpu", "none", "dataset"] = "cpu"
    """cpu: timm's random transforms; gpu: workers decode and crop, the device does the rest; none:
    nothing random; dataset: the data set's own"""
    mean: fields.Channels | None = None
    """mean that images are normalized with; none: the model's own"""
    std: fields.Channels | None = None
    """std that images are normalized with; none: the model's own"""
    interpolation: Literal["bicubic", "bilinear", "random"] = "bicubic"
    """interpolation of training crops and of evaluation"""
    crop_pct: fields.Crop = 0.875
    """share of the resized image that evaluation crops"""
    crop_mode: Literal["center", "squash", "border"] = "center"
    """crop mode of evaluation, as in timm"""
    scale: fields.Range = (0.08, 1.0)
    """area range of training crops"""
    ratio: fields.Range = (3 / 4, 4 / 3)
    """aspect range of training crops"""
    hflip: fields.Share = 0.5
    """probability of a horizontal flip"""
    color_jitter: fields.NonNegative = 0.3
    """strength of color jitter, if auto_augment is none"""
    auto_augment: fields.Policy | None = "rand-m9-mstd0.5-inc1"
    """timm's auto augment policy string"""
    reprob: fields.Share = 0.25
    """probability of random erasing, with pixel noise"""
    repeated_aug: fields.Count = 1
    """augmented copies of an image in a batch; DeiT: 3"""
    mixup: fields.NonNegative = 0.0
    """Mixup alpha; 0: off"""
    cutmix: fields.NonNegative = 0.0
    """CutMix alpha; 0: off"""
    mixup_prob: fields.Share = 1.0
    """probability that a batch is mixed at all"""
    mixup_switch_prob: fields.Share = 0.5
    """probability of CutMix where both are on"""
    workers: fields.Workers = 8
    """dataloader processes per rank; 0: load in the main process"""

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


class OptimConfig(fields.Section):
    """Length, batch, schedule and precision of the training."""

    epochs: fields.Count = 300
    """passes over the training data"""
    warmup_epochs: fields.Whole = 5
    """epochs of linear warm-up, part of epochs"""
    batch_size: fields.Count = 1024
    """images per update, over all ranks"""
    accumulation: fields.Count = 1
    """gradient accumulation: slices of an update's batch"""
    opt: fields.Text = "adamw"
    """optimizer, by timm's name: adamw, sgd, lion, lamb, ..."""
    opt_kwargs: fields.FactoryOptions | None = None
    """options of the optimizer, as name=value,...; lists in brackets"""
    lr: fields.Positive = 5e-4
    """learning rate before lr_scaling; those of the recipes are for AdamW"""
    lr_scaling: fields.Switch = True
    """multiply lr by batch_size / 512"""
    sched: fields.Schedule = "cosine"
    """timm's schedule of the learning rate"""
    sched_kwargs: fields.FactoryOptions | None = None
    """options of the schedule, as name=value,...: decay_milestones=[30,60],decay_rate=0.1"""
    min_lr: fields.NonNegative = 1e-5
    """final learning rate of cosine, poly and tanh"""
    warmup_lr: fields.NonNegative = 1e-6
    """learning rate at the start of the warm-up"""
    weight_decay: fields.NonNegative = 0.05
    """weight decay of the optimizer; none on 1-d parameters"""
    decay_pos_embed: fields.Switch = False
    """apply weight decay to embeddings, too, as the paper's released code does"""
    adam_eps: fields.Positive = 1e-8
    """epsilon of AdamW and similar optimizers; others take theirs by opt_kwargs"""
    label_smoothing: fields.BelowOne = 0.1
    """label smoothing of the cross-entropy"""
    clip_grad: fields.Positive | None = None
    """largest gradient norm; none: no limit"""
    ema_decay: fields.BelowOne | None = 0.99996
    """decay of the EMA weights; none: no EMA"""
    ema_warmup: fields.Switch = False
    """raise the decay of the EMA to ema_decay step by step"""
    amp: Literal["none", "bf16", "fp16"] = "bf16"
    """autocast type"""
    max_nonfinite: fields.Count = 10
    """updates in a row that may be skipped for an infinite or NaN loss"""
    compile: Literal["none", "default", "reduce-overhead", "max-autotune"] = "none"
    """torch.compile of student, terms and teacher, by its mode; reduce-overhead: CUDA graphs"""
    channels_last: fields.Switch = False
    """channels-last memory format, faster for convolutions on a GPU"""
    seed: fields.Seed = 0
    """seed of weights, order, augmentation and dropout"""

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


class EvalConfig(fields.Section):
    """When a run is evaluated, logged and saved."""

    eval_interval: fields.Count = 1
    """epochs between evaluations; the last always is"""
    eval_batch_size: fields.Count = 256
    """images per rank and step of an evaluation"""
    best: Literal["raw", "ema"] = "raw"
    """weights whose top-1 selects the best epoch"""
    log_interval: fields.Count = 50
    """updates between lines of log.jsonl, and of output that goes to a file"""
    track: Literal["tensorboard", "wandb", "both"] | None = None
    """experiment tracker that metrics are sent to, too"""
    keep_checkpoints: fields.Count = 2
    """number of checkpoints to keep: last.pth, last-1.pth, ..."""
    checkpoint_interval: fields.Whole = 0
    """updates between checkpoints inside an epoch; 0: at its end only"""


# In the order of the fields of a recipe.
SECTIONS: dict[str, type[fields.Section]] = {
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

    @classmethod
    def load(cls, source: str | os.PathLike[str] | Recipe | None) -> Recipe:
        """Read a recipe by name, from a YAML file, or from a run's folder.

        Args:
            source: a name that `names` lists, a path to a YAML file, a run folder, a recipe (given
                back as it is), or None (the defaults).

        Returns:
            The recipe. A scalar of a file is read like the same text on the command line.

        Raises:
            ValueError: no such recipe, no YAML, an unknown key, one given twice, or a value that
                its field does not take.
        """
        if source is None:
            return cls()
        if isinstance(source, Recipe):
            return source
        path = cls.path(source)
        values, faults = {}, []
        try:
            for name, value in fields.read_yaml(path).items():
                try:
                    values[name] = fields.read_value(cls, name, value)
                except ValueError as error:
                    faults.append(str(error))
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
        given = Path(source)
        shipped = Path(str(resources.files("fastkd") / "recipes" / f"{source}.yaml"))
        for candidate in (shipped, given / "recipe.yaml", given):
            if str(source).strip() and candidate.is_file():
                return candidate
        raise ValueError(
            f"recipe: expected a YAML file, a run's folder or one of {', '.join(Recipe.names())}, "
            f"got {str(source)!r}{suggestion(str(source), Recipe.names())}"
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
        return type(self)(**{**dict(self), **values})

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write every field as YAML, atomically.

        Args:
            path: the file to write.
        """
        write_text(path, self.to_yaml())

    def to_yaml(self) -> str:
        """Every field as YAML, from which `load` makes the same recipe."""
        return fields.to_yaml(self.to_dict())

    def to_dict(self) -> dict[str, Any]:
        """Plain values, lists for tuples; ``Recipe(**values)`` takes them back."""
        return self.model_dump(mode="json")

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
                field["anyOf"].append({"enum": list(fields.NONE_WORDS)})
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
    """Read a field's value as it is written on the command line or in YAML."""
    return fields.read_value(Recipe, name, text)


def describe(name: str) -> str:
    """Describe in words what a field expects."""
    return fields.words(fields.hints(Recipe)[name])


def refuse(given: Mapping[str, Any], names: Iterable[str], reason: str) -> None:
    """Raise a ValueError for the first of the names that was given although it has no effect."""
    for name in names:
        if name in given:
            raise ValueError(f"{name}={given[name]!r} has no effect: {reason}")


def refuse_image_options(given: Mapping[str, Any]) -> None:
    """Refuse options that resize or crop, for data that are tensors already."""
    refuse(given, IMAGE_FIELDS, "the data are tensors, which are neither resized nor cropped")
