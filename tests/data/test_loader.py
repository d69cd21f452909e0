"""Data: opening it, and batches that depend on nothing but the recipe and the position."""

import io
import os
import random
import re
import signal
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import Dataset, IterableDataset, TensorDataset

from fastkd.config import Recipe
from fastkd.data.batches import Fault, SampleTransform
from fastkd.data.datasets import DataPair
from fastkd.data.loader import (
    DEATHS,
    SampleDataset,
    WorkerNotes,
    describe_worker_death,
    eval_loader,
    train_loader,
)
from fastkd.data.open_data import open_data
from fastkd.data.samplers import SampleKey, slice_size
from fastkd.data.transforms import (
    InputSpec,
    eval_transform,
)
from fastkd.utils.distributed import World
from tests.harness.tiny import image_folder, tensor_data

CPU = torch.device("cpu")
SPEC = InputSpec((3, 32, 32), (0.5, 0.5, 0.5), (0.2, 0.2, 0.2))
RANDAUGMENT = Recipe(batch_size=4, workers=0, seed=3)


def batches(data, recipe, position=(0, 0), spec=SPEC):
    loader = train_loader(open_data(data), recipe, spec)
    loader.batch_sampler.set_position(*position)
    return [(batch.images, batch.labels) for batch in loader]


def same(left, right):
    assert len(left) == len(right)
    return all(
        torch.equal(a, b) and torch.equal(la, lb)
        for (a, la), (b, lb) in zip(left, right, strict=True)
    )


class DrawsWhenRead(TensorDataset):
    """Images whose reading draws random numbers, as many as there have been reads."""

    reads = 0

    def __getitem__(self, index):
        self.reads += 1
        torch.rand(self.reads)
        return super().__getitem__(index)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 1)])
def test_a_copy_draws_the_same_whether_or_not_its_image_was_decoded_before(order):
    tensors = tensor_data()[0].tensors
    transform = SampleTransform(lambda image: image + torch.rand(()))
    together = SampleDataset(DrawsWhenRead(*tensors), transform, 3, decode_once=True)
    keys = [SampleKey(epoch=1, sample=5, copy=copy) for copy in order]
    samples = together.__getitems__(keys)
    alone = []
    for key in keys:
        dataset = SampleDataset(TensorDataset(*tensors), transform, 3, decode_once=True)
        alone += dataset.__getitems__([key])
    assert together.dataset.reads == 1
    for sample, expected in zip(samples, alone, strict=True):
        assert torch.equal(sample.image, expected.image)
    assert not torch.equal(samples[0].image, samples[1].image)


class ReadablePairs(Dataset):
    """PIL images labeled with their index; counts how often one is read."""

    def __init__(self, count):
        self.count = count
        self.reads = 0

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        self.reads += 1
        return Image.new("RGB", (40, 40), (index, 0, 0)), index


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return image_folder(tmp_path_factory.mktemp("images"))


def test_augmented_batches_are_the_same_for_any_number_of_workers(folder):
    assert same(batches(folder, RANDAUGMENT), batches(folder, RANDAUGMENT.override(workers=2)))


def test_augmented_batches_continue_identically_in_mid_epoch(folder):
    assert same(batches(folder, RANDAUGMENT, (1, 4)), batches(folder, RANDAUGMENT, (1, 0))[4:])


def test_loading_leaves_the_global_generators_alone(folder):
    torch.manual_seed(5), np.random.seed(5), random.seed(5)
    expected = torch.rand(1).item(), np.random.rand(), random.random()
    torch.manual_seed(5), np.random.seed(5), random.seed(5)
    batches(folder, RANDAUGMENT)
    assert (torch.rand(1).item(), np.random.rand(), random.random()) == expected


def test_copies_of_a_sample_are_augmented_differently(folder):
    recipe = RANDAUGMENT.override(repeated_aug=2)
    images, labels = batches(folder, recipe)[0]
    assert labels[0] == labels[1]
    assert not torch.equal(images[0], images[1])


def test_an_epoch_augments_anew(folder):
    first, second = (batches(folder, RANDAUGMENT, (epoch, 0)) for epoch in (0, 1))
    assert not same(first, second)


def test_augment_none_sees_training_images_as_evaluation_does(folder):
    recipe = Recipe(batch_size=36, workers=0, augment="none")
    images, labels = batches(folder, recipe)[0]
    loader = train_loader(open_data(folder), recipe, SPEC)
    (first,) = next(iter(loader.batch_sampler))[:1]
    opened = open_data(folder)
    image, label = opened.train[first.sample]
    torch.testing.assert_close(images[0], eval_transform(recipe, SPEC)(image))
    assert labels[0] == label


def test_tensors_pass_as_they_are():
    train, val = tensor_data(8, 4)
    recipe = Recipe(batch_size=8, workers=0, augment="none")
    images, labels = batches((train, val), recipe, spec=InputSpec((1, 8, 8), None, None))[0]
    order = labels.argsort(stable=True)
    assert sorted(images.flatten(1).sum(1).tolist()) == sorted(
        train.tensors[0].flatten(1).sum(1).tolist()
    )
    assert torch.equal(labels[order], train.tensors[1].sort(stable=True).values)


def test_tensors_are_normalized_where_statistics_are_given():
    data = tensor_data(8, 4)
    recipe = Recipe(batch_size=8, workers=0, augment="none")
    loader = eval_loader(open_data(data), recipe, InputSpec((1, 8, 8), (1.0,), (2.0,)))
    images = next(iter(loader)).images
    torch.testing.assert_close(images, (data[1].tensors[0] - 1) / 2)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_evaluation_covers_every_sample_exactly_once(world_size):
    data, recipe = open_data(tensor_data(8, 10)), Recipe(eval_batch_size=3, workers=0)
    spec = InputSpec((1, 8, 8), None, None)
    loaders = [
        eval_loader(data, recipe, spec, World(CPU, r, world_size)) for r in range(world_size)
    ]
    samples = [n for loader in loaders for batch in loader for n in batch.samples.tolist()]
    assert sorted(samples) == list(range(10))
    assert max(map(len, loaders)) - min(map(len, loaders)) <= 1


def test_a_data_sets_own_random_transform_is_seeded():
    class Noisy(TensorDataset):
        def __getitem__(self, index):
            image, label = super().__getitem__(index)
            return image + torch.randn_like(image), label

    data = tuple(Noisy(*part.tensors) for part in tensor_data(16, 4))
    recipe = Recipe(batch_size=4, workers=0, augment="dataset")
    spec = InputSpec((1, 8, 8), None, None)
    assert same(batches(data, recipe, spec=spec), batches(data, recipe, spec=spec))


def test_tensors_with_image_augmentation_are_refused_naming_the_way_out():
    recipe = Recipe(batch_size=8, workers=0)
    with pytest.raises(ValueError, match="set augment='none'"):
        train_loader(open_data(tensor_data()), recipe, SPEC)


def test_mixup_refuses_odd_slices():
    with pytest.raises(ValueError, match="odd"):
        slice_size(Recipe(batch_size=6, accumulation=2, mixup=0.8), 1)


def test_a_batch_that_cannot_be_shared_out_is_refused():
    with pytest.raises(ValueError, match="10 images cannot be shared by 4 processes"):
        slice_size(Recipe(batch_size=10), 4)


def test_a_folder_tells_its_classes(folder):
    opened = open_data(folder)
    assert (opened.num_classes, len(opened.train), len(opened.val)) == (3, 36, 12)


def test_a_class_without_validation_images_shifts_no_label(tmp_path):
    folder = image_folder(tmp_path, train=2, val=2)
    for file in (folder / "val" / "blue").iterdir():
        file.unlink()
    (folder / "val" / "blue").rmdir()
    opened = open_data(folder)
    assert {label for _, label in (opened.val[i] for i in range(4))} == {1, 2}


def test_a_validation_class_that_training_lacks_is_refused(tmp_path):
    folder = image_folder(tmp_path, train=1, val=1)
    (folder / "val" / "red").rename(folder / "val" / "violet")
    with pytest.raises(ValueError, match="violet"):
        open_data(folder)


def test_a_folder_without_validation_says_what_is_missing(tmp_path):
    (tmp_path / "train").mkdir()
    with pytest.raises(ValueError, match=r"no folder val \(or validation\)"):
        open_data(tmp_path)


def test_a_missing_folder_is_refused():
    with pytest.raises(ValueError, match="no folder 'nowhere'"):
        open_data("nowhere")


def test_streaming_data_are_refused():
    class Stream(IterableDataset):
        def __iter__(self):
            return iter(())

    with pytest.raises(ValueError, match="streams its samples"):
        open_data((Stream(), Stream()))


@pytest.mark.parametrize("image", [torch.zeros(3, 8, 8, dtype=torch.uint8), "text"])
def test_samples_of_another_form_are_refused(image):
    with pytest.raises(ValueError, match="PIL images or float tensors"):
        open_data(([(image, 0)], [(image, 0)]))


def broken_image(folder, split, content=b"no image"):
    broken = image_folder(folder) / split / "green" / "1.jpg"
    whole = broken.read_bytes()
    broken.write_bytes(whole[: len(whole) // 2] if content == "half" else content)
    return broken


@pytest.mark.parametrize("content", [b"", b"no image", "half"])
def test_an_unreadable_image_of_an_evaluation_is_left_out_and_told(tmp_path, content):
    broken = broken_image(tmp_path, "val", content)
    batches = list(eval_loader(open_data(tmp_path), RANDAUGMENT.override(eval_batch_size=1), SPEC))
    (fault,) = [fault for batch in batches for fault in batch.faults]
    assert fault.name == str(broken)
    assert [len(batch.images) for batch in batches] == [
        int(index != fault.sample) for index in range(len(batches))
    ]
    assert all(len(batch.images) == len(batch.labels) == len(batch.samples) for batch in batches)


@pytest.mark.parametrize("content", [b"", b"no image", "half"])
@pytest.mark.parametrize("augment", ["cpu", "gpu", "none"])
def test_an_unreadable_training_image_is_replaced_and_told(tmp_path, augment, content):
    broken = broken_image(tmp_path, "train", content)
    recipe = RANDAUGMENT.override(augment=augment, batch_size=36)
    (batch,) = train_loader(open_data(tmp_path), recipe, SPEC)
    (fault,) = batch.faults
    assert len(batch.images) == len(batch.labels) == 36
    assert fault.name == str(broken)
    assert fault.sample in batch.samples
    assert "no JPEG" in fault.reason or "truncated" in fault.reason


def test_an_image_that_its_data_set_opened_only_is_replaced_too():
    torn = io.BytesIO()
    Image.effect_noise((40, 40), 80).convert("RGB").save(torn, "png")
    torn = torn.getvalue()[:-300]

    class Lazy(ReadablePairs):
        def __getitem__(self, index):
            return (Image.open(io.BytesIO(torn)), 0) if index == 3 else super().__getitem__(index)

    pair = open_data((Lazy(8), ReadablePairs(8)))
    (batch,) = train_loader(pair, RANDAUGMENT.override(batch_size=8), SPEC)
    assert [fault.sample for fault in batch.faults] == [3]


def test_a_replacement_is_the_same_for_any_number_of_workers(tmp_path):
    broken_image(tmp_path, "train")
    recipe = RANDAUGMENT.override(batch_size=12)
    assert same(batches(tmp_path, recipe), batches(tmp_path, recipe.override(workers=2)))


def test_the_copies_of_an_unreadable_image_share_their_replacement():
    class OneBroken(ReadablePairs):
        def __getitem__(self, index):
            if index == 0:
                raise OSError("torn")
            return super().__getitem__(index)

    data = OneBroken(8)
    recipe = RANDAUGMENT.override(batch_size=8, repeated_aug=4, augment="none")
    loader = train_loader(open_data((data, ReadablePairs(8))), recipe, SPEC)
    for epoch in range(8):
        loader.batch_sampler.set_position(epoch)
        (batch,) = loader
        replaced = batch.labels[batch.samples == 0]
        assert len(set(replaced.tolist())) == bool(len(replaced))
        assert batch.faults == ((Fault(0, "sample 0", "torn"),) if len(replaced) else ())


def test_data_of_which_nothing_can_be_read_are_an_error():
    class Broken(ReadablePairs):
        def __getitem__(self, index):
            raise OSError("torn")

    pair = DataPair(Broken(8), ReadablePairs(8), None, False, None)
    loader = train_loader(pair, RANDAUGMENT, SPEC)
    with pytest.raises(OSError, match="nor any of 16 images tried in its place: torn"):
        next(iter(loader))


class Faulty(ReadablePairs):
    """A data set that raises an error over one of its samples."""

    def __init__(self, error):
        super().__init__(8)
        self.error = error

    def __getitem__(self, index):
        if index == 5:
            raise self.error
        return super().__getitem__(index)


@pytest.mark.parametrize("error", [OSError("torn"), Image.DecompressionBombError("torn")])
def test_what_a_data_set_says_it_cannot_read_is_told(error):
    pair = open_data((Faulty(error), Faulty(error)))
    for loader in (train_loader, eval_loader):
        (batch,) = loader(pair, RANDAUGMENT.override(batch_size=8), SPEC)
        assert batch.faults == (Fault(5, "sample 5", "torn"),)


@pytest.mark.parametrize("error", [ValueError("mine"), KeyError("mine"), MemoryError("mine")])
def test_a_mistake_in_a_data_set_of_the_user_is_not_taken_for_a_broken_image(error):
    pair = open_data((Faulty(error), Faulty(error)))
    for loader in (train_loader, eval_loader):
        with pytest.raises(type(error), match="mine"):
            list(loader(pair, RANDAUGMENT.override(batch_size=8), SPEC))


def test_a_label_that_is_missing_is_minus_one():
    data = [(Image.new("RGB", (40, 40)), None)] * 4
    recipe = RANDAUGMENT.override(labels=False)
    (batch,) = train_loader(open_data((data, data), labels=False), recipe, SPEC)
    assert batch.labels.tolist() == [-1] * 4


def test_a_half_labeled_training_set_is_refused_naming_the_sample():
    image = Image.new("RGB", (40, 40))
    half = [(image, 0), (image, 1), (image, None), (image, 0)]
    with pytest.raises(
        ValueError, match=r"label of sample 2 must be 0 or more, got None \(labels="
    ):
        batches((half, half), RANDAUGMENT)


BAD_LABELS = [0.9, "1", True, -5, np.eye(4)[1], torch.tensor(float("nan"))]


@pytest.mark.parametrize("label", BAD_LABELS, ids=str)
@pytest.mark.parametrize("which", ["training", "evaluation"])
def test_a_label_that_is_no_whole_number_is_refused_at_once(which, label):
    sets = {
        name: [(Image.new("RGB", (8, 8)), label if name == which else 0)]
        for name in ("training", "evaluation")
    }
    with pytest.raises(ValueError, match=rf"label of the {which} set \(list\) must be a whole"):
        open_data(tuple(sets.values()))


@pytest.mark.parametrize("label", BAD_LABELS, ids=str)
def test_a_later_label_that_is_no_whole_number_is_refused_naming_its_sample(label):
    image = Image.new("RGB", (40, 40))
    data = open_data(([(image, 0)] * 3 + [(image, label)], [(image, 0), (image, label)]))
    with pytest.raises(ValueError, match="label of sample 3 of list must be a whole number"):
        list(train_loader(data, RANDAUGMENT, SPEC))
    with pytest.raises(ValueError, match="label of sample 1 of list must be a whole number"):
        list(eval_loader(data, RANDAUGMENT, SPEC))


def test_labels_that_are_not_used_may_be_anything():
    image = Image.new("RGB", (40, 40))
    recipe, data = (
        RANDAUGMENT.override(labels=False),
        [(image, label) for label in (0.9, "1", 2, [])],
    )
    opened = open_data((data, data), labels=False)
    assert not opened.labeled_val
    (batch,) = train_loader(opened, recipe, SPEC)
    assert sorted(batch.labels.tolist()) == [-1, -1, -1, 2]


def test_whole_floats_and_tensors_of_one_element_are_labels():
    image = Image.new("RGB", (40, 40))
    labels = [1.0, torch.tensor([0]), np.int32(3), torch.tensor(2)]
    data = [(image, label) for label in labels]
    (batch,) = eval_loader(open_data((data, data)), RANDAUGMENT, SPEC)
    assert batch.labels.tolist() == [1, 0, 3, 2] and batch.labels.dtype == torch.int64


class Named(list):
    """Samples whose dataset names its classes, as torchvision's do."""

    def __init__(self, classes, labels):
        super().__init__((Image.new("RGB", (40, 40)), label) for label in labels)
        self.classes = classes


def test_an_evaluation_set_of_other_numbers_takes_those_of_training_by_name():
    train, val = Named(["bee", "cat", "dog"], [0, 1, 2, 2]), Named(["dog", "bee"], [0, 1, 1])
    (batch,) = eval_loader(open_data((train, val)), RANDAUGMENT, SPEC)
    assert batch.labels.tolist() == [2, 0, 0]


def test_an_evaluation_set_of_other_classes_is_refused():
    train, val = Named(["bee", "cat"], [0, 1, 1, 1]), Named(["cow", "bee"], [0, 1])
    with pytest.raises(ValueError, match=r"1 of the 2 classes of the evaluation set .*'cow'"):
        open_data((train, val))


def test_a_label_beyond_the_named_classes_is_refused():
    data = open_data((Named(["a", "b"], [0, 1]), Named(["b", "a"], [0, 2])))
    with pytest.raises(ValueError, match="label of sample 1 must be 0 to 1, got 2"):
        list(eval_loader(data, RANDAUGMENT, SPEC))


@pytest.mark.parametrize("missing", [None, -1, torch.tensor(-1)])
@pytest.mark.parametrize("which", ["training", "evaluation"])
def test_a_set_without_labels_is_refused_where_they_are_needed(which, missing):
    sets = {
        name: [(Image.new("RGB", (8, 8)), missing if name == which else 0)]
        for name in ("training", "evaluation")
    }
    with pytest.raises(ValueError, match=f"samples of the {which} set have no label"):
        open_data(tuple(sets.values()))


def test_a_batch_tells_which_samples_it_holds(folder):
    loader = train_loader(open_data(folder), RANDAUGMENT.override(augment="none"), SPEC)
    keys = next(iter(loader.batch_sampler))
    assert next(iter(loader)).samples.tolist() == [key.sample for key in keys]


@pytest.mark.parametrize("world_size", [1, 2])
def test_the_device_path_decodes_an_image_once_for_its_copies(world_size):
    data = ReadablePairs(24)
    recipe = Recipe(batch_size=12, workers=0, augment="gpu", repeated_aug=3)
    opened = open_data((data, data))
    data.reads = 0
    for rank in range(world_size):
        next(iter(train_loader(opened, recipe, SPEC, World(CPU, rank, world_size))))
    assert data.reads == 4


def test_the_device_path_takes_the_crops_of_the_cpu_path(folder):
    recipe = RANDAUGMENT.override(repeated_aug=3, auto_augment=None, color_jitter=0.0, reprob=0.0)
    recipe = recipe.override(hflip=0.0)
    expected, _ = batches(folder, recipe)[0]
    crops, _ = batches(folder, recipe.override(augment="gpu"))[0]
    torch.testing.assert_close((crops / 255 - 0.5) / 0.2, expected)


class KillsItsWorker(ReadablePairs):
    def __getitem__(self, index):
        if index == 5 and torch.utils.data.get_worker_info() is not None:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(index)

    def filename(self, index):
        return f"file{index}.jpg"


@pytest.mark.parametrize("augment", ["cpu", "gpu"])
def test_a_workers_death_names_the_file(augment):
    recipe = Recipe(batch_size=8, workers=1, augment=augment)
    data = open_data((KillsItsWorker(16), ReadablePairs(8)))
    loader = train_loader(data, recipe, SPEC)
    with pytest.raises(DEATHS) as raised:
        list(loader)
    text = describe_worker_death([loader], raised.value)
    assert re.fullmatch(r"data: loader process \d+ died over file5\.jpg \(sample 5\)", text)


def test_every_process_that_died_is_told():
    dataset, notes = SampleDataset(KillsItsWorker(16), SampleTransform()), WorkerNotes(3)
    loader = SimpleNamespace(dataset=dataset, notes=notes)
    notes.rows.copy_(torch.tensor([[70, 1], [71, 2], [72, 3]]))
    error = RuntimeError("DataLoader worker (pid(s) 70, 72, 99) exited unexpectedly")
    text = describe_worker_death([loader], error)
    assert "70 died over file1.jpg" in text and "72 died over file3.jpg" in text
    assert "71" not in text and "99" not in text


@pytest.mark.parametrize("seen", [ConnectionResetError(104, "reset by peer"), EOFError()])
def test_a_death_that_is_seen_by_its_closed_socket_is_told_by_torch_a_moment_later(
    monkeypatch, seen
):
    dataset, notes = SampleDataset(KillsItsWorker(16), SampleTransform()), WorkerNotes(1)
    loader = SimpleNamespace(dataset=dataset, notes=notes)
    notes.rows.copy_(torch.tensor([[70, 3]]))

    def interrupted(seconds: float) -> None:
        raise RuntimeError("DataLoader worker (pid 70) is killed by signal: Killed.")

    monkeypatch.setattr("fastkd.data.loader.time.sleep", interrupted)
    text = describe_worker_death([loader], seen)
    assert text == "data: loader process 70 died over file3.jpg (sample 3)"


def test_another_error_is_no_workers_death(folder):
    loader = train_loader(open_data(folder), RANDAUGMENT, SPEC)
    assert describe_worker_death([loader], RuntimeError("out of memory")) is None


def test_gray_images_are_brought_to_the_students_channels():
    data = [(Image.new("L", (40, 40), 7), 0)] * 4
    images, _ = batches((data, data), RANDAUGMENT)[0]
    assert images.shape == (4, 3, 32, 32)


@pytest.mark.slow
def test_loader_processes_that_are_left_at_exit_end_without_a_word():
    script = """
import torch
from torch.utils.data import DataLoader, TensorDataset
from fastkd.data.loader import loader_options
options = loader_options(6, torch.device("cpu"))
batches = iter(DataLoader(TensorDataset(torch.zeros(60, 1)), batch_size=1, **options))
next(batches)
raise SystemExit(3)
"""
    command = [sys.executable, "-W", "ignore", "-c", script]  # torch warns of many processes
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stderr) == (3, "")
