"""lift_kd's launches: which Triton kernels run, on what, in which order. The kernels: kernels.py.

Where the loss is all there is, forward and gradient of a band of tokens follow each other, so that
tokens and teacher come from memory once: the one-pass form. Where pooled tokens are used, their
gradient is known only in the backward, which computes the lifted tokens again: the recompute form.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastkd.ops.feature_kd.reference import LOSSES, mean_scale
from fastkd.ops.feature_kd.triton import finish_launch
from fastkd.ops.lift_kd import kernels
from fastkd.ops.lift_kd.reference import COSINE_EPS, Gradients, Inputs
from fastkd.ops.operator import KernelLaunch

BLOCK = 64  # channels per block where there is nothing to choose
BAND_TOKENS = 2 * 132 * 64  # two tiles per SM of an H100; their slopes (13 MB) stay in its L2 cache
WEIGHT_BLOCK_FLOAT = 32  # of weight_gradient: three products of tf32 parts take more registers
SCALE_BLOCK = 4096
ROW_MULTIPLE = 16  # elements
MAX_TOKENS = 2**31 - 1


@dataclass(frozen=True)
class Loop:
    """How a kernel walks the outputs."""

    outputs: int  # per chunk, BLOCK_O
    warps: int
    stages: int


@dataclass(frozen=True)
class Tile:
    """A configuration of the kernels `forward` and `token_gradient`."""

    rows: int  # tokens per tile, BLOCK_M
    channels: int  # of the tokens per block, BLOCK_I
    resident_blocks: int  # up to so many blocks of a token's channels stay for all outputs
    slab_blocks: int  # of the tokens' gradient that one program accumulates
    forward: Loop
    gradient: Loop


# They compile without spilling (tests/ops/test_lift_kd_compiled.py); no GPU has run them yet.
HALF = Tile(64, 64, 4, 4, forward=Loop(32, 8, 2), gradient=Loop(32, 8, 2))
SMALL_HALF = Tile(32, 64, 4, 4, forward=Loop(32, 4, 2), gradient=Loop(32, 8, 2))
FLOAT = Tile(32, 32, 0, 2, forward=Loop(32, 8, 2), gradient=Loop(16, 8, 2))


def tile_of(inputs: Inputs, arch: int | None = None) -> Tile:
    """The configuration for a compute capability times ten; that of the GPU, or 90 without one."""
    if inputs.compute == torch.float32:
        return FLOAT
    if arch is None:
        on_gpu = inputs.tokens.is_cuda
        major, minor = torch.cuda.get_device_capability(inputs.tokens.device) if on_gpu else (9, 0)
        arch = 10 * major + minor
    # 120 (consumer GPUs) has no wgmma or tcgen05. Channels that are no multiple of 16 take more
    # registers for addresses.
    large = 90 <= arch < 120 and inputs.tokens.shape[3] % 16 == 0
    return HALF if large else SMALL_HALF


@dataclass(frozen=True)
class Cut:
    """How the tokens of a batch are cut into tiles."""

    tile: Tile
    tile_rows: int  # tokens in a tile; whole grid rows for spectral, so fewer than `Tile.rows`
    tokens: int
    tiles: int
    images: int  # that a tile touches at most

    @staticmethod
    def of(inputs: Inputs, arch: int | None = None) -> Cut:
        tile = tile_of(inputs, arch)
        batch, height, width = inputs.tokens.shape[:3]
        tile_rows = tile.rows // width * width if inputs.loss == "spectral" else tile.rows
        count = batch * height * width
        images = min(batch, (tile_rows - 2) // (height * width) + 2)
        return Cut(tile, tile_rows, count, triton.cdiv(count, tile_rows), images)


@dataclass(frozen=True)
class Band:
    """Consecutive tiles that are worked on together."""

    first_tile: int
    tiles: int


def refuses(inputs: Inputs) -> str | None:
    """Why these inputs cannot run here; None where they can."""
    tokens, rows = inputs.tokens, tile_of(inputs).rows
    if inputs.loss == "spectral" and tokens.shape[2] > rows:
        return f"a grid row must have at most {rows} tokens, got {tokens.shape[2]}"
    if tokens.shape[:3].numel() + BAND_TOKENS > MAX_TOKENS:
        return f"at most 2^31 tokens, got {tokens.shape[:3].numel()}"
    for name, x in (("student", tokens), ("teacher", inputs.teacher)):
        if x is not None and (x.shape[-1] - 1) * x.stride(3) >= 2**31:
            return f"the channels of {name} span more than 2^31 elements of memory"
    return None


def forward(inputs: Inputs, pool: bool) -> tuple[Tensor, Tensor, Tensor]:
    """As `reference.forward`, with statistics: 1 / std and three slopes of every token."""
    value = inputs.tokens.new_zeros((), dtype=torch.float32)
    stats = _floats(inputs, *inputs.stats_shape)
    pooled = _floats(inputs, inputs.tokens.shape[0], inputs.width if pool else 0)
    prepared, launches = prepare(inputs)
    _run([*launches, *forward_launches(prepared, value, pooled, stats, Cut.of(inputs))])
    return value, pooled, stats


def lift(inputs: Inputs, out_dtype: torch.dtype) -> Tensor:
    """As `reference.lift`."""
    cut, shape = Cut.of(inputs), (*inputs.tokens.shape[:3], inputs.width)
    lifted = inputs.tokens.new_empty(shape, dtype=out_dtype)
    prepared, launches = prepare(inputs)
    _run([*launches, forward_launch(prepared, cut, Band(0, cut.tiles), lifted=lifted)])
    return lifted


def one_pass(inputs: Inputs, needs: Sequence[bool]) -> tuple[Tensor, ...]:
    """As `reference.one_pass`: forward and gradient follow each other band by band."""
    cut, teacher = Cut.of(inputs), inputs.teacher
    assert teacher is not None
    value, stats = _floats(inputs), _floats(inputs, *inputs.stats_shape)
    partials = _floats(inputs, cut.tiles)
    prepared, launches = prepare(inputs)
    _run(launches)
    work = GradientWork(inputs, prepared, stats, needs, cut, exact=True)
    for band in work.bands():
        forward_launch(prepared, cut, band, stats=stats, partials=partials).run()
        _run(work.launches(band))
    finish_launch(partials, value, mean_scale(teacher, teacher, inputs.loss)).run()
    return value, *work.finish()


def backward(
    upstream: Tensor | None,
    pooled_upstream: Tensor | None,
    inputs: Inputs,
    stats: Tensor,
    needs: Sequence[bool],
) -> Gradients:
    """As `reference.backward`; ``stats`` are those of this file's `forward`."""
    cut = Cut.of(inputs)
    prepared, launches = prepare(inputs)
    if upstream is None or inputs.teacher is None:
        upstream, prepared = None, replace(prepared, teacher=None)
    pooled = None
    if pooled_upstream is not None:
        *pooled, projection = pooled_gradient(pooled_upstream, prepared)
        launches += projection
    _run(launches)
    work = GradientWork(inputs, prepared, stats, needs, cut, upstream, pooled)
    for band in work.bands():
        _run(work.launches(band))
    return work.finish()


def scale(gradient: Tensor, upstream: Tensor) -> None:
    """Multiply a dense gradient by a scalar in place; free where it is 1, and never waited for."""
    KernelLaunch(
        kernels.scale_in_place,
        (triton.cdiv(gradient.numel(), SCALE_BLOCK),),
        {"gradient": gradient, "upstream": upstream, "count": gradient.numel()},
        {"BLOCK": SCALE_BLOCK},
    ).run()


def _run(launches: Sequence[KernelLaunch]) -> None:
    for launch in launches:
        launch.run()


def _floats(inputs: Inputs, *shape: int) -> Tensor:
    return inputs.tokens.new_empty(shape, dtype=torch.float32)


def prepare(inputs: Inputs) -> tuple[Inputs, list[KernelLaunch]]:
    """The inputs with buffers for parameters as the kernels take them, and what fills these.

    The weight is in the dtype of the products, the bias in float32, both centered over the outputs
    under a LayerNorm. The weight's rows are padded with zeros to `ROW_MULTIPLE`, so that they can
    be loaded 16 bytes at once.
    """
    launches = []
    weight, bias, compute = inputs.weight, inputs.bias, inputs.compute
    padded = triton.cdiv(weight.shape[1], ROW_MULTIPLE) * ROW_MULTIPLE
    as_is = weight.dtype == compute and weight.is_contiguous()
    if inputs.normed or not as_is or padded > weight.shape[1]:
        source = weight.contiguous()
        weight = weight.new_empty((weight.shape[0], padded), dtype=compute)
        launches.append(_center_launch(source, weight, 1, inputs.normed))
    plain = bias is not None and bias.dtype == torch.float32 and bias.is_contiguous()
    if bias is not None and (inputs.normed or not plain):
        source = bias.contiguous()
        bias = torch.empty_like(source, dtype=torch.float32)
        launches.append(_center_launch(source[:, None], bias[:, None], 1, inputs.normed))
    norm_weight, norm_bias = (
        None if x is None else x.contiguous() for x in (inputs.norm_weight, inputs.norm_bias)
    )
    prepared = replace(
        inputs, weight=weight, bias=bias, norm_weight=norm_weight, norm_bias=norm_bias
    )
    return prepared, launches


def _center_launch(source: Tensor, target: Tensor, parts: int, center: bool) -> KernelLaunch:
    """``source`` is [parts * rows, columns], ``target`` [rows, columns or more]."""
    rows, target_row = target.shape
    columns = source.shape[-1]
    return KernelLaunch(
        kernels.center_columns,
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
        {"CENTER": center, "BLOCK_R": BLOCK, "BLOCK_C": BLOCK},
        num_warps=8,
    )


def forward_launches(
    prepared: Inputs, value: Tensor, pooled: Tensor, stats: Tensor, cut: Cut
) -> list[KernelLaunch]:
    """All tiles in one launch, then the sums of the loss and of the pooled tokens."""
    width, teacher = prepared.width, prepared.teacher
    partials = _floats(prepared, cut.tiles)
    sums = _floats(prepared, cut.tiles, cut.images, width) if pooled.numel() > 0 else None
    band = Band(0, cut.tiles)
    launches = [forward_launch(prepared, cut, band, stats=stats, partials=partials, pooled=sums)]
    if teacher is not None:
        launches.append(finish_launch(partials, value, mean_scale(teacher, teacher, prepared.loss)))
    if sums is not None:
        launches.append(
            KernelLaunch(
                kernels.finish_pool,
                (prepared.tokens.shape[0], triton.cdiv(width, BLOCK)),
                {
                    "partials": sums,
                    "pooled": pooled,
                    "tile_rows": cut.tile_rows,
                    "image_tokens": prepared.tokens.shape[1:3].numel(),
                    "images": cut.images,
                    "width": width,
                },
                {"BLOCK_C": BLOCK},
                num_warps=2,
            )
        )
    return launches


def forward_launch(
    prepared: Inputs,
    cut: Cut,
    band: Band,
    *,
    stats: Tensor | None = None,
    partials: Tensor | None = None,
    pooled: Tensor | None = None,
    lifted: Tensor | None = None,
) -> KernelLaunch:
    """Statistics, partial losses, sums for the pooled tokens, or the lifted tokens of a band."""
    outputs = {"stats": stats, "partials": partials, "pooled": pooled, "lifted": lifted}
    # The lifted tokens alone need no teacher, even where there is one.
    inputs = prepared if lifted is None else replace(prepared, teacher=None)
    return KernelLaunch(
        kernels.forward,
        (band.tiles,),
        {
            **{name: prepared.weight if x is None else x for name, x in outputs.items()},
            **_common_arguments(inputs, cut, band),
            "images": cut.images,
            "norm_eps": prepared.eps,
            "cosine_eps": COSINE_EPS,
        },
        {
            **_common_constants(inputs, cut.tile),
            "BLOCK_O": cut.tile.forward.outputs,
            "POOL": pooled is not None,
            "LIFT": lifted is not None,
            "STATS": stats is not None,
        },
        num_warps=cut.tile.forward.warps,
        num_stages=cut.tile.forward.stages,
    )


def pooled_gradient(
    upstream: Tensor, prepared: Inputs
) -> tuple[Tensor, Tensor, list[KernelLaunch]]:
    """The gradient of the pooled tokens as the kernels take it, and the launches that fill it.

    [B, Dt] float32 is the part of every token of an image; for [B, Ds + 1] float32 see
    `kernels.pooled_projection`.
    """
    images, width = upstream.shape
    channels = prepared.tokens.shape[3]
    share = (upstream.float() / prepared.tokens.shape[1:3].numel()).contiguous()
    projected = _floats(prepared, images, channels + 1)
    if prepared.norm_weight is None:
        return share, projected, []
    launch = KernelLaunch(
        kernels.pooled_projection,
        (triton.cdiv(images, 16), triton.cdiv(channels, BLOCK)),
        {
            "pooled_upstream": share,
            "norm_weight": prepared.norm_weight,
            "weight": prepared.weight,
            "bias": prepared.weight if prepared.bias is None else prepared.bias,
            "projected": projected,
            "images": images,
            "channels": channels,
            "width": width,
            "weight_row": prepared.weight.shape[1],
        },
        {"HAS_BIAS": prepared.bias is not None, "BLOCK_B": 16, "BLOCK_O": BLOCK, "BLOCK_I": BLOCK},
    )
    return share, projected, [launch]


class GradientWork:
    """The gradients in the making: band by band, then summed.

    ``pooled`` are the two tensors of `pooled_gradient`; ``exact`` as for `Inputs.empty_gradients`.
    """

    def __init__(
        self,
        inputs: Inputs,
        prepared: Inputs,
        stats: Tensor,
        needs: Sequence[bool],
        cut: Cut,
        upstream: Tensor | None = None,
        pooled: Sequence[Tensor] | None = None,
        *,
        exact: bool = False,
    ) -> None:
        self.prepared, self.stats, self.cut = prepared, stats, cut
        self.upstream, self.pooled = upstream, pooled
        self.results = inputs.empty_gradients(needs, exact)
        self.need_tokens, self.need_weight, *self.need_vectors = needs
        width = inputs.width
        self.band_tiles = min(cut.tiles, max(1, BAND_TOKENS // cut.tile_rows))
        self.slopes = self.partials = self.columns = self.sums = None
        self.split_tokens = 0
        if self.need_weight:
            band_tokens = self.band_tiles * cut.tile_rows
            self.slopes = inputs.tokens.new_empty((band_tokens, width), dtype=inputs.compute)
            self.split_tokens = _split_tokens(band_tokens, inputs.weight)
            splits = triton.cdiv(band_tokens, self.split_tokens)
            self.partials = _floats(inputs, splits, *inputs.weight.shape)
        if any(self.need_vectors):
            self.columns = _floats(inputs, cut.tiles, 3, width)
            if not inputs.normed:
                self.columns.zero_()  # no kernel writes the column sums of a norm's weight
            self.sums = _floats(inputs, 3, width)

    def bands(self) -> list[Band]:
        """All tiles; in bands of a bounded number where slopes are kept for the weight."""
        step = self.band_tiles if self.need_weight else self.cut.tiles
        return [
            Band(first, min(step, self.cut.tiles - first))
            for first in range(0, self.cut.tiles, step)
        ]

    def launches(self, band: Band) -> list[KernelLaunch]:
        """The gradient of a band, and what it adds to the weight's."""
        return [self._gradient(band), *([self._weight(band)] if self.need_weight else [])]

    def _gradient(self, band: Band) -> KernelLaunch:
        prepared, gradient = self.prepared, self.results[0]
        tile, teacher = self.cut.tile, prepared.teacher
        blocks = triton.cdiv(prepared.tokens.shape[3], tile.channels) if self.need_tokens else 1
        slabs = triton.cdiv(blocks, tile.slab_blocks)
        share, projected = self.pooled or (None, None)
        optional = {
            "upstream": self.upstream,
            "pooled_upstream": share,
            "pooled_projected": projected,
            "slopes": self.slopes,
            "columns": self.columns,
            "gradient": gradient if self.need_tokens else None,
        }
        return KernelLaunch(
            kernels.token_gradient,
            (band.tiles, slabs),
            {
                **{name: prepared.weight if x is None else x for name, x in optional.items()},
                **_common_arguments(prepared, self.cut, band),
                **_strides("gradient", gradient if self.need_tokens else prepared.tokens),
                "stats": self.stats,
                "scale": 0.0 if teacher is None else mean_scale(teacher, teacher, prepared.loss),
            },
            {
                **_common_constants(prepared, tile),
                "BLOCK_O": tile.gradient.outputs,
                "UPSTREAM": self.upstream is not None,
                "POOLED": self.pooled is not None,
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
        tokens, compute = self.prepared.tokens, self.prepared.compute
        splits, width, channels = self.partials.shape
        first = band.first_tile * self.cut.tile_rows
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
            launches.append(_center_launch(self.partials, weight, splits, self.prepared.normed))
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


def _products(compute: torch.dtype) -> dict[str, Any]:
    names = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
    # float32 stays float32: three products of tf32 parts. Half dtypes ignore the precision.
    return {"COMPUTE": names[compute], "PRECISION": "tf32x3"}


HALF_ROW_PRECISION = {torch.float32: "tf32x3", torch.float16: "tf32", torch.bfloat16: "bf16"}


def _common_constants(prepared: Inputs, tile: Tile) -> dict[str, Any]:
    blocks = triton.cdiv(prepared.tokens.shape[3], tile.channels)
    return {
        "NORMED": prepared.normed,
        "HAS_BIAS": prepared.bias is not None,
        "HAS_NORM_BIAS": prepared.norm_bias is not None,
        "TEACHER": prepared.teacher is not None,
        "LOSS": LOSSES.index(prepared.loss),
        "EVEN_ROWS": prepared.tokens.shape[2] % 2 == 0,
        "HALF_ROW": HALF_ROW_PRECISION[prepared.compute],
        **_products(prepared.compute),
        "RESIDENT": blocks if blocks <= tile.resident_blocks else 0,
        "BLOCK_M": tile.rows,
        "BLOCK_I": tile.channels,
    }


def _common_arguments(prepared: Inputs, cut: Cut, band: Band) -> dict[str, Any]:
    tokens, teacher = prepared.tokens, prepared.teacher
    width, weight_row = prepared.weight.shape
    grid_width = tokens.shape[2]
    optional = {
        "bias": prepared.bias,
        "norm_weight": prepared.norm_weight,
        "norm_bias": prepared.norm_bias,
        "teacher": teacher,
    }
    return {
        "tokens": tokens,
        "weight": prepared.weight,
        **{name: prepared.weight if x is None else x for name, x in optional.items()},
        "token_count": cut.tokens,
        "first_tile": band.first_tile,
        "tile_rows": cut.tile_rows,
        "image_tokens": tokens.shape[1:3].numel(),
        "grid_width": grid_width,
        "channels": tokens.shape[3],
        "width": width,
        "weight_row": weight_row,
        "beta": prepared.beta,
        "inverse_half_row": 2 / grid_width if grid_width % 2 == 0 else 1 / grid_width,
        **_strides("tokens", tokens),
        **_strides("teacher", tokens if teacher is None else teacher),
    }


def _strides(name: str, x: Tensor) -> dict[str, int]:
    axes = ("batch", "row", "column", "channel")
    return {f"{name}_{axis}": stride for axis, stride in zip(axes, x.stride(), strict=True)}
