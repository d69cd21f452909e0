"""SEP and its building blocks, against an FFT per token in numpy's float64."""

from __future__ import annotations

import numpy
import pytest
import torch
from torch import Tensor

from fastkd.ops.second_moment import second_moment
from fastkd.ops.sep import (
    CONVENTIONS,
    bandwidth,
    permuted_moment,
    sep,
    sep_curves,
    sep_from_moment,
    sep_from_power,
    sep_power,
    white_noise_sep,
)
from tests.harness.cases import FINITE

# There are no kernels in CUDA C++ for the second moment.
on_every_backend = pytest.mark.parametrize("backend", ["torch", "triton"], indirect=True)

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
WIDTHS = [1, 2, 5, 8, 48]  # no pair of frequencies, no pair but Nyquist, odd, even


def curves_of(tokens: Tensor, convention: str) -> Tensor:
    """The definition, independent of ours, of the tokens with energy; [T, F]."""
    rows = tokens.double().numpy().reshape(-1, tokens.shape[-1])
    rows = rows[numpy.abs(rows).max(axis=1) > 0]
    rows = rows / numpy.abs(rows).max(axis=1, keepdims=True)
    if convention == "full":
        energy = numpy.abs(numpy.fft.fft(rows)) ** 2
    else:
        channels = rows.shape[1]
        energy = numpy.abs(numpy.fft.rfft(rows)) ** 2
        last = energy.shape[1] - 1 if channels % 2 == 0 else energy.shape[1]
        energy[:, 1:last] *= 2
    curves = energy.cumsum(axis=1) / energy.sum(axis=1, keepdims=True)
    return torch.from_numpy(curves)


def draw(case: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return FINITE[case](shape)[0].to(dtype)


def measure(tokens: Tensor, **options):
    return sep(tokens, **options)


def measured(backend, tokens: Tensor, **options):
    result = backend.call(measure, tokens.to(backend.device), backend=backend.name, **options)
    return tuple(x.cpu() for x in result) if options.get("std") else result.cpu()


@pytest.mark.parametrize("convention", CONVENTIONS)
@pytest.mark.parametrize("channels", WIDTHS)
def test_float64_equals_an_fft_per_token_to_1e_13(channels, convention):
    tokens = draw("noise", (3, 7, channels), torch.float64)
    mean, std = sep(tokens, convention, std=True)
    truth = curves_of(tokens, convention)
    assert mean.shape == std.shape == truth.shape[1:]
    assert (mean - truth.mean(dim=0)).abs().max() < 1e-13
    # The square root magnifies what rounding leaves of a variance of zero.
    assert (std - truth.std(dim=0, correction=0)).abs().max() < 1e-7


@pytest.mark.parametrize("shape", [(70, 10, 16), (2, 300, 16), (1, 16), (16,)], ids=str)
def test_std_takes_any_leading_dimensions_and_several_chunks(shape):
    tokens = torch.randn(shape)
    _, std = sep(tokens, std=True)
    truth = curves_of(tokens, "full").std(dim=0, correction=0)
    assert (std - truth).abs().max() < 1e-6


@on_every_backend
@pytest.mark.parametrize("tokens", [torch.empty(0, 4, 8), torch.zeros(2, 4, 8)], ids=["none", "0"])
def test_without_a_token_with_energy_there_is_no_curve(backend, tokens):
    mean, std = measured(backend, tokens, std=True)
    assert mean.isnan().all() and std.isnan().all()


@pytest.mark.parametrize("convention", CONVENTIONS)
@pytest.mark.parametrize("channels", WIDTHS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_curves_of_tokens(dtype, channels, convention):
    tokens = draw("noise", (3, 7, channels), dtype)
    curves = sep_curves(tokens, convention)
    assert curves.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    truth = curves_of(tokens, convention)
    assert (curves.flatten(0, 1) - truth).abs().max() < 1e-6


@pytest.mark.parametrize("scale", [1e-40, 1e-25, 1e25, 1e37])
def test_curves_of_tokens_whose_squares_float32_cannot_hold(scale):
    tokens = (torch.randn(9, 40).double() * scale).float()
    assert (sep_curves(tokens) - curves_of(tokens, "full")).abs().max() < 1e-6


def test_a_token_of_zeros_has_the_curve_zero():
    tokens = torch.randn(3, 8)
    tokens[1] = 0
    curves = sep_curves(tokens)
    assert torch.equal(curves[1], torch.zeros(8))
    assert torch.equal(curves[::2, -1], torch.ones(2))


def test_no_tokens_have_no_curves():
    assert sep_curves(torch.empty(2, 0, 8), "folded").shape == (2, 0, 5)


def test_a_constant_token_has_all_its_energy_in_the_first_bin():
    for convention in CONVENTIONS:
        curve = sep(torch.ones(2, 3, 8), convention)
        assert torch.allclose(curve, torch.ones_like(curve))


@pytest.mark.parametrize("frequency", [1, 3])
def test_a_cosine_has_its_energy_at_its_frequency_and_mirrored_in_the_full_bins(frequency):
    wave = torch.cos(2 * torch.pi * frequency * torch.arange(8) / 8)
    full = sep(wave).diff(prepend=torch.zeros(1))
    folded = sep(wave, "folded").diff(prepend=torch.zeros(1))
    assert full[[frequency, 8 - frequency]].allclose(torch.full((2,), 0.5, dtype=torch.float64))
    assert abs(folded[frequency].item() - 1) < 1e-6


def test_nyquist_counts_once_in_the_folded_bins():
    alternating = torch.tensor([1.0, -1.0] * 4) + 1  # as much energy at 0 as at Nyquist
    assert torch.allclose(
        sep(alternating, "folded"), torch.tensor([0.5, 0.5, 0.5, 0.5, 1.0], dtype=torch.float64)
    )


def test_sums_of_moments_give_the_curve_of_all_tokens():
    batches = torch.randn(2, 9, 12), torch.randn(3, 9, 12)
    batches[0][0, 3] = 0
    moment = sum(second_moment(batch, "row_norm") for batch in batches)
    truth = curves_of(torch.cat(batches), "full").mean(dim=0)
    assert (sep_from_moment(moment) - truth).abs().max() < 1e-6


@pytest.mark.parametrize("convention", CONVENTIONS)
@pytest.mark.parametrize("channels", [8, 13])
def test_permuted_moments_give_the_curves_of_permuted_tokens(channels, convention):
    tokens = torch.randn(2, 9, channels, dtype=torch.float64)
    permutations = torch.stack([torch.randperm(channels) for _ in range(4)])
    moments = permuted_moment(second_moment(tokens, "row_norm"), permutations)
    curves = sep_from_moment(moments, convention)
    for permutation, moment, curve in zip(permutations, moments, curves):
        permuted = tokens[..., permutation]
        assert torch.allclose(moment, second_moment(permuted, "row_norm"))
        assert (curve - sep(permuted, convention)).abs().max() < 1e-12


def test_white_noise_is_the_diagonal_of_the_full_bins():
    expected = torch.arange(1, 9, dtype=torch.float64) / 8
    assert torch.equal(white_noise_sep(8), expected)


@pytest.mark.parametrize("channels", [1, 2, 7, 8])
def test_white_noise_counts_pairs_twice_in_the_folded_bins(channels):
    folded = white_noise_sep(channels, "folded")
    shares = folded.diff(prepend=torch.zeros(1)) * channels
    pairs = [2.0] * ((channels - 1) // 2)
    expected = [1.0, *pairs] + ([1.0] if channels % 2 == 0 else [])
    assert torch.allclose(shares, torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_a_sample_of_white_noise_is_near_its_expectation(convention):
    tokens = torch.randn(2000, 32, generator=torch.Generator().manual_seed(0))
    assert (sep(tokens, convention) - white_noise_sep(32, convention)).abs().max() < 0.01


def test_bandwidths_of_white_noise_are_the_published_ones():
    """To one bin or two, at 384 channels (arXiv 2511.15572)."""
    tokens = torch.randn(4000, 384, generator=torch.Generator().manual_seed(0))
    published = torch.tensor([0.503, 0.599, 0.701, 0.802, 0.901], dtype=torch.float64)
    assert (bandwidth(sep(tokens)) - published).abs().max() < 2 / 384
    # By the symmetry of a real token's spectrum, whatever the token:
    assert bandwidth(sep(tokens), [0.5]).item() in (192 / 384, 193 / 384)


def test_bandwidth_is_the_first_bin_that_reaches_the_level():
    curves = torch.tensor([[0.2, 0.5, 0.9, 1.0], [0.5, 0.5, 0.6, 1.0]], dtype=torch.float64)
    expected = [[0.25, 0.5, 0.5, 1.0], [0.25, 0.25, 0.25, 1.0]]
    assert bandwidth(curves, [0.2, 0.3, 0.5, 1.0]).tolist() == expected


def test_a_tie_up_to_rounding_is_a_tie():
    curve = torch.tensor([0.5 - 1e-12, 1 - 1e-12], dtype=torch.float64)
    assert bandwidth(curve, [0.5, 1.0]).tolist() == [0.5, 1.0]


def test_a_level_that_rounding_misses_is_reached_at_the_end():
    assert bandwidth(torch.tensor([0.5, 1 - 1e-6]), [1.0]).tolist() == [1.0]


def test_a_curve_with_nan_has_no_bandwidth():
    curves = torch.tensor([[0.5, 1.0], [float("nan"), 1.0]])
    assert bandwidth(curves, [0.5]).isnan().flatten().tolist() == [False, True]


M = torch.eye(4)
BAD_INPUTS = {
    "no_channels": (lambda: sep(M[:, :0]), ValueError, r"sep: tokens must be.*got \[4, 0\]"),
    "curves": (lambda: sep_curves(M[:, :0]), ValueError, r"sep_curves: .*got \[4, 0\]"),
    "moment": (lambda: sep_from_moment(M[:3]), ValueError, r"sep_from_moment: .*got \[3, 4\]"),
    "level": (lambda: bandwidth(M, [0.0]), ValueError, r"bandwidth: .*\(0, 1\], got \[0.0\]"),
    "levels": (lambda: bandwidth(M, []), ValueError, r"bandwidth: .*got \[\]"),
    "dim": (lambda: white_noise_sep(0), ValueError, "white_noise_sep: dim must be.*got 0"),
    "float": (lambda: permuted_moment(M, M), TypeError, "permuted_moment: .*int64.*float32"),
    "width": (
        lambda: permuted_moment(M, torch.zeros(2, 3, dtype=torch.int64)),
        ValueError,
        r"permuted_moment: permutation must be \[R, 4\].*got \[2, 3\]",
    ),
}


@pytest.mark.parametrize(("call", "error", "message"), BAD_INPUTS.values(), ids=BAD_INPUTS)
def test_bad_inputs_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("convention", CONVENTIONS)
@pytest.mark.parametrize("dim", [1, 2, 7, 12])
def test_the_mean_curve_also_follows_from_summed_powers(dim, convention):
    tokens = torch.randn(3, 5, dim, generator=torch.Generator().manual_seed(0))
    tokens[1, 2] = 0
    summed = sep_power(tokens[:1]) + sep_power(tokens[1:])
    curve = sep_from_power(summed, dim, convention)
    torch.testing.assert_close(curve, sep(tokens, convention), rtol=1e-6, atol=1e-6)


def test_powers_of_another_width_are_refused():
    with pytest.raises(ValueError, match=r"power must be \[\.\.\., 5\] for dim 8, got \[4\]"):
        sep_from_power(torch.ones(4), 8)
