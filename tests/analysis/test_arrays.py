"""Saved tokens: every layout that is written, and no code that a file brings along."""

import os
import pickle

import numpy as np
import pytest
import torch

from fastkd.analysis.arrays import ArrayError, ArraySource, is_array_folder, read_tokens

RANDOM = np.random.default_rng(0)


def features(*shape, dtype=np.float32):
    return RANDOM.standard_normal(shape).astype(dtype)


def as_objects(*arrays):
    stages = np.empty(len(arrays), dtype=object)
    for index, array in enumerate(arrays):
        stages[index] = array
    return stages


def save(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    np.save(path, array, allow_pickle=True)
    return path


def folder_of(root, count=6, layers=3, tokens=5, channels=4):
    for index in range(count):
        save(root / f"{index}.npy", np.full((layers, tokens, channels), index, np.float32))
    return root


STAGES = [features(16, 4), features(4, 8)]
LAYOUTS = {
    "one layer": (STAGES[0], [STAGES[0]]),
    "layers": (np.stack([STAGES[0]] * 3), [STAGES[0]] * 3),
    "layers with a batch of one": (np.stack([STAGES[0][None]] * 3), [STAGES[0]] * 3),
    "layers on a grid": (np.stack([STAGES[0]] * 3).reshape(3, 4, 4, 4), [STAGES[0]] * 3),
    "column-major": (np.asfortranarray(np.stack([STAGES[0]] * 3)), [STAGES[0]] * 3),
    "stages": (as_objects(*STAGES), STAGES),
    "stages with a batch of one": (as_objects(*[s[None] for s in STAGES]), STAGES),
    "stages on grids": (as_objects(STAGES[0].reshape(4, 4, 4), STAGES[1].reshape(2, 2, 8)), STAGES),
    "stages with both": (as_objects(STAGES[0].reshape(1, 4, 4, 4), STAGES[1]), STAGES),
    "column-major stages": (as_objects(*map(np.asfortranarray, STAGES)), STAGES),
    "one stage, twice the same object": (as_objects(STAGES[0], STAGES[0]), [STAGES[0]] * 2),
    # What np.array([a, b], dtype=object) makes of equal shapes.
    "numbers as objects": (np.array([STAGES[0]] * 2, dtype=object), [STAGES[0]] * 2),
    "column-major numbers as objects": (
        np.asfortranarray(np.array([STAGES[0]] * 2, dtype=object)),
        [STAGES[0]] * 2,
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_its_layers(tmp_path, layout):
    saved, expected = LAYOUTS[layout]
    read = read_tokens(save(tmp_path / "image.npy", saved))
    assert len(read) == len(expected)
    assert all(np.array_equal(a, b) for a, b in zip(read, expected))


@pytest.mark.parametrize("pickled", [False, True])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, ">f4"])
def test_float_types_are_kept_in_native_order(tmp_path, dtype, pickled):
    array = features(3, 4, dtype=dtype)
    (read,) = read_tokens(save(tmp_path / "a.npy", as_objects(array) if pickled else array))
    assert read.dtype == np.dtype(dtype).newbyteorder("=")
    assert np.array_equal(read, array)


@pytest.mark.parametrize("module", ["numpy.core", "numpy._core"])
def test_files_of_both_numpy_generations_are_read(tmp_path, module):
    path = save(tmp_path / "a.npy", as_objects(*STAGES))
    names = (b"numpy._core.multiarray", b"numpy.core.multiarray")
    ours = next(name for name in names if name in path.read_bytes())
    theirs = f"{module}.multiarray".encode()
    # Strings are stored behind their length.
    replaced = path.read_bytes().replace(bytes([len(ours)]) + ours, bytes([len(theirs)]) + theirs)
    body = replaced.index(b"\x80\x04")
    unframed = pickle.dumps(None, 4)[:2] + replaced[body + 11 :]  # the frame's length is stale
    path.write_bytes(replaced[:body] + unframed)
    assert all(np.array_equal(a, b) for a, b in zip(read_tokens(path), STAGES))


class Command:
    """Unpickles to a call, which must never happen."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def hostile(marker):
    return {
        "system": Command(os.system, f"touch {marker}"),
        "builtins": Command(eval, f"open({str(marker)!r}, 'w')"),
        "getattr": Command(getattr, "text", "upper"),
        "memmap": Command(np.memmap, str(marker), "f4", "w+", 0, (3,)),
        "load": Command(np.load, str(marker)),
    }


@pytest.mark.parametrize("kind", hostile(""))
def test_a_malicious_pickle_is_refused_and_not_run(tmp_path, kind):
    marker = tmp_path / "was_here"
    path = save(tmp_path / "a.npy", as_objects(STAGES[0], hostile(marker)[kind]))
    with pytest.raises(ArrayError, match="not loaded for safety"):
        read_tokens(path)
    assert not marker.exists()


def pickled_array(state):
    """A .npy file's bytes whose array has this state instead of numpy's own."""

    class Array:
        def __reduce__(self):
            return np._core.multiarray._reconstruct, (np.ndarray, (0,), b"b"), state

    return as_objects(Array())


@pytest.mark.parametrize(
    "state",
    [
        (1, (1,), np.dtype("O"), False, b"\x41" * 8),  # bytes taken for a pointer
        (1, (1000, 1000), np.dtype("f4"), False, b"\x00" * 8),  # fewer bytes than the shape says
        (1, (1,), "f4", False, b"\x00" * 4),  # no dtype
        (1, (1,), np.dtype("f4")),  # too short
        None,
    ],
)
def test_an_array_of_a_made_up_state_is_refused(tmp_path, state):
    path = save(tmp_path / "a.npy", pickled_array(state))
    with pytest.raises(ArrayError):
        read_tokens(path)


UNUSABLE = {
    "integers": np.zeros((3, 4, 5), np.int64),
    "complex": np.zeros((3, 4, 5), np.complex64),
    "a vector": features(7),
    "too many dimensions": features(2, 2, 2, 2, 2),
    "no token": features(2, 0, 4),
    "objects of integers": as_objects(np.zeros((3, 4), np.int64)),
    "objects that are no arrays": as_objects("text", STAGES[0]),
    "a dictionary": np.array({"layer": 3}),
    "a vector as a stage": as_objects(features(7)),
}


@pytest.mark.parametrize("content", UNUSABLE)
def test_what_holds_no_tokens_is_refused(tmp_path, content):
    path = save(tmp_path / "a.npy", UNUSABLE[content])
    with pytest.raises(ArrayError, match=r"holds|pickled"):
        read_tokens(path)


@pytest.mark.parametrize("array", [np.stack([STAGES[0]] * 3), as_objects(*STAGES)])
@pytest.mark.parametrize("kept", [0, 5, 100, -10])
def test_a_torn_file_is_refused(tmp_path, array, kept):
    path = save(tmp_path / "a.npy", array)
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
    source = ArraySource(folder_of(tmp_path, count=5), batch_size=2)
    batches = list(source.batches())
    assert [batch.places for batch in batches] == [[0, 1], [2, 3], [4]]
    assert [list(t.shape) for t in batches[0].tokens] == [[2, 5, 4]] * 3
    values = torch.cat([batch.tokens[0][:, 0, 0] for batch in batches])
    assert sorted(values.tolist()) == [0, 1, 2, 3, 4]


def test_batches_restart_in_the_middle(tmp_path):
    source = ArraySource(folder_of(tmp_path), batch_size=2)
    whole, rest = list(source.batches()), list(source.batches(2))
    assert [batch.places for batch in rest] == [batch.places for batch in whole[1:]]
    for left, right in zip(rest, whole[1:]):
        assert all(torch.equal(a, b) for a, b in zip(left.tokens, right.tokens))


def test_the_selection_depends_on_the_seed_alone(tmp_path):
    folder_of(tmp_path, count=20)

    def drawn(seed):
        source = ArraySource(tmp_path, images=8, seed=seed, batch_size=8)
        (batch,) = source.batches()
        return batch.tokens[0][:, 0, 0].tolist()

    assert drawn(0) == drawn(0) != drawn(1)
    assert len(set(drawn(0))) == 8


def test_folders_count_as_classes(tmp_path):
    for name in "abc":
        folder_of(tmp_path / name, count=4)
    save(tmp_path / "c" / "more.npy", np.zeros((3, 5, 4), np.float32))
    source = ArraySource(tmp_path, images=3)
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
    save(tmp_path / "a.npy", as_objects(features(9, 2), features(4, 3), features(1, 5)))
    source = ArraySource(tmp_path, layers=layers)
    assert [layer.name for layer in source.layers] == expected
    (batch,) = source.batches()
    assert [t.shape[2] for t in batch.tokens] == [layer.channels for layer in source.layers]
    assert [layer.index for layer in source.layers] == [int(name[-1]) for name in expected]


@pytest.mark.parametrize("layers", [[3], [-4], ["final"], "blocks.0"])
def test_a_layer_that_is_not_there_is_refused(tmp_path, layers):
    with pytest.raises(ValueError, match=r"3 layers \(layer.0 .. layer.2\)"):
        ArraySource(folder_of(tmp_path), layers=layers)


@pytest.mark.parametrize(
    "odd", [np.zeros((2, 5, 4)), np.zeros((3, 5, 8)), np.zeros((3, 6, 4)), np.zeros(3)]
)
def test_a_file_that_differs_from_the_first_is_skipped_by_name(tmp_path, odd):
    save(folder_of(tmp_path) / "z" / "odd.npy", odd)
    source = ArraySource(tmp_path, batch_size=4)
    batches = list(source.batches())
    ((place, name, reason),) = [skip for batch in batches for skip in batch.skipped]
    assert name == "z/odd.npy"
    assert reason.startswith("holds")
    read = [p for batch in batches for p in batch.places]
    assert sorted([*read, place]) == list(range(7))


def test_a_batch_without_a_readable_file_has_no_tokens(tmp_path):
    folder_of(tmp_path, count=2)
    (tmp_path / "9.npy").write_bytes(b"no array")
    source = ArraySource(tmp_path, batch_size=1)
    broken = [batch for batch in source.batches() if batch.skipped]
    assert [(batch.places, batch.tokens) for batch in broken] == [([], [])]


def test_the_first_readable_file_sets_the_shapes(tmp_path):
    folder_of(tmp_path, count=2)
    (tmp_path / "0.npy").write_bytes(b"")
    assert len(ArraySource(tmp_path).layers) == 3


def test_a_folder_without_tokens_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"holds no \.npy file"):
        ArraySource(tmp_path)
    (tmp_path / "a.npy").write_bytes(b"no array")
    with pytest.raises(ValueError, match=r"none of 1 .*a\.npy cannot be read as saved tokens"):
        ArraySource(tmp_path)


def test_a_fingerprint_changes_with_files_and_layers(tmp_path):
    folder_of(tmp_path)
    before = ArraySource(tmp_path).fingerprint
    assert ArraySource(tmp_path).fingerprint == before
    assert ArraySource(tmp_path, layers="last").fingerprint != before
    assert ArraySource(tmp_path, seed=1).fingerprint != before
    save(tmp_path / "5.npy", np.zeros((3, 5, 5), np.float32))
    assert ArraySource(tmp_path).fingerprint != before


def test_folders_that_are_links_are_followed(tmp_path):
    folder_of(tmp_path / "elsewhere", count=2)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "link").symlink_to(tmp_path / "elsewhere")
    assert is_array_folder(tmp_path / "data")
    assert ArraySource(tmp_path / "data").images == 2
