"""A folder of a few images."""

import shutil

import pytest

from tests.harness.tiny import image_folder


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return image_folder(tmp_path_factory.mktemp("images"), train=3, val=2)


@pytest.fixture
def folder(made, tmp_path):
    return shutil.copytree(made, tmp_path / "images")
