"""second_moment: what it computes, on every backend, against float64 outer products."""

from __future__ import annotations

import logging
from dataclasses import replace

import numpy
import pytest
import torch
from torch import Tensor

from fastkd.ops import self_check
from fastkd.ops.backend import Implementation
from fastkd.ops.second_moment import BACKENDS, reference, second_moment
from fastkd.ops.second_moment.reference import WEIGHTS
from tests.harness.cases import FINITE, laid_out, relative_error
from tests.ops.operators import MOMENTS

DTYPES = [torch.float32, torch.float16, torch.bfloat16]

# [B, N, D]
# [B, N, D]; float32 takes all in test_conformance.py. Tiles of half precision need width.
SHAPES = [
    pytest.param(
        (batch, height * width, channels),
        id=name,
        marks=[] if channels in (33, 150, 256) else pytest.mark.slow,
    )
    for name, (batch, height, width, channels) in MOMENTS.items()
]


# There are no kernels in CUDA C++ for this.
on_every_backend = pytest.mark.parametrize("backend", ["torch", "triton"], indirect=True)
on_triton = pytest.mark.parametrize("backend", ["triton"], indirect=True)


def outer_products(tokens: Tensor, weight: str) -> Tensor:
    """The definition, independent of ours: one numpy outer product per token."""
    rows = tokens.double().cpu().numpy().reshape(-1, tokens.shape[-1])
    moment = numpy.zeros((rows.shape[1],) * 2)
    for row in rows:
        energy = row @ row
        if weight == "none":
            moment += numpy.outer(row, row)
        elif energy > 0:
            moment += numpy.outer(row / energy, row)
    return torch.from_numpy(moment)


def measure(tokens: Tensor, weight: str, backend: str) -> Tensor:
    return second_moment(tokens, weight, backend=backend)


def measured(backend, tokens: Tensor, weight: str) -> Tensor:
    return backend.call(measure, tokens.to(backend.device), weight, backend.name).cpu()


def draw(case: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return FINITE[case](shape)[0].to(dtype)


def layouts(tokens: Tensor, layout: str) -> Tensor:
    """[B, N, D] tokens as views of other shapes than [B, N, D]."""
    if layout == "flat":
        return tokens.flatten(0, 1)
    if layout == "layers_sliced":
        return torch.stack([tokens, tokens, tokens])[1:2]
    assert layout == "cropped_map"
    rows = tokens.unsqueeze(1)
    return torch.cat([rows, rows], dim=1)[:, 1:]


@on_every_backend
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_is_right_and_exactly_symmetric(backend, shape, weight, dtype):
    tokens = draw("noise", shape, dtype)
    moment = measured(backend, tokens, weight)
    assert moment.dtype == torch.float64
    assert relative_error(moment, outer_products(tokens, weight)) < 1e-5
    assert torch.equal(moment, moment.mT)


@on_every_backend
@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize("layout", ["flat", "layers_sliced", "cropped_map"])
def test_any_leading_dimensions(backend, layout, weight):
    tokens = layouts(draw("noise", (3, 20, 24), torch.float32), layout)
    moment = measured(backend, tokens, weight)
    assert relative_error(moment, outer_products(tokens, weight)) < 1e-5


@pytest.mark.parametrize("layout", ["cls_sliced_off", "transposed", "flat", "layers_sliced"])
def test_tokens_that_two_strides_reach_are_not_copied(layout):
    tokens = torch.randn(3, 20, 24)
    own = layout in ("flat", "layers_sliced")
    tokens = layouts(tokens, layout) if own else laid_out(tokens.unsqueeze(1), layout)
    assert reference.as_images(tokens).data_ptr() == tokens.data_ptr()


def test_a_map_is_one_view_of_tokens():
    maps = torch.randn(2, 8, 5, 6)
    tokens = maps.permute(0, 2, 3, 1)
    images = reference.as_images(tokens)
    assert images.shape == (2, 30, 8) and images.data_ptr() == maps.data_ptr()
    assert torch.equal(images, tokens.flatten(1, 2))


@pytest.mark.parametrize("shape", [(4, 3, 2), (1, 20, 2), (2, 11, 2), (3, 1, 2)], ids=str)
def test_chunks_hold_every_token_once_and_in_order(shape):
    tokens = torch.randn(shape)
    chunks = list(reference.row_chunks(tokens, 8))
    assert torch.equal(torch.cat(chunks), tokens.flatten(0, 1))
    assert max(len(chunk) for chunk in chunks) <= 8


@on_every_backend
def test_row_norm_takes_float16_tokens_whose_channels_are_all_small_parts_of_them(backend):
    # What rounding leaves over of x / ||x||^2 is then as small as it gets, and the same everywhere.
    tokens = (1.7 * torch.randn(1, 6, 768).sign()).half()
    moment = measured(backend, tokens, "row_norm")
    assert relative_error(moment, outer_products(tokens, "row_norm")) < 2e-6


@on_every_backend
@pytest.mark.parametrize("scale", [1e-40, 1e-25, 1e25, 1e37])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_row_norm_takes_tokens_whose_squares_float32_cannot_hold(backend, dtype, scale):
    tokens = (torch.randn(2, 9, 40).double() * scale).to(dtype)
    truth = outer_products(tokens.double() / scale, "row_norm")
    assert relative_error(measured(backend, tokens, "row_norm"), truth) < 1e-5


def test_row_norm_takes_tokens_whose_squares_float64_cannot_hold():
    tokens = torch.randn(9, 8, dtype=torch.float64)
    truth = outer_products(tokens, "row_norm")
    for scale in (1e-200, 1e200):
        assert relative_error(second_moment(tokens * scale, "row_norm"), truth) < 1e-13


@on_every_backend
def test_row_norm_takes_tokens_of_very_different_sizes(backend):
    tokens = torch.randn(2, 9, 40) * torch.logspace(-20, 20, 9)[:, None]
    truth = outer_products(tokens, "row_norm")
    assert relative_error(measured(backend, tokens, "row_norm"), truth) < 1e-5


@on_every_backend
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_trace_under_row_norm_counts_tokens_with_energy(backend, dtype):
    tokens = draw("noise", (2, 9, 40), dtype)
    tokens[0, 2:5] = 0
    moment = measured(backend, tokens, "row_norm")
    assert abs(moment.trace().item() - 15) < 1e-4


@on_every_backend
@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize("shape", [(0, 4, 8), (3, 0, 8), (0, 8)], ids=str)
def test_no_tokens_and_zero_tokens_give_zeros(backend, shape, weight):
    for tokens in (torch.empty(shape), torch.zeros(2, 3, 8)):
        moment = measured(backend, tokens, weight)
        assert moment.dtype == torch.float64
        assert torch.equal(moment, torch.zeros(8, 8, dtype=torch.float64))


@on_every_backend
def test_a_single_token_needs_no_leading_dimension(backend):
    token = torch.randn(8)
    assert relative_error(measured(backend, token, "none"), outer_products(token, "none")) < 1e-6


@on_every_backend
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_non_finite_token_is_handed_on(backend, bad, dtype):
    tokens = draw("noise", (2, 9, 40), dtype)
    tokens[1, 3, 5] = bad
    plain = measured(backend, tokens, "none")
    assert not plain[5].isfinite().any() and not plain[:, 5].isfinite().any()
    assert plain[:5, :5].isfinite().all() and plain[6:, 6:].isfinite().all()
    assert measured(backend, tokens, "row_norm").isnan().all()


@on_every_backend
def test_values_at_float16s_limit_do_not_overflow(backend):
    tokens = torch.full((2, 50, 16), 65504.0, dtype=torch.float16)
    moment = measured(backend, tokens, "none")
    assert relative_error(moment, torch.full((16, 16), 100 * 65504.0**2)) < 1e-6


def measured_in_bands(tokens: Tensor, weight: str) -> Tensor:
    """Triton with splits and bands so short that a few hundred tokens take several of them."""
    from fastkd.ops.second_moment import triton

    before = triton.SPLIT_ROWS, triton.SHORTEST_SPLIT, triton.MAX_SPLITS
    triton.SPLIT_ROWS, triton.SHORTEST_SPLIT, triton.MAX_SPLITS = 64, 32, 2
    try:
        return triton.forward(tokens, weight)
    finally:
        triton.SPLIT_ROWS, triton.SHORTEST_SPLIT, triton.MAX_SPLITS = before


@on_triton
@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_triton_adds_all_splits_of_all_bands(backend, dtype, weight):
    tokens = draw("noise", (2, 150, 40), dtype)
    moment = backend.call(measured_in_bands, tokens.to(backend.device), weight).cpu()
    assert relative_error(moment, outer_products(tokens, weight)) < 1e-5
    assert torch.equal(moment, moment.mT)


def test_torch_adds_all_chunks_and_strips():
    tokens = torch.randn(1, 2 * reference.CHUNK_ROWS + 7, reference.STRIP + 5)
    truth = tokens[0].double().mT @ tokens[0].double()
    assert relative_error(second_moment(tokens), truth) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_operands_lose_nothing_that_float32_keeps(dtype):
    """The path of GPUs: what a norm divides is two operands, the left one is exact."""
    rows = (torch.randn(300, 64) * torch.logspace(-4, 4, 300)[:, None]).to(dtype)
    left, rights = reference.operands(rows, "row_norm", dtype)
    assert left.dtype == dtype and {right.dtype for right in rights} == {dtype}
    moment = sum(left.double().mT @ right.double() for right in rights)
    assert relative_error(moment, outer_products(rows, "row_norm")) < 2e-6


@pytest.mark.slow
@pytest.mark.parametrize("magnitude", [1.0, 1.1, 1.3, 1.5, 1.7, 1.9, 6e-5, 6e4])
@pytest.mark.parametrize("channels", [384, 768, 1024, 4096])
def test_float16_operands_hold_what_is_left_over_of_many_equal_channels(channels, magnitude):
    rows = (magnitude * torch.randn(8, channels).sign()).half()
    left, rights = reference.operands(rows, "row_norm", torch.float16)
    moment = sum(left.double().mT @ right.double() for right in rights)
    assert relative_error(moment, reference.definition(rows.double(), "row_norm")) < 2e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_normalizing_by_powers_of_two_brings_every_norm_near_1(dtype):
    limits = torch.finfo(dtype)
    sizes = torch.tensor([limits.smallest_normal / 64, 1.0, limits.max / 64], dtype=dtype)
    rows = torch.randn(3, 200, dtype=dtype) * sizes[:, None]
    scaled, weighted = reference.normalized(rows)
    norms = scaled.norm(dim=-1)
    assert (norms >= 0.5 - 1e-6).all() and (norms <= 1 + 1e-6).all()
    assert torch.allclose((scaled * weighted).sum(dim=-1), torch.ones(3, dtype=dtype))


@pytest.mark.parametrize("shape", [(4, 0), ()], ids=str)
def test_tokens_without_channels_are_refused(shape):
    with pytest.raises(ValueError, match=r"second_moment: tokens must be .* one channel, got \["):
        second_moment(torch.zeros(shape))


def test_more_than_triton_can_count_is_refused():
    triton = pytest.importorskip("fastkd.ops.second_moment.triton")
    tokens = torch.empty(1, 1, 8, device="meta")
    assert triton.refuses(tokens, "none") is None
    assert "tokens, got 3000000000" in triton.refuses(tokens.expand(1, 3 * 10**9, 8), "none")
    assert "channels, got 40000" in triton.refuses(tokens[..., :1].expand(1, 1, 40000), "none")


def self_checked(name: str, device: str, dtype: torch.dtype, weight: str):
    tokens = torch.zeros(1, 1, 8, dtype=dtype, device=device)
    return self_check.failure(BACKENDS, name, (tokens, weight))


@pytest.mark.slow
@on_every_backend
@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_backend_passes_its_self_check(backend, dtype, weight):
    assert backend.call(self_checked, backend.name, backend.device, dtype, weight) is None


def test_a_wrong_kernel_is_switched_off(monkeypatch, caplog):
    monkeypatch.setattr("fastkd.ops.backend.EMULATED", {"triton"})
    wrong = Implementation(lambda x, w: reference.forward(x, w) * 1.001)
    implementations = {"triton": wrong, "torch": BACKENDS.implementations["torch"]}
    backends = replace(BACKENDS, implementations=implementations, verdicts={})
    with caplog.at_level(logging.WARNING, logger="fastkd"):
        chosen = backends.select("auto", torch.randn(1, 2, 8), "none")
    assert chosen is implementations["torch"]
    assert "disagrees with the reference" in caplog.text
