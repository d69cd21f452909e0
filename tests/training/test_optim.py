"""Optimizers and schedules by timm's names: skipped updates, exact resume, learning rates."""

import copy
import inspect
import io
import math

import pytest
import torch
from timm.scheduler import create_scheduler_v2

from fastkd.config import Recipe
from fastkd.training.optim import (
    LOOKAHEAD,
    SCHEDULE_OPTIONS,
    build_optimizer,
    optimizer_names,
    skips_on_device,
)
from fastkd.training.updates import knows_found_inf
from tests.harness.tiny import vit
from tests.training.test_updates import BROKEN, batch, engine_for

NAMES = optimizer_names()
FUSED = {"adam", "adamw", "adagrad", "sgd", "momentum", "nesterov"}
# Lookahead is one class around all of them: two stand for it in the fast tests.
EVERY = [
    *NAMES,
    *("lookahead_adamw", "lookahead_lion"),
    *(
        pytest.param(LOOKAHEAD + name, marks=pytest.mark.slow)
        for name in NAMES
        if name not in ("adamw", "lion")
    ),
]
UPDATES, STOPPED = 8, 3  # timm's Lookahead moves at update 6, RAdam rectifies from there on


def state_of(engine):
    """Whatever an update may change but position, schedule and EMA, as copies."""
    student, optimizer = engine.task.student.state_dict(), engine.optimizer.state_dict()
    return copy.deepcopy({"student": student, "state": optimizer["state"]})


def same(left, right):
    """Whether nested containers hold equal bits."""
    if isinstance(left, torch.Tensor):
        return left.dtype == right.dtype and torch.equal(left, right)
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[k], right[k]) for k in left)
    if isinstance(left, list | tuple):
        return len(left) == len(right) and all(map(same, left, right))
    return left == right


@pytest.mark.parametrize("opt", EVERY)
def test_a_run_resumes_exactly_with_every_optimizer(opt):
    whole, first = (engine_for(vit(), opt=opt, warmup_epochs=1, epochs=2) for _ in range(2))
    for _ in range(UPDATES):
        whole.update([batch()])
    for _ in range(STOPPED):
        first.update([batch()])
    parts = (first.task.student, first.optimizer, first.scheduler)
    file = io.BytesIO()
    torch.save([part.state_dict() for part in parts], file)
    file.seek(0)
    second = engine_for(vit(seed=9), opt=opt, warmup_epochs=1, epochs=2)
    parts = (second.task.student, second.optimizer, second.scheduler)
    for part, state in zip(parts, torch.load(file, weights_only=True), strict=True):
        part.load_state_dict(state)
    second.position = first.position
    for _ in range(UPDATES - STOPPED):
        second.update([batch()])
    assert same(state_of(second), state_of(whole))
    assert second.lr == whole.lr
    assert not torch.equal(whole.task.student.head.weight, vit().head.weight)


@pytest.mark.parametrize("opt", EVERY)
def test_an_update_that_is_not_finite_leaves_every_optimizer_alone(opt):
    engine = engine_for(vit(), opt=opt)
    engine.update([batch()])
    before = state_of(engine)
    engine.update([batch(BROKEN)])
    assert same(state_of(engine), before)
    assert engine.position.total == 2
    engine.update([batch()])
    assert not torch.equal(engine.task.student.head.weight, before["student"]["head.weight"])
    assert all(value.isfinite().all() for value in engine.task.student.state_dict().values())
    reading = engine.read()
    assert (reading.applied, reading.skipped) == (2, 1)


@pytest.mark.parametrize("opt", [*sorted(FUSED), "lion", "lookahead_sgd"])
def test_a_first_update_that_is_not_finite_leaves_no_trace(opt):
    clean, broken = engine_for(vit(), opt=opt), engine_for(vit(), opt=opt)
    broken.update([batch(BROKEN)])
    clean.position.total = 1
    clean.scheduler.step_update(1)
    for engine in (clean, broken):
        engine.update([batch()])
    assert same(state_of(broken), state_of(clean))


@pytest.mark.parametrize("opt", NAMES)
def test_torchs_fused_optimizers_alone_skip_on_the_device(opt):
    engine = engine_for(vit(), opt=opt)
    engine.update([batch()])
    assert knows_found_inf(engine.optimizer) == skips_on_device(opt)
    if opt != "adagrad":  # in torch 2.11 its fused step does not know found_inf
        assert skips_on_device(opt) == (opt in FUSED)


@pytest.mark.parametrize("opt", NAMES)
def test_every_optimizer_gets_lr_and_weight_decay(opt):
    groups = engine_for(vit(), opt=opt, lr=0.02, weight_decay=0.3).optimizer.param_groups
    assert {group["weight_decay"] for group in groups} == {0.0, 0.3}
    assert {group["lr"] for group in groups} == {0.02}


def test_adam_eps_reaches_optimizers_with_an_epsilon_like_adamws():
    taking = {opt for opt in NAMES if eps_of(opt, adam_eps=1e-3) == 1e-3}
    assert {"adamw", "adam", "nadamw", "radam", "adan", "adamp"} < taking
    assert not taking & {"lamb", "adafactor", "adabelief", "rmsprop", "lion", "sgd"}
    assert eps_of("lamb", opt_kwargs={"eps": 1e-4}) == 1e-4


def eps_of(opt, **options):
    return engine_for(vit(), opt=opt, **options).optimizer.param_groups[0].get("eps")


def test_options_reach_the_optimizer():
    options = {"betas": [0.8, 0.9], "amsgrad": True}
    group = engine_for(vit(), opt_kwargs=options).optimizer.param_groups[0]
    assert (group["betas"], group["amsgrad"], group["fused"]) == ((0.8, 0.9), True, True)


EPOCHS, PER_EPOCH = 12, 10
SCHEDULES = [
    ("cosine", {}),
    ("cosine", {"k_decay": 1.5}),
    ("cosine", {"cycle_limit": 3, "cycle_decay": 0.5}),
    ("cosine", {"cycle_limit": 2, "cycle_mul": 2}),
    ("cosine", {"cooldown_epochs": 3}),
    ("cosine", {"warmup_prefix": True}),
    ("poly", {"decay_rate": 2}),
    ("tanh", {}),
    ("step", {"decay_epochs": 4, "decay_rate": 0.5}),
    ("step", {"decay_epochs": 2.5}),
    ("step", {"decay_epochs": 4, "warmup_prefix": True}),
]


def rates(sched, options, **fields):
    """The learning rate before each update, and after the last."""
    recipe = Recipe(
        **{"epochs": EPOCHS, "warmup_epochs": 2, "lr": 1.0, "lr_scaling": False, "min_lr": 0.01}
        | {"warmup_lr": 0.1, "sched": sched, "sched_kwargs": options}
        | fields
    )
    optimizer, scheduler = build_optimizer(engine_for(vit()).task, recipe, PER_EPOCH)
    found = [optimizer.param_groups[0]["lr"]]
    for update in range(1, EPOCHS * PER_EPOCH + 1):
        scheduler.step_update(update)
        found.append(optimizer.param_groups[0]["lr"])
    return found


def first_cycle(options):
    """How long timm must be told that a schedule is, for the run to have EPOCHS epochs."""
    around = options.get("cooldown_epochs", 0) + 2 * options.get("warmup_prefix", False)
    growth, cycles = options.get("cycle_mul", 1), range(options.get("cycle_limit", 1))
    return (EPOCHS - around) // sum(growth**cycle for cycle in cycles)


@pytest.mark.parametrize(("sched", "options"), SCHEDULES, ids=str)
def test_an_epoch_begins_with_timms_learning_rate_of_that_epoch(sched, options):
    stand_in = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=1.0)
    scheduler, length = create_scheduler_v2(
        stand_in,
        sched=sched,
        num_epochs=first_cycle(options),
        warmup_epochs=2,
        warmup_lr=0.1,
        min_lr=0.01,
        **options,
    )
    assert length == EPOCHS
    expected = [stand_in.param_groups[0]["lr"]]
    for epoch in range(1, EPOCHS + 1):
        scheduler.step(epoch)
        expected.append(stand_in.param_groups[0]["lr"])
    assert rates(sched, options)[::PER_EPOCH] == pytest.approx(expected)


def test_milestones_are_counted_in_epochs_and_reached_one_update_early_as_timm_does():
    found = rates("multistep", {"decay_milestones": [4, 9]}, warmup_epochs=0)
    assert found == pytest.approx([1.0] * 39 + [0.1] * 50 + [0.01] * 32)


def test_learning_rates_within_an_epoch_follow_their_formulas():
    share = [update / (EPOCHS * PER_EPOCH) for update in range(EPOCHS * PER_EPOCH + 1)]
    at = [25, 63, 111]
    cosine, poly = rates("cosine", {}), rates("poly", {"decay_rate": 2})
    tanh, step = rates("tanh", {}), rates("step", {"decay_epochs": 4})
    for n in at:
        s = share[n]
        assert cosine[n] == pytest.approx(0.01 + 0.99 * (1 + math.cos(math.pi * s)) / 2)
        assert poly[n] == pytest.approx(0.01 + 0.99 * (1 - s) ** 2)
        assert tanh[n] == pytest.approx(0.01 + 0.99 * (1 - math.tanh(-7 * (1 - s) + 3 * s)) / 2)
        assert step[n] == pytest.approx(0.1 ** (n // 40))
    assert cosine[:20] == pytest.approx([0.1 + 0.9 * n / 20 for n in range(20)])  # warm-up


def test_cycles_and_cooldown_are_part_of_the_epochs():
    cycles = rates("cosine", {"cycle_limit": 3, "cycle_decay": 0.5}, warmup_epochs=0)
    assert cycles[::40] == pytest.approx([1.0, 0.5, 0.25, 0.01])
    cooldown = rates("cosine", {"cooldown_epochs": 3})
    assert cooldown[89] > 0.01 == cooldown[90] == cooldown[-1]


def test_a_schedule_of_every_name_is_built_and_its_options_are_timms():
    assert set(SCHEDULE_OPTIONS) == {"cosine", "multistep", "poly", "step", "tanh"}
    known = inspect.signature(create_scheduler_v2).parameters
    assert all(set(options) <= known.keys() for options in SCHEDULE_OPTIONS.values())
