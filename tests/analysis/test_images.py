"""Selections of images: balanced, shuffled, reproducible; broken files are reported, not fatal."""

import os
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import Dataset, Subset, TensorDataset

from fastkd.analysis.images import balanced_subset, known_labels, open_images
from fastkd.config import Recipe
from fastkd.data.transforms import InputSpec

CPU = torch.device("cpu")
SPEC = InputSpec((3, 32, 32), (0.5, 0.5, 0.5), (0.2, 0.2, 0.2))
RECIPE = Recipe()


def picture(index=0, size=(40, 44), mode="RGB"):
    pixels = np.random.default_rng(index).integers(0, 255, (*size, 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def folder_of(root, **classes):
    """Images of so many a class; ``root`` itself holds those of the class ``_``."""
    for name, count in classes.items():
        folder = root if name == "_" else root / name
        folder.mkdir(parents=True, exist_ok=True)
        for index in range(count):
            picture(index).save(folder / f"{index}.png")
    return root


def names(selection):
    return [selection.name(place) for place in range(len(selection))]


def read(selection, places=None, workers=0, batch_size=4, spec=SPEC):
    places = range(len(selection)) if places is None else places
    options = {"batch_size": batch_size, "workers": workers, "device": CPU}
    return list(selection.read(RECIPE, spec, places, **options))


def test_no_class_gives_a_second_image_before_all_have_given_one(tmp_path):
    folder_of(tmp_path, a=5, b=1, c=3)
    drawn = [Counter(n[0] for n in names(open_images(tmp_path, images=k))) for k in range(1, 10)]
    assert [max(counts.values()) for counts in drawn] == [1, 1, 1, 2, 2, 3, 3, 4, 5]
    assert drawn[2] == Counter("abc")
    assert drawn[-1] == Counter(a=5, b=1, c=3)


def test_few_images_come_from_random_classes_whatever_their_size():
    labels = [0] * 97 + [1, 2, 3]
    drawn = Counter(labels[balanced_subset(labels, 100, 1, seed)[0]] for seed in range(400))
    assert min(drawn[label] for label in range(4)) > 60


def test_neighbors_are_no_more_often_of_one_class_than_chance_has_it():
    labels = np.repeat(np.arange(10), 50)
    order = labels[balanced_subset(labels, 500, None, 0)]
    same = (order[0::2] == order[1::2]).mean()
    assert 0.04 < same < 0.16


@pytest.mark.parametrize("images", [None, 9, 1000])
def test_all_images_are_taken_once_where_no_fewer_are_asked_for(tmp_path, images):
    selection = open_images(folder_of(tmp_path, a=5, b=4), images=images)
    assert len(set(names(selection))) == len(selection) == 9


def test_a_selection_depends_on_the_seed_alone(tmp_path):
    folder_of(tmp_path, a=9, b=9)
    drawn = [names(open_images(tmp_path, images=6, seed=seed)) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_a_folder_without_classes_will_do(tmp_path):
    assert len(open_images(folder_of(tmp_path, _=3))) == 3


@pytest.mark.parametrize("inner", ["val", "validation"])
def test_of_a_training_folder_the_validation_images_are_taken(tmp_path, inner):
    folder_of(tmp_path / "train", a=2, b=2)
    folder_of(tmp_path / inner, a=1)
    assert names(open_images(tmp_path)) == ["a/0.png"]


def test_an_empty_folder_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"data: .*image"):
        open_images(tmp_path)


class Undecodable(Dataset):
    """Fails where a label is taken from a sample; the first is read to see what it is."""

    def __init__(self, count=4, **attributes):
        self.count = count
        vars(self).update(attributes)

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        assert index == 0, "decoded for its label"
        return picture(), 0


LABELED = {
    "targets": Undecodable(targets=[0, 1, 1, 1]),
    "tensor of targets": Undecodable(targets=torch.tensor([0, 1, 1, 1])),
    "labels": Undecodable(labels=np.array([0, 1, 1, 1])),
    "list": [(picture(), label) for label in (0, 1, 1, 1)],
    "tensors": TensorDataset(torch.rand(4, 3, 32, 32), torch.tensor([0, 1, 1, 1])),
    "subset": Subset(Undecodable(6, targets=[1, 1, 0, 1, 1, 1]), [2, 0, 1, 5]),
}


@pytest.mark.parametrize("kind", LABELED)
def test_labels_are_known_without_decoding(kind):
    assert known_labels(LABELED[kind]) == [0, 1, 1, 1]


@pytest.mark.parametrize(
    "attributes",
    [{}, {"targets": [0, 1]}, {"targets": [0.5, 0.25, 1.5, 2.0]}, {"targets": [[0, 1]] * 4}],
)
def test_without_labels_that_are_classes_the_choice_is_random(attributes):
    dataset = Undecodable(**attributes)
    assert known_labels(dataset) is None
    assert sorted(open_images(dataset).indices) == [0, 1, 2, 3]


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_restart_in_the_middle(tmp_path, workers):
    selection = open_images(folder_of(tmp_path, a=5, b=5))
    whole, rest = read(selection), read(selection, range(4, 10), workers)
    assert [batch.places for batch in rest] == [[4, 5, 6, 7], [8, 9]]
    for left, right in zip(rest, whole[1:]):
        assert torch.equal(left.images, right.images)


def test_a_data_sets_own_chance_is_the_same_at_every_reading():
    class Noisy(TensorDataset):
        def __getitem__(self, index):
            image, label = super().__getitem__(index)
            return image + torch.rand_like(image), label

    selection = open_images(Noisy(torch.zeros(4, 1, 8, 8), torch.zeros(4)))
    spec = InputSpec((1, 8, 8), None, None)
    (first,), (second,) = read(selection, spec=spec), read(selection, spec=spec)
    assert torch.equal(first.images, second.images)
    assert first.images.unique().numel() == 4 * 64


def broken_folder(root):
    folder_of(root, a=4, b=4)
    whole = (root / "a" / "0.png").read_bytes()
    (root / "a" / "0.png").write_bytes(whole[: len(whole) // 2])
    (root / "a" / "1.png").write_text("no image")
    (root / "b" / "2.png").write_bytes(b"")
    selection = open_images(root)
    (root / "b" / "3.png").unlink()
    return selection


@pytest.mark.parametrize("workers", [0, 2])
def test_images_that_cannot_be_read_are_reported_by_name(tmp_path, workers):
    selection = broken_folder(tmp_path)
    batches = read(selection, workers=workers, batch_size=3)
    reasons = {selection.name(p): reason for batch in batches for p, reason in batch.skipped}
    assert set(reasons) == {"a/0.png", "a/1.png", "b/2.png", "b/3.png"}
    assert "truncated" in reasons["a/0.png"]
    assert reasons["a/1.png"] == reasons["b/2.png"]
    assert reasons["a/1.png"].startswith("no JPEG, PNG, WEBP, ")
    assert reasons["b/3.png"] == "No such file or directory"
    assert not any("\n" in reason for reason in reasons.values())
    read_places = [place for batch in batches for place in batch.places]
    skipped = [place for batch in batches for place, _ in batch.skipped]
    assert sorted(read_places + skipped) == list(range(8))
    assert all(len(b.places) == (0 if b.images is None else len(b.images)) for b in batches)


def test_a_broken_image_moves_no_other_to_another_batch(tmp_path):
    folder_of(tmp_path, a=4, b=4)
    before = read(open_images(tmp_path), batch_size=3)
    (tmp_path / "a" / "1.png").write_text("no image")
    for old, new in zip(before, read(open_images(tmp_path), batch_size=3)):
        assert set(new.places) | {place for place, _ in new.skipped} == set(old.places)


def test_a_batch_of_broken_images_has_none(tmp_path):
    folder_of(tmp_path, _=2)
    for file in tmp_path.iterdir():
        file.write_text("no image")
    ((places, images, skipped),) = read(open_images(tmp_path))
    assert (places, images, [place for place, _ in skipped]) == ([], None, [0, 1])


def test_whatever_a_data_set_raises_is_reported(tmp_path):
    class Faulty(Undecodable):
        def __getitem__(self, index):
            if index == 2:
                raise KeyError("sample 2 is not in the index")
            return picture(index), 0

    selection = open_images(Faulty())
    (batch,) = read(selection)
    ((place, reason),) = batch.skipped
    assert selection.name(place) == "sample 2"
    assert reason.startswith("KeyError") and "not in the index" in reason


def test_a_data_set_whose_first_file_is_broken_is_opened(tmp_path):
    class Folder(Undecodable):
        def __getitem__(self, index):
            return Image.open(tmp_path / f"{index}.png").convert("RGB"), 0

    folder_of(tmp_path, _=4)
    (tmp_path / "0.png").write_text("no image")
    (batch,) = read(open_images(Folder()))
    assert (len(batch.places), len(batch.skipped)) == (3, 1)


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "CMYK", "1", "YCbCr"])
def test_every_mode_is_converted_as_timm_does(mode):
    image = picture(mode=mode)
    (batch,) = read(open_images([(image, 0)]))
    (expected,) = read(open_images([(image.convert("RGB"), 0)]))
    assert torch.equal(batch.images, expected.images)


@pytest.mark.parametrize("mode", ["I;16", "I", "F"])
def test_deep_grayscale_is_reported_instead_of_measured_as_white(mode):
    image = picture(mode="L").convert("I").convert(mode)
    (batch,) = read(open_images([(image, 0)]))
    ((_, reason),) = batch.skipped
    assert "more than 8 bits" in reason


def test_tensors_of_another_size_are_reported():
    data = [(torch.rand(3, 32, 32), 0), (torch.rand(3, 32, 30), 0), (torch.rand(3, 32, 32), 0)]
    (batch,) = read(open_images(data))
    ((_, reason),) = batch.skipped
    assert reason == "is [3, 32, 30], expected [3, 32, 32]"
    assert len(batch.places) == 2


def test_tensors_are_normalized_where_statistics_are_given():
    data = TensorDataset(torch.full((1, 3, 32, 32), 0.9), torch.zeros(1))
    (batch,) = read(open_images(data))
    torch.testing.assert_close(batch.images, torch.full((1, 3, 32, 32), 2.0))


def test_a_fingerprint_tells_selections_apart(tmp_path):
    folder_of(tmp_path, a=5, b=5)
    prints = [
        open_images(tmp_path, images=images, seed=seed).fingerprint
        for images, seed in ((4, 0), (4, 0), (5, 0), (4, 1))
    ]
    assert prints[0] == prints[1]
    assert prints[0] not in prints[2:]
    (tmp_path / "a" / "0.png").rename(tmp_path / "a" / "00.png")
    assert open_images(tmp_path).fingerprint != prints[0]


def test_reading_leaves_the_global_generators_alone(tmp_path):
    folder_of(tmp_path, a=3)
    torch.manual_seed(3), np.random.seed(3)
    expected = torch.rand(1).item(), np.random.rand()
    torch.manual_seed(3), np.random.seed(3)
    read(open_images(tmp_path))
    assert (torch.rand(1).item(), np.random.rand()) == expected


def test_the_fingerprint_sees_other_pictures_under_the_same_names(folder_of_two, tmp_path):
    before = open_images(folder_of_two).fingerprint
    assert open_images(folder_of_two).fingerprint == before
    for path in folder_of_two.iterdir():
        Image.new("RGB", (40, 40), "red").save(path)
    assert open_images(folder_of_two).fingerprint != before


@pytest.fixture
def folder_of_two(tmp_path):
    folder = tmp_path / "two"
    folder.mkdir()
    for name in ("a", "b"):
        Image.new("RGB", (40, 40), "blue").save(folder / f"{name}.png")
    return folder


def test_a_file_in_place_of_a_folder_is_refused(folder_of_two):
    with pytest.raises(ValueError, match=r"a\.png is a file; give the folder"):
        open_images(folder_of_two / "a.png")


@pytest.mark.parametrize("name", ["a.tar", "a.jpg"])
def test_a_pipe_in_place_of_data_is_refused(tmp_path, name):
    os.mkfifo(tmp_path / name)
    with pytest.raises(ValueError, match="neither a folder nor a tar"):
        open_images(tmp_path / name)


def test_only_regular_files_of_a_folder_are_selected_whatever_their_names(tmp_path, caplog):
    folder_of(tmp_path, cat=1, dog=1)
    picture().save(tmp_path / "cat" / "odd.webp")
    os.rename(tmp_path / "cat" / "odd.webp", os.fsencode(tmp_path) + b"/cat/\xe9.webp")
    os.mkfifo(tmp_path / "dog" / "pipe.jpg")
    (tmp_path / "dog" / "loop").symlink_to("..")
    selection = open_images(tmp_path)
    assert set(names(selection)) == {"cat/0.png", r"cat/\xe9.webp", "dog/0.png"}
    assert sum(len(part.places) for part in read(selection)) == 3
    assert selection.fingerprint["images"] == 3 and len(caplog.records) == 1
