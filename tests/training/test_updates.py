"""The loops: one update, its precision and its safety, and evaluation."""

import copy
import math
import threading
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from timm.utils import ModelEmaV3
from torch import nn

from fastkd.config import Recipe
from fastkd.data.batches import Batch, Fault
from fastkd.data.streaming import StreamSource
from fastkd.data.transforms import InputSpec
from fastkd.inference.evaluate import evaluate_model
from fastkd.training.logging import RunLogger
from fastkd.training.optim import build_optimizer
from fastkd.training.state import Identity, RunState
from fastkd.training.task import build_task
from fastkd.training.trainer import train_one_epoch
from fastkd.training.updates import Engine, NonFiniteError
from fastkd.utils.distributed import StopRequest, World
from tests.harness.tiny import tensor_data, vit

WORLD = World(torch.device("cpu"))
IMAGES, LABELS = (part[:8] for part in tensor_data()[0].tensors)


def engine_for(student, ema_decay=None, **options):
    recipe = Recipe(
        **{"lr": 1e-2, "lr_scaling": False, "warmup_epochs": 0, "amp": "none", **options}
    )
    task = build_task(student, None, recipe, IMAGES[:1])
    optimizer, scheduler = build_optimizer(task, recipe, 10)
    ema = None if ema_decay is None else ModelEmaV3(student, decay=ema_decay)
    return Engine(task, None, optimizer, scheduler, config=recipe, world=WORLD, ema=ema)


def batch(images=IMAGES, labels=LABELS):
    return Batch(images, labels, torch.arange(len(images)))


def gradients(student):
    return torch.cat([p.grad.flatten() for p in student.parameters()])


def test_accumulated_slices_give_the_gradient_of_the_whole_batch():
    whole, sliced = vit(), vit()
    engine_for(whole).update([batch()])
    engine_for(sliced).update([batch(IMAGES[:4], LABELS[:4]), batch(IMAGES[4:], LABELS[4:])])
    torch.testing.assert_close(gradients(sliced), gradients(whole), atol=1e-6, rtol=1e-4)


def test_clipping_bounds_the_gradients_norm():
    student = vit()
    engine = engine_for(student, clip_grad=1e-3)
    engine.update([batch()])
    assert gradients(student).norm().item() == pytest.approx(1e-3, rel=1e-3)
    assert engine.read().sums["grad_norm"] > 1e-3  # logged as it was


def test_ema_follows_the_students_weights():
    student = vit()
    engine = engine_for(student, ema_decay=0.75)
    before = student.head.weight.detach().clone()
    engine.update([batch()])
    expected = 0.75 * before + 0.25 * student.head.weight
    torch.testing.assert_close(engine.ema.module.head.weight, expected)


def test_the_meter_sums_terms_over_updates():
    engine = engine_for(vit(), label_smoothing=0.0)
    with torch.no_grad():
        first = F.cross_entropy(engine.task.student(IMAGES), LABELS).item()
    engine.update([batch()])
    assert engine.read().sums["loss"] == pytest.approx(first, rel=1e-5)
    engine.update([batch()])
    assert engine.meter.count == 2
    assert first < engine.read().sums["loss"] < 2 * first


def test_an_update_draws_the_same_numbers_whatever_was_drawn_before():
    students = [vit(proj_drop_rate=0.5).train() for _ in range(2)]
    for count, student in enumerate(students):
        torch.rand(17 * count)
        engine_for(student).update([batch()])
    assert torch.equal(gradients(students[0]), gradients(students[1]))


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_autocast_trains_close_to_full_precision(amp):
    full, half = vit(), vit()
    engine_for(full).update([batch()])
    engine = engine_for(half, amp=amp)
    engine.update([batch()])
    assert all(p.dtype == torch.float32 for p in half.parameters())
    cosine = F.cosine_similarity(gradients(full), gradients(half), dim=0)
    assert cosine > 0.99
    assert engine.read().sums["loss"] == pytest.approx(
        F.cross_entropy(vit()(IMAGES), LABELS, label_smoothing=0.1).item(), rel=2e-2
    )


def test_an_overflow_in_fp16_skips_the_update_and_is_counted():
    student = vit()
    engine = engine_for(student, amp="fp16")
    engine.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**120)
    before = student.head.weight.detach().clone()
    engine.update([batch()])
    assert torch.equal(student.head.weight, before)
    reading = engine.read()
    assert (reading.applied, reading.skipped) == (0, 1)
    assert reading.sums["grad_norm"] == 0


BROKEN = torch.full_like(IMAGES, math.inf)


@pytest.mark.parametrize("amp", ["none", "bf16"])
def test_an_update_that_is_not_finite_changes_neither_weights_nor_moments(amp):
    student = nn.Sequential(nn.BatchNorm2d(1), vit())
    engine = engine_for(student, amp=amp)
    engine.update([batch()])
    before = {name: value.clone() for name, value in student.state_dict().items()}
    moments = [s["exp_avg"].clone() for s in engine.optimizer.state.values()]
    engine.update([batch(BROKEN)])
    assert all(torch.equal(before[name], value) for name, value in student.state_dict().items())
    after = [s["exp_avg"] for s in engine.optimizer.state.values()]
    assert all(torch.equal(a, b) for a, b in zip(moments, after, strict=True))
    engine.update([batch()])
    assert not torch.equal(before["1.head.weight"], student[1].head.weight)
    reading = engine.read()
    assert (reading.applied, reading.skipped, reading.longest_row) == (2, 1, 1)


def test_a_skipped_update_is_listed_once_with_its_samples():
    engine = engine_for(vit())
    for images in (IMAGES, BROKEN, IMAGES):
        engine.update([batch(images)])
    (skipped,) = engine.skipped_updates()
    engine.forget_skipped()
    assert (skipped.update, skipped.samples, skipped.finite_loss) == (2, list(range(8)), False)
    assert engine.skipped_updates() == []


def test_a_skipped_update_leaves_the_means_alone():
    clean, mixed = engine_for(vit()), engine_for(vit())
    for images in (IMAGES, BROKEN):
        mixed.update([batch(images)])
    clean.update([batch()])
    means = [engine.read().record(None, 1) for engine in (mixed, clean)]
    assert means[0] | {"skipped_updates": 0, "seconds": means[1]["seconds"]} == means[1]


class Intervals(RunLogger):
    """Keeps the records of intervals."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options, quiet=True)
        self.records = []

    def interval(self, record):
        self.records.append(record)


def run_epoch(engine, batches):
    recipe = engine.config.override(log_interval=2)
    spec = InputSpec((1, 8, 8), None, None)
    run = RunState(engine, Identity(recipe, spec, 6, 8, None, 80, None, 10), None, "top1")
    logger = Intervals(None, recipe, len(batches))
    return train_one_epoch(run, batches, logger, StopRequest()), logger.records


def test_a_skipped_update_leaves_no_trace_in_the_emas_statistics():
    student = nn.Sequential(nn.BatchNorm2d(1), vit())
    engine = engine_for(student, ema_decay=0.5)
    engine.update([batch(BROKEN)])
    assert all(value.isfinite().all() for value in engine.ema.module.state_dict().values())


class Scaled(nn.Module):
    """Gives logits of one image apart a value of its own, or a gradient."""

    def __init__(self, gradient=1.0, value=0.0):
        super().__init__()
        self.layer = nn.Linear(64, 6)
        self.gradient, self.value = gradient, value

    def forward(self, images):
        logits = self.layer(images.flatten(1))
        return logits + self.gradient * (logits - logits.detach()) + self.value


@pytest.mark.parametrize("clip_grad", [None, 1.0])
def test_a_gradient_whose_norm_overflows_is_skipped_as_it_is_counted(clip_grad):
    student = Scaled(gradient=1e30)
    engine = engine_for(student, clip_grad=clip_grad)
    before = student.layer.weight.detach().clone()
    engine.update([batch()])
    assert engine.read().skipped == 1
    assert torch.equal(student.layer.weight, before)


def test_a_loss_that_is_not_finite_is_skipped_though_its_gradient_is_zero():
    student = vit()
    engine = engine_for(student)
    before = student.head.weight.detach().clone()
    engine.apply(torch.full_like(engine.meter.sums[:-1], math.nan))
    assert torch.equal(student.head.weight, before)
    assert (engine.read().applied, engine.read().skipped) == (0, 1)


def test_an_update_that_is_interrupted_puts_running_statistics_back():
    student = nn.Sequential(nn.BatchNorm2d(1), vit())
    engine = engine_for(student)
    before = student[0].running_mean.clone()

    def interrupt(*parts):
        raise KeyboardInterrupt

    student.register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        engine.update([batch()])
    assert torch.equal(student[0].running_mean, before)
    assert student[0].num_batches_tracked == 0
    assert engine.position.total == 0


def test_an_epoch_without_one_applied_update_is_an_error():
    with pytest.raises(NonFiniteError, match="every update was skipped"):
        run_epoch(engine_for(vit()), [batch(BROKEN)] * 2)


def test_an_unknown_autocast_type_is_named():
    with pytest.raises(ValueError, match="amp: expected none, bf16 or fp16, got 'float16'"):
        evaluate_model(vit(), [batch()], WORLD, "float16")


def test_too_many_updates_in_a_row_that_are_not_finite_end_the_run():
    engine = engine_for(vit(), max_nonfinite=2)
    with pytest.raises(NonFiniteError, match=r"3 updates in a row.*update 3 in epoch 1.*clip_grad"):
        run_epoch(engine, [batch(BROKEN)] * 5)


def test_skipped_updates_that_do_not_follow_each_other_end_nothing():
    engine = engine_for(vit(), max_nonfinite=1)
    record, _ = run_epoch(engine, [batch(), batch(BROKEN)] * 3)
    assert record["skipped_updates"] == 3


@pytest.mark.slow
def test_a_compiled_task_takes_the_same_step():
    eager, compiled = vit(), vit()
    engine_for(eager).update([batch()])
    engine_for(compiled, compile="default").update([batch()])
    torch.testing.assert_close(gradients(compiled), gradients(eager), atol=1e-5, rtol=1e-4)
    assert compiled.state_dict().keys() == eager.state_dict().keys()


def test_channels_last_changes_the_layout_alone():
    plain = nn.Sequential(nn.Conv2d(1, 6, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    strided = copy.deepcopy(plain)
    engine_for(plain).update([batch()])
    engine_for(strided, channels_last=True).update([batch()])
    assert strided[0].weight.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(gradients(strided), gradients(plain))


def test_an_epochs_record_holds_means_and_throughput():
    engine = engine_for(vit())
    record, records = run_epoch(engine, [batch()] * 5)
    assert [r["update"] for r in records] == [2, 4]
    sums = engine.read().sums
    assert record["loss"] == pytest.approx(sums["loss"] / 5)
    # The epoch's mean is that of its updates: two, two, and the last.
    last = sums["loss"] - 2 * sum(r["loss"] for r in records)
    assert min(r["loss"] for r in records) > last > 0
    assert record["update"] == 5
    assert {"ce", "grad_norm", "lr", "images_per_second", "data_wait"} <= set(record)


def lr_of_updates(accumulation):
    engine = engine_for(
        vit(), epochs=3, warmup_epochs=1, warmup_lr=1e-4, min_lr=1e-3, accumulation=accumulation
    )
    rates = [engine.lr]
    for _ in range(30):
        engine.update([batch(IMAGES[:2], LABELS[:2])] * accumulation)
        rates.append(engine.lr)
    return rates


def test_the_learning_rate_rises_to_its_peak_and_falls_to_its_end():
    rates = lr_of_updates(1)
    assert rates[0] == pytest.approx(1e-4)
    assert rates[9] == pytest.approx(1e-4 + (1e-2 - 1e-4) * 9 / 10)
    # timm's cosine counts the warm-up as part of its course: update 10 of 30.
    cosine = [1e-3 + (1e-2 - 1e-3) * (1 + math.cos(math.pi * t / 30)) / 2 for t in range(31)]
    assert rates[10:] == pytest.approx(cosine[10:])
    assert rates[29] > rates[30] == pytest.approx(1e-3)


def test_the_learning_rate_counts_updates_not_slices():
    assert lr_of_updates(2) == lr_of_updates(1)


def test_evaluation_counts_hits_and_averages_the_loss():
    model = vit()
    loader = [batch(IMAGES[:5], LABELS[:5]), batch(IMAGES[5:], LABELS[5:])]
    measured = evaluate_model(model, loader, WORLD)
    with torch.no_grad():
        logits = model.eval()(IMAGES)
    rank = (logits > logits.gather(1, LABELS[:, None])).sum(1)
    assert measured["top1"] == pytest.approx(100 * (rank < 1).float().mean().item())
    assert measured["top5"] == pytest.approx(100 * (rank < 5).float().mean().item())
    assert measured["loss"] == pytest.approx(F.cross_entropy(logits, LABELS).item(), rel=1e-5)
    assert measured["count"] == 8


def test_top5_is_left_out_below_five_classes():
    measured = evaluate_model(vit(num_classes=4), [batch(IMAGES[:3], LABELS[:3])], WORLD)
    assert measured["top5"] is None


class Gives(nn.Module):
    """Gives logits whatever the images are, a batch's after the other's."""

    def __init__(self, *logits):
        super().__init__()
        self.logits = iter(logits)

    def forward(self, images):
        return next(self.logits)


NAN, INF = math.nan, math.inf


@pytest.mark.parametrize(
    ("row", "finite"),
    [
        ([NAN, 0, 0], False),
        ([0, 0, NAN], False),
        ([INF, 0, 0], False),
        ([INF, -INF, 0], False),
        ([-INF, -INF, -INF], False),
        ([9, 0, -INF], True),  # a class that the model masks
    ],
)
def test_an_image_without_finite_logits_counts_as_wrong_and_is_told(row, finite):
    logits, labels = torch.tensor([[5.0, 0, 0], row]), torch.tensor([0, 0])
    told = []
    measured = evaluate_model(Gives(logits), [batch(IMAGES[:2], labels)], WORLD, warn=told.append)
    used = logits if finite else logits[:1]
    assert measured == {
        "top1": 100.0 if finite else 50.0,
        "top5": None,
        "loss": pytest.approx(F.cross_entropy(used, labels[: len(used)]).item()),
        "count": 2,
        "unreadable": 0,
        "nonfinite": int(not finite),
    }
    assert [line[:6] for line in told] == ([] if finite else ["1 of 2"])


def test_a_model_of_nan_has_no_hit_and_no_loss():
    logits = torch.full((8, 6), NAN)
    measured = evaluate_model(Gives(logits), [batch()], WORLD, warn=lambda _: None)
    assert (measured["top1"], measured["top5"], measured["nonfinite"]) == (0, 0, 8)
    assert math.isnan(measured["loss"])


def lost(*numbers):
    return tuple(Fault(number, f"{number}.jpg", "torn") for number in numbers)


EMPTY = Batch(torch.empty(0), torch.empty(0, dtype=torch.int64), torch.empty(0))


def test_unreadable_images_count_as_wrong_and_three_are_named():
    sure = torch.eye(10)[LABELS] * 30
    loader = [batch()._replace(faults=lost(9, 8)), EMPTY._replace(faults=lost(7, 3))]
    told = []
    measured = evaluate_model(Gives(sure), loader, WORLD, warn=told.append)
    assert (measured["count"], measured["unreadable"], measured["nonfinite"]) == (12, 4, 0)
    assert measured["top1"] == measured["top5"] == pytest.approx(100 * 8 / 12)
    assert measured["loss"] < 1e-3
    (line,) = told
    assert line == (
        "4 of 12 evaluation images cannot be read and count as wrong: "
        "3.jpg (torn); 7.jpg (torn); 8.jpg (torn); ..."
    )


@dataclass(frozen=True)
class Rank(World):
    """One of two processes, which are threads here."""

    meeting: threading.Barrier | None = None
    given: list | None = None

    def gather(self, value):
        self.given[self.rank] = value
        self.meeting.wait(20)
        values = list(self.given)
        self.meeting.wait(20)
        return values

    def sum(self, values):
        return sum(self.gather(values))


@pytest.mark.parametrize(
    "shares",
    [
        ([batch()], [batch()._replace(faults=lost(3))]),
        ([EMPTY._replace(faults=lost(0, 1, 2))], [batch(), EMPTY._replace(faults=lost(5))]),
        ([batch()], []),  # fewer images than processes
    ],
)
def test_all_processes_agree_on_what_is_unreadable(shares):
    meeting, given, told = threading.Barrier(2), [None, None], ([], [])
    measured = [None, None]

    def evaluated(rank):
        world = Rank(torch.device("cpu"), rank, 2, None, meeting, given)
        model = Gives(*(torch.full((8, 6), NAN) for _ in range(2)))
        measured[rank] = evaluate_model(model, shares[rank], world, warn=told[rank].append)

    threads = [threading.Thread(target=evaluated, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert str(measured[0]) == str(measured[1])  # NaN is not equal to itself
    faults = sum(len(part.faults) for share in shares for part in share)
    images = sum(len(part.labels) for share in shares for part in share)
    assert (measured[0]["count"], measured[0]["unreadable"]) == (images + faults, faults)
    assert measured[0]["nonfinite"] == images and measured[0]["top5"] == 0
    assert (len(told[0]), len(told[1])) == (1 + bool(faults), 0)


def test_an_evaluation_of_nothing_but_unreadable_images_is_an_error():
    with pytest.raises(OSError, match=r"2 of 2 evaluation images .*: 0\.jpg \(torn\); 4\.jpg"):
        evaluate_model(vit(), [EMPTY._replace(faults=lost(4, 0))], WORLD)


@pytest.mark.parametrize("ranked_by", ["top1", "ema_top1", "eval_loss"])
def test_an_epoch_without_finite_logits_is_never_the_best(ranked_by):
    recipe = Recipe(epochs=3, warmup_epochs=0)
    identity = Identity(recipe, InputSpec((3, 32, 32), None, None), 10, 32, None, 8, None, 1)
    run = RunState(engine_for(vit()), identity, None, ranked_by)
    broken = {"epoch": 1, "top1": 0.0, "ema_top1": 0.0, "eval_loss": NAN}
    broken |= {"eval_nonfinite": 8, "ema_nonfinite": 8}
    assert not run.finish_epoch(broken)
    assert run.best["epoch"] == 0
    assert run.finish_epoch({"epoch": 2, "top1": 0.0, "ema_top1": 0.0, "eval_loss": 9.0})
    assert not run.finish_epoch(broken | {"epoch": 3})
    assert run.best["epoch"] == 2


def test_evaluation_puts_the_training_mode_back():
    model = vit().train()
    evaluate_model(model, [batch()], WORLD)
    assert model.training


class Shortened(list):
    """A stream's loader that has lost an image on the way."""

    dataset = SimpleNamespace(source=StreamSource("wds/shards", "validation", 9, None))


def test_an_evaluation_of_fewer_images_than_a_stream_states_is_refused():
    with pytest.raises(ValueError, match=r"8 of the 9 images that wds/shards .*validation"):
        evaluate_model(vit(), Shortened([batch()]), WORLD)
