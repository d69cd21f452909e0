"""Streams: the same for the same position, of fixed length, exact to continue, each sample once."""

import io
import logging
import os
import random
import re
import shutil
import signal
import tarfile
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch
from PIL import Image

from fastkd.checkpoint import CheckpointError
from fastkd.config import Recipe
from fastkd.data import streaming
from fastkd.data.classes import class_names
from fastkd.data.datasets import DataPair
from fastkd.data.loader import DEATHS, describe_worker_death, eval_loader, train_loader
from fastkd.data.open_data import open_data
from fastkd.data.shard_writer import shard
from fastkd.data.streaming import StreamSource
from fastkd.data.transforms import InputSpec
from fastkd.training import load_checkpoint, train
from fastkd.utils.distributed import World
from tests.harness.tiny import FAST, image_folder, vit

CPU = torch.device("cpu")
SPEC = InputSpec((3, 16, 16), (0.5, 0.5, 0.5), (0.2, 0.2, 0.2))
RECIPE = Recipe(batch_size=8, eval_batch_size=4, workers=0, seed=3)

pytest.importorskip("webdataset")


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """36 images of training in 9 shards, 12 of evaluation in 3."""
    folder = tmp_path_factory.mktemp("streams")
    source = image_folder(folder / "images", size=24)
    return shard(source, folder / "shards", samples_per_shard=4, workers=1, quiet=True).folder


@pytest.fixture
def data(shards):
    return open_data(f"wds/pipe:cat {shards}")


def epoch(data, recipe=RECIPE, position=(0, 0), rank=0, world_size=1):
    loader = train_loader(data, recipe, SPEC, World(CPU, rank, world_size))
    loader.dataset.set_position(*position)
    return list(loader)


def same(left, right):
    return len(left) == len(right) and all(
        torch.equal(a.images, b.images)
        and torch.equal(a.labels, b.labels)
        and torch.equal(a.samples, b.samples)
        for a, b in zip(left, right)
    )


def test_a_stream_says_how_long_it_is_and_how_many_classes_it_has(data):
    assert (len(data.train), len(data.val), data.num_classes) == (36, 12, 3)
    assert data.streams and data.labeled_val


def test_an_epoch_has_whole_updates_only(data):
    batches = epoch(data)
    assert [batch.images.shape for batch in batches] == [(8, 3, 16, 16)] * 4
    assert torch.cat([batch.samples for batch in batches]).tolist() == list(range(32))
    assert set(torch.cat([batch.labels for batch in batches]).tolist()) == {0, 1, 2}


@pytest.mark.parametrize("workers", [0, 2])
def test_a_position_gives_the_same_batches_whatever_was_read_before(data, workers):
    recipe = RECIPE.override(workers=workers)
    loader = train_loader(data, recipe, SPEC)
    read = []
    for position in ((0, 0), (1, 0), (0, 0)):
        loader.dataset.set_position(*position)
        read.append(list(loader))
    assert same(read[0], read[2]) and not same(read[0], read[1])
    assert same(read[1], epoch(data, recipe, (1, 0)))


@pytest.mark.parametrize("update", [1, 2, 3])
@pytest.mark.parametrize("workers, accumulation", [(0, 1), (2, 1), (3, 2)])
def test_a_resumed_stream_is_the_unbroken_one(data, workers, accumulation, update):
    recipe = RECIPE.override(workers=workers, accumulation=accumulation)
    unbroken = epoch(data, recipe, (1, 0))
    assert len(unbroken) == 4 * accumulation
    assert same(epoch(data, recipe, (1, update)), unbroken[update * accumulation :])


def test_another_seed_is_another_stream(data):
    assert not same(epoch(data), epoch(data, RECIPE.override(seed=4)))


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_every_rank_makes_as_many_updates(data, world_size):
    for rank in range(world_size):
        batches = epoch(data, rank=rank, world_size=world_size)
        assert [len(batch.images) for batch in batches] == [8 // world_size] * 4


def test_ranks_read_different_samples(data):
    recipe = RECIPE.override(augment="none", train_samples=32)
    first, second = (epoch(data, recipe, rank=rank, world_size=2) for rank in (0, 1))
    read = [
        {i.numpy().tobytes() for batch in part for i in batch.images} for part in (first, second)
    ]
    assert all(len(images) == 16 for images in read)
    assert not read[0] & read[1]


def test_an_epoch_is_as_long_as_the_recipe_says(data):
    assert len(epoch(data, RECIPE.override(train_samples=20))) == 2
    assert len(epoch(data, RECIPE.override(train_samples=80))) == 10


def test_an_epoch_shorter_than_an_update_is_refused(data):
    with pytest.raises(ValueError, match=r"64 images per update, but an epoch of .* has only 36"):
        epoch(data, RECIPE.override(batch_size=64))


def test_more_processes_than_shards_are_told_which_option_to_lower(data):
    recipe = RECIPE.override(batch_size=2, workers=10)
    with pytest.raises(ValueError, match=r"process 10 of 10 on rank 0 .* got no samples .*workers"):
        epoch(data, recipe)


@pytest.mark.parametrize(
    "workers, world_size, told",
    [
        (0, 2, "2 processes share the 9 shards of wds/pipe:cat .*at least 8 shards for each"),
        (2, 2, "4 processes share the 9 shards"),
        (3, 3, None),  # a shard for each
        (0, 1, None),
    ],
)
def test_an_epoch_that_is_far_from_a_pass_is_told(data, caplog, workers, world_size, told):
    with caplog.at_level(logging.WARNING, "fastkd"):
        for rank in range(world_size):
            recipe = RECIPE.override(workers=workers, batch_size=4 * world_size)
            train_loader(data, recipe, SPEC, World(CPU, rank, world_size))
    messages = [record.getMessage() for record in caplog.records if record.name == "fastkd"]
    assert len(messages) == (told is not None)
    assert told is None or re.search(told, messages[0])


def rewritten(shards, folder, edit, pattern):
    """A copy of the shards with other members in some: ``edit`` takes (number, name, content)."""
    copy = shutil.copytree(shards, folder)
    for path in sorted(copy.glob(pattern)):
        with tarfile.open(path) as archive:
            members = [(info.name, archive.extractfile(info).read()) for info in archive]
        with tarfile.open(path, "w") as archive:
            for number, (name, content) in enumerate(members):
                content = edit(number, name, content)
                if content is not None:
                    info = tarfile.TarInfo(name)
                    info.size = len(content)
                    archive.addfile(info, io.BytesIO(content))
    return copy


def first_broken(number, name, content):
    return b"no image" if number == 1 else content  # of .cls, .jpg and .json


@pytest.mark.parametrize("workers", [0, 2])
def test_images_that_a_stream_cannot_read_are_told(shards, tmp_path, workers):
    copy = rewritten(shards, tmp_path / "shards", first_broken, "train-000003.tar")
    data = open_data(f"wds/pipe:cat {copy}")
    recipe = RECIPE.override(workers=workers, train_samples=72, augment="none")
    faults = {fault for batch in epoch(data, recipe) for fault in batch.faults}
    (fault,) = faults
    assert fault.sample == -1 and fault.reason.startswith("no JPEG, PNG, WEBP, ")
    assert re.fullmatch(r"pipe:cat .*/train-000003\.tar:\d{8}", fault.name)


def test_shards_that_a_stream_cannot_fetch_are_told(shards, tmp_path):
    copy = shutil.copytree(shards, tmp_path / "shards")
    (copy / "train-000005.tar").unlink()
    recipe = RECIPE.override(train_samples=72)
    faults = [f for batch in epoch(open_data(f"wds/pipe:cat {copy}"), recipe) for f in batch.faults]
    assert {fault.name for fault in faults} == {f"pipe:cat {copy}/train-000005.tar"}


def test_evaluation_lists_images_that_it_cannot_read(shards, tmp_path):
    copy = rewritten(shards, tmp_path / "shards", first_broken, "validation-000001.tar")
    data = open_data(f"wds/pipe:cat {copy}")
    batches = list(eval_loader(data, RECIPE, SPEC))
    (fault,) = [fault for batch in batches for fault in batch.faults]
    assert re.search(r"validation-000001\.tar:\d{8}$", fault.name)
    assert 1 + sum(len(batch.images) for batch in batches) == len(data.val)


def test_evaluation_refuses_shards_that_it_cannot_fetch(shards, tmp_path):
    copy = shutil.copytree(shards, tmp_path / "shards")
    (copy / "validation-000001.tar").unlink()
    data = open_data(f"wds/pipe:cat {copy}")
    with pytest.raises(OSError, match=r"cannot read pipe:cat .*/validation-000001\.tar: "):
        list(eval_loader(data, RECIPE, SPEC))


@pytest.mark.parametrize("world_size", [1, 2])
def test_an_evaluation_can_be_compared_with_what_the_data_state(shards, tmp_path, world_size):
    def without_first(number, name, content):
        return None if number < 3 else content  # image, label and description

    copy = rewritten(shards, tmp_path / "shards", without_first, "validation-000001.tar")
    data = open_data(f"wds/pipe:cat {copy}")
    loaders = [
        eval_loader(data, RECIPE, SPEC, World(CPU, rank, world_size)) for rank in range(world_size)
    ]
    assert [loader.dataset.source.num_samples for loader in loaders] == [12] * world_size
    assert sum(len(batch.images) for loader in loaders for batch in loader) == 11


class Killed:
    """A transform that takes its process with it."""

    def decode(self, image):
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize(
    "make, position",
    [(train_loader, "position 0 of an epoch of wds/"), (eval_loader, "the sample behind 0 others")],
)
def test_a_workers_death_names_stream_and_position(data, make, position):
    loader = make(data, RECIPE.override(workers=1), SPEC)
    loader.dataset.transform = Killed()
    with pytest.raises(DEATHS) as raised:
        list(loader)
    text = describe_worker_death([loader], raised.value)
    assert position in text and "(split " in text


@pytest.mark.parametrize("world_size", [1, 2, 5])
@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_has_every_sample_once(shards, data, workers, world_size):
    recipe = RECIPE.override(workers=workers)
    read = []
    for rank in range(world_size):
        for batch in eval_loader(data, recipe, SPEC, World(CPU, rank, world_size)):
            read += [image.numpy().tobytes() for image in batch.images]
    listed = eval_loader(open_data(shards), recipe, SPEC)
    assert sorted(read) == sorted(i.numpy().tobytes() for batch in listed for i in batch.images)


def test_evaluation_may_be_repeated(data):
    loader = eval_loader(data, RECIPE, SPEC)
    assert same(list(loader), list(loader))


def test_augmentation_does_not_depend_on_the_global_generators(data):
    read = []
    for seed in (1, 2):
        torch.manual_seed(seed), np.random.seed(seed), random.seed(seed)
        read.append(epoch(data))
    assert same(*read)


def test_a_stream_leaves_the_global_generators_alone(data):
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    epoch(data)
    assert torch.equal(torch.rand(1), expected)


@pytest.mark.parametrize(
    "change, told",
    [
        ({"repeated_aug": 3}, "repeated_aug: 3 copies .* set repeated_aug=1"),
        ({"augment": "dataset"}, "augment: 'dataset', but .* augments nothing"),
    ],
)
def test_options_without_meaning_on_a_stream_are_refused(data, change, told):
    with pytest.raises(ValueError, match=told):
        epoch(data, RECIPE.override(**change))


def test_the_device_can_augment_a_stream(data):
    batch = epoch(data, RECIPE.override(augment="gpu"))[0]
    assert batch.images.dtype == torch.uint8 and batch.plan


def test_a_stream_has_no_samples_by_number(data):
    with pytest.raises(ValueError, match="streams its samples, but they are needed by number"):
        data.val[0]


def test_an_address_without_a_list_of_shards_is_refused(tmp_path, caplog):
    with caplog.at_level(logging.ERROR), pytest.raises(ValueError, match=r"_info\.json"):
        open_data(f"wds/pipe:cat {tmp_path}")


def test_a_length_that_nobody_knows_is_asked_for(shards, tmp_path):
    folder = shutil.copytree(shards, tmp_path / "shards")
    text = (folder / "_info.json").read_text().replace('"num_samples": 36', '"num_samples": 0')
    (folder / "_info.json").write_text(text)
    data = open_data(f"wds/pipe:cat {folder}")
    with pytest.raises(ValueError, match="set train_samples"):
        epoch(data)
    assert len(epoch(data, RECIPE.override(train_samples=36))) == 4


@pytest.mark.skipif(shutil.which("curl") is None, reason="webdataset reads http by curl")
def test_shards_at_a_web_address(shards):
    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=shards)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        data = open_data(f"wds/{address}/")
        assert data.val.urls[0].startswith(f"{address}/validation-")
        assert sum(len(batch.images) for batch in eval_loader(data, RECIPE, SPEC)) == 12
        with pytest.raises(ValueError, match=r"wds/.*/nowhere has no _info\.json"):
            open_data(f"wds/{address}/nowhere")
        server.shutdown()


def hub_set(tmp_path, monkeypatch, broken=None):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0, raising=False)
    types = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(3)})
    (tmp_path / "set").mkdir()
    for split, files in (("train", 4), ("test", 2)):
        for file in range(files):
            colors = [(file * 60, index * 25, 0) for index in range(9)]
            rows = {
                "image": [Image.new("RGB", (20, 20), color) for color in colors],
                "label": [index % 3 for index in range(9)],
            }
            if split == broken and file == 0:
                rows["image"][4] = {"bytes": b"no image", "path": "broken.jpg"}
            name = f"{split}-{file:05}-of-{files:05}.parquet"
            made = datasets.Dataset.from_dict(rows, features=types)
            made.to_parquet(str(tmp_path / "set" / name))
    return open_data(f"hfids/{tmp_path / 'set'}", str(tmp_path / "cache"))


@pytest.fixture
def hub(tmp_path, monkeypatch):
    return hub_set(tmp_path, monkeypatch)


def test_images_of_a_streamed_hub_set_that_cannot_be_read_are_told(tmp_path, monkeypatch):
    recipe = RECIPE.override(workers=2, train_samples=72)
    batches = epoch(hub_set(tmp_path, monkeypatch, broken="train"), recipe)
    (name,) = {fault.name for batch in batches for fault in batch.faults}
    # With the content's checksum: a path need not be of one row alone.
    assert re.match(r"broken\.jpg \w{8} of hfids/", name) and len(batches) == 9


def test_evaluation_lists_an_image_of_a_streamed_hub_set_that_it_cannot_read(tmp_path, monkeypatch):
    data = hub_set(tmp_path, monkeypatch, broken="test")
    (fault,) = [fault for batch in eval_loader(data, RECIPE, SPEC) for fault in batch.faults]
    assert re.match(r"broken\.jpg \w{8} of hfids/", fault.name)


def test_a_hub_set_reads_no_file_of_this_machine_but_its_own(hub, tmp_path):
    for path in (tmp_path / "far.png", tmp_path / "set" / "near.png"):
        Image.new("RGB", (8, 8)).save(path)
    os.mkfifo(tmp_path / "set" / "pipe.png")

    def load(place):
        return hub.val._load({"image": {"bytes": None, "path": place}, "label": 1})

    image, label = load(str(tmp_path / "set" / "near.png"))
    assert image.size == (8, 8) and label == 1
    for place in ("far.png", "set/../far.png", "set/../../x.png"):
        for scheme in ("", "file://", "zip://a.png::"):
            with pytest.raises(OSError, match="is outside the data set's folder"):
                load(f"{scheme}{tmp_path}/{place}")
    with pytest.raises(OSError, match="no regular file"):
        load(str(tmp_path / "set" / "pipe.png"))


def test_a_folder_of_a_hub_set_may_be_a_link(tmp_path):
    pytest.importorskip("datasets")
    source = image_folder(tmp_path / "images", size=8, train=1, val=1)
    (source / "val").rename(source / "test")
    (tmp_path / "link").symlink_to(source)
    data = open_data(f"hfids/{tmp_path / 'link'}", str(tmp_path / "cache"))
    for part in (data.train, data.val):
        read = part.read(lambda image: image.format, 0, 1)
        assert list(read) == [("JPEG", 0), ("JPEG", 1), ("JPEG", 2)]


def test_a_streamed_hub_set_goes_on_exactly(hub):
    recipe = RECIPE.override(workers=2, train_samples=36)
    unbroken = epoch(hub, recipe, (1, 0))
    assert len(unbroken) == 4
    assert same(epoch(hub, recipe, (1, 3)), unbroken[3:])


def test_every_epoch_of_a_streamed_hub_set_is_in_another_order(hub):
    recipe = RECIPE.override(train_samples=36, augment="none")
    assert not same(epoch(hub, recipe, (0, 0)), epoch(hub, recipe, (1, 0)))


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_a_streamed_hub_set_is_evaluated_on_every_sample_once(hub, world_size):
    loaders = [
        eval_loader(hub, RECIPE.override(workers=2), SPEC, World(CPU, rank, world_size))
        for rank in range(world_size)
    ]
    images = [i.numpy().tobytes() for loader in loaders for batch in loader for i in batch.images]
    assert len(images) == len(set(images)) == 18


RUN = FAST | {"augment": "cpu", "batch_size": 8, "checkpoint_interval": 2, "eval_batch_size": 4}


def student():
    return vit(in_chans=3, img_size=16, num_classes=3)


def test_a_streamed_run_that_was_stopped_ends_bit_identical(shards, tmp_path, monkeypatch):
    name = f"wds/pipe:cat {shards}"
    train(student(), None, name, tmp_path / "whole", **RUN)
    seed_sample, count = streaming.seed_cpu, 0

    def stop(seed):
        nonlocal count
        count += 1
        if count == 8 * 3 + 2:  # in the last of the epoch's four updates
            raise LookupError("stream gone")
        seed_sample(seed)

    with monkeypatch.context() as patch, pytest.raises(LookupError, match="stream gone"):
        patch.setattr(streaming, "seed_cpu", stop)
        train(student(), None, name, tmp_path / "parts", **RUN)
    assert load_checkpoint(tmp_path / "parts")["position"]["total"] == 2
    with pytest.raises(CheckpointError, match=r"share a stream.*: \(1, 0\), now \(1, 2\)"):
        train(student(), None, name, tmp_path / "parts", **RUN | {"workers": 2})
    train(student(), None, name, tmp_path / "parts", **RUN)
    whole, parts = (load_checkpoint(tmp_path / run)["state_dict"] for run in ("whole", "parts"))
    assert all(torch.equal(value, parts[key]) for key, value in whole.items())


def test_a_streamed_run_stops_over_more_unreadable_images_than_allowed(shards, tmp_path):
    copy = rewritten(shards, tmp_path / "shards", first_broken, "train-*.tar")
    with pytest.raises(OSError, match=r"training images cannot be read, more than max_unreadable"):
        train(student(), None, f"wds/pipe:cat {copy}", tmp_path / "run", **RUN, max_unreadable=3)


class Rows(StreamSource):
    """A stream of images with these labels."""

    def __init__(self, labels):
        super().__init__("rows", "train", len(labels), 4)
        self.labels = labels

    def items(self, rank, world_size, seed):
        for number, label in enumerate(self.labels):
            image = Image.new("RGB", (20, 20))
            yield f"row {number}", lambda image=image, label=label: (image, label)


@pytest.mark.parametrize("label", [0.9, "1", True, [0, 1], float("nan"), -2])
def test_a_streamed_label_that_is_no_whole_number_is_refused_and_not_replaced(label):
    source = Rows([0, 1, 2, label, 1, 2, 3, 0])
    data = DataPair(source, source, 4, False, None, streams=True)
    for loader in (train_loader(data, RECIPE, SPEC), eval_loader(data, RECIPE, SPEC)):
        with pytest.raises(ValueError, match=r"label of row 3 must be a whole number.*got"):
            list(loader)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        *[(text, "whole number") for text in (b"0.9", b"cat", b"-3")],
        (b"3", "holds the label 3, but there are 3 classes"),
    ],
)
def test_a_cls_that_is_no_class_number_is_refused_and_not_replaced(shards, tmp_path, text, told):
    def edit(number, name, content):
        return text if number == 0 else content

    copy = rewritten(shards, tmp_path / "shards", edit, "validation-000001.tar")
    with pytest.raises(ValueError, match=rf"validation-000001\.tar:.* {told}"):
        list(eval_loader(open_data(f"wds/pipe:cat {copy}"), RECIPE, SPEC))


def test_streamed_shards_have_the_names_of_their_list(data):
    assert class_names(data.train) == class_names(data.val) == {0: "blue", 1: "green", 2: "red"}
