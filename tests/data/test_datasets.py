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
from fastkd.data.classes import class_names
from fastkd.data.datasets import open_data
from fastkd.data.readers import Fault
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


@pytest.mark.parametrize(("listed", "told"), [(2, False), (None, False), (5, True)])
def test_shards_of_fewer_images_than_listed_are_told(folder, tmp_path, caplog, listed, told):
    image = images_of(folder, "val")[0]
    members = [("a.jpg", image), ("a.cls", b"0"), ("b.jpg", image), ("b.cls", b"1")]
    tar_of(tmp_path / "v.tar", members)
    splits = {"val": {"filenames": ["v.tar"], "num_samples": listed}}
    (tmp_path / "_info.json").write_text(json.dumps({"splits": splits}))
    assert len(open_data(tmp_path, need_train=False).val) == 2
    assert ("hold 2 images, but their list says 5" in caplog.text) == told


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
        ({"splits": {"val": {"filenames": ["a.tar", "./a.tar"]}}}, "split val lists a shard twice"),
        ({"splits": {"val": {"filenames": ["a.tar"]}}, "classes": 3}, "classes must be a list"),
        ({"splits": {"val": {"filenames": ["a.tar"], "num_samples": -1}}}, "num_samples of split"),
        ({"splits": {"val": {"filenames": ["a.tar"], "num_samples": 10**40}}}, "num_samples of"),
        ({"splits": {"val": {"filenames": ["a.tar"], "alt_label": ["a"]}}}, "alt_label of split"),
    ],
)
def test_a_malformed_list_of_shards_is_refused(tmp_path, info, told):
    (tmp_path / "_info.json").write_text(json.dumps(info))
    with pytest.raises(ValueError, match=rf"_info\.json: {told}"):
        open_data(tmp_path, need_train=False)


@pytest.mark.parametrize("text", [b"", b"{", b"\xff", b"[" * 100_000])
def test_a_list_of_shards_that_is_no_json_is_refused(tmp_path, text):
    (tmp_path / "_info.json").write_bytes(text)
    with pytest.raises(ValueError, match=r"_info\.json is no JSON"):
        open_data(tmp_path)


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


def both_splits(root, *names):
    """Folders of one image under many names in both splits, and other files by their ending."""
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "JPEG")
    for split in ("train", "val"):
        for name in names:
            path = root / split / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"text" if path.suffix in (".txt", ".mp4") else buffer.getvalue())
    return root


def both_tars(root, *names):
    """The same in train.tar and val.tar; a name that ends in a slash is a folder."""
    both_splits(root, *(name for name in names if name[-1] != "/"))
    for split in ("train", "val"):
        with tarfile.open(root / f"{split}.tar", "w") as archive:
            for name in names:
                if name[-1] == "/":
                    info = tarfile.TarInfo(name[:-1])
                    info.type = tarfile.DIRTYPE
                    archive.addfile(info)
                else:
                    archive.add(root / split / name, name)
        shutil.rmtree(root / split)
    return root


def classes_and_labels(dataset):
    labels = [dataset[index][1] for index in range(len(dataset))]
    return dataset.reader.class_to_idx, labels


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


@pytest.mark.parametrize("lead", ["./", "train/", "./a/set/train/"])
def test_folders_that_all_members_of_a_tar_are_in_do_not_count(tmp_path, lead):
    data = open_data(both_tars(tmp_path, *(f"{lead}{n}" for n in ("a/x/1.jpg", "b/x/2.jpg"))))
    assert classes_and_labels(data.train) == ({"a": 0, "b": 1}, [0, 1])


def test_a_tar_in_a_split_is_a_class_whatever_folders_are_in_it(tmp_path):
    both_splits(tmp_path / "from", "images/1.jpg")
    image = tmp_path / "from" / "train" / "images" / "1.jpg"
    for split in ("train", "val"):
        (tmp_path / split).mkdir()
        for name in ("n1", "n2"):
            tar_of(tmp_path / split / f"{name}.tar", [("images/1.jpg", image)])
    assert classes_and_labels(open_data(tmp_path).train) == ({"n1": 0, "n2": 1}, [0, 1])


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
    with pytest.raises(ValueError, match=r"training set has one class \(images\)"):
        open_data(root)
    data = open_data(root, labels=False)
    assert not data.labelled_val and data.num_classes is None and data.train[0][1] == -1


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
    assert not data.labelled_val and data.num_classes == 2


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


# Members of a shard; key -> label of the samples; what is told.
KEYS = [
    (["a.jpg", "a.cls=0", "c.v2.jpg", "c.v2.cls=1"], {"a.jpg": 0, "c.v2.jpg": 1}, None),
    (["i.1.jpg", "i.1.cls=0", "i.2.jpg", "i.2.cls=1"], {"i.1.jpg": 0, "i.2.jpg": 1}, None),
    (["c.jpg", "c.cls=0", "c.2.jpg", "c.2.cls=1"], {"c.jpg": 0, "c.2.jpg": 1}, None),
    (["x.y/G.V2.JPG", "x.y/G.V2.CLS=1"], {"x.y/G.V2.JPG": 1}, None),
    (["e.jpg", "e.cls=0", "e.seg.png"], {"e.jpg": 0}, "1 image beside its sample's own"),
    (["e.1.jpg", "e.1.seg.png", "e.1.cls=0"], {"e.1.jpg": 0}, "e.1.seg.png"),
    (["j.png", "j.jpg", "j.cls=1"], {"j.jpg": 1}, "j.png"),
    (["a.JPG", "a.jpg", "a.cls=0", "a.CLS=1"], {"a.JPG": 0}, "a.jpg"),
    (["a.jpg", "a.cls=0", "README"], {"a.jpg": 0}, "README"),
    (["a.jpg", "a.cls=0", "b.mp4"], {"a.jpg": 0}, "1 member of no image's sample"),
    (["a.jpg", "a.cls=0", "._a.jpg", ".x/b.jpg", "__MACOSX/c.jpg"], {"a.jpg": 0}, None),
    (["a.jpg", "a.cls=0", "a.txt", "a.json={}"], {"a.jpg": 0}, None),
]


def shard_of(path, members):
    """A shard of members "name=content"; images where there is no content."""
    image = io.BytesIO()
    Image.new("RGB", (8, 8)).save(image, "JPEG")
    parts = (member.partition("=") for member in members)
    return tar_of(
        path, [(n, c.encode() if is_text else image.getvalue()) for n, is_text, c in parts]
    )


@pytest.mark.parametrize("members, samples, told", KEYS)
def test_every_member_of_a_shard_belongs_to_a_sample_or_is_named(
    tmp_path, caplog, members, samples, told
):
    shard_of(tmp_path / "val-0.tar", members)
    data = open_data(tmp_path, need_train=False).val
    found = {data.filename(i).partition("val-0.tar:")[2]: data[i][1] for i in range(len(data))}
    assert found == samples
    assert len(caplog.records) == (told is not None)
    assert told is None or (told in caplog.text and "val-0.tar:" in caplog.text)


@pytest.mark.parametrize("members, samples, told", KEYS)
def test_a_stream_has_the_samples_of_the_listed_shard(tmp_path, caplog, members, samples, told):
    pytest.importorskip("webdataset")
    shard_of(tmp_path / "val-0.tar", members)
    splits = {"validation": {"filenames": ["val-0.tar"]}}
    (tmp_path / "_info.json").write_text(json.dumps({"splits": splits}))
    source = open_data(f"wds/pipe:cat {tmp_path}", need_train=False).val
    read = source.items(0, 1, None)
    keys = {name.partition("val-0.tar:")[2]: load()[1] for name, load in read}
    assert keys == {os.path.splitext(name)[0]: label for name, label in samples.items()}
    assert len(caplog.records) == (told is not None)
    assert told is None or (told in caplog.text and "val-0.tar" in caplog.text)


def test_a_member_that_is_there_twice_is_an_error_of_lists_and_a_fault_of_streams(tmp_path):
    pytest.importorskip("webdataset")
    shard_of(tmp_path / "val-0.tar", ["a.jpg", "a.cls=0", "a.jpg"])
    with pytest.raises(OSError, match=r"val-0\.tar has two members with the name a\.jpg"):
        open_data(tmp_path, need_train=False)
    splits = {"validation": {"filenames": ["val-0.tar"]}}
    (tmp_path / "_info.json").write_text(json.dumps({"splits": splits}))
    source = open_data(f"wds/pipe:cat {tmp_path}", need_train=False).val
    faults = [item for item in source.items(0, 1, None) if isinstance(item, Fault)]
    assert [fault.name.endswith("val-0.tar:a.jpg") for fault in faults] == [True]


@pytest.mark.parametrize("again", ["a/1.jpg", "./a/1.jpg", "b/../a/1.jpg"])
def test_a_member_that_is_there_twice_is_an_error_of_plain_tars(folder, tmp_path, again):
    image = images_of(folder, "val")[0]
    path = tar_of(tmp_path / "a.tar", [("a/1.jpg", image), ("b/1.jpg", image), (again, image)])
    with pytest.raises(OSError, match=r"a\.tar has two members with the name a/1\.jpg"):
        open_data(path, need_train=False)


@pytest.mark.parametrize("name", ["../b/1.jpg", "a/../../b/1.jpg"])
def test_a_member_that_leaves_its_tar_is_refused(folder, tmp_path, name):
    image = images_of(folder, "val")[0]
    path = tar_of(tmp_path / "a.tar", [("a/1.jpg", image), (name, image)])
    with pytest.raises(OSError, match=rf"a\.tar: {name} leaves the archive"):
        open_data(path, need_train=False)


def test_links_in_a_tar_are_the_files_they_name_or_told(tmp_path, caplog):
    both_splits(tmp_path, "a/1.jpg")
    with tarfile.open(tmp_path / "val.tar", "w") as archive:
        for name, target in (("b/2.jpg", "../a/1.jpg"), ("b/3.jpg", "nowhere.jpg")):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = tarfile.SYMTYPE, target
            archive.addfile(info)
        archive.add(tmp_path / "val" / "a" / "1.jpg", "a/1.jpg")
        pipe = tarfile.TarInfo("a/pipe.jpg")
        pipe.type = tarfile.FIFOTYPE
        archive.addfile(pipe)
    data = open_data(tmp_path / "val.tar", need_train=False).val
    assert classes_and_labels(data) == ({"a": 0, "b": 1}, [0, 1])
    assert "left out 2 pipes, devices or broken links" in caplog.text


LABELS = [
    (b"1000000000000", "holds the label 1000000000000, but labels lie below 1000000"),
    (b"1000000", "holds the label 1000000"),
    (b"1" + b"0" * 30, "holds the label 1"),
    (b"9" * 5000, "holds no label"),
    (b"1e12", "holds no label"),
    (b"0.9", "holds no label"),
]


@pytest.mark.parametrize("content, told", LABELS)
@pytest.mark.parametrize("target", [None, "kind"])
def test_a_label_that_cannot_be_is_refused_with_shard_and_member(tmp_path, content, told, target):
    described = b'{"kind": %s}' % content if target else content
    name = "a.json" if target else "a.cls"
    tar_of(tmp_path / "val-0.tar", [("a.jpg", b""), (name, described)])
    split = {"filenames": ["val-0.tar"], "alt_label": target}
    (tmp_path / "_info.json").write_text(json.dumps({"splits": {"val": split}}))
    if target and content == b"1e12":
        told = "holds the label 1000000000000"
    with pytest.raises(OSError, match=rf"val-0\.tar:{name} {told}"):
        open_data(tmp_path, need_train=False)


@pytest.mark.parametrize("value", ["true", "NaN", "Infinity", "null", "[]", "[" * 100_000])
def test_what_is_no_number_in_a_description_is_no_label(tmp_path, value):
    tar_of(tmp_path / "val-0.tar", [("a.jpg", b""), ("a.json", b'{"kind": %s}' % value.encode())])
    split = {"filenames": ["val-0.tar"], "alt_label": "kind"}
    (tmp_path / "_info.json").write_text(json.dumps({"splits": {"val": split}}))
    with pytest.raises(OSError, match=r"val-0\.tar:a\.json holds no label"):
        open_data(tmp_path, need_train=False)


OUTSIDE = ["../../x.tar", "/etc/x.tar", "//host/x.tar", "a/../../x.tar", "..", ".", "", "x\0.tar"]


@pytest.mark.parametrize("file", OUTSIDE)
def test_shards_outside_the_folder_of_their_list_are_refused(tmp_path, file):
    place = tmp_path / "x" / "y"
    place.mkdir(parents=True)
    tar_of(tmp_path / "x.tar", [("a.jpg", b""), ("a.cls", b"0")])
    splits = {"val": {"filenames": [file]}}
    (place / "_info.json").write_text(json.dumps({"splits": splits}))
    for data in (place, f"wds/{place}", f"wds/pipe:cat {place}"):
        with pytest.raises(ValueError, match=r"split val lists .*leaves the list's folder"):
            open_data(data, need_train=False)
    assert not list(tmp_path.rglob(".fastkd*"))


def test_a_shard_that_is_a_link_is_the_users_own(tmp_path):
    (tmp_path / "far").mkdir()
    shard_of(tmp_path / "far" / "x.tar", ["a.jpg", "a.cls=0"])
    (tmp_path / "near").mkdir()
    (tmp_path / "near" / "x.tar").symlink_to("../far/x.tar")
    splits = {"val": {"filenames": ["./x.tar"]}}
    (tmp_path / "near" / "_info.json").write_text(json.dumps({"splits": splits}))
    assert len(open_data(tmp_path / "near", need_train=False).val) == 1
    assert list((tmp_path / "near").glob(".fastkd*"))


@pytest.mark.parametrize("file", ["x.tar; touch y", "$(touch y).tar", "a b.tar", "x.tar|y", "'x"])
def test_names_that_a_shell_would_run_are_refused(tmp_path, file):
    pytest.importorskip("webdataset")
    splits = {"val": {"filenames": [file]}}
    (tmp_path / "_info.json").write_text(json.dumps({"splits": splits}))
    with pytest.raises(ValueError, match=r"lists .* no plain file name"):
        open_data(f"wds/pipe:cat {tmp_path}", need_train=False)


def test_pipes_for_archives_lists_and_listings_are_waited_for_by_nobody(folder, tmp_path, caplog):
    place = write_shards(folder, tmp_path / "shards")
    os.mkfifo(place / "made-train-9999.tar")
    os.mkfifo(place / "_info.json")
    assert len(open_data(place).train) == 9
    assert caplog.text.count("left out 1 pipe, device or broken link") == 1
    for path in place.glob(".fastkd*"):
        path.unlink()
        os.mkfifo(path)
    assert len(open_data(place).train) == 9
    splits = {"val": {"filenames": ["made-train-9999.tar"]}}
    (place / "_info.json").unlink()
    (place / "_info.json").write_text(json.dumps({"splits": splits}))
    with pytest.raises(OSError, match=r"no regular file: .*9999"):
        open_data(place, need_train=False)


@pytest.mark.parametrize("name", ["train", "train.tar", "_info.json"])
def test_pipes_in_the_place_of_splits_are_none(tmp_path, name):
    os.mkfifo(tmp_path / name)
    with pytest.raises(ValueError, match="has no folder train"):
        open_data(tmp_path)
    with pytest.raises(ValueError, match="neither a folder nor a tar"):
        open_data(tmp_path / name)


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


@pytest.mark.parametrize("text", [b"0.9", b"[0, 1]", b"true", b"-5", b"nan", b""])
def test_a_cls_that_is_no_whole_number_is_an_error_naming_it(tmp_path, text):
    tar_of(tmp_path / "val-0.tar", [("x.jpg", b""), ("x.cls", text)])
    with pytest.raises(OSError, match=r"val-0\.tar:x\.cls .*whole number"):
        open_data(tmp_path, need_train=False)


@pytest.mark.parametrize("value", [0.9, True, "3", [0, 1], None])
def test_a_field_of_a_json_that_is_no_whole_number_is_an_error_naming_it(tmp_path, value):
    content = json.dumps({"fine": value}).encode()
    tar_of(tmp_path / "val-0.tar", [("x.jpg", b""), ("x.json", content)])
    split = {"filenames": ["val-0.tar"], "num_samples": 1, "alt_label": "fine"}
    (tmp_path / "_info.json").write_text(json.dumps({"splits": {"validation": split}}))
    with pytest.raises(OSError, match=r"val-0\.tar:x\.json .*whole number"):
        open_data(tmp_path, need_train=False)


def test_shards_have_the_names_of_their_list(folder, tmp_path):
    shards = write_shards(folder, tmp_path / "shards")
    splits = {
        split: {"filenames": sorted(path.name for path in shards.glob(f"made-{split}-*"))}
        for split in ("train", "val")
    }
    (shards / "_info.json").write_text(json.dumps({"classes": CLASSES, "splits": splits}))
    data = open_data(shards)
    assert class_names(data.train) == class_names(data.val) == {0: "blue", 1: "green", 2: "red"}


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
