"""Finding the images below a folder."""

import os
import socket

import pytest
from timm.data.readers.img_extensions import get_img_extensions

from fastkd.data.image_files import (
    ENDINGS,
    LeftOut,
    image_endings,
    is_hidden,
    is_inside,
    list_folders,
    list_images,
    open_file,
    warn_left_out,
)


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


@pytest.mark.parametrize("folder", ["/a/b", "b", ".", "pipe:cat /a"])
@pytest.mark.parametrize(
    "path, inside",
    [
        ("x.tar", True),
        ("./c/../x.tar", True),
        ("..x/y.tar", True),
        ("../x.tar", False),
        ("c/../../x.tar", False),
        ("/etc/x.tar", False),
        ("..", False),
        (".", False),
        ("", False),
        ("x\0.tar", False),
    ],
)
def test_a_path_of_somebody_else_is_inside_a_folder_or_not(path, inside, folder):
    assert is_inside(path, folder) == inside


@pytest.mark.parametrize("ending", ENDINGS)
def test_one_list_of_endings_and_what_timm_was_told(ending, tmp_path):
    assert listed(tmp_path, f"a{ending}", f"b{ending.upper()}", f"c{ending}.txt") == [
        f"a{ending}",
        f"b{ending.upper()}",
    ]
    assert set(get_img_extensions()) <= set(image_endings())


@pytest.mark.parametrize(
    "path, hidden",
    [
        ("a/._1.jpg", True),
        (".ipynb_checkpoints/1.jpg", True),
        ("./__MACOSX/a/1.jpg", True),
        ("a/.cache/b/1.jpg", True),
        ("./a/1.jpg", False),
        ("../a/1.jpg", False),
        ("a/1..jpg", False),
    ],
)
def test_a_path_is_hidden_by_any_part_of_it(path, hidden):
    assert is_hidden(path) == hidden


def test_links_to_a_folder_above_are_told_and_two_links_to_one_folder_are_read(tmp_path):
    root = tmp_path / "root"
    listed(root, "a/1.png", "b/2.png")
    for number, target in enumerate((".", "..", "../..", "../../..", "../b", "../b")):
        (root / "a" / f"link{number}").symlink_to(target)
    (root / "a" / "again.png").symlink_to("1.png")
    left_out = LeftOut()
    found = [os.path.relpath(path, root) for path in list_images(root, left_out)]
    assert found == ["a/1.png", "a/again.png", "a/link4/2.png", "a/link5/2.png", "b/2.png"]
    assert str(left_out).startswith("4 links to a folder that they are in: ")
    assert list_folders(root) == ["a", "b"] or list_folders(root) == ["b", "a"]
    (root / "up").symlink_to("..")
    (root / "self").symlink_to("self")
    assert sorted(list_folders(root)) == ["a", "b"]


def irregular(folder):
    """A pipe, a link to it, a socket, and a link to a device, all of them named as images."""
    os.mkfifo(folder / "pipe.jpg")
    (folder / "link.jpg").symlink_to("pipe.jpg")
    (folder / "device.png").symlink_to("/dev/zero")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(os.path.relpath(folder / "socket.jpg"))  # such a path may not be long
    return ["pipe.jpg", "link.jpg", "device.png", "socket.jpg"]


def test_only_regular_files_are_listed_and_opened(tmp_path):
    names = irregular(tmp_path)
    left_out = LeftOut()
    assert list_images(tmp_path, left_out) == []
    assert str(left_out).startswith("4 pipes, devices or broken links: ")
    for name in names:
        with pytest.raises(OSError, match=rf"no regular file: .*{name}"):
            open_file(tmp_path / name)
    with pytest.raises(IsADirectoryError):
        open_file(tmp_path)
    (tmp_path / "a.txt").write_bytes(b"content")
    with open_file(tmp_path / "a.txt") as file:
        assert file.read() == b"content"


def test_what_is_left_out_is_one_line_with_counts_by_ending(tmp_path, caplog):
    names = ["a/1.txt", "a/2.TXT", "b/3.mp4", "b/none", "b/odd.\x1b[31m", "b/4.png", ".x.txt"]
    listed(tmp_path, *names)
    left_out = LeftOut()
    assert len(list_images(tmp_path, left_out)) == 1
    warn_left_out(tmp_path, left_out)
    (record,) = caplog.records
    text = record.getMessage()
    assert "left out 5 files that are no images: 2 .txt, " in text
    assert all(part in text for part in ("1 .mp4", "1 without ending", "1 others"))
    assert "\x1b" not in text and "\n" not in text


@pytest.mark.parametrize("rank, told", [("0", 1), ("1", 0)])
def test_what_is_left_out_is_told_by_the_main_process_if_there_is_something(
    monkeypatch, caplog, rank, told
):
    monkeypatch.setenv("RANK", rank)
    left_out = LeftOut()
    warn_left_out("data", left_out)
    assert not caplog.records
    left_out.add(LeftOut.NO_IMAGE, os.fsdecode(b"caf\xe9.txt"))
    left_out.add(LeftOut.LOOP, os.fsdecode(b"caf\xe9"))
    warn_left_out(os.fsdecode(b"d\xe9ta"), left_out)
    assert len(caplog.records) == told
    assert all(record.getMessage().encode() for record in caplog.records)


def test_folders_are_listed_without_asking_about_every_file(tmp_path, monkeypatch):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / f"{name}.jpg").touch()
    (tmp_path / "c").symlink_to("a")
    (tmp_path / "loop").symlink_to(".")
    stat = os.stat

    def asked(path, **options):
        assert not str(path).endswith(".jpg")
        return stat(path, **options)

    monkeypatch.setattr(os, "stat", asked)
    assert sorted(list_folders(tmp_path)) == ["a", "b", "c"]
