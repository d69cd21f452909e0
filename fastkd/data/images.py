"""Open image files that may be anything."""

from __future__ import annotations

import io
import os
from typing import BinaryIO

from PIL import Image, UnidentifiedImageError

# What Pillow raises over broken files, and over images of too many pixels to be meant.
PILLOW_ERRORS = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)
# Grayscale of more than 8 bits, all of which Pillow's conversion cuts off above 255.
DEEP_MODES = ("I", "F", "I;16", "I;16L", "I;16B", "I;16N")


def open_image(source: str | os.PathLike[str] | BinaryIO | bytes) -> Image.Image:
    """Open an image from a path, an open binary file or its bytes; ``load()`` decodes it."""
    return Image.open(io.BytesIO(source) if isinstance(source, bytes) else source)


def refuse_deep(image: Image.Image) -> None:
    """Raise an OSError for grayscale of more than 8 bits: no value in such a file means white."""
    if image.mode in DEEP_MODES:
        raise OSError(
            f"greyscale of more than 8 bits (mode {image.mode}), which has no fixed white: "
            "convert it to 8 bits"
        )


def reason_of(error: BaseException) -> str:
    """Say in one line why an image cannot be read."""
    while error.__cause__ is not None and str(error).startswith("data: "):
        error = error.__cause__  # of Pillow or the system, which fastkd.data wraps
    if isinstance(error, UnidentifiedImageError):
        return "no image that Pillow can read"  # its own words name an address in memory
    text = " ".join(str(getattr(error, "strerror", None) or error).split())
    known = text and isinstance(error, PILLOW_ERRORS)
    return (text if known else f"{type(error).__name__}: {text or 'no message'}")[:200]
