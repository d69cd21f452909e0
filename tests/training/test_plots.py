"""results.png: what is drawn of a run's records, and that drawing never ends a run."""

import io
import json
import math
import os
import sys

import numpy as np
import pytest
from matplotlib import get_backend, rcParams

import fastkd
from fastkd.training import Recipe, train
from fastkd.training.plots import draw_run, plot_run
from tests.harness.tiny import FAST, tensor_data, vit

LOSSES = {"loss": 2.0, "ce": 2.5, "soft_kd": 1.5, "feature": 0.5, "grad_norm": 1.0}
SPEED = {"images_per_second": 800.0, "data_wait": 3.0, "skipped_updates": 0}


def interval(epoch, update, **fields):
    where = {"kind": "interval", "epoch": epoch, "update": update, "lr": 1e-3 / update}
    return where | LOSSES | SPEED | fields


def epoch(number, updates=10, **fields):
    record = interval(number, number * updates, **fields)
    return record | {"kind": "epoch", "seconds": 4.0, "time": "2026-01-01T00:00:00"}


def measured(number, top1, ema_top1, **fields):
    scores = {"top1": top1, "ema_top1": ema_top1, "eval_loss": 2.0, "ema_loss": 2.2}
    return epoch(number, **scores | {"eval_images": 50} | fields)


def written(folder, records, **fields):
    """A run's folder of which only the settings and the log are there."""
    Recipe(**{"teacher": "vit_base_patch16_224", "ema_decay": 0.9, **fields}).save(
        folder / "recipe.yaml"
    )
    text = "".join(json.dumps(record) + "\n" for record in records)
    (folder / "log.jsonl").write_text(text)
    return folder


def panel(figure, label):
    (axes,) = [axes for axes in figure.axes if axes.get_ylabel().startswith(label)]
    return axes


def lines(axes):
    """Points by label, in the order of drawing."""
    return {
        line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in axes.lines
    }


def drawn(folder):
    """The figure, once matplotlib has laid it out and rendered it."""
    figure = draw_run(folder)
    figure.savefig(io.BytesIO(), format="png", dpi=20)
    return figure


THREE = [measured(1, 40.0, 30.0), measured(2, 60.0, 50.0), measured(3, 55.0, 58.0)]


def test_every_logged_term_is_drawn_by_update_from_intervals(tmp_path):
    records = [interval(1, update, ce=float(update)) for update in (2, 4, 6, 8)]
    losses = panel(drawn(written(tmp_path, [*records, *THREE])), "loss")
    found = lines(losses)
    assert list(found) == ["total", "ce", "soft_kd", "feature", "eval ce", "eval ce, EMA"]
    assert found["total"] == ([2, 4, 6, 8], [2.0] * 4)
    assert found["ce"] == ([2, 4, 6, 8], [2.0, 4.0, 6.0, 8.0])
    assert losses.get_xlabel() == "update"


def test_evaluation_losses_are_points_at_the_end_of_their_epoch(tmp_path):
    losses = panel(drawn(written(tmp_path, THREE)), "loss")
    assert lines(losses)["eval ce"] == ([10, 20, 30], [2.0] * 3)
    assert lines(losses)["eval ce, EMA"] == ([10, 20, 30], [2.2] * 3)
    points = [line for line in losses.lines if line.get_label().startswith("eval")]
    assert all(line.get_linestyle() == "None" and line.get_marker() != "" for line in points)


def test_where_epochs_are_as_many_as_intervals_they_are_drawn(tmp_path):
    records = [interval(1, 5, loss=9.0), *THREE]
    assert lines(panel(drawn(written(tmp_path, records)), "loss"))["total"][0] == [10, 20, 30]


def test_of_a_long_run_the_epochs_are_drawn(tmp_path):
    epochs = [epoch(number) for number in range(1, 121)]
    intervals = [interval(1, update) for update in range(1, 200)]
    assert (
        len(lines(panel(drawn(written(tmp_path, intervals + epochs)), "loss"))["total"][0]) == 120
    )


def test_epochs_stand_for_intervals_that_were_left_in_another_folder(tmp_path):
    records = [THREE[0], *(interval(2, update) for update in (12, 14, 16, 18)), THREE[1]]
    found = lines(panel(drawn(written(tmp_path, records)), "loss"))
    assert found["total"][0] == [10, 12, 14, 16, 18]


def test_top1_is_drawn_by_epoch_as_the_records_count_them(tmp_path):
    top1 = panel(drawn(written(tmp_path, THREE)), "top-1 (%)")
    found = lines(top1)
    assert found["raw weights"] == ([1, 2, 3], [40.0, 60.0, 55.0])
    assert found["EMA weights"] == ([1, 2, 3], [30.0, 50.0, 58.0])
    assert top1.get_xlabel() == "epoch"


@pytest.mark.parametrize(
    ("best", "label", "place"),
    [("raw", "best: epoch 2, 60 %", 2), ("ema", "best: epoch 3, 58 %", 3)],
)
def test_the_best_epoch_is_that_of_the_recipes_weights(tmp_path, best, label, place):
    found = lines(panel(drawn(written(tmp_path, THREE, best=best)), "top-1"))
    assert found[label][0] == [place, place]


def test_of_equal_epochs_the_earliest_is_the_best(tmp_path):
    epochs = [measured(1, 40.0, 1.0), measured(2, 60.0, 1.0), measured(3, 60.0, 1.0)]
    assert "best: epoch 2, 60 %" in lines(panel(drawn(written(tmp_path, epochs)), "top-1"))


def test_without_labels_the_objective_takes_the_place_of_top1(tmp_path):
    terms = {"loss": 2.0, "soft_kd": 1.5, "grad_norm": 1.0}
    epochs = [
        {k: v for k, v in epoch(n).items() if k not in LOSSES}
        | terms
        | {"eval_loss": loss, "eval_soft_kd": 1.0}
        for n, loss in ((1, 3.0), (2, 1.0), (3, 1.5))
    ]
    figure = drawn(written(tmp_path, epochs, labels=False))
    assert lines(panel(figure, "evaluation objective"))["raw weights"] == (
        [1, 2, 3],
        [3.0, 1.0, 1.5],
    )
    assert "best: epoch 2, 1" in lines(panel(figure, "evaluation objective"))
    assert list(lines(panel(figure, "loss"))) == ["total", "soft_kd", "eval total"]


def test_where_the_loss_picks_the_best_epoch_top1_does_not(tmp_path):
    """Labels only evaluate: nothing trains the logits."""
    epochs = [
        measured(1, 10.0, 10.0, eval_loss=1.0, eval_feature=0.2),
        measured(2, 90.0, 10.0, eval_loss=2.0, eval_feature=0.3),
    ]
    assert "best: epoch 1, 1" in lines(panel(drawn(written(tmp_path, epochs)), "top-1"))


def test_without_ema_nothing_of_it_is_drawn(tmp_path):
    epochs = [epoch(n, top1=50.0, eval_loss=1.0) for n in (1, 2)]
    figure = drawn(written(tmp_path, epochs, ema_decay=None))
    assert list(lines(panel(figure, "top-1"))) == ["raw weights", "best: epoch 1, 50 %"]
    assert not any("EMA" in label for label in lines(panel(figure, "loss")))


def test_one_epoch_is_seen(tmp_path):
    figure = drawn(written(tmp_path, THREE[:1]))
    for axes in figure.axes:
        assert all(line.get_marker() not in ("", "None") for line in axes.lines[:1])
    assert lines(panel(figure, "top-1"))["raw weights"] == ([1], [40.0])
    assert lines(panel(figure, "learning rate"))


def test_epochs_that_were_not_evaluated_are_left_out_of_top1(tmp_path):
    epochs = [epoch(1), THREE[1], epoch(3), measured(4, 70.0, 65.0)]
    figure = drawn(written(tmp_path, epochs))
    assert lines(panel(figure, "top-1"))["raw weights"] == ([2, 4], [60.0, 70.0])
    assert lines(panel(figure, "loss"))["total"][0] == [10, 20, 30, 40]


def test_before_the_first_evaluation_there_is_no_best(tmp_path):
    figure = drawn(written(tmp_path, [interval(1, 2), interval(1, 4)]))
    assert lines(panel(figure, "loss"))["total"][0] == [2, 4]
    assert not any("best" in label for axes in figure.axes for label in lines(axes))


@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_leaves_a_gap_and_is_counted(tmp_path, broken):
    epochs = [THREE[0], measured(2, 60.0, 50.0, eval_loss=broken, feature=broken), THREE[2]]
    losses = panel(drawn(written(tmp_path, epochs)), "loss")
    for label, value in (("eval ce (1 not finite)", 2.0), ("feature (1 not finite)", 0.5)):
        updates, values = lines(losses)[label]
        assert updates == [10, 20, 30]
        assert np.array_equal(values, [value, math.nan, value], equal_nan=True)
    assert np.isfinite(losses.get_ylim()).all()


def test_an_epoch_whose_measure_is_not_finite_is_not_the_best(tmp_path):
    epochs = [measured(n, 1.0, 1.0, eval_feature=1.0, eval_loss=loss) for n, loss in
              ((1, math.nan), (2, 5.0), (3, 4.0))]  # fmt: skip
    assert "best: epoch 3, 4" in lines(panel(drawn(written(tmp_path, epochs)), "top-1"))


def test_skipped_updates_are_marked_on_the_axis(tmp_path):
    skips = [{"kind": "skipped", "epoch": 1, "update": u, "samples": [[1]]} for u in (7, 9)]
    losses = panel(drawn(written(tmp_path, [*skips, *THREE])), "loss")
    assert lines(losses)["skipped (2)"][0] == [7, 9]
    marks = losses.lines[-1]
    assert marks.get_transform() == losses.get_xaxis_transform()


def test_a_mean_over_no_update_is_not_drawn(tmp_path):
    """The log has 0 for every term of an interval whose updates were all skipped."""
    none = dict.fromkeys(LOSSES, 0.0) | {"skipped_updates": 2}
    records = [interval(1, 2), interval(1, 4, **none), interval(1, 6, skipped_updates=1)]
    found = lines(panel(drawn(written(tmp_path, records)), "loss"))
    assert found["total"] == ([2, 6], [2.0, 2.0])


def test_a_run_of_skipped_updates_alone_is_drawn(tmp_path):
    none = dict.fromkeys(LOSSES, 0.0) | {"skipped_updates": 2}
    records = [interval(1, 2, **none), {"kind": "skipped", "epoch": 1, "update": 1}]
    assert list(lines(panel(drawn(written(tmp_path, records)), "loss"))) == ["skipped (1)"]


def test_learning_rate_throughput_and_data_wait_have_axes_of_their_own(tmp_path):
    records = [interval(1, u, gpu_memory=u / 2) for u in (2, 4, 6, 8)]
    figure = drawn(written(tmp_path, [*records, THREE[0]]))
    rate = panel(figure, "learning rate").lines[0]
    assert list(rate.get_xdata()) == [2, 4, 6, 8, 10]
    assert list(rate.get_ydata()) == [1e-3 / update for update in (2, 4, 6, 8, 10)]
    speed = panel(figure, "throughput (images/s)")
    assert list(speed.lines[0].get_ydata()) == [800.0] * 4
    assert speed.get_title() == "peak GPU memory 4.0 GiB"
    assert list(panel(figure, "data wait (%").lines[0].get_ydata()) == [3.0] * 4


@pytest.mark.parametrize(
    ("feature", "scale"),
    [(0.5, "linear"), (0.01, "log"), (0.0, "linear"), (-0.1, "linear")],  # the last have no log
)
def test_losses_far_apart_are_drawn_on_a_logarithmic_axis(tmp_path, feature, scale):
    figure = drawn(written(tmp_path, [epoch(1, feature=feature), epoch(2)]))
    assert panel(figure, "loss").get_yscale() == scale


def test_the_title_says_what_was_trained_and_what_the_total_is(tmp_path):
    folder = tmp_path / "a $run$"
    folder.mkdir()
    written(folder, THREE, variant="widelast", width=384, alpha=0.9, feature_weight=0.2)
    title = drawn(folder).get_suptitle()
    for part in (
        "deit_tiny_patch16_224 (widelast, width 384)",
        "vit_base_patch16_224",
        "a $run$",
        f"fastkd {fastkd.__version__}",
        "total = 0.1 ce + 0.9 soft_kd + 0.2 feature (mse)",
    ):
        assert part in title


def test_without_a_teacher_the_title_says_so(tmp_path):
    written(tmp_path, THREE, teacher=None, alpha=0.0, feature_weight=0.0)
    assert "without a teacher" in drawn(tmp_path).get_suptitle()


def test_a_torn_last_line_is_passed_over(tmp_path):
    written(tmp_path, THREE)
    whole = lines(panel(drawn(tmp_path), "loss"))
    with open(tmp_path / "log.jsonl", "a") as file:
        file.write('{"kind": "epoch", "epo')
    assert lines(panel(drawn(tmp_path), "loss")) == whole


@pytest.mark.draws
def test_a_run_draws_itself_at_its_end(tmp_path):
    options = FAST | {"log_interval": 1, "alpha": 0.5}
    result = train(vit(), vit(seed=1), tensor_data(), tmp_path, **options)
    assert (tmp_path / "results.png").read_bytes().startswith(b"\x89PNG")
    figure = drawn(tmp_path)
    logged = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    intervals = [record for record in logged if record["kind"] == "interval"]
    updates, total = lines(panel(figure, "loss"))["total"]
    assert (updates, total) == ([r["update"] for r in intervals], [r["loss"] for r in intervals])
    best = max(result.history, key=lambda record: record["top1"])
    assert f"best: epoch {best['epoch']}, {best['top1']:.4g} %" in lines(panel(figure, "top-1"))


@pytest.mark.draws
def test_a_run_that_cannot_be_drawn_says_so_and_ends_well(tmp_path, monkeypatch, capsys):
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.setitem(sys.modules, name, None)
    train(vit(), None, tensor_data(), tmp_path, **FAST | {"quiet": False})
    assert "results.png not drawn: pip install matplotlib" in capsys.readouterr().err
    assert (tmp_path / "result.json").exists()


def test_the_file_is_replaced_as_a_whole(tmp_path, monkeypatch):
    written(tmp_path, THREE)
    path = plot_run(tmp_path, pytest.fail)
    assert path.read_bytes().startswith(b"\x89PNG")
    path.write_bytes(b"the one before")

    def full(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    told = []
    assert plot_run(tmp_path, told.append) is None
    assert told == ["results.png not drawn: No space left on device"]
    assert path.read_bytes() == b"the one before"
    assert {file.name for file in tmp_path.iterdir()} == {"recipe.yaml", "log.jsonl", "results.png"}


def test_an_error_of_matplotlib_is_one_line(tmp_path, monkeypatch):
    def fails(*_, **__):
        raise RuntimeError("a long\n  story")

    written(tmp_path, THREE)
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", fails)
    told = []
    assert plot_run(tmp_path, told.append) is None
    assert told == ["results.png not drawn: a long story"]
    assert not (tmp_path / "results.png").exists()


def test_without_matplotlib_one_line_says_what_to_install(tmp_path, monkeypatch):
    written(tmp_path, THREE)
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    told = []
    assert plot_run(tmp_path, told.append) is None
    assert told == ["results.png not drawn: pip install matplotlib"]


@pytest.mark.parametrize("records", [[], [{"kind": "skipped", "epoch": 1, "update": 1}]])
def test_a_run_that_logged_nothing_yet_is_not_drawn(tmp_path, records):
    told = []
    assert plot_run(written(tmp_path, records), told.append) is None
    assert len(told) == 1 and "log.jsonl" in told[0]


def test_drawing_leaves_pyplot_and_its_settings_alone(tmp_path, monkeypatch):
    written(tmp_path, THREE)
    before = dict(rcParams), get_backend()
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)  # importing it is an error now
    assert plot_run(tmp_path, pytest.fail)
    assert (dict(rcParams), get_backend()) == before
