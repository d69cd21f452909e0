"""Where the time of a step goes: which parts are timed, and what is concluded from them."""

import json

import pytest
import torch

from fastkd.cli import main
from fastkd.training import steps
from fastkd.training.steps import (
    FULL,
    INPUT,
    LOADER,
    OPTIMISER,
    STUDENT,
    TEACHER,
    UPDATE,
    Breakdown,
    Part,
    bench_step,
)
from tests.training.tiny import image_folder

NAMES = [
    *(LOADER, INPUT, TEACHER, steps.FORWARD, STUDENT),
    *(OPTIMISER, UPDATE, FULL),
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
        **{"optimiser": OPTIMISER, "update": UPDATE, "full": FULL},
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
    assert all(part.seconds > 0 for part in breakdown.parts.values())
    assert breakdown.parts[FULL].share == 1


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


def test_batches_of_workers_are_timed_in_groups_of_as_many(folder, monkeypatch):
    seen = {}
    original = steps._Timing.run

    def run(timing, *arguments):
        seen[timing.group, timing.made_ahead] = seen.get((timing.group, timing.made_ahead), 0) + 1
        return original(timing, *arguments)

    monkeypatch.setattr(steps._Timing, "run", run)
    bench_step(
        None, str(folder), "test_vit2", untrained=True, steps=2, device="cpu",
        **TINY | {"workers": 2},
    )  # fmt: skip
    assert seen == {(2, 4): 1, (2, 0): 1, (1, 0): len(NAMES) - 2}


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
        loader=2.0, input=0.1, teacher=0.5, student=0.3, optimiser=0.1, update=1.0, full=2.0
    )
    assert breakdown.limit == LOADER
    assert breakdown.sentence() == (
        "The loader limits: it yields 5 images/s, an update could take 10."
    )


def test_with_a_fast_loader_the_largest_piece_of_the_update_limits():
    breakdown, _ = made(
        loader=0.5, input=0.1, teacher=0.7, student=0.3, optimiser=0.1, update=1.0, full=1.0
    )
    assert breakdown.limit == TEACHER
    assert breakdown.sentence() == (
        "The update limits, most of all the teacher's forward pass (70 % of it); the loader could "
        "yield 2.0 times what an update takes."
    )


def test_loader_and_update_that_stand_in_each_others_way_are_said_to():
    breakdown, _ = made(
        loader=1.0, input=0.1, teacher=0.5, student=0.3, optimiser=0.1, update=1.0, full=2.0
    )
    assert breakdown.sentence().endswith("they share the host's cores.")


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
