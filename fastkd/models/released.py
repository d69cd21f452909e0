"""Load the checkpoints that the authors of arXiv 2511.15572 released."""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import timm
from torch import Tensor, nn

from fastkd.models.foreign import reading
from fastkd.models.hub import fetched
from fastkd.models.weights import UnreadableError, first_names, held_weights, read_file, verifying

State = Mapping[str, Tensor]
Rename = Callable[[str], str]

_CALLER = "load_released_checkpoint"
_HEAD_DIM = 64  # of every DeiT; the shapes do not tell it

# The released Lift wraps a whole timm DeiT, whose own final norm and head are never run.
_DEAD_IN_LIFT = re.compile(r"base_model\.(norm|head)\.")
_BLOCK = re.compile(r"(?:base_model\.)?blocks\.(\d+)\.")
_PROJECTION = re.compile(r"projections\.(\d+)\.weight")


def load_released_checkpoint(
    source: str | Path | State,
    *,
    num_classes: int | None = None,
    head_dim: int = _HEAD_DIM,
    verify: bool = True,
) -> nn.Module:
    """A Lift or WideLast student with the weights of the paper's released checkpoint.

    Which of the two it is, and its depth, widths, patch size, image size and classes are read off
    the names and shapes. The released Lift carries the final norm and head of the DeiT inside it,
    which nothing runs: they are left out, and everything else must match exactly.

    A checkpoint holds no epsilons: the Lift's LayerNorm has that of the released code
    (`fastkd.ops.lift_kd.LIFT_EPS`), every other one timm's.

    Args:
        source: a .pth or .safetensors file (a state dict, or a checkpoint with one under
            ``"model"`` or ``"state_dict"``; no code is unpickled), or the state dict itself. Of a
            checkpoint with averaged weights too, the raw ones are read: those were published. A
            file is a path, or ``hf_hub:OWNER/NAME/FILE``; the authors' own are
            ``hf_hub:Huiyuancs/Encoding_Mismatch/models/Lift/pytorch_model.pth`` and
            ``.../models/WideLast/pytorch_model.pth``.
        num_classes: None keeps the checkpoint's head; another number gets a new, untrained head,
            for fine-tuning.
        head_dim: channels per attention head, 64 in the paper's schedules.
        verify: as in `fastkd.evaluate`.

    Returns:
        `LiftVisionTransformer` or `WideLastVisionTransformer`, in train mode as any new model.

    Raises:
        FileNotFoundError: there is no such file.
        RuntimeError: the hub's file cannot be downloaded.
        ValueError: the hub has no such file, the file is torn or would run code, the names are of
            neither student, or some are missing, unexpected or of another shape, of which the first
            are listed.
    """
    given = isinstance(source, Mapping)
    foreign = contextlib.nullcontext() if given else reading(_CALLER, source)  # type: ignore[arg-type]
    with verifying(verify), foreign:
        model: Any = read_released(source, head_dim=head_dim).model
    if num_classes not in (None, model.num_classes):
        model.reset_classifier(num_classes)
    return model


@dataclass(frozen=True)
class Released:
    """A student with released weights, and how timm builds it."""

    model: nn.Module
    architecture: str  # its name in timm's registry
    arguments: dict[str, Any]  # that `timm.create_model` needs beside the name


def read_released(source: str | Path | State, *, head_dim: int = _HEAD_DIM) -> Released:
    """Read a released checkpoint; arguments and errors as in `load_released_checkpoint`."""
    state = _read(source)
    if any(_PROJECTION.fullmatch(name) for name in state):
        live = {name: tensor for name, tensor in state.items() if not _DEAD_IN_LIFT.match(name)}
        to_released = partial(_lift_name, last=_depth(state) - 1)
        return _load("deit_tiny_lift_patch16_224", live, to_released, head_dim)
    if any(name.endswith(".proj_in.weight") for name in state):
        return _load("deit_tiny_widelast_patch16_224", state, str, head_dim)  # the same names
    raise ValueError(
        f"{_CALLER}: neither a released Lift (projections.11.weight) nor WideLast "
        f"(blocks.11.proj_in.weight) checkpoint; its first names are {sorted(state)[:5]}"
    )


def in_our_names(state: State) -> State:
    """A released Lift's weights as `LiftVisionTransformer` calls them; others as they are."""
    if not any(_PROJECTION.fullmatch(name) for name in state):
        return state
    translated: State = read_released(state).model.state_dict()
    return translated


def _read(source: str | Path | State) -> dict[str, Tensor]:
    if isinstance(source, Mapping):
        return held_weights(source, "the state dict", averaged=False)
    file = fetched(_CALLER, source)
    if not Path(file).is_file():
        raise FileNotFoundError(f"{_CALLER}: there is no file {str(source)!r}")
    try:
        return held_weights(read_file(file), file, averaged=False)
    except UnreadableError as error:
        raise type(error)(f"{_CALLER}: {error}") from error


def _lift_name(ours: str, last: int) -> str:
    """The released Lift's name of one of our parameters."""
    if ours.startswith("head."):
        return ours
    if ours.startswith("norm.proj."):
        return ours.replace("norm.proj", f"projections.{last}", 1)
    if ours.startswith("norm.norm."):
        return ours.replace("norm.norm", f"layer_norms.{last}", 1)
    return f"base_model.{ours}"


def _load(architecture: str, state: State, to_released: Rename, head_dim: int) -> Released:
    arguments = _arguments(state, to_released, head_dim)
    model = timm.create_model(architecture, **arguments)
    expected = {to_released(name): tensor for name, tensor in model.state_dict().items()}
    _check_fit(expected, state)
    model.load_state_dict({name: state[to_released(name)] for name in model.state_dict()})
    return Released(model, architecture, arguments)


def _arguments(state: State, to_released: Rename, head_dim: int) -> dict[str, Any]:
    """The arguments of timm's `VisionTransformer` that give the shapes of ``state``."""

    def shape(name: str) -> Sequence[int]:
        released = to_released(name)
        if released not in state:
            raise ValueError(f"{_CALLER}: the checkpoint has no {released!r} to size the model by")
        return state[released].shape

    dim, in_chans, patch_size, _ = shape("patch_embed.proj.weight")
    if dim % head_dim:
        raise ValueError(f"{_CALLER}: {dim} channels are no heads of {head_dim}; set head_dim")
    num_classes, width = shape("head.weight")
    return {
        "img_size": _grid_side(shape("pos_embed")[1]) * patch_size,
        "patch_size": patch_size,
        "in_chans": in_chans,
        "embed_dim": dim,
        "depth": _depth(state),
        "num_heads": dim // head_dim,
        "mlp_ratio": shape("blocks.0.mlp.fc1.weight")[0] / dim,
        "qkv_bias": to_released("blocks.0.attn.qkv.bias") in state,
        "num_classes": num_classes,
        "width": width,
    }


def _grid_side(num_positions: int) -> int:
    side = math.isqrt(num_positions - 1)
    if side * side + 1 != num_positions:
        raise ValueError(
            f"{_CALLER}: pos_embed has {num_positions} positions, which is not a class token and "
            "a square grid of patches"
        )
    return side


def _depth(state: State) -> int:
    return 1 + max((int(match.group(1)) for match in map(_BLOCK.match, state) if match), default=-1)


def _check_fit(expected: State, given: State) -> None:
    """As a strict load, in our words: every kind of difference is named."""
    faults = {
        "missing": sorted(expected.keys() - given.keys()),
        "unexpected": sorted(given.keys() - expected.keys()),
        "of another shape": [
            f"{name} (expected {list(expected[name].shape)}, got {list(given[name].shape)})"
            for name in sorted(expected.keys() & given.keys())
            if expected[name].shape != given[name].shape
        ],
    }
    found = [f"{kind}: {first_names(names)}" for kind, names in faults.items() if names]
    if found:
        raise ValueError(f"{_CALLER}: the checkpoint does not fit; {'; '.join(found)}")
