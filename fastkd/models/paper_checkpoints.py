"""Load the checkpoints that the authors of arXiv 2511.15572 released."""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
from torch import Tensor, nn

from fastkd.models.hub_download import fetched
from fastkd.models.weights import held_weights, read_weights, reading, short_misfit, verifying

State = Mapping[str, Tensor]

_CALLER = "load_released_checkpoint"
_HEAD_DIM = 64  # of every DeiT; the shapes do not tell it

# The released Lift wraps a whole timm DeiT, whose own final norm and head are never run.
_DEAD_IN_LIFT = ("base_model.norm.", "base_model.head.")
_BLOCK = re.compile(r"(?:base_model\.)?blocks\.(\d+)\.")
_PROJECTION = re.compile(r"projections\.\d+\.weight")


def load_released_checkpoint(
    source: str | Path | State,
    *,
    num_classes: int | None = None,
    head_dim: int = _HEAD_DIM,
    verify: bool = True,
) -> nn.Module:
    """Load a Lift or WideLast student with the weights of the paper's released checkpoint.

    Variant, depth, widths, patch size, image size and classes are read off the names and shapes.
    The norm and head that the released Lift never runs are left out; all else must match exactly.
    The Lift's LayerNorm has the epsilon of the released code, every other one timm's.

    Args:
        source: a state dict, or a .pth or .safetensors file with one, alone or under ``"model"`` or
            ``"state_dict"`` (no code is unpickled; averaged weights are ignored): a path, or
            ``hf_hub:OWNER/NAME/FILE``; the authors' own are
            ``hf_hub:Huiyuancs/Encoding_Mismatch/models/Lift/pytorch_model.pth`` and
            ``.../models/WideLast/pytorch_model.pth``.
        num_classes: None keeps the checkpoint's head; another number gets a new, untrained head,
            for fine-tuning.
        head_dim: channels per attention head, 64 in the paper's schedules.
        verify: see `fastkd.evaluate`.

    Returns:
        `LiftVisionTransformer` or `WideLastVisionTransformer`, in train mode.

    Raises:
        ValueError, OSError, RuntimeError: the file is missing or damaged, cannot be downloaded, or
            has the weights of neither student.
    """
    given = isinstance(source, Mapping)
    named = contextlib.nullcontext() if given else reading(_CALLER, source)  # type: ignore[arg-type]
    with verifying(verify), named:
        model: Any = read_released(source, head_dim=head_dim)[0]
    if num_classes not in (None, model.num_classes):
        model.reset_classifier(num_classes)
    return model


def read_released(
    source: str | Path | State, *, head_dim: int = _HEAD_DIM
) -> tuple[nn.Module, str, dict[str, Any]]:
    """Read a released student, and the name and arguments by which timm builds it."""
    given = _read(source)
    if _is_lift(given):
        architecture = "deit_tiny_lift_patch16_224"
    elif any(name.endswith(".proj_in.weight") for name in given):
        architecture = "deit_tiny_widelast_patch16_224"
    else:
        raise ValueError(
            f"{_CALLER}: neither a released Lift (projections.11.weight) nor WideLast "
            f"(blocks.11.proj_in.weight) checkpoint; its first names are {sorted(given)[:5]}"
        )
    state = in_our_names(given)
    arguments = _arguments(state, head_dim)
    model = timm.create_model(architecture, **arguments)
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        misfit = short_misfit(error)
        raise ValueError(f"{_CALLER}: the checkpoint does not fit: {misfit}") from error
    return model, architecture, arguments


def in_our_names(state: State) -> State:
    """Rename a released Lift's weights as in `LiftVisionTransformer`; leave others as they are."""
    if not _is_lift(state):
        return state
    last = _depth(state) - 1
    prefixes = {
        f"projections.{last}.": "norm.proj.",
        f"layer_norms.{last}.": "norm.norm.",
        "base_model.": "",
    }
    renamed = {}
    for name, tensor in state.items():
        prefix = next(filter(name.startswith, prefixes), None)
        ours = name if prefix is None else prefixes[prefix] + name.removeprefix(prefix)
        if not name.startswith(_DEAD_IN_LIFT):
            renamed[ours] = tensor
    return renamed


def _is_lift(state: State) -> bool:
    return any(map(_PROJECTION.fullmatch, state))


def _read(source: str | Path | State) -> dict[str, Tensor]:
    if isinstance(source, Mapping):
        return held_weights(source, "the state dict", averaged=False)
    file = fetched(_CALLER, source)
    if not Path(file).is_file():
        raise FileNotFoundError(f"{_CALLER}: there is no file {str(source)!r}")
    # The raw weights were published, with the averaged ones beside them.
    return read_weights(_CALLER, file, averaged=False)


def _arguments(state: State, head_dim: int) -> dict[str, Any]:
    """Read the arguments of timm's `VisionTransformer` off the shapes."""

    def shape(name: str) -> Sequence[int]:
        if name not in state:
            raise ValueError(f"{_CALLER}: the checkpoint has no {name!r} to size the model by")
        return state[name].shape

    dim, in_chans, patch_size, _ = shape("patch_embed.proj.weight")
    if dim % head_dim:
        raise ValueError(f"{_CALLER}: {dim} channels are no heads of {head_dim}; set head_dim")
    num_classes, width = shape("head.weight")
    positions = shape("pos_embed")[1]
    side = math.isqrt(positions - 1)
    if side * side + 1 != positions:
        raise ValueError(
            f"{_CALLER}: pos_embed must have a class token and a square grid, got {positions} "
            "positions"
        )
    return {
        "img_size": side * patch_size,
        "patch_size": patch_size,
        "in_chans": in_chans,
        "embed_dim": dim,
        "depth": _depth(state),
        "num_heads": dim // head_dim,
        "mlp_ratio": shape("blocks.0.mlp.fc1.weight")[0] / dim,
        "qkv_bias": "blocks.0.attn.qkv.bias" in state,
        "num_classes": num_classes,
        "width": width,
    }


def _depth(state: State) -> int:
    return 1 + max((int(match.group(1)) for match in map(_BLOCK.match, state) if match), default=-1)
