"""The task for timm's train loop: what a step computes, and that the loop's every call works."""

from __future__ import annotations

import logging
from contextlib import nullcontext

import pytest
import timm
import torch
import torch.distributed as dist
from timm.data import Mixup
from timm.loss import SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from timm.utils import CheckpointSaver, NativeScaler, unwrap_model
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from fastkd import create_teacher
from fastkd.losses import SoftKD
from fastkd.losses.base import LogitTerm
from fastkd.losses.registry import FEATURE_LOSSES, LOGIT_LOSSES
from fastkd.models import LiftVisionTransformer, Teacher
from fastkd.training import Recipe
from fastkd.training.task import build_task
from tests.harness.tiny import lift, vit
from tests.harness.torchrun import run_ranks
from tests.integrations.tasks import (
    IMAGES,
    LIFT,
    LINEAR,
    TARGET,
    make_task,
    projected_task,
    with_statistics,
)


def train_like_timm(
    task, optimizer, batches, scaler=None, amp=None, accumulation=1, clip=None, updates=0
):
    """What `train_one_epoch` of timm's train.py asks of a task, in its order."""
    task.train()
    optimizer.zero_grad()
    for index, (images, target) in enumerate(batches):
        need_update = (index + 1) % accumulation == 0
        amp_autocast = torch.autocast("cpu", amp) if amp else nullcontext()
        with nullcontext() if need_update else task.no_sync():
            with amp_autocast:
                loss = task(images, target)["loss"] / accumulation
            if scaler is not None:
                scaler(
                    loss,
                    optimizer,
                    clip_grad=clip,
                    parameters=task.get_clip_parameters(exclude_head=False),
                    need_update=need_update,
                )
            else:
                loss.backward()
                if need_update:
                    optimizer.step()
        if need_update:
            updates += 1
            optimizer.zero_grad()
            task.update_ema(step=updates)
    return updates


def batches(count, size=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        (
            torch.randn(size, 1, 8, 8, generator=generator),
            torch.randint(6, (size,), generator=generator),
        )
        for _ in range(count)
    ]


def adamw(task):
    return create_optimizer_v2(task.get_trainable_module(), opt="adamw", lr=1e-2, weight_decay=0.05)


@pytest.mark.parametrize(
    ("make_student", "options"),
    [
        (vit, LINEAR),
        (vit, {"projector": "pool", "alpha": 0.3, "logit_loss": "hard", "feature_loss": "cosine"}),
        (vit, {"projector": "linear", "feature_weight": 2.0, "pairs": [(0, 0), (1, 1)]}),
        (vit, {"alpha": 1.0, "feature_weight": 0.0}),
        (lift, LIFT),
    ],
    ids=["linear", "pool", "two pairs", "logits alone", "lift"],
)
def test_a_step_has_the_loss_and_gradients_of_fastkds_own_task(make_student, options):
    torch.manual_seed(5)
    theirs = make_task(make_student(), vit(24, seed=1), **options)
    torch.manual_seed(5)
    student, teacher = make_student(), create_teacher(vit(24, seed=1))
    recipe = Recipe(**options, label_smoothing=0.0)
    ours = build_task(student, teacher, recipe, torch.zeros(1, 1, 8, 8))
    ours.load_state_dict(theirs.trainable_module.state_dict())

    expected = ours(IMAGES, TARGET, teacher(IMAGES))
    found = theirs(IMAGES, TARGET)
    assert list(found)[:3] == ["loss", "output", "task_loss"]
    torch.testing.assert_close(found.pop("task_loss"), expected.pop("ce"))
    torch.testing.assert_close(found, expected)
    found["loss"].backward()
    expected["loss"].backward()
    for (name, parameter), other in zip(
        ours.named_parameters(), theirs.get_trainable_module().parameters(), strict=True
    ):
        torch.testing.assert_close(other.grad, parameter.grad, msg=name)


def test_a_recipe_gives_its_terms_and_nothing_else():
    options = {"pairs": [(-1, -1)], "tau": 3.0}
    task = make_task(lift(), vit(24, seed=1), recipe="lift_softkd_spectral", **options)
    terms = task.trainable_module.terms
    assert (terms.logit.weight, terms.logit.tau, terms.feature.weight) == (0.9, 3.0, 0.2)
    assert terms.feature.pairs == ((1, 1),)
    assert not terms.cross_entropy


def test_a_lift_student_takes_the_fused_path(monkeypatch):
    calls = []
    fused = LiftVisionTransformer.forward_head_kd
    monkeypatch.setattr(
        LiftVisionTransformer,
        "forward_head_kd",
        lambda *args, **options: calls.append(1) or fused(*args, **options),
    )
    make_task(lift(), vit(24, seed=1), **LIFT)(IMAGES, TARGET)
    assert calls == [1]


def test_the_criterions_weight_can_be_set():
    task = projected_task(task_loss_weight=3.0)
    found = task(IMAGES, TARGET)
    expected = 3 * found["task_loss"] + 0.5 * found["soft_kd"] + 0.2 * found["feature"]
    torch.testing.assert_close(found["loss"], expected)


def test_without_a_weight_of_its_own_the_criterion_takes_the_recipes():
    recipe = Recipe(alpha=0.5, projector="linear", ce_weight=2.0)
    assert make_task(vit(), vit(24), recipe=recipe).task_loss_weight == 2.0
    assert make_task(vit(), vit(24), recipe=recipe.override(ce_weight=None)).task_loss_weight == 0.5
    assert make_task(vit(), vit(24), recipe=recipe, task_loss_weight=0.1).task_loss_weight == 0.1
    assert projected_task(alpha=4.0, task_loss_weight=1.0).task_loss_weight == 1.0


class OnTheLabeledClass(LogitTerm):
    """Compares the logits of the labeled class alone."""

    name = "labeled"
    needs_target = True
    weight = 0.7

    def compare(self, student, teacher, target=None):
        labeled = [logits.gather(1, target[:, None]) for logits in (student, teacher)]
        return nn.functional.mse_loss(*labeled)


def test_a_logit_term_that_looks_at_labels_gets_them():
    teacher = vit(24, seed=1).eval()
    found = make_task(vit(), teacher, logit=OnTheLabeledClass())(IMAGES, TARGET)
    rows = torch.arange(8)
    expected = (found["output"] - teacher(IMAGES))[rows, TARGET].square().mean()
    torch.testing.assert_close(found["labeled"], expected)


def test_the_criterion_is_timms_where_none_is_given():
    task = projected_task(criterion=None, criterion_kwargs={"smoothing": 0.3})
    found = task(IMAGES, TARGET)
    expected = nn.functional.cross_entropy(found["output"], TARGET, label_smoothing=0.3)
    torch.testing.assert_close(found["task_loss"], expected)


def test_mixup_targets_reach_the_criterion():
    images, target = Mixup(mixup_alpha=1.0, num_classes=6, label_smoothing=0.1)(
        IMAGES.clone(), TARGET
    )
    task = projected_task(criterion=SoftTargetCrossEntropy())
    found = task(images, target)
    logits = task.get_eval_model()(images).log_softmax(-1)
    torch.testing.assert_close(found["task_loss"], -(target * logits).sum(-1).mean())
    assert found["loss"].isfinite()


def test_the_teacher_stays_frozen_in_eval_mode_and_out_of_what_is_trained():
    task = projected_task().train()
    assert task.trainable_module.student.training
    assert not any(module.training for module in task.teacher.modules())
    task(IMAGES, TARGET)["loss"].backward()
    assert all(p.grad is None and not p.requires_grad for p in task.teacher.parameters())
    trained = {id(p) for p in task.get_trainable_module().parameters()}
    assert trained.isdisjoint(id(p) for p in task.teacher.parameters())
    assert all(p.grad is not None for p in task.get_trainable_module().parameters())


def test_a_model_that_timm_did_not_build_is_paired_by_module_name():
    def convolutions(width):
        torch.manual_seed(width)
        return nn.Sequential(
            nn.Conv2d(3, width, 3, 2), nn.ReLU(), nn.Conv2d(width, width, 3, 2), nn.Flatten()
        )

    task = make_task(
        convolutions(8),
        convolutions(12),
        projector="linear",
        pairs=[("0", "0")],
        criterion=lambda logits, target: logits.square().mean(),
    )
    images = torch.randn(2, 3, 16, 16)
    assert task(images, None)["feature"] > 0
    assert {p.shape for p in task.trainable_module.terms.parameters()} == {(12, 8), (12,)}


@pytest.mark.parametrize("amp", [None, torch.bfloat16], ids=["float32", "bf16"])
def test_a_resumed_run_ends_with_the_bits_of_one_that_was_not(tmp_path, amp):
    from timm.task import load_task_ema_checkpoint, resume_task_checkpoint

    options = {"accumulation": 2, "clip": 1.0, "amp": amp}

    def start():
        task = projected_task()
        task.setup_ema(decay=0.9)
        return task, adamw(task), NativeScaler(device="cpu")

    whole, optimizer, scaler = start()
    updates = train_like_timm(whole, optimizer, batches(4), scaler, **options)
    saver = CheckpointSaver(
        whole.get_trainable_module(), optimizer, amp_scaler=scaler, checkpoint_dir=tmp_path,
        task=whole,
    )  # fmt: skip
    saver.save_checkpoint(0, metric=1.0)
    train_like_timm(whole, optimizer, batches(4, seed=1), scaler, **options, updates=updates)

    resumed, optimizer, scaler = start()
    for parameter in resumed.get_trainable_module().parameters():
        nn.init.zeros_(parameter)
    path = tmp_path / "last.pth.tar"
    assert resume_task_checkpoint(resumed, path, optimizer, scaler, log_info=False) == 1
    load_task_ema_checkpoint(resumed, path)
    train_like_timm(resumed, optimizer, batches(4, seed=1), scaler, **options, updates=updates)

    for ema in (False, True):
        ours, theirs = (unwrap_model(t.get_trainable_module(ema=ema)) for t in (resumed, whole))
        for name, value in theirs.state_dict().items():
            assert torch.equal(ours.state_dict()[name], value), name


@pytest.mark.parametrize("ema", [False, True], ids=["raw", "ema"])
def test_a_saved_checkpoint_is_the_student_alone_for_timm(tmp_path, ema):
    options = {"img_size": 32, "embed_dim": 24, "depth": 1, "num_heads": 2, "num_classes": 6}
    name, width = "deit_tiny_lift_patch16_224", {"width": 16}
    student = timm.create_model(name, **options, **width)
    teacher = timm.create_model("vit_tiny_patch16_224", **options | {"embed_dim": 16})
    task = make_task(student, teacher, **LIFT)
    if ema:
        task.setup_ema(decay=0.5)
    images = torch.randn(4, 3, 32, 32)
    train_like_timm(task, adamw(task), [(images, TARGET[:4])] * 2)
    saver = CheckpointSaver(task.get_trainable_module(), adamw(task), checkpoint_dir=tmp_path,
                            task=task)  # fmt: skip
    saver.save_checkpoint(0)
    loaded = timm.create_model(
        name, **options, **width, checkpoint_path=str(tmp_path / "last.pth.tar")
    )
    expected = task.get_eval_model(ema=ema).eval()(images)
    assert torch.equal(loaded.eval()(images), expected)


def test_a_checkpoint_holds_projectors_beside_the_student(tmp_path):
    task = projected_task()
    state = task.get_checkpoint_state()
    assert set(state["state_dict"]) == set(vit().state_dict())
    assert set(state["task_state"]["terms"]) == {
        "feature.projectors.0.weight",
        "feature.projectors.0.bias",
    }
    assert task.get_checkpoint_state(ema=True) == {}
    assert "task_state" not in projected_task(projector="pool").get_checkpoint_state()


@pytest.mark.parametrize("loss", FEATURE_LOSSES, ids=lambda loss: loss.name)
def test_every_feature_loss_trains_is_averaged_and_comes_back_from_a_checkpoint(loss):
    def start():
        task = projected_task(
            feature_loss=loss.name, projector="none" if loss.projects else "orthogonal"
        )
        task.setup_ema(decay=0.5)
        return task

    def averaged(task):
        return unwrap_model(task.get_trainable_module(ema=True)).state_dict()

    trained, fresh = start(), start()
    before = {name: value.clone() for name, value in averaged(trained).items()}
    train_like_timm(trained, adamw(trained), batches(2))
    state = trained.get_checkpoint_state(ema=True)
    fresh.load_checkpoint_state(state["state_dict_ema"], state.get("task_state_ema"), ema=True)
    assert any(not value.equal(before[name]) for name, value in averaged(trained).items())
    for name, value in averaged(trained).items():
        assert torch.equal(averaged(fresh)[name], value), name


@pytest.mark.parametrize("loss", LOGIT_LOSSES, ids=lambda loss: loss.name)
def test_every_logit_loss_gives_every_parameter_a_gradient(loss):
    task = projected_task(logit_loss=loss.name, tau=1.0)
    task(IMAGES, TARGET)["loss"].backward()
    assert [n for n, p in task.trainable_module.named_parameters() if p.grad is None] == []


def test_a_checkpoint_without_projectors_loads_with_a_warning(caplog):
    task = projected_task()
    with caplog.at_level(logging.WARNING, "fastkd"):
        task.load_checkpoint_state(vit(seed=9).state_dict())
    assert "projectors" in caplog.text
    with pytest.raises(RuntimeError, match="Missing key"):
        task.load_task_state({"terms": {}})


def test_ema_state_is_refused_where_there_is_no_ema():
    with pytest.raises(RuntimeError, match="setup_ema"):
        projected_task().load_task_state({"terms": {}}, ema=True)


def test_the_ema_averages_student_and_projectors():
    task = projected_task()
    assert not task.has_ema() and task.get_eval_model(ema=True) is None
    task.setup_ema(decay=0.5)
    before = {k: v.clone() for k, v in task.trainable_module.state_dict().items()}
    with torch.no_grad():
        for parameter in task.trainable_module.parameters():
            parameter.add_(1.0)
    task.update_ema()
    averaged = unwrap_model(task.get_trainable_module(ema=True)).state_dict()
    torch.testing.assert_close(averaged, {name: v + 0.5 for name, v in before.items()})
    assert task.get_eval_model(ema=True) is task.trainable_module_ema.module.student


def test_the_eval_model_is_the_bare_student():
    student = vit()
    task = make_task(student, vit(24, seed=1), **LINEAR)
    assert task.get_eval_model() is student
    assert set(task.get_clip_parameters()) == set(task.get_trainable_module().parameters())
    without_head = set(map(id, task.get_clip_parameters(exclude_head=True)))
    assert without_head.isdisjoint(map(id, student.head.parameters()))
    assert {id(p) for p in task.trainable_module.terms.parameters()} <= without_head


@pytest.mark.slow
def test_a_compiled_task_computes_the_same_and_saves_plain_names():
    plain, compiled = projected_task(), projected_task()
    compiled.setup_ema(decay=0.5)
    assert compiled.compile(backend="aot_eager") is compiled.get_eval_model()
    compiled.compile_ema(backend="eager")
    expected, found = plain(IMAGES, TARGET), compiled(IMAGES, TARGET)
    torch.testing.assert_close(found, expected)
    found["loss"].backward()
    expected["loss"].backward()
    for ours, theirs in zip(
        compiled.get_clip_parameters(), plain.get_clip_parameters(), strict=True
    ):
        torch.testing.assert_close(ours.grad, theirs.grad)
    for ema in (False, True):
        state = compiled.get_checkpoint_state(ema=ema)
        assert set(next(iter(state.values()))) == set(vit().state_dict())
    compiled.update_ema(step=1)
    torch.testing.assert_close(
        compiled.get_eval_model(ema=True)(IMAGES), compiled.get_eval_model().eval()(IMAGES)
    )


def test_layer_decay_and_weight_decay_know_the_student_inside():
    task = projected_task()
    optimizer = create_optimizer_v2(
        task.get_trainable_module(), opt="adamw", lr=1.0, weight_decay=0.1, layer_decay=0.5
    )
    scale = {id(p): g["lr_scale"] for g in optimizer.param_groups for p in g["params"]}
    decay = {id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    student = task.get_eval_model()
    projector = next(task.trainable_module.terms.parameters())
    assert scale[id(projector)] == scale[id(student.head.weight)] == 1.0
    assert scale[id(student.blocks[0].mlp.fc1.weight)] < scale[id(student.blocks[1].mlp.fc1.weight)]
    assert decay[id(student.pos_embed)] == 0 and decay[id(projector)] == 0.1


def test_moving_the_task_moves_all_of_it():
    task = make_task(with_statistics(vit(), 0.5, 0.5), with_statistics(vit(24), 0.4, 0.2), **LINEAR)
    task.to(torch.float64)
    assert task.dtype == torch.float64
    assert {t.dtype for t in task.parameters()} == {torch.float64}
    assert task(IMAGES.double(), TARGET)["loss"].dtype == torch.float64


def test_the_terms_are_built_in_the_tasks_dtype():
    task = make_task(vit().bfloat16(), vit(24, seed=1).bfloat16(), dtype=torch.bfloat16, **LINEAR)
    assert {p.dtype for p in task.trainable_module.terms.parameters()} == {torch.bfloat16}
    found = task(IMAGES.bfloat16(), TARGET)
    assert found["loss"].isfinite() and found["feature"].dtype == torch.float32


def train_on_rank(rank, folder):
    """Half of every batch; accumulated over two, of which the first is not synchronized."""
    dist.init_process_group("gloo")
    for name, task in ddp_tasks():
        optimizer = adamw(task)
        task.prepare_distributed()
        assert isinstance(task.get_trainable_module(), DistributedDataParallel)
        half = [(x[rank::2], y[rank::2]) for x, y in batches(4)]
        train_like_timm(task, optimizer, half, accumulation=2)
        torch.save(unwrap_model(task.trainable_module).state_dict(), f"{folder}/{name}{rank}.pth")
    dist.destroy_process_group()


def ddp_tasks():
    compiled = projected_task()
    compiled.compile(backend="eager")
    yield "linear", projected_task()
    yield "lift", make_task(lift(), vit(24, seed=1), **LIFT)
    yield "compiled", compiled


@pytest.mark.slow
def test_two_processes_train_as_one_does(tmp_path):
    run_ranks(train_on_rank, str(tmp_path))
    for name, task in ddp_tasks():
        train_like_timm(task, adamw(task), batches(4), accumulation=2)
        one = unwrap_model(task.trainable_module).state_dict()
        two = [torch.load(tmp_path / f"{name}{rank}.pth") for rank in range(2)]
        for key, value in one.items():
            assert torch.equal(two[0][key], two[1][key]), key
            torch.testing.assert_close(two[0][key], value, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": 0.0, "feature_weight": 0.0}, "nothing to distil"),
        ({"alpha": 1.5}, "alpha: expected at most 1"),
        ({"logit": SoftKD(1.0, 1.5)}, "task_loss_weight must not be negative, got -0.5"),
        ({"ce_weight": 1.0}, "the criterion's weight is task_loss_weight"),
        ({"lr": 0.1}, r"'lr' is none of the options of distillation, which are alpha"),
        ({"projector": "none"}, "needs equal widths"),
        ({"projector": "linear", "pairs": [(7, 0)]}, "index 7 is out of range"),
    ],
)
def test_what_cannot_be_distilled_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        make_task(vit(), vit(24, seed=1), **options)


class Recorder:
    """Stands for a function: keeps what it is called with, and gives its first argument back."""

    def __init__(self):
        self.calls = []

    def __call__(self, thing, *arguments, **options):
        self.calls.append((thing, arguments, options))
        return thing


def test_compiling_compiles_student_trainable_module_and_teacher_with_the_callers_options(
    monkeypatch,
):
    task, compiled = projected_task(), Recorder()
    parts = [task.get_eval_model(), task.trainable_module, task.teacher]
    monkeypatch.setattr(torch, "compile", compiled)
    monkeypatch.setattr(
        Teacher, "compile", lambda *arguments, **options: compiled(*arguments, **options)
    )
    task.compile(backend="eager", mode="reduce-overhead", dynamic=False)
    options = {"backend": "eager", "mode": "reduce-overhead", "dynamic": False}
    assert compiled.calls == [(part, (), options) for part in parts]


def test_the_compiled_trainable_module_is_what_trains():
    task = projected_task()
    plain = task.get_trainable_module()
    task.compile(backend="eager")
    assert task.get_trainable_module() is not plain
    assert unwrap_model(task.get_trainable_module()) is plain


def test_ddp_gets_the_trainable_module_and_the_callers_arguments(monkeypatch):
    task, wrapped = projected_task(), Recorder()
    trainable = task.trainable_module
    monkeypatch.setattr("fastkd.integrations.timm.DistributedDataParallel", wrapped)
    assert task.prepare_distributed(device_ids=[3], broadcast_buffers=False) is task
    options = {"device_ids": [3], "broadcast_buffers": False}
    assert wrapped.calls == [(trainable, (), options)]


@pytest.mark.parametrize("verbose", [True, False])
def test_what_is_distilled_is_logged_where_it_is_asked_for(caplog, verbose):
    with caplog.at_level(logging.INFO, "fastkd"):
        projected_task(verbose=verbose)
    assert ("FeatureMapDistillationTask: teacher=" in caplog.text) is verbose
