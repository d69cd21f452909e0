"""Shards: what is written is what was there, once, smaller, in mixed order, and can go on."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import ExifTags, Image

from fastkd.cli import main
from fastkd.data import shard_writer
from fastkd.data.open_data import open_data
from fastkd.data.shard_writer import convert, shard
from fastkd.utils.lock import holding
from tests.harness.tiny import image_folder

webdataset = pytest.importorskip("webdataset")

SMALL = {"samples_per_shard": 5, "workers": 1, "quiet": True}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return image_folder(tmp_path_factory.mktemp("source"), train=6, val=2)


def contents(dataset):
    samples = [dataset[index] for index in range(len(dataset))]
    return sorted((label, image.size, hash(image.tobytes())) for image, label in samples)


def files_of(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.mark.parametrize("workers", [1, 3])
def test_copied_images_and_labels_come_back_as_they_were(source, tmp_path, workers):
    report = shard(source, tmp_path, **SMALL | {"short_side": None, "workers": workers})
    opened, expected = open_data(tmp_path), open_data(source)
    for split in ("train", "val"):
        assert contents(getattr(opened, split)) == contents(getattr(expected, split))
    assert opened.num_classes == report.classes == 3
    assert report.samples == {"train": 18, "validation": 6}
    assert report.shards == {"train": 4, "validation": 2}


def test_the_number_of_workers_does_not_change_the_bytes(source, tmp_path):
    folders = [shard(source, tmp_path / str(n), **SMALL | {"workers": n}).folder for n in (1, 3)]
    assert files_of(folders[0]) == files_of(folders[1])


def test_large_images_have_the_short_side_asked_for(source, tmp_path):
    shard(source, tmp_path, short_side=20, **SMALL)
    train = open_data(tmp_path).train
    assert {train[index][0].size for index in range(len(train))} == {(24, 20)}  # of 48 x 40


def test_small_images_are_copied_byte_for_byte(source, tmp_path):
    shard(source, tmp_path, short_side=40, **SMALL)
    reader = open_data(tmp_path).val.reader
    originals = {path.read_bytes() for path in (source / "val").rglob("*.jpg")}
    assert {reader[index][0].read() for index in range(len(reader))} == originals


def test_shards_mix_classes(source, tmp_path):
    shard(source, tmp_path, **SMALL)
    labels = open_data(tmp_path).train.reader.targets
    assert all(len(set(labels[start : start + 5])) > 1 for start in range(0, 15, 5))


def test_a_sample_tells_which_file_it_was(source, tmp_path):
    shard(source, tmp_path, **SMALL)
    files = open_data(source).train.reader.samples
    with tarfile.open(tmp_path / "train-000000.tar") as archive:
        told = {
            int(Path(name).stem): json.load(archive.extractfile(name))["filename"]
            for name in archive.getnames()
            if name.endswith(".json")
        }
    assert len(told) == 5
    assert all(str(source / file) == files[number][0] for number, file in told.items())


def test_shards_are_closed_at_the_size_asked_for(source, tmp_path):
    report = shard(source, tmp_path, shard_size=0.02, workers=1, quiet=True)
    sizes = [path.stat().st_size for path in tmp_path.glob("train-*.tar")]
    assert report.shards["train"] == len(sizes) > 2
    assert all(20_000 <= size < 20_000 + 10_240 + 5_000 for size in sorted(sizes)[1:])


def test_another_seed_is_another_order(source, tmp_path):
    first, second = (
        shard(source, tmp_path / str(seed), seed=seed, **SMALL).folder for seed in (0, 1)
    )
    labels = [open_data(folder).train.reader.targets.tolist() for folder in (first, second)]
    assert labels[0] != labels[1] and sorted(labels[0]) == sorted(labels[1])


class Stopped(Exception):
    pass


def stop():
    raise Stopped


def before_shard(patch, written, action):
    """Do something before the shard that follows as many."""
    whole, count = webdataset.TarWriter, 0

    def begin(*arguments, **options):
        nonlocal count
        if count == written:
            action()
        count += 1
        return whole(*arguments, **options)

    patch.setattr(webdataset, "TarWriter", begin)


# (finished shards, images that are left): of 18 + 6 images in 4 + 2 shards
@pytest.mark.parametrize("written, left", [(0, 24), (1, 19), (4, 6), (5, 1)])
def test_interrupted_work_goes_on_to_the_same_bytes(source, tmp_path, monkeypatch, written, left):
    shard(source, tmp_path / "unbroken", **SMALL)
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        before_shard(patch, written, stop)
        shard(source, tmp_path / "broken", **SMALL)
    with pytest.raises(ValueError, match="broken is unfinished; run fastkd shard again"):
        open_data(tmp_path / "broken")
    assert not (tmp_path / "broken" / "_info.json").exists()
    report = shard(source, tmp_path / "broken", **SMALL)
    assert files_of(tmp_path / "broken") == files_of(tmp_path / "unbroken")
    assert report.converted == left


def test_a_full_disk_stops_the_work_which_then_goes_on(source, tmp_path, monkeypatch):
    def full():
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        before_shard(patch, 2, full)
        shard(source, tmp_path / "shards", **SMALL)
    tars = [path.name for path in (tmp_path / "shards").iterdir() if not path.match(".fastkd*")]
    assert sorted(tars) == ["train-000000.tar", "train-000001.tar"]
    shard(source, tmp_path / "shards", **SMALL)
    shard(source, tmp_path / "unbroken", **SMALL)
    assert files_of(tmp_path / "shards") == files_of(tmp_path / "unbroken")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_killed_work_goes_on_and_leaves_no_process_behind(source, tmp_path, number):
    folder = tmp_path / "shards"
    slow = (
        "import signal, sys, time, webdataset; from fastkd.data.shard_writer import shard\n"
        # What starts the tests may have it ignored.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "whole = webdataset.TarWriter.write\n"
        "def write(*a): time.sleep(0.05); whole(*a)\n"
        "webdataset.TarWriter.write = write\n"
        "shard(sys.argv[1], sys.argv[2], samples_per_shard=5, workers=2, quiet=True)"
    )
    process = subprocess.Popen([sys.executable, "-c", slow, source, folder])
    deadline = time.monotonic() + 60
    while not (folder / "train-000001.tar").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    children = _children(process.pid)
    process.send_signal(number)
    process.wait()
    assert children and not (folder / "_info.json").exists()
    shard(source, folder, **SMALL)
    shard(source, tmp_path / "unbroken", **SMALL)
    assert files_of(folder) == files_of(tmp_path / "unbroken")
    deadline = time.monotonic() + 10
    while any(map(_is_alive, children)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(_is_alive, children))


def _children(pid):
    tasks = f"/proc/{pid}/task"
    if not os.path.isdir(tasks):
        pytest.skip("needs /proc")
    found = (Path(tasks, task, "children").read_text() for task in os.listdir(tasks))
    return [int(child) for line in found for child in line.split()]


def _is_alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_finished_work_is_verified_and_not_done_again(source, tmp_path, monkeypatch):
    shard(source, tmp_path, **SMALL)
    before = files_of(tmp_path)
    monkeypatch.setattr(webdataset, "TarWriter", None)  # is not called
    assert shard(source, tmp_path, **SMALL).converted == 0
    assert files_of(tmp_path) == before


def test_a_shard_that_was_lost_is_written_again(source, tmp_path):
    shard(source, tmp_path, **SMALL)
    before = files_of(tmp_path)
    (tmp_path / "train-000002.tar").unlink()
    shard(source, tmp_path, **SMALL)
    assert files_of(tmp_path) == before


def test_a_shard_that_is_not_what_was_written_is_told(source, tmp_path):
    shard(source, tmp_path, **SMALL)
    first, second = tmp_path / "train-000000.tar", tmp_path / "train-000001.tar"
    whole = second.read_bytes()
    second.write_bytes(first.read_bytes())
    with pytest.raises(RuntimeError, match=r"train-000001\.tar does not hold what was written"):
        shard(source, tmp_path, **SMALL)
    second.write_bytes(whole[:-20_000])
    with pytest.raises(OSError, match=r"train-000001\.tar is no whole, uncompressed tar"):
        shard(source, tmp_path, **SMALL)


@pytest.mark.parametrize(
    "change, told",
    [
        ({"short_side": 20}, "short_side 256, not 20"),
        ({"quality": 50}, "quality 90, not 50"),
        ({"samples_per_shard": 6}, "samples_per_shard 5, not 6"),
        ({"seed": 1}, "seed 0, not 1"),
    ],
)
def test_shards_of_other_options_are_refused(source, tmp_path, change, told):
    shard(source, tmp_path, **SMALL)
    with pytest.raises(ValueError, match=f"shards of another run: {told}"):
        shard(source, tmp_path, **SMALL | change)


def test_shards_of_other_images_are_refused(source, tmp_path):
    shard(source, tmp_path / "shards", **SMALL)
    other = image_folder(tmp_path / "other", train=6, val=3)
    with pytest.raises(ValueError, match="another run: source "):
        shard(other, tmp_path / "shards", **SMALL)


@pytest.mark.parametrize("name", ["train-000000.tar", "notes.txt", "_info.json"])
def test_a_folder_with_something_else_is_refused_and_left_alone(source, tmp_path, name):
    (tmp_path / name).write_text("{}")
    with pytest.raises(ValueError, match="holds something other"):
        shard(source, tmp_path, **SMALL)
    assert files_of(tmp_path) == {name: b"{}"}


def test_unreadable_images_are_listed_and_in_no_shard(tmp_path):
    source = image_folder(tmp_path / "source", train=4, val=2)
    torn = source / "train" / "green" / "2.jpg"
    torn.write_bytes(torn.read_bytes()[:-300])  # whose header is whole
    (source / "val" / "red" / "0.jpg").write_text("no image")
    report = shard(source, tmp_path / "shards", **SMALL)
    lines = (tmp_path / "shards" / "unreadable.txt").read_text().splitlines()
    assert [line.split("\t")[0] for line in lines] == ["train/green/2.jpg", "val/red/0.jpg"]
    assert all(len(line.split("\t")[1]) > 5 for line in lines)
    assert report.samples == {"train": 11, "validation": 5} and len(report.unreadable) == 2
    assert "2 unreadable, see unreadable.txt" in report.summary()
    assert len(open_data(tmp_path / "shards").train) == 11


def test_a_link_to_nothing_is_listed_and_in_no_shard(tmp_path):
    source = image_folder(tmp_path / "source", train=4, val=2)
    dead = source / "train" / "green" / "9.jpg"
    dead.symlink_to(tmp_path / "missing.jpg")
    report = shard(source, tmp_path / "shards", **SMALL)
    assert report.samples == {"train": 12, "validation": 6}
    ((file, reason),) = report.unreadable
    assert file == "train/green/9.jpg" and "missing" in reason


@pytest.mark.parametrize("linked", [False, True])
def test_a_source_that_goes_away_stops_the_work_which_then_goes_on(
    source, tmp_path, monkeypatch, linked
):
    images = folder = shutil.copytree(source, tmp_path / "images")
    if linked:
        folder = shutil.copytree(images, tmp_path / "links", copy_function=os.symlink)
    with monkeypatch.context() as patch:
        before_shard(patch, 1, lambda: images.rename(tmp_path / "unmounted"))
        # One process and chunks of one: the images of the first shard are read, the last are not.
        patch.setattr(shard_writer, "CHUNK", 1)
        with pytest.raises(OSError, match=r"No such file .*\.jpg"):
            shard(folder, tmp_path / "shards", **SMALL)
    (tmp_path / "unmounted").rename(images)
    shard(folder, tmp_path / "shards", **SMALL)
    shard(source, tmp_path / "unbroken", **SMALL)
    assert files_of(tmp_path / "shards") == files_of(tmp_path / "unbroken")


def broken_images(folder, count, train=8, val=2):
    """A source of which the first images of training are broken."""
    source = image_folder(folder, train=train, val=val, size=12)
    for path in sorted((source / "train").rglob("*.jpg"))[:count]:
        path.write_text("no image")
    return source


def test_too_many_unreadable_images_stop_the_work(tmp_path):
    source = broken_images(tmp_path / "source", 3)
    with pytest.raises(
        OSError, match=r"3 of 30 images .* more than max_unreadable \(2\); the last"
    ):
        shard(source, tmp_path / "shards", max_unreadable=2, **SMALL)
    assert len(shard(source, tmp_path / "shards", max_unreadable=3, **SMALL).unreadable) == 3


def test_more_than_a_few_unreadable_images_of_a_small_source_stop_the_work(tmp_path):
    source = broken_images(tmp_path / "source", 21)
    with pytest.raises(OSError, match=r"21 of 30 images .* more than max_unreadable \(20\)"):
        shard(source, tmp_path / "shards", **SMALL)


def test_a_split_of_which_nothing_can_be_read_is_refused(tmp_path):
    source = broken_images(tmp_path / "source", 12, train=4)
    with pytest.raises(ValueError, match=r"no image of train can be read; see .*unreadable\.txt"):
        shard(source, tmp_path / "shards", **SMALL)


def test_unreadable_images_at_the_end_make_no_shard(tmp_path):
    source = image_folder(tmp_path / "source", train=2, val=1, size=12)
    options = SMALL | {"samples_per_shard": 2}
    shard(source, tmp_path / "whole", **options)
    with tarfile.open(tmp_path / "whole" / "train-000002.tar") as archive:
        last = [json.load(archive.extractfile(n)) for n in archive.getnames() if "json" in n]
    for told in last:
        path = source / told["filename"]
        path.write_bytes(bytes(path.stat().st_size))
    report = shard(source, tmp_path / "shards", **options)
    assert report.shards["train"] == 2 and report.samples["train"] == 4
    assert len(report.unreadable) == 2
    assert shard(source, tmp_path / "shards", **options).converted == 0


def test_a_rerun_without_unreadable_images_takes_their_list_away(tmp_path):
    source = broken_images(tmp_path / "source", 1)
    folder = shard(source, tmp_path / "shards", **SMALL).folder
    info = json.loads((folder / "_info.json").read_text())
    broken = sorted((source / "train").rglob("*.jpg"))[0]
    whole = sorted((source / "train").rglob("*.jpg"))[1].read_bytes()
    broken.write_bytes(whole)
    asked = shard(source, tmp_path / "other", **SMALL).folder
    identity = json.loads((asked / "_info.json").read_text())["fastkd"]["identity"]
    info["fastkd"]["identity"] = identity  # as if the image had been as long when it was broken
    (folder / "_info.json").write_text(json.dumps(info))
    for path in folder.glob("*.tar"):
        path.unlink()
    shard(source, folder, **SMALL)
    assert not (folder / "unreadable.txt").exists()


def test_work_killed_in_its_first_write_goes_on(source, tmp_path):
    (tmp_path / "..fastkd-shard.json.123.tmp").write_text('{"iden')
    assert shard(source, tmp_path, **SMALL).samples["train"] == 18
    assert not list(tmp_path.glob("*.tmp"))


def test_two_runs_on_one_folder_are_refused(source, tmp_path):
    folder = tmp_path / "shards"
    with (
        holding(folder),
        pytest.raises(RuntimeError, match=r"shard: destination: another run .*shards"),
    ):
        shard(source, folder, **SMALL)
    assert shard(source, folder, **SMALL).samples["train"] == 18


def test_names_that_are_no_text_are_kept(tmp_path):
    source = image_folder(tmp_path / "source", train=1, val=1, size=12)
    folder = os.fsencode(source / "train" / "blue")
    try:
        os.rename(folder + b"/0.jpg", folder + b"/caf\xe9.jpg")
    except OSError:
        pytest.skip("a file system of text")
    (source / "val" / "red" / "0.jpg").write_text("no image")
    os.rename(source / "val" / "red" / "0.jpg", os.fsencode(source / "val") + b"/red/\xff.jpg")
    report = shard(source, tmp_path / "shards", **SMALL)
    assert report.samples == {"train": 3, "validation": 2}
    assert (tmp_path / "shards" / "unreadable.txt").read_bytes().startswith(b"val/red/\xff.jpg\t")


def test_pipes_are_not_waited_for_and_other_files_are_told(tmp_path, caplog):
    source = image_folder(tmp_path / "source", train=1, val=1, size=12)
    os.mkfifo(source / "train" / "blue" / "pipe.jpg")
    (source / "val" / "blue" / "notes.txt").write_text("no image")
    Image.new("RGB", (9, 9)).save(source / "val" / "red" / "1.bmp")
    (source / "val" / "red" / "again").symlink_to(".")
    assert shard(source, tmp_path / "shards", **SMALL).samples == {"train": 3, "validation": 4}
    told = sorted(record.getMessage().partition(": left out ")[2] for record in caplog.records)
    assert told[0].startswith("1 file that is no image: 1 .txt; 1 link to a folder that it is in")
    assert told[1].startswith("1 pipe, device or broken link: ") and len(told) == 2
    with pytest.raises(OSError, match="no regular file"):
        convert(str(source / "train" / "blue" / "pipe.jpg"), 24, 95)


def test_a_class_folder_without_images_is_refused(tmp_path):
    source = image_folder(tmp_path / "source", train=1, val=1, size=12)
    (source / "val" / "amber").mkdir()
    (source / "train" / "violet" / "empty").mkdir(parents=True)
    with pytest.raises(ValueError, match="has class folders without images: violet"):
        shard(source, tmp_path / "shards", **SMALL)
    shutil.rmtree(source / "train" / "violet")
    assert shard(source, tmp_path / "shards", **SMALL).classes == 3


@pytest.mark.parametrize(
    "kept", [[], "text", {"identity": "a"}, {"identity": {}, "unreadable": 3}, {"identity": {}}]
)
def test_what_another_program_calls_fastkd_is_no_work_of_ours(source, tmp_path, kept):
    (tmp_path / "_info.json").write_text(json.dumps({"fastkd": kept}))
    with pytest.raises(ValueError, match="holds something other than shards"):
        shard(source, tmp_path, **SMALL)


def test_a_folder_of_classes_is_one_split(source, tmp_path):
    report = shard(source / "val", tmp_path / "val", **SMALL)
    assert report.samples == {"validation": 6}
    assert shard(source / "train", tmp_path / "train", **SMALL).samples == {"train": 18}
    assert len(open_data(tmp_path / "val", need_train=False).val) == 6


def test_images_without_classes_have_no_label(tmp_path):
    for name in ("a.jpg", "b.jpg"):
        Image.new("RGB", (9, 9)).save(tmp_path / name)
    report = shard(tmp_path, tmp_path.parent / f"{tmp_path.name}-shards", **SMALL)
    assert report.classes == 0 and "unlabeled" in report.summary()
    data = open_data(f"wds/{report.folder}", need_train=False, labels=False)
    assert data.val[0][1] == -1


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK", "1", "LA"])
def test_images_of_every_mode_are_resized_as_a_trainer_sees_them(tmp_path, mode):
    image = Image.effect_noise((64, 48), 60).convert("RGB")
    image = image.convert(mode)
    path = tmp_path / ("a.jpg" if mode == "CMYK" else "a.png")
    image.save(path, quality=95)
    made = convert(str(path), 24, 95)
    (tmp_path / "made.jpg").write_bytes(made["jpg"])
    with Image.open(tmp_path / "made.jpg") as result, Image.open(path) as original:
        assert result.mode == ("L" if mode == "L" else "RGB") and result.size == (32, 24)
        expected = original.convert("RGB").resize((32, 24), Image.Resampling.BICUBIC)
        difference = np.asarray(result.convert("RGB"), float) - np.asarray(expected, float)
        assert abs(difference).mean() < 6


def test_deep_grayscale_is_no_white_jpeg(tmp_path):
    Image.new("I;16", (64, 48), 30000).save(tmp_path / "a.png")
    assert "more than 8 bits" in convert(str(tmp_path / "a.png"), 24, 95)


def test_the_orientation_tag_is_kept_and_nothing_else(tmp_path):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation], exif[ExifTags.Base.Make] = 6, "a camera"
    Image.new("RGB", (60, 40)).save(tmp_path / "a.jpg", exif=exif)
    made = convert(str(tmp_path / "a.jpg"), 20, 90)
    (tmp_path / "made.jpg").write_bytes(made["jpg"])
    with Image.open(tmp_path / "made.jpg") as result:
        assert result.size == (30, 20)
        assert dict(result.getexif()) == {ExifTags.Base.Orientation: 6}


def test_a_png_that_is_called_jpg_is_stored_as_png(tmp_path):
    Image.new("RGB", (9, 9)).save(tmp_path / "a.jpg", "PNG")
    assert convert(str(tmp_path / "a.jpg"), None, 90) == {"png": (tmp_path / "a.jpg").read_bytes()}


def test_a_format_that_readers_of_shards_do_not_know_is_stored_as_jpeg(tmp_path):
    Image.new("RGB", (9, 9)).save(tmp_path / "a.jpg", "BMP")
    assert convert(str(tmp_path / "a.jpg"), None, 90)["jpg"].startswith(b"\xff\xd8")


def _die(*_, **__):
    os._exit(9)


def test_the_death_of_a_process_is_told(source, tmp_path, monkeypatch):
    with (
        monkeypatch.context() as patch,
        pytest.raises(RuntimeError, match="process pool was terminated abruptly"),
    ):
        patch.setattr(shard_writer, "convert", _die)
        shard(source, tmp_path, **SMALL)
    assert shard(source, tmp_path, **SMALL).samples["train"] == 18


def test_a_missing_webdataset_is_told_before_any_work(source, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "webdataset", None)
    with pytest.raises(ImportError, match=r"webdataset.*: pip install webdataset"):
        shard(source, tmp_path / "new", **SMALL)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    "change, told",
    [
        ({"short_side": 0}, "short_side must be at least 1, got 0"),
        ({"quality": 96}, "quality must be 1 to 95, got 96"),
        ({"samples_per_shard": 0}, "samples_per_shard must be at least 1"),
        ({"samples_per_shard": None, "shard_size": 0}, r"shard_size must be .*1e-06.*got 0"),
        ({"workers": 0}, "workers must be 1 to 1024, got 0"),
        ({"seed": -1}, "seed must be at least 0"),
        ({"max_unreadable": -1}, "max_unreadable must be at least 0"),
    ],
)
def test_options_out_of_range_are_refused_before_anything_is_written(
    source, tmp_path, change, told
):
    with pytest.raises(ValueError, match=told):
        shard(source, tmp_path / "new", **SMALL | change)
    assert not (tmp_path / "new").exists()


def test_timms_reader_reads_the_shards(source, tmp_path):
    from timm.data import create_dataset

    shard(source, tmp_path, short_side=None, **SMALL)
    for split, own in (("train", "train"), ("validation", "val")):
        dataset = create_dataset("wds/made", root=str(tmp_path), split=split)
        expected = open_data(source)
        samples = sorted((label, image.size, hash(image.tobytes())) for image, label in dataset)
        assert samples == contents(getattr(expected, own))


def test_the_command_writes_shards_and_says_how_many(source, tmp_path, capsys):
    arguments = [str(source), str(tmp_path / "shards"), "--samples-per-shard", "5", "--quiet"]
    assert main(["shard", *arguments, "--workers", "1", "--short-side", "none"]) == 0
    assert "24 images of 3 classes in 6 shards" in capsys.readouterr().out


def test_the_command_takes_how_many_images_may_be_broken(tmp_path, capsys):
    source = broken_images(tmp_path / "source", 1)
    arguments = ["shard", str(source), str(tmp_path / "shards"), "--workers", "1", "--quiet"]
    assert main([*arguments, "--max-unreadable", "0"]) != 0
    assert "more than max_unreadable (0)" in capsys.readouterr().err
    assert main(arguments) == 0
    assert "1 unreadable" in capsys.readouterr().out


def test_the_command_refuses_a_missing_source_in_one_line(tmp_path, capsys):
    assert main(["shard", str(tmp_path / "nowhere"), str(tmp_path / "shards")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("fastkd shard: error: source: no folder") and error.count("\n") == 1
