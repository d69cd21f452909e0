"""Opening an image."""

import pytest
from PIL import Image, UnidentifiedImageError

from fastkd.data.images import open_image


@pytest.fixture
def path(tmp_path):
    Image.effect_noise((64, 48), 60).save(tmp_path / "a.png")
    return tmp_path / "a.png"


def test_a_path_an_open_file_and_bytes_are_the_same_image(path):
    with path.open("rb") as file:
        images = [open_image(source) for source in (path, str(path), file, path.read_bytes())]
        assert len({image.tobytes() for image in images}) == 1
        assert {image.size for image in images} == {(64, 48)}


def test_a_truncated_image_opens_and_fails_when_it_is_decoded(path):
    content = path.read_bytes()
    image = open_image(content[: len(content) // 2])
    with pytest.raises(OSError, match="truncated"):
        image.load()


def test_what_is_no_image_is_not_identified():
    with pytest.raises(UnidentifiedImageError):
        open_image(b"no image")
