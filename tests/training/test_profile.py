"""Where the time of a step goes: which parts are timed, and what is concluded from them."""

import itertools
import json
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import fastkd
from fastkd.cli import main
from fastkd.config import Recipe
from fastkd.data.batches import Batch
from fastkd.training import profile as steps
from fastkd.training.profile import (
    FULL,
    INPUT,
    LOADER,
    OPTIMIZER,
    STUDENT,
    TEACHER,
    UPDATE,
    Breakdown,
    Part,
    bench_step,
)
from fastkd.training.updates import Engine
from fastkd.utils.distributed import World
from tests.harness.tiny import image_folder

NAMES = [
    *(LOADER, INPUT, TEACHER, steps.FORWARD, STUDENT),
    *(OPTIMIZER, UPDATE, FULL),
]
TINY = {
    "model": "test_vit",
    "variant": "lift",
    "width": 64,
    "img_size": 32,
    "teacher_img_size": 32,
    "projector": "lift",
    "alpha": 0.5,
    "batch_size": 6,
    "workers": 0,
    "amp": "none",
    "ema_decay": 0.9,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return image_folder(tmp_path_factory.mktemp("images"))


def made(**seconds):
    """A breakdown of parts that take these seconds, 10 images an update."""
    full = seconds["full"]
    names = {
        **{"loader": LOADER, "input": INPUT, "teacher": TEACHER, "student": STUDENT},
        **{"optimizer": OPTIMIZER, "update": UPDATE, "full": FULL},
    }
    return steps._breakdown(
        {names[key]: [value, value] for key, value in seconds.items()}, 10
    ), full


def test_every_part_of_a_distillation_step_is_timed_in_order(folder):
    breakdown = bench_step(
        None, str(folder), "test_vit2", untrained=True, steps=2, device="cpu", **TINY
    )
    assert list(breakdown.parts) == NAMES
    assert breakdown.images == 6
    assert breakdown.peak_memory is None  # measured on a GPU only


def test_without_a_teacher_none_is_timed(folder):
    breakdown = bench_step(
        None, str(folder), None, steps=2, device="cpu", model="test_vit", img_size=32,
        batch_size=6, workers=0, amp="none",
    )  # fmt: skip
    assert TEACHER not in breakdown.parts


def test_an_update_in_slices_counts_all_of_them(folder):
    breakdown = bench_step(
        None, str(folder), "test_vit2", untrained=True, steps=2, device="cpu",
        **TINY | {"batch_size": 8, "accumulation": 2},
    )  # fmt: skip
    assert breakdown.images == 8


def test_nothing_is_kept_on_the_device_for_single_parts_before_the_full_steps_peak_is_read(
    folder, monkeypatch
):
    events = []
    original = steps._works

    def works(engine, slices):
        events.append("batch and teacher's outputs are kept")
        return original(engine, slices)

    monkeypatch.setattr(steps, "_works", works)
    bench_step(
        None, str(folder), "test_vit2", untrained=True, steps=2, device="cpu",
        on_part=events.append, **TINY,
    )  # fmt: skip
    assert events[:3] == [LOADER, FULL, "batch and teacher's outputs are kept"]


def test_batches_of_workers_are_timed_in_groups_of_as_many(folder, monkeypatch):
    groups = []
    original = steps._timed

    def timed(work, clock, count, group):
        groups.append(group)
        return original(work, clock, count, group)

    monkeypatch.setattr(steps, "_timed", timed)
    bench_step(
        None, str(folder), "test_vit2", untrained=True, steps=2, device="cpu",
        **TINY | {"workers": 2},
    )  # fmt: skip
    assert groups == [2, 2] + [1] * (len(NAMES) - 2)


class Workers:
    """A loader on a clock of its own: it makes a batch a second, until its queue is full."""

    num_workers, prefetch_factor = 2, 8

    def __init__(self):
        self.now = 0.0

    def __iter__(self):
        made, taken = 0.0, []
        for number in itertools.count():
            place = number - self.num_workers * self.prefetch_factor
            made = 1 + max(made, taken[place] if place >= 0 else 0)
            self.now = max(self.now, made)
            taken.append(self.now)
            yield Batch(torch.zeros(2, 3), torch.zeros(2), torch.zeros(2))

    def work(self, seconds):
        self.now += seconds


@pytest.mark.parametrize("update", [0.1, 0.9, 3.0])
def test_a_full_step_is_no_faster_than_its_loader_after_a_slow_first_update(monkeypatch, update):
    loader = Workers()
    durations = itertools.chain([60.0], itertools.repeat(update))  # the first one compiles

    def run_update(slices):
        loader.work(next(durations))

    engine = SimpleNamespace(
        task=nn.Identity(),
        config=Recipe(),
        world=World(torch.device("cpu")),
        update=run_update,
    )
    pieces = dict.fromkeys((INPUT, STUDENT, OPTIMIZER, UPDATE), lambda: loader.work(update))
    monkeypatch.setattr(steps, "_works", lambda engine, slices: pieces)
    monkeypatch.setattr(steps, "time", SimpleNamespace(perf_counter=lambda: loader.now))
    parts = steps.measure_step(engine, loader, steps=20).parts
    assert parts[LOADER].seconds == pytest.approx(1)
    assert parts[FULL].seconds == pytest.approx(max(1, update), rel=0.1)


def test_the_student_alone_neither_prepares_nor_asks_the_teacher_and_makes_the_updates_gradient(
    folder, monkeypatch
):
    seen = {}

    def compare(engine, slices):
        batches = [slices[0], slices[0]]  # two slices of an update
        works = original(engine, batches)
        monkeypatch.setattr(Engine, "backward", record)
        works[STUDENT]()
        monkeypatch.setattr(Engine, "backward", backward)
        seen["student"] = [p.grad.clone() for p in engine.parameters]
        engine.optimizer.zero_grad()
        for batch in batches:
            engine.backward(batch, share=0.5, synchronize=True)
        seen["engine"] = [p.grad.clone() for p in engine.parameters]
        monkeypatch.setattr(engine.teacher, "forward", lambda images: pytest.fail("asked"))
        works[STUDENT]()
        monkeypatch.undo()
        return works

    def record(engine, batch, share, synchronize):
        seen.setdefault("synchronized", []).append(synchronize)
        return backward(engine, batch, share, synchronize)

    original, backward = steps._works, Engine.backward
    monkeypatch.setattr(steps, "_works", compare)
    bench_step(None, str(folder), "test_vit2", untrained=True, steps=2, device="cpu", **TINY)
    torch.testing.assert_close(seen["student"], seen["engine"])
    assert seen["synchronized"] == [False, True]


def test_untrained_leaves_a_local_run_as_it_is(folder, tmp_path, monkeypatch):
    run = fastkd.train(
        "test_vit2", None, str(folder), tmp_path / "run", img_size=32, epochs=1, warmup_epochs=0,
        batch_size=6, workers=0, lr_scaling=False, amp="none", device="cpu", quiet=True,
    )  # fmt: skip
    monkeypatch.setattr(steps, "create_teacher", lambda *_, **__: pytest.fail("built anew"))
    options = TINY | {"teacher_img_size": None}
    breakdown = bench_step(
        None, str(folder), run.output, untrained=True, steps=2, device="cpu", **options
    )
    assert TEACHER in breakdown.parts


@pytest.mark.parametrize(
    ("teacher", "message"),
    [(None, "untrained=True expects .* got none"), (nn.Identity(), "by its name, got a module")],
)
def test_untrained_needs_a_teachers_name(folder, teacher, message):
    with pytest.raises(ValueError, match=message):
        bench_step(None, str(folder), teacher, untrained=True, device="cpu", model="test_vit")


def test_the_generators_are_left_as_they_were(folder):
    before = torch.get_rng_state()
    bench_step(None, str(folder), "test_vit2", untrained=True, steps=2, device="cpu", **TINY)
    assert torch.equal(torch.get_rng_state(), before)


def test_one_step_has_no_quartiles_and_is_refused(folder):
    with pytest.raises(ValueError, match="steps must be at least 2, got 1"):
        bench_step(None, str(folder), "test_vit2", untrained=True, steps=1, device="cpu", **TINY)


def test_without_data_the_error_says_so():
    with pytest.raises(ValueError, match="data is missing"):
        bench_step(None, None, None, model="test_vit")


def test_a_slow_loader_limits():
    breakdown, _ = made(
        loader=2.0, input=0.1, teacher=0.5, student=0.3, optimizer=0.1, update=1.0, full=2.0
    )
    assert breakdown.limit == LOADER
    assert breakdown.sentence() == (
        "The loader limits: it yields 5 images/s, an update could take 10."
    )


def test_with_a_fast_loader_the_largest_piece_of_the_update_limits():
    breakdown, _ = made(
        loader=0.5, input=0.1, teacher=0.7, student=0.3, optimizer=0.1, update=1.0, full=1.0
    )
    assert breakdown.limit == TEACHER
    assert breakdown.sentence() == (
        f"The update limits, most of all {TEACHER!r} (70 % of it); the loader could "
        "yield 2.0 times what an update takes."
    )


def test_shares_and_speeds_follow_from_medians():
    breakdown = steps._breakdown(
        {LOADER: [1, 2, 9], INPUT: [1] * 3, UPDATE: [1] * 3, FULL: [4] * 3}, 8
    )
    assert breakdown.parts[LOADER] == Part(LOADER, 2, 1.5, 5.5, 4, 0.5)
    assert isinstance(breakdown, Breakdown)


def test_the_command_prints_the_table_and_writes_json(folder, tmp_path, capsys):
    output = tmp_path / "steps.json"
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in TINY.items()]
    status = main(
        [
            *("bench-step", "--data", str(folder), "--teacher", "test_vit2", "--untrained"),
            *("--steps", "2", "--device", "cpu", "--output", str(output), *flags),
        ]
    )
    printed = capsys.readouterr().out
    record = json.loads(output.read_text())
    assert status == 0
    assert all(name in printed for name in NAMES)
    assert list(record["parts"]) == NAMES
    assert record["sentence"] in printed


def test_the_command_makes_images_where_it_is_given_none(capsys):
    status = main(
        [
            *("bench-step", "--model", "test_vit", "--img-size", "32", "--batch-size", "4"),
            *("--workers", "0", "--amp", "none", "--steps", "2", "--device", "cpu"),
        ]
    )
    assert status == 0
    assert LOADER in capsys.readouterr().out


def test_times_that_lie_far_apart_are_given_no_verdict():
    breakdown = steps._breakdown(
        {LOADER: [2, 2, 2], INPUT: [1] * 3, UPDATE: [0.1, 1, 9], FULL: [4] * 3}, 8
    )
    assert breakdown.sentence().startswith("Too unsteady to say what limits: ")
