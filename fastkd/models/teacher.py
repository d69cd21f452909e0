"""Teachers: frozen models that are fed what they were trained on, whatever the student sees.

Knows how to renormalise and resize images for a teacher; nothing of students or of losses. Where
its weights come from is `fastkd.models.pretrained`'s.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastkd.models.pretrained import build_pretrained, fill, fixed_input_size
from fastkd.models.taps import TapKey, TapOutput, Taps, model_name

Statistics = Sequence[float]


class Teacher(nn.Module):
    """A frozen model that gives logits and tapped tokens; always in eval mode, never with gradient.

    Keep it outside the module that DDP wraps: it has nothing to synchronise.

    Args:
        model: frozen in place (``requires_grad_(False)``, eval mode).
        mean: per channel, what the model's images are normalised with; None: as they come.
        std: likewise; both or none.
        input_size: (H, W) that images are resized to; None: as they come.

    Raises:
        ValueError: only one of ``mean`` and ``std`` is given, or they differ in length.
    """

    scale: Tensor | None
    shift: Tensor | None

    def __init__(
        self,
        model: nn.Module,
        *,
        mean: Statistics | None = None,
        std: Statistics | None = None,
        input_size: int | tuple[int, int] | None = None,
    ) -> None:
        super().__init__()
        self.model = model.requires_grad_(False)
        self.mean, self.std = _checked_statistics("Teacher", mean, std)
        self.input_size = _pair(input_size)
        self.register_buffer("scale", None, persistent=False)
        self.register_buffer("shift", None, persistent=False)
        self._taps = Taps(model)
        self.eval()

    @property
    def name(self) -> str:
        """Architecture of the model, for messages."""
        return model_name(self.model)

    @property
    def indices(self) -> list[TapKey]:
        """Resolved keys of the tapped layers."""
        return self._taps.indices

    @property
    def dims(self) -> dict[TapKey, int]:
        """Tapped layer -> channels; see `Taps.dims`."""
        return self._taps.dims

    def tap(
        self,
        indices: Sequence[TapKey],
        *,
        num_prefix: int = 0,
        grid: tuple[int, int] | None = None,
    ) -> Taps:
        """Choose the layers that `forward` reads from now on.

        Args:
            indices: of blocks, from the end if negative, or module names, as in `Taps`.
            num_prefix: tokens that are no patches, of layers tapped by name.
            grid: (H, W) of layers tapped by name, where it is not square.

        Returns:
            The taps, for their resolved ``indices`` and ``dims``.
        """
        self._taps = Taps(self.model, indices, num_prefix=num_prefix, grid=grid)
        return self._taps

    def set_input_stats(self, mean: Statistics | None, std: Statistics | None) -> None:
        """Say what the images given to `forward` were normalised with: the student's statistics.

        Without it, or with None, images are taken to be normalised as the teacher wants them.

        Args:
            mean: per channel, as for images in [0, 1].
            std: likewise.

        Raises:
            ValueError: only one of both is given, or the channels differ from the teacher's.
        """
        mean, std = _checked_statistics("Teacher.set_input_stats", mean, std)
        self.scale = self.shift = None
        if mean is None or std is None or self.mean is None or self.std is None:
            return
        if len(mean) != len(self.mean):
            raise ValueError(
                f"Teacher.set_input_stats: {self.name} takes {len(self.mean)} channels, "
                f"got statistics of {len(mean)}"
            )
        if mean == self.mean and std == self.std:
            return
        device = next((tensor.device for tensor in self.model.parameters()), None)
        given, own = torch.tensor([mean, std]), torch.tensor([self.mean, self.std])
        # (x * std + mean - own_mean) / own_std as one multiply-add
        self.scale = (given[1] / own[1]).view(1, -1, 1, 1).to(device)
        self.shift = ((given[0] - own[0]) / own[1]).view(1, -1, 1, 1).to(device)

    def prepare(self, images: Tensor) -> Tensor:
        """Bring the student's images to the teacher's statistics and input size.

        Args:
            images: [B, C, H, W], normalised as `set_input_stats` said.

        Returns:
            [B, C, H', W']; ``images`` itself where nothing has to change.
        """
        if self.scale is not None and self.shift is not None:
            scale, shift = self.scale.to(images.dtype), self.shift.to(images.dtype)
            images = torch.addcmul(shift, images, scale)
        if self.input_size is not None and tuple(images.shape[-2:]) != self.input_size:
            images = F.interpolate(
                images, self.input_size, mode="bicubic", align_corners=False, antialias=True
            )
        return images

    @torch.no_grad()
    def forward(self, images: Tensor) -> TapOutput:
        """Run the teacher, without gradients.

        Args:
            images: [B, C, H, W], normalised for the student; `prepare` makes them the teacher's.

        Returns:
            Logits, and the tokens of the tapped layers.
        """
        return self._taps(self.prepare(images))

    def train(self, mode: bool = True) -> Teacher:
        """Stay in eval mode, whatever the surrounding module does."""
        del mode
        return super().train(False)


def create_teacher(
    name_or_module: str | Path | nn.Module,
    *,
    checkpoint: str | Path | None = None,
    pretrained: bool = True,
    num_classes: int | None = None,
    mean: Statistics | None = None,
    std: Statistics | None = None,
    input_size: int | tuple[int, int] | None = None,
    **timm_kwargs: Any,
) -> Teacher:
    """A frozen teacher from a timm name (its weights or a checkpoint), a released file or a module.

    Args:
        name_or_module: a timm model name; a Lift or WideLast checkpoint as the authors of arXiv
            2511.15572 released them, or a student that fastkd exported as safetensors, a path or
            ``hf_hub:OWNER/NAME/FILE``; or a module, which is frozen in place.
        checkpoint: weights for a name or a module: a path or ``hf_hub:OWNER/NAME/FILE`` (.pth,
            .safetensors; a state dict or a training checkpoint that holds one), read without
            unpickling code; of a fastkd run's checkpoint, the student's raw or EMA weights,
            whichever its run measured to be better. For timm names, the formats that timm converts
            (original DINOv2, Swin ...) load too, and position embeddings are resampled.
        pretrained: without ``checkpoint``, load timm's published weights for a name; for a module
            there is nothing to load. False leaves a name's weights random, which is for tests.
        num_classes: of the head; None takes the checkpoint's or timm's own; 0 leaves the head out,
            for features alone.
        mean: of the teacher's images; None takes timm's ``pretrained_cfg``, if the model has one.
        std: likewise.
        input_size: what images are resized to; None takes the size that the model is fixed to, if
            it is. To run a timm model at another size than its own, pass ``img_size``.
        **timm_kwargs: of the timm model. With ``img_size``, images are resized to it, also for
            models that are not built for a size; it is the only one for a released or exported
            file.

    Returns:
        The teacher, on the CPU unless ``device`` is among ``timm_kwargs``.

    Raises:
        ValueError: an unknown name, weights that do not exist or do not fit, or a head that the
            weights do not have.
        FileNotFoundError: there is no file ``checkpoint``, or none that ``name_or_module`` is
            the path of.
        RuntimeError: the pretrained weights cannot be downloaded.
        TypeError: ``name_or_module`` is neither, or options of timm are given for a module.
    """
    options = {"num_classes": num_classes} | timm_kwargs
    model: nn.Module
    if isinstance(name_or_module, str | Path):
        model = build_pretrained(
            "create_teacher", name_or_module, checkpoint, pretrained=pretrained, **options
        )
    elif isinstance(name_or_module, nn.Module):
        _refuse_for_modules({name: value for name, value in options.items() if value is not None})
        model = name_or_module
        if checkpoint is not None:
            fill("create_teacher", model, checkpoint)
    else:
        raise TypeError(
            "create_teacher: name_or_module must be a timm name, a file or an nn.Module, got "
            f"{type(name_or_module).__name__}"
        )
    built_for = timm_kwargs.get("img_size")
    return as_teacher(model, mean=mean, std=std, input_size=input_size, built_for=built_for)


def as_teacher(
    model: nn.Module,
    *,
    mean: Statistics | None = None,
    std: Statistics | None = None,
    input_size: int | tuple[int, int] | None = None,
    built_for: int | tuple[int, int] | None = None,
) -> Teacher:
    """A module as a teacher that is fed what it was published for.

    Args:
        model: frozen in place.
        mean: as in `create_teacher`, as are ``std`` and ``input_size``.
        std: likewise.
        input_size: likewise.
        built_for: the size that a model from a name was built for, to which images are resized.

    Returns:
        The teacher.

    Raises:
        ValueError: the model is fixed to another size, or the statistics do not fit together.
    """
    if mean is None and std is None:
        mean, std = _own_statistics(model)
    size = _input_size(model, input_size, built_for)
    return Teacher(model, mean=mean, std=std, input_size=size)


def _refuse_for_modules(options: Mapping[str, Any]) -> None:
    if options:
        raise TypeError(
            f"create_teacher: {', '.join(options)} apply where a model is built from a timm name, "
            "got a module"
        )


def _checked_statistics(
    caller: str, mean: Statistics | None, std: Statistics | None
) -> tuple[tuple[float, ...] | None, tuple[float, ...] | None]:
    if mean is None and std is None:
        return None, None
    if mean is None or std is None or len(mean) != len(std):
        raise ValueError(
            f"{caller}: mean and std must be given together, one value a channel, got {mean} "
            f"and {std}"
        )
    return tuple(map(float, mean)), tuple(map(float, std))


def _own_statistics(model: nn.Module) -> tuple[Statistics | None, Statistics | None]:
    """Timm's statistics, unless the model was built for another number of channels."""
    cfg = getattr(model, "pretrained_cfg", None) or {}
    mean, std = cfg.get("mean"), cfg.get("std")
    channels = getattr(model, "in_chans", None)
    if mean is None or std is None or (channels is not None and channels != len(mean)):
        return None, None
    return mean, std


def _input_size(
    model: nn.Module, asked: int | tuple[int, int] | None, built_for: int | tuple[int, int] | None
) -> tuple[int, int] | None:
    wanted, fixed = _pair(asked), _fixed_size(model, built_for)
    if wanted is not None and fixed is not None and wanted != fixed:
        raise ValueError(
            f"create_teacher: {model_name(model)} is fixed to images of {fixed}, got "
            f"input_size={asked}; build it for another size with img_size={asked}"
        )
    return wanted or fixed or _pair(built_for)


def _fixed_size(
    model: nn.Module, built_for: int | tuple[int, int] | None
) -> tuple[int, int] | None:
    """The one input size a timm model runs at, or None where it runs at any."""
    if hasattr(getattr(model, "patch_embed", None), "strict_img_size"):
        return fixed_input_size(model)
    cfg = getattr(model, "pretrained_cfg", None) or {}
    if not cfg.get("fixed_input_size"):
        return None
    return _pair(built_for) or _pair(tuple(cfg["input_size"][-2:]))


def _pair(size: int | tuple[int, int] | None) -> tuple[int, int] | None:
    if size is None:
        return None
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))
