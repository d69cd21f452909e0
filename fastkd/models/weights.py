"""Read weights in files: whatever timm reads, and the checkpoints of fastkd's trainer."""

from __future__ import annotations

import argparse
import pickle
import re
import textwrap
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from timm.models import clean_state_dict
from torch import Tensor

# What every checkpoint of `fastkd.train` carries under "format".
FASTKD_FORMAT = "fastkd-checkpoint"
# What every file that `fastkd.export` writes carries in its metadata.
VERSION_KEY = "fastkd_version"
SHOWN_NAMES = 5

_SAFETENSORS = ".safetensors"
_AVERAGED = ("state_dict_ema", "model_ema")
_RAW = ("state_dict", "model")
# In what torch says of a pickle that names anything but tensors and plain values.
_UNSAFE_GLOBAL = re.compile(r"(?:GLOBAL|class|global:?) ([\w.]+\.\w+)")
_ANSI = re.compile(r"\x1b\[[0-9;]*m")
_WEIGHT_SUFFIXES = (".pth", ".pt", ".ckpt", ".bin", ".safetensors")
_NAME_LIST = re.compile(r'(?:"[^"]+",?\s*)+')


class UnreadableError(ValueError):
    """A file that is no whole file of weights, or that would run code; the message says which."""


class FileKind(Enum):
    """What a file of weights is."""

    RUN = "a checkpoint of a fastkd run"
    EXPORT = "a student that fastkd exported as safetensors"
    WEIGHTS = "weights of another origin"
    UNREADABLE = "no file of weights"


def file_kind(path: str | Path) -> FileKind | None:
    """What there is at a path, by what the file says of itself; None where there is no file.

    Reads no tensor. Why a file is unreadable `read_file` says.
    """
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
    """Metadata of a .safetensors file; empty for one that has none or is torn."""
    try:
        with safe_open(path, "pt") as file:
            return file.metadata() or {}
    except (SafetensorError, OSError):
        return {}


def read_file(path: str | Path, device: str | torch.device = "cpu") -> Any:
    """Read a .pth or .safetensors file, without unpickling code.

    DeiT's trainer and those after it keep their command line beside the weights as an
    `argparse.Namespace`, which holds no code and is let through. A torn file, or one with more than
    plain state, is an UnreadableError.
    """
    path = Path(path)
    try:
        if path.suffix == _SAFETENSORS:
            return load_file(path, str(device))
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location=device, weights_only=True)
    except (FileNotFoundError, PermissionError, MemoryError):
        raise
    except Exception as error:  # bytes that are no checkpoint fail in any way
        raise UnreadableError(f"{path} {_why_unreadable(path, error)}") from error


def _why_unreadable(path: Path, error: Exception) -> str:
    if path.is_dir():
        return "is a folder, and no file of weights"
    if path.stat().st_size == 0:
        return "is torn or no file of weights (it is empty)"
    text = " ".join(_ANSI.sub("", str(error)).split())
    unsafe = _UNSAFE_GLOBAL.search(text)
    if unsafe is not None:
        return f"holds more than plain state, {unsafe[1]}, and is not loaded for safety"
    reason = text.split(". ")[0]
    if isinstance(error, pickle.UnpicklingError | LookupError) or not reason:
        reason = "its content is of another kind"  # torch's text is of pickles and their options
    return f"is torn or no file of weights ({textwrap.shorten(reason, 160, placeholder=' ...')})"


def held_weights(content: Any, path: str | Path, *, averaged: bool = True) -> dict[str, Tensor]:
    """The weights in what `read_file` gave, without the prefixes of wrappers.

    ``averaged`` prefers averaged weights where a foreign checkpoint has them beside raw ones; of a
    fastkd run `better_weights` are taken. ``path`` is for messages.
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
    """Which weights of a fastkd checkpoint its run measured to be better, ``"ema"`` or ``"raw"``.

    The average needs the higher top-1 when both were measured last: a young one is still mostly the
    initial weights.
    """
    if "weights" in checkpoint:
        return str(checkpoint["weights"])
    measured = checkpoint.get("measured") or {}
    if "ema" not in run_weights(checkpoint) or "ema_top1" not in measured:
        return "raw"
    return "ema" if measured["ema_top1"] > measured["top1"] else "raw"


def run_weights(checkpoint: Mapping[str, Any]) -> dict[str, str]:
    """Keys of the weights in a checkpoint of a fastkd run, by kind: ``"raw"`` and ``"ema"``.

    A best.pth holds one kind alone, and names it.
    """
    if "weights" in checkpoint:
        return {checkpoint["weights"]: "state_dict"}
    averaged = {} if checkpoint.get("state_dict_ema") is None else {"ema": "state_dict_ema"}
    return {"raw": "state_dict"} | averaged


def looks_like_a_path(name: str) -> bool:
    """Whether a string can only be a file or folder; names with a source (``hf-hub:``) are none."""
    return ":" not in name and ("/" in name or "\\" in name or name.endswith(_WEIGHT_SUFFIXES))


def short_misfit(error: Exception) -> str:
    """Torch's complaint about a state dict in one line, every list of names cut to a few."""
    return _NAME_LIST.sub(_first_names, " ".join(str(error).split()))


def first_names(names: list[str]) -> str:
    """The first few of many names, and how many more there are."""
    more = len(names) - SHOWN_NAMES
    return ", ".join(names[:SHOWN_NAMES]) + (f" and {more} more" if more > 0 else "")


def _first_names(listed: re.Match[str]) -> str:
    names = re.findall(r'"[^"]+"', listed.group())
    tail = listed.group()[len(listed.group().rstrip()) :]
    return first_names(names) + tail
