"""Text of others where it is printed or becomes a cell."""

import csv
import json
import os

import pytest

from fastkd.utils.io import csv_text, printable, writable, write_text

STEERING = [
    ("\x1b[2J", r"\x1b[2J"),  # clears the screen
    ("\x1b]0;title\x07", r"\x1b]0;title\x07"),  # OSC: names the window
    ("\x9b31m", r"\x9b31m"),  # C1's CSI
    ("a\nb\r\tc", r"a\nb\r\tc"),
    ("\x00\x08\x7f", r"\x00\x08\x7f"),
    ("exe\u202egnp.jpg", r"exe\u202egnp.jpg"),  # shown as exegpj.png
    ("\u2066x\u2069\u200f\u061c", r"\u2066x\u2069\u200f\u061c"),
    ("a\u2028b\u2029", r"a\u2028b\u2029"),
    ("\ud800 \udfff", r"\ud800 \udfff"),  # JSON may hold them
    (os.fsdecode(b"\xff.jpg"), r"\xff.jpg"),
    ("\x85", r"\x85"),
]


@pytest.mark.parametrize(("name", "shown"), STEERING)
def test_what_would_steer_a_terminal_is_escaped(name, shown):
    assert printable(name) == shown
    printable(name).encode()


@pytest.mark.parametrize(
    "name", ["cat", "größe", "日本\u3000語", "a\u200cb", "👩\u200d🔬", "a b", "C:\\x"]
)
def test_other_text_stays_as_it_is(name):
    assert printable(name) == writable(name) == name


def test_a_text_of_several_lines_keeps_them():
    assert printable("a\n\tb\x1b", lines=True) == "a\n\tb\\x1b"


@pytest.mark.parametrize(
    ("cell", "written"),
    [
        ("=1+1", "'=1+1"),
        ("+cmd|' /C calc'!A0", "'+cmd|' /C calc'!A0"),
        ("-x.jpg", "'-x.jpg"),
        ("-1+1", "'-1+1"),
        ("@SUM(A1)", "'@SUM(A1)"),
        ("\uff1d1", "'\uff1d1"),  # of full width
        ("\t=1", r"\t=1"),
        ("\r=1", r"\r=1"),
        ("\n=1", r"\n=1"),
        ("-0.5", "-0.5"),
        ("+1e-3", "+1e-3"),
        ("-inf", "-inf"),
        (-0.5, "-0.5"),
        (None, ""),
        ("", ""),
        ('a,b"c', 'a,b"c'),
        ("a=b", "a=b"),
    ],
)
def test_no_text_of_a_cell_is_a_formula(cell, written):
    assert list(csv.reader(csv_text([[cell, 1]]).splitlines())) == [[written, "1"]]


def test_names_that_are_no_utf8_are_written_as_escapes(tmp_path):
    name = os.fsdecode(b"d\xe9ta")
    write_text(tmp_path / "a.json", json.dumps({"data": name}, ensure_ascii=False))
    assert json.loads((tmp_path / "a.json").read_text()) == {"data": name}
