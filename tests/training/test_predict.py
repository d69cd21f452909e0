"""Predictions: of the right files, by the logits of an evaluation, under the right names."""

import argparse
import csv
import json

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from timm.data import ImageNetInfo

from fastkd.cli import predict as command
from fastkd.models import create_student, hub
from fastkd.training import evaluate, export, load_student
from fastkd.training.class_names import class_descriptions
from fastkd.training.data import eval_loader
from fastkd.training.datasets import open_data
from fastkd.training.prediction import predict
from fastkd.training.setup import Preprocessing
from tests.training.tiny import image_folder, made_run, vit

CPU = {"device": "cpu", "workers": 0, "quiet": True}
NAMES = ["blue", "green", "red"]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return image_folder(tmp_path_factory.mktemp("pictures"), train=1, val=2) / "val"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return made_run(tmp_path_factory.mktemp("run") / "run", classes=NAMES)


def rising():
    """A picture whose brightness rises from left to right."""
    return Image.linear_gradient("L").rotate(90).resize((40, 40)).convert("RGB")


def by_image(predictions):
    return {
        prediction.image: {guess.index: guess.probability for guess in prediction.guesses}
        for prediction in predictions.images
    }


def test_probabilities_are_those_of_the_logits_that_evaluate_counts(run, pictures):
    loaded = load_student(run)
    data = open_data(pictures, need_train=False)
    preprocessing = Preprocessing.of_run(loaded)
    spec = preprocessing.input_spec(loaded.model, data)
    (batch,) = eval_loader(data, preprocessing.recipe.override(workers=0), spec)
    with torch.no_grad():
        expected = loaded.model(batch.images).softmax(-1)
    found = by_image(predict(pictures, run, **CPU))
    assert len(found) == 6
    for index, row in zip(batch.samples.tolist(), expected, strict=True):
        assert found[data.val.filename(index)] == pytest.approx(dict(enumerate(row.tolist())))


def test_as_many_images_are_right_as_evaluate_says(run, pictures):
    predictions = predict(pictures, run, top=1, **CPU).images
    right = sum(f"/{p.guesses[0].name}/" in p.image for p in predictions)
    options = {"device": "cpu", "workers": 0}
    assert 100 * right / 6 == pytest.approx(evaluate(run, pictures, **options)["top1"])


@pytest.mark.parametrize("weights", ["raw", "ema"])
def test_a_runs_weights_can_be_chosen(run, pictures, weights):
    chosen = predict(pictures, run, weights=weights, **CPU)
    module = predict(pictures, load_student(run, weights).model, checkpoint=run, **CPU)
    assert chosen.weights == weights and module.weights == "ema"
    assert (by_image(chosen) == by_image(module)) == (weights == "ema")


def test_batches_and_workers_change_nothing(run, pictures):
    whole = predict(pictures, run, **CPU)
    parts = predict(pictures, run, **CPU | {"workers": 1}, batch_size=4)
    assert [p.image for p in parts.images] == [p.image for p in whole.images]
    for image, guesses in by_image(parts).items():
        assert guesses == pytest.approx(by_image(whole)[image], abs=1e-6)


def test_guesses_begin_with_the_most_probable(run, pictures):
    for prediction in predict(pictures, run, top=2, **CPU).images:
        first, second = prediction.guesses
        assert first.probability > second.probability


def test_a_folder_gives_all_images_below_it_but_hidden_ones(run, pictures, tmp_path):
    for name in ("10.JPG", "9.png", "deep/er/1.jpeg", ".hidden/2.jpg", ".3.jpg", "notes.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(tmp_path / name, "PNG")
    found = [p.image for p in predict(tmp_path, run, **CPU).images]
    assert found == [str(tmp_path / name) for name in ("9.png", "10.JPG", "deep/er/1.jpeg")]


def test_a_file_that_is_named_needs_no_ending(run, tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "picture", "WEBP")
    assert len(predict(tmp_path / "picture", run, **CPU).images) == 1


def test_what_cannot_be_read_is_told_and_the_rest_predicted(run, pictures, tmp_path):
    good = pictures / "red" / "0.jpg"
    (tmp_path / "torn.jpg").write_bytes(good.read_bytes()[:-200])
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "empty").mkdir()
    places = [tmp_path / "torn.jpg", good, tmp_path, tmp_path / "missing.jpg", tmp_path / "empty"]
    predictions = predict(places, run, **CPU, batch_size=1)
    assert [p.image for p in predictions.images] == [str(good)]
    reasons = {fault.name.rpartition("/")[2]: fault.reason for fault in predictions.unreadable}
    assert "truncated" in reasons["torn.jpg"]
    assert reasons["text.png"] == "no image that Pillow can read"
    assert reasons["missing.jpg"] == "No such file or directory"
    assert reasons["empty"] == "a folder without images"


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB")])
def test_images_are_brought_to_the_models_channels(tmp_path, channels, mode):
    rising().convert("RGBA").save(tmp_path / "rgba.png")
    rising().convert("RGB").convert(mode).save(tmp_path / "same.png")
    statistics = {"mean": (0.4,) * channels, "std": (0.3,) * channels}
    found = by_image(predict(tmp_path, vit(in_chans=channels), **statistics, **CPU))
    rgba, same = found.values()
    assert rgba == pytest.approx(same)


def test_orientation_tags_are_left_as_in_training(run, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    rising().save(tmp_path / "a.png")
    rising().save(tmp_path / "b.png", exif=exif)
    rising().rotate(-90).save(tmp_path / "c.png")
    plain, tagged, turned = by_image(predict(tmp_path, run, **CPU)).values()
    assert tagged == pytest.approx(plain, abs=1e-6)
    assert tagged != pytest.approx(turned, abs=1e-6)


def test_an_exported_folder_predicts_the_same_with_the_same_names(run, pictures, tmp_path):
    folder = export(run, output=tmp_path / "student").path
    expected = predict(pictures, run, **CPU).images
    assert predict(pictures, folder, **CPU).images == expected
    assert predict(pictures, f"local-dir:{folder}", **CPU).images == expected


def test_a_released_checkpoint_predicts_with_the_names_of_imagenet(pictures, tmp_path):
    base = {"img_size": 32, "patch_size": 16, "embed_dim": 64, "num_heads": 1, "depth": 1}
    student = create_student("deit_tiny_patch16_224", "widelast", width=64, **base)
    save_file(student.state_dict(), tmp_path / "released.safetensors")
    guess = predict(pictures, tmp_path / "released.safetensors", **CPU).images[0].guesses[0]
    assert guess.name == ImageNetInfo().index_to_description(guess.index)


def test_a_timm_name_takes_a_file_of_weights(pictures, tmp_path):
    model = timm.create_model("test_vit", num_classes=3)
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    named = predict(pictures, "test_vit", checkpoint=tmp_path / "weights.pth", **CPU)
    assert by_image(named) == by_image(predict(pictures, model, **CPU))


def test_a_model_is_left_in_the_mode_it_was_in(pictures):
    model = vit(in_chans=3).train()
    predict(pictures, model, **CPU)
    assert model.training


@pytest.mark.parametrize(
    ("names", "count", "expected"),
    [
        (["cat", "dog"], 2, ("cat", "dog")),
        (["cat"], 3, ("cat", "1", "2")),  # a head that is wider than the data
        (["n01440764", "n02123045"], 2, ("tench, Tinca tinca", "tabby, tabby cat")),
        (["n01440764", "cat"], 2, ("n01440764", "cat")),
        (None, 3, ("0", "1", "2")),
    ],
)
def test_classes_are_called_as_their_data_called_them(names, count, expected):
    assert class_descriptions(names, count) == expected


@pytest.mark.parametrize(
    ("count", "subset"), [(1000, "imagenet-1k"), (11821, "imagenet-12k"), (21841, "imagenet-22k")]
)
def test_as_many_classes_as_an_imagenet_are_called_as_timm_calls_them(count, subset):
    assert class_descriptions(None, count) == tuple(ImageNetInfo(subset).label_descriptions())


def test_csv_has_a_row_for_every_guess(run, pictures, tmp_path):
    predictions = predict(pictures, run, top=2, output=tmp_path / "found.csv", **CPU)
    with open(tmp_path / "found.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 12
    guess = predictions.images[0].guesses[1]
    assert (rows[1]["image"], rows[1]["rank"]) == (predictions.images[0].image, "2")
    assert (int(rows[1]["index"]), rows[1]["name"]) == (guess.index, guess.name)
    assert float(rows[1]["probability"]) == pytest.approx(guess.probability, rel=1e-5)


def test_json_has_everything(run, pictures, tmp_path):
    (tmp_path / "text.png").write_text("no image")
    places = [pictures, tmp_path / "text.png"]
    predictions = predict(places, run, output=tmp_path / "found.json", **CPU)
    content = json.loads((tmp_path / "found.json").read_text())
    assert content["weights"] == "ema"
    assert [image["image"] for image in content["images"]] == list(by_image(predictions))
    assert content["images"][0]["guesses"] == [vars(g) for g in predictions.images[0].guesses]
    assert content["unreadable"][0]["image"] == str(tmp_path / "text.png")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"top": 0}, ValueError, "top must be at least 1, got 0"),
        ({"batch_size": 0}, ValueError, "batch_size must be at least 1, got 0"),
        (
            {"output": "found.txt"},
            ValueError,
            r"output must end in \.csv or \.json, got 'found.txt'",
        ),
        ({"output": "/no/found.csv"}, FileNotFoundError, "there is no folder '/no'"),
        ({"crop": 1}, ValueError, "unknown option 'crop'"),
        ({"checkpoint": "x.pth"}, ValueError, "is a checkpoint itself"),
    ],
)
def test_options_that_do_not_fit_are_refused(run, pictures, options, error, message):
    with pytest.raises(error, match=message):
        predict(pictures, run, **CPU, **options)


def test_no_images_at_all_are_refused(run):
    with pytest.raises(ValueError, match="no images were given"):
        predict([], run, **CPU)


def test_a_model_without_classes_is_refused(pictures):
    with pytest.raises(ValueError, match="VisionTransformer, has no classes"):
        predict(pictures, vit(in_chans=3, num_classes=0), **CPU)


def test_logits_that_are_not_finite_are_an_error_that_names_the_image(pictures):
    model = vit(in_chans=3)
    model.head.bias.data.fill_(float("nan"))
    with pytest.raises(ArithmeticError, match=r"0\.jpg are not finite"):
        predict(pictures, model, **CPU)


def test_a_released_checkpoint_may_be_on_the_hub(pictures, tmp_path, monkeypatch):
    base = {"img_size": 32, "patch_size": 16, "embed_dim": 64, "num_heads": 1, "depth": 1}
    student = create_student("deit_tiny_patch16_224", "widelast", width=64, **base)
    save_file(student.state_dict(), tmp_path / "cached.safetensors")
    monkeypatch.setattr(hub, "_hub_answers", lambda: True)
    monkeypatch.setattr(hub, "hf_hub_download", lambda *_, **__: tmp_path / "cached.safetensors")
    named = predict(pictures, "hf_hub:owner/name/model.safetensors", **CPU)
    assert named.images == predict(pictures, tmp_path / "cached.safetensors", **CPU).images


def run_command(*arguments):
    parser = argparse.ArgumentParser()
    command.add(parser.add_subparsers())
    fixed = ["--device", "cpu", "--workers", "0", "--quiet"]
    options = parser.parse_args(["predict", *map(str, arguments), *fixed])
    return options.run(options)


def test_the_command_prints_every_images_guesses(run, pictures, capsys):
    assert run_command(pictures / "red" / "0.jpg", "--checkpoint", run, "--top", 2) == 0
    first, *guesses, empty, last = capsys.readouterr().out.splitlines()
    assert first == str(pictures / "red" / "0.jpg") and empty == ""
    expected = predict(pictures / "red" / "0.jpg", run, top=2, **CPU).images[0].guesses
    assert [line.split() for line in guesses] == [
        [f"{100 * g.probability:.2f}", "%", g.name, "(class", f"{g.index})"] for g in expected
    ]
    assert last == f"1 image ({run}, weights ema)"


def test_one_guess_for_an_image_is_one_line(run, pictures, capsys):
    run_command(pictures, "--checkpoint", run, "--top", 1)
    assert len(capsys.readouterr().out.splitlines()) == 6 + 1


def test_the_command_names_what_it_passed_over_and_says_so_at_its_end(run, tmp_path, capsys):
    (tmp_path / "text.png").write_text("no image")
    assert run_command(tmp_path, "--checkpoint", run) == 1
    assert capsys.readouterr().err == (
        f"fastkd predict: passed over {tmp_path / 'text.png'}: no image that Pillow can read\n"
    )


def test_the_command_takes_a_name_and_weights_for_it(pictures, tmp_path, capsys):
    torch.save(timm.create_model("test_vit", num_classes=3).state_dict(), tmp_path / "w.pth")
    assert run_command(pictures, "--model", "test_vit", "--checkpoint", tmp_path / "w.pth") == 0
    assert "6 images (test_vit, weights as given)" in capsys.readouterr().out


def test_the_command_wants_a_model(pictures):
    with pytest.raises(ValueError, match="give --checkpoint or --model"):
        run_command(pictures)
