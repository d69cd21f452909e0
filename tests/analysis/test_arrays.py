"""Saved tokens: every layout that is written, and no code that a file brings along."""

import os

import numpy as np
import pytest
import torch

from fastkd.analysis import Options
from fastkd.analysis.arrays import ArrayError, ArraySource, is_array_folder, read_tokens

RANDOM = np.random.default_rng(0)


def features(*shape, dtype=np.float32):
    return RANDOM.standard_normal(shape).astype(dtype)


def as_objects(*arrays):
    stages = np.empty(len(arrays), dtype=object)
    for index, array in enumerate(arrays):
        stages[index] = array
    return stages


def save(path, content):
    """An array as .npy, a list of them as .npz."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, list):
        np.savez(path.with_suffix(".npz"), *content)
        return path.with_suffix(".npz")
    np.save(path.with_suffix(".npy"), content)
    return path.with_suffix(".npy")


def folder_of(root, count=6, layers=3, tokens=5, channels=4):
    for index in range(count):
        save(root / f"{index}.npy", np.full((layers, tokens, channels), index, np.float32))
    return root


def source_of(folder, **options):
    return ArraySource(folder, Options(**options))


STAGES = [features(16, 4), features(4, 8)]
LAYOUTS = {
    "one layer": (STAGES[0], [STAGES[0]]),
    "layers": (np.stack([STAGES[0]] * 3), [STAGES[0]] * 3),
    "layers with a batch of one": (np.stack([STAGES[0][None]] * 3), [STAGES[0]] * 3),
    "layers on a grid": (np.stack([STAGES[0]] * 3).reshape(3, 4, 4, 4), [STAGES[0]] * 3),
    "column-major": (np.asfortranarray(np.stack([STAGES[0]] * 3)), [STAGES[0]] * 3),
    "stages": (STAGES, STAGES),
    "stages with a batch of one": ([s[None] for s in STAGES], STAGES),
    "stages on grids": ([STAGES[0].reshape(4, 4, 4), STAGES[1].reshape(2, 2, 8)], STAGES),
    "stages with both": ([STAGES[0].reshape(1, 4, 4, 4), STAGES[1]], STAGES),
    "column-major stages": (list(map(np.asfortranarray, STAGES)), STAGES),
    "twelve stages, which sort otherwise by name": (STAGES * 6, STAGES * 6),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_its_layers(tmp_path, layout):
    saved, expected = LAYOUTS[layout]
    read = read_tokens(save(tmp_path / "image", saved))
    assert len(read) == len(expected)
    assert all(np.array_equal(a, b) for a, b in zip(read, expected))


@pytest.mark.parametrize("several", [False, True], ids=["npy", "npz"])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, ">f4"])
def test_float_types_are_kept_in_native_order(tmp_path, dtype, several):
    array = features(3, 4, dtype=dtype)
    (read,) = read_tokens(save(tmp_path / "a", [array] if several else array))
    assert read.dtype == np.dtype(dtype).newbyteorder("=")
    assert np.array_equal(read, array)


class Command:
    """Unpickles to a call, which must never happen."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("suffix", [".npy", ".npz"])
def test_an_object_array_is_refused_and_nothing_of_it_runs(tmp_path, suffix):
    marker, path = tmp_path / "was_here", tmp_path / f"a{suffix}"
    content = as_objects(STAGES[0], Command(marker))
    if suffix == ".npy":
        np.save(path, content, allow_pickle=True)
    else:
        np.savez(path, content)
    with pytest.raises(ArrayError, match=r"cannot be read.*(Object arrays|Python objects)"):
        read_tokens(path)
    assert not marker.exists()


UNUSABLE = {
    "integers": np.zeros((3, 4, 5), np.int64),
    "complex": np.zeros((3, 4, 5), np.complex64),
    "a vector": features(7),
    "too many dimensions": features(2, 2, 2, 2, 2),
    "no token": features(2, 0, 4),
    "no layer": features(0, 4, 4),
    "no stage": [],
    "integers as a stage": [np.zeros((3, 4), np.int64)],
    "a vector as a stage": [STAGES[0], features(7)],
}


@pytest.mark.parametrize("content", UNUSABLE)
def test_what_holds_no_tokens_is_refused(tmp_path, content):
    path = save(tmp_path / "a", UNUSABLE[content])
    with pytest.raises(ArrayError, match="holds"):
        read_tokens(path)


@pytest.mark.parametrize("array", [np.stack([STAGES[0]] * 3), STAGES], ids=["npy", "npz"])
@pytest.mark.parametrize("kept", [0, 5, 100, -10])
def test_a_torn_file_is_refused(tmp_path, array, kept):
    path = save(tmp_path / "a", array)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ArrayError, match="cannot be read as saved tokens"):
        read_tokens(path)


def test_a_folder_of_arrays_is_told_from_one_of_images(tmp_path):
    save(tmp_path / "arrays" / "deep" / "a.npy", STAGES[0])
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.JPEG").touch()
    assert is_array_folder(tmp_path / "arrays")
    assert not is_array_folder(tmp_path / "images")
    assert not is_array_folder("hfds/imagenet")


def test_batches_hold_every_file_once_in_the_order_of_places(tmp_path):
    source = source_of(folder_of(tmp_path, count=5), batch_size=2)
    batches = list(source.batches())
    assert [batch.places for batch in batches] == [[0, 1], [2, 3], [4]]
    assert [list(t.shape) for t in batches[0].tokens] == [[2, 5, 4]] * 3
    values = torch.cat([batch.tokens[0][:, 0, 0] for batch in batches])
    assert sorted(values.tolist()) == [0, 1, 2, 3, 4]


def test_batches_restart_in_the_middle(tmp_path):
    source = source_of(folder_of(tmp_path), batch_size=2)
    whole, rest = list(source.batches()), list(source.batches(2))
    assert [batch.places for batch in rest] == [batch.places for batch in whole[1:]]
    for left, right in zip(rest, whole[1:]):
        assert all(torch.equal(a, b) for a, b in zip(left.tokens, right.tokens))


def test_the_selection_depends_on_the_seed_alone(tmp_path):
    folder_of(tmp_path, count=20)

    def drawn(seed):
        source = source_of(tmp_path, images=8, seed=seed, batch_size=8)
        (batch,) = source.batches()
        return batch.tokens[0][:, 0, 0].tolist()

    assert drawn(0) == drawn(0) != drawn(1)
    assert len(set(drawn(0))) == 8


def test_folders_count_as_classes(tmp_path):
    for name in "abc":
        folder_of(tmp_path / name, count=4)
    save(tmp_path / "c" / "more.npy", np.zeros((3, 5, 4), np.float32))
    source = source_of(tmp_path, images=3)
    assert sorted(source._file_name(file)[0] for file in source._files) == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        ("all", ["layer.0", "layer.1", "layer.2"]),
        ("last", ["layer.2"]),
        ("-1,0", ["layer.0", "layer.2"]),
        ([1], ["layer.1"]),
        (["layer.1", -2], ["layer.1"]),
    ],
)
def test_layers_are_chosen_as_of_a_model(tmp_path, layers, expected):
    save(tmp_path / "a", [features(9, 2), features(4, 3), features(1, 5)])
    source = source_of(tmp_path, layers=layers)
    assert [layer.name for layer in source.layers] == expected
    (batch,) = source.batches()
    assert [t.shape[2] for t in batch.tokens] == [layer.channels for layer in source.layers]
    assert [layer.index for layer in source.layers] == [int(name[-1]) for name in expected]


@pytest.mark.parametrize("layers", [[3], [-4], ["final"], "blocks.0"])
def test_a_layer_that_is_not_there_is_refused(tmp_path, layers):
    with pytest.raises(ValueError, match=r"3 layers \(layer.0 .. layer.2\)"):
        source_of(folder_of(tmp_path), layers=layers)


@pytest.mark.parametrize(
    "odd", [np.zeros((2, 5, 4)), np.zeros((3, 5, 8)), np.zeros((3, 6, 4)), np.zeros(3)]
)
def test_a_file_that_differs_from_the_first_is_skipped_by_name(tmp_path, odd):
    save(folder_of(tmp_path) / "z" / "odd.npy", odd)
    source = source_of(tmp_path, batch_size=4)
    batches = list(source.batches())
    ((place, name, reason),) = [skip for batch in batches for skip in batch.skipped]
    assert name == "z/odd.npy"
    assert reason.startswith("holds")
    read = [p for batch in batches for p in batch.places]
    assert sorted([*read, place]) == list(range(7))


def test_a_batch_without_a_readable_file_has_no_tokens(tmp_path):
    folder_of(tmp_path, count=2)
    (tmp_path / "9.npy").write_bytes(b"no array")
    source = source_of(tmp_path, batch_size=1)
    broken = [batch for batch in source.batches() if batch.skipped]
    assert [(batch.places, batch.tokens) for batch in broken] == [([], [])]


def test_the_first_readable_file_sets_the_shapes(tmp_path):
    folder_of(tmp_path, count=2)
    (tmp_path / "0.npy").write_bytes(b"")
    assert len(source_of(tmp_path).layers) == 3


def test_a_folder_without_tokens_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"holds no \.npy or \.npz file"):
        source_of(tmp_path)
    (tmp_path / "a.npy").write_bytes(b"no array")
    with pytest.raises(ValueError, match=r"none of 1 .*a\.npy cannot be read as saved tokens"):
        source_of(tmp_path)


def test_a_fingerprint_changes_with_files_and_layers(tmp_path):
    folder_of(tmp_path)
    before = source_of(tmp_path).fingerprint
    assert source_of(tmp_path).fingerprint == before
    assert source_of(tmp_path, layers="last").fingerprint != before
    assert source_of(tmp_path, seed=1).fingerprint != before
    save(tmp_path / "5.npy", np.zeros((3, 5, 5), np.float32))
    assert source_of(tmp_path).fingerprint != before


def test_folders_that_are_links_are_followed(tmp_path):
    folder_of(tmp_path / "elsewhere", count=2)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "link").symlink_to(tmp_path / "elsewhere")
    assert is_array_folder(tmp_path / "data")
    assert source_of(tmp_path / "data").images == 2
