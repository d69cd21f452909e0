"""Types of recipe fields, their checks, and how values are read from YAML and command-line text."""

from __future__ import annotations

import functools
import re
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Ge, Le, Lt, MaxLen, MinLen
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
from pydantic_core import PydanticCustomError

from fastkd.losses.registry import FEATURE_LOSSES, LOGIT_LOSSES, PROJECTORS, names
from fastkd.utils.argument_checks import FLOAT32, LARGEST, LARGEST_IMAGE, MOST_WORKERS
from fastkd.utils.hints import suggestion

Key = int | str  # a block's number, or a module's name
Pairs = tuple[tuple[Key, Key], ...]
Scalar = float | int | bool | str | None
Options = dict[str, Scalar | tuple[int | float, ...]]  # by name; those of losses hold no lists

NONE_WORDS = ("none", "null", "~")
RECIPE_BYTES = 100_000  # a whole recipe has 3,000

# timm's parser ignores sections without a number, and takes any letters after t.
_STD = r"-mstd\d+(\.\d+)?"
_POLICY = (
    rf"^(rand(-m\d{{1,3}}|-n[1-9]\d?|-p(0|1(\.0+)?|0?\.\d+)|-mmax[1-9]\d{{0,2}}|-inc[01]|-t(weights|3aw?)|{_STD})*"
    rf"|augmix(-m\d{{1,3}}|-[wd][1-9]|-a\d+(\.\d+)?|-b[01]|{_STD})*"
    rf"|(original|originalr|v0|v0r|3a)({_STD})?)$"
)


class _Quoted(str):
    """A scalar that YAML quotes, which is text even if it looks like a number."""


class _FrozenOptions(dict[str, Any]):
    """A dict that can be neither changed nor shared by accident, and can be hashed."""

    def _refuse(self, *_: Any, **__: Any) -> Any:
        raise TypeError("the options of a recipe do not change; use Recipe.override")

    __setitem__ = __delitem__ = __ior__ = _refuse
    update = pop = popitem = clear = setdefault = _refuse

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(frozenset(self.items()))

    def __reduce__(self) -> Any:
        return type(self), (dict(self),)


def scalar(text: str) -> int | float | bool | str | None:
    """Read a number, true, false, none or a word."""
    words = {"true": True, "false": False, **dict.fromkeys(NONE_WORDS)}
    if text.lower() in words:
        return words[text.lower()]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _pairs(value: Any) -> Pairs:
    """Read ``"0:0,11:23"`` or lists of pairs; what is no integer is a module's name."""
    try:
        if not isinstance(value, str | list | tuple):
            raise TypeError
        return tuple(map(_pair, value.split(",") if isinstance(value, str) else value))
    except (TypeError, ValueError):
        raise PydanticCustomError("pairs_type", "no pairs") from None


def _pair(value: Any) -> tuple[Key, Key]:
    if isinstance(value, str):
        ends = [end.strip() for end in value.split(":")]
        value = [int(end) if re.fullmatch(r"[+-]?\d+", end) else end for end in ends]
    if not isinstance(value, list | tuple):
        raise TypeError
    student, teacher = value
    for key in (student, teacher):
        number = isinstance(key, int) and not isinstance(key, bool) and -LARGEST < key < LARGEST
        if not (number or (isinstance(key, str) and key.strip())):
            raise TypeError
    return student, teacher


def _options(value: Any, lists: bool = False) -> Options:
    """Read ``"beta=8,betas=[0.9,0.98]"``, or copy a mapping, which its owner may change later."""
    try:
        given = _assignments(value) if isinstance(value, str) else dict(value.items())
        options = {name: _option(item, lists) for name, item in given.items()}
        if not all(isinstance(name, str) and name.strip() for name in options):
            raise TypeError
    except (TypeError, ValueError, AttributeError):
        raise PydanticCustomError("options_type", "no options") from None
    items = [item if isinstance(item, tuple) else (item,) for item in options.values()]
    numbers = [item for part in items for item in part if isinstance(item, int | float)]
    if not all(-LARGEST < item < LARGEST for item in numbers):  # False for NaN, too
        raise PydanticCustomError("finite_number", "not finite")
    return options


def _assignments(text: str) -> dict[str, Any]:
    options: dict[str, Any] = {}
    for part in re.split(r",(?![^\[]*\])", text):  # not at the commas in brackets
        name, _, value = (piece.strip() for piece in part.partition("="))
        if not (name and value) or name in options:
            raise ValueError
        listed = value.startswith("[") and value.endswith("]")
        items = [scalar(item.strip()) for item in value[1:-1].split(",")]
        options[name] = items if listed else scalar(value)
    return options


def _option(value: Any, lists: bool) -> Any:
    if not (lists and isinstance(value, list | tuple)):
        if not isinstance(value, Scalar):
            raise TypeError
        return value
    if not all(isinstance(item, int | float) and not isinstance(item, bool) for item in value):
        raise TypeError
    return tuple(value)


def _items(value: Any) -> Any:
    if isinstance(value, str):
        return tuple(part.strip() for part in value.split(","))
    return tuple(value) if isinstance(value, list) else value


# Each type ends with the words that errors and the command line's help describe it by.
Count = Annotated[int, Ge(1), Lt(LARGEST), "an integer of at least 1"]
Whole = Annotated[int, Ge(0), Lt(LARGEST), "an integer of at least 0"]
Seed = Annotated[int, Ge(0), Lt(LARGEST), "an integer in [0, 2^63)"]
Width = Annotated[int, Ge(1), Le(65_536), "an integer between 1 and 65,536"]
Workers = Annotated[int, Ge(0), Le(MOST_WORKERS), "an integer between 0 and 1,024"]
Pixels = Annotated[int, Ge(1), Le(LARGEST_IMAGE), "an integer between 1 and 16,384"]
Positive = Annotated[
    float, Ge(FLOAT32[0]), Le(FLOAT32[1]), "a finite number above 0 (1e-37 to 1e37)"
]
NonNegative = Annotated[  # numbers between 0 and 1e-37 would be 0 in float32, or images NaN
    Annotated[float, Ge(0), Le(0)] | Positive, "a finite number of at least 0 (0, or 1e-37 to 1e37)"
]
Share = Annotated[float, Ge(0), Le(1), "a number between 0 and 1"]
Crop = Annotated[float, Ge(0.1), Le(1), "a number between 0.1 and 1"]
BelowOne = Annotated[float, Ge(0), Lt(1), "a number in [0, 1)"]
Switch = Annotated[bool, "true or false"]
Text = Annotated[str, Field(pattern=r"\S"), "a text that is not empty"]
Policy = Annotated[
    Annotated[str, Field(pattern=_POLICY)],
    "a policy of timm's such as rand-m9-mstd0.5-inc1, augmix-m5-w4, original, v0r or 3a",
]
Schedule = Annotated[  # what every supported timm has and needs no metric
    Literal["cosine", "multistep", "poly", "step", "tanh"],
    "one of cosine, multistep, poly, step, tanh; plateau needs a metric, use multistep",
]
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
    BeforeValidator(_pairs, json_schema_input_type=str | Annotated[Pairs, MinLen(1)]),
    "pairs of blocks such as 11:23 or [[11, 23]]",
]
LossOptions = Annotated[
    dict[str, Scalar],
    BeforeValidator(_options, json_schema_input_type=str | dict[str, Scalar]),
    AfterValidator(_FrozenOptions),
    "options such as beta=8 or {beta: 8}",
]
FactoryOptions = Annotated[
    Options,
    BeforeValidator(functools.partial(_options, lists=True), json_schema_input_type=str | Options),
    AfterValidator(_FrozenOptions),
    "options such as betas=[0.9,0.98] or {betas: [0.9, 0.98]}",
]
if typing.TYPE_CHECKING:  # the names are in the registry alone
    LogitLoss = str
    FeatureLoss = str
    Projector = str
else:
    LogitLoss = Literal[names(LOGIT_LOSSES)]
    FeatureLoss = Literal[names(FEATURE_LOSSES)]
    Projector = Literal[names(PROJECTORS)]


class Section(BaseModel):
    """Fields that belong together, checked one by one and against each other."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )

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
            if "_misfits" in vars(section)  # which yields (field, what is expected)
            for name, expected in vars(section)["_misfits"](self)
        ]
        if misfits:
            raise ValueError("\n".join(misfits))
        return self


def _explained(error: ValidationError, model: type[Section], values: Any) -> Exception:
    """Write one line for each fault: field, what is expected, what came."""
    lines: dict[str, None] = {}  # each once: a list may have several faults
    faults = error.errors(include_url=False)
    for fault in faults:
        name = str(fault["loc"][0]) if fault["loc"] else ""
        if not name:  # of `_check_together`
            line = str(fault["ctx"]["error"])
        elif fault["type"] == "extra_forbidden":
            line = _unknown(name, model)
        else:
            line = _refusal(name, hints(model)[name], values[name])
        lines[line] = None
    first = {fault["loc"][:1]: fault["type"] for fault in reversed(faults)}  # of each field
    typed = all(kind.endswith("_type") for kind in first.values())
    return (TypeError if typed else ValueError)("\n".join(lines))


@functools.cache
def hints(model: type[Section]) -> dict[str, Any]:
    """Return the types of a section's fields, with the words that describe them."""
    return typing.get_type_hints(model, include_extras=True)


def words(hint: Any) -> str:
    """Describe in words what a type expects."""
    if typing.get_origin(hint) is Annotated:
        for word in hint.__metadata__:
            if isinstance(word, str):
                return word
    if typing.get_origin(hint) is Literal:
        return f"one of {', '.join(typing.get_args(hint))}"
    if hint is type(None):
        return "none"
    return " or ".join(map(words, typing.get_args(hint)))


def _refusal(name: str, hint: Any, value: Any) -> str:
    """Build the line that refuses a field's value: what was expected, and what came."""
    expected, shown, hinted = words(hint), repr(value), ""
    shown = shown if len(shown) <= 200 else f"{shown[:200]} ..."
    _, choices, listed = expected.partition("one of ")
    if not isinstance(value, str):
        shown += f" ({type(value).__name__})"
    elif choices:
        hinted = suggestion(value, listed.removesuffix(" or none").split(", "))
    return f"{name}: expected {expected}, got {shown}{hinted}"


def _unknown(name: str, model: type[Section]) -> str:
    # The arguments of `train` beside the fields may be meant, too.
    known = [*model.model_fields, "output", "recipe", "resume"]
    return f"unknown recipe field {name!r}{suggestion(name, known)}"


def read_value(model: type[Section], name: str, value: Any) -> Any:
    """Read a field's value from text, or from what `read_yaml` returns for a list or mapping."""
    if name not in model.model_fields:
        raise ValueError(_unknown(name, model))
    hint = hints(model)[name]
    optional = type(None) in typing.get_args(hint)
    if optional and (value is None or (type(value) is str and value.lower() in NONE_WORDS)):
        return None
    adapter: TypeAdapter[Any] = TypeAdapter(hint, config=ConfigDict(allow_inf_nan=False))
    try:
        return adapter.validate_python(value, strict=not isinstance(value, str))
    except ValidationError:
        raise ValueError(_refusal(name, hint, value)) from None


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a recipe's fields: scalars as text, those in lists and mappings as numbers or words."""
    import yaml

    def read(node: Any, inside: bool = True) -> Any:
        if isinstance(node, yaml.SequenceNode):
            return [read(item) for item in node.value]
        if isinstance(node, yaml.MappingNode):
            return mapping(node)
        if node.style:
            return str(node.value) if inside else _Quoted(node.value)
        return (scalar(node.value) if inside else node.value) if node.value else None

    def mapping(node: Any, inside: bool = True) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for key, value in node.value:
            line = key.start_mark.line + 1
            if not isinstance(key, yaml.ScalarNode):
                raise ValueError(f"no YAML of a recipe: line {line} has a key that is no text")
            if key.value in values:
                raise ValueError(f"{key.value}: given twice, again in line {line}")
            values[key.value] = read(value, inside)
        return values

    if path.stat().st_size > RECIPE_BYTES:
        raise ValueError(f"is no recipe: it has more than {RECIPE_BYTES:,} bytes")
    try:
        text = path.read_text(encoding="utf-8")
        for token in yaml.scan(text):  # aliases of lists of lists may stand for billions of items
            if isinstance(token, yaml.AliasToken | yaml.TagToken):
                line = token.start_mark.line + 1
                raise ValueError(f"line {line} has an alias or a tag, which a recipe must not have")
        content = yaml.compose(text, Loader=yaml.BaseLoader)
        if not isinstance(content, yaml.MappingNode):
            raise ValueError("must hold a mapping of fields to values")
        return mapping(content, inside=False)
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"no YAML: {' '.join(str(error).split())}") from None


def to_yaml(values: Mapping[str, Any]) -> str:
    """Write plain values as the YAML from which `read_yaml` reads the same."""
    import yaml

    class Dumper(yaml.SafeDumper):
        """Quotes texts that would be read as numbers or words, or that YAML would change."""

    def represent(dumper: Dumper, text: str) -> Any:
        style = None if scalar(text) == text and text.isprintable() else '"'
        return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)

    Dumper.add_representer(str, represent)
    options: dict[str, Any] = {"sort_keys": False, "allow_unicode": True}
    return str(yaml.dump(dict(values), Dumper=Dumper, **options))
