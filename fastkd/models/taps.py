"""Taps: logits and typed tokens of chosen layers of a model, from one forward pass."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from fastkd.tokens import Tokens
from fastkd.utils.argument_checks import describe

TapKey = int | str

# Modules that give [B, C, H, W] whatever its sides.
CHANNELS_FIRST = (_ConvNd, _NormBase)


@dataclass(frozen=True)
class TapOutput:
    """Logits and tokens of one forward pass.

    Attributes:
        logits: [B, classes]; pooled features [B, D] for a model without a head.
        tokens: tokens per tapped layer, before the final norm, by non-negative number or name.
        final: what the head pools, prefix tokens dropped: patch tokens after the final norm, the
            lifted tokens of a Lift student, the last feature map of a CNN. None if not known.
    """

    logits: Tensor
    tokens: dict[TapKey, Tokens]
    final: Tokens | None = None


class Taps:
    """Reads layers of a model while it runs; call it in the model's place.

    Models with timm's feature interface are read by number, without hooks, and under
    ``torch.compile(fullgraph=True)``. A number is a block of a ViT or CaiT (not its class-attention
    blocks), and a stage of a Swin or CNN, counted as in timm's ``feature_info``, including the stem
    (of a ResNet, 0 is ``act1`` and 4 is ``layer4``). Any other module is read by module name. The
    channels of a 4-D output are found by ``feature_info``, the images' aspect ratio, the module's
    class, or the model's attribute ``output_fmt`` ("NCHW" or "NHWC"), in this order.

    Args:
        model: any model, not wrapped in DDP (wrap the module that calls the taps).
        indices: numbers, negative ones from the end, or module names; not both. Repeated ones are
            read once. Empty: logits and final tokens only.
        num_prefix: for module names: how many tokens at the front of a [B, N, D] output are no
            patches (class token, registers).
        grid: for module names: (H, W) of [B, N, D] outputs; None takes that of the patch embedding
            of timm's ViTs, else the one grid with the images' aspect ratio.

    Attributes:
        indices: the resolved keys of `TapOutput.tokens`, in the order asked for.
    """

    # No nn.Module: a module that holds both a model and its taps registers the model once.

    def __init__(
        self,
        model: nn.Module,
        indices: Sequence[TapKey] = (),
        *,
        num_prefix: int = 0,
        grid: tuple[int, int] | None = None,
    ) -> None:
        self.model = model
        self._reader = _choose_reader(model, indices, num_prefix, grid)
        self.indices: list[TapKey] = list(self._reader.keys)

    @property
    def dims(self) -> dict[TapKey, int]:
        """Channels per tapped layer; known for layers tapped by name once the model has run."""
        if len(self._reader.dims) < len(self.indices):
            raise RuntimeError(
                f"Taps.dims: the channels of {self.indices} are known after the first forward "
                "pass: call Taps.probe(images) first"
            )
        return dict(self._reader.dims)

    @torch.no_grad()
    def probe(self, images: Tensor) -> dict[TapKey, int]:
        """Run the model once in eval mode, so that `dims` is known.

        Args:
            images: [1, C, H, W].

        Returns:
            `dims`.
        """
        with evaluating(self.model):
            self(images)
        return self.dims

    def __call__(self, images: Tensor) -> TapOutput:
        """Run the model on ``images`` [B, C, H, W] once."""
        return self._reader(images)

    def last_block(self, images: Tensor) -> Tokens:
        """Get the tokens of the last block or stage, before the final norm, tapped or not.

        Args:
            images: [B, C, H, W].

        Returns:
            Its tokens.
        """
        return self._reader.last_block(images)


def _choose_reader(
    model: nn.Module, indices: Sequence[TapKey], num_prefix: int, grid: tuple[int, int] | None
) -> _NumberReader | _NameReader:
    if isinstance(indices, (int, str)):
        raise TypeError(f"Taps: indices must be a sequence, got {indices!r}; write [{indices!r}]")
    names = [index for index in indices if isinstance(index, str)]
    numbers = [index for index in indices if isinstance(index, int)]
    if len(names) + len(numbers) < len(indices) or (names and numbers):
        raise TypeError(f"Taps: indices must be all numbers or all names, got {list(indices)}")
    has_interface = _has_interface(model)
    if numbers and not has_interface:
        raise TypeError(
            f"Taps: {type(model).__name__} has no forward_intermediates, forward_head and "
            f"feature_info, so its layers must be tapped by module name, got {numbers} (a wrapped "
            "model? tap the model inside)"
        )
    if has_interface and not names:
        return _NumberReader(model, numbers)
    return _NameReader(model, names, num_prefix, grid)


class _NumberReader:
    """Reads blocks and stages of a timm model through timm's feature interface."""

    def __init__(self, model: Any, indices: Sequence[int]) -> None:
        self.model = model
        self.name = model_name(model)
        infos = _infos(model)
        modules = [str(info["module"]) for info in infos]
        for index in indices:
            if not -len(infos) <= index < len(infos):
                raise ValueError(
                    f"Taps: index {index} is out of range: {self.name} has {len(infos)} blocks or "
                    f"stages to tap ({modules[0]} .. {modules[-1]})"
                )
        self.keys = list(dict.fromkeys(index % len(infos) for index in indices))
        self.dims: dict[TapKey, int] = {key: int(infos[key]["num_chs"]) for key in self.keys}
        self.sources = [f"{self.name} {module}" for module in modules]
        self.in_depth_order = sorted(self.keys)  # the order in which timm returns them
        self.as_tokens = _gives_tokens_on_one_grid(model, infos)
        self.final_prefix = _num_prefix_tokens(model)
        self.block_prefix = self.final_prefix if _blocks_carry_prefix(model) else 0
        self.drops_patches = not isinstance(getattr(model, "patch_drop", None), nn.Identity | None)
        self.final_channels_last = getattr(model, "output_fmt", "NCHW") == "NHWC"

    def __call__(self, images: Tensor) -> TapOutput:
        maps: list[Tensor] = []
        if self.keys:
            self._refuse_dropped_patches()
            features, maps = self._intermediates(images, indices=self.in_depth_order)
        else:
            features = self.model.forward_features(images)
        grid = None if self._is_thinned() else self._grid(images)
        tokens: dict[TapKey, Tokens] = {
            key: self._tokens(maps[self.in_depth_order.index(key)], grid, key) for key in self.keys
        }
        return TapOutput(self.model.forward_head(features), tokens, self._final(features, grid))

    def last_block(self, images: Tensor) -> Tokens:
        self._refuse_dropped_patches()
        (features,) = self._intermediates(images, indices=1, intermediates_only=True)
        return self._tokens(features, self._grid(images), -1)

    def _intermediates(self, images: Tensor, **options: Any) -> Any:
        output_fmt = "NLC" if self.as_tokens else "NCHW"
        return self.model.forward_intermediates(
            images, norm=False, output_fmt=output_fmt, **options
        )

    def _is_thinned(self) -> bool:
        return self.drops_patches and self.model.training

    def _refuse_dropped_patches(self) -> None:
        if self._is_thinned():
            raise ValueError(
                f"Taps: {self.name} drops patches in training (patch_drop), so that the rest lies "
                "on no grid; build it with patch_drop_rate=0 to compare its tokens"
            )

    def _grid(self, images: Tensor) -> tuple[int, int] | None:
        if not self.as_tokens:
            return None
        height, width = self.model.patch_embed.dynamic_feat_size(tuple(images.shape[-2:]))
        return int(height), int(width)

    def _tokens(self, features: Tensor, grid: tuple[int, int] | None, key: int) -> Tokens:
        if grid is None:
            return _tokens_of_map(features, self.sources[key], self.block_prefix)
        return Tokens(features, grid, self.block_prefix, self.sources[key])

    def _final(self, features: Any, grid: tuple[int, int] | None) -> Tokens | None:
        source = f"{self.name} final"
        if not isinstance(features, Tensor):  # CrossViT's two branches
            return None
        if features.ndim == 4:
            maps = features.permute(0, 3, 1, 2) if self.final_channels_last else features
            return _tokens_of_map(maps, source)
        if features.ndim == 3 and grid is not None:
            return Tokens(features[:, self.final_prefix :], grid, self.final_prefix, source)
        return None


class _NameReader:
    """Reads named modules of any model with forward hooks; what is not asked for costs nothing."""

    def __init__(
        self, model: Any, names: Sequence[str], num_prefix: int, grid: tuple[int, int] | None
    ) -> None:
        self.model = model
        self.name = model_name(model)
        self.keys = list(dict.fromkeys(names))
        self.dims: dict[TapKey, int] = {}
        self.num_prefix = num_prefix
        self.grid = grid
        infos = _infos(model) if _has_interface(model) else []
        self.channels: dict[str, set[int]] = {}  # of the modules that timm lists
        for info in infos:
            self.channels.setdefault(str(info["module"]), set()).add(int(info["num_chs"]))
        self.on_one_grid = bool(infos) and _gives_tokens_on_one_grid(model, infos)
        known = [module for module, _ in model.named_modules() if module]
        for wanted in self.keys:
            if wanted not in known:
                near = difflib.get_close_matches(wanted, known, n=3) or known[:8]
                raise ValueError(
                    f"Taps: {self.name} has no module {wanted!r}; there are {', '.join(near)}"
                )

    def __call__(self, images: Tensor) -> TapOutput:
        captured: dict[str, Any] = {}

        def capture(key: str, module: nn.Module, inputs: Any, output: Any) -> None:
            captured[key] = output

        with ExitStack() as hooks:  # of this call only: copies and pickles of the model have none
            for key in self.keys:
                module = self.model.get_submodule(key)
                hooks.enter_context(module.register_forward_hook(partial(capture, key)))
            output = self.model(images)
        tokens: dict[TapKey, Tokens] = {
            key: self._tokens(key, captured, images) for key in self.keys
        }
        self.dims = {key: read.dim for key, read in tokens.items()}
        return TapOutput(_logits(output, self.name), tokens)

    def last_block(self, images: Tensor) -> Tokens:
        raise ValueError(
            f"Taps.last_block: the last block of {self.name} is not known where layers are tapped "
            f"by name ({', '.join(self.keys)}); tap it by number"
        )

    def _tokens(self, key: str, captured: dict[str, Any], images: Tensor) -> Tokens:
        source = f"{self.name} {key}"
        if key not in captured:
            raise RuntimeError(f"Taps: {source} did not run in the forward pass")
        output = captured[key]
        features = output[0] if isinstance(output, (tuple, list)) else output
        if not (isinstance(features, Tensor) and features.ndim in (3, 4)):
            raise ValueError(
                f"Taps: {source} must give [B, C, H, W] or [B, N, D], got {describe(features)}"
            )
        shape, channels = list(features.shape), self.channels.get(key, set())
        if shape[0] != len(images):
            raise ValueError(
                f"Taps: {source} gives {shape} for {len(images)} images: its windows or patches "
                "are no maps of whole images; tap the block around it"
            )
        one_of_several = isinstance(output, (tuple, list)) and not channels & {shape[1], shape[-1]}
        if len(channels) > 1 or (channels and one_of_several):  # CrossViT's and HRNet's branches
            raise ValueError(f"Taps: {source} gives several maps; tap {self.name} by number")
        if hasattr(self.model, "reroll") and features.ndim == 3:  # Hiera
            raise ValueError(f"Taps: {source} orders tokens by windows; tap {self.name} by number")
        if features.ndim == 4:
            last = self._channels_come_last(key, shape, images, source)
            return _tokens_of_map(features.permute(0, 3, 1, 2) if last else features, source)
        grid, num_prefix = self._grid(shape[1], images, source)
        return Tokens(features[:, num_prefix:], grid, num_prefix, source)

    def _channels_come_last(self, key: str, shape: list[int], images: Tensor, source: str) -> bool:
        channels = self.channels.get(key, set())
        first, last = shape[1] in channels, shape[-1] in channels
        if first == last:
            size = images.shape[-2:]
            first, last = _has_aspect(shape[2:], size), _has_aspect(shape[1:3], size)
        if first == last:
            module = self.model.get_submodule(key)
            first, last = isinstance(module, CHANNELS_FIRST), isinstance(module, nn.Linear)
        if first != last:
            return last
        # timm's models without the attribute give NCHW, but not all of the modules inside do.
        output_fmt = getattr(self.model, "output_fmt", "NCHW" if channels else None)
        if output_fmt not in ("NCHW", "NHWC"):
            raise ValueError(
                f"Taps: {source} gives {shape}, which may be [B, C, H, W] or [B, H, W, C]; set the "
                'attribute output_fmt of the model to "NCHW" or "NHWC"'
            )
        return output_fmt == "NHWC"

    def _grid(self, count: int, images: Tensor, source: str) -> tuple[tuple[int, int], int]:
        """Find the grid of [B, N, D] tokens, and how many of them come before the patches."""
        if self.grid is not None:
            return self.grid, self.num_prefix
        height, width = (int(side) for side in images.shape[-2:])
        fitting: list[tuple[int, int]] = []
        if self.on_one_grid:
            rows, columns = self.model.patch_embed.dynamic_feat_size((height, width))
            found = count - rows * columns  # not every block of a model carries its prefix
            if found in (0, _num_prefix_tokens(self.model)) and self.num_prefix in (0, found):
                return (int(rows), int(columns)), found
        else:
            patches = count - self.num_prefix
            heights = [rows for rows in range(1, patches + 1) if patches % rows == 0]
            grids = [(rows, patches // rows) for rows in heights]
            fitting = [grid for grid in grids if _has_aspect(grid, (height, width))]
        if len(fitting) != 1:
            raise ValueError(
                f"Taps: {source} gives {count} tokens, which are no grid of images of {height} x "
                f"{width}; set grid=(H, W), or num_prefix (now {self.num_prefix}) for class tokens"
            )
        return fitting[0], self.num_prefix


@contextmanager
def evaluating(model: nn.Module) -> Iterator[nn.Module]:
    """Run a model in eval mode, and restore every module's mode."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield model.eval()
    finally:
        for module, training in modes:
            module.training = training


def model_name(model: nn.Module) -> str:
    """Get the name of a model's architecture, for messages: timm's, else its class's."""
    cfg = getattr(model, "pretrained_cfg", None) or {}
    return str(cfg.get("architecture") or type(model).__name__)


def _has_interface(model: nn.Module) -> bool:
    """Whether a model can be read by number, as timm's can."""
    names = ("forward_intermediates", "forward_head", "feature_info")
    return all(hasattr(model, name) for name in names)


def _infos(model: Any) -> list[Any]:
    return [model.feature_info[i] for i in range(len(model.feature_info))]


def _has_aspect(grid: Sequence[int], size: Sequence[int]) -> bool:
    """Whether a grid may be an image's size divided by one number, rounded up or down."""
    return abs(grid[0] * size[1] - grid[1] * size[0]) < max(size)


def _gives_tokens_on_one_grid(model: Any, infos: list[Any]) -> bool:
    """Whether timm can hand out [B, N, D] without a copy, on the grid of the patch embedding."""
    return (
        hasattr(model, "cls_token")  # None in a ViT without one; absent in Swin, SAM and CNNs
        and hasattr(getattr(model, "patch_embed", None), "dynamic_feat_size")
        and len({info["reduction"] for info in infos}) == 1
    )


def _num_prefix_tokens(model: Any) -> int:
    # Of the final features; CaiT counts its class token in recent timm only.
    has_class_token = getattr(model, "cls_token", None) is not None
    return int(getattr(model, "num_prefix_tokens", has_class_token))


def _blocks_carry_prefix(model: Any) -> bool:
    # CaiT's blocks see patch tokens alone: the class token joins after them.
    return "return_prefix_tokens" in inspect.signature(model.forward_intermediates).parameters


def _tokens_of_map(features: Tensor, source: str, num_prefix: int = 0) -> Tokens:
    height, width = features.shape[-2:]  # [B, C, H, W] to a strided view, no copy
    return Tokens(features.flatten(2).transpose(1, 2), (height, width), num_prefix, source)


def _logits(output: Any, name: str) -> Tensor:
    logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if not isinstance(logits, Tensor):
        raise TypeError(
            f"Taps: {name} must return its logits, or an object with .logits, got "
            f"{type(output).__name__}"
        )
    return logits
