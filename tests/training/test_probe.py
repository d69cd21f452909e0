"""What a run is refused for before its folder is touched, and that looking leaves no trace."""

import re
from types import SimpleNamespace

import pytest
import timm
import torch
from timm.layers import DropPath
from torch import nn
from torch.utils.data import TensorDataset

from fastkd.checkpoint import load_checkpoint
from fastkd.config import Recipe
from fastkd.data.transforms import InputSpec
from fastkd.training import build, probe, train, trainer
from fastkd.training.dry_run import dry_run
from fastkd.training.probe import check_inputs, naming
from tests.harness.tiny import FAST, image_folder, lift, made_run, tensor_data, vit

SPEC = InputSpec((3, 32, 32), (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
IMAGES = {"model": "test_vit", "img_size": 32, "augment": "cpu", "batch_size": 6, "epochs": 1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return image_folder(tmp_path_factory.mktemp("images"), train=4, val=2)


@pytest.fixture(scope="module")
def teacher_weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("teacher") / "weights.pth"
    torch.save(timm.create_model("test_vit2", num_classes=3, img_size=32).state_dict(), path)
    return str(path)


def drawing_student():
    """A student with everything that draws or counts in a forward pass."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3),
        nn.BatchNorm2d(8),
        DropPath(0.3),
        nn.Dropout(0.3),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 6),
    )


DRAWN = {
    "batch norm, dropout and Mixup": (
        drawing_student,
        None,
        {"mixup": 0.5, "cutmix": 0.5, "num_classes": 6},
    ),
    "stochastic depth and a teacher": (
        lambda: vit(drop_path_rate=0.3, proj_drop_rate=0.2),
        lambda: vit(24, seed=1),
        {"alpha": 0.5, "projector": "linear", "mixup": 0.5},
    ),
    "the fused lift": (lift, lambda: vit(24, seed=1), {"projector": "lift"}),
    "terms that draw": (
        vit,
        lambda: vit(24, seed=1),
        {"feature_loss": "vitkd", "pairs": [(0, 0), (1, 1)]},
    ),
}


@pytest.mark.parametrize("case", DRAWN)
def test_a_run_is_the_same_to_the_bit_with_and_without_it(case, tmp_path, monkeypatch):
    student, teacher, options = DRAWN[case]
    states = []
    for looks in (True, False):
        if not looks:
            monkeypatch.setattr(build, "check_inputs", lambda *_: None)
            monkeypatch.setattr(trainer, "check_pass", lambda *_: None)
        output = tmp_path / str(looks)
        guide = None if teacher is None else teacher()
        # One update an epoch; the CPU's generators go on from where the probe left them.
        train(student(), guide, tensor_data(16, 6), output, **FAST | {"epochs": 1} | options)
        states.append(load_checkpoint(output))
    first, second = states
    for name in ("state_dict", "state_dict_ema", "terms"):
        assert all(torch.equal(value, second[name][key]) for key, value in first[name].items())
    assert torch.equal(first["rng"]["torch"], second["rng"]["torch"])
    assert first["history"][0]["loss"] == second["history"][0]["loss"]


def test_images_of_a_folder_are_drawn_as_without_it(folder, tmp_path, monkeypatch):
    found = []
    for looks in (True, False):
        if not looks:
            monkeypatch.setattr(build, "check_inputs", lambda *_: None)
            monkeypatch.setattr(trainer, "check_pass", lambda *_: None)
        result = train(None, None, folder, tmp_path / str(looks), **FAST | IMAGES)
        found.append(result.history[0]["loss"])
    assert found[0] == found[1]


def test_it_leaves_modes_buffers_gradients_and_the_environment(monkeypatch, tmp_path):
    student, seen = drawing_student(), []
    student[0].eval()  # a user's own choice
    before = {name: value.clone() for name, value in student.named_buffers()}

    def look(engine, *others):
        probe.check_pass(engine, *others)
        seen.append([module.training for module in student.modules()])
        assert all(torch.equal(value, before[name]) for name, value in student.named_buffers())
        assert all(parameter.grad is None for parameter in student.parameters())
        assert "FASTKD_BACKEND" not in probe.os.environ
        assert not engine.optimizer.state and engine.meter.count == 0
        raise InterruptedError

    monkeypatch.delenv("FASTKD_BACKEND", raising=False)
    monkeypatch.setattr(trainer, "check_pass", look)
    with pytest.raises(InterruptedError):
        train(student, None, tensor_data(), tmp_path / "run", **FAST)
    assert seen == [[module.training for module in student.modules()]]
    assert not (tmp_path / "run").exists()


# What a run and a dry run refuse alike: (fields, what the error names).
REFUSED = [
    ({"auto_augment": "rand_m9"}, "auto_augment: .*'rand_m9'"),
    ({"auto_augment": "augmix-w-3"}, "auto_augment: .*'augmix-w-3'"),
    ({"auto_augment": "rand_m9", "augment": "gpu"}, "auto_augment: .*'rand_m9'"),
    ({"crop_pct": 1e-9}, "crop_pct: .*1e-09"),
    ({"mixup": 1e-320}, "mixup: .*1e-320"),
    ({"cutmix": 1e-320, "mixup": 0.8}, "cutmix: .*1e-320"),
    ({"mixup": 0.8, "batch_size": 5}, "batch_size: .* 5"),
    ({"img_size": 63}, "student: test_vit.*img_size=63"),
    ({"img_size": 8}, "student: test_vit.*img_size=8"),
    ({"model": "vit_tiny_patch16_224.augreg_in21k"}, "student.*augreg_in21k"),
    ({"variant": "widelast", "width": 7}, "width must be .*got 7"),
    ({"num_classes": 2}, "num_classes: 2"),
]


@pytest.mark.parametrize(("fields", "named"), REFUSED)
def test_a_run_and_a_dry_run_refuse_alike_before_anything_is_written(
    fields, named, folder, tmp_path
):
    given = FAST | IMAGES | fields
    device, _ = given.pop("device"), given.pop("quiet")
    with pytest.raises(ValueError, match=named) as of_run:
        train(None, None, folder, tmp_path / "run", device=device, quiet=True, **given)
    assert not (tmp_path / "run").exists()
    with pytest.raises(ValueError, match=named) as of_dry_run:
        dry_run(None, None, given | {"data": str(folder)}, device=device)
    assert str(of_dry_run.value) == str(of_run.value)


def test_a_teachers_size_is_named_by_run_and_dry_run(folder, teacher_weights, tmp_path):
    given = FAST | IMAGES | {"alpha": 0.5, "feature_weight": 0.0, "teacher_img_size": 63}
    given.pop("device"), given.pop("quiet")
    given["teacher_checkpoint"] = teacher_weights
    named = r"teacher: test_vit2 \(teacher_img_size=63\)"
    with pytest.raises(ValueError, match=named):
        train(None, "test_vit2", folder, tmp_path / "run", device="cpu", quiet=True, **given)
    assert not (tmp_path / "run").exists()
    with pytest.raises(ValueError, match=named):
        dry_run(None, "test_vit2", given | {"num_classes": 3})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("amp", ["none", "bf16"])
def test_a_student_in_half_precision_is_refused(dtype, amp, data, tmp_path):
    with pytest.raises(ValueError, match=rf"student: weights must be float32.*{dtype}"):
        train(vit().to(dtype), None, data, tmp_path / "run", **FAST | {"amp": amp})
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("device", ["meta", "cpux", "", "opengl", "cuda:x"])
def test_a_device_that_computes_nothing_is_refused_by_both(device, data, tmp_path):
    with pytest.raises(ValueError, match=f"device: .*'{device}'"):
        train(vit(), None, data, tmp_path / "run", **FAST | {"device": device})
    assert not (tmp_path / "run").exists()
    with pytest.raises(ValueError, match=f"device: .*'{device}'"):
        dry_run(None, None, {"model": "test_vit", "num_classes": 3}, device=device)


class Broken(nn.Module):
    """A student or a teacher whose forward pass fails in words that name nothing."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(64, 6)
        self.fails = True

    def forward(self, images):
        assert not self.fails
        return self.head(images.flatten(1))


def test_the_part_that_fails_is_named(data, tmp_path):
    options = FAST | {"alpha": 0.5, "feature_weight": 0.0}
    with pytest.raises(ValueError, match="student: module:Broken on images of 1 x 8 x 8"):
        train(Broken(), vit(), data, tmp_path / "run", **options)
    with pytest.raises(ValueError, match="teacher: module:Broken"):
        train(vit(), Broken(), data, tmp_path / "run", **options)
    with pytest.raises(ValueError, match=r"logit_loss='soft'.*like the student's"):
        unknown = nn.Sequential(nn.Flatten(), nn.Linear(64, 5))
        train(vit(), unknown, data, tmp_path / "run", **options)
    assert not (tmp_path / "run").exists()


def test_errors_of_memory_and_of_fastkd_keep_their_kind():
    class OfFastkd(RuntimeError):
        __module__ = "fastkd.models"

    for error in (torch.OutOfMemoryError("full"), OfFastkd("said")):
        with pytest.raises(type(error), match=r"^(full|said)$"), naming("student"):
            raise error
    expected = pytest.raises(ValueError, match=r"^student: KeyError without a message$")
    with expected, naming("student"):
        raise KeyError


def test_a_users_dataset_is_not_read_for_it(fast):
    class Counting(TensorDataset):
        read = 0

        def __getitem__(self, index):
            self.read += 1
            return super().__getitem__(index)

    train_set, val = tensor_data(16, 6)
    counting = Counting(*train_set.tensors)
    train(vit(), None, (counting, val), **fast | {"epochs": 1})
    assert counting.read == 16 + 1  # an epoch, and the first to see what they are


def test_images_that_cannot_be_read_are_replaced_in_it_too(folder, tmp_path):
    broken = image_folder(tmp_path / "broken", train=4, val=2)
    (broken / "train" / "blue" / "0.jpg").write_bytes(b"no image")
    result = train(None, None, broken, tmp_path / "run", **FAST | IMAGES)
    assert len(result.history) == 1


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({}, "auto_augment: 'rand-m9-mstd0.5-inc1' cannot"),  # the default
        (
            {"auto_augment": "original", "interpolation": "random"},
            "auto_augment: 'original' cannot",
        ),
        ({"augment": "gpu"}, "augment: 'gpu'.* got 4"),
    ],
)
def test_a_policy_that_cannot_augment_images_of_four_channels_is_named(fields, named):
    spec = InputSpec((4, 32, 32), (0.5,) * 4, (0.5,) * 4)
    check_inputs(Recipe(auto_augment=None), spec, None)
    with pytest.raises(ValueError, match=named):
        check_inputs(Recipe(**fields), spec, None)


def test_fields_that_fail_together_are_all_named(monkeypatch):
    def fail(*_):
        raise KeyError("no")

    monkeypatch.setattr(probe, "train_sample_transform", fail)
    recipe = Recipe(auto_augment="augmix", hflip=0.0, reprob=0.0, color_jitter=0.0, crop_pct=0.9)
    with pytest.raises(ValueError, match=r"^auto_augment: 'augmix', crop_pct: 0\.9 cannot"):
        check_inputs(recipe, SPEC, None)


def test_a_dry_run_lists_all_problems(folder, tmp_path):
    (tmp_path / "file").write_text("")
    fields = {"lr": -1.0, "auto_augment": "rand_m9", "img_size": 63, "variant": "wide"}
    fields |= {"epochs": "many", "sched": "step", "sched_kwargs": {"decay_epochs": 300}}
    with pytest.raises(ValueError) as refused:
        dry_run(
            None, "test_vit99", {**fields, "alpha": 0.5, "model": "test_vit", "data": str(folder)},
            output=tmp_path / "file", resume="no.pth", device="meta",
        )  # fmt: skip
    for named in (
        *("epochs: .*'many'", "output must be a folder", "resume: .*'no.pth'", "device: .*'meta'"),
        *("lr: .*-1.0", "variant: .*'wide'", "auto_augment: .*'rand_m9'", "img_size=63"),
        *("sched_kwargs: .*'step'", "'test_vit99'"),
    ):
        assert len(re.findall(named, str(refused.value))) == 1, named


def test_a_dry_run_goes_on_where_the_data_are_wrong(tmp_path):
    fields = {"model": "test_vit", "img_size": 63, "data": str(tmp_path / "lost")}
    with pytest.raises(ValueError, match=r"^data: .*lost.*; student: .*img_size=63"):
        dry_run(None, None, fields)


def test_a_dry_run_goes_on_where_the_students_weights_are_wrong(tmp_path):
    (tmp_path / "run.pth").write_bytes(b"no weights")
    fields = {"model": str(tmp_path / "run.pth"), "data": str(tmp_path / "lost"), "epochs": 0}
    with pytest.raises(ValueError, match=r"^epochs: .*run\.pth.*; data: .*lost'; names[^;]*$"):
        dry_run(None, None, fields)


def test_a_dry_run_goes_on_with_the_weights_of_a_student(tmp_path):
    run = made_run(tmp_path / "start")
    with pytest.raises(ValueError, match=r"^data: .*lost'; names[^;]*$"):
        dry_run(None, None, {"model": str(run), "data": str(tmp_path / "lost")})


def test_a_dry_run_says_what_it_could_not_check():
    fields = {"model": "test_vit", "num_classes": 1000, "img_size": 32, "projector": "linear"}
    _, values = dry_run(None, "test_vit2", fields | {"alpha": 0.5})
    assert values["not checked"] == "data (none are given), published weights"


@pytest.mark.parametrize(("logits", "line"), [(3, None), (5, "5 logits for data of 3 classes")])
def test_logits_beyond_the_classes_of_the_data_get_a_line(folder, logits, line):
    fields = {"model": "test_vit", "num_classes": logits, "img_size": 32, "batch_size": 6}
    _, values = dry_run(None, None, fields | {"lr_scaling": False, "data": str(folder)})
    assert values.get("classes") == line


def test_a_students_weights_are_taken_from_the_field_model_too(folder, tmp_path):
    run = made_run(tmp_path / "start")
    options = FAST | IMAGES | {"model": str(run), "lr": 1e-30, "weight_decay": 0.0, "min_lr": 0.0}
    train(None, None, folder, tmp_path / "run", **options | {"ema_decay": None})
    started = load_checkpoint(tmp_path / "run")["state_dict"]
    averaged = load_checkpoint(run)["state_dict_ema"]  # the better ones
    assert all(torch.allclose(value, averaged[name]) for name, value in started.items())


def test_buffers_that_are_replaced_are_put_back():
    module = nn.Module()
    module.register_buffer("written", torch.zeros(2))
    module.register_buffer("replaced", torch.zeros(2))
    module.register_buffer("late", None)
    replaced = module.replaced
    with probe._left_as_they_were(module):
        module.written += 1
        module.replaced = module.replaced + 1
        module.late = torch.ones(2)
    assert module.replaced is replaced and module.late is None
    assert not module.written.any() and not module.replaced.any()


@pytest.mark.parametrize("failing", [0, 1], ids=["images", "pass"])
def test_all_processes_stop_at_the_step_at_which_one_fails(monkeypatch, failing):
    taken, answers = [], [[None, None], [None, None]]
    answers[failing] = [None, "a disk is gone"]
    peers = SimpleNamespace(gather=lambda _: answers[len(taken) - 1])
    monkeypatch.setattr(probe, "_first_images", lambda *_: taken.append("images"))
    monkeypatch.setattr(probe, "_pass", lambda *_: taken.append("pass"))
    with pytest.raises(ValueError, match="process 1: a disk is gone"):
        probe.check_pass(SimpleNamespace(world=peers), None, None, None)
    assert taken == ["images", "pass"][: failing + 1]
