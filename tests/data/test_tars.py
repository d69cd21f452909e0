"""Plain tars: their members, classes and the index that is kept beside them."""

import io
import json
import os
import pickle
import tarfile

import pytest
from timm.data.readers.img_extensions import add_img_extensions, del_img_extensions

from fastkd.data import datasets
from fastkd.data.datasets import TarImages
from fastkd.data.open_data import open_data
from fastkd.data.tars import list_shard
from tests.harness.archives import (
    both_splits,
    both_tars,
    classes_and_labels,
    contents,
    images_of,
    one_tar_a_class,
    one_tar_a_split,
    tar_of,
    write_shards,
)


def test_evaluation_opens_one_tar(folder, tmp_path):
    tars = one_tar_a_split(folder, tmp_path / "tars")
    assert len(open_data(tars / "val.tar", need_train=False).val) == 6
    with pytest.raises(ValueError, match=r"is one tar; give the folder"):
        open_data(tars / "val.tar")


def test_headers_are_listed_once(folder, tmp_path, monkeypatch):
    shards = write_shards(folder, tmp_path / "shards")
    expected = contents(open_data(shards).train)
    monkeypatch.setattr(datasets, "list_shard", None)  # is not called
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
        list_shard(tmp_path / "a.tar")


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

    monkeypatch.setattr(datasets, "replacing", refuse)
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
        list_shard(path)


def test_tars_that_were_joined_are_refused(folder, tmp_path):
    path = tar_of(tmp_path / "joined.tar", [("a/0.jpg", images_of(folder, "train")[0])])
    path.write_bytes(path.read_bytes() * 2)
    with pytest.raises(OSError, match="has data behind its end"):
        list_shard(path)


def test_a_compressed_tar_is_refused(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w:gz") as archive:
        archive.addfile(tarfile.TarInfo("a.jpg"), io.BytesIO())
    with pytest.raises(OSError, match=r"a\.tar is no whole, uncompressed tar"):
        list_shard(tmp_path / "a.tar")


def test_members_lie_where_the_standard_library_finds_them(tmp_path):
    long = "directory/" * 15 + "name-that-takes-a-header-of-its-own.jpg"
    files = [(long, b"first"), ("b.jpg", b""), ("c.jpg", b"x" * 513)]
    path = tar_of(tmp_path / "a.tar", files)
    content = path.read_bytes()
    assert [
        (member.name, content[member.offset : member.offset + member.size])
        for member in list_shard(path).members
    ] == files


def test_a_reader_of_tars_travels_to_other_processes(folder, tmp_path):
    dataset = open_data(write_shards(folder, tmp_path / "shards")).train
    assert contents(pickle.loads(pickle.dumps(dataset))) == contents(dataset)


def test_labels_are_renumbered_as_those_of_training(folder, tmp_path):
    tars = one_tar_a_split(folder, tmp_path / "tars")
    reader = TarImages([tars / "val.tar"], "tar")
    reader.renumber({0: 7, 1: 3, 2: 5}, {"blue": 7, "green": 3, "red": 5})
    assert sorted(set(reader.targets.tolist())) == [3, 5, 7]


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
