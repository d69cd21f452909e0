"""One reader of images: what predict, evaluate and analyze find in the same folder."""

import os

import numpy as np
import pytest
from PIL import Image

from fastkd import analyze, evaluate, predict
from fastkd.config import Recipe
from fastkd.data.loader import eval_loader
from fastkd.data.open_data import open_data
from fastkd.data.transforms import InputSpec
from fastkd.utils.io import writable
from tests.harness.tiny import vit

GOOD = ["blue/10.JPEG", r"blue/caf\xff.png", "blue/picture.webp", "red/9.png", "red/rgba.png"]
BAD = ["blue/deep.png", "blue/empty.jpg", "red/lost.png", "red/torn.jpg"]


@pytest.fixture
def folder(tmp_path):
    """Two classes with images of which half cannot be read, beside what does not count."""
    for name in ("blue", "red", "red/.cache", "empty"):
        (tmp_path / name).mkdir()
    noise = Image.effect_noise((40, 36), 60)
    noise.save(tmp_path / "blue" / "10.JPEG")
    noise.save(os.path.join(os.fsencode(tmp_path), b"blue/caf\xff.png"))
    noise.convert("RGB").save(tmp_path / "red" / "9.png")
    noise.convert("RGBA").save(tmp_path / "red" / "rgba.png")
    Image.fromarray(np.full((9, 9), 30000, np.uint16)).save(tmp_path / "blue" / "deep.png")
    (tmp_path / "blue" / "empty.jpg").touch()
    (tmp_path / "red" / "lost.png").symlink_to("nowhere.png")
    content = (tmp_path / "blue" / "10.JPEG").read_bytes()
    (tmp_path / "red" / "torn.jpg").write_bytes(content[: len(content) // 2])
    for name in (".hidden.png", "red/.cache/1.png", "blue/picture.webp", "red/notes.txt"):
        noise.save(tmp_path / name, "PNG")
    (tmp_path / "blue" / "again").symlink_to("..")
    return tmp_path


def predicted(folder, model):
    found = predict(model, folder, device="cpu", workers=0, quiet=True)
    below = len(f"{folder}/")
    return (
        [prediction.image[below:] for prediction in found.images],
        {fault.name[below:]: fault.reason for fault in found.unreadable},
    )


def evaluated(folder, model):
    data = open_data(folder, need_train=False)
    recipe = Recipe(workers=0, eval_batch_size=3)
    batches = list(eval_loader(data, recipe, InputSpec((3, 32, 32), (0.5,) * 3, (0.5,) * 3)))
    bad = {fault.name: fault.reason for batch in batches for fault in batch.faults}
    names = [data.val.filename(index) for batch in batches for index in batch.samples.tolist()]
    measured = evaluate(model, folder, classes_by="number", device="cpu", workers=0)
    assert (measured["unreadable"], measured["count"]) == (len(bad), len(bad) + len(names))
    return [writable(os.path.relpath(name, folder)) for name in names], {
        os.path.relpath(name, folder): reason for name, reason in bad.items()
    }


def analyzed(folder, model):
    report = analyze(model, folder, device="cpu", workers=0, max_unreadable=1.0, quiet=True)
    (measured,) = report.models
    return measured.images, dict(measured.skipped)


def test_predict_evaluate_and_analyze_agree_on_the_images_and_the_unreadable_ones(folder):
    model = vit(in_chans=3, num_classes=3)
    good, bad = predicted(folder, model)
    assert (good, sorted(bad)) == (GOOD, BAD)
    assert analyzed(folder, model) == (len(good), bad)
    assert evaluated(folder, model) == (good, bad)
