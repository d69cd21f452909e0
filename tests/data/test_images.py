"""Opening image files that may be anything, in bounded time and memory."""

import contextlib
import io
import os
import socket
import struct
import subprocess
import time
import warnings
import zlib

import pytest
import torch
from PIL import EpsImagePlugin, Image, JpegImagePlugin, UnidentifiedImageError

from fastkd.data import image_files
from fastkd.data.batches import SampleTransform
from fastkd.data.datasets import FileReader, ReadableImages
from fastkd.data.image_files import load_rgb, open_file, open_image, reason_of
from fastkd.data.open_data import open_data
from fastkd.data.shard_writer import convert
from fastkd.inference.predict import find_images

NOISE = Image.effect_noise((64, 48), 60).convert("RGB")
POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\nshowpage\n"


def encoded(image=NOISE, kind="JPEG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def jpeg_with(*segments, padding=b""):
    """A JPEG with segments (marker, content) before its own."""
    added = b"".join(
        bytes([0xFF, marker]) + struct.pack(">H", len(content) + 2) + content
        for marker, content in segments
    )
    whole = encoded()
    return whole[:2] + added + padding + whole[2:]


def chunk(kind, content):
    checksum = struct.pack(">I", zlib.crc32(kind + content))
    return struct.pack(">I", len(content)) + kind + content + checksum


def png_with(chunks, behind=False):
    """A PNG with chunks before its pixels or behind them."""
    whole = encoded(kind="PNG")
    place = len(whole) - 12 if behind else 33
    return whole[:place] + chunks + whole[place:]


def png_of(width, height):
    """The beginning of a PNG of a size."""
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(99)))


def tiff_of_tags(count, size, big):
    """A TIFF of so many tags, all with the same bytes as their value."""
    if big:
        head = b"II" + struct.pack("<HHHQ", 43, 8, 0, 16 + size)
        tags = [struct.pack("<HHQQ", 40_000 + n % 5000, 1, size, 16) for n in range(count)]
        return head + bytes(size) + struct.pack("<Q", count) + b"".join(tags) + bytes(8)
    head = b"II" + struct.pack("<HI", 42, 8 + size)
    tags = [struct.pack("<HHII", 500 + n, 1, size, 8) for n in range(count)]
    return head + bytes(size) + struct.pack("<H", count) + b"".join(tags) + bytes(4)


def exif_of(size):
    """EXIF in segments, as many as it takes."""
    content = b"II*\0\x08\0\0\0" + bytes(size - 8)
    return [(0xE1, b"Exif\0\0" + content[at : at + 65_000]) for at in range(0, size, 65_000)]


def loaded(content):
    image = open_image(content)
    image.load()
    return image


def test_a_path_an_open_file_and_bytes_are_the_same_image(tmp_path):
    path = tmp_path / "a.png"
    NOISE.save(path)
    with path.open("rb") as file:
        opened = [open_image(source) for source in (path, str(path), file, path.read_bytes())]
        assert len({image.tobytes() for image in opened}) == 1
        assert {image.size for image in opened} == {(64, 48)}


def test_a_truncated_image_opens_and_fails_when_it_is_decoded():
    content = encoded(kind="PNG")
    image = open_image(content[: len(content) // 2])
    with pytest.raises(OSError, match="truncated"):
        image.load()


def test_what_is_no_image_is_not_identified():
    with pytest.raises(UnidentifiedImageError):
        open_image(b"no image")


@pytest.mark.parametrize(
    "kind", ["JPEG", "MPO", "PNG", "WEBP", "GIF", "BMP", "PPM", "TIFF", "JPEG2000", "AVIF"]
)
def test_formats_are_read_as_pillow_reads_them(kind):
    try:
        content = encoded(kind=kind)
    except (KeyError, OSError) as error:
        pytest.skip(f"this Pillow writes no {kind}: {error}")
    assert loaded(content).tobytes() == Image.open(io.BytesIO(content)).tobytes()


@pytest.mark.parametrize("options", [{"compression": "tiff_lzw"}, {"compression": "jpeg"}])
def test_compressed_tiffs_in_files_and_in_memory_are_the_same(tmp_path, options):
    NOISE.save(tmp_path / "a.tif", **options)
    with open(tmp_path / "a.tif", "rb") as file:
        from_file = loaded(file).tobytes()
    assert from_file == loaded((tmp_path / "a.tif").read_bytes()).tobytes()


@pytest.mark.parametrize(
    ("content", "name"),
    [
        (POSTSCRIPT, "EPS"),
        (b"\xc5\xd0\xd3\xc6" + bytes(28) + POSTSCRIPT, "EPS with a preview"),
        (b"\xd7\xcd\xc6\x9a\0\0" + bytes(40), "WMF"),
        (b"\x89HDF\r\n\x1a\n" + bytes(40), "HDF5"),
        (b"GRIB" + bytes(40), "GRIB"),
        (b"8BPS\0\1" + bytes(40), "PSD"),
    ],
)
def test_other_formats_are_no_images_whatever_they_are_called(tmp_path, monkeypatch, content, name):
    (tmp_path / "a.jpg").write_bytes(content)

    def started(*_, **__):
        raise AssertionError(f"{name} was decoded")

    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", started)
    monkeypatch.setattr(subprocess, "check_call", started)
    with pytest.raises(OSError, match=r"cannot read .*a\.jpg \(sample 0\): no JPEG, PNG, WEBP, "):
        ReadableImages(FileReader("", [(str(tmp_path / "a.jpg"), 0)], {}))[0]
    assert convert(str(tmp_path / "a.jpg"), 64, 90).startswith("no JPEG, PNG, WEBP, ")


@pytest.mark.parametrize("kind", ["fifo", "link to a fifo", "socket", "device", "link to a device"])
def test_what_is_no_regular_file_is_never_opened(tmp_path, monkeypatch, kind):
    path = tmp_path / "a.jpg"
    real = tmp_path / "real" if kind.startswith("link") else path
    if "fifo" in kind:
        os.mkfifo(real)
    elif kind == "socket":
        monkeypatch.chdir(tmp_path)  # paths of sockets are short
        socket.socket(socket.AF_UNIX).bind("a.jpg")
    if kind.endswith("device"):
        path.symlink_to("/dev/zero")  # without end
    elif real != path:
        path.symlink_to(real)
    with pytest.raises(OSError, match="no regular file"):
        open_file(path)
    with pytest.raises(OSError, match="no regular file"):
        open_image(path)
    with pytest.raises(OSError, match=r"a\.jpg .*no regular file"):
        ReadableImages(FileReader("", [(str(path), 0)], {}))[0]
    with pytest.raises(OSError, match="no regular file"):
        convert(str(path), 64, 90)
    assert find_images(path) == ([str(path)], [])  # which is found unreadable as above


def test_a_pipe_that_takes_a_files_place_is_not_waited_for(tmp_path, monkeypatch):
    NOISE.save(tmp_path / "a.png")
    regular = os.stat(tmp_path / "a.png")
    os.mkfifo(tmp_path / "b.png")
    monkeypatch.setattr(os, "stat", lambda path: regular)
    with open_file(tmp_path / "b.png") as file:
        assert file.read() == b""


METADATA = {
    "a lot of EXIF": lambda: jpeg_with(*exif_of(20_000_000)),
    "a lot of comments": lambda: jpeg_with(*[(0xFE, bytes(60_000))] * 100),
    "extended XMP": lambda: jpeg_with(
        *[(0xE1, b"http://ns.adobe.com/xmp/extension/\0" + bytes(65_000))] * 100
    ),
    "a wrong color profile": lambda: jpeg_with(
        *[(0xE2, b"ICC_PROFILE\0" + bytes([n, 99]) + bytes(60_000)) for n in range(90)]
    ),
    "a large chunk": lambda: png_with(chunk(b"teXt", bytes(20_000_000))),
}


@pytest.mark.parametrize("name", METADATA)
def test_metadata_that_are_not_used_cost_no_time(name):
    content = METADATA[name]()
    began = time.process_time()
    image = loaded(content)
    assert time.process_time() - began < 2  # 4 s and more without; a hundredth of it here
    assert image.tobytes() == loaded(encoded(kind=image.format)).tobytes()


def test_the_first_exif_and_what_decoding_needs_are_kept():
    cmyk = encoded(NOISE.convert("CMYK"))  # Adobe's segment tells that colors are inverted
    exif = Image.Exif()
    exif[0x0112] = 6
    first = b"Exif\0\0" + exif.tobytes().removeprefix(b"Exif\0\0")
    segments = [(0xE1, first), *[(0xED, bytes(60_000))] * 3]
    added = b"".join(
        bytes([0xFF, marker]) + struct.pack(">H", len(content) + 2) + content
        for marker, content in segments
    )
    image = loaded(cmyk[:2] + added + cmyk[2:])
    assert image.getexif()[0x0112] == 6 and len(image.applist) < 5
    assert image.tobytes() == loaded(cmyk).tobytes()


BOMBS = {
    "tiny segments": lambda: jpeg_with(*[(0xE5, b"ab")] * 30_000),
    "fill bytes": lambda: jpeg_with(padding=b"\xff" * 1_000_000),
    "chunks": lambda: png_with(chunk(b"teXt", b"") * 30_000),
    "texts": lambda: png_with(b"".join(chunk(b"tEXt", b"%d\0v" % n) for n in range(30_000))),
    "chunks behind the pixels": lambda: png_with(chunk(b"teXt", b"") * 30_000, behind=True),
    "a text that grows": lambda: png_with(
        chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(20_000_000), 9))
    ),
    "a profile that grows": lambda: png_with(
        chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(20_000_000), 9))
    ),
    "a comment": lambda: b"P6\n#" + bytes([99]) * 500_000 + b"\n2 2\n255\n" + bytes(12),
    "tags": lambda: tiff_of_tags(60_000, 1_000_000, big=False),
    "tags of a large TIFF": lambda: tiff_of_tags(100_000, 16, big=True),
    "too many pixels": lambda: png_of(13_000, 13_000),
    "far too many pixels": lambda: png_of(2, 100_000_000),
    "a canvas": lambda: b"RIFF\x20\0\0\0WEBPVP8X\x0a\0\0\0\0\0\0\0" + b"\xfe\x3f\0" * 2,
}


@pytest.mark.parametrize("name", BOMBS)
def test_bombs_are_refused_soon(name):
    content = BOMBS[name]()
    began = time.process_time()
    with pytest.raises(Exception, match=r".") as caught:
        loaded(content)
    assert time.process_time() - began < 1
    assert "\n" not in reason_of(caught.value) and len(reason_of(caught.value)) < 200


def test_bytes_that_a_decoder_does_not_take_are_not_copied_again_and_again():
    whole = encoded()
    pixels = whole.index(b"\xff\xda") + 14  # behind the scan's header
    content = whole[:pixels] + b"\xff" * 20_000_000 + whole[pixels:]
    began = time.process_time()
    with contextlib.suppress(OSError):  # there need be no image in it
        loaded(content)
    assert time.process_time() - began < 1  # 5 s without; here 0.06


def test_a_file_that_would_be_read_whole_is_refused_by_its_size(tmp_path):
    with open(tmp_path / "a.webp", "wb") as file:
        file.write(b"RIFF\xff\xff\xff\x7fWEBPVP8 ")
        file.truncate(20 << 30)
    with (
        open(tmp_path / "a.webp", "rb") as file,
        pytest.raises(Image.DecompressionBombError, match="21,474,836,480 bytes"),
    ):
        open_image(file)


@pytest.mark.parametrize(
    ("kind", "most", "size"),
    [
        ("JPEG", 3072, (64, 48)),  # as many as are decoded
        ("JPEG", 2400, (32, 24)),
        ("MPO", 2400, (32, 24)),
        ("PNG", 3072, (64, 48)),
        ("PNG", 3071, None),
        ("BMP", 2400, None),
    ],
)
def test_pixels_are_bounded_before_they_are_decoded(monkeypatch, kind, most, size):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", most / image_files.MAX_PIXELS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # no warning, either
        if size is None:
            with pytest.raises(Image.DecompressionBombError, match="64 x 48 pixels"):
                open_image(encoded(kind=kind))
        else:
            assert loaded(encoded(kind=kind)).size == size


def test_opening_an_image_does_not_bring_other_warnings_back():
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("default")
        for _ in range(3):
            warnings.warn("once from this place", stacklevel=1)
            open_image(encoded())
    assert len(shown) == 1


def test_photographs_of_a_hundred_megapixels_are_within_the_bound():
    assert 11_648 * 8736 < image_files.MAX_PIXELS * Image.MAX_IMAGE_PIXELS < 13_000 * 13_000


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_of_many_frames_the_first_is_read(kind):
    others = [Image.new("RGB", (16, 16), (n, n, n)) for n in range(200)]
    content = encoded(Image.new("RGB", (16, 16), "red"), kind, save_all=True, append_images=others)
    assert loaded(content).convert("RGB").getpixel((3, 3)) == pytest.approx((255, 0, 0), abs=3)


ERRORS = [
    MemoryError(),
    RecursionError("too deep"),
    struct.error("unpack requires 4 bytes"),
    AssertionError(),
    zlib.error("-3"),
    KeyError(3),
    EOFError("no more"),
    IndexError("out of range"),
    ZeroDivisionError("by zero"),
    NotImplementedError("plugin"),
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_whatever_an_image_raises_makes_it_unreadable(tmp_path, monkeypatch, error):
    path = str(tmp_path / "a.jpg")
    NOISE.save(path)

    def broken(*_):
        raise error

    lazy = open_image(path)
    monkeypatch.setattr(JpegImagePlugin.JpegImageFile, "load", broken)
    with pytest.raises(OSError, match=r"cannot read .*a\.jpg") as caught:
        ReadableImages(FileReader("", [(path, 0)], {}))[0]
    assert type(error).__name__ in reason_of(caught.value)
    with pytest.raises(OSError, match="cannot decode"):
        SampleTransform(mode="RGB").decode(lazy)
    with pytest.raises(OSError, match=r"a\.jpg"):
        load_rgb(path)
    assert type(error).__name__ in convert(path, 64, 90)


def test_what_is_no_image_of_pillow_is_left_to_its_transform():
    tensor = torch.zeros(3, 8, 8)
    assert SampleTransform(mode="RGB").decode(tensor) is tensor


def test_torchvisions_folders_are_read_by_the_same_rules(tmp_path):
    folder = tmp_path / "val" / "red"
    folder.mkdir(parents=True)
    NOISE.save(folder / "0.jpg")
    (folder / "1.jpg").write_bytes(POSTSCRIPT)
    os.mkfifo(folder / "2.jpg")
    data = open_data("torch/image_folder", str(tmp_path), need_train=False)
    assert data.val[0][0].size == (64, 48)
    for number, reason in ((1, "no JPEG, PNG"), (2, "no regular file")):
        with pytest.raises(OSError, match=rf"{number}\.jpg") as caught:
            data.val[number]
        assert reason in reason_of(caught.value)
