"""Finding the images below a folder."""

import os

import pytest

from fastkd.data.files import list_images


def listed(folder, *names):
    """Make empty files, and list the images among them by their path in the folder."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return [os.path.relpath(path, folder) for path in list_images(folder)]


def test_images_are_listed_in_natural_order_whatever_the_case_of_their_endings(tmp_path):
    names = ["b/10.jpg", "b/9.JPEG", "a.Png", "b/a/1.png"]
    assert listed(tmp_path, *names) == ["a.Png", "b/9.JPEG", "b/10.jpg", "b/a/1.png"]


def test_names_that_are_equal_in_natural_order_have_an_order_all_the_same(tmp_path):
    names = ["01.png", "1.PNG", "1.png"]
    assert listed(tmp_path, *reversed(names)) == names


def test_hidden_files_and_files_of_other_kinds_are_no_images(tmp_path):
    assert listed(tmp_path, ".a.png", ".b/c.png", "d.txt", "png", "e.png.txt") == []
    (tmp_path / "folder.png").mkdir()
    os.mkfifo(tmp_path / "pipe.png")
    assert listed(tmp_path) == []


def test_links_are_followed_but_not_to_a_folder_that_they_lie_in(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    (tmp_path / "a" / "self").symlink_to(".")
    (tmp_path / "a" / "up").symlink_to("..")
    (tmp_path / "a" / "twin").symlink_to("../b")
    (tmp_path / "b" / "twin").symlink_to("../a")
    assert listed(tmp_path, "a/1.png", "b/2.png") == [
        "a/1.png",
        "a/twin/2.png",
        "b/2.png",
        "b/twin/1.png",
    ]


def test_links_to_nothing_are_listed_to_be_found_unreadable(tmp_path):
    (tmp_path / "lost.png").symlink_to("nowhere.png")
    (tmp_path / "loop.png").symlink_to("loop.png")
    assert listed(tmp_path) == ["loop.png", "lost.png"]


def test_a_folder_that_cannot_be_listed_is_an_error(tmp_path, monkeypatch):
    (tmp_path / "locked").mkdir()
    scandir = os.scandir

    def refuse(folder):
        if str(folder).endswith("locked"):
            raise PermissionError(13, "Permission denied", folder)
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(PermissionError, match="locked"):
        listed(tmp_path, "a.png")
