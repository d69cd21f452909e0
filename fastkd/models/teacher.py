"""Teachers: frozen models whose images are renormalized and resized from the student's."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastkd.models.taps import TapKey, TapOutput, Taps, model_name

Statistics = Sequence[float]
Size = tuple[int, int]  # (height, width)


class Teacher(nn.Module):
    """A frozen model that gives logits and tapped tokens, in eval mode and without gradients.

    Keep it outside the module that DDP wraps: it has nothing to synchronize.

    Args:
        model: frozen in place (``requires_grad_(False)``, eval mode).
        mean: per channel, what the model's images are normalized with; None: not normalized.
        std: per channel; given together with ``mean``.
        input_size: (H, W) that images are resized to; None: not resized.
        classes: names of the model's classes by label, to compare with a student's; None: those of
            the model's ``pretrained_cfg``, if it has any.
    """

    scale: Tensor | None
    shift: Tensor | None

    def __init__(
        self,
        model: nn.Module,
        *,
        mean: Statistics | None = None,
        std: Statistics | None = None,
        input_size: int | Size | None = None,
        classes: Sequence[str] | None = None,
    ) -> None:
        super().__init__()
        self.model = model.requires_grad_(False)
        self.mean, self.std = _checked_statistics("Teacher", mean, std)
        self.input_size = _pair(input_size)
        self.classes = classes if classes is None else tuple(classes)
        self.register_buffer("scale", None, persistent=False)
        self.register_buffer("shift", None, persistent=False)
        self._taps = Taps(model)
        self.eval()

    @property
    def name(self) -> str:
        """Architecture of the model, for messages."""
        return model_name(self.model)

    def tap(
        self, indices: Sequence[TapKey], *, num_prefix: int = 0, grid: Size | None = None
    ) -> Taps:
        """Choose the layers that `forward` reads from now on.

        Args:
            indices: block numbers, negative ones from the end, or module names; see `Taps`.
            num_prefix: tokens that are no patches, of layers tapped by name.
            grid: (H, W) of layers tapped by name, where it is not square.

        Returns:
            The taps, with resolved ``indices`` and ``dims``.
        """
        self._taps = Taps(self.model, indices, num_prefix=num_prefix, grid=grid)
        return self._taps

    def set_input_stats(self, mean: Statistics | None, std: Statistics | None) -> None:
        """Set the statistics that the images given to `forward` are normalized with.

        Args:
            mean: of the student's images in [0, 1], per channel; None: they are the teacher's.
            std: per channel; given together with ``mean``.

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
            images: [B, C, H, W], normalized by the statistics of `set_input_stats`.

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
            images: [B, C, H, W], normalized for the student; `prepare` makes them the teacher's.

        Returns:
            Logits, and the tokens of the tapped layers.
        """
        return self._taps(self.prepare(images))

    def train(self, mode: bool = True) -> Teacher:
        del mode  # in eval mode, whatever the surrounding module is in
        return super().train(False)


def _checked_statistics(
    caller: str, mean: Statistics | None, std: Statistics | None
) -> tuple[tuple[float, ...] | None, tuple[float, ...] | None]:
    if mean is None and std is None:
        return None, None
    if mean is None or std is None or len(mean) != len(std):
        raise ValueError(
            f"{caller}: mean and std must both have one value per channel, got {mean} and {std}"
        )
    return tuple(map(float, mean)), tuple(map(float, std))


def _pair(size: int | Size | None) -> Size | None:
    if size is None:
        return None
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))
