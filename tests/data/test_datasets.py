"""What a user may call data: folders, tars, shards, named sets, with labels and without."""

import io
import json
import os
import pickle
import shutil
import tarfile

import numpy as np
import pytest
from PIL import Image
from timm.data.readers.img_extensions import add_img_extensions, del_img_extensions

from fastkd.data import tars
from fastkd.data.datasets import open_data
from fastkd.data.tars import TarImages, list_members
from tests.harness.tiny import image_folder, tensor_data

CLASSES = ("blue", "green", "red")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return image_folder(tmp_path_factory.mktemp("images"), train=3, val=2)


@pytest.fixture
def folder(made, tmp_path):
    return shutil.copytree(made, tmp_path / "images")


def tar_of(path, files):
    """A tar of (name, content or file)."""
    with tarfile.open(path, "w") as archive:
        for name, content in files:
            content = content if isinstance(content, bytes) else content.read_bytes()
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def images_of(folder, split):
    return sorted((folder / split).rglob("*.jpg"))


def one_tar_a_split(folder, into):
    into.mkdir()
    for split in ("train", "val"):
        files = [(f"{path.parent.name}/{path.name}", path) for path in images_of(folder, split)]
        tar_of(into / f"{split}.tar", files)
    return into


def one_tar_a_class(folder, into):
    for split in ("train", "val"):
        (into / split).mkdir(parents=True)
        for name in CLASSES:
            files = [(path.name, path) for path in sorted((folder / split / name).iterdir())]
            tar_of(into / split / f"{name}.tar", files)
    return into


def one_tar_of_tars(folder, into):
    one_tar_a_class(folder, into)
    for split in ("train", "val"):
        inner = [(path.name, path) for path in sorted((into / split).iterdir())]
        tar_of(into / f"{split}.tar", inner)
        shutil.rmtree(into / split)
    return into


def write_shards(folder, into, labels=True, size=4):
    """Shards that only their names tell apart, the images in them sorted by name."""
    into.mkdir()
    for split in ("train", "val"):
        paths = images_of(folder, split)
        for start in range(0, len(paths), size):
            files = []
            for path in paths[start : start + size]:
                key = f"{path.parent.name}/{path.stem}"
                files.append((f"{key}.jpg", path))
                if labels:
                    files.append((f"{key}.cls", str(CLASSES.index(path.parent.name)).encode()))
            tar_of(into / f"made-{split}-{start:04}.tar", files)
    return into


ARCHIVES = [one_tar_a_split, one_tar_a_class, one_tar_of_tars, write_shards]


def contents(dataset):
    """(label, hash of the pixels) of all samples, in no order."""
    return sorted(
        (label, hash(image.tobytes()))
        for image, label in map(dataset.__getitem__, range(len(dataset)))
    )


@pytest.mark.parametrize("archive", ARCHIVES)
def test_archives_hold_the_images_and_labels_of_the_folder_they_were_made_of(
    folder, tmp_path, archive
):
    opened, expected = open_data(archive(folder, tmp_path / "tars")), open_data(folder)
    for split in ("train", "val"):
        assert contents(getattr(opened, split)) == contents(getattr(expected, split))
    assert opened.num_classes == 3
    assert opened.labelled_val and not opened.streams


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


def test_shards_of_an_info_file_are_those_it_lists(folder, tmp_path):
    shards = write_shards(folder, tmp_path / "shards")
    names = sorted(path.name for path in shards.glob("*.tar"))
    splits = {
        "train": {"filenames": [name for name in names if "train" in name][:1]},
        "validation": {"filenames": [name for name in names if "val" in name]},
    }
    (shards / "info.json").write_text(json.dumps({"splits": splits, "classes": list("abcd")}))
    data = open_data(f"wds/{shards}")
    assert (len(data.train), len(data.val), data.num_classes) == (4, 6, 4)


def test_shards_found_below_the_root_of_a_wds_name(folder, tmp_path):
    write_shards(folder, tmp_path / "shards")
    assert len(open_data("wds/shards", str(tmp_path)).train) == 9


def test_labels_are_taken_from_the_field_that_an_info_file_names(folder, tmp_path):
    image = images_of(folder, "train")[0]
    for split in ("train", "validation"):
        files = [("c.jpg", image), ("c.json", b'{"kind": 5}')]
        tar_of(tmp_path / f"{split}.0.tar", files)
    splits = {
        split: {"filenames": [f"{split}.0.tar"], "alt_label": "kind"}
        for split in ("train", "validation")
    }
    (tmp_path / "_info.json").write_text(json.dumps({"splits": splits}))
    assert open_data(tmp_path).train[0][1] == 5


def test_evaluation_opens_one_tar(folder, tmp_path):
    tars = one_tar_a_split(folder, tmp_path / "tars")
    assert len(open_data(tars / "val.tar", need_train=False).val) == 6
    with pytest.raises(ValueError, match=r"is one tar; give the folder"):
        open_data(tars / "val.tar")


def test_headers_are_listed_once(folder, tmp_path, monkeypatch):
    shards = write_shards(folder, tmp_path / "shards")
    expected = contents(open_data(shards).train)
    monkeypatch.setattr(tars, "list_shard", None)  # nobody may call it
    assert contents(open_data(shards).train) == expected


def test_a_listing_is_made_anew_when_a_shard_has_changed(folder, tmp_path):
    shards = write_shards(folder, tmp_path / "shards")
    assert len(open_data(shards).train) == 9
    image = images_of(folder, "train")[0]
    tar_of(
        shards / "made-train-0008.tar",
        [("a.jpg", image), ("a.cls", b"2"), ("b.jpg", image), ("b.cls", b"0")],
    )
    assert len(open_data(shards).train) == 10


def test_a_listing_is_made_anew_when_other_files_count_as_images(folder, tmp_path):
    for path in images_of(folder, "train")[:2]:
        path.rename(path.with_suffix(".jfif"))
    tars = one_tar_a_class(folder, tmp_path / "tars")
    assert len(open_data(tars).train) == 7
    add_img_extensions(".jfif")
    try:
        assert len(open_data(tars).train) == 9
    finally:
        del_img_extensions((".jfif",))


def test_a_listing_is_made_anew_for_another_archive_of_the_same_size_and_date(folder, tmp_path):
    first, second = images_of(folder, "train")[:1] * 2
    for split in ("train", "val"):
        path = tar_of(tmp_path / f"{split}.tar", [("a/0.jpg", first), ("b/1.jpg", second)])
        os.utime(path, (10**9, 10**9))
    assert open_data(tmp_path).train.filename(1).endswith("b/1.jpg")
    for split in ("train", "val"):
        path = tar_of(tmp_path / f"{split}.tar", [("b/9.jpg", first), ("a/8.jpg", second)])
        os.utime(path, (10**9, 10**9))
    assert open_data(tmp_path).train.filename(1).endswith("a/8.jpg")


def test_a_listing_packed_in_a_way_unknown_to_python_is_made_anew(folder, tmp_path):
    shards = write_shards(folder, tmp_path / "shards")
    open_data(shards)
    for path in shards.glob(".fastkd-*.npz"):
        content = path.read_bytes()
        start = content.index(b"PK\x01\x02")  # where the directory begins
        unknown = bytearray(content)
        unknown[8] = unknown[start + 10] = 99
        path.write_bytes(unknown)
    assert len(open_data(shards).train) == 9


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


def test_a_plain_tar_may_hold_a_description_of_its_images(folder, tmp_path):
    tars = one_tar_a_split(folder, tmp_path / "tars")
    for split in ("train", "val"):
        files = [(f"{path.parent.name}/{path.name}", path) for path in images_of(folder, split)]
        tar_of(tars / f"{split}.tar", [("blue/0.json", b"{}"), ("meta.json", b"{}"), *files])
    assert contents(open_data(tars).train) == contents(open_data(folder).train)


def test_hidden_files_in_a_tar_are_no_images(folder, tmp_path):
    image = images_of(folder, "train")[0]
    names = ["./red/1.jpg", "red/._1.jpg", ".cache/2.jpg", "__MACOSX/red/1.jpg", "./blue/1.jpg"]
    names += [".ipynb_checkpoints/1.jpg", "red/.cache/1.jpg", "._blue.tar"]
    for split in ("train", "val"):
        tar_of(tmp_path / f"{split}.tar", [(name, image) for name in names])
    data = open_data(tmp_path)
    assert data.train.filename(0).endswith("/red/1.jpg")
    assert len(data.train) == 2 and data.train.reader.class_to_idx == {"blue": 0, "red": 1}


def test_hard_links_in_a_tar_are_the_files_they_name(folder, tmp_path):
    image = images_of(folder, "train")[0]
    for split in ("train", "val"):
        with tarfile.open(tmp_path / f"{split}.tar", "w") as archive:
            archive.add(image, "a/0.jpg")
            link = tarfile.TarInfo("b/0.jpg")
            link.type, link.linkname = tarfile.LNKTYPE, "a/0.jpg"
            archive.addfile(link)
    data = open_data(tmp_path)
    assert [label for label, _ in contents(data.train)] == [0, 1]
    assert data.train[0][0].tobytes() == data.train[1][0].tobytes()


def test_a_hard_link_to_nothing_is_refused(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        link = tarfile.TarInfo("b/0.jpg")
        link.type, link.linkname = tarfile.LNKTYPE, "a/0.jpg"
        archive.addfile(link)
    with pytest.raises(
        OSError, match=r"a\.tar: b/0\.jpg links to a/0\.jpg, which is not before it"
    ):
        list_members(tmp_path / "a.tar")


def test_names_in_tars_may_be_no_text(folder, tmp_path):
    image = images_of(folder, "train")[0]
    for split in ("train", "val"):
        with tarfile.open(
            tmp_path / f"{split}.tar", "w", format=tarfile.GNU_FORMAT, encoding="latin-1"
        ) as archive:
            archive.add(image, "caf\xe9/\xe9.jpg")
            archive.add(image, "z/0.jpg")
    for _ in range(2):  # the second time from the listing kept
        data = open_data(tmp_path)
        assert os.fsencode(data.train.filename(0)).endswith(b"train.tar:caf\xe9/\xe9.jpg")


def listed_shards(folder, into, classes):
    """Shards with an info file that names some classes."""
    shards = write_shards(folder, into)
    splits = {
        part: {"filenames": sorted(path.name for path in shards.glob(f"*{word}*.tar"))}
        for part, word in (("train", "train"), ("validation", "val"))
    }
    (shards / "_info.json").write_text(json.dumps({"splits": splits, "classes": classes}))
    return shards


def test_a_label_beyond_the_listed_classes_is_refused(folder, tmp_path):
    shards = listed_shards(folder, tmp_path / "shards", ["blue", "green"])
    with pytest.raises(
        ValueError, match=r"red/0\.jpg has the label 2, but its list .* has 2 classes"
    ):
        open_data(shards)


def test_a_label_of_evaluation_that_training_lacks_is_refused(folder, tmp_path):
    shards = listed_shards(folder, tmp_path / "shards", None)
    image = images_of(folder, "train")[0]
    path = sorted(shards.glob("*val*.tar"))[0]
    tar_of(path, [("a.jpg", image), ("a.cls", b"3")])
    with pytest.raises(ValueError, match=r"a\.jpg has the label 3, but the training set has 3 cl"):
        open_data(shards)


@pytest.mark.parametrize(
    "info, told",
    [
        ({"splits": ["train", "val"]}, "splits must be named"),
        ({"splits": {}}, "splits must be named"),
        ({"splits": {"train": {}, "val": {}}}, "split train must have a list of filenames"),
        ({"splits": {"train": ["a.tar"]}}, "split train must have a list of filenames"),
        ({"splits": {"train": {"filenames": [3]}}}, "split train must have a list of filenames"),
        ({"splits": {"train": {"filenames": []}}}, "split train lists no shards"),
        ({"splits": {"val": {"filenames": ["a.tar"]}}, "classes": 3}, "classes must be a list"),
    ],
)
def test_a_malformed_list_of_shards_is_refused(tmp_path, info, told):
    (tmp_path / "_info.json").write_text(json.dumps(info))
    with pytest.raises(ValueError, match=rf"_info\.json: {told}"):
        open_data(tmp_path, need_train=False)


@pytest.mark.parametrize("content", [b"", b"no listing", b"PK\x03\x04"])
def test_a_broken_listing_is_made_anew(folder, tmp_path, content):
    shards = write_shards(folder, tmp_path / "shards")
    open_data(shards)
    kept = list(shards.glob(".fastkd-*.npz"))
    for path in kept:
        path.write_bytes(content)
    assert len(kept) == 2
    assert len(open_data(shards).train) == 9


def test_a_folder_that_cannot_be_written_is_read_all_the_same(folder, tmp_path, monkeypatch):
    def refuse(*_):
        raise PermissionError("read-only")

    monkeypatch.setattr(tars, "replacing", refuse)
    assert len(open_data(write_shards(folder, tmp_path / "shards")).train) == 9


def test_a_shard_that_changes_while_it_is_read_is_an_error_naming_the_sample(folder, tmp_path):
    shards = write_shards(folder, tmp_path / "shards")
    dataset = open_data(shards).train
    first = shards / "made-train-0000.tar"
    first.write_bytes(first.read_bytes() + bytes(512))
    with pytest.raises(OSError, match=r"made-train-0000\.tar:blue/0\.jpg .*has changed since"):
        dataset[0]


@pytest.mark.parametrize("kept", [100, 512, 1500, 5000, -10240, -10752])
def test_a_tar_that_is_cut_short_is_refused_by_name(folder, tmp_path, kept):
    path = tar_of(tmp_path / "torn.tar", [("a/0.jpg", p) for p in images_of(folder, "train")[:3]])
    whole = path.read_bytes()
    end = len(whole.rstrip(b"\0"))
    end += -end % 512
    path.write_bytes(whole[: kept if kept > 0 else end + 10240 + kept])
    with pytest.raises(OSError, match=r"torn\.tar is no whole"):
        list_members(path)


def test_tars_that_were_joined_are_refused(folder, tmp_path):
    path = tar_of(tmp_path / "joined.tar", [("a/0.jpg", images_of(folder, "train")[0])])
    path.write_bytes(path.read_bytes() * 2)
    with pytest.raises(OSError, match="goes on behind its end"):
        list_members(path)


def test_a_compressed_tar_is_refused(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w:gz") as archive:
        archive.addfile(tarfile.TarInfo("a.jpg"), io.BytesIO())
    with pytest.raises(OSError, match=r"a\.tar is no whole, uncompressed tar"):
        list_members(tmp_path / "a.tar")


def test_members_lie_where_the_standard_library_finds_them(tmp_path):
    long = "directory/" * 15 + "name-that-takes-a-header-of-its-own.jpg"
    files = [(long, b"first"), ("b.jpg", b""), ("c.jpg", b"x" * 513)]
    path = tar_of(tmp_path / "a.tar", files)
    content = path.read_bytes()
    assert [
        (member.name, content[member.offset : member.offset + member.size])
        for member in list_members(path)
    ] == files


def test_an_unreadable_image_in_a_shard_is_an_error_naming_it(tmp_path):
    tar_of(tmp_path / "val-0.tar", [("x.jpg", b"no image"), ("x.cls", b"0")])
    data = open_data(tmp_path, need_train=False)
    with pytest.raises(OSError, match=r"cannot read .*val-0\.tar:x\.jpg \(sample 0\)"):
        data.val[0]


def test_a_reader_of_tars_travels_to_other_processes(folder, tmp_path):
    dataset = open_data(write_shards(folder, tmp_path / "shards")).train
    assert contents(pickle.loads(pickle.dumps(dataset))) == contents(dataset)


def test_labels_of_a_class_map_are_those_of_the_map(folder, tmp_path):
    tars = one_tar_a_split(folder, tmp_path / "tars")
    reader = TarImages(
        [tars / "val.tar"], layout="tar", class_to_idx={"blue": 7, "green": 3, "red": 5}
    )
    assert sorted(set(reader.targets.tolist())) == [3, 5, 7]


def unlabelled(folder, split):
    """Take a split's images out of the classes' folders."""
    for number, path in enumerate(images_of(folder, split)):
        path.rename(folder / split / f"{number}.jpg")
    for name in CLASSES:
        (folder / split / name).rmdir()


@pytest.mark.parametrize("split", ["train", "val"])
def test_images_without_classes_are_refused_where_labels_are_needed(folder, split):
    unlabelled(folder, split)
    with pytest.raises(ValueError, match=rf"{split} has images in no class's folder"):
        open_data(folder)


def test_labels_may_be_missing_everywhere(folder):
    unlabelled(folder, "train"), unlabelled(folder, "val")
    data = open_data(folder, labels=False)
    assert (len(data.train), len(data.val), data.num_classes) == (9, 6, None)
    assert not data.labelled_val
    assert data.train[0][1] == data.val[0][1] == -1


def test_labels_may_be_missing_in_training_alone(folder):
    unlabelled(folder, "train")
    data = open_data(folder, labels=False)
    assert data.labelled_val and data.num_classes == 3  # as the evaluation set says
    assert {label for label, _ in contents(data.val)} == {0, 1, 2}


def test_evaluation_minds_no_missing_labels_of_the_training_set(folder):
    unlabelled(folder, "train")
    data = open_data(folder, need_train=False)
    assert data.train is None and data.num_classes == 3


def test_labels_that_are_there_are_kept_where_they_are_not_needed(folder):
    data = open_data(folder, labels=False)
    assert data.labelled_val and data.num_classes == 3
    assert data.train[0][1] == 0


def test_shards_without_labels(folder, tmp_path):
    shards = write_shards(folder, tmp_path / "shards", labels=False)
    with pytest.raises(ValueError, match=r"9 images have no label, such as .*blue/0\.jpg"):
        open_data(f"wds/{shards}")
    data = open_data(f"wds/{shards}", labels=False)
    assert data.train[0][1] == -1 and not data.labelled_val


def test_a_label_that_is_no_number_is_an_error_naming_it(tmp_path):
    tar_of(tmp_path / "val-0.tar", [("x.jpg", b""), ("x.cls", b"cat")])
    with pytest.raises(OSError, match=r"val-0\.tar:x\.cls holds no label"):
        open_data(tmp_path, need_train=False)


@pytest.mark.parametrize("label, labelled", [(0, True), (-1, False), (None, False)])
def test_the_users_own_data_tell_by_a_sample_whether_they_are_labelled(label, labelled):
    data = [(Image.new("RGB", (8, 8)), label)]
    assert open_data((data, data), labels=False).labelled_val == labelled


def test_tensors_are_labelled():
    assert open_data(tensor_data(8, 4), labels=False).labelled_val


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


def test_shards_of_other_splits_are_refused(folder, tmp_path):
    shards = write_shards(folder, tmp_path / "shards")
    for path in shards.glob("*val*"):
        path.unlink()
    with pytest.raises(ValueError, match="no shards of validation, but of: train"):
        open_data(shards)


def test_a_shard_that_is_listed_but_not_there_is_named(tmp_path):
    splits = {name: {"filenames": ["gone-0.tar"]} for name in ("train", "validation")}
    (tmp_path / "_info.json").write_text(json.dumps({"splits": splits}))
    with pytest.raises(OSError, match=r"gone-0\.tar"):
        open_data(tmp_path)


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


def hub_set(folder, labels=True, column="image", scheme="hfds", val="test", unlabelled=()):
    """A data set in files, as on Hugging Face's hub: a train and a test split."""
    datasets = pytest.importorskip("datasets")
    folder.mkdir()
    for split, count in (("train", 6), (val, 4)):
        images = [Image.new("RGB", (8, 8), (index * 20, 0, 0)) for index in range(count)]
        columns = {column: images}
        types = {column: datasets.Image()}
        if labels:
            columns["label"] = [-1 if split in unlabelled else i % 2 for i in range(count)]
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
    assert data.train[3][1] == -1 and not data.labelled_val


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
    name = hub_set(tmp_path / "set", unlabelled=["test"])
    with pytest.raises(ValueError, match="has no labels in its split test"):
        open_data(name, str(tmp_path / "cache"))
    data = open_data(name, str(tmp_path / "cache"), labels=False)
    assert not data.labelled_val and data.num_classes == 2
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
    with pytest.raises(ValueError, match=r"has no column 'label', but \['image'\]; what streams"):
        open_data(name, str(tmp_path / "cache"), labels=False)
