"""Made JPEGs: where they lie, and that they are a function of their seed."""

import numpy as np
import pytest
from make_jpegs import Look, make_jpegs
from PIL import Image


def files(root):
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*.jpg")}


def made(root, **options):
    small = {"classes": 2, "train": 2, "val": 1, "size": (40, 30)}
    return files(make_jpegs(root, **small | options))


def test_a_folder_has_both_splits_and_the_same_classes_in_each(tmp_path):
    names = sorted(made(tmp_path / "a"))
    assert names == [
        "train/000_disc_plain/00000.jpg",
        "train/000_disc_plain/00001.jpg",
        "train/001_square_stripes/00000.jpg",
        "train/001_square_stripes/00001.jpg",
        "val/000_disc_plain/00000.jpg",
        "val/001_square_stripes/00000.jpg",
    ]


def test_images_have_the_size_that_was_asked_for(tmp_path):
    make_jpegs(tmp_path / "a", classes=1, train=1, val=0, size=(50, 37))
    (path,) = (tmp_path / "a").rglob("*.jpg")
    with Image.open(path) as image:
        assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (50, 37))


def test_files_are_a_function_of_the_seed(tmp_path):
    first, again, other = (made(tmp_path / n, seed=s) for n, s in (("a", 1), ("b", 1), ("c", 2)))
    assert first == again
    assert all(first[name] != other[name] for name in first)


def test_no_two_images_are_equal(tmp_path):
    contents = made(tmp_path / "a").values()
    assert len(set(contents)) == len(contents)


def test_a_larger_folder_holds_the_same_images_first(tmp_path):
    few, many = made(tmp_path / "a"), made(tmp_path / "b", classes=3, train=4, val=2)
    assert few.items() < many.items()


def test_twenty_classes_have_twenty_pairs_of_shape_and_texture():
    looks = [Look.of(number) for number in range(20)]
    assert len({(look.shape, look.texture) for look in looks}) == 20


def test_classes_differ_in_their_mean_colour_more_than_their_images_do(tmp_path):
    make_jpegs(tmp_path / "a", classes=3, train=8, val=0, size=(60, 45))
    colors = np.stack(
        [
            np.stack([np.asarray(Image.open(f)).mean((0, 1)) for f in sorted(folder.iterdir())])
            for folder in sorted((tmp_path / "a" / "train").iterdir())
        ]
    )
    colors /= colors.sum(-1, keepdims=True)  # whatever the light
    assert colors.mean(1).std(0).max() > 1.5 * colors.std(1).mean(0).max()


def test_a_folder_that_is_not_empty_is_left_alone(tmp_path):
    (tmp_path / "note.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="not empty"):
        make_jpegs(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["note.txt"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"classes": 0}, "classes must be at least 1, got 0"),
        ({"val": -1}, "val must be at least 0, got -1"),
        ({"size": (0, 10)}, "size must be at least 1, got 0"),
        ({"quality": 100}, "quality must be 1 to 95, got 100"),
    ],
)
def test_what_no_folder_can_be_made_of_is_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        make_jpegs(tmp_path / "a", **options)
    assert not (tmp_path / "a").exists()
