"""Results as a real run would give them, made of seeded noise: spectra that fall as ViTs' do."""

import numpy as np

from fastkd.analysis.report import Report
from fastkd.analysis.results import (
    Curve,
    LayerResult,
    ModelResult,
    Ranks,
    Sep,
    SepTest,
    SharedView,
    Subspaces,
    bandwidths,
    intervals,
)
from fastkd.ops.sep import LEVELS as BANDWIDTH_LEVELS
from fastkd.ops.spectrum import LEVELS

SETTINGS = {
    "data": "imagenet/val",
    "images": 1000,
    "seed": 0,
    "levels": list(LEVELS),
    "bandwidth_levels": list(BANDWIDTH_LEVELS),
    "convention": "full",
    "centered": False,
    "permutations": 100,
}
ENVIRONMENT = {"fastkd": "0.1.0", "torch": "2.15.0", "timm": "1.0.31", "machine": "2 CPU cores"}


def report(*models, **settings):
    return Report(list(models or [model()]), {**SETTINGS, **settings}, dict(ENVIRONMENT))


def model(
    name="cait_s24_224.fb_dist_in1k",
    *,
    weights="pretrained",
    layers=3,
    tokens=16,
    channels=24,
    images=20,
    seed=0,
    skipped=(),
    sizes=(2, 4),
    rotated=0.5,
    shared="last",
):
    """A model whose ranks grow with depth; its last or all layers had a second pass."""
    rng = np.random.default_rng(seed)
    depths = [
        layer(
            rng,
            index,
            (index + 1) / layers,
            tokens,
            channels,
            images,
            sizes=sizes if shared == "all" or index == layers - 1 else None,
            rotated=rotated * (index + 1) / layers,
        )
        for index in range(layers)
    ]
    return ModelResult(
        name=name,
        weights=weights,
        architecture=name.partition(".")[0],
        parameters=46_916_000,
        input_size=(224, 224),
        images=images,
        non_finite=0,
        skipped=list(skipped),
        layers=depths,
        seconds={"forward": 812.4, "analysis": 96.1},
    )


def layer(rng, index, depth, tokens, channels, images, *, sizes=None, rotated=0.5):
    curves = spectra(rng, images, min(tokens, channels), steepness=2.2 - 1.2 * depth)
    made = LayerResult(
        name=f"blocks.{index}",
        index=index,
        tokens=tokens,
        channels=channels,
        ranks=ranks(curves),
        curve=Curve(curves.mean(axis=0), curves.std(axis=0)),
        effective_rank=entropy_rank(curves),
        stable_rank=(1 / curves[:, 0]).astype(np.float32),
        shared_energies=np.sort(rng.exponential(size=channels))[::-1].copy(),
        sep=sep(rng, tokens * images, channels),
    )
    if sizes is None:
        return made
    return LayerResult(
        **{
            **vars(made),
            "sep_test": sep_test(rng, made.sep),
            "shared": shared_view(rng, images, channels, sizes, rotated),
        }
    )


def spectra(rng, images, dimensions, steepness):
    """Cumulated energy [images, dimensions] that falls as exp(-k^0.45), one direction above all."""
    k = np.arange(dimensions)
    rates = steepness * np.exp(0.25 * rng.standard_normal((images, 1)))
    energies = np.exp(-rates * k**0.45)
    energies[:, 0] *= 1 + 2 * rng.random(images)
    curves = energies.cumsum(axis=1)
    return curves / curves[:, -1:]


def ranks(curves):
    values = np.stack([(curves < q).sum(axis=1) + 1 for q in LEVELS], axis=1)
    return Ranks(LEVELS, np.minimum(values, curves.shape[1]).astype(np.int32), curves.shape[1])


def entropy_rank(curves):
    values = np.sqrt(np.diff(curves, axis=1, prepend=0).clip(1e-30))
    parts = values / values.sum(axis=1, keepdims=True)
    return np.exp(-(parts * np.log(parts)).sum(axis=1)).astype(np.float32)


def sep(rng, tokens, channels):
    power = 1 + 0.08 * rng.standard_normal(channels)
    power = (power + np.roll(power[::-1], 1)) / 2  # a real signal's spectrum is symmetric
    curve = power.cumsum() / power.sum()
    noise = np.arange(1, channels + 1) / channels
    halves = 2 * np.minimum(noise, 1 - noise)
    std = np.sqrt(halves * (1 - halves) / channels)
    levels = BANDWIDTH_LEVELS
    return Sep("full", Curve(curve, std), noise, levels, bandwidths(curve, levels), tokens, 0)


def sep_test(rng, measured, permutations=40):
    step = 1 / len(measured.white_noise)
    shape = (permutations, len(measured.levels))
    permuted = measured.bandwidths + step * np.round(0.2 + 0.9 * rng.standard_normal(shape))
    resampled = measured.bandwidths + step * np.round(0.6 * rng.standard_normal(shape))
    moves = permuted - measured.bandwidths
    draws = moves[rng.integers(permutations, size=(200, permutations))].mean(axis=1)
    return SepTest(
        levels=measured.levels,
        observed=measured.bandwidths,
        observed_interval=intervals(resampled, 0.95),
        permuted=permuted,
        shift=moves.mean(axis=0),
        shift_interval=intervals(draws, 0.95),
        p_value=rng.uniform(0.1, 0.9, len(measured.levels)),
        confidence=0.95,
    )


def shared_view(rng, images, channels, sizes, rotated):
    curves = spectra(rng, images, channels, steepness=0.22)
    rotations = [subspaces(rng, k, images, channels, rotated) for k in sizes]
    curve = Curve(curves.mean(axis=0), curves.std(axis=0))
    return SharedView(ranks(curves), curves.astype(np.float32), curve, rotations)


def subspaces(rng, k, images, channels, rotated):
    random = k / channels
    towards = random + (1 - random) * (1 - rotated)
    between = random + (1 - random) * (1 - rotated) ** 2
    steps = (np.arange(k) + 0.5) / k
    overlaps = [(m + 0.04 * rng.standard_normal(images)).clip(0, 1) for m in (towards, between)]
    return Subspaces(
        k=k,
        overlap_shared=overlaps[0].astype(np.float32),
        overlap_pairs=overlaps[1].astype(np.float32),
        angles_shared=5 + 80 * rotated * steps**0.7,
        angles_pairs=8 + 80 * (1 - (1 - rotated) ** 2) * steps**0.6,
        overlap_random=random,
        angles_random=90 - 45 * random - 30 * (1 - steps) ** 2 * np.sqrt(random),
    )
