"""lift_kd's launches: which Triton kernels run, on what, in which order. The kernels: kernels.py.

Where the loss is all there is, forward and gradient of a band of tokens follow each other, so that
tokens and teacher come from memory once: the one-pass form. Where pooled tokens are used, their
gradient is known only in the backward, which computes the lifted tokens again: the recompute form.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastkd.ops.feature_kd.reference import LOSSES, mean_scale
from fastkd.ops.feature_kd.triton import finish_launch
from fastkd.ops.launch import KernelLaunch
from fastkd.ops.lift_kd import kernels
from fastkd.ops.lift_kd.projection import Gradients, Projection
from fastkd.ops.lift_kd.reference import COSINE_EPS, stats_shape
from fastkd.ops.lift_kd.tiles import CANDIDATES, Cut, Tile, capability, default_tile

logger = logging.getLogger("fastkd")

ENVIRONMENT_AUTOTUNE = "FASTKD_AUTOTUNE"

MAX_IMAGES = 256  # of the batch that is timed

Run = Callable[[Tile, Tensor, Tensor], None]

_best: dict[tuple[Any, ...], Tile] = {}

BLOCK = 64  # channels per block where there is nothing to choose
BAND_TOKENS = 2 * 132 * 64  # two tiles per SM of an H100; their slopes (13 MB) stay in its L2 cache
WEIGHT_BLOCK_FLOAT = 32  # of weight_gradient: three products of tf32 parts take more registers
SCALE_BLOCK = 4096
ROW_MULTIPLE = 16  # elements
MAX_TOKENS = 2**31 - 1


@dataclass(frozen=True)
class Prepared:
    """Parameters as the kernels take them.

    Attributes:
        weight: [Dt, Ds] in the dtype of the products, centred under a LayerNorm; its rows are
            padded with zeros to `ROW_MULTIPLE`, so that they can be loaded 16 bytes at once.
        bias: [Dt] fp32, likewise centred; None for none.
        norm_weight: [Dt] in any dtype; None for no LayerNorm.
        norm_bias: likewise.
        eps: of the LayerNorm.
        compute: dtype of the products' operands.
    """

    weight: Tensor
    bias: Tensor | None
    norm_weight: Tensor | None
    norm_bias: Tensor | None
    eps: float
    compute: torch.dtype

    @property
    def normed(self) -> bool:
        """Whether there is a LayerNorm."""
        return self.norm_weight is not None


def prepare(projection: Projection) -> tuple[Prepared, list[KernelLaunch]]:
    """Buffers for the prepared parameters, and the launches that fill them."""
    normed = projection.norm_weight is not None
    launches = []
    weight, bias = projection.weight, projection.bias
    padded = triton.cdiv(weight.shape[1], ROW_MULTIPLE) * ROW_MULTIPLE
    as_is = weight.dtype == projection.compute and weight.is_contiguous()
    if normed or not as_is or padded > weight.shape[1]:
        source = weight.contiguous()
        weight = weight.new_empty((weight.shape[0], padded), dtype=projection.compute)
        launches.append(_centre_launch(source, weight, 1, normed))
    if bias is not None and (normed or bias.dtype != torch.float32 or not bias.is_contiguous()):
        source = bias.contiguous()
        bias = torch.empty_like(source, dtype=torch.float32)
        launches.append(_centre_launch(source[:, None], bias[:, None], 1, normed))
    norm_weight, norm_bias = (
        None if x is None else x.contiguous()
        for x in (projection.norm_weight, projection.norm_bias)
    )
    prepared = Prepared(weight, bias, norm_weight, norm_bias, projection.eps, projection.compute)
    return prepared, launches


def _centre_launch(source: Tensor, target: Tensor, parts: int, centre: bool) -> KernelLaunch:
    """``source`` is [parts * rows, columns], ``target`` [rows, columns or more]."""
    rows, target_row = target.shape
    columns = source.shape[-1]
    return KernelLaunch(
        kernels.centre_columns,
        (triton.cdiv(target_row, BLOCK), triton.cdiv(rows, BLOCK)),
        {
            "source": source,
            "target": target,
            "rows": rows,
            "columns": columns,
            "target_row": target_row,
            "parts": parts,
            "part_stride": rows * columns,
        },
        {"CENTRE": centre, "BLOCK_R": BLOCK, "BLOCK_C": BLOCK},
        num_warps=8,
    )


def refuses(
    tokens: Tensor, projection: Projection, teacher: Tensor | None, loss: str | None
) -> str | None:
    """Why these inputs cannot run here; None where they can."""
    tile = default_tile(projection.compute, tokens.shape[3], capability(tokens.device))
    if loss == "spectral" and tokens.shape[2] > tile.rows:
        return f"a grid row must have at most {tile.rows} tokens, got {tokens.shape[2]}"
    if tokens.shape[:3].numel() + BAND_TOKENS > MAX_TOKENS:
        return f"at most 2^31 tokens, got {tokens.shape[:3].numel()}"
    for name, x in (("student", tokens), ("teacher", teacher)):
        if x is not None and (x.shape[-1] - 1) * x.stride(3) >= 2**31:
            return f"the channels of {name} span more than 2^31 elements of memory"
    return None


def forward(
    tokens: Tensor,
    projection: Projection,
    teacher: Tensor | None,
    loss: str,
    beta: float,
    pool: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `reference.forward`, with statistics: 1 / std and three slopes of every token."""
    cut = Cut.of(tokens, loss, _tile(tokens, projection, loss))
    value = tokens.new_zeros((), dtype=torch.float32)
    stats = tokens.new_empty(stats_shape(tokens), dtype=torch.float32)
    pooled = tokens.new_empty(
        (tokens.shape[0], projection.width if pool else 0), dtype=torch.float32
    )
    prepared, launches = prepare(projection)
    launches += forward_launches(tokens, prepared, teacher, loss, beta, value, pooled, stats, cut)
    _run(launches)
    return value, pooled, stats


def lift(tokens: Tensor, projection: Projection, out_dtype: torch.dtype) -> Tensor:
    """As `reference.lift`."""
    cut = Cut.of(tokens, "mse", _tile(tokens, projection, "mse"))
    lifted = tokens.new_empty((*tokens.shape[:3], projection.width), dtype=out_dtype)
    prepared, launches = prepare(projection)
    _run([*launches, lift_launch(tokens, prepared, lifted, cut)])
    return lifted


def one_pass(
    tokens: Tensor,
    projection: Projection,
    teacher: Tensor,
    loss: str,
    beta: float,
    needs: Sequence[bool],
) -> tuple[Tensor, ...]:
    """As `reference.one_pass`: forward and gradient follow each other band by band."""
    tile = _tile(tokens, projection, loss)
    return _one_pass(tokens, projection, teacher, loss, beta, needs, tile)


def _one_pass(
    tokens: Tensor,
    projection: Projection,
    teacher: Tensor,
    loss: str,
    beta: float,
    needs: Sequence[bool],
    tile: Tile,
) -> tuple[Tensor, ...]:
    cut = Cut.of(tokens, loss, tile)
    value = tokens.new_empty((), dtype=torch.float32)
    stats = tokens.new_empty(stats_shape(tokens), dtype=torch.float32)
    partials = tokens.new_empty(cut.tiles, dtype=torch.float32)
    prepared, launches = prepare(projection)
    _run(launches)
    work = GradientWork(tokens, projection, prepared, teacher, loss, beta, stats, needs, cut)
    for band in work.bands():
        forward_launch(
            tokens, prepared, teacher, loss, beta, stats, partials, None, cut, band
        ).run()
        _run(work.launches(band, None, None))
    finish_launch(partials, value, mean_scale(teacher, teacher, loss)).run()
    return value, *work.finish()


def _tile(tokens: Tensor, projection: Projection, loss: str) -> Tile:
    """The fixed configuration, or the one that FASTKD_AUTOTUNE=1 has found fastest."""
    default = default_tile(projection.compute, tokens.shape[3], capability(tokens.device))

    def run(tile: Tile, tokens: Tensor, teacher: Tensor) -> None:
        needs = [True, *(x is not None for x in projection.parameters())]
        _one_pass(tokens, projection, teacher, loss, 1.0, needs, tile)

    return tuned(tokens, projection, loss, default, run)


def backward(
    upstream: Tensor | None,
    pooled_upstream: Tensor | None,
    tokens: Tensor,
    projection: Projection,
    teacher: Tensor | None,
    stats: Tensor,
    loss: str,
    beta: float,
    needs: Sequence[bool],
) -> Gradients:
    """As `reference.backward`; ``stats`` are those of this file's `forward`."""
    cut = Cut.of(tokens, loss, _tile(tokens, projection, loss))
    prepared, launches = prepare(projection)
    _run(launches)
    if upstream is None:
        teacher = None
    work = GradientWork(tokens, projection, prepared, teacher, loss, beta, stats, needs, cut)
    pooled = None
    if pooled_upstream is not None:
        pooled = PooledUpstream(pooled_upstream, tokens, prepared)
        _run(pooled.launches)
    for band in work.bands():
        _run(work.launches(band, upstream, pooled))
    return work.finish()


def scale(gradient: Tensor, upstream: Tensor) -> None:
    """Multiply by a scalar in place, without waiting for it; free where it is 1."""
    scale_launch(gradient, upstream).run()


def scale_launch(gradient: Tensor, upstream: Tensor) -> KernelLaunch:
    """Multiplies a dense gradient by a scalar in place."""
    return KernelLaunch(
        kernels.scale_in_place,
        (triton.cdiv(gradient.numel(), SCALE_BLOCK),),
        {"gradient": gradient, "upstream": upstream, "count": gradient.numel()},
        {"BLOCK": SCALE_BLOCK},
    )


def _run(launches: Sequence[KernelLaunch]) -> None:
    for launch in launches:
        launch.run()


def forward_launches(
    tokens: Tensor,
    prepared: Prepared,
    teacher: Tensor | None,
    loss: str,
    beta: float,
    value: Tensor,
    pooled: Tensor,
    stats: Tensor,
    cut: Cut,
) -> list[KernelLaunch]:
    """All tiles in one launch, then the sums of the loss and of the pooled tokens."""
    width = prepared.weight.shape[0]
    pool = pooled.numel() > 0
    partials = tokens.new_empty(cut.tiles, dtype=torch.float32)
    sums = tokens.new_empty((cut.tiles, cut.images, width), dtype=torch.float32) if pool else None
    band = Band(0, cut.tiles)
    launches = [
        forward_launch(tokens, prepared, teacher, loss, beta, stats, partials, sums, cut, band)
    ]
    if teacher is not None:
        launches.append(finish_launch(partials, value, mean_scale(teacher, teacher, loss)))
    if sums is not None:
        launches.append(
            KernelLaunch(
                kernels.finish_pool,
                (tokens.shape[0], triton.cdiv(width, BLOCK)),
                {
                    "partials": sums,
                    "pooled": pooled,
                    "tile_rows": cut.tile_rows,
                    "image_tokens": tokens.shape[1:3].numel(),
                    "images": cut.images,
                    "width": width,
                },
                {"BLOCK_C": BLOCK},
                num_warps=2,
            )
        )
    return launches


@dataclass(frozen=True)
class Band:
    """Consecutive tiles that are worked on together."""

    first_tile: int
    tiles: int


def forward_launch(
    tokens: Tensor,
    prepared: Prepared,
    teacher: Tensor | None,
    loss: str,
    beta: float,
    stats: Tensor,
    partials: Tensor,
    sums: Tensor | None,
    cut: Cut,
    band: Band,
) -> KernelLaunch:
    """`kernels.forward` over a band: partial losses, statistics, and sums for the pooled tokens."""
    arguments = {"stats": stats, "partials": partials, "pooled": sums}
    return _forward_launch(tokens, prepared, teacher, loss, beta, arguments, cut, band)


def lift_launch(tokens: Tensor, prepared: Prepared, lifted: Tensor, cut: Cut) -> KernelLaunch:
    """`kernels.forward` over everything, for the lifted tokens alone."""
    arguments = {"lifted": lifted}
    band = Band(0, cut.tiles)
    return _forward_launch(tokens, prepared, None, "mse", 1.0, arguments, cut, band)


def _forward_launch(
    tokens: Tensor,
    prepared: Prepared,
    teacher: Tensor | None,
    loss: str,
    beta: float,
    outputs: Mapping[str, Tensor | None],
    cut: Cut,
    band: Band,
) -> KernelLaunch:
    given = {name: outputs.get(name) for name in ("stats", "partials", "pooled", "lifted")}
    return KernelLaunch(
        kernels.forward,
        (band.tiles,),
        {
            **{name: prepared.weight if x is None else x for name, x in given.items()},
            **_common_arguments(tokens, prepared, teacher, beta, cut, band),
            "images": cut.images,
            "norm_eps": prepared.eps,
            "cosine_eps": COSINE_EPS,
        },
        {
            **_common_constants(tokens, prepared, teacher, loss, cut.tile),
            "BLOCK_O": cut.tile.forward.outputs,
            "POOL": given["pooled"] is not None,
            "LIFT": given["lifted"] is not None,
            "STATS": given["stats"] is not None,
        },
        num_warps=cut.tile.forward.warps,
        num_stages=cut.tile.forward.stages,
    )


class PooledUpstream:
    """The gradient of the pooled tokens as the kernels take it.

    Attributes:
        share: [B, Dt] fp32, the part of every token of an image.
        projected: [B, Ds + 1], see `kernels.pooled_projection`.
        launches: that fill it.
    """

    def __init__(self, upstream: Tensor, tokens: Tensor, prepared: Prepared) -> None:
        images, width = upstream.shape
        channels = tokens.shape[3]
        self.share = (upstream.float() / tokens.shape[1:3].numel()).contiguous()
        self.projected = tokens.new_empty((images, channels + 1), dtype=torch.float32)
        self.launches = []
        if prepared.norm_weight is None:
            return
        self.launches.append(
            KernelLaunch(
                kernels.pooled_projection,
                (triton.cdiv(images, 16), triton.cdiv(channels, BLOCK)),
                {
                    "pooled_upstream": self.share,
                    "norm_weight": prepared.norm_weight,
                    "weight": prepared.weight,
                    "bias": prepared.weight if prepared.bias is None else prepared.bias,
                    "projected": self.projected,
                    "images": images,
                    "channels": channels,
                    "width": width,
                    "weight_row": prepared.weight.shape[1],
                },
                {
                    "HAS_BIAS": prepared.bias is not None,
                    "BLOCK_B": 16,
                    "BLOCK_O": BLOCK,
                    "BLOCK_I": BLOCK,
                },
            )
        )


class GradientWork:
    """The gradients in the making: band by band, then summed."""

    def __init__(
        self,
        tokens: Tensor,
        projection: Projection,
        prepared: Prepared,
        teacher: Tensor | None,
        loss: str,
        beta: float,
        stats: Tensor,
        needs: Sequence[bool],
        cut: Cut,
    ) -> None:
        self.tokens, self.prepared, self.teacher, self.cut = tokens, prepared, teacher, cut
        self.loss, self.beta, self.stats = loss, beta, stats
        self.results = projection.empty_gradients(tokens, needs)
        self.need_tokens, self.need_weight, *vectors = needs
        self.need_vectors = vectors
        width = projection.width
        self.band_tiles = min(cut.tiles, max(1, BAND_TOKENS // cut.tile_rows))
        self.slopes = self.partials = self.columns = self.sums = None
        self.split_tokens = 0
        if self.need_weight:
            band_tokens = self.band_tiles * cut.tile_rows
            self.slopes = tokens.new_empty((band_tokens, width), dtype=projection.compute)
            self.split_tokens = _split_tokens(band_tokens, projection.weight)
            splits = triton.cdiv(band_tokens, self.split_tokens)
            shape = splits, *projection.weight.shape
            self.partials = tokens.new_empty(shape, dtype=torch.float32)
        if any(vectors):
            shape = cut.tiles, 3, width
            # Without a norm there is nobody to write its weight's column sums.
            fill = tokens.new_empty if prepared.normed else tokens.new_zeros
            self.columns = fill(shape, dtype=torch.float32)
            self.sums = tokens.new_empty((3, width), dtype=torch.float32)

    def bands(self) -> list[Band]:
        """All tiles; in bands of a bounded number where slopes are kept for the weight."""
        step = self.band_tiles if self.need_weight else self.cut.tiles
        return [
            Band(first, min(step, self.cut.tiles - first))
            for first in range(0, self.cut.tiles, step)
        ]

    def launches(
        self, band: Band, upstream: Tensor | None, pooled: PooledUpstream | None
    ) -> list[KernelLaunch]:
        """The gradient of a band, and what it adds to the weight's."""
        launches = [self._gradient(band, upstream, pooled)]
        if self.need_weight:
            launches.append(self._weight(band))
        return launches

    def _gradient(
        self, band: Band, upstream: Tensor | None, pooled: PooledUpstream | None
    ) -> KernelLaunch:
        tokens, prepared, gradient = self.tokens, self.prepared, self.results[0]
        tile = self.cut.tile
        blocks = triton.cdiv(tokens.shape[3], tile.channels) if self.need_tokens else 1
        slabs = triton.cdiv(blocks, tile.slab_blocks)
        target = gradient if self.need_tokens else tokens
        unused = prepared.weight
        optional = {
            "upstream": upstream,
            "pooled_upstream": None if pooled is None else pooled.share,
            "pooled_projected": None if pooled is None else pooled.projected,
            "slopes": self.slopes,
            "columns": self.columns,
        }
        scale = 0.0
        if self.teacher is not None:
            scale = mean_scale(self.teacher, self.teacher, self.loss)
        return KernelLaunch(
            kernels.token_gradient,
            (band.tiles, slabs),
            {
                **{name: unused if x is None else x for name, x in optional.items()},
                **_common_arguments(tokens, prepared, self.teacher, self.beta, self.cut, band),
                **_strides("gradient", target),
                "stats": self.stats,
                "gradient": gradient if self.need_tokens else unused,
                "scale": scale,
            },
            {
                **_common_constants(tokens, prepared, self.teacher, self.loss, tile),
                "BLOCK_O": tile.gradient.outputs,
                "UPSTREAM": upstream is not None,
                "POOLED": pooled is not None,
                "ROWS": self.need_tokens,
                "SLOPES": self.need_weight,
                "COLUMNS": self.columns is not None,
                "SLAB": triton.cdiv(blocks, slabs),
            },
            num_warps=tile.gradient.warps,
            num_stages=tile.gradient.stages,
        )

    def _weight(self, band: Band) -> KernelLaunch:
        assert self.slopes is not None and self.partials is not None
        tokens = self.tokens
        splits, width, channels = self.partials.shape
        first = band.first_tile * self.cut.tile_rows
        compute = self.prepared.compute
        block = WEIGHT_BLOCK_FLOAT if compute == torch.float32 else BLOCK
        return KernelLaunch(
            kernels.weight_gradient,
            (triton.cdiv(width, block), triton.cdiv(channels, block), splits),
            {
                "tokens": tokens,
                "slopes": self.slopes,
                "partials": self.partials,
                "first_position": first,
                "band_tokens": min(band.tiles * self.cut.tile_rows, self.cut.tokens - first),
                "split_tokens": self.split_tokens,
                "image_tokens": tokens.shape[1:3].numel(),
                "grid_width": tokens.shape[2],
                "channels": channels,
                "width": width,
                **_strides("tokens", tokens),
            },
            {
                "ADD": band.first_tile > 0,
                **_products(compute),
                "BLOCK_M": block,
                "BLOCK_O": block,
                "BLOCK_I": block,
            },
            num_warps=4,
            num_stages=3,
        )

    def finish(self) -> Gradients:
        """Sum what the bands and tiles have left, in a fixed order."""
        _run(self.finish_launches())
        if self.sums is not None:
            if self.prepared.normed:
                self.sums[0] -= self.sums[0].mean()
            for vector, total, needed in zip(
                self.results[2:], self.sums, self.need_vectors, strict=True
            ):
                if needed:
                    vector.copy_(total)
        return self.results

    def finish_launches(self) -> list[KernelLaunch]:
        """The sums of the weight's partial gradients, and of the columns."""
        launches = []
        if self.partials is not None:
            splits = self.partials.shape[0]
            weight = self.results[1]
            launches.append(_centre_launch(self.partials, weight, splits, self.prepared.normed))
        if self.columns is not None and self.sums is not None:
            tiles, _, width = self.columns.shape
            launches.append(
                KernelLaunch(
                    kernels.finish_columns,
                    (triton.cdiv(3 * width, BLOCK),),
                    {"columns": self.columns, "result": self.sums, "tiles": tiles, "width": width},
                    {"BLOCK_R": BLOCK, "BLOCK_C": BLOCK},
                )
            )
        return launches


def _split_tokens(band_tokens: int, weight: Tensor) -> int:
    """Tokens per partial sum of the weight's gradient: enough programs for a GPU, few partials."""
    blocks = triton.cdiv(weight.shape[0], BLOCK) * triton.cdiv(weight.shape[1], BLOCK)
    splits = max(1, min(triton.cdiv(band_tokens, 4 * BLOCK), triton.cdiv(2 * 132, blocks)))
    return triton.cdiv(triton.cdiv(band_tokens, splits), BLOCK) * BLOCK


def _resident_blocks(tokens: Tensor, tile: Tile) -> int:
    blocks = triton.cdiv(tokens.shape[3], tile.channels)
    return blocks if blocks <= tile.resident_blocks else 0


def _products(compute: torch.dtype) -> dict[str, Any]:
    names = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
    # float32 stays float32: three products of tf32 parts. Half dtypes ignore the precision.
    return {"COMPUTE": names[compute], "PRECISION": "tf32x3"}


HALF_ROW_PRECISION = {torch.float32: "tf32x3", torch.float16: "tf32", torch.bfloat16: "bf16"}


def _common_constants(
    tokens: Tensor, prepared: Prepared, teacher: Tensor | None, loss: str, tile: Tile
) -> dict[str, Any]:
    return {
        "NORMED": prepared.normed,
        "HAS_BIAS": prepared.bias is not None,
        "HAS_NORM_BIAS": prepared.norm_bias is not None,
        "TEACHER": teacher is not None,
        "LOSS": LOSSES.index(loss),
        "EVEN_ROWS": tokens.shape[2] % 2 == 0,
        "HALF_ROW": HALF_ROW_PRECISION[prepared.compute],
        **_products(prepared.compute),
        "RESIDENT": _resident_blocks(tokens, tile),
        "BLOCK_M": tile.rows,
        "BLOCK_I": tile.channels,
    }


def _common_arguments(
    tokens: Tensor,
    prepared: Prepared,
    teacher: Tensor | None,
    beta: float,
    cut: Cut,
    band: Band,
) -> dict[str, Any]:
    width, weight_row = prepared.weight.shape
    grid_width = tokens.shape[2]
    unused = prepared.weight
    return {
        "tokens": tokens,
        "weight": prepared.weight,
        "bias": unused if prepared.bias is None else prepared.bias,
        "norm_weight": unused if prepared.norm_weight is None else prepared.norm_weight,
        "norm_bias": unused if prepared.norm_bias is None else prepared.norm_bias,
        "teacher": unused if teacher is None else teacher,
        "token_count": cut.tokens,
        "first_tile": band.first_tile,
        "tile_rows": cut.tile_rows,
        "image_tokens": tokens.shape[1:3].numel(),
        "grid_width": grid_width,
        "channels": tokens.shape[3],
        "width": width,
        "weight_row": weight_row,
        "beta": beta,
        "inverse_half_row": 2 / grid_width if grid_width % 2 == 0 else 1 / grid_width,
        **_strides("tokens", tokens),
        **_strides("teacher", tokens if teacher is None else teacher),
    }


def _strides(name: str, x: Tensor) -> dict[str, int]:
    batch, row, column, channel = x.stride()
    return {
        f"{name}_batch": batch,
        f"{name}_row": row,
        f"{name}_column": column,
        f"{name}_channel": channel,
    }


def tuned(tokens: Tensor, projection: Projection, loss: str, default: Tile, run: Run) -> Tile:
    """The fastest configuration for inputs like these; ``default`` unless tuning is asked for.

    Args:
        tokens: [B, H, W, Ds] on a GPU.
        projection: to what the tokens are lifted, and how.
        loss: one of feature_kd's.
        default: what runs without tuning, and while a CUDA graph is captured.
        run: runs forward and backward with a configuration, on tokens and teacher.

    Returns:
        The configuration.
    """
    if os.environ.get(ENVIRONMENT_AUTOTUNE) != "1" or tokens.device.type != "cuda":
        return default
    key = _shape_class(tokens, projection, loss)
    if key not in _best:
        if torch.cuda.is_current_stream_capturing():
            return default
        _best[key] = _search(tokens, projection, loss, default, run)
    return _best[key]


def _shape_class(tokens: Tensor, projection: Projection, loss: str) -> tuple[Any, ...]:
    return (
        torch.cuda.get_device_name(tokens.device),
        tokens.dtype,
        projection.compute,
        *tokens.shape[1:],
        projection.width,
        projection.norm_weight is not None,
        loss,
    )


def _search(tokens: Tensor, projection: Projection, loss: str, default: Tile, run: Run) -> Tile:
    batch = min(len(tokens), MAX_IMAGES)
    sample = torch.randn(batch, *tokens.shape[1:], device=tokens.device).to(tokens.dtype)
    teacher = torch.randn(*sample.shape[:3], projection.width, device=tokens.device)
    teacher = teacher.to(tokens.dtype)
    # A candidate must also take every grid row that the default takes: what an operator refuses
    # does not depend on tuning.
    candidates = [tile for tile in CANDIDATES if tile.rows >= default.rows or loss != "spectral"]
    times = {tile: _milliseconds(tile, sample, teacher, run) for tile in (default, *candidates)}
    best = min(times, key=times.__getitem__)
    shape = [*tokens.shape[1:], projection.width]
    logger.info(
        "lift_kd: tuned %s %s: %.3f ms with %s, %.3f ms by default",
        shape, loss, times[best], best, times[default],
    )  # fmt: skip
    return best


def _milliseconds(tile: Tile, sample: Tensor, teacher: Tensor, run: Run) -> float:
    from triton.testing import do_bench

    try:
        return do_bench(lambda: run(tile, sample, teacher), return_mode="median")
    except triton.runtime.errors.OutOfResources:
        return math.inf
