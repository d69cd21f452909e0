"""WebDataset shards on this machine: lists, samples and labels."""

import json
import os

import pytest

from fastkd.data.batches import Fault
from fastkd.data.classes import LabelError, class_names
from fastkd.data.open_data import open_data
from tests.harness.archives import CLASSES, images_of, shard_of, tar_of, write_shards


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
    assert ("hold 2 images, but their list states 5" in caplog.text) == told


def test_a_label_beyond_the_listed_classes_is_refused(folder, tmp_path):
    shards = listed_shards(folder, tmp_path / "shards", ["blue", "green"])
    with pytest.raises(ValueError, match=r"red/0\.jpg has the label 2, but its list has 2 classes"):
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
        ({"splits": {"train": {"filenames": []}}}, "split train must have a list of filenames"),
        ({"splits": {"val": {"filenames": ["a.tar", "./a.tar"]}}}, "split val lists a shard twice"),
        ({"splits": {"val": {"filenames": ["a.tar"]}}, "classes": 3}, "classes must be a list"),
        (
            {"splits": {"val": {"filenames": ["a.tar"], "num_samples": -1}}},
            "split val: num_samples",
        ),
        (
            {"splits": {"val": {"filenames": ["a.tar"], "num_samples": 10**40}}},
            "split val: num_samples",
        ),
        (
            {"splits": {"val": {"filenames": ["a.tar"], "alt_label": "a"}}},
            "split val: alt_label .*'a'",
        ),
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


def test_an_unreadable_image_in_a_shard_is_an_error_naming_it(tmp_path):
    tar_of(tmp_path / "val-0.tar", [("x.jpg", b"no image"), ("x.cls", b"0")])
    data = open_data(tmp_path, need_train=False)
    with pytest.raises(OSError, match=r"cannot read .*val-0\.tar:x\.jpg \(sample 0\)"):
        data.val[0]


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


LABELS = [
    (b"1000000000000", "holds the label 1000000000000, but labels lie below 1000000"),
    (b"1000000", "holds the label 1000000"),
    (b"1" + b"0" * 30, "holds the label 1"),
    (b"9" * 5000, "holds no label"),
    (b"1e12", "holds no label"),
    (b"0.9", "holds no label"),
]


@pytest.mark.parametrize("content, told", LABELS)
def test_a_label_that_cannot_be_is_refused_with_shard_and_member(tmp_path, content, told):
    tar_of(tmp_path / "val-0.tar", [("a.jpg", b""), ("a.cls", content)])
    split = {"filenames": ["val-0.tar"], "alt_label": ""}
    (tmp_path / "_info.json").write_text(json.dumps({"splits": {"val": split}}))
    with pytest.raises(LabelError, match=rf"val-0\.tar:a\.cls {told}"):
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


def test_shards_without_labels(folder, tmp_path):
    shards = write_shards(folder, tmp_path / "shards", labels=False)
    with pytest.raises(ValueError, match=r"9 images have no label, such as .*blue/0\.jpg"):
        open_data(f"wds/{shards}")
    data = open_data(f"wds/{shards}", labels=False)
    assert data.train[0][1] == -1 and not data.labeled_val


def test_a_label_that_is_no_number_is_an_error_naming_it(tmp_path):
    tar_of(tmp_path / "val-0.tar", [("x.jpg", b""), ("x.cls", b"cat")])
    with pytest.raises(LabelError, match=r"val-0\.tar:x\.cls holds no label"):
        open_data(tmp_path, need_train=False)


@pytest.mark.parametrize("text", [b"0.9", b"[0, 1]", b"true", b"-5", b"nan", b""])
def test_a_cls_that_is_no_whole_number_is_an_error_naming_it(tmp_path, text):
    tar_of(tmp_path / "val-0.tar", [("x.jpg", b""), ("x.cls", text)])
    with pytest.raises(LabelError, match=r"val-0\.tar:x\.cls .*whole number"):
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
