"""The loop over images: two passes, interruptions, several processes, unreadable images."""

from __future__ import annotations

import io
import signal
from typing import get_type_hints

import numpy as np
import pytest
import torch

from fastkd.analysis import InSharedBasis, Options, resume, study
from fastkd.analysis import results as codec
from fastkd.analysis.results import ModelResult
from fastkd.analysis.resume import Resume
from fastkd.analysis.study import Study
from fastkd.utils.distributed import World, world
from fastkd.utils.progress import Progress
from tests.analysis.made_tokens import Interrupted, TensorSource, in_plane, normal, waves
from tests.harness.torchrun import run_ranks

ALONE = World(torch.device("cpu"))
QUICK = {"permutations": 5, "subspaces": (1, 4)}


def measure(source, folder=None, go_on=False, peers=ALONE, **settings) -> ModelResult:
    state = Resume(folder, "00", peers.rank, peers.size, go_on)
    return Study(source, Options(**QUICK | settings), peers, state, Progress(shows=False)).run()


def layers(images=13):
    """Two layers of noise of different sizes, an odd number of images."""
    return normal(images, 6, 10), normal(images, 5, 12, seed=1)


def assert_same(ours: ModelResult, theirs: ModelResult, tolerance: float = 0.0) -> None:
    """Every number and array; all but the times."""
    arrays: list[dict] = [{}, {}]
    plain = []
    for result, kept in zip((ours, theirs), arrays):
        plain.append(codec.encode(result, kept, "result"))
        plain[-1].pop("seconds")
    assert arrays[0].keys() == arrays[1].keys()
    for name, value in arrays[0].items():
        np.testing.assert_allclose(value, arrays[1][name], atol=tolerance, err_msg=name)
    if tolerance == 0:
        assert plain[0] == plain[1]


def test_constructed_features_have_their_rank_rotation_and_bandwidth():
    plane = torch.stack([in_plane(range(4), scale=2.0)] * 6 + [in_plane(range(4, 8))] * 2)
    wave = torch.stack([waves(3)] * 8)
    result = measure(TensorSource(plane, wave), shared="all", levels=(0.5, 0.99), max_unreadable=0)
    flat, frequency = result.layers
    assert flat.ranks.values.tolist() == [[2, 4]] * 8
    assert flat.shared.ranks.values.tolist() == [[2, 4]] * 6 + [[6, 8]] * 2
    four = flat.shared.rotation[1]
    assert four.overlap_shared.tolist() == pytest.approx([1] * 6 + [0] * 2, abs=1e-6)
    assert four.overlap_pairs.tolist() == pytest.approx([1] * 4, abs=1e-6)
    assert four.angles_pairs.tolist() == pytest.approx([0] * 4, abs=1e-4)
    assert flat.shared_energies[:9].tolist() == pytest.approx([0.75] * 4 + [1 / 16] * 4 + [0])
    assert frequency.ranks.values.tolist() == [[1, 2]] * 8  # a cosine and a sine
    assert frequency.sep.bandwidths.tolist() == pytest.approx([4 / 32] + [30 / 32] * 4)
    assert frequency.sep_test.observed.tolist() == frequency.sep.bandwidths.tolist()
    assert (result.images, result.skipped, result.non_finite) == (8, [], 0)


def test_only_the_last_layer_gets_a_second_pass_unless_asked():
    shared = {s: [x.shared is not None for x in measure(TensorSource(*layers()), shared=s).layers]
              for s in study.SHARED}  # fmt: skip
    assert shared == {"last": [False, True], "all": [True, True], "none": [False, False]}
    assert all(x.sep_test is None for x in measure(TensorSource(*layers()), shared="none").layers)


def test_what_is_not_asked_for_is_not_measured():
    result = measure(TensorSource(*layers()), sep="none")
    assert all(layer.sep is None and layer.sep_test is None for layer in result.layers)
    assert measure(TensorSource(*layers()), permutations=0).last.sep_test is None


def test_kept_tokens_and_a_second_reading_give_the_same():
    kept, read = TensorSource(*layers()), TensorSource(*layers())
    assert_same(measure(kept), measure(read, memory=0.0), tolerance=1e-6)
    assert kept.asked == [0, 4, 8, 12]
    assert read.asked == [0, 4, 8, 12] * 2


def test_tokens_are_kept_only_as_far_as_memory_allows():
    size = 13 * 5 * 12 * 4 / 1e9  # of the last layer alone
    for memory, readings in ((size, 1), (0.9 * size, 2)):
        source = TensorSource(*layers())
        measure(source, memory=memory)
        assert len(source.asked) == 4 * readings


@pytest.mark.parametrize("crashes", [[2], [6]], ids=["first pass", "second pass"])
def test_an_interrupted_analysis_goes_on_to_the_same_numbers(crashes, tmp_path, monkeypatch):
    monkeypatch.setattr(resume, "SAVE_EVERY_SECONDS", 0.0)
    whole = measure(TensorSource(*layers(), unreadable=[5]), memory=0.0, max_unreadable=0.5)
    source = TensorSource(*layers(), unreadable=[5], crashes=crashes)
    with pytest.raises(Interrupted):
        measure(source, tmp_path, memory=0.0, max_unreadable=0.5)
    source.asked.clear()
    source.crashes.clear()
    assert_same(measure(source, tmp_path, True, memory=0.0, max_unreadable=0.5), whole)
    assert len(source.asked) < 8


def test_after_an_interruption_images_whose_tokens_are_lost_are_read_again(tmp_path, monkeypatch):
    monkeypatch.setattr(resume, "SAVE_EVERY_SECONDS", 0.0)
    with pytest.raises(Interrupted):
        measure(TensorSource(*layers(), crashes=[2]), tmp_path)
    source = TensorSource(*layers())
    assert_same(measure(source, tmp_path, True), measure(TensorSource(*layers())), tolerance=1e-6)
    assert source.asked == [8, 12, 0, 4, 8, 12]


def test_a_signal_saves_before_it_stops(tmp_path):
    source = TensorSource(*layers())
    batches = source.batches

    def signalled(start, stop):
        for number, batch in enumerate(batches(start, stop)):
            if number == 1:
                signal.raise_signal(signal.SIGTERM)
            yield batch

    source.batches = signalled
    with pytest.raises(SystemExit):
        measure(source, tmp_path)
    source.batches = batches
    source.asked.clear()
    assert_same(measure(source, tmp_path, True), measure(TensorSource(*layers())), tolerance=1e-6)
    assert source.asked[0] == 8


@pytest.mark.parametrize("memory", [0.0, 1.0], ids=["read again", "kept"])
def test_a_signal_in_the_second_pass_stops_it_and_the_first_is_not_lost(memory, tmp_path):
    update, calls = InSharedBasis.update, []

    def signalled(view, tokens, places):
        calls.append(places)
        if len(calls) == 2:
            signal.raise_signal(signal.SIGTERM)
        update(view, tokens, places)

    source = TensorSource(*layers())
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(InSharedBasis, "update", signalled)
        measure(source, tmp_path, memory=memory)
    assert len(calls) == 2
    source.asked.clear()
    whole = measure(TensorSource(*layers()))
    assert_same(measure(source, tmp_path, True, memory=0.0), whole, tolerance=1e-6)
    assert 0 not in source.asked[-2:]


def test_a_run_stopped_by_its_limit_goes_on_with_a_larger_one(tmp_path):
    source = TensorSource(*layers(), unreadable=[2, 5])
    with pytest.raises(RuntimeError, match="more than the 5 % allowed"):
        measure(source, tmp_path)
    source.asked.clear()
    result = measure(source, tmp_path, True, max_unreadable=0.2)
    assert len(result.skipped) == 2 and result.images == 11
    assert source.asked[0] > 0


def test_another_number_of_processes_does_not_go_on_silently(tmp_path):
    measure(TensorSource(*layers()), tmp_path)
    (tmp_path / "00-first-0of1.pt").rename(tmp_path / "00-first-0of2.pt")
    with pytest.raises(ValueError, match=r"interrupted with 2 process\(es\).*got 1"):
        measure(TensorSource(*layers()), tmp_path, True)


@pytest.mark.parametrize("value", [0.0, torch.nan], ids=["zeros", "NaN"])
def test_a_dead_layer_costs_only_its_own_results(value):
    first, last = layers()
    result = measure(TensorSource(first, last * 0 + value))
    assert result.layers[0].sep is not None
    assert result.last.sep is None and result.last.sep_test is None
    assert (result.last.ranks.values == 0).all()
    assert (result.last.shared is None) == (value != 0)


def test_another_analysis_is_not_gone_on_with(tmp_path):
    measure(TensorSource(*layers()), tmp_path)
    with pytest.raises(ValueError, match=r"another analysis \(its seed is 0, not 1\)"):
        measure(TensorSource(*layers()), tmp_path, True, seed=1)
    with pytest.raises(ValueError, match=r"another analysis \(its sum is"):
        measure(TensorSource(*layers(12)), tmp_path, True)


def test_a_torn_state_is_one_clear_error(tmp_path):
    measure(TensorSource(*layers()), tmp_path)
    path = tmp_path / "00-first-0of1.pt"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"00-first-0of1\.pt cannot be read .*remove it"):
        measure(TensorSource(*layers()), tmp_path, True)


def test_unreadable_images_are_named_and_left_out():
    result = measure(TensorSource(*layers(), unreadable=[2, 7]), max_unreadable=0.5)
    assert result.skipped == [("2.jpg", "cut short"), ("7.jpg", "cut short")]
    assert (result.images, len(result.last.ranks.values)) == (11, 11)
    # Two of the six pairs miss a partner, and the last image never had one.
    assert len(result.last.shared.rotation[0].overlap_pairs) == 4


def test_progress_counts_an_unreadable_image_once_in_both_passes(monkeypatch):
    monkeypatch.setattr("fastkd.utils.progress.LINE_EVERY_SECONDS", 0.0)
    stream = io.StringIO()
    source = TensorSource(*layers(), unreadable=[2, 7])
    # Without memory for tokens, the second pass reads the images again.
    settings = Options(**QUICK, max_unreadable=0.5, memory=0.0)
    Study(source, settings, ALONE, Resume(None, "00", 0, 1, False), Progress(stream=stream)).run()
    ends = [line.split(", about")[0] for line in stream.getvalue().splitlines() if "13 of" in line]
    assert ends == [
        "made: spectra: 13 of 13 images, 2 unreadable",
        "made: shared basis: 13 of 13 images, 2 unreadable",
    ]


def test_a_whole_batch_may_be_unreadable():
    result = measure(TensorSource(*layers(), unreadable=range(4, 8)), max_unreadable=0.5)
    assert result.images == 9


def test_too_many_unreadable_images_stop_the_run():
    with pytest.raises(RuntimeError, match=r"2 of 13 images .* 10 % .*2\.jpg \(cut short\)"):
        measure(TensorSource(*layers(), unreadable=[2, 3, 7]), max_unreadable=0.1)
    with pytest.raises(RuntimeError, match=r"no image could be read.*; and 10 more"):
        measure(TensorSource(*layers(), unreadable=range(13)), max_unreadable=1)


def test_images_that_are_not_finite_in_any_layer_are_counted():
    first, last = layers()
    last[3, 0, 0] = torch.nan
    first[5, 0, 0] = 1e20  # its energy is beyond float32
    result = measure(TensorSource(first, last))
    assert (result.images, result.non_finite) == (13, 2)
    assert (result.layers[0].ranks.values > 0).all(axis=1).sum() == 12
    assert np.isfinite(result.layers[0].shared_energies).all()
    assert np.isfinite(result.last.sep.curve.mean).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sep": "half"}, "sep must be one of"),
        ({"shared": "first"}, "shared must be one of"),
        ({"levels": (2,)}, "levels must be in"),
        ({"levels": (0.5,) * 9}, "levels may be 8 at most, got 9"),
        ({"subspaces": (0,)}, "subspaces must be at least 1, got 0"),
        ({"permutations": -1}, "permutations must be at least 0, got -1"),
        ({"memory": -1.0}, r"memory must be .* got -1\.0"),
        ({"memory": float("nan")}, r"memory must be .* got nan"),
        ({"memory": float("inf")}, r"memory must be .* got inf"),
        ({"max_unreadable": 5}, "max_unreadable must be 0.0 to 1.0, got 5"),
        ({"seed": -1}, "seed must be at least 0, got -1"),
        ({"amp": "bf8"}, "amp must be one of .*, got 'bf8'"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"images": 0}, "images must be at least 1, got 0"),
        ({"images": -1}, "images must be at least 1, got -1"),
    ],
)
def test_options_that_mean_nothing_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Options(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": 5}, "layers: .*, got 5"),
        ({"subspaces": 4}, "subspaces must be .*, got int 4"),
        ({"subspaces": "4"}, "subspaces must be .*, got '4'"),
        ({"permutations": None}, "permutations must be int, got None"),
        ({"centered": "yes"}, "centered must be True or False, got 'yes'"),
        ({"batch_size": "8"}, "batch_size must be an integer, got '8'"),
    ],
)
def test_options_of_another_type_are_refused(options, message):
    with pytest.raises(TypeError, match=message):
        Options(**options)


def test_type_checkers_see_the_fields_of_options():
    assert get_type_hints(study.AnalyzeOptions) == get_type_hints(Options)


def measure_on_rank(rank: int, output: str) -> None:
    results = []
    with world("cpu") as peers:
        for images in (13, 2):
            source = TensorSource(*layers(images), unreadable=[5])
            results.append(measure(source, peers=peers, max_unreadable=0.5))
    arrays: dict = {}
    codec.encode(results, arrays, "results")
    np.savez(f"{output}/{rank}.npz", **arrays)


@pytest.mark.slow
def test_two_processes_give_the_numbers_of_one(tmp_path):
    run_ranks(measure_on_rank, str(tmp_path))
    expected: dict = {}
    one = [
        measure(TensorSource(*layers(images), unreadable=[5]), max_unreadable=0.5)
        for images in (13, 2)  # with 2 images, one process has none
    ]
    codec.encode(one, expected, "results")
    for rank in range(2):
        with np.load(tmp_path / f"{rank}.npz") as found:
            assert set(found) == set(expected)
            for name, value in expected.items():
                np.testing.assert_allclose(found[name], value, atol=2e-6, err_msg=name)
