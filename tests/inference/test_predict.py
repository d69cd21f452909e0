"""Predictions: of the right files, by the logits of an evaluation, under the right names."""

import argparse
import csv
import io
import json
import os
import warnings
import weakref

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from timm.data import ImageNetInfo
from timm.data.readers import add_img_extensions, del_img_extensions
from torch import nn

from fastkd.cli import inference as command
from fastkd.cli import main
from fastkd.data.batches import SampleTransform
from fastkd.data.image_files import ENDINGS
from fastkd.data.loader import eval_loader
from fastkd.data.open_data import open_data
from fastkd.inference.predict import class_descriptions, open_files, predict
from fastkd.inference.preprocessing import image_loader
from fastkd.models import create_student, hub_download
from fastkd.training import evaluate, export, load_student
from fastkd.utils import progress as image_progress
from tests.harness.tiny import image_folder, made_run, vit
from tests.harness.torchrun import run_ranks

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


class Gives(nn.Module):
    """Gives what a function makes of the images."""

    def __init__(self, function):
        super().__init__()
        self.forward = function


def by_image(predictions):
    return {
        prediction.image: {guess.index: guess.probability for guess in prediction.guesses}
        for prediction in predictions.images
    }


def test_probabilities_are_those_of_the_logits_that_evaluate_counts(run, pictures):
    loaded = load_student(run)
    data = open_data(pictures, need_train=False)
    preprocessing = loaded.preprocessing
    spec = preprocessing.input_spec(loaded.network, data)
    (batch,) = eval_loader(data, preprocessing.recipe.override(workers=0), spec)
    with torch.no_grad():
        expected = loaded.network(batch.images).softmax(-1)
    found = by_image(predict(run, pictures, **CPU))
    assert len(found) == 6
    for index, row in zip(batch.samples.tolist(), expected, strict=True):
        assert found[data.val.filename(index)] == pytest.approx(dict(enumerate(row.tolist())))


def test_files_become_the_very_inputs_of_an_evaluation(run, tmp_path):
    for mode in ("RGB", "L", "LA", "RGBA", "P", "1", "CMYK"):
        (tmp_path / "class").mkdir(exist_ok=True)
        image = Image.effect_noise((60, 44), 60).convert("RGB").convert(mode)
        image.save(tmp_path / "class" / (f"{mode}.jpg" if mode == "CMYK" else f"{mode}.png"))
    loaded = load_student(run)
    data = open_data(tmp_path, need_train=False)
    preprocessing = loaded.preprocessing
    spec = preprocessing.input_spec(loaded.network, data)
    (expected,) = eval_loader(data, preprocessing.recipe.override(workers=0), spec)
    files = [data.val.filename(index) for index in expected.samples.tolist()]
    options = {"batch_size": 7, "workers": 0, "device": torch.device("cpu")}
    loader = image_loader(open_files(files), preprocessing.recipe, spec, range(7), **options)
    (batch,) = loader
    assert not batch.faults and torch.equal(batch.images, expected.images)


def test_as_many_images_are_right_as_evaluate_says(run, pictures):
    predictions = predict(run, pictures, top=1, **CPU).images
    right = sum(f"/{p.guesses[0].name}/" in p.image for p in predictions)
    options = {"device": "cpu", "workers": 0}
    assert 100 * right / 6 == pytest.approx(evaluate(run, pictures, **options)["top1"])


@pytest.mark.parametrize("weights", ["raw", "ema"])
def test_a_runs_weights_can_be_chosen(run, pictures, weights):
    chosen = predict(run, pictures, weights=weights, **CPU)
    module = predict(load_student(run, weights).network, pictures, checkpoint=run, **CPU)
    assert chosen.weights == weights and module.weights == "ema"
    assert (by_image(chosen) == by_image(module)) == (weights == "ema")


def test_batches_and_workers_change_nothing(run, pictures):
    whole = predict(run, pictures, **CPU)
    parts = predict(run, pictures, **CPU | {"workers": 1}, batch_size=4)
    assert [p.image for p in parts.images] == [p.image for p in whole.images]
    for image, guesses in by_image(parts).items():
        assert guesses == pytest.approx(by_image(whole)[image], abs=1e-6)


def test_guesses_begin_with_the_most_probable(run, pictures):
    for prediction in predict(run, pictures, top=2, **CPU).images:
        first, second = prediction.guesses
        assert first.probability > second.probability


def test_a_folder_gives_all_images_below_it_but_hidden_ones(run, pictures, tmp_path):
    for name in ("10.JPG", "9.png", "deep/er/1.jpeg", ".hidden/2.jpg", ".3.jpg", "notes.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(tmp_path / name, "PNG")
    found = [p.image for p in predict(run, tmp_path, **CPU).images]
    assert found == [str(tmp_path / name) for name in ("9.png", "10.JPG", "deep/er/1.jpeg")]


@pytest.mark.parametrize("name", ["a.webp", "a.BMP", "a.tif", "a.tiff", "a.gif", "a.ppm", "a.jfif"])
def test_a_file_that_is_named_may_be_of_any_format_that_pillow_reads(run, tmp_path, name):
    formats = {"tif": "TIFF", "jfif": "JPEG"}
    ending = name.rpartition(".")[2]
    Image.new("RGB", (8, 8)).save(tmp_path / name, formats.get(ending, ending.upper()))
    assert [p.image for p in predict(run, tmp_path / name, **CPU).images] == [str(tmp_path / name)]


def test_a_folder_gives_images_of_the_endings_that_timm_lists(run, tmp_path):
    for name in ("a.png", "b.jfif"):
        Image.new("RGB", (8, 8)).save(tmp_path / name, "PNG")
    assert len(predict(run, tmp_path, **CPU).images) == 1
    add_img_extensions(".jfif")
    try:
        assert len(predict(run, tmp_path, **CPU).images) == 2
    finally:
        del_img_extensions(".jfif")


def test_pipes_and_devices_are_unreadable_and_those_in_a_folder_are_told(run, tmp_path, caplog):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.webp")
    (tmp_path / "notes.txt").write_text("no image")
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "link.jpg").symlink_to("pipe.jpg")
    places = [tmp_path, tmp_path / "pipe.jpg", tmp_path / "link.jpg", "/dev/zero"]
    predictions = predict(run, places, **CPU)
    assert [prediction.image for prediction in predictions.images] == [str(tmp_path / "a.webp")]
    assert [fault.name for fault in predictions.unreadable] == [str(name) for name in places[1:]]
    assert {fault.reason for fault in predictions.unreadable} == {"no regular file"}
    (record,) = caplog.records
    assert "left out " in record.getMessage() and "1 file that is no image: 1 .txt" in caplog.text
    assert "2 pipes, devices or broken links: " in caplog.text


@pytest.mark.parametrize("name", ["a.h5", "a.mpg", "a.eps", "a.pdf", "a.npy"])
def test_a_folder_gives_no_files_that_pillow_recognizes_but_cannot_read(run, tmp_path, name):
    Image.new("RGB", (8, 8)).save(tmp_path / "good.png")
    (tmp_path / name).write_bytes(b"no picture")
    predictions = predict(run, tmp_path, **CPU)
    assert len(predictions.images) == 1 and predictions.unreadable == ()


def test_a_file_that_is_named_needs_no_ending(run, tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "picture", "WEBP")
    assert len(predict(run, tmp_path / "picture", **CPU).images) == 1


def test_what_cannot_be_read_is_told_and_the_rest_predicted(run, pictures, tmp_path):
    good = pictures / "red" / "0.jpg"
    (tmp_path / "torn.jpg").write_bytes(good.read_bytes()[:-200])
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "empty").mkdir()
    places = [tmp_path / "torn.jpg", good, tmp_path, tmp_path / "missing.jpg", tmp_path / "empty"]
    predictions = predict(run, places, **CPU, batch_size=1)
    assert [p.image for p in predictions.images] == [str(good)]
    reasons = {fault.name.rpartition("/")[2]: fault.reason for fault in predictions.unreadable}
    assert "truncated" in reasons["torn.jpg"]
    assert reasons["text.png"].startswith("no JPEG, PNG, WEBP, ")
    assert reasons["missing.jpg"] == "No such file or directory"
    assert reasons["empty"] == f"a folder without images ({', '.join(ENDINGS)})"


@pytest.mark.parametrize("ending", [".csv", ".json"])
def test_names_that_are_no_utf8_are_written_with_their_bytes(run, tmp_path, ending, capsys):
    folder = os.fsencode(tmp_path)
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "PNG")
    for name, content in ((b"good\xff.png", buffer.getvalue()), (b"bad\xff.png", b"text")):
        with open(folder + b"/" + name, "wb") as file:
            file.write(content)
    output = tmp_path / f"found{ending}"
    assert run_command(run, tmp_path, "--output", output) == 1
    told = capsys.readouterr()
    assert r"good\xff.png" in told.out and r"bad\xff.png" in told.err
    written = output.read_text()
    if ending == ".json":
        content = json.loads(written)
        assert content["unreadable"][0]["image"].endswith(r"bad\xff.png")
        assert content["images"][0]["image"].endswith(r"good\xff.png")
    else:
        assert r"good\xff.png" in written


def test_classes_whose_names_are_no_utf8_are_called_with_their_bytes():
    assert class_descriptions([os.fsdecode(b"cat\xff")], 1) == (r"cat\xff",)


DEEP = [("I;16", np.uint16, "png"), ("I", np.int32, "tif"), ("F", np.float32, "tif")]


@pytest.mark.parametrize(("mode", "dtype", "ending"), DEEP)
def test_grayscale_of_more_than_8_bits_is_unreadable_rather_than_white(
    run, tmp_path, mode, dtype, ending
):
    Image.fromarray(np.full((9, 9), 30000, dtype)).save(tmp_path / f"deep.{ending}")
    Image.new("L", (9, 9)).save(tmp_path / "good.png")
    predictions = predict(run, [tmp_path / f"deep.{ending}", tmp_path / "good.png"], **CPU)
    assert [p.image for p in predictions.images] == [str(tmp_path / "good.png")]
    (fault,) = predictions.unreadable
    assert fault.reason == (
        f"grayscale of more than 8 bits (mode {mode}), which has no fixed white: "
        "convert it to 8 bits"
    )


@pytest.mark.parametrize("to", ["L", "RGB", "RGBA"])
def test_training_and_evaluation_refuse_grayscale_of_more_than_8_bits(to):
    with pytest.raises(OSError, match=r"grayscale of more than 8 bits \(mode I;16B\)"):
        SampleTransform(mode=to).decode(Image.new("I;16B", (8, 8)))


def test_a_picture_that_is_larger_than_pillow_expects_is_read_without_a_warning(
    run, tmp_path, monkeypatch
):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1100)
    Image.new("RGB", (40, 40)).save(tmp_path / "large.png")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(predict(run, tmp_path, **CPU).images) == 1


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB")])
def test_images_are_brought_to_the_models_channels(tmp_path, channels, mode):
    rising().convert("RGBA").save(tmp_path / "rgba.png")
    rising().convert("RGB").convert(mode).save(tmp_path / "same.png")
    statistics = {"mean": (0.4,) * channels, "std": (0.3,) * channels}
    found = by_image(predict(vit(in_chans=channels), tmp_path, **statistics, **CPU))
    rgba, same = found.values()
    assert rgba == pytest.approx(same)


def test_orientation_tags_are_left_as_in_training(run, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    rising().save(tmp_path / "a.png")
    rising().save(tmp_path / "b.png", exif=exif)
    rising().rotate(-90).save(tmp_path / "c.png")
    plain, tagged, turned = by_image(predict(run, tmp_path, **CPU)).values()
    assert tagged == pytest.approx(plain, abs=1e-6)
    assert tagged != pytest.approx(turned, abs=1e-6)


def test_an_exported_folder_predicts_the_same_with_the_same_names(run, pictures, tmp_path):
    folder = export(run, output=tmp_path / "student").path
    expected = predict(run, pictures, **CPU).images
    assert predict(folder, pictures, **CPU).images == expected
    assert predict(f"local-dir:{folder}", pictures, **CPU).images == expected


def test_a_released_checkpoint_predicts_with_the_names_of_imagenet(pictures, tmp_path):
    base = {"img_size": 32, "patch_size": 16, "embed_dim": 64, "num_heads": 1, "depth": 1}
    student = create_student("deit_tiny_patch16_224", "widelast", width=64, **base)
    save_file(student.state_dict(), tmp_path / "released.safetensors")
    guess = predict(tmp_path / "released.safetensors", pictures, **CPU).images[0].guesses[0]
    assert guess.name == ImageNetInfo().index_to_description(guess.index)


def test_a_timm_name_takes_a_file_of_weights(pictures, tmp_path):
    model = timm.create_model("test_vit", num_classes=3)
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    named = predict("test_vit", pictures, checkpoint=tmp_path / "weights.pth", **CPU)
    assert by_image(named) == by_image(predict(model, pictures, **CPU))


def test_a_model_is_left_in_the_mode_it_was_in(pictures):
    model = vit(in_chans=3).train()
    predict(model, pictures, **CPU)
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
    predictions = predict(run, pictures, top=2, output=tmp_path / "found.csv", **CPU)
    with open(tmp_path / "found.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 12
    guess = predictions.images[0].guesses[1]
    assert (rows[1]["image"], rows[1]["rank"]) == (predictions.images[0].image, "2")
    assert (int(rows[1]["index"]), rows[1]["name"]) == (guess.index, guess.name)
    assert float(rows[1]["probability"]) == pytest.approx(guess.probability, rel=1e-5)


def test_names_cannot_steer_the_terminal_or_a_spreadsheet(run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names = ["=1+1.png", "-2.png", "a\x1b]0;t\x07\n.png", "\u202egnp.png"]
    for name in names:
        rising().save(name)
    predictions = predict(run, names, top=1, output="found.csv", **CPU)
    with open("found.csv", newline="") as file:
        cells = [row["image"] for row in csv.DictReader(file)]
    assert cells == ["'=1+1.png", "'-2.png", r"a\x1b]0;t\x07\n.png", r"\u202egnp.png"]
    predictions.save("found.json")
    content = json.loads((tmp_path / "found.json").read_text())
    assert [image["image"] for image in content["images"]] == names
    lines = command._report(predictions, "m\x1b", None).splitlines()
    assert [line.split("  ")[0] for line in lines[:-1]] == [*names[:2], *cells[2:]]
    assert r"(m\x1b," in lines[-1]


def test_json_has_everything(run, pictures, tmp_path):
    (tmp_path / "text.png").write_text("no image")
    places = [pictures, tmp_path / "text.png"]
    predictions = predict(run, places, output=tmp_path / "found.json", **CPU)
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
        ({"workers": -1}, ValueError, "workers must be 0 to 1024, got -1"),
        ({"top": "5"}, TypeError, "top must be an integer, got '5'"),
        ({"top": 2.5}, TypeError, r"top must be an integer, got .*2\.5"),
        ({"batch_size": True}, TypeError, "batch_size must be an integer, got .*True"),
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
        predict(run, pictures, **CPU | options)


@pytest.mark.parametrize("name", ["found.csv", "found.json"])
def test_an_output_that_is_a_folder_is_refused_by_name(run, pictures, tmp_path, name):
    (tmp_path / name).mkdir()
    with pytest.raises(ValueError, match=f"output must be a file.*{name}"):
        predict(run, pictures, **CPU, output=tmp_path / name)


def test_no_images_at_all_are_refused(run):
    with pytest.raises(ValueError, match="no images were given"):
        predict(run, [], **CPU)


@pytest.mark.parametrize(
    ("images", "got"),
    [
        (None, "None"),
        (b"a.jpg", "bytes"),
        ([None], "None"),
        ([torch.zeros(1)], r"\[1\] of torch.float32"),
    ],
)
def test_images_that_are_no_paths_are_refused(run, images, got):
    with pytest.raises(TypeError, match=f"predict: images must be paths, got {got}"):
        predict(run, images, **CPU)


def test_a_model_without_classes_is_refused(pictures):
    with pytest.raises(ValueError, match="VisionTransformer, has no classes"):
        predict(vit(in_chans=3, num_classes=0), pictures, **CPU)


@pytest.mark.parametrize(
    ("output", "got"),
    [
        (lambda images: (torch.zeros(len(images), 3), None), "tuple"),
        (lambda images: images, r"\[6, 3, 224, 224\] of torch.float32"),
        (lambda images: torch.zeros(1, 3), r"\[1, 3\] of torch.float32"),
        (lambda images: None, "None"),
    ],
)
def test_what_is_no_row_of_logits_for_every_image_is_refused(pictures, output, got):
    message = rf"predict: the model's logits must be \[B, classes\] with B = 6, got {got}$"
    with pytest.raises(ValueError, match=message):
        predict(Gives(output), pictures, **CPU)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_weights_that_do_not_fit_float32_images_are_refused(pictures, dtype):
    model = vit(in_chans=3).to(dtype)
    refused = f"weights must be torch.float32, .* got {dtype}"
    with pytest.raises(ValueError, match=refused):
        predict(model, pictures, **CPU)
    with pytest.raises(ValueError, match=refused):
        evaluate(model, pictures, device="cpu", workers=0, classes_by="number")


def overflows_over(rows):
    """Logits of which some rows are not finite."""

    def logits(images):
        made = images.mean((2, 3))
        made[rows, 1] = float("inf")
        return made

    return Gives(logits)


def test_an_image_without_finite_logits_is_told_and_the_rest_predicted(pictures):
    predictions = predict(overflows_over([1]), pictures, **CPU)
    assert len(predictions.images) == 5
    (fault,) = predictions.unreadable
    assert fault.name == str(pictures / "blue" / "1.jpg")
    assert fault.name not in by_image(predictions)
    assert fault.reason == "its logits are not finite"
    (fault,) = predict(overflows_over([1]), pictures, amp="fp16", **CPU).unreadable
    assert "amp='fp16' overflows" in fault.reason


def test_a_class_that_a_model_masks_is_no_broken_image(pictures):
    predictions = predict(
        Gives(lambda x: x.mean((2, 3)) - torch.tensor([0, 0, 1e999])), pictures, **CPU
    )
    assert len(predictions.images) == 6 and predictions.unreadable == ()
    assert all(prediction.guesses[-1].probability == 0 for prediction in predictions.images)


def test_logits_of_earlier_batches_are_not_kept(pictures):
    made = []

    def logits(images):
        assert not any(reference() is not None for reference in made)
        array = np.random.rand(len(images), 50).astype(np.float32)
        made.append(weakref.ref(array))
        return torch.from_numpy(array)

    predict(Gives(logits), pictures, **CPU, batch_size=2)
    assert len(made) == 3


def test_nothing_that_can_be_read_is_no_error(run, tmp_path):
    (tmp_path / "text.png").write_text("no image")
    predictions = predict(run, tmp_path, **CPU)
    assert predictions.images == () and len(predictions.unreadable) == 1


def predict_on_rank(rank, folder):
    seen = []

    def logits(images):
        seen.append(len(images))
        return images.mean((2, 3))

    output = f"{folder}/rank{rank}.json"
    predictions = predict(Gives(logits), f"{folder}/val", **CPU, batch_size=2, output=output)
    assert sum(seen) == 3
    predictions.save(f"{folder}/returned{rank}.json")


@pytest.mark.slow
def test_processes_share_the_images_and_the_main_one_writes(tmp_path):
    folder = image_folder(tmp_path, train=1, val=2)
    (folder / "val" / "green" / "text.png").write_text("no image")
    run_ranks(predict_on_rank, str(folder))
    alone = predict(Gives(lambda images: images.mean((2, 3))), folder / "val", **CPU)
    alone.save(tmp_path / "alone.json")
    for name in ("rank0", "returned0", "returned1"):
        assert (tmp_path / f"{name}.json").read_text() == (tmp_path / "alone.json").read_text()
    assert not (tmp_path / "rank1.json").exists()


def test_a_released_checkpoint_may_be_on_the_hub(pictures, tmp_path, monkeypatch):
    base = {"img_size": 32, "patch_size": 16, "embed_dim": 64, "num_heads": 1, "depth": 1}
    student = create_student("deit_tiny_patch16_224", "widelast", width=64, **base)
    save_file(student.state_dict(), tmp_path / "cached.safetensors")
    monkeypatch.setattr(hub_download, "_hub_answers", lambda: True)
    monkeypatch.setattr(
        hub_download, "hf_hub_download", lambda *_, **__: tmp_path / "cached.safetensors"
    )
    named = predict("hf_hub:owner/name/model.safetensors", pictures, **CPU)
    assert named.images == predict(tmp_path / "cached.safetensors", pictures, **CPU).images


def run_command(*arguments):
    parser = argparse.ArgumentParser()
    command.configure_predict(parser)
    fixed = ["--device", "cpu", "--workers", "0", "--quiet"]
    options = parser.parse_args([*map(str, arguments), *fixed])
    return options.run(options)


def test_the_command_prints_every_images_guesses(run, pictures, capsys):
    assert run_command(run, pictures / "red" / "0.jpg", "--top", 2) == 0
    first, *guesses, empty, last = capsys.readouterr().out.splitlines()
    assert first == str(pictures / "red" / "0.jpg") and empty == ""
    expected = predict(run, pictures / "red" / "0.jpg", top=2, **CPU).images[0].guesses
    assert [line.split() for line in guesses] == [
        [f"{100 * g.probability:.2f}", "%", g.name, "(class", f"{g.index})"] for g in expected
    ]
    assert last == f"1 image ({run}, weights ema)"


def test_one_guess_for_an_image_is_one_line(run, pictures, capsys):
    run_command(run, pictures, "--top", 1)
    assert len(capsys.readouterr().out.splitlines()) == 6 + 1


def test_the_command_names_what_it_passed_over_and_says_so_at_its_end(run, tmp_path, capsys):
    (tmp_path / "text.png").write_text("no image")
    assert run_command(run, tmp_path) == 1
    printed = capsys.readouterr()
    (line,) = printed.err.splitlines()
    assert printed.out == ""  # not "0 images"
    assert line.startswith(f"fastkd predict: skipped {tmp_path / 'text.png'}: no JPEG, PNG, ")


def test_the_command_takes_a_name_and_weights_for_it(pictures, tmp_path, capsys):
    torch.save(timm.create_model("test_vit", num_classes=3).state_dict(), tmp_path / "w.pth")
    assert run_command("test_vit", pictures, "--checkpoint", tmp_path / "w.pth") == 0
    assert "6 images (test_vit, weights as given)" in capsys.readouterr().out


def test_a_reader_that_has_read_enough_ends_the_command_quietly(run, tmp_path, monkeypatch, capsys):
    Image.new("RGB", (8, 8)).save(tmp_path / "good.png")
    (tmp_path / "text.png").write_text("no image")
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as closed:
        monkeypatch.setattr("sys.stdout", closed)
        assert main(["predict", str(run), str(tmp_path), "--workers", "0"]) == 1
    assert capsys.readouterr().err.startswith(f"fastkd predict: skipped {tmp_path / 'text.png'}")


def test_one_process_prints_for_all(run, pictures, monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert run_command(run, pictures, pictures / "missing.jpg") == 0
    told = capsys.readouterr()
    assert told.out == "" and told.err == ""


def test_a_long_run_tells_how_far_it_is(run, pictures, monkeypatch, capsys):
    monkeypatch.setattr(image_progress, "LINE_EVERY_SECONDS", 0.0)
    predict(run, pictures, **CPU | {"quiet": False}, batch_size=4)
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(", about")[0] for line in lines] == [
        "predict: 4 of 6 images",
        "predict: 6 of 6 images",
    ]


def test_a_quiet_run_tells_nothing(run, pictures, monkeypatch, capsys):
    monkeypatch.setattr(image_progress, "LINE_EVERY_SECONDS", 0.0)
    predict(run, pictures, **CPU)
    assert capsys.readouterr().err == ""
