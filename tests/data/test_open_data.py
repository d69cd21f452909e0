"""What a user may pass as data: folders, named sets and pairs, with labels and without."""

import io
import os
import shutil

import numpy as np
import pytest
from PIL import Image

from fastkd.data.open_data import open_data
from tests.harness.archives import (
    CLASSES,
    both_splits,
    both_tars,
    classes_and_labels,
    contents,
    images_of,
    one_tar_a_class,
    one_tar_a_split,
    one_tar_of_tars,
    tar_of,
    write_shards,
)
from tests.harness.tiny import tensor_data

ARCHIVES = [one_tar_a_split, one_tar_a_class, one_tar_of_tars, write_shards]


@pytest.mark.parametrize("archive", ARCHIVES)
def test_archives_hold_the_images_and_labels_of_the_folder_they_were_made_of(
    folder, tmp_path, archive
):
    opened, expected = open_data(archive(folder, tmp_path / "tars")), open_data(folder)
    for split in ("train", "val"):
        assert contents(getattr(opened, split)) == contents(getattr(expected, split))
    assert opened.num_classes == 3
    assert opened.labeled_val and not opened.streams


@pytest.mark.parametrize("archive", ARCHIVES)
def test_a_sample_in_an_archive_is_called_by_archive_and_member(folder, tmp_path, archive):
    dataset = open_data(archive(folder, tmp_path / "tars")).train
    name = dataset.filename(0)
    path, _, member = name.partition(":")
    assert os.path.isfile(path) and path.endswith(".tar")
    assert member.endswith("0.jpg")


def test_a_sample_in_a_folder_is_called_by_its_whole_path(folder):
    dataset = open_data(folder).train
    assert dataset.filename(0) == str(folder / "train" / "blue" / "0.jpg")


def test_a_class_without_validation_images_shifts_no_label_of_tars(folder, tmp_path):
    shutil.rmtree(folder / "val" / "blue")
    (folder / "val" / "blue").mkdir()
    data = open_data(one_tar_a_class(folder, tmp_path / "tars"))
    assert {label for label, _ in contents(data.val)} == {1, 2}


def test_tars_of_classes_that_training_lacks_are_refused(folder, tmp_path):
    tars = one_tar_a_class(folder, tmp_path / "tars")
    (tars / "val" / "red.tar").rename(tars / "val" / "violet.tar")
    with pytest.raises(ValueError, match="violet"):
        open_data(tars)


def test_a_stray_tar_hides_no_image_folder(folder):
    blue = [(path.name, path) for path in sorted((folder / "train" / "blue").iterdir())]
    tar_of(folder / "train" / "n01440764.tar", blue)
    with pytest.raises(
        ValueError, match=r"train has images, such as .*, and the archive n01440764"
    ):
        open_data(folder)
    val = [(f"ILSVRC2012_val_{n}.JPEG", path) for n, path in enumerate(images_of(folder, "val"))]
    tar_of(folder / "val" / "ILSVRC2012_img_val.tar", val)
    with pytest.raises(ValueError, match=r"val has images, such as .* archive ILSVRC2012_img_val"):
        open_data(folder / "val", need_train=False)


def test_what_is_hidden_is_no_class(folder):
    expected = contents(open_data(folder).val)
    for split in ("train", "val"):
        (folder / split / ".ipynb_checkpoints").mkdir()
        shutil.copy(folder / "val/red/0.jpg", folder / split / ".ipynb_checkpoints/0.jpg")
        (folder / split / "red" / ".cache").mkdir()
        (folder / split / "red" / ".cache" / "1.jpg").write_bytes(b"")
        (folder / split / "blue" / "._0.jpg").write_bytes(b"of another system")
    (folder / "val" / "amber").mkdir()
    data = open_data(folder)
    assert contents(data.val) == expected
    assert (len(data.train), data.num_classes) == (9, 3)
    assert {label for label, _ in contents(data.train)} == {0, 1, 2}


def test_a_folder_of_hidden_images_is_refused(folder):
    (folder / "train").rename(folder / ".train")
    (folder / "train").mkdir()
    (folder / ".train").rename(folder / "train" / ".train")
    with pytest.raises(ValueError, match=r"train has no images .* hidden"):
        open_data(folder)


def test_the_evaluation_folder_may_be_called_valid(folder):
    (folder / "val").rename(folder / "valid")
    assert len(open_data(folder).val) == 6


@pytest.mark.parametrize("kept", [both_splits, both_tars])
@pytest.mark.parametrize(
    "names, classes, labels",
    [
        (["b/images/1.JPEG", "b/images/2.JPEG", "a/images/1.JPEG"], ["a", "b"], [0, 1, 1]),
        (["a/x/y/1.jpg", "b/2.jpg", "a/3.jpg"], ["a", "b"], [0, 0, 1]),
        (["a/same/1.jpg", "b/same/1.jpg", "10/same/1.jpg"], ["10", "a", "b"], [0, 1, 2]),
    ],
)
def test_classes_are_the_folders_at_the_top(tmp_path, kept, names, classes, labels):
    data = open_data(kept(tmp_path, *names))
    for dataset in (data.train, data.val):
        numbers, found = classes_and_labels(dataset)
        assert list(numbers) == classes and sorted(found) == labels


def test_folders_below_the_classes_are_told(tmp_path, caplog):
    open_data(both_splits(tmp_path, "a/abbey/1.jpg", "a/airfield/2.jpg", "b/bank/1.jpg"))
    told = [record.getMessage() for record in caplog.records]
    assert all("images are in 3 folders, but the classes are the 2 at the top" in t for t in told)
    assert len(told) == 2


@pytest.mark.parametrize("kept", [both_splits, both_tars])
def test_class_folders_without_images_are_refused_in_training_alone(tmp_path, kept):
    empty = ["c/1.txt", "d/1.mp4"] if kept is both_splits else ["c/1.txt", "d/"]
    root = kept(tmp_path, "a/1.jpg", "b/2.jpg", ".e/3.jpg", *empty)
    with pytest.raises(ValueError, match=r"train(\.tar)? has class folders without images: c, d;"):
        open_data(root)
    assert open_data(root, labels=False).num_classes == 2
    assert open_data(root, need_train=False).num_classes == 2


@pytest.mark.parametrize("kept", [both_splits, both_tars])
def test_training_classes_without_validation_images_are_told(tmp_path, caplog, kept):
    root = kept(tmp_path, "a/1.jpg", "b/2.jpg", "c/3.jpg")
    open_data(root)
    assert not caplog.records
    if kept is both_splits:
        (root / "val/b/2.jpg").unlink()
    else:
        kept(tmp_path, "a/1.jpg", "c/3.jpg")
        kept(tmp_path / "whole", "a/1.jpg", "b/2.jpg", "c/3.jpg")
        (tmp_path / "whole/train.tar").replace(root / "train.tar")
    data = open_data(root)
    (record,) = caplog.records
    assert "no images of 1 of the 3 training classes: b" in record.getMessage()
    assert [data.val[index][1] for index in range(2)] == [0, 2]


@pytest.mark.parametrize("kept", [both_splits, both_tars])
def test_one_class_teaches_nothing(tmp_path, kept):
    root = kept(tmp_path, "images/1.jpg", "images/2.jpg")
    with pytest.raises(ValueError, match=r"training set has one class, 'images'"):
        open_data(root)
    data = open_data(root, labels=False)
    assert not data.labeled_val and data.num_classes is None and data.train[0][1] == -1


def test_one_class_of_the_users_own_data_or_of_shards_is_refused(tmp_path):
    class Own(list):
        classes = ("cat",)

    data = Own([(Image.new("RGB", (8, 8)), 0)])
    with pytest.raises(ValueError, match="training set has one class"):
        open_data((data, data))
    image = io.BytesIO()
    Image.new("RGB", (8, 8)).save(image, "JPEG")
    for split in ("train", "val"):
        tar_of(tmp_path / f"{split}-0.tar", [("a.jpg", image.getvalue()), ("a.cls", b"0")])
    with pytest.raises(ValueError, match="training set has one class"):
        open_data(tmp_path)


@pytest.mark.parametrize("kept", [both_splits, both_tars])
def test_an_unsorted_validation_split_is_named(tmp_path, kept):
    root = kept(tmp_path, "n1/images/1.JPEG", "n2/images/2.JPEG")
    other = kept(tmp_path / "other", "images/1.JPEG", "val_annotations.txt")
    for place in (*root.glob("val*"), *root.glob(".fastkd*")):
        shutil.rmtree(place) if place.is_dir() else place.unlink()
    (found,) = other.glob("val*")
    found.rename(root / found.name)
    with pytest.raises(
        ValueError, match=r"val(\.tar)? has all images in one folder, 'images'"
    ) as told:
        open_data(root)
    assert kept is both_tars or "val_annotations.txt" in str(told.value)
    data = open_data(root, labels=False)
    assert not data.labeled_val and data.num_classes == 2


ENDINGS = ("a/1.webp", "a/2.bmp", "b/3.tif", "b/4.TIFF", "c/5.gif", "c/6.pgm", "c/7.ppm")


def test_shards_tars_and_folders_have_the_same_endings(tmp_path, caplog):
    files = []
    for number, name in enumerate(ENDINGS):
        for split in ("train", "val"):
            path = tmp_path / "folder" / split / name
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8), (number * 30, 0, 0)).save(path)
        files.append((name, path))
    shard_files = [
        member
        for number, (name, path) in enumerate(files)
        for member in (
            (f"{number}{path.suffix}", path),
            (f"{number}.cls", str("abc".index(name[0])).encode()),
        )
    ]
    for folder in ("tars", "shards"):
        (tmp_path / folder).mkdir()
    for split in ("train", "val"):
        tar_of(tmp_path / "tars" / f"{split}.tar", files)
        tar_of(tmp_path / "shards" / f"{split}-0.tar", shard_files)
    expected = contents(open_data(tmp_path / "folder").train)
    assert [label for label, _ in expected] == [0, 0, 1, 1, 2, 2, 2]
    for folder in ("tars", "shards"):
        assert contents(open_data(tmp_path / folder).train) == expected
    assert not caplog.records


def test_other_files_in_folders_and_tars_are_told(tmp_path, caplog):
    names = ("a/1.jpg", "b/1.jpg", "a/1.txt", "b/1.mp4", "b/2.mp4")
    open_data(both_splits(tmp_path / "folder", *names))
    open_data(both_tars(tmp_path / "tars", *names))
    open_data(tmp_path / "tars")  # from the listing that was kept
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == 6
    assert all("left out 3 files that are no images: 2 .mp4, 1 .txt" in text for text in told)


@pytest.mark.parametrize("name", ["train", "train.tar", "_info.json"])
def test_pipes_in_the_place_of_splits_are_none(tmp_path, name):
    os.mkfifo(tmp_path / name)
    with pytest.raises(ValueError, match="has no folder train"):
        open_data(tmp_path)
    with pytest.raises(ValueError, match="neither a folder nor a tar"):
        open_data(tmp_path / name)


def unlabeled(folder, split):
    """Take a split's images out of the classes' folders."""
    for number, path in enumerate(images_of(folder, split)):
        path.rename(folder / split / f"{number}.jpg")
    for name in CLASSES:
        (folder / split / name).rmdir()


@pytest.mark.parametrize("split", ["train", "val"])
def test_images_without_classes_are_refused_where_labels_are_needed(folder, split):
    unlabeled(folder, split)
    with pytest.raises(ValueError, match=rf"{split} has images in no class's folder"):
        open_data(folder)


def test_labels_may_be_missing_everywhere(folder):
    unlabeled(folder, "train"), unlabeled(folder, "val")
    data = open_data(folder, labels=False)
    assert (len(data.train), len(data.val), data.num_classes) == (9, 6, None)
    assert not data.labeled_val
    assert data.train[0][1] == data.val[0][1] == -1


def test_labels_may_be_missing_in_training_alone(folder):
    unlabeled(folder, "train")
    data = open_data(folder, labels=False)
    assert data.labeled_val and data.num_classes == 3  # as the evaluation set says
    assert {label for label, _ in contents(data.val)} == {0, 1, 2}


def test_evaluation_minds_no_missing_labels_of_the_training_set(folder):
    unlabeled(folder, "train")
    data = open_data(folder, need_train=False)
    assert data.train is None and data.num_classes == 3


def test_labels_that_are_there_are_kept_where_they_are_not_needed(folder):
    data = open_data(folder, labels=False)
    assert data.labeled_val and data.num_classes == 3
    assert data.train[0][1] == 0


@pytest.mark.parametrize("label, labeled", [(0, True), (-1, False), (None, False)])
def test_the_users_own_data_tell_by_a_sample_whether_they_are_labeled(label, labeled):
    data = [(Image.new("RGB", (8, 8)), label)]
    assert open_data((data, data), labels=False).labeled_val == labeled


def test_tensors_are_labeled():
    assert open_data(tensor_data(8, 4), labels=False).labeled_val


@pytest.mark.parametrize(
    "name", ["nowhere", "some/where/else", "./nowhere", "/no/where", "a.tar", "tfds/a"]
)
@pytest.mark.parametrize("need_train", [True, False])
def test_what_is_not_there_is_refused_plainly(name, need_train):
    told = f"no folder '{name}'; names of datasets begin with hfds/, hfids/, wds/, torch/"
    with pytest.raises(ValueError, match=told):
        open_data(name, need_train=need_train)


def test_a_file_that_is_no_tar_is_refused_plainly(tmp_path):
    (tmp_path / "a.txt").write_text("")
    with pytest.raises(ValueError, match=r"a\.txt' is neither a folder nor a tar"):
        open_data(tmp_path / "a.txt")


def test_an_empty_folder_is_refused_plainly(tmp_path):
    with pytest.raises(ValueError, match=r"data: .* has no images"):
        open_data(tmp_path, need_train=False)


@pytest.mark.parametrize(
    "name, package",
    [
        ("hfds/a/b", "pip install datasets"),
        ("hfids/a/b", "pip install datasets"),
        ("wds/https://host/a", "pip install webdataset"),
    ],
)
def test_a_missing_package_is_named_as_pip_calls_it(monkeypatch, name, package):
    monkeypatch.setattr("importlib.util.find_spec", lambda module: None)
    with pytest.raises(ImportError, match=package):
        open_data(name)


def hub_set(folder, labels=True, column="image", scheme="hfds", val="test", unlabeled=()):
    """A data set in files, as on Hugging Face's hub: a train and a test split."""
    datasets = pytest.importorskip("datasets")
    folder.mkdir()
    for split, count in (("train", 6), (val, 4)):
        images = [Image.new("RGB", (8, 8), (index * 20, 0, 0)) for index in range(count)]
        columns = {column: images}
        types = {column: datasets.Image()}
        if labels:
            columns["label"] = [-1 if split in unlabeled else i % 2 for i in range(count)]
            types["label"] = datasets.ClassLabel(names=["a", "b"])
        made = datasets.Dataset.from_dict(columns, features=datasets.Features(types))
        made.to_parquet(str(folder / f"{split}-00000-of-00001.parquet"))
    return f"{scheme}/{folder}"


def test_a_hub_set_is_read_by_number(tmp_path):
    data = open_data(hub_set(tmp_path / "set"), str(tmp_path / "cache"))
    assert (len(data.train), len(data.val), data.num_classes) == (6, 4, 2)
    image, label = data.train[3]
    assert label == 1 and np.asarray(image)[0, 0, 0] == 60
    assert data.train.filename(3).endswith("/train[3]")


def test_a_hub_set_without_labels(tmp_path):
    name = hub_set(tmp_path / "set", labels=False)
    with pytest.raises(ValueError, match=r"has no column 'label', but \['image'\]"):
        open_data(name, str(tmp_path / "cache"))
    data = open_data(name, str(tmp_path / "cache"), labels=False)
    assert data.train[3][1] == -1 and not data.labeled_val


def test_a_hub_set_may_call_its_images_otherwise(tmp_path):
    data = open_data(hub_set(tmp_path / "set", column="img"), str(tmp_path / "cache"))
    assert data.train[3][0].size == (8, 8)


def test_a_hub_set_without_images_is_refused(tmp_path):
    datasets = pytest.importorskip("datasets")
    (tmp_path / "set").mkdir()
    for split in ("train", "validation"):
        made = datasets.Dataset.from_dict({"text": ["a", "b"]})
        made.to_parquet(str(tmp_path / "set" / f"{split}-00000-of-00001.parquet"))
    with pytest.raises(ValueError, match=r"has no column of images, but \['text'\]"):
        open_data(f"hfds/{tmp_path / 'set'}", str(tmp_path / "cache"))


def test_a_hub_set_whose_evaluation_labels_are_kept_back_is_refused(tmp_path):
    name = hub_set(tmp_path / "set", unlabeled=["test"])
    with pytest.raises(ValueError, match="has no labels in its split test"):
        open_data(name, str(tmp_path / "cache"))
    data = open_data(name, str(tmp_path / "cache"), labels=False)
    assert not data.labeled_val and data.num_classes == 2
    assert data.val[1][1] == -1 and data.train[1][1] == 1


def test_the_evaluation_split_may_be_called_valid(tmp_path):
    data = open_data(hub_set(tmp_path / "set", val="valid"), str(tmp_path / "cache"))
    assert len(data.val) == 4


def test_a_streamed_hub_set_may_call_its_images_otherwise(tmp_path):
    name = hub_set(tmp_path / "set", column="img", scheme="hfids")
    data = open_data(name, str(tmp_path / "cache"))
    read = list(data.val.read(lambda image: image.size, rank=0, world_size=1))
    assert read == [((8, 8), i % 2) for i in range(4)]


def test_a_streamed_hub_set_without_labels_is_refused(tmp_path):
    name = hub_set(tmp_path / "set", labels=False, scheme="hfids")
    with pytest.raises(ValueError, match=r"has no column 'label', but \['image'\]"):
        open_data(name, str(tmp_path / "cache"), labels=False)
