"""How lift_kd's Triton kernels are cut: the fixed configuration per dtype and GPU.

No GPU has run them yet. The three defaults compile for their architectures without spilling
(tests/ops/test_lift_kd_compiled.py); candidates may spill. Which is fastest only a GPU can say:
tuning.py asks it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor


@dataclass(frozen=True)
class Loop:
    """How a kernel walks the outputs.

    Attributes:
        outputs: per chunk, BLOCK_O.
        warps: per program.
        stages: of the software pipeline.
    """

    outputs: int
    warps: int
    stages: int


@dataclass(frozen=True)
class Tile:
    """A configuration of the kernels `forward` and `token_gradient`.

    Attributes:
        rows: tokens per tile, BLOCK_M.
        channels: of the tokens per block, BLOCK_I.
        resident_blocks: up to how many blocks of a token's channels stay for all outputs.
        slab_blocks: blocks of the tokens' gradient that one program accumulates.
        forward: the forward's loop.
        gradient: the gradient's loop.
    """

    rows: int
    channels: int
    resident_blocks: int
    slab_blocks: int
    forward: Loop
    gradient: Loop


HALF = Tile(64, 64, 4, 4, forward=Loop(32, 8, 2), gradient=Loop(32, 8, 2))
SMALL_HALF = Tile(32, 64, 4, 4, forward=Loop(32, 4, 2), gradient=Loop(32, 8, 2))
FLOAT = Tile(32, 32, 0, 2, forward=Loop(32, 8, 2), gradient=Loop(16, 8, 2))

# What FASTKD_AUTOTUNE=1 tries besides the default; those that do not fit a GPU drop out there.
CANDIDATES = (
    HALF,
    SMALL_HALF,
    Tile(64, 64, 4, 4, forward=Loop(32, 4, 2), gradient=Loop(32, 4, 2)),
    Tile(64, 64, 0, 4, forward=Loop(64, 8, 3), gradient=Loop(32, 8, 3)),
    Tile(128, 64, 4, 4, forward=Loop(64, 8, 2), gradient=Loop(32, 8, 2)),
    Tile(64, 64, 6, 6, forward=Loop(32, 8, 2), gradient=Loop(16, 8, 2)),
    FLOAT,
    Tile(16, 32, 0, 4, forward=Loop(32, 4, 2), gradient=Loop(32, 4, 2)),
)


def default_tile(compute: torch.dtype, channels: int, capability: int) -> Tile:
    """The configuration for products in a dtype on a GPU.

    Args:
        compute: dtype of the products' operands.
        channels: of the tokens; if no multiple of 16, addresses take more registers.
        capability: compute capability times ten; 120 (consumer GPUs) has no wgmma or tcgen05.

    Returns:
        The tile; its ``rows`` also bound the grid rows that spectral can take.
    """
    if compute == torch.float32:
        return FLOAT
    large = 90 <= capability < 120 and channels % 16 == 0
    return HALF if large else SMALL_HALF


def capability(device: torch.device) -> int:
    """Compute capability times ten; 90 where there is no GPU."""
    if device.type != "cuda":
        return 90
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


@dataclass(frozen=True)
class Cut:
    """How the tokens of a batch are cut into tiles.

    Attributes:
        tile: its configuration.
        tile_rows: tokens in a tile; whole grid rows for spectral, so fewer than ``tile.rows``.
        tokens: in the batch.
        tiles: in the batch.
        images: how many a tile touches at most.
    """

    tile: Tile
    tile_rows: int
    tokens: int
    tiles: int
    images: int

    @staticmethod
    def of(tokens: Tensor, loss: str, tile: Tile) -> Cut:
        """The cut of a [B, H, W, D] map."""
        batch, height, width = tokens.shape[:3]
        tile_rows = tile.rows // width * width if loss == "spectral" else tile.rows
        count = batch * height * width
        images = min(batch, (tile_rows - 2) // (height * width) + 2)
        return Cut(tile, tile_rows, count, triton.cdiv(count, tile_rows), images)
