"""The loops: one update, its precision and its safety, and evaluation."""

import math

import pytest
import torch
import torch.nn.functional as F
from timm.utils import ModelEmaV3

from fastkd.training.distributed import World
from fastkd.training.engine import Engine, NonFiniteError, evaluate_model, train_one_epoch
from fastkd.training.recipe import Recipe
from fastkd.training.setup import build_optimizer
from fastkd.training.task import build_task
from tests.training.tiny import tensor_data, vit

WORLD = World(torch.device("cpu"))
IMAGES, LABELS = (part[:8] for part in tensor_data()[0].tensors)


def engine_for(student, ema_decay=None, **options):
    recipe = Recipe(
        **{"lr": 1e-2, "lr_scaling": False, "warmup_epochs": 0, "amp": "none", **options}
    )
    task = build_task(student, None, recipe, IMAGES[:1])
    optimizer, scheduler = build_optimizer(task, recipe, 10)
    ema = None if ema_decay is None else ModelEmaV3(student, decay=ema_decay)
    return Engine(
        task,
        None,
        optimizer,
        scheduler,
        ema=ema,
        mixup=None,
        world=WORLD,
        amp=recipe.amp,
        clip_grad=recipe.clip_grad,
    )


def gradients(student):
    return torch.cat([p.grad.flatten() for p in student.parameters()])


def test_accumulated_slices_give_the_gradient_of_the_whole_batch():
    whole, sliced = vit(), vit()
    engine_for(whole).update([(IMAGES, LABELS)])
    engine_for(sliced).update([(IMAGES[:4], LABELS[:4]), (IMAGES[4:], LABELS[4:])])
    torch.testing.assert_close(gradients(sliced), gradients(whole), atol=1e-6, rtol=1e-4)


def test_clipping_bounds_the_gradients_norm():
    student = vit()
    engine = engine_for(student, clip_grad=1e-3)
    engine.update([(IMAGES, LABELS)])
    assert gradients(student).norm().item() == pytest.approx(1e-3, rel=1e-3)
    assert engine.read_meter()["grad_norm"] > 1e-3  # logged as it was


def test_ema_follows_the_students_weights():
    student = vit()
    engine = engine_for(student, ema_decay=0.75)
    before = student.head.weight.detach().clone()
    engine.update([(IMAGES, LABELS)])
    expected = 0.75 * before + 0.25 * student.head.weight
    torch.testing.assert_close(engine.ema.module.head.weight, expected)


def test_the_meter_sums_terms_over_updates():
    engine = engine_for(vit(), label_smoothing=0.0)
    with torch.no_grad():
        first = F.cross_entropy(engine.task.student(IMAGES), LABELS).item()
    engine.update([(IMAGES, LABELS)])
    assert engine.read_meter()["loss"] == pytest.approx(first, rel=1e-5)
    engine.update([(IMAGES, LABELS)])
    assert engine.meter.count == 2
    assert first < engine.read_meter()["loss"] < 2 * first


def test_an_update_draws_the_same_numbers_whatever_was_drawn_before():
    students = [vit(proj_drop_rate=0.5).train() for _ in range(2)]
    for count, student in enumerate(students):
        torch.rand(17 * count)
        engine_for(student).update([(IMAGES, LABELS)])
    assert torch.equal(gradients(students[0]), gradients(students[1]))


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_autocast_trains_close_to_full_precision(amp):
    full, half = vit(), vit()
    engine_for(full).update([(IMAGES, LABELS)])
    engine = engine_for(half, amp=amp)
    engine.update([(IMAGES, LABELS)])
    assert all(p.dtype == torch.float32 for p in half.parameters())
    cosine = F.cosine_similarity(gradients(full), gradients(half), dim=0)
    assert cosine > 0.99
    assert engine.read_meter()["loss"] == pytest.approx(
        F.cross_entropy(vit()(IMAGES), LABELS, label_smoothing=0.1).item(), rel=2e-2
    )


def test_an_overflow_in_fp16_skips_the_update_and_is_counted():
    student = vit()
    engine = engine_for(student, amp="fp16")
    engine.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**120)
    before = student.head.weight.detach().clone()
    engine.update([(IMAGES, LABELS)])
    assert torch.equal(student.head.weight, before)
    assert engine.meter.skipped.item() == 1
    assert math.isfinite(engine.read_meter()["grad_norm"])


def test_a_loss_that_is_not_finite_is_an_error_naming_it():
    engine = engine_for(vit())
    broken = (torch.full_like(IMAGES, math.inf), LABELS)
    with pytest.raises(NonFiniteError, match=r"loss.*epoch 1.*update 1.*clip_grad"):
        train_one_epoch(
            engine,
            [broken],
            1,
            log_interval=10,
            on_interval=lambda record: None,
            after_update=lambda: None,
        )


def test_an_epochs_record_holds_means_and_throughput():
    engine, records = engine_for(vit()), []
    record = train_one_epoch(
        engine,
        [(IMAGES, LABELS)] * 5,
        1,
        log_interval=2,
        on_interval=records.append,
        after_update=lambda: None,
    )
    assert [r["update"] for r in records] == [2, 4]
    sums = engine.read_meter()
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
        engine.update([(IMAGES[:2], LABELS[:2])] * accumulation)
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
    loader = [(IMAGES[:5], LABELS[:5]), (IMAGES[5:], LABELS[5:])]
    measured = evaluate_model(model, loader, WORLD)
    with torch.no_grad():
        logits = model.eval()(IMAGES)
    rank = (logits > logits.gather(1, LABELS[:, None])).sum(1)
    assert measured["top1"] == pytest.approx(100 * (rank < 1).float().mean().item())
    assert measured["top5"] == pytest.approx(100 * (rank < 5).float().mean().item())
    assert measured["loss"] == pytest.approx(F.cross_entropy(logits, LABELS).item(), rel=1e-5)
    assert measured["count"] == 8


def test_top5_is_left_out_below_five_classes():
    measured = evaluate_model(vit(num_classes=4), [(IMAGES[:3], LABELS[:3])], WORLD)
    assert measured["top5"] is None


def test_evaluation_puts_the_training_mode_back():
    model = vit().train()
    evaluate_model(model, [(IMAGES, LABELS)], WORLD)
    assert model.training
