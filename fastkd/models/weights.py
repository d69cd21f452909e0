"""Read files of weights and verify their checksums; what is wrong with one is one error."""

from __future__ import annotations

import argparse
import contextlib
import pathlib
import pickle
import re
import sys
import textwrap
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import numpy as np
import torch
from annotated_types import Ge, Gt, Le
from pydantic import BaseModel, ConfigDict, Strict, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from timm.models import clean_state_dict
from torch import Tensor

from fastkd.models.hub_download import DownloadError
from fastkd.utils.argument_checks import LARGEST_IMAGE

# What every checkpoint of `fastkd.train` carries under "format".
FASTKD_FORMAT = "fastkd-checkpoint"
# What every file that `fastkd.export` writes carries in its metadata.
VERSION_KEY = "fastkd_version"
# Beside it: CRC-32 of the file, in hexadecimal, computed with zeros in its own place.
CRC_KEY = "fastkd_crc32"
NO_CRC = "00000000"
LOADS_ANYWAY = "verify=False (--no-verify) loads it anyway"
SHOWN_NAMES = 5

_SAFETENSORS = ".safetensors"
_AVERAGED = ("state_dict_ema", "model_ema")
_RAW = ("state_dict", "model")
# In what torch says of a pickle that names anything but tensors and plain values.
_UNSAFE_GLOBAL = re.compile(r"(?:GLOBAL|class|global:?) '?([\w.]+\.\w+)")
_ANSI = re.compile(r"\x1b\[[0-9;]*m")
_WEIGHT_SUFFIXES = (".pth", ".pt", ".ckpt", ".bin", ".safetensors")
_NAME_LIST = re.compile(r'(?:"[^"]+",?\s*)+')
_CRC = re.compile(rf'"{CRC_KEY}":"([0-9a-f]{{8}})"'.encode())
_verify: ContextVar[bool] = ContextVar("verify", default=True)

Form = TypeVar("Form", bound=BaseModel)
Side = Annotated[int, Ge(1), Le(LARGEST_IMAGE)]
Size = tuple[Side, Side, Side]  # (channels, height, width)
Means = tuple[float, ...]
Deviations = tuple[Annotated[float, Gt(0)], ...]
Classes = Annotated[int, Strict(), Ge(0), Le(10**7)]  # timm takes no text for a number


class FileForm(BaseModel):
    """What a file must hold; subclasses have the fields."""

    model_config = ConfigDict(arbitrary_types_allowed=True, allow_inf_nan=False)


class RunInput(FileForm):
    """The images that the student of a run was trained on."""

    size: Size
    mean: Means | None
    std: Deviations | None


class Run(FileForm):
    """What a checkpoint of a run holds of its student."""

    recipe: dict[str, Any]
    input: RunInput
    num_classes: Classes | None
    img_size: Side | tuple[Side, Side] | None
    state_dict: dict[str, Tensor]
    state_dict_ema: dict[str, Tensor] | None = None
    classes: list[str] | tuple[str, ...] | None = None
    measured: dict[str, float] | None = None
    weights: Literal["raw", "ema"] | None = None


class UnreadableError(ValueError):
    """A file that is no whole file of weights, or that would run code."""


class ChecksumError(UnreadableError):
    """A file whose bytes are not those of its checksum."""


class UnsafeError(UnreadableError):
    """A file with more than tensors and plain values in it."""


def checked(form: type[Form], content: Any, path: str | Path) -> Form:
    """Bring the content of a file into its form; an error names the file and the field."""
    try:
        return form.model_validate(content)
    except ValidationError as error:
        fault = error.errors(include_url=False, include_input=False)[0]
        field = ".".join(map(str, fault["loc"])) or "its content"
        raise UnreadableError(f"{path}: {field}: {fault['msg']}") from None


@contextlib.contextmanager
def reading(caller: str, path: str | Path) -> Iterator[None]:
    """Turn any error that a file causes into one that names it."""
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


@contextlib.contextmanager
def verifying(verify: bool) -> Iterator[None]:
    """Let `read_file` compare checksums within the block, or not; this thread's reads alone."""
    token = _verify.set(verify)
    try:
        yield
    finally:
        _verify.reset(token)


class FileKind(Enum):
    """What a file of weights is."""

    RUN = "a checkpoint of a fastkd run"
    EXPORT = "a student that fastkd exported as safetensors"
    WEIGHTS = "weights of another origin"
    UNREADABLE = "no file of weights"


def file_kind(path: str | Path) -> FileKind | None:
    """Get the kind of a file from its content, without reading a tensor; None without a file."""
    path = Path(path)
    if not path.is_file():
        return None
    if path.suffix == _SAFETENSORS:
        return FileKind.EXPORT if VERSION_KEY in metadata(path) else FileKind.WEIGHTS
    try:
        content = read_file(path, "meta")
    except (UnreadableError, OSError):
        return FileKind.UNREADABLE
    if not isinstance(content, Mapping):
        return FileKind.UNREADABLE
    return FileKind.RUN if content.get("format") == FASTKD_FORMAT else FileKind.WEIGHTS


def metadata(path: str | Path) -> dict[str, str]:
    """Get the metadata of a .safetensors file; empty for one that has none or is torn."""
    try:
        with safe_open(path, "pt") as file:
            return file.metadata() or {}
    except (SafetensorError, OSError):
        return {}


def read_file(path: str | Path, device: str | torch.device = "cpu") -> Any:
    """Read a .pth or .safetensors file without unpickling code, or raise an UnreadableError.

    On the device "meta" no tensor is read, and the checksum is not compared.
    """
    path = Path(path)
    try:
        if torch.device(device).type != "meta":
            check_sum(path)
        elif _is_swapped(path):
            device = "cpu"  # torch ends the process if it swaps bytes that were not read
        if path.suffix == _SAFETENSORS:
            return load_file(path, str(device))
        with torch.serialization.safe_globals(_PLAIN):
            return torch.load(path, map_location=device, weights_only=True)
    except (FileNotFoundError, PermissionError, MemoryError, ChecksumError):
        raise
    except Exception as error:  # bytes that are no checkpoint fail in any way
        raise _unreadable(path, error) from error


def _is_swapped(path: Path) -> bool:
    """Whether a .pth file may be of a machine of another byte order."""
    if not zipfile.is_zipfile(path):
        return False
    try:
        with zipfile.ZipFile(path) as archive:
            order = (name for name in archive.namelist() if name.endswith("/byteorder"))
            return any(archive.read(name) != sys.byteorder.encode() for name in order)
    except zipfile.BadZipFile:  # without CRC, or damaged
        return True


def verifies() -> bool:
    """Whether checksums are compared here."""
    return _verify.get()


def check_sum(path: Path) -> None:
    """Raise a ChecksumError where a file has changed since it was written, if `verifies`."""
    if not verifies() or not path.is_file():
        return
    # A .pth file has a CRC per record, an export one of the whole file, others have none.
    wrong = None
    if path.suffix == _SAFETENSORS:
        stored, actual = _file_crc(path)
        wrong = None if stored in (None, actual) else "the file"
    elif zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            wrong = archive.testzip()  # looks at the last record of a name, torch at any
        if len(set(names)) < len(names):
            wrong = "a record that is there twice"
    if wrong is not None:
        raise ChecksumError(
            f"{path} is damaged, or saved without CRC (that of {wrong} does not fit); "
            f"{LOADS_ANYWAY}"
        )


def write_crc(path: Path) -> None:
    """Fill in the CRC of an export that was saved with `NO_CRC`."""
    _, crc = _file_crc(path)
    with open(path, "r+b") as file:
        place = _CRC.search(file.read())
        assert place is not None
        file.seek(place.start(1))
        file.write(crc.encode())


def _file_crc(path: Path) -> tuple[str | None, str]:
    """Get the CRC-32 in an export's header ("" if lost, None in other files), and the file's."""
    with open(path, "rb") as file:
        size = int.from_bytes(file.read(8), "little")
        file.seek(0)
        head = file.read(8 + min(size, path.stat().st_size))
        found = _CRC.search(head)
        if found is not None:
            head = head[: found.start(1)] + NO_CRC.encode() + head[found.end(1) :]
        elif not any(f'"{key}"'.encode() in head for key in (VERSION_KEY, CRC_KEY)):
            return None, ""
        crc = zlib.crc32(head)
        while chunk := file.read(1 << 20):
            crc = zlib.crc32(chunk, crc)
    return "" if found is None else found[1].decode(), f"{crc:08x}"


def _number(dtype: np.dtype[Any], data: bytes) -> Any:
    """A NumPy scalar in a pickle, as Python's."""
    return np.frombuffer(data, dtype, count=1)[0].item()


def _plain_types() -> list[Any]:
    """List the classes that `torch.load` may build, under their names in pickles."""
    paths = [
        (getattr(pathlib, f"Pure{kind}Path"), f"{module}.{pure}{kind}Path")
        for module in ("pathlib", "pathlib._local")  # the latter in Python 3.13
        for kind in ("Posix", "Windows")
        for pure in ("", "Pure")
    ]
    numbers = [(_number, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")]
    # Numbers and texts alone: arrays of other types may refer to objects.
    codes = np.typecodes["AllInteger"] + np.typecodes["AllFloat"] + "?SU"
    dtypes = dict.fromkeys(type(np.dtype(code)) for code in codes)
    # DeiT's trainer keeps a Namespace, beside paths and NumPy's numbers.
    return [argparse.Namespace, *paths, *numbers, (np.dtype, "numpy.dtype"), *dtypes]


_PLAIN = _plain_types()


def _unreadable(path: Path, error: Exception) -> UnreadableError:
    if path.is_dir():
        return UnreadableError(f"{path} is a folder, and no file of weights")
    if path.stat().st_size == 0:
        return UnreadableError(f"{path} is torn or no file of weights (it is empty)")
    text = " ".join(_ANSI.sub("", str(error)).split())
    unsafe = _UNSAFE_GLOBAL.search(text)
    if unsafe is not None:
        return UnsafeError(
            f"{path} holds more than plain state, {unsafe[1]}, and is not loaded for safety (if "
            "you trust it: torch.load(..., weights_only=False), then save its state dict alone)"
        )
    reason = text.split(". ")[0]
    if isinstance(error, pickle.UnpicklingError | LookupError) or not reason:
        reason = "its content is of another kind"  # torch's text is of pickles and their options
    reason = textwrap.shorten(reason, 160, placeholder=" ...")
    return UnreadableError(f"{path} is torn or no file of weights ({reason})")


def read_weights(caller: str, path: str | Path, *, averaged: bool = True) -> dict[str, Tensor]:
    """Read the weights of a file; see `held_weights`."""
    try:
        return held_weights(read_file(path), path, averaged=averaged)
    except UnreadableError as error:
        raise type(error)(f"{caller}: {error}") from error


def held_weights(content: Any, path: str | Path, *, averaged: bool = True) -> dict[str, Tensor]:
    """Get the weights in what `read_file` returned, without the prefixes of wrappers.

    These are the `better_weights` of a fastkd run, else averaged ones if any and ``averaged``.
    """
    held = content
    if isinstance(content, Mapping):
        if content.get("format") == FASTKD_FORMAT:
            keys = [run_weights(content)[better_weights(content)]]
        else:
            keys = [*(_AVERAGED if averaged else ()), *_RAW]
        held = next((content[key] for key in keys if content.get(key) is not None), content)
    if not isinstance(held, Mapping) or not all(isinstance(name, str) for name in held):
        raise UnreadableError(f"{path} holds no weights by name, but a {type(held).__name__}")
    return clean_state_dict(dict(held))


def better_weights(checkpoint: Mapping[str, Any]) -> str:
    """Choose the weights of a fastkd checkpoint with the higher top-1, ``"ema"`` or ``"raw"``."""
    if "weights" in checkpoint:
        return str(checkpoint["weights"])
    measured = checkpoint.get("measured") or {}
    # A young average, not yet measured, is still mostly the initial weights.
    if "ema" not in run_weights(checkpoint) or not {"top1", "ema_top1"} <= measured.keys():
        return "raw"
    return "ema" if measured["ema_top1"] > measured["top1"] else "raw"


def run_weights(checkpoint: Mapping[str, Any]) -> dict[str, str]:
    """Map the kinds of weights in a checkpoint of a fastkd run, "raw" and "ema", to their keys."""
    if "weights" in checkpoint:  # a best.pth, which holds one kind
        return {checkpoint["weights"]: "state_dict"}
    averaged = {} if checkpoint.get("state_dict_ema") is None else {"ema": "state_dict_ema"}
    return {"raw": "state_dict"} | averaged


def looks_like_a_path(name: str) -> bool:
    """Whether a string can only be a file or folder; names with a source (``hf-hub:``) are none."""
    return ":" not in name and ("/" in name or "\\" in name or name.endswith(_WEIGHT_SUFFIXES))


def short_misfit(error: Exception) -> str:
    """Shorten torch's error about a state dict to one line, and its lists of names to a few."""
    return _NAME_LIST.sub(_first_names, " ".join(str(error).split()))


def _first_names(listed: re.Match[str]) -> str:
    names = re.findall(r'"[^"]+"', listed.group())
    tail = listed.group()[len(listed.group().rstrip()) :]
    more = len(names) - SHOWN_NAMES
    return ", ".join(names[:SHOWN_NAMES]) + (f" and {more} more" if more > 0 else "") + tail
