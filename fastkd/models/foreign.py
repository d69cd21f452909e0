"""Files that someone else may have written: what is wrong with one is one error that names it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import torch
from annotated_types import Ge, Gt, Le
from pydantic import BaseModel, ConfigDict, Json, Strict, ValidationError
from torch import Tensor

from fastkd.models.hub import DownloadError
from fastkd.models.weights import UnreadableError
from fastkd.utils.arguments import LARGEST_IMAGE

Form = TypeVar("Form", bound=BaseModel)

Side = Annotated[int, Ge(1), Le(LARGEST_IMAGE)]
Size = tuple[Side, Side, Side]  # (channels, height, width)
Means = tuple[float, ...]
Deviations = tuple[Annotated[float, Gt(0)], ...]
Classes = Annotated[int, Strict(), Ge(0), Le(10**7)]  # timm takes no text for a number


class _Form(BaseModel):
    model_config = ConfigDict(arbitrary_types_allowed=True, allow_inf_nan=False)


class Exported(_Form):
    """The metadata of a student that fastkd exported; what is no word is JSON."""

    architecture: str
    model_args: Json[dict[str, Any]]
    input_size: Json[Size]
    mean: Json[Means]
    std: Json[Deviations]
    num_classes: Json[Classes] | None = None
    label_names: Json[tuple[str, ...]] | None = None
    crop_pct: Json[float] | None = None
    crop_mode: str | None = None
    interpolation: str | None = None


class Published(_Form):
    """What a folder in timm's layout says of the images that its model is fed."""

    input_size: Size | None = None
    mean: Means | None = None
    std: Deviations | None = None
    num_classes: Classes | None = None
    crop_pct: float | None = None
    hf_hub_filename: str | None = None
    label_names: tuple[str, ...] | None = None
    label_descriptions: dict[str, str] | tuple[str, ...] | None = None


class Config(Published):
    """A ``config.json`` in timm's layout; older ones hold it all at the top."""

    architecture: str
    model_args: dict[str, Any] | None = None
    pretrained_cfg: Published | None = None


class Fed(_Form):
    """What the student of a run was fed."""

    size: Size
    mean: Means | None
    std: Deviations | None


class Run(_Form):
    """What a checkpoint of a run holds of its student."""

    recipe: dict[str, Any]
    input: Fed
    num_classes: Classes | None
    img_size: Side | tuple[Side, Side] | None
    state_dict: dict[str, Tensor]
    state_dict_ema: dict[str, Tensor] | None = None
    classes: list[str] | tuple[str, ...] | None = None
    measured: dict[str, float] | None = None
    weights: Literal["raw", "ema"] | None = None


def checked(form: type[Form], content: Any, path: str | Path) -> Form:
    """The content of a file in the form that it must have; an error names file and field."""
    try:
        return form.model_validate(content)
    except ValidationError as error:
        fault = error.errors(include_url=False, include_input=False)[0]
        field = ".".join(map(str, fault["loc"])) or "its content"
        raise UnreadableError(f"{path}: {field}: {fault['msg']}") from None


@contextlib.contextmanager
def reading(caller: str, path: str | Path) -> Iterator[None]:
    """Turn whatever a file brings about into one error that names it."""
    try:
        yield
    except (OSError, ImportError, MemoryError, torch.OutOfMemoryError, DownloadError):
        raise
    except Exception as error:  # of timm, torch, safetensors, json, or for values of another kind
        text = " ".join(str(error).removeprefix(f"{caller}: ").split())
        explained = isinstance(error, ValueError)
        if explained and str(path) in text:
            raise
        reason = text if explained else f"{type(error).__name__}: {text}"
        raise UnreadableError(f"{caller}: {path} cannot be used: {reason}") from error
