"""The folder of photographs that stands in for a data set."""

import make_photographs as photographs
import numpy as np
import pytest
from PIL import Image


@pytest.fixture
def two_photographs(monkeypatch):
    rng = np.random.default_rng(0)
    images = {n: rng.integers(0, 255, (60, 90, 3), dtype=np.uint8) for n in ("cat", "flower")}
    monkeypatch.setattr(photographs, "photographs", lambda: images)


def test_every_photograph_becomes_a_class_of_square_crops(two_photographs, tmp_path):
    assert photographs.write_crops(tmp_path, crops=3) == 6
    for name in ("cat", "flower"):
        crops = sorted((tmp_path / name).glob("*.png"))
        assert len(crops) == 3
        with Image.open(crops[0]) as image:
            assert image.size == (256, 256)


def test_the_same_seed_gives_the_same_crops(two_photographs, tmp_path):
    for folder, seed in (("a", 1), ("b", 1), ("c", 2)):
        photographs.write_crops(tmp_path / folder, crops=1, seed=seed)
    first, same, other = ((tmp_path / f / "cat" / "00.png").read_bytes() for f in "abc")
    assert first == same != other


def test_what_is_missing_is_named(monkeypatch, tmp_path, capsys):
    def missing():
        raise ImportError("No module named 'skimage'")

    monkeypatch.setattr(photographs, "photographs", missing)
    monkeypatch.setattr("sys.argv", ["photographs", str(tmp_path)])
    with pytest.raises(SystemExit):
        photographs.main()
    assert "pip install scikit-learn scikit-image" in capsys.readouterr().err
