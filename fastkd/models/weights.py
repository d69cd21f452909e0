"""Weights in files: whatever timm reads, and the checkpoints of fastkd's own trainer.

Knows what a checkpoint calls its weights; neither models nor how they were trained.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from timm.models import clean_state_dict, load_state_dict
from torch import Tensor

# What every checkpoint of `fastkd.train` carries under "format".
FASTKD_FORMAT = "fastkd-checkpoint"
SHOWN_NAMES = 5

_WEIGHT_SUFFIXES = (".pth", ".pt", ".ckpt", ".bin", ".safetensors")
_NAME_LIST = re.compile(r'(?:"[^"]+",?\s*)+')


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """Read a state dict, without unpickling code.

    Args:
        path: .pth or .safetensors: a state dict, a training checkpoint that holds one, or a
            checkpoint of a fastkd run, of which `better_weights` are taken.

    Returns:
        The weights by name, on the CPU.
    """
    checkpoint = None
    if Path(path).suffix != ".safetensors":
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    if isinstance(checkpoint, Mapping) and checkpoint.get("format") == FASTKD_FORMAT:
        key = "ema" if better_weights(checkpoint) == "ema" else "student"
        return clean_state_dict(checkpoint[key])
    return load_state_dict(str(path))


def is_foreign(path: str | Path) -> bool:
    """Whether a file holds weights, and is no checkpoint of a fastkd run.

    Reads no tensor of a .pth file.

    Args:
        path: of whatever there is, or is not.

    Returns:
        False for what cannot be read, too: who then loads it as a run's checkpoint says why.
    """
    path = Path(path)
    if path.suffix == ".safetensors" or not path.is_file():
        return path.is_file()
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # of DeiT's, under "args"
            state = torch.load(path, map_location="meta", weights_only=True)
    except Exception:  # whatever torch makes of a torn file
        return False
    return isinstance(state, Mapping) and state.get("format") != FASTKD_FORMAT


def better_weights(checkpoint: Mapping[str, Any]) -> str:
    """Which weights of a fastkd checkpoint its run measured to be better.

    Args:
        checkpoint: its state.

    Returns:
        ``"ema"`` if they are there and had the higher top-1 when both were measured last, else
        ``"raw"``: an average that is young is still mostly the initial weights.
    """
    measured = checkpoint.get("measured") or {}
    if checkpoint.get("ema") is None or "ema_top1" not in measured:
        return "raw"
    return "ema" if measured["ema_top1"] > measured["top1"] else "raw"


def looks_like_a_path(name: str) -> bool:
    """Whether a string can only have been meant as a file or folder, not as a timm name.

    Args:
        name: what a user gave.

    Returns:
        The answer; names with a source (``hf-hub:...``) are none.
    """
    return ":" not in name and ("/" in name or "\\" in name or name.endswith(_WEIGHT_SUFFIXES))


def short_misfit(error: Exception) -> str:
    """Torch's complaint about a state dict in one line, every list of names cut to a few.

    Args:
        error: what ``load_state_dict`` raised.

    Returns:
        The text.
    """
    return _NAME_LIST.sub(_first_names, " ".join(str(error).split()))


def first_names(names: list[str]) -> str:
    """The first few of many names, and how many more there are.

    Args:
        names: all of them.

    Returns:
        They, with commas between.
    """
    more = len(names) - SHOWN_NAMES
    return ", ".join(names[:SHOWN_NAMES]) + (f" and {more} more" if more > 0 else "")


def _first_names(listed: re.Match[str]) -> str:
    names = re.findall(r'"[^"]+"', listed.group())
    tail = listed.group()[len(listed.group().rstrip()) :]
    return first_names(names) + tail
